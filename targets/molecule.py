r"""Boltzmann densities of molecules, :math:`\rho(x) = e^{-U(x) / kT}`, in Cartesian and in internal coordinates.

**Handedness.** No force field knows left from right: in Cartesian coordinates a chiral molecule and its mirror image
have the same energy, are separated by a barrier of hundreds of kT, and each has half of the mass. :class:`Molecule`
leaves it so, because the density is then symmetric under all rotations and reflections, as an equivariant sampler is,
and :meth:`Molecule.fold` reflects configurations onto the reference's hand, which is exact for one stereocentre. In
:class:`InternalMolecule` the mirror image is outside of the space.

**Normalizers.** Both are integrals over their own space. With ``n`` atoms and lengths in units of :math:`a` nm,

.. math:: \log Z_{Cartesian} = \log Z_{internal} + \log(8 \pi^2) - \tfrac32 \log n - 3 (n - 1) \log a + \log h,

where :math:`h = 2` for a molecule with a stereocentre and 1 for one without.

Energies are not regularized: configurations with overlapping atoms have log densities of -1e6 to -1e30.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import final

import torch
from torch import Tensor

from diffsampler.space import Euclidean, MeanFree
from diffsampler.target import Target
from diffsampler.targets import checks
from diffsampler.targets.force_field import ForceField
from diffsampler.targets.internal_chart import InternalChart, InternalPrior
from diffsampler.targets.molecular_system import MolecularSystem
from diffsampler.targets.zmatrix import Internal, ZMatrix, dihedral

__all__ = ["BOLTZMANN", "InternalMolecule", "Molecule", "handedness"]

BOLTZMANN = 8.31446261815324e-3
"""Gas constant, kJ/mol/K."""

Torsions = Mapping[str, Sequence[int]]


@final
class Molecule(Target):
    r"""The Boltzmann density of positions with the centre of mass (of equal masses) removed.

    Arguments:
        system: The molecule, from :func:`~diffsampler.targets.openmm_system.from_pdb`, say.
        temperature: In kelvin.
        unit: Length of one unit of ``x`` in nm; the default is an Ångström, in which a molecule's scales are near one.
        torsions: Dihedrals to report, four atoms by name.
        compiled: Whether to compile the gradient; see :class:`~diffsampler.targets.force_field.ForceField`.
    """

    def __init__(
        self,
        system: MolecularSystem,
        *,
        temperature: float = 300.0,
        unit: float = 0.1,
        torsions: Torsions | None = None,
        compiled: bool = False,
    ) -> None:
        super().__init__(MeanFree(system.num_atoms, 3))
        self.system = system
        self.temperature = checks.positive("temperature", temperature, ()).item()
        self.unit = checks.positive("unit", unit, ()).item()
        self.kt = BOLTZMANN * self.temperature
        self.torsions = _checked_torsions(torsions, system)
        self.force_field = ForceField(system, compiled=compiled)
        self._stereocentres = system.stereocentres()

    @property
    def reference(self) -> Tensor:
        """The system's own configuration as a point ``(D,)``, float64."""
        return self.space.project(self.system.positions.flatten() / self.unit)

    def log_prob(self, x: Tensor) -> Tensor:
        return -self.force_field.energy(self.positions(x)) / self.kt

    def log_prob_and_score(self, x: Tensor) -> tuple[Tensor, Tensor]:
        energy, gradient = self.force_field.energy_and_gradient(self.positions(x.detach()))
        return -energy / self.kt, -(self.unit / self.kt) * gradient.flatten(-2)

    def positions(self, x: Tensor) -> Tensor:
        """Positions in nm, ``(..., D) -> (..., n, 3)``."""
        return self.unit * x.unflatten(-1, (-1, 3))

    def handedness(self, x: Tensor) -> Tensor:
        """Hand of each stereocentre relative to the reference, ``(..., D) -> (..., c)`` of 1 and -1."""
        return handedness(self.positions(x), self._stereocentres, self.system.positions)

    def fold(self, x: Tensor) -> Tensor:
        """Reflect those configurations whose first stereocentre has the other hand; the density does not change."""
        return x if not len(self._stereocentres) else x * self.handedness(x)[..., :1].to(x)

    def constrain(self, x: Tensor) -> dict[str, Tensor]:
        """``positions (n, atoms, 3)`` in nm, and the named torsions, all of the folded configuration."""
        positions = self.positions(self.fold(x))
        return {"positions": positions} | _named(positions, self.torsions)


@final
class InternalMolecule(Target):
    """The Boltzmann density of bond lengths, angles and dihedrals, as a density on Euclidean space with a prior.

    See :mod:`diffsampler.targets.internal_chart` for the coordinates, of which every one has unit scale, and for the
    prior: harmonic stiff coordinates, uniform rotors. Overlapping atoms are common in the prior, so that a path of
    tempered densities needs ten or more temperatures from it.

    Arguments:
        system: The molecule; its reference configuration should be a minimum of the energy.
        temperature: In kelvin.
        torsions: Dihedrals to report, four atoms by name.
        root: Centre, left and right atom of the tree; see :class:`~diffsampler.targets.zmatrix.ZMatrix`.
        compiled: Whether to compile the gradient; see :class:`~diffsampler.targets.force_field.ForceField`.

    Raises:
        ValueError: If the molecule is not connected, or a stiff coordinate has no restoring force at the reference.
    """

    prior: Target

    def __init__(
        self,
        system: MolecularSystem,
        *,
        temperature: float = 300.0,
        torsions: Torsions | None = None,
        root: tuple[int, int, int] | None = None,
        compiled: bool = False,
    ) -> None:
        kt = BOLTZMANN * checks.positive("temperature", temperature, ()).item()
        tree = ZMatrix(system.graph, system.num_atoms, root=root)
        force_field = ForceField(system, compiled=compiled)
        centers = tree.to_internal(system.positions.mT.unsqueeze(-1))
        chart = InternalChart(tree, centers, _scales(force_field, tree, centers, kt), _handed(system, tree))
        stiff = sum(chart.sizes[:3])
        super().__init__(Euclidean(chart.dim), prior=InternalPrior(stiff, chart.sizes[3]))
        self.system = system
        self.temperature = float(temperature)
        self.kt = kt
        self.torsions = _checked_torsions(torsions, system)
        self.force_field = force_field
        self.tree = tree
        self.chart = chart

    @property
    def reference(self) -> Tensor:
        """The system's own configuration as a point ``(D,)``, float64."""
        return self.chart.inverse(self.tree.to_internal(self.system.positions.mT.unsqueeze(-1))).squeeze(-1)

    def log_prob(self, x: Tensor) -> Tensor:
        positions, log_det = self._unfold(x)
        return (log_det - self.force_field.energy(positions) / self.kt).reshape(x.shape[:-1])

    @torch.no_grad()
    def log_prob_and_score(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z = x.detach().reshape(-1, self.dim).mT.contiguous()
        internal, log_det = self.chart(z)
        positions = self.tree.to_cartesian(internal)
        energy, gradient = self.force_field.energy_and_gradient(positions.permute(2, 1, 0))
        pulled = self.tree.pull_back(positions, -gradient.permute(2, 1, 0).contiguous() / self.kt)
        score = self.chart.pull_back(z, internal, pulled)
        return (log_det - energy / self.kt).reshape(x.shape[:-1]), score.mT.reshape(x.shape)

    def positions(self, x: Tensor) -> Tensor:
        """Positions in nm, ``(..., D) -> (..., n, 3)``, with the centre of mass (of equal masses) at the origin."""
        positions = self._unfold(x)[0]
        return (positions - positions.mean(-2, keepdim=True)).reshape(*x.shape[:-1], self.system.num_atoms, 3)

    def from_positions(self, positions: Tensor) -> Tensor:
        """Points ``(..., D)`` of positions ``(..., n, 3)`` in nm of the reference's hand, radii at their mode."""
        flat = positions.reshape(-1, *positions.shape[-2:]).permute(2, 1, 0)
        return self.chart.inverse(self.tree.to_internal(flat)).mT.reshape(*positions.shape[:-2], self.dim)

    def constrain(self, x: Tensor) -> dict[str, Tensor]:
        """``positions (n, atoms, 3)`` in nm, and the named torsions."""
        positions = self.positions(x)
        return {"positions": positions} | _named(positions, self.torsions)

    def _unfold(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Positions ``(B, n, 3)`` and log determinants ``(B,)``."""
        internal, log_det = self.chart(x.reshape(-1, self.dim).mT)
        return self.tree.to_cartesian(internal).permute(2, 1, 0), log_det


def handedness(positions: Tensor, centres: Tensor, reference: Tensor) -> Tensor:
    """Hands of stereocentres ``(c, 4)`` in positions ``(..., n, 3)``: 1 as in ``reference (n, 3)``, else -1."""

    def volume(x: Tensor) -> Tensor:
        center, a, b, c = (x.index_select(-2, column.to(x.device)) for column in centres.unbind(1))
        return (torch.linalg.cross(a - center, b - center) * (c - center)).sum(-1)

    same = volume(positions) * volume(reference).to(positions) > 0
    return torch.where(same, 1, -1)


def _checked_torsions(torsions: Torsions | None, system: MolecularSystem) -> dict[str, tuple[int, ...]]:
    checked = {name: tuple(atoms) for name, atoms in (torsions or {}).items()}
    for name, atoms in checked.items():
        if len(set(atoms)) != 4 or not all(0 <= atom < system.num_atoms for atom in atoms):
            raise ValueError(f"Expected four of {system.num_atoms} atoms for torsion {name}; got {atoms}.")
    return checked


def _named(positions: Tensor, torsions: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    if not torsions:
        return {}
    values = dihedral(positions, list(torsions.values()))
    return dict(zip(torsions, values.unbind(-1), strict=True))


def _handed(system: MolecularSystem, tree: ZMatrix) -> Tensor:
    """The first offset about each stereocentre, which decides its hand, ``(n - 3,)``, boolean."""
    handed = torch.zeros(len(tree.rows), dtype=torch.bool)
    for centre in system.stereocentres()[:, 0].tolist():
        places = [k for k, row in enumerate(tree.rows) if row.parent == centre and not bool(tree.rotor[k])]
        handed[places[:1]] = True
    return handed


def _scales(force_field: ForceField, tree: ZMatrix, centers: Internal, kt: float) -> Internal:
    r"""Standard deviations :math:`\sqrt{kT (H^{-1})_{ii}}` of the stiff coordinates with the rotors fixed."""
    sizes = [len(part) for part in centers]
    point = torch.cat(centers)
    stiff = torch.cat([torch.ones(sum(sizes[:2]), dtype=torch.bool), ~tree.rotor])
    # Differences of the gradient: steps of 1e-5 nm or rad leave errors of 1e-4 of the stiffness at most.
    step = 1e-5 * torch.eye(len(point), dtype=torch.float64)[:, stiff]
    internal = Internal(*torch.cat([point + step, point - step], 1).split(sizes))
    positions = tree.to_cartesian(internal)
    gradient = force_field.energy_and_gradient(positions.permute(2, 1, 0))[1].permute(2, 1, 0)
    upper, lower = torch.cat(tree.pull_back(positions, gradient))[stiff].chunk(2, 1)
    hessian = (upper - lower) / 2e-5
    diagonal = hessian.diagonal()
    if not bool((diagonal > 0).all()):
        raise ValueError(
            f"Expected a reference configuration at a minimum; got {int((diagonal <= 0).sum())} stiff coordinates "
            "without a restoring force. Minimize its energy first."
        )
    scale = diagonal.rsqrt()
    values, vectors = torch.linalg.eigh(0.5 * (hessian + hessian.mT) * scale * scale.unsqueeze(1))
    # Soft combinations of stiff coordinates are anharmonic: the expansion is not trusted beyond threefold widening.
    variance = (vectors.square() / values.clamp_min(0.1)).sum(1)
    spread = torch.ones_like(point)
    spread[stiff, 0] = math.sqrt(kt) * scale * variance.sqrt()
    return Internal(*spread.split(sizes))
