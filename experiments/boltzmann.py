"""Adjoint sampling on particle systems: four double-well particles and Lennard-Jones clusters of 13 and 55.

    python experiments/boltzmann.py dw4                         # one seed, the setting for a CPU
    python experiments/boltzmann.py lj13 --setting smc          # annealed particles, no training
    python experiments/boltzmann.py lj13 --setting bank         # adjoint matching from such particles
    python experiments/boltzmann.py lj13 --seed 1 --seconds 1800
    python experiments/boltzmann.py lj55 --setting published --device cuda

A run that was interrupted, or ended by ``--seconds``, goes on after its last checkpoint; finished ones are printed.
Figures of merit go to ``<out>/<case>-<setting>-<seed>.json``, pictures beside it: distances between 2,000 draws and
a reference, for draws as they come and for draws resampled by their exact weights; log Z, its lower bound and the
effective sample size; and the floor, the distance of two sets of the reference. References of the clusters are made by
``make_references.py``.

The published settings are those of the adjoint Schroedinger bridge sampler (https://arxiv.org/abs/2506.22565), except
that the learning rate falls and parameters are averaged as everywhere in this library. They are meant for a GPU. The
settings for a CPU start at a point, match the divergence of paths, and reweight end points. Where few of these would be
left, in the cluster of 13, ``bank`` takes particles of tempered SMC in their place.

Found on one seed, energy W2 and aligned W2 as drawn (resampled by weights), floors in brackets: four particles at the
CPU setting 0.13 and 0.28 (0.14 and 0.30) [0.15 and 0.28] with log Z 29.648 +- 0.011, truth 29.667, in 13 minutes of one
processor; 13 in 3,000 steps of ``bank``, 75 s, 9.1 and 1.66 (1.8 and 1.84) [0.33 and 1.58], with 3 percent of the draws
effective; by ``smc``, 8 s, 2.2 and 1.62 (0.27 and 1.59).
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from boltzmann_settings import SETTINGS, Setting
from torch import Tensor

from diffsampler import baselines, estimators, metrics, plotting_particles, targets
from diffsampler._report import number, table, versions, write_json
from diffsampler.equivariant import EquivariantGraphNetwork
from diffsampler.kernels.hmc import HMC
from diffsampler.methods.matching import Matching, PathDivergence
from diffsampler.methods.reference_process import GaussianStart, ReferenceProcess
from diffsampler.particles import Particles
from diffsampler.reference import geometric
from diffsampler.sampler import DiffusionSampler
from diffsampler.target import Target

DRAWS = 2000


def build_target(setting: Setting, *, core: float | None = None) -> Target:
    """The density of a setting; with ``core`` the one that is trained on."""
    if setting.dimensions == 2:
        return targets.DoubleWell4()
    return targets.LennardJones(setting.particles, core=core)


def annealed(setting: Setting, target: Target, seed: int) -> tuple[Particles, int]:
    """Weighted particles of tempered SMC with Hamiltonian moves, and the gradients that they took."""
    assert setting.bank is not None
    kernel = HMC(target.space, num_steps=10, smallest_step=0.15)
    sampler = baselines.SMC(target, kernel=kernel, reference_scale=setting.spread, two_pass=False)
    return sampler.sample(setting.bank, seed=seed), sampler.evaluations


def build(setting: Setting, target: Target, seed: int, *, bank: Tensor | None = None) -> DiffusionSampler:
    """The sampler of a setting, untrained."""
    generator = torch.Generator().manual_seed(seed)
    networks = [
        EquivariantGraphNetwork(
            setting.particles,
            setting.dimensions,
            generator=generator,
            width=setting.width,
            depth=setting.depth,
            radial=setting.radial,
            reach=setting.reach,
            attention=setting.attention,
        )
        for _ in range(1 if setting.start_scale is None else 2)
    ]
    reference = geometric(
        setting.num_steps,
        sigma_min=setting.sigma_min,
        sigma_max=setting.sigma_max,
        left_endpoint=setting.left_endpoint,
    )
    start = None if setting.start_scale is None else GaussianStart(target.space, scale=setting.start_scale)
    process = ReferenceProcess(
        target.space,
        reference,
        start=start,
        control=networks[0],
        corrector=networks[-1],
        learn_variance=setting.learn_variance,
        resolution=setting.resolution,
    )
    lesson = Matching(
        fresh=setting.fresh,
        every=setting.every,
        capacity=setting.capacity,
        clip=setting.clip,
        power=setting.power,
        stages=setting.stages,
        reweight=setting.reweight,
        bank=bank,
    )
    return DiffusionSampler(target, process, PathDivergence(), lesson=lesson)


def refined(setting: Setting, target: Target, process: ReferenceProcess) -> ReferenceProcess:
    """The chain with its control on the grid of the draws. Variances are the reference's there, for any grid."""
    if setting.draw_steps is None:
        return process
    finer = build(replace(setting, num_steps=setting.draw_steps), target, 0).process
    assert isinstance(finer, ReferenceProcess)
    finer.control.load_state_dict(process.control.state_dict())
    return finer


def measures(setting: Setting, target: Target, x: Tensor, reference: Tensor) -> dict[str, float]:
    """Distances between two equally large sets of configurations."""
    n, d = setting.particles, setting.dimensions
    exact = d == 2
    alignment = metrics.ExactAlignment(n=n, d=d) if exact else metrics.AlternatingAlignment(n=n, d=d)
    # One assignment per pair of configurations: 2,000 against 2,000 of 55 particles would take minutes.
    few = DRAWS if n < 20 else 400
    name = f"aligned W2 ({'exact' if exact else 'one Hungarian and Kabsch round'}, {min(few, len(x))})"
    energy = target.energy(x)
    return {
        "energy W2": metrics.wasserstein_line(energy, target.energy(reference)),
        "energy mean": float(energy.mean()),
        "energy median": float(energy.median()),
        "pair distance W2": metrics.pair_wasserstein(x, reference, n=n),
        "pair distance TV": metrics.pair_total_variation(x, reference, n=n),
        name: metrics.aligned_wasserstein(x[:few], reference[:few], alignment),
    }


def load_reference(case: str, setting: Setting, target: Target, folder: Path, count: int) -> Tensor:
    """Independent draws ``(count, D)`` of the truth."""
    generator = torch.Generator().manual_seed(1_000_000)
    if target.has_sampler:
        return target.sample(count, generator=generator)
    path = folder / f"{case}.npy"
    if not path.exists():
        raise SystemExit(
            f"Expected reference draws in {path}. Make them with: python experiments/make_references.py {case}"
        )
    x = torch.from_numpy(np.load(path)).double()
    if len(x) < count:
        raise SystemExit(f"Expected at least {count} reference draws in {path}; got {len(x)}.")
    return target.space.project(x[torch.randperm(len(x), generator=generator)[:count]])


def judge(
    case: str, setting: Setting, target: Target, particles: Particles, folder: Path, *, order: Tensor | None = None
) -> dict[str, Any]:
    """Everything that is reported of weighted particles; distances are those of the first ``DRAWS`` in an order."""
    count = min(len(particles), DRAWS)
    reference = load_reference(case, setting, target, folder, 2 * count)
    every, log_weight = particles.x.double().cpu(), particles.log_weight.cpu()
    if order is not None:
        every, log_weight = every[order], log_weight[order]
    x = every[:count]
    index = estimators.systematic_resample(log_weight, count, generator=torch.Generator().manual_seed(1))
    estimate = particles.log_normalizer
    return {
        "drawn": measures(setting, target, x, reference[:count]),
        "resampled": measures(setting, target, every[index], reference[:count]),
        "floor": measures(setting, target, reference[count:], reference[:count]),
        "log normalizer": [estimate.value, estimate.std_error],
        "exact log normalizer": target.log_normalizer,
        "elbo": float(log_weight.mean()),
        "ess fraction": particles.ess / len(particles),
        "pareto k": particles.pareto_k,
        "nonfinite": particles.nonfinite,
    }


def pictures(case: str, setting: Setting, target: Target, particles: Particles, folder: Path, stem: Path) -> None:
    """Energies, pair distances and radial distributions of the weighted draws over the reference."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    x, n = particles.x.double().cpu(), setting.particles
    truth = load_reference(case, setting, target, folder, DRAWS)
    shown = {"weighted": (x, particles.log_weight.cpu()), "as drawn": (x, None), "reference": (truth, None)}
    energy = {label: (target.energy(y), log_weight) for label, (y, log_weight) in shown.items()}
    plotting_particles.energies(energy, reference="reference", title=case).savefig(f"{stem}-energy.png")
    for name, draw in (
        ("pairs", plotting_particles.pair_distances),
        ("radial", plotting_particles.radial_distributions),
    ):
        draw(shown, n=n, reference="reference", title=case).savefig(f"{stem}-{name}.png")


class Paused(Exception):
    """Training ended before its last step because ``--seconds`` were over."""


def run(case: str, kind: str, seed: int, arguments: argparse.Namespace) -> dict[str, Any] | None:
    """Train and judge; None if ``--seconds`` ended training before its last step."""
    setting = SETTINGS[case][kind]
    if arguments.steps is not None:
        setting = replace(setting, steps=arguments.steps)
    name = f"{case}-{kind}-{seed}"
    began, before = time.monotonic(), time.process_time()
    target = build_target(setting)
    known = {"versions": versions(), "settings": asdict(setting), "seed": seed}
    if setting.steps == 0:
        particles, spent = annealed(setting, target, seed)
        wall, history = time.monotonic() - began, []
        cpu = time.process_time() - before
        # Distances are those of some draws from all islands, errors those between islands.
        order = torch.randperm(len(particles), generator=torch.Generator().manual_seed(seed))
    else:
        try:
            sampler, spent = trained(setting, seed, arguments, name)
        except Paused:
            print(f"{name}: paused; the same command goes on after the last checkpoint.")
            return None
        wall, history, order = sampler.history[-1]["seconds"], sampler.history, None
        cpu = time.process_time() - before
        assert isinstance(sampler.process, ReferenceProcess)
        process = refined(setting, target, sampler.process).to(arguments.device)
        particles = DiffusionSampler(target, process, PathDivergence()).sample(DRAWS, seed=seed + 1000)
    result = {
        **known,
        "seconds of training": {"wall": wall, "cpu of this process": cpu},
        "training energies": spent,
        **judge(case, setting, target, particles, arguments.references, order=order),
        "history": history[:: max(1, len(history) // 100)],
    }
    pictures(case, setting, target, particles, arguments.references, arguments.out / name)
    write_json(arguments.out / f"{name}.json", result)
    return result


def trained(setting: Setting, seed: int, arguments: argparse.Namespace, name: str) -> tuple[DiffusionSampler, int]:
    """The trained sampler, and the energies that it and its bank took.

    Raises:
        Paused: If ``--seconds`` were over first.
    """
    began = time.monotonic()
    target = build_target(setting, core=setting.core)
    bank, spent = None, 0
    if setting.bank is not None:
        particles, spent = annealed(setting, target, seed)
        bank = particles.resample(setting.bank, generator=torch.Generator().manual_seed(seed))
    sampler = build(setting, target, seed, bank=bank).to(device=arguments.device)

    def watch(entry: dict[str, float]) -> None:
        if entry["step"] % 500 == 0:
            shown = {key: round(entry[key], 3) for key in ("step", "seconds", "loss", "elbo", "ess") if key in entry}
            print(f"{name}: {shown}", flush=True)
        if arguments.seconds is not None and time.monotonic() - began > arguments.seconds:
            raise Paused

    sampler.fit(
        steps=setting.steps,
        batch_size=setting.batch_size,
        learning_rate=setting.learning_rate,
        seed=seed,
        checkpoint=arguments.out / "checkpoints" / name,
        checkpoint_every=500,
        resume=True,
        callback=watch,
    )
    return sampler, sampler.evaluations + spent


def report(name: str, result: dict[str, Any]) -> None:
    """Print what a run found."""
    sides = ("drawn", "resampled", "floor")
    rows = [(key, *(number(result[side].get(key), ".4f") for side in sides)) for key in result["drawn"]]
    print(name)
    print(table(("", *sides), rows))
    value, error = result["log normalizer"]
    exact = result["exact log normalizer"]
    print(
        f"  log Z {value:.4f} +- {error:.4f} (exact {number(exact, '.6f')}), lower bound {result['elbo']:.4f}, "
        f"ESS {result['ess fraction']:.3f}, k-hat {number(result['pareto k'], '.2f')}, "
        f"{result['seconds of training']['wall']:.0f} s of training "
        f"({result['seconds of training']['cpu of this process']:.0f} s of one processor)"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", choices=list(SETTINGS))
    parser.add_argument("--setting", choices=["cpu", "bank", "smc", "published"], default="cpu")
    parser.add_argument("--seed", type=int, default=1, help="settings were tuned on seed 0")
    parser.add_argument("--steps", type=int, help="another number of steps")
    parser.add_argument("--seconds", type=float, help="pause training after this time")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("results/boltzmann"))
    parser.add_argument("--references", type=Path, default=Path("results/references/draws"))
    arguments = parser.parse_args()
    if arguments.setting not in SETTINGS[arguments.case]:
        raise SystemExit(f"Expected one of {', '.join(SETTINGS[arguments.case])} for {arguments.case}.")
    name = f"{arguments.case}-{arguments.setting}-{arguments.seed}"
    path = arguments.out / f"{name}.json"
    result = json.loads(path.read_text()) if path.exists() else None
    steps = SETTINGS[arguments.case][arguments.setting].steps if arguments.steps is None else arguments.steps
    if result is not None and result["settings"]["steps"] != steps:
        raise SystemExit(f"{path} holds a run with other settings; remove it or choose another --out.")
    if result is None:
        result = run(arguments.case, arguments.setting, arguments.seed, arguments)
    if result is not None:
        report(name, result)


if __name__ == "__main__":
    main()
