"""Molecules as targets: coordinates, their measure, handedness, and what OpenMM says where it is installed."""

from __future__ import annotations

import copy
import math
import pickle
from dataclasses import replace

import pytest
import torch

from diffsampler import targets
from diffsampler.targets.alanine_dipeptide import ROOT, TORSIONS
from diffsampler.targets.force_field import ForceField
from diffsampler.targets.internal_chart import InternalPrior
from diffsampler.targets.molecule import BOLTZMANN, handedness
from diffsampler.targets.zmatrix import Internal, ZMatrix, dihedral, wrap
from diffsampler.testing import check_target

AlanineModel = targets.AlanineModel


@pytest.fixture(scope="module")
def system():
    return AlanineModel.AMBER96.system()


@pytest.fixture(scope="module")
def cartesian():
    return targets.AlanineDipeptide(AlanineModel.AMBER96)


@pytest.fixture(scope="module")
def internal():
    return targets.AlanineDipeptideInternal(AlanineModel.AMBER96)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rotation(seed: int = 0) -> torch.Tensor:
    q = torch.linalg.qr(normal(3, 3, seed=seed))[0]
    return q * torch.linalg.det(q)


# --- the tree ------------------------------------------------------------------------------------------------------


def test_dihedral_in_the_iupac_convention():
    # Seen along the middle bond, +z, with the near bond up, +y, the right hand is at -x: clockwise is positive.
    x = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 1.0], [-1.0, 0.0, 1.0]])
    assert dihedral(x, [[0, 1, 2, 3]]).item() == pytest.approx(math.pi / 2)


def test_tree_of_the_dipeptide(system):
    tree = ZMatrix(system.graph, 22)
    assert tree.root == ROOT
    assert int(tree.rotor.sum()) == 7
    quads = {(row.atom, row.parent, row.angle, row.dihedral) for row in tree.rows}
    assert {tuple(reversed(TORSIONS["psi"])), TORSIONS["phi"]} <= quads | {tuple(reversed(q)) for q in quads}
    assert len(tree.levels) == 3


@pytest.mark.parametrize("root", [None, (4, 1, 6), (14, 16, 15), (10, 8, 11)])
def test_tree_is_one_to_one(system, root):
    tree = ZMatrix(system.graph, 22, root=root)
    x = (system.positions + 0.02 * normal(6, 22, 3)).permute(2, 1, 0)
    coordinates = tree.to_internal(x)
    y = tree.to_cartesian(coordinates)
    distances = [torch.cdist(v.permute(2, 1, 0), v.permute(2, 1, 0)) for v in (x, y)]
    torch.testing.assert_close(*distances, rtol=0, atol=1e-12)
    assert torch.equal(handed(x, system), handed(y, system))
    for ours, again in zip(coordinates, tree.to_internal(y), strict=True):
        assert wrap(ours - again).abs().max() < 1e-10


def handed(x, system):
    return handedness(x.permute(2, 1, 0), system.stereocentres(), system.positions)


@pytest.mark.parametrize("root", [None, (4, 1, 6)])
def test_rigid_bodies_give_the_derivative(system, root):
    tree = ZMatrix(system.graph, 22, root=root)
    x = (system.positions + 0.02 * normal(4, 22, 3)).permute(2, 1, 0)
    leaves = [part.requires_grad_() for part in tree.to_internal(x)]
    y = tree.to_cartesian(Internal(*leaves))
    slope = normal(3, 22, 4, seed=1)
    for ours, auto in zip(
        tree.pull_back(y.detach(), slope), torch.autograd.grad((y * slope).sum(), leaves), strict=True
    ):
        torch.testing.assert_close(ours, auto, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("root", [None, (4, 1, 6)])
def test_volume_is_the_determinant_of_the_map_with_rigid_motions(system, root):
    """``dx = d(place) sin(beta) d(alpha, beta, gamma) volume d(internal)``: Euler angles integrate to 8 pi^2."""
    tree = ZMatrix(system.graph, 22, root=root)
    start = tree.to_internal((system.positions + 0.02 * normal(1, 22, 3)).permute(2, 1, 0))
    sizes = [len(part) for part in start]

    def place(flat):
        rigid, rest = flat[:6], flat[6:]
        x = tree.to_cartesian(Internal(*(part.unsqueeze(1) for part in rest.split(sizes))))[..., 0]
        a, b, c = rigid[3:]
        return (about(a, 2) @ about(b, 1) @ about(c, 2) @ x).mT + rigid[:3]

    rigid = torch.tensor([0.1, -0.2, 0.3, 0.5, 1.1, -2.0], dtype=torch.float64)
    flat = torch.cat([rigid, *(part[:, 0] for part in start)])
    jacobian = torch.autograd.functional.jacobian(place, flat).reshape(66, 66)
    expected = math.log(math.sin(1.1)) + tree.log_volume(start).item()
    assert torch.linalg.slogdet(jacobian).logabsdet.item() == pytest.approx(expected, abs=1e-9)


def about(angle, axis):
    c, s, one, zero = angle.cos(), angle.sin(), torch.ones_like(angle), torch.zeros_like(angle)
    if axis == 2:
        return torch.stack([c, -s, zero, s, c, zero, zero, zero, one]).reshape(3, 3)
    return torch.stack([c, zero, s, zero, one, zero, -s, zero, c]).reshape(3, 3)


# --- the chart -----------------------------------------------------------------------------------------------------


def test_chart_has_the_density_of_its_map(internal):
    """With the law of the radii, the log determinant is that of ``z -> (bonds, angles, dihedrals, radii)``."""
    molecule = internal.target
    chart, tree = molecule.chart, molecule.tree
    stiff = sum(chart.sizes[:3])
    z = internal.reference + 0.7 * normal(internal.dim)

    def outcome(point):
        coordinates, _ = chart(point.unsqueeze(1))
        u, v = point[stiff:].chunk(2)
        return torch.cat([*(part[:, 0] for part in coordinates), (u.square() + v.square()).sqrt()])

    log_det = torch.linalg.slogdet(torch.autograd.functional.jacobian(outcome, z)).logabsdet
    coordinates, ours = chart(z.unsqueeze(1))
    u, v = z[stiff:].chunk(2)
    radius = (u.square() + v.square()).sqrt()
    # The chi law with 16 degrees of freedom, normalized.
    chi = 15 * radius.log() - 0.5 * radius.square() - 7 * math.log(2.0) - math.lgamma(8.0)
    expected = log_det + chi.sum() + tree.log_volume(coordinates)[0]
    assert ours.item() == pytest.approx(expected.item(), abs=1e-10)


def test_chart_covers_everything_and_inverts(internal):
    molecule = internal.target
    z = internal.prior.sample(500, generator=torch.Generator().manual_seed(0))
    z = torch.cat([z[:, :53] * 3.0, z[:, 53:]], 1)
    coordinates, log_det = molecule.chart(z.mT)
    assert (coordinates.bonds > 0).all() and log_det.isfinite().all()
    assert ((coordinates.angles > 0) & (coordinates.angles < math.pi)).all()
    stiff = sum(molecule.chart.sizes[:3])
    back = molecule.chart.inverse(coordinates)
    torch.testing.assert_close(back[:stiff], z.mT[:stiff], rtol=1e-7, atol=1e-7)
    again = molecule.chart(back)[0]
    for ours, other in zip(coordinates, again, strict=True):
        assert wrap(ours - other).abs().max() < 1e-8


def test_rotors_have_no_seam(internal):
    """The density along a full turn of phi is periodic and smooth, whatever the radii."""
    phi = torch.linspace(-math.pi, math.pi, 721, dtype=torch.float64)
    stiff, rotors = 53, 7
    z = internal.reference.repeat(721, 1)
    radius = z[:, [stiff]].hypot(z[:, [stiff + rotors]])[:, 0]
    z[:, stiff], z[:, stiff + rotors] = radius * phi.cos(), radius * phi.sin()
    log_prob, score = internal.log_prob_and_score(z)
    assert log_prob[0].item() == pytest.approx(log_prob[-1].item(), abs=1e-6)
    assert (internal.torsion_angles(z)[1:-1, 0] - phi[1:-1]).abs().max() < 1e-9
    around = score[:, stiff] * -z[:, stiff + rotors] + score[:, stiff + rotors] * z[:, stiff]
    slope = (log_prob[2:] - log_prob[:-2]) / (phi[2] - phi[0])
    soft = log_prob[1:-1] > log_prob.max() - 50.0
    torch.testing.assert_close(around[1:-1][soft], slope[soft], rtol=2e-2, atol=0.1)


def test_hand_is_kept_whatever_the_point(internal):
    z = internal.prior.sample(2000, generator=torch.Generator().manual_seed(0))
    z = torch.cat([z[:, :53] * 10.0, z[:, 53:]], 1)
    centres = torch.tensor([[8, 6, 14, 10]])
    hands = handedness(internal.target.positions(z), centres, internal.target.system.positions)
    assert (hands == 1).all()


def test_prior_is_a_normalized_target():
    check_target(InternalPrior(5, 2), generator=torch.Generator().manual_seed(0))


# --- the targets ---------------------------------------------------------------------------------------------------


def test_cartesian_target_keeps_its_promises(cartesian):
    noise = cartesian.space.project(0.1 * normal(32, 66))
    check_target(cartesian, generator=torch.Generator().manual_seed(0), points=cartesian.reference + noise)


def test_internal_target_keeps_its_promises(internal):
    # At the prior's draws the conformance suite of all targets has it.
    points = internal.reference + 0.3 * normal(32, 67)
    check_target(internal, generator=torch.Generator().manual_seed(0), points=points)


@pytest.mark.parametrize("kind", ["cartesian", "internal"])
def test_targets_copy_and_pickle(kind, request):
    target = request.getfixturevalue(kind)
    x = target.reference + target.space.project(0.05 * normal(3, target.dim))
    for other in (copy.deepcopy(target), pickle.loads(pickle.dumps(target))):
        assert torch.equal(other.log_prob(x), target.log_prob(x))


def test_energies_are_in_kt_at_the_temperature(cartesian, internal):
    positions = cartesian.target.system.positions
    energy = ForceField(cartesian.target.system).energy(positions).item()
    assert BOLTZMANN * 300.0 == pytest.approx(2.4943387854)
    assert cartesian.energy(cartesian.reference).item() == pytest.approx(energy / 2.4943387854, rel=1e-9)
    warm = targets.AlanineDipeptide(AlanineModel.AMBER96, temperature=600.0, unit=1.0)
    assert warm.energy(warm.reference).item() == pytest.approx(energy / (2 * 2.4943387854), rel=1e-9)
    torch.testing.assert_close(warm.reference * 10.0, cartesian.reference)
    # Both kinds of coordinates describe the same configurations.
    z = internal.reference + 0.3 * normal(4, 67)
    x = cartesian.space.project(internal.target.positions(z).flatten(-2) / 0.1)
    _, log_det = internal.target.chart(z.mT)
    torch.testing.assert_close(cartesian.log_prob(x) + log_det, internal.log_prob(z), rtol=1e-10, atol=1e-8)
    torch.testing.assert_close(cartesian.torsion_angles(x), internal.torsion_angles(z), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(internal.target.from_positions(internal.target.positions(z))[:, :53], z[:, :53])


def test_mirror_images_are_folded_onto_the_l_form(cartesian):
    x = cartesian.reference + cartesian.space.project(0.05 * normal(4, 66))
    assert (cartesian.target.handedness(x) == 1).all() and (cartesian.target.handedness(-x) == -1).all()
    torch.testing.assert_close(cartesian.log_prob(-x), cartesian.log_prob(x))
    torch.testing.assert_close(cartesian.target.fold(-x), x)
    torch.testing.assert_close(cartesian.torsion_angles(-x), cartesian.torsion_angles(x))
    # L-alanine: (N - CA) . ((C - CA) x (CB - CA)) > 0.
    p = cartesian.target.positions(x[0])
    assert torch.dot(p[6] - p[8], torch.linalg.cross(p[14] - p[8], p[10] - p[8])) > 0


def test_stereocentres_have_four_different_neighbours(system):
    assert system.stereocentres()[:, 0].tolist() == [8]
    # With a hydrogen in the place of its methyl group the alpha carbon has two like neighbours.
    elements = list(system.elements)
    elements[10] = "H"
    kept = [k for k, pair in enumerate(system.graph.tolist()) if not set(pair) & {11, 12, 13}]
    assert len(replace(system, elements=tuple(elements), graph=system.graph[kept]).stereocentres()) == 0


def test_named_values(internal, cartesian):
    for target in (internal, cartesian):
        named = target.constrain(target.reference.unsqueeze(0))
        assert set(named) == {"positions", "phi", "psi"}
        assert named["positions"].shape == (1, 22, 3)
        assert named["phi"].item() == pytest.approx(-1.298275, abs=1e-4)


def test_errors_name_what_is_wrong(system):
    with pytest.raises(TypeError, match="Expected model to be an AlanineModel; got str"):
        targets.AlanineDipeptide("ff96")
    with pytest.raises(ValueError, match="Expected temperature to be positive; got 0"):
        targets.AlanineDipeptideInternal(temperature=0.0)
    with pytest.raises(ValueError, match=r"Expected four of 22 atoms for torsion phi; got \(1, 2, 3, 22\)"):
        targets.Molecule(system, torsions={"phi": (1, 2, 3, 22)})
    with pytest.raises(ValueError, match=r"Expected root \(centre, left, right\) with two bonds"):
        ZMatrix(system.graph, 22, root=(0, 1, 2))
    with pytest.raises(ValueError, match="Expected a connected molecule of 22 atoms; got a part of 18"):
        ZMatrix(system.graph[1:], 22)
    with pytest.raises(ValueError, match="Expected a reference configuration at a minimum"):
        # Everything on one spot half as wide: repulsion pushes every coordinate apart.
        targets.InternalMolecule(replace(system, positions=torch.flip(0.4 * system.positions, (0,))))


# --- rotors as angles ----------------------------------------------------------------------------------------------


def test_rotors_as_angles_have_the_density_of_both_numbers_without_the_radius(internal):
    """``rho(z, u, v) = rho(z, phi) p(r) / r`` at any radius, p the chi law with 16 degrees of freedom."""
    circular = targets.CircularMolecule(internal.target)
    x = circular.prior.sample(6, generator=torch.Generator().manual_seed(0))
    x[:, : circular.line] *= 0.3
    radius = 2.0 + 3.0 * torch.rand(6, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    u, v = radius * x[:, -7:].cos(), radius * x[:, -7:].sin()
    planar = torch.cat([x[:, : circular.line], u, v], -1)
    log_radial = 14.0 * radius.log() - 0.5 * radius.square() - 7.0 * math.log(2.0) - math.lgamma(8.0)
    torch.testing.assert_close(internal.log_prob(planar), circular.log_prob(x) + log_radial.sum(-1), rtol=1e-10, atol=0)
    torch.testing.assert_close(circular.circular(planar), x)
    for name, value in circular.constrain(x).items():
        torch.testing.assert_close(value, internal.constrain(planar)[name])
    y = x.clone().requires_grad_()
    (auto,) = torch.autograd.grad(circular.log_prob(y).sum(), y)
    torch.testing.assert_close(circular.score(x), auto, rtol=1e-6, atol=1e-6)
