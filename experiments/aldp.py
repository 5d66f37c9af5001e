"""Alanine dipeptide at 300 K without data: both basins of phi, their free-energy difference, and log Z.

    python experiments/aldp.py                          # all methods at the CPU setting, then the table
    python experiments/aldp.py smc --seeds 0 1 2
    python experiments/aldp.py wt_asbs_cartesian --setting published
    python experiments/aldp.py --table

Classical samplers draw in internal coordinates from the molecule's own prior (uniform rotors), learned ones in lengths,
angles and circular dihedrals; ``wt_asbs`` lays a bias on phi while it learns. ``wt_asbs_cartesian`` with ``--setting
published`` is the published sampler, in Cartesian coordinates with a bias on phi and psi (for a GPU; there from 0.1 ns
of dynamics, here without data); its log Z is that of Cartesian space. The free-energy difference
between phi > 0 and phi < 0 comes from their weighted draws, and is compared with the reference that
``experiments/aldp_reference.py`` left in ``results/aldp``, else with the one kept beside this script. Every cell is one
JSON file with a picture beside it, and is not run again.

Found at the CPU setting (reference 5.73 +- 0.02 kT): SMC 5.66 +- 0.11, 5.64 +- 0.12 and 5.76 +- 0.19 kT from 9 to 13
million gradients, 75 to 180 s of one processor; ``wt_asbs`` 5.54 +- 0.12 and 5.80 +- 0.08 kT from 91,000 gradients,
162 s, both basins in every run, log Z within a standard error of that of SMC and 6 percent of its draws effective.
Without the bias, ``asbs`` has 23 percent and the right log Z, but too few draws at phi > 0: 8.0 +- 0.6 kT.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffsampler import baselines, targets
from diffsampler._report import versions
from diffsampler.equivariant import EquivariantGraphNetwork, PeriodicMLP
from diffsampler.kernels.hmc import HMC
from diffsampler.methods.adjoint_sampling import AdjointSampling
from diffsampler.methods.asbs import ASBS
from diffsampler.methods.matching import Matching, Stages
from diffsampler.methods.wt_asbs import WTASBS, Axis
from diffsampler.particles import Particles
from diffsampler.plotting_ramachandran import free_energy_surface, ramachandran
from diffsampler.reference import edm, geometric, product, variance_preserving
from diffsampler.sampler import Sampler

FOLDER = Path("results/aldp")
MODEL = "AMBER96_OBC1"
BASIN = (0.0, 2.0 * math.pi / 3.0)


@dataclass(frozen=True)
class Setting:
    """Sizes of all methods."""

    particles: int = 16 * 2048
    """Particles of SMC."""
    systems: int = 64
    """Systems of parallel tempering."""
    scans: int = 1000
    """Recorded scans of each."""
    steps: int = 64
    """Steps of the learned process."""
    training: int = 8000
    """Gradient steps of its training."""
    batch: int = 512
    width: int = 192
    """Width of its control."""
    learned: int = 8192
    """Draws of it."""
    learning_rate: float = 2e-3


SETTINGS = {
    "cpu": Setting(),
    "large": Setting(16 * 16384, 256, 4000, 200, 100_000, 2048, 512, 65_536),
    "published": Setting(steps=250, training=700_000, batch=64, width=128, learned=65_536, learning_rate=1e-4),
}

Build = Callable[[targets.AlanineDipeptideInternal, Setting], Sampler]


def kernel(target: targets.AlanineDipeptideInternal) -> HMC:
    return HMC(target.space, num_steps=10, smallest_step=0.15)


def bridge(target: targets.CircularMolecule, s: Setting) -> dict[str, Any]:
    """Options of a bridge sampler whose reference keeps the prior: stiff coordinates normal, dihedrals uniform."""
    generator = torch.Generator().manual_seed(0)
    line, angles = target.space.n, target.space.m
    return {
        "num_steps": s.steps,
        "reference": product(
            variance_preserving(s.steps, beta_start=16.0, beta_end=0.1),
            geometric(s.steps, sigma_min=0.05, sigma_max=3.0),
        ),
        "control": PeriodicMLP(angles, line=line, generator=generator, width=s.width, depth=3),
        "corrector": PeriodicMLP(angles, line=line, generator=generator, width=32),
    }


def matching() -> Matching:
    return Matching(fresh=512, every=50, capacity=8192, reweight=0.3)


def asbs(internal: targets.AlanineDipeptideInternal, s: Setting) -> ASBS:
    target = targets.CircularMolecule(internal.target)
    return ASBS(target, lesson=matching(), **bridge(target, s))


def wt_asbs(internal: targets.AlanineDipeptideInternal, s: Setting) -> WTASBS:
    target = targets.CircularMolecule(internal.target)

    def phi(x: Tensor) -> Tensor:
        return target.constrain(x)["phi"].unsqueeze(-1)

    axis = Axis(-math.pi, math.pi, 60, 0.25, periodic=True)
    return WTASBS(target, phi, [axis], matching=matching(), height=0.002, **bridge(target, s))


def adjoint_sampling(internal: targets.AlanineDipeptideInternal, s: Setting) -> AdjointSampling:
    target = targets.CircularMolecule(internal.target)
    options = bridge(target, s)
    del options["corrector"]
    options["reference"] = product(*(geometric(s.steps, sigma_min=0.05, sigma_max=c) for c in (1.5, 3.0)))
    return AdjointSampling(target, lesson=matching(), **options)


def wt_asbs_cartesian(internal: targets.AlanineDipeptideInternal, s: Setting) -> WTASBS:
    target = targets.AlanineDipeptide(internal.model, compiled=True)
    generator = torch.Generator().manual_seed(0)
    control, corrector = (
        EquivariantGraphNetwork(
            22, 3, generator=generator, width=s.width, depth=depth, reach=8.0, types=torch.arange(22), attention=True
        )
        for depth in (4, 3)
    )
    # Hills of 5e-4 eV, a skip of 50 draws, a buffer of 2,048: four rounds of control and corrector, then the control.
    stages = Stages(s.training // 7, s.training // 14)
    return WTASBS(
        target,
        target.torsion_angles,
        [Axis(-math.pi, math.pi, 150, 0.2, periodic=True)] * 2,
        num_steps=s.steps,
        reference=edm(s.steps, sigma_min=1e-3, sigma_max=6.0, left_endpoint=True),
        scale=1.0,
        control=control,
        corrector=corrector,
        learn_variance=False,
        height=0.0193,
        factor=8.0,
        skip=50,
        until=6.0 / 7.0,
        matching=Matching(fresh=256, every=100, capacity=2048, clip=100.0, power=0.0, stages=stages),
    )


METHODS: dict[str, Build] = {
    "smc": lambda t, s: baselines.SMC(t, kernel=kernel(t), two_pass=False, dtype=torch.float32),
    "waste_free": lambda t, s: baselines.WasteFreeSMC(t, chain_length=16, dtype=torch.float32),
    "parallel_tempering": lambda t, s: baselines.ParallelTempering(
        t, kernel=kernel(t), num_systems=s.systems, dtype=torch.float32
    ),
    "adjoint_sampling": adjoint_sampling,
    "asbs": asbs,
    "wt_asbs": wt_asbs,
    "wt_asbs_cartesian": wt_asbs_cartesian,
}
DRAWS: dict[str, Callable[[Setting], int]] = {
    "smc": lambda s: s.particles,
    "waste_free": lambda s: s.particles,
    "parallel_tempering": lambda s: s.systems * s.scans,
    "adjoint_sampling": lambda s: s.learned,
    "asbs": lambda s: s.learned,
    "wt_asbs": lambda s: s.learned,
    "wt_asbs_cartesian": lambda s: s.learned,
}


def difference(particles: Particles, inside: Tensor) -> tuple[float, float, float]:
    """Share of a set, the free energy of the set over that of its complement in kT, and the latter's error."""
    mean, error = particles.expectation(inside.double().unsqueeze(-1))
    share = float(mean)
    if not 0.0 < share < 1.0:
        return share, math.inf, math.inf
    return share, math.log((1.0 - share) / share), float(error) / (share * (1.0 - share))


def cell(method: str, setting: str, seed: int, path: Path) -> dict[str, Any]:
    sizes = SETTINGS[setting]
    target = targets.AlanineDipeptideInternal(targets.AlanineModel[MODEL], compiled=True)
    sampler = METHODS[method](target, sizes)
    start = time.process_time()
    if isinstance(sampler, AdjointSampling | ASBS | WTASBS):
        sampler.fit(
            steps=sizes.training,
            batch_size=sizes.batch,
            learning_rate=sizes.learning_rate,
            seed=seed,
            checkpoint=path.with_suffix(""),
            resume=True,
        )
    particles = internal(target, sampler.sample(DRAWS[method](sizes), seed=seed))
    seconds = time.process_time() - start
    angles = target.torsion_angles(particles.x.double())
    phi = angles[:, 0]
    value, error, _ = particles.log_normalizer
    row: dict[str, Any] = {"method": method, "seed": seed, "setting": asdict(sizes), "versions": versions()}
    row |= {"seconds": seconds, "evaluations": sampler.evaluations, "draws": len(phi), "ess": particles.ess}
    row |= {"log_z": value, "log_z_error": error, "energy": float(particles.expectation(energy(target, particles))[0])}
    row["unweighted_share"] = float((phi > 0).double().mean())
    for name, inside in {"positive": phi > 0, "basin": (phi > BASIN[0]) & (phi < BASIN[1])}.items():
        row[f"share_{name}"], row[f"difference_{name}"], row[f"error_{name}"] = difference(particles, inside)
    surfaces = {method: free_energy_surface(angles, particles.log_weight)}
    if (found := reference()) is not None:
        surface = torch.tensor(found["surface"], dtype=torch.float64)
        surfaces["reference"] = torch.where(surface < 0.0, math.inf, surface)
    ramachandran(surfaces, title=f"alanine dipeptide, {MODEL}, 300 K").savefig(path.with_suffix(".png"))
    return row


def internal(target: targets.AlanineDipeptideInternal, particles: Particles) -> Particles:
    """Particles of any of the molecule's coordinates as those of the target."""
    if particles.x.shape[1] == target.dim:
        return particles
    if particles.x.shape[1] < targets.AlanineDipeptide(target.model).dim:
        return replace(particles, x=targets.CircularMolecule(target.target).planar(particles.x))
    cartesian = targets.AlanineDipeptide(target.model).target
    positions = cartesian.positions(cartesian.fold(particles.x.double()))
    return replace(particles, x=target.target.from_positions(positions))


def energy(target: targets.AlanineDipeptideInternal, particles: Particles) -> Tensor:
    """Potential energy in kT, ``(n, 1)``."""
    molecule = target.target
    parts = [molecule.positions(x.double()) for x in particles.x.split(4096)]
    return torch.cat([molecule.force_field.energy(x) for x in parts]).unsqueeze(-1) / molecule.kt


def reference() -> dict[str, Any] | None:
    own, kept = FOLDER / f"{MODEL}.json", Path(__file__).with_name("aldp_reference.json")
    path = own if own.is_file() else kept
    return json.loads(path.read_text()) if path.is_file() else None


def table() -> None:
    found = reference()
    truth = found["free_energy_difference_positive"] if found else [math.nan, math.nan]
    print(f"reference: F(phi > 0) - F(phi < 0) = {truth[0]:.3f} +- {truth[1]:.3f} kT")
    for path in sorted(FOLDER.glob(f"{MODEL}-draws-*.json")):
        row = json.loads(path.read_text())
        print(
            f"{row['method']} {path.stem.split('-')[-2]} seed {row['seed']}: {row['difference_positive']:.3f} +- "
            f"{row['error_positive']:.3f} kT (off {row['difference_positive'] - truth[0]:+.3f}), basin "
            f"{row['difference_basin']:.3f} +- {row['error_basin']:.3f}, log Z {row['log_z']:.3f} +- "
            f"{row['log_z_error']:.3f}, ESS {row['ess']:.0f} of {row['draws']}, {row['evaluations']:.3g} gradients, "
            f"{row['seconds']:.0f} s"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="*", help=", ".join(METHODS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--setting", choices=SETTINGS, default="cpu")
    parser.add_argument("--table", action="store_true")
    arguments = parser.parse_args()
    FOLDER.mkdir(parents=True, exist_ok=True)
    methods = arguments.methods or [name for name in METHODS if name != "wt_asbs_cartesian"]
    for method in [] if arguments.table else methods:
        for seed in arguments.seeds:
            path = FOLDER / f"{MODEL}-draws-{method}-{arguments.setting}-{seed}.json"
            if not path.is_file():
                path.write_text(json.dumps(cell(method, arguments.setting, seed, path)) + "\n")
    table()


if __name__ == "__main__":
    main()
