"""Molecular mechanics energies against OpenMM, finite differences and formulas; OpenMM itself is not needed."""

from __future__ import annotations

import copy
import math
import pickle
from dataclasses import replace

import pytest
import torch

from diffsampler.targets.alanine_dipeptide import AlanineModel
from diffsampler.targets.force_field import ForceField
from diffsampler.targets.molecular_system import ImplicitSolvent, MolecularSystem

KT = 2.494338785445972

# OpenMM 8.6.1, Reference platform, printed by experiments/aldp_parameters.py: energy in kJ/mol, sum of absolute forces
# and force on the first atom in kJ/mol/nm at the reference positions moved by 0.01 sin(0.7 (index + 1) k) nm.
OPENMM = {
    ("AMBER96", 0): (359.34463596010, 144486.05815458, [313.482538968, -210.237822349, -451.584397809]),
    ("AMBER96", 1): (503.07940176634, 186760.82072487, [727.910885416, -3233.101949328, 1321.973931770]),
    ("AMBER96", 2): (-119.04381235364, 2676.00367711, [17.398582605, -26.946914247, 2.477486096]),
    ("AMBER96_OBC1", 0): (302.74099895601, 143010.72774148, [306.015646626, -217.597243021, -418.142855788]),
    ("AMBER96_OBC1", 1): (446.74816471772, 184619.03602334, [730.566094308, -3239.015220734, 1354.719104122]),
    ("AMBER96_OBC1", 2): (-163.68964805817, 4440.67056196, [18.064535053, -33.971768167, 33.756498632]),
    ("AMBER96_OBC2", 0): (304.56901103144, 143111.59901957, [308.923002116, -219.739730666, -418.709391073]),
    ("AMBER96_OBC2", 1): (448.52826473750, 184755.22077188, [731.719961521, -3239.550733166, 1354.107859116]),
    ("AMBER96_OBC2", 2): (-162.61889651262, 4303.70061748, [19.675148605, -35.443570919, 33.251447683]),
    ("AMBER99SB_ILDN", 0): (379.58463680459, 146326.87692811, [271.020975644, -45.958715776, -559.891559524]),
    ("AMBER99SB_ILDN", 1): (550.43294706760, 188864.65305942, [731.247024630, -3030.550693786, 1489.639874372]),
    ("AMBER99SB_ILDN", 2): (-90.48828827114, 2725.94889564, [17.018013357, -25.335604729, 3.687434609]),
    ("AMBER99SB_ILDN_OBC1", 0): (325.12625054892, 144696.69907623, [263.760564826, -49.087796263, -524.855434523]),
    ("AMBER99SB_ILDN_OBC1", 1): (493.98309430013, 186822.96554291, [733.958175381, -3031.889956265, 1524.066956902]),
    ("AMBER99SB_ILDN_OBC1", 2): (-135.67776793754, 4645.49194733, [18.058845863, -28.266107154, 36.512260159]),
    ("AMBER99SB_ILDN_OBC2", 0): (334.61785984786, 144997.55664089, [273.768190590, -54.472606901, -529.904947229]),
    ("AMBER99SB_ILDN_OBC2", 1): (504.73465307735, 187214.29275856, [738.258942349, -3033.823306569, 1519.562261251]),
    ("AMBER99SB_ILDN_OBC2", 2): (-127.38009140095, 4403.01104586, [24.630936528, -33.235134243, 32.758641270]),
}


@pytest.fixture(scope="module")
def fields() -> dict[str, ForceField]:
    return {model.name: ForceField(model.system()) for model in AlanineModel}


def moved(system: MolecularSystem, index: int) -> torch.Tensor:
    return system.positions + 0.01 * torch.sin(0.7 * (index + 1) * torch.arange(66, dtype=torch.float64)).reshape(22, 3)


def disturbed(system: MolecularSystem, n: int, *, scale: float = 0.01, seed: int = 0) -> torch.Tensor:
    noise = torch.randn(n, *system.positions.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return system.positions + scale * noise


@pytest.mark.parametrize("model", AlanineModel, ids=lambda model: model.name)
def test_energies_and_forces_are_those_of_openmm(model, fields):
    field = fields[model.name]
    for index in range(3):
        energy, total, first = OPENMM[model.name, index]
        x = moved(field.system, index)
        value, gradient = field.energy_and_gradient(x)
        assert value.item() == pytest.approx(energy, abs=1e-9)
        assert field.energy(x).item() == pytest.approx(energy, abs=1e-9)
        assert (-gradient[0]).tolist() == pytest.approx(first, abs=1e-8)
        # 66 components: their rounding may add up.
        assert gradient.abs().sum().item() == pytest.approx(total, abs=5e-8)
        single, slope = field.energy_and_gradient(x.float())
        assert single.dtype == slope.dtype == torch.float32
        # At float32 positions, so that only the arithmetic differs.
        exact = field.energy(x.float().double()).item()
        assert abs(single.item() - exact) < 1e-2 * KT


def test_openmm_numbers_have_power(fields):
    """Negative control: a charge that is wrong in its sixth digit is seen."""
    system = fields["AMBER96_OBC1"].system
    wrong = ForceField(replace(system, charge=system.charge * (1.0 + 1e-6)))
    assert abs(wrong.energy(moved(system, 0)).item() - OPENMM["AMBER96_OBC1", 0][0]) > 1e-6


@pytest.mark.parametrize("name", ["AMBER96", "AMBER96_OBC1", "AMBER99SB_ILDN_OBC2"])
def test_written_gradient_is_the_derivative(name, fields):
    field = fields[name]
    x = disturbed(field.system, 8, scale=0.02).requires_grad_()
    energy, gradient = field.energy_and_gradient(x.detach())
    value = field.energy(x)
    torch.testing.assert_close(value.detach(), energy, rtol=1e-13, atol=1e-9)
    (auto,) = torch.autograd.grad(value.sum(), x)
    torch.testing.assert_close(gradient, auto, rtol=1e-10, atol=1e-7)
    v = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    h = 1e-6
    slope = (field.energy(x.detach() + h * v) - field.energy(x.detach() - h * v)) / (2 * h)
    torch.testing.assert_close((gradient * v).sum((-2, -1)), slope, rtol=1e-5, atol=1e-2)


def test_second_derivatives_exist(fields):
    field = fields["AMBER96_OBC1"]
    x = disturbed(field.system, 1)[0].requires_grad_()
    (slope,) = torch.autograd.grad(field.energy(x), x, create_graph=True)
    (second,) = torch.autograd.grad(slope[0, 0], x)
    h = torch.zeros(22, 3, dtype=torch.float64)
    h[0, 0] = 1e-6
    difference = field.energy_and_gradient(x.detach() + h)[1] - field.energy_and_gradient(x.detach() - h)[1]
    torch.testing.assert_close(second, difference / 2e-6, rtol=1e-5, atol=1.0)


def test_energy_has_the_symmetries_of_space(fields):
    field = fields["AMBER99SB_ILDN_OBC2"]
    x = disturbed(field.system, 4)
    q = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64))[0]
    energy, gradient = field.energy_and_gradient(x)
    turned, slope = field.energy_and_gradient(-x @ q + 3.0)
    torch.testing.assert_close(turned, energy, rtol=1e-11, atol=1e-8)
    torch.testing.assert_close(slope, -gradient @ q, rtol=1e-9, atol=1e-6)
    assert gradient.sum(-2).abs().max() < 1e-8


def test_any_batch_shape_and_any_size(fields):
    field = fields["AMBER96"]
    x = disturbed(field.system, 600)
    energy, gradient = field.energy_and_gradient(x)
    for part in (slice(0, 1), slice(255, 258), slice(590, 600)):
        value, slope = field.energy_and_gradient(x[part])
        torch.testing.assert_close(value, energy[part], rtol=1e-13, atol=1e-9)
        torch.testing.assert_close(slope, gradient[part], rtol=1e-11, atol=1e-8)
    assert field.energy(x[:0]).shape == (0,)
    value, slope = field.energy_and_gradient(x[:12].reshape(2, 3, 2, 22, 3))
    assert value.shape == (2, 3, 2) and slope.shape == (2, 3, 2, 22, 3)
    torch.testing.assert_close(field.energy(x[:12].reshape(2, 3, 2, 22, 3)), value, rtol=1e-13, atol=1e-9)


def test_text_restores_every_bit(fields):
    for name in ("AMBER96", "AMBER99SB_ILDN_OBC2"):
        field = fields[name]
        other = ForceField(MolecularSystem.from_json(field.system.to_json()))
        x = disturbed(field.system, 3)
        assert torch.equal(other.energy(x), field.energy(x))
        for again in (copy.deepcopy(field), pickle.loads(pickle.dumps(field))):
            assert torch.equal(again.energy(x), field.energy(x))
        assert set(field.state_dict()) == set(other.state_dict())


def test_failed_compilation_falls_back(fields, monkeypatch):
    def broken(*_, **__):
        def call(*_):
            raise RuntimeError("no compiler")

        return call

    monkeypatch.setattr(torch, "compile", broken)
    system = fields["AMBER96"].system
    field = ForceField(system, compiled=True)
    x = disturbed(system, 300)
    energy, gradient = field.energy_and_gradient(x)
    assert field.compile_failure == "RuntimeError: no compiler"
    expected = fields["AMBER96"].energy_and_gradient(x)
    assert torch.equal(energy, expected[0]) and torch.equal(gradient, expected[1])


def test_compiled_chunks_are_padded(fields, monkeypatch):
    shapes = []

    def spy(function, **_):
        def call(x, terms):
            shapes.append(tuple(x.shape))
            return function(x, terms)

        return call

    monkeypatch.setattr(torch, "compile", spy)
    system = fields["AMBER96"].system
    field = ForceField(system, compiled=True)
    x = disturbed(system, 256 + 100)
    energy, gradient = field.energy_and_gradient(x)
    # One shape, so one compilation; remainders of less than a quarter run as they are.
    assert shapes == [(3, 22, 256)] * 2
    field.energy_and_gradient(x[:63])
    assert len(shapes) == 2
    expected = fields["AMBER96"].energy_and_gradient(x)
    torch.testing.assert_close(energy, expected[0], rtol=1e-13, atol=1e-9)
    torch.testing.assert_close(gradient, expected[1], rtol=1e-11, atol=1e-8)


@pytest.mark.slow
def test_compiled_gradient_agrees(fields):
    system = fields["AMBER96_OBC1"].system
    field = ForceField(system, compiled=True)
    x = disturbed(system, 512)
    energy, gradient = field.energy_and_gradient(x)
    expected = fields["AMBER96_OBC1"].energy_and_gradient(x)
    torch.testing.assert_close(energy, expected[0], rtol=1e-12, atol=1e-8)
    torch.testing.assert_close(gradient, expected[1], rtol=1e-10, atol=1e-6)


# --- formulas, on four atoms ---------------------------------------------------------------------------------------


def chain(**changes) -> MolecularSystem:
    """Four atoms in a row without any interaction, to which a test adds one."""
    none, empty = torch.zeros(0, dtype=torch.float64), torch.zeros(0, 2, dtype=torch.int64)
    system = MolecularSystem(
        names=tuple(f"X:{k}" for k in range(4)),
        elements=("C",) * 4,
        mass=torch.full((4,), 12.0, dtype=torch.float64),
        positions=torch.tensor([[0.1, 0.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.1, 0.0], [0.02, 0.15, 0.1]]).double(),
        graph=torch.tensor([[0, 1], [1, 2], [2, 3]]),
        bond_atoms=empty,
        bond_length=none,
        bond_constant=none,
        angle_atoms=empty.new_zeros(0, 3),
        angle_value=none,
        angle_constant=none,
        torsion_atoms=empty.new_zeros(0, 4),
        torsion_period=none.long(),
        torsion_phase=none,
        torsion_constant=none,
        charge=torch.zeros(4, dtype=torch.float64),
        sigma=torch.zeros(4, dtype=torch.float64),
        epsilon=torch.zeros(4, dtype=torch.float64),
        exception_atoms=empty,
        exception_charge=none,
        exception_sigma=none,
        exception_epsilon=none,
        coulomb=138.9,
    )
    return replace(system, **changes)


def test_torsions_with_any_phase():
    constants, periods, phases = [2.0, 0.7, 1.1], [1, 3, 2], [0.4, math.pi, 0.0]
    system = chain(
        torsion_atoms=torch.tensor([[0, 1, 2, 3], [3, 2, 1, 0], [0, 1, 2, 3]]),
        torsion_period=torch.tensor(periods),
        torsion_phase=torch.tensor(phases, dtype=torch.float64),
        torsion_constant=torch.tensor(constants, dtype=torch.float64),
    )
    field = ForceField(system)
    x = disturbed(system, 5, scale=0.02)
    u, v, w = x[:, 0] - x[:, 1], x[:, 2] - x[:, 1], x[:, 3] - x[:, 2]
    axis = v / v.norm(dim=-1, keepdim=True)
    a, b = u - (u * axis).sum(-1, keepdim=True) * axis, w - (w * axis).sum(-1, keepdim=True) * axis
    phi = torch.atan2((torch.linalg.cross(axis, a) * b).sum(-1), (a * b).sum(-1))
    terms = zip(constants, periods, phases, strict=True)
    expected = sum(k * (1 + torch.cos(n * phi - d)) for k, n, d in terms)
    torch.testing.assert_close(field.energy(x), expected, rtol=1e-12, atol=1e-12)
    flat = x.clone().requires_grad_()
    (auto,) = torch.autograd.grad(field.energy(flat).sum(), flat)
    torch.testing.assert_close(field.energy_and_gradient(x)[1], auto, rtol=1e-9, atol=1e-9)


def test_pairs_bonds_and_angles_by_formula():
    sigma, epsilon, charge = [0.1, 0.2, 0.3, 0.25], [0.5, 1.0, 2.0, 0.0], [1.0, -0.5, 0.25, 2.0]
    system = chain(
        charge=torch.tensor(charge).double(),
        sigma=torch.tensor(sigma).double(),
        epsilon=torch.tensor(epsilon).double(),
        bond_atoms=torch.tensor([[0, 3]]),
        bond_length=torch.tensor([0.2]).double(),
        bond_constant=torch.tensor([100.0]).double(),
        angle_atoms=torch.tensor([[0, 1, 2]]),
        angle_value=torch.tensor([1.0]).double(),
        angle_constant=torch.tensor([30.0]).double(),
        exception_atoms=torch.tensor([[2, 1], [0, 1]]),
        exception_charge=torch.tensor([0.125, 0.0]).double(),
        exception_sigma=torch.tensor([0.5, 1.0]).double(),
        exception_epsilon=torch.tensor([0.25, 0.0]).double(),
    )
    x = system.positions
    r = torch.cdist(x, x)
    expected = 50.0 * (r[0, 3] - system.bond_length[0]) ** 2 + 15.0 * (math.pi / 2 - 1.0) ** 2
    for i in range(4):
        for j in range(i + 1, 4):
            s, e = (sigma[i] + sigma[j]) / 2, math.sqrt(epsilon[i] * epsilon[j])
            q = charge[i] * charge[j]
            s, e, q = {(1, 2): (0.5, 0.25, 0.125), (0, 1): (1.0, 0.0, 0.0)}.get((i, j), (s, e, q))
            expected += 4 * e * ((s / r[i, j]) ** 12 - (s / r[i, j]) ** 6) + 138.9 * q / r[i, j]
    assert ForceField(system).energy(x).item() == pytest.approx(expected.item(), rel=1e-6)


def test_born_energy_of_a_lone_ion():
    # Two ions far apart: each has its own radius as Born radius but for the tiny descreening by the other.
    solvent = ImplicitSolvent(
        charge=torch.tensor([1.0, -1.0, 0.0, 0.0]).double(),
        radius=torch.tensor([0.2, 0.15, 0.1, 0.1]).double(),
        scale=torch.full((4,), 0.8, dtype=torch.float64),
        tanh=(1.0, 0.8, 4.85),
        strength=100.0,
        surface=0.0,
        offset=0.009,
        swallow=True,
    )
    system = chain(solvent=solvent)
    x = torch.tensor([[0.0, 0, 0], [1e3, 0, 0], [0, 1e3, 0], [0, 0, 1e3]]).double()
    expected = -50.0 / 0.191 - 50.0 / 0.141 + 100.0 / 1e3
    assert ForceField(system).energy(x).item() == pytest.approx(expected, rel=1e-7)


def test_swallowed_atoms_have_smooth_energies():
    """An atom inside of another crosses the corners of the descreening integral: slopes stay those of the energy."""
    solvent = ImplicitSolvent(
        charge=torch.tensor([1.0, -1.0, 0.3, 0.0]).double(),
        radius=torch.tensor([0.4, 0.1, 0.15, 0.1]).double(),
        scale=torch.full((4,), 0.9, dtype=torch.float64),
        tanh=(1.0, 0.8, 4.85),
        strength=100.0,
        surface=28.0,
        offset=0.009,
        swallow=True,
    )
    system = chain(solvent=solvent)
    field = ForceField(system)
    x = disturbed(system, 50, scale=0.05).requires_grad_()
    (auto,) = torch.autograd.grad(field.energy(x).sum(), x)
    torch.testing.assert_close(field.energy_and_gradient(x)[1], auto, rtol=1e-9, atol=1e-7)


# --- errors --------------------------------------------------------------------------------------------------------


def test_errors_name_what_is_wrong(fields):
    field = fields["AMBER96"]
    with pytest.raises(ValueError, match=r"Expected positions of shape \(..., 22, 3\); got \(2, 66\)"):
        field.energy(torch.zeros(2, 66))
    with pytest.raises(TypeError, match="Expected system to be a MolecularSystem; got str"):
        ForceField("amber96")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"Expected mass of shape \(4,\); got \(3,\)"):
        chain(mass=torch.ones(3))
    with pytest.raises(ValueError, match="Expected graph among 4 atoms; got 0 to 4"):
        chain(graph=torch.tensor([[0, 4]]))
    with pytest.raises(ValueError, match="Expected positive periods of torsions; got 0"):
        one = torch.ones(1, dtype=torch.float64)
        chain(
            torsion_atoms=torch.tensor([[0, 1, 2, 3]]),
            torsion_period=torch.tensor([0]),
            torsion_phase=one,
            torsion_constant=one,
        )
