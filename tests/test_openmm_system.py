"""Everything against OpenMM itself, where it is installed: ``pip install diffsampler[molecules]``."""

from __future__ import annotations

from pathlib import Path

import numpy
import pytest
import torch

from diffsampler import targets
from diffsampler.targets.force_field import ForceField
from diffsampler.targets.molecular_system import MolecularSystem
from diffsampler.targets.openmm_system import from_openmm, from_pdb

openmm = pytest.importorskip("openmm")
pytest.importorskip("openmm.app")

KT = 2.494338785445972
FILES = {
    "amber96": "amber96.xml",
    "amber99sbildn": "amber99sbildn.xml",
    "obc1": "implicit/obc1.xml",
    "obc2": "implicit/obc2.xml",
    "amber99_obc": "amber99_obc.xml",
}
WATER = """HETATM    1  O   HOH A   1       0.000   0.000   0.000  1.00  0.00           O
HETATM    2  H1  HOH A   1       0.957   0.000   0.000  1.00  0.00           H
HETATM    3  H2  HOH A   1      -0.240   0.927   0.000  1.00  0.00           H
END
"""


def pdb(system: MolecularSystem, path: Path) -> Path:
    lines = []
    for k, (name, x) in enumerate(zip(system.names, (10 * system.positions).tolist(), strict=True), start=1):
        residue, atom = name.split(":")
        number = 1 + ["ACE", "ALA", "NME"].index(residue)
        place = "".join(f"{value:8.3f}" for value in x)
        lines.append(
            f"ATOM  {k:5d}  {atom:<3} {residue} A{number:4d}    {place}  1.00  0.00{system.elements[k - 1]:>12}"
        )
    path.write_text("\n".join([*lines, "TER", "END", ""]))
    return path


@pytest.fixture
def file(tmp_path):
    return pdb(targets.AlanineModel.AMBER96.system(), tmp_path / "alanine_dipeptide.pdb")


def create(path: Path, names: list[str], **options):
    topology = openmm.app.PDBFile(str(path)).topology
    options = {"nonbondedMethod": openmm.app.NoCutoff, "constraints": None, "rigidWater": False} | options
    return openmm.app.ForceField(*names).createSystem(topology, **options), topology


def answers(system, positions: torch.Tensor, steps: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Configurations, half from dynamics at 600 K and half of these disturbed, with OpenMM's energies and forces."""
    integrator = openmm.LangevinMiddleIntegrator(600, 5, 0.0005)
    integrator.setRandomNumberSeed(1)
    context = openmm.Context(system, integrator, openmm.Platform.getPlatformByName("Reference"))
    context.setPositions(positions.numpy())
    noise = torch.Generator().manual_seed(0)
    x, energy, forces = [], [], []
    for _ in range(50):
        integrator.step(steps)
        here = context.getState(getPositions=True).getPositions(asNumpy=True)._value
        x.append(torch.tensor(numpy.array(here)))
    x += [here + 0.01 * torch.randn(here.shape, generator=noise, dtype=torch.float64) for here in x]
    for here in x:
        context.setPositions(here.numpy())
        state = context.getState(getEnergy=True, getForces=True)
        energy.append(state.getPotentialEnergy()._value)
        forces.append(torch.tensor(numpy.array(state.getForces(asNumpy=True)._value)))
    return torch.stack(x), torch.tensor(energy, dtype=torch.float64), torch.stack(forces)


def compare(field: ForceField, system, positions: torch.Tensor, *, steps: int = 8) -> None:
    x, energy, forces = answers(system, positions, steps)
    value, gradient = field.energy_and_gradient(x)
    assert (value - energy).abs().max() < 1e-9
    assert (gradient + forces).abs().max() < 1e-8
    assert (field.energy_and_gradient(x.float())[0] - energy).abs().max() < 1e-2 * KT


@pytest.mark.parametrize("model", targets.AlanineModel, ids=lambda model: model.name)
def test_shipped_parameters_are_those_of_openmm(model, file):
    names = [FILES[name] for name in model.value if name is not None]
    system, _ = create(file, names)
    compare(ForceField(model.system()), system, model.system().positions)
    read = from_pdb(file, names)
    x = model.system().positions
    assert ForceField(read).energy(x).item() == pytest.approx(ForceField(model.system()).energy(x).item(), abs=1e-10)


@pytest.mark.parametrize(
    "names",
    [["amber14-all.xml"], ["amberfb15.xml"], ["amber03.xml", "amber03_obc.xml"], ["amber10.xml", "implicit/obc2.xml"]],
    ids=lambda names: "+".join(names),
)
def test_other_force_fields(names, file):
    system, _ = create(file, names)
    read = from_pdb(file, names)
    compare(ForceField(read), system, read.positions)
    targets.InternalMolecule(read).log_prob_and_score(torch.ones(2, 67, dtype=torch.float64))


@pytest.mark.parametrize(
    "names",
    # OpenMM takes a minute and 2 GB to match CHARMM's templates.
    [["amber19-all.xml"], pytest.param(["charmm36_2024.xml"], marks=pytest.mark.slow)],
    ids=lambda names: names[0],
)
def test_force_fields_with_correction_maps(names, file):
    system, _ = create(file, names)
    read = from_pdb(file, names)
    field = ForceField(MolecularSystem.from_json(read.to_json()))
    compare(field, system, read.positions)
    x = (read.positions + 0.01 * torch.randn(4, 22, 3, generator=torch.Generator().manual_seed(0))).requires_grad_()
    (auto,) = torch.autograd.grad(field.energy(x).sum(), x)
    torch.testing.assert_close(field.energy_and_gradient(x)[1], auto, rtol=1e-10, atol=1e-6)


def test_water(tmp_path):
    path = tmp_path / "water.pdb"
    path.write_text(WATER)
    system, _ = create(path, ["tip3p.xml"])
    read = from_pdb(path, ["tip3p.xml"])
    compare(ForceField(read), system, read.positions)
    target = targets.InternalMolecule(read)
    # Harmonic: the integral over both lengths and the angle is nearly that of the expansion.
    z = target.prior.sample(4000, generator=torch.Generator().manual_seed(0))
    log_weight = target.log_prob(z) - target.prior.log_prob(z)
    assert log_weight.std() < 0.5


def test_what_cannot_be_read_is_refused(file):
    system, topology = create(file, ["amber96.xml"])
    system.addForce(openmm.CustomExternalForce("x^2"))
    with pytest.raises(
        ValueError, match="Expected forces of the families of AMBER and CHARMM; got CustomExternalForce"
    ):
        from_openmm(system, topology, torch.zeros(22, 3))
    with pytest.raises(ValueError, match="Expected the implicit solvent OBC1 or OBC2"):
        from_pdb(file, ["amber14-all.xml", "implicit/gbn2.xml"])
    x = targets.AlanineModel.AMBER96.system().positions
    with pytest.raises(ValueError, match="Expected a system without constraints; got 12"):
        from_openmm(*create(file, ["amber96.xml"], constraints=openmm.app.HBonds), x)
    with pytest.raises(ValueError, match="Expected a NonbondedForce without cut-off"):
        from_openmm(*create(file, ["amber96.xml"], nonbondedMethod=openmm.app.CutoffNonPeriodic), x)
    with pytest.raises(ValueError, match="Expected the implicit solvent OBC1 or OBC2 without salt"):
        from_openmm(*create(file, ["amber96.xml", "implicit/obc1.xml"], implicitSolventKappa=1.0), x)
