"""Make the parameter table of alanine dipeptide: geometry from textbook values, force fields read from OpenMM.

    python experiments/aldp_parameters.py                      # needs: pip install diffsampler[molecules]

Writes ``targets/alanine_dipeptide.json``, with positions minimized in vacuum by the library's own energy, and prints
OpenMM's energies and forces of a few configurations for ``tests/test_force_field.py``. The geometry uses average bond
lengths and angles of peptides (Engh & Huber, 1991, https://doi.org/10.1107/S0108767391001071) and tetrahedral methyl
groups.

Source and licence: the numbers are those of ``amber96.xml``, ``amber99sbildn.xml``, ``implicit/obc1.xml``,
``implicit/obc2.xml``, ``amber96_obc.xml`` and ``amber99_obc.xml`` in OpenMM's Python application layer. OpenMM's
licences (``docs-source/licenses/Licenses.txt`` in https://github.com/openmm/openmm) put its API and Reference platform
under the MIT licence, copyright Stanford University and the Authors; these files carry no notice of their own
(the wheel's metadata says "Python Software Foundation License (BSD-like)"), and openmmforcefields, which converts the
same AMBER families, is under the MIT licence as well. The values were published in the articles that
:mod:`diffsampler.targets.alanine_dipeptide` names.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import torch
from scipy.optimize import minimize

from diffsampler.targets.alanine_dipeptide import AlanineModel
from diffsampler.targets.force_field import ForceField
from diffsampler.targets.molecular_system import MolecularSystem
from diffsampler.targets.openmm_system import from_pdb
from diffsampler.targets.zmatrix import Internal, ZMatrix

OUT = Path("targets/alanine_dipeptide.json")
NOTE = (
    "Made by experiments/aldp_parameters.py from force field files of OpenMM (https://github.com/openmm/openmm), "
    "MIT licence, copyright Stanford University and the Authors."
)
FORCE_FIELDS = {"amber96": "amber96.xml", "amber99sbildn": "amber99sbildn.xml"}
SOLVENTS = {
    "obc1": "implicit/obc1.xml",
    "obc2": "implicit/obc2.xml",
    "amber96_obc": "amber96_obc.xml",
    "amber99_obc": "amber99_obc.xml",
}
ATOMS = [
    *("ACE:HH31", "ACE:CH3", "ACE:HH32", "ACE:HH33", "ACE:C", "ACE:O"),
    *("ALA:N", "ALA:H", "ALA:CA", "ALA:HA", "ALA:CB", "ALA:HB1", "ALA:HB2", "ALA:HB3", "ALA:C", "ALA:O"),
    *("NME:N", "NME:H", "NME:C", "NME:H1", "NME:H2", "NME:H3"),
]
BONDS = [
    *((0, 1), (1, 2), (1, 3), (1, 4), (4, 5), (4, 6), (6, 7), (6, 8), (8, 9), (8, 10), (10, 11), (10, 12), (10, 13)),
    *((8, 14), (14, 15), (14, 16), (16, 17), (16, 18), (18, 19), (18, 20), (18, 21)),
]
# Ångström and degrees; the parent of each atom is the nearer to the alpha carbon.
LENGTHS = {"HC": 1.09, "HN": 1.01, "OC": 1.23, "CC": 1.525, "CN": 1.335}
LONG_CN = (("ALA:N", "ALA:CA"), ("NME:C", "NME:N"))
TETRAHEDRAL, TRIGONAL = 109.5, 120.0
PLANAR = {"ACE:C", "ALA:N", "ALA:C", "NME:N"}
ROTORS = {"ACE:C": -80.0, "NME:N": 80.0, "ACE:CH3": 180.0, "NME:C": 180.0}


def geometry() -> torch.Tensor:
    """Positions in nm, ``(22, 3)``, of the L form with extended peptide bonds."""
    tree = ZMatrix(torch.tensor(BONDS), len(ATOMS), root=(8, 6, 14))
    parents = {row.atom: row.parent for row in tree.rows} | {6: 8, 14: 8}
    lengths = [length(ATOMS[k], ATOMS[parents[k]]) for k in tree.order.tolist()]
    around = [8, *(row.parent for row in tree.rows)]
    bends = [TRIGONAL if ATOMS[parent] in PLANAR else TETRAHEDRAL for parent in around]
    turns = []
    for row, rotor in zip(tree.rows, tree.rotor.tolist(), strict=True):
        if rotor:
            turns.append(ROTORS.get(ATOMS[row.atom], 60.0))
        elif ATOMS[row.parent] in PLANAR:
            turns.append(180.0)
        else:
            # Two further substituents of a tetrahedral atom; seen from N, L has CB counterclockwise of C.
            first = ATOMS[row.atom] in ("ALA:CB", "ALA:HB2", "ACE:HH32", "NME:H2")
            turns.append(120.0 if first == (ATOMS[row.atom] != "ALA:CB") else -120.0)
    columns = [torch.tensor(v, dtype=torch.float64).unsqueeze(1) for v in (lengths, bends, turns)]
    internal = Internal(0.1 * columns[0], columns[1] * math.pi / 180.0, columns[2] * math.pi / 180.0)
    return tree.to_cartesian(internal).squeeze(-1).mT.contiguous()


def length(atom: str, parent: str) -> float:
    if (atom, parent) in LONG_CN:
        return 1.455
    return LENGTHS["".join(sorted((element(atom), element(parent)), key="HOCN".index))]


def element(atom: str) -> str:
    return atom.split(":")[1][0]


def pdb(positions: torch.Tensor) -> str:
    lines = []
    residues = ("ACE", "ALA", "NME")
    for k, (name, x) in enumerate(zip(ATOMS, (10.0 * positions).tolist(), strict=True), start=1):
        residue, atom = name.split(":")
        label = f" {atom:<3}" if len(atom) < 4 else atom
        place = "".join(f"{value:8.3f}" for value in x)
        number = residues.index(residue) + 1
        lines.append(f"ATOM  {k:5d} {label} {residue} A{number:4d}    {place}  1.00  0.00{element(name):>12}")
    return "\n".join([*lines, "TER", "END", ""])


def minimized(system: MolecularSystem) -> MolecularSystem:
    field = ForceField(system)

    def value(flat: numpy.ndarray) -> tuple[float, numpy.ndarray]:
        energy, gradient = field.energy_and_gradient(torch.from_numpy(flat).reshape(-1, 3))
        return float(energy), gradient.flatten().numpy()

    start = (system.positions - system.positions.mean(0)).flatten().numpy()
    found = minimize(value, start, jac=True, method="L-BFGS-B", options={"maxiter": 5000, "ftol": 1e-15, "gtol": 1e-6})
    print(f"{system.source}: {value(start)[0]:.3f} -> {found.fun:.6f} kJ/mol, gradient {abs(found.jac).max():.1e}")
    return replace(system, positions=torch.from_numpy(found.x.copy()).reshape(-1, 3))


def rounded(entries: dict[str, Any]) -> dict[str, Any]:
    return {**entries, "positions": [[round(value, 9) for value in row] for row in entries["positions"]]}


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "alanine_dipeptide.pdb"
        path.write_text(pdb(geometry()))
        systems = {name: minimized(from_pdb(path, [xml])) for name, xml in FORCE_FIELDS.items()}
        solvents = {
            name: from_pdb(path, ["amber96.xml" if "99" not in name else "amber99sbildn.xml", xml])
            for name, xml in SOLVENTS.items()
        }
    table = {
        "note": NOTE,
        "systems": {name: rounded(json.loads(system.to_json())) for name, system in systems.items()},
        "solvents": {name: json.loads(system.to_json())["solvent"] for name, system in solvents.items()},
    }
    OUT.write_text(json.dumps(table) + "\n")
    print(f"{OUT}: {OUT.stat().st_size} bytes")
    for model in AlanineModel:
        print_reference(model)


def print_reference(model: AlanineModel) -> None:
    """OpenMM's energy, sum of absolute forces, and force on the first atom for three configurations."""
    import openmm
    from openmm import app, unit

    field, solvent = model.value
    names = [FORCE_FIELDS[field]] + ([SOLVENTS[solvent]] if solvent else [])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "alanine_dipeptide.pdb"
        path.write_text(pdb(geometry()))
        topology = app.PDBFile(str(path)).topology
    system = app.ForceField(*names).createSystem(
        topology, nonbondedMethod=app.NoCutoff, constraints=None, rigidWater=False, removeCMMotion=False
    )
    integrator = openmm.VerletIntegrator(0.001)
    context = openmm.Context(system, integrator, openmm.Platform.getPlatformByName("Reference"))
    units = unit.kilojoule_per_mole
    for index in range(3):
        shift = 0.01 * torch.sin(0.7 * (index + 1) * torch.arange(66, dtype=torch.float64)).reshape(22, 3)
        context.setPositions((model.system().positions + shift).numpy())
        state = context.getState(getEnergy=True, getForces=True)
        energy = state.getPotentialEnergy().value_in_unit(units)
        forces = state.getForces(asNumpy=True).value_in_unit(units / unit.nanometer)
        first = ", ".join(f"{value:.9f}" for value in forces[0])
        print(f'    ("{model.name}", {index}): ({energy:.11f}, {abs(forces).sum():.8f}, [{first}]),')


if __name__ == "__main__":
    sys.exit(main())
