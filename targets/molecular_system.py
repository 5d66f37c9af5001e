"""All parameters of a molecule as plain tensors, and as text.

They are read once from OpenMM (:mod:`diffsampler.targets.openmm_system`); a target can be rebuilt from the text without
it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from diffsampler.targets.correction_maps import CorrectionMaps

__all__ = ["ImplicitSolvent", "MolecularSystem"]

WIDTHS = {"graph": 2, "bond_atoms": 2, "angle_atoms": 3, "torsion_atoms": 4, "exception_atoms": 2, "atoms": 8}
"""Atoms that a row of each table of indices names."""


@dataclass(frozen=True)
class ImplicitSolvent:
    r"""A generalized Born solvent; units nm, kJ/mol, elementary charges.

    Arguments:
        charge: Charges, ``(n,)``.
        radius: Radii ``R``, ``(n,)``.
        scale: Factor of each offset radius :math:`\rho = R - \mathrm{offset}` as a descreener, ``(n,)``.
        tanh: :math:`(\alpha, \beta, \gamma)`: OBC1 has (0.8, 0, 2.909125), OBC2 has (1, 0.8, 4.85).
        strength: :math:`\tau`, the Coulomb constant times the difference of inverse dielectric constants.
        surface: :math:`\kappa` of the surface term, kJ/mol/nm^2; zero for none.
        offset: Difference of radius and offset radius.
        swallow: Whether an atom inside of another counts its missing shell, as OpenMM's GBSAOBCForce does.
    """

    charge: Tensor
    radius: Tensor
    scale: Tensor
    tanh: tuple[float, float, float]
    strength: float
    surface: float
    offset: float
    swallow: bool


@dataclass(frozen=True)
class MolecularSystem:
    r"""All parameters of a molecule of ``n`` atoms; float64, indices int64, units nm, kJ/mol, elementary charges.

    Arguments:
        names: Names of atoms, ``residue:atom``.
        elements: Chemical symbols.
        mass: Masses in dalton, ``(n,)``.
        positions: A reference configuration, ``(n, 3)``, which fixes the handedness of stereocentres.
        graph: Chemical bonds, ``(E, 2)``.
        bond_atoms: ``(b, 2)``, with ``bond_length`` and ``bond_constant`` ``(b,)``.
        bond_length: :math:`r_0`.
        bond_constant: :math:`k`, kJ/mol/nm^2.
        angle_atoms: ``(a, 3)``, the central atom second, with ``angle_value`` and ``angle_constant`` ``(a,)``.
        angle_value: :math:`\theta_0`, radians.
        angle_constant: :math:`k`, kJ/mol/rad^2.
        torsion_atoms: ``(t, 4)``, with ``torsion_period``, ``torsion_phase``, ``torsion_constant`` ``(t,)``.
        torsion_period: :math:`n`, a positive integer.
        torsion_phase: :math:`\delta`.
        torsion_constant: :math:`k`, kJ/mol.
        charge: ``(n,)``.
        sigma: ``(n,)``, combined as arithmetic means.
        epsilon: ``(n,)``, combined as geometric means.
        exception_atoms: Pairs with parameters of their own, ``(e, 2)``.
        exception_charge: Products of charges, ``(e,)``.
        exception_sigma: ``(e,)``.
        exception_epsilon: ``(e,)``; zero together with the charge for pairs that do not interact.
        coulomb: Coulomb constant, kJ/mol nm.
        solvent: Implicit solvent, or None for vacuum.
        maps: Correction maps of pairs of dihedrals, or None.
        source: Where the parameters come from.

    Raises:
        ValueError: If shapes disagree or an index is not that of an atom.
    """

    names: tuple[str, ...]
    elements: tuple[str, ...]
    mass: Tensor
    positions: Tensor
    graph: Tensor
    bond_atoms: Tensor
    bond_length: Tensor
    bond_constant: Tensor
    angle_atoms: Tensor
    angle_value: Tensor
    angle_constant: Tensor
    torsion_atoms: Tensor
    torsion_period: Tensor
    torsion_phase: Tensor
    torsion_constant: Tensor
    charge: Tensor
    sigma: Tensor
    epsilon: Tensor
    exception_atoms: Tensor
    exception_charge: Tensor
    exception_sigma: Tensor
    exception_epsilon: Tensor
    coulomb: float
    solvent: ImplicitSolvent | None = None
    maps: CorrectionMaps | None = None
    source: str = ""

    def __post_init__(self) -> None:
        n = len(self.names)
        for name in ("mass", "charge", "sigma", "epsilon"):
            _require_shape(name, getattr(self, name), (n,))
        _require_shape("positions", self.positions, (n, 3))
        groups = {
            "graph": (2, ()),
            "bond": (2, ("length", "constant")),
            "angle": (3, ("value", "constant")),
            "torsion": (4, ("period", "phase", "constant")),
            "exception": (2, ("charge", "sigma", "epsilon")),
        }
        for group, (width, values) in groups.items():
            label = group if group == "graph" else f"{group}_atoms"
            atoms = getattr(self, label)
            _require_shape(label, atoms, (len(atoms), width))
            if len(atoms) and not 0 <= int(atoms.min()) <= int(atoms.max()) < n:
                raise ValueError(f"Expected {label} among {n} atoms; got {int(atoms.min())} to {int(atoms.max())}.")
            for value in values:
                _require_shape(f"{group}_{value}", getattr(self, f"{group}_{value}"), (len(atoms),))
        if len(self.torsion_period) and int(self.torsion_period.min()) < 1:
            raise ValueError(f"Expected positive periods of torsions; got {int(self.torsion_period.min())}.")

    @property
    def num_atoms(self) -> int:
        return len(self.names)

    def stereocentres(self) -> Tensor:
        """Atoms with four different neighbours, each followed by three of these, ``(c, 4)``.

        Neighbours differ if elements and graph tell them apart. The sign of the volume that the three span seen from
        the centre is its handedness.
        """
        around: list[list[int]] = [[] for _ in self.names]
        for first, second in self.graph.tolist():
            around[first].append(second)
            around[second].append(first)
        kinds = sorted(set(self.elements))
        rank = [kinds.index(element) for element in self.elements]
        for _ in rank:
            seen = [(rank[a], sorted(rank[b] for b in near)) for a, near in enumerate(around)]
            order = sorted(seen)
            rank = [order.index(entry) for entry in seen]
        centres = [a for a, near in enumerate(around) if len(near) == 4 == len({rank[b] for b in near})]
        return torch.tensor([[a, *around[a][:3]] for a in centres], dtype=torch.int64).reshape(-1, 4)

    def to_json(self) -> str:
        """All parameters as text, exact to the last bit."""
        return json.dumps(_plain(self))

    @staticmethod
    def from_json(text: str) -> MolecularSystem:
        """The system that :meth:`to_json` wrote."""
        entries = json.loads(text)
        for name, kind in (("solvent", ImplicitSolvent), ("maps", CorrectionMaps)):
            entries[name] = _restored(kind, entries[name]) if entries.get(name) else None
        return _restored(MolecularSystem, entries)


def _require_shape(name: str, value: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(value.shape) != shape:
        raise ValueError(f"Expected {name} of shape {shape}; got {tuple(value.shape)}.")


def _plain(record: Any) -> dict[str, Any]:
    entries: dict[str, Any] = {}
    for field in fields(record):
        value = getattr(record, field.name)
        if isinstance(value, ImplicitSolvent | CorrectionMaps):
            value = _plain(value)
        entries[field.name] = value.tolist() if isinstance(value, Tensor) else value
    return entries


def _restored(kind: type[Any], entries: dict[str, Any]) -> Any:
    values: dict[str, Any] = {}
    for field in fields(kind):
        value = entries[field.name]
        if field.type == "Tensor":
            integer = field.name in WIDTHS or field.name in ("torsion_period", "which")
            value = torch.tensor(value, dtype=torch.int64 if integer else torch.float64)
            if field.name in WIDTHS:
                value = value.reshape(-1, WIDTHS[field.name])
        values[field.name] = tuple(value) if isinstance(value, list) else value
    return kind(**values)
