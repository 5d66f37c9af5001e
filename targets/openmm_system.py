"""Molecules from OpenMM: its systems and force fields, read once into plain tensors.

Read are harmonic bonds (Urey-Bradley terms included) and angles, periodic torsions (proper and improper), correction
maps, Lennard-Jones and Coulomb interactions with exceptions, the tables of Lennard-Jones parameters by which OpenMM
writes CHARMM's, and the generalized Born solvents OBC1 and OBC2: the families of AMBER and CHARMM, GAFF, and what else
is written in these terms. Anything else (cut-offs, periodic boxes, constraints, virtual sites, polarizable terms, other
solvents) is refused by name, never left out.

OpenMM is imported only here, inside the functions: ``pip install diffsampler[molecules]``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from diffsampler.targets.correction_maps import CorrectionMaps
from diffsampler.targets.molecular_system import ImplicitSolvent, MolecularSystem
from diffsampler.targets.openmm_tables import lennard_jones_tables

if TYPE_CHECKING:
    import openmm

__all__ = ["from_openmm", "from_pdb"]

COULOMB = 138.93545764438198
"""Coulomb constant of OpenMM, kJ/mol nm."""
NUMBER = r"([0-9.]+(?:e[-+]?[0-9]+)?)"
DESCREENING = (
    "select(step(r+sr2-or1),0.5*(1/L-1/U+0.25*(r-sr2^2/r)*(1/(U^2)-1/(L^2))+0.5*log(L/U)/r),0);"
    "U=r+sr2;L=max(or1,D);D=abs(r-sr2)"
)
BONDED: dict[str, tuple[int, tuple[str, ...]]] = {
    "bond": (2, ("length", "constant")),
    "angle": (3, ("value", "constant")),
    "torsion": (4, ("period", "phase", "constant")),
}
NONBONDED = ("charge", "sigma", "epsilon")
TANH = {"0.8*psi+2.909125*psi^3": (0.8, 0.0, 2.909125), "psi-0.8*psi^2+4.85*psi^3": (1.0, 0.8, 4.85)}


def from_pdb(path: str | Path, force_fields: Sequence[str]) -> MolecularSystem:
    """The molecule in a PDB file with the named force fields of OpenMM, ``["amber96.xml", "implicit/obc1.xml"]`` say.

    The file must hold all atoms, hydrogens included; its positions become the reference configuration.

    Raises:
        ImportError: If OpenMM is not installed.
        ValueError: If the force field does not know the molecule, or has terms that cannot be read.
    """
    from openmm import app, unit

    pdb = app.PDBFile(str(path))
    field = app.ForceField(*force_fields)
    system = field.createSystem(
        pdb.topology, nonbondedMethod=app.NoCutoff, constraints=None, rigidWater=False, removeCMMotion=False
    )
    positions = torch.tensor(pdb.getPositions(asNumpy=True).value_in_unit(unit.nanometer), dtype=torch.float64)
    return from_openmm(system, pdb.topology, positions, source=f"OpenMM {_version()}, {', '.join(force_fields)}")


def from_openmm(
    system: openmm.System, topology: Any, positions: torch.Tensor | Sequence[Sequence[float]], *, source: str = ""
) -> MolecularSystem:
    """All parameters of an OpenMM system.

    Arguments:
        system: Made with ``nonbondedMethod=NoCutoff, constraints=None, rigidWater=False``.
        topology: Its ``openmm.app.Topology``, for names and chemical bonds.
        positions: A reference configuration, ``(n, 3)`` in nm.
        source: Where the parameters come from.

    Raises:
        ValueError: If the system has constraints, virtual sites, or terms that cannot be read.
    """
    from openmm import unit

    if system.getNumConstraints():
        raise ValueError(
            f"Expected a system without constraints; got {system.getNumConstraints()}. "
            "Create it with constraints=None, rigidWater=False."
        )
    n = system.getNumParticles()
    if any(system.isVirtualSite(i) for i in range(n)):
        raise ValueError("Expected a system without virtual sites; got some.")
    atoms = list(topology.atoms())
    entries: dict[str, Any] = {
        "names": tuple(f"{atom.residue.name}:{atom.name}" for atom in atoms),
        "elements": tuple(atom.element.symbol for atom in atoms),
        "mass": _reals(system.getParticleMass(i).value_in_unit(unit.dalton) for i in range(n)),
        "positions": torch.as_tensor(positions, dtype=torch.float64).clone(),
        "graph": _indices(((bond[0].index, bond[1].index) for bond in topology.bonds()), 2),
        "coulomb": COULOMB,
        "source": source,
        "solvent": None,
    }
    rows: dict[str, list[tuple[Any, ...]]] = {kind: [] for kind in BONDED}
    nonbonded, tables = 0, []
    for force in system.getForces():
        kind = type(force).__name__
        if kind == "HarmonicBondForce":
            rows["bond"] += [force.getBondParameters(i) for i in range(force.getNumBonds())]
        elif kind == "HarmonicAngleForce":
            rows["angle"] += [force.getAngleParameters(i) for i in range(force.getNumAngles())]
        elif kind == "PeriodicTorsionForce":
            rows["torsion"] += [force.getTorsionParameters(i) for i in range(force.getNumTorsions())]
        elif kind == "NonbondedForce":
            nonbonded += 1
            entries |= _nonbonded(force)
        elif kind in ("GBSAOBCForce", "CustomGBForce") and entries["solvent"] is None:
            entries["solvent"] = _gbsa(force) if kind == "GBSAOBCForce" else _custom_gb(force)
        elif kind == "CMAPTorsionForce" and "maps" not in entries:
            entries["maps"] = _maps(force)
        elif kind in ("CustomNonbondedForce", "CustomBondForce"):
            tables.append(force)
        elif kind != "CMMotionRemover":
            raise ValueError(f"Expected forces of the families of AMBER and CHARMM; got {kind}.")
    if nonbonded != 1:
        raise ValueError(f"Expected one NonbondedForce; got {nonbonded}.")
    if tables:
        entries |= lennard_jones_tables(tables, entries)
    for kind, (width, values) in BONDED.items():
        entries |= _columns(kind, rows[kind], width, values)
    return MolecularSystem(**entries)


def _columns(kind: str, rows: list[tuple[Any, ...]], width: int, values: tuple[str, ...]) -> dict[str, torch.Tensor]:
    columns = {f"{kind}_atoms": _indices((row[:width] for row in rows), width)}
    for place, name in enumerate(values, start=width):
        columns[f"{kind}_{name}"] = _reals(_number(row[place]) for row in rows)
    if kind == "torsion":
        columns["torsion_period"] = columns["torsion_period"].long()
    return columns


def _nonbonded(force: Any) -> dict[str, torch.Tensor]:
    if force.getNonbondedMethod() != force.NoCutoff:
        raise ValueError("Expected a NonbondedForce without cut-off; got one with. Use nonbondedMethod=NoCutoff.")
    if force.getNumParticleParameterOffsets() or force.getNumExceptionParameterOffsets():
        raise ValueError("Expected a NonbondedForce without parameter offsets; got some.")
    particles = [force.getParticleParameters(i) for i in range(force.getNumParticles())]
    exceptions = [force.getExceptionParameters(i) for i in range(force.getNumExceptions())]
    columns = {name: _reals(_number(row[k]) for row in particles) for k, name in enumerate(NONBONDED)}
    columns["exception_atoms"] = _indices((row[:2] for row in exceptions), 2)
    for k, name in enumerate(NONBONDED):
        columns[f"exception_{name}"] = _reals(_number(row[2 + k]) for row in exceptions)
    return columns


def _maps(force: Any) -> CorrectionMaps:
    tables = [force.getMapParameters(i) for i in range(force.getNumMaps())]
    sizes = {size for size, _ in tables}
    if len(sizes) != 1:
        raise ValueError(f"Expected correction maps of one size; got {sorted(sizes)}.")
    # OpenMM lists a map with its first angle running fastest.
    energy = torch.stack([_reals(_number(v) for v in values).reshape(size, size).mT for size, values in tables])
    rows = [force.getTorsionParameters(i) for i in range(force.getNumTorsions())]
    return CorrectionMaps(energy, _indices((row[1:] for row in rows), 8), torch.tensor([row[0] for row in rows]))


def _gbsa(force: Any) -> ImplicitSolvent:
    if force.getNonbondedMethod() != force.NoCutoff:
        raise ValueError("Expected a GBSAOBCForce without cut-off; got one with. Use nonbondedMethod=NoCutoff.")
    rows = [force.getParticleParameters(i) for i in range(force.getNumParticles())]
    charge, radius, scale = (_reals(_number(row[k]) for row in rows) for k in range(3))
    inverse = 1.0 / force.getSoluteDielectric() - 1.0 / force.getSolventDielectric()
    # The force quotes its surface energy per area of a sphere.
    surface = 4.0 * torch.pi * _number(force.getSurfaceAreaEnergy())
    tanh = (1.0, 0.8, 4.85)
    return ImplicitSolvent(charge, radius, scale, tanh, COULOMB * inverse, surface, 0.009, swallow=True)


def _custom_gb(force: Any) -> ImplicitSolvent:
    """OBC1 and OBC2 as OpenMM's ``implicit/*.xml`` write them, recognized by their expressions."""
    values = [force.getComputedValueParameters(i)[1] for i in range(force.getNumComputedValues())]
    terms = [force.getEnergyTermParameters(i)[0].split(";")[0] for i in range(force.getNumEnergyTerms())]
    constants = dict(re.findall(rf"\b(\w+)={NUMBER}(?:;|$)", "".join(_energy_terms(force)).replace(" ", "")))
    names = [force.getPerParticleParameterName(i) for i in range(force.getNumPerParticleParameters())]
    born = re.match(r"1/\(1/or-tanh\((.*?)\)/radius\);psi=I\*or", values[1].replace(" ", "")) if values[1:] else None
    own = re.fullmatch(rf"-0\.5\*{NUMBER}\*\(1/soluteDielectric-1/solventDielectric\)\*charge\^2/B", terms[0])
    surface = re.fullmatch(rf"{NUMBER}\*\(radius\+0\.14\)\^2\*\(radius/B\)\^6", terms[1])
    known = (
        values[0].replace(" ", "") == DESCREENING
        and born is not None
        and born[1] in TANH
        and own is not None
        and len(terms) == (2 if surface is None else 3)
        and terms[-1] == f"-{own[1]}*(1/soluteDielectric-1/solventDielectric)*charge1*charge2/f"
        and float(constants.get("kappa", 0.0)) == 0.0
        and names == ["charge", "or", "sr"]
        and force.getNonbondedMethod() == force.NoCutoff
    )
    if not known or born is None or own is None:
        raise ValueError("Expected the implicit solvent OBC1 or OBC2 without salt and cut-off; got another one.")
    offset = float(constants["offset"])
    charge, rho, scaled = (
        _reals(force.getParticleParameters(i)[k] for i in range(force.getNumParticles())) for k in range(3)
    )
    inverse = 1.0 / float(constants["soluteDielectric"]) - 1.0 / float(constants["solventDielectric"])
    strength, area = float(own[1]) * inverse, 0.0 if surface is None else float(surface[1])
    return ImplicitSolvent(charge, rho + offset, scaled / rho, TANH[born[1]], strength, area, offset, swallow=False)


def _energy_terms(force: Any) -> list[str]:
    """The definitions after the first semicolon of each term, closed by one."""
    terms = [force.getEnergyTermParameters(i)[0] for i in range(force.getNumEnergyTerms())]
    return [";" + term.split(";", 1)[1] + ";" for term in terms if ";" in term]


def _number(value: Any) -> float:
    """A number in OpenMM's units: nm, ps, dalton, kJ/mol, radians, elementary charges."""
    from openmm import unit

    return float(value.value_in_unit_system(unit.md_unit_system)) if unit.is_quantity(value) else float(value)


def _reals(values: Iterable[float]) -> torch.Tensor:
    return torch.tensor(list(values), dtype=torch.float64)


def _indices(rows: Iterable[Sequence[int]], width: int) -> torch.Tensor:
    return torch.tensor([tuple(row) for row in rows], dtype=torch.int64).reshape(-1, width)


def _version() -> str:
    import openmm

    return str(openmm.__version__)
