r"""Alanine dipeptide (N-acetyl-L-alanine N'-methylamide, 22 atoms), the smallest model of a protein's backbone.

Two dihedrals, :math:`\phi` and :math:`\psi`, carry its slow motion. In ff96 with OBC1 at 300 K the side
:math:`\phi > 0` holds 0.33 % of the mass, 5.73 +- 0.02 kT above the other, behind barriers of 9 and 11 kT. Parameters
are a table made by ``experiments/aldp_parameters.py`` from the force fields that OpenMM distributes, so that OpenMM is
not needed here. Its source and licence are stated in that script and in the table's note.

References:
    ff96: A second generation force field for the simulation of proteins, nucleic acids, and organic molecules (Cornell
    et al., 1995), https://doi.org/10.1021/ja00124a002, with the backbone torsions of Kollman et al. (1997),
    https://doi.org/10.1007/978-94-017-1120-3_2
    ff99SB-ILDN: Improved side-chain torsion potentials for the Amber ff99SB protein force field (Lindorff-Larsen et
    al., 2010), https://doi.org/10.1002/prot.22711
    OBC: Exploring protein native states and large-scale conformational changes with a modified generalized Born model
    (Onufriev, Bashford & Case, 2004), https://doi.org/10.1002/prot.20033
"""

from __future__ import annotations

import json
from dataclasses import replace
from enum import Enum
from importlib import resources
from typing import Any, final

import torch
from torch import Tensor

from diffsampler.target import ForwardingTarget
from diffsampler.targets.molecular_system import MolecularSystem
from diffsampler.targets.molecule import InternalMolecule, Molecule

__all__ = ["AlanineDipeptide", "AlanineDipeptideInternal", "AlanineModel"]

TORSIONS = {"phi": (4, 6, 8, 14), "psi": (6, 8, 14, 16)}
ROOT = (8, 6, 14)
"""The alpha carbon with nitrogen and carbonyl carbon: phi and psi are rotors of the tree."""


class AlanineModel(Enum):
    """Force field and implicit solvent."""

    AMBER96 = ("amber96", None)
    AMBER96_OBC1 = ("amber96", "obc1")
    """The model of most publications on samplers, with the radii of OpenMM's ``implicit/obc1.xml``."""
    AMBER96_OBC2 = ("amber96", "obc2")
    AMBER99SB_ILDN = ("amber99sbildn", None)
    AMBER99SB_ILDN_OBC1 = ("amber99sbildn", "obc1")
    AMBER99SB_ILDN_OBC2 = ("amber99sbildn", "amber99_obc")
    """With the radii of OpenMM's ``amber99_obc.xml``."""

    def system(self) -> MolecularSystem:
        """The parameters, with a minimum of the vacuum energy as reference configuration."""
        field, solvent = self.value
        table = json.loads((resources.files("diffsampler.targets") / "alanine_dipeptide.json").read_text())
        entries: dict[str, Any] = {**table["systems"][field]}
        entries["solvent"] = None if solvent is None else table["solvents"][solvent]
        system = MolecularSystem.from_json(json.dumps(entries))
        if system.solvent is None:
            return system
        # The table holds a solvent once; its charges are those of the force field.
        return replace(system, solvent=replace(system.solvent, charge=system.charge))


@final
class AlanineDipeptide(ForwardingTarget):
    """Alanine dipeptide in Cartesian coordinates: 22 atoms with their mean at the origin, both mirror images.

    ``x`` is in units of ``unit`` nm (an Ångström), the energy in kT. See
    :class:`~diffsampler.targets.molecule.Molecule` for what handedness means here. ``constrain`` gives ``positions``,
    ``phi`` and ``psi`` of the L form.

    Arguments:
        model: Force field and solvent.
        temperature: In kelvin.
        unit: Length of one unit of ``x`` in nm.
        compiled: Whether to compile the gradient on first use.
    """

    target: Molecule

    def __init__(
        self,
        model: AlanineModel = AlanineModel.AMBER96_OBC1,
        *,
        temperature: float = 300.0,
        unit: float = 0.1,
        compiled: bool = False,
    ) -> None:
        super().__init__(
            Molecule(_system(model), temperature=temperature, unit=unit, torsions=TORSIONS, compiled=compiled)
        )
        self.model = model

    @property
    def reference(self) -> Tensor:
        """A minimum of the vacuum energy, ``(66,)``, float64."""
        return self.target.reference

    def log_prob(self, x: Tensor) -> Tensor:
        return self.target.log_prob(x)

    def log_prob_and_score(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.target.log_prob_and_score(x)

    def torsion_angles(self, x: Tensor) -> Tensor:
        r""":math:`(\phi, \psi)` of the L form in radians, ``(..., 66) -> (..., 2)``."""
        return _ramachandran(self.target.constrain(x))


@final
class AlanineDipeptideInternal(ForwardingTarget):
    """Alanine dipeptide in internal coordinates: 67 numbers of unit scale, the L form only, with a prior.

    The 60 lengths, angles and dihedrals, of which seven dihedrals are rotors with an auxiliary radius each; see
    :mod:`diffsampler.targets.internal_chart`. ``constrain`` gives ``positions`` in nm, ``phi`` and ``psi``.

    Arguments:
        model: Force field and solvent.
        temperature: In kelvin.
        compiled: Whether to compile the gradient on first use.
    """

    target: InternalMolecule

    def __init__(
        self,
        model: AlanineModel = AlanineModel.AMBER96_OBC1,
        *,
        temperature: float = 300.0,
        compiled: bool = False,
    ) -> None:
        super().__init__(
            InternalMolecule(_system(model), temperature=temperature, torsions=TORSIONS, root=ROOT, compiled=compiled)
        )
        self.model = model

    @property
    def reference(self) -> Tensor:
        """A minimum of the vacuum energy, ``(67,)``, float64."""
        return self.target.reference

    def log_prob(self, x: Tensor) -> Tensor:
        return self.target.log_prob(x)

    def log_prob_and_score(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.target.log_prob_and_score(x)

    def torsion_angles(self, x: Tensor) -> Tensor:
        r""":math:`(\phi, \psi)` in radians, ``(..., 67) -> (..., 2)``."""
        return _ramachandran(self.target.constrain(x))


def _system(model: AlanineModel) -> MolecularSystem:
    if not isinstance(model, AlanineModel):
        raise TypeError(f"Expected model to be an AlanineModel; got {type(model).__name__}.")
    return model.system()


def _ramachandran(named: dict[str, Tensor]) -> Tensor:
    return torch.stack([named["phi"], named["psi"]], -1)
