"""The gradient-free ensemble sampler against tempered SMC and HMC.

Mixtures of Gaussians in 5, 10 and 20 dimensions: the ensemble (unweighted draws, as estimates of the score leave them)
against random-walk SMC whose number of temperatures and moves brings it to about as many density evaluations, from the
same Gaussian reference. Sliced Wasserstein-2 distance to exact draws and total variation of mode shares, with the
floor of exact draws. Travel-time inversion in 5 and 20 dimensions: log evidence and posterior moments, against SMC and
HMC with gradients.

    python experiments/ensemble_table.py --seeds 0 1 2 3 4 5 6 7

Cells that exist are not run again.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from pathlib import Path

import torch
from torch import Tensor

from diffsampler import baselines, targets
from diffsampler.baselines.smc import GaussianReference
from diffsampler.kernels.random_walk import RandomWalk
from diffsampler.methods.ensemble_score import EnsembleScore
from diffsampler.smc import smc
from diffsampler.target import CountedTarget, Target
from diffsampler.tempering import TemperedPath

RADIUS = 4.0
MODES = {2: 10, 5: 6, 10: 4, 20: 4}
PARTICLES = 512
LEVELS = 20
# Conditional ESS that brings random-walk SMC to the ensemble's number of evaluations, found by hand.
CONDITIONAL_ESS = {2: 0.95, 5: 0.95, 10: 0.9, 20: 0.75}


def mixture(dim: int, seed: int) -> targets.GaussianMixture:
    """Means N(0, 1.5^2), scales in [0.7, 1.3], weights in [0.5, 1.5] before normalization."""
    generator = torch.Generator().manual_seed(1000 * dim + seed)
    means = 1.5 * torch.randn(MODES[dim], dim, generator=generator, dtype=torch.float64)
    scales = 0.7 + 0.6 * torch.rand(MODES[dim], generator=generator, dtype=torch.float64)
    weights = 0.5 + torch.rand(MODES[dim], generator=generator, dtype=torch.float64)
    return targets.GaussianMixture(means, scales=scales, weights=weights)


def sliced_distance(x: Tensor, y: Tensor) -> float:
    """Wasserstein-2 distance of equally many points, root mean square over 100 fixed directions."""
    direction = torch.randn(x.shape[1], 100, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    direction = direction / direction.norm(dim=0)
    return float(((x @ direction).sort(0).values - (y @ direction).sort(0).values).square().mean().sqrt())


def quality(target: Target, x: Tensor, generator: torch.Generator) -> dict[str, float]:
    share = torch.bincount(target.mode_labels(x), minlength=target.num_modes or 1).double() / len(x)
    return {
        "sw2": sliced_distance(x, target.sample(len(x), generator=generator)),
        "tv": float(0.5 * (share - target.mode_weights()).abs().sum()),
    }


def mixture_cell(dim: int, seed: int) -> dict[str, object]:
    target, generator = mixture(dim, seed), torch.Generator().manual_seed(seed + 100)
    cell: dict[str, object] = {"floor": quality(target, target.sample(PARTICLES, generator=generator), generator)}
    began = time.process_time()
    sampler = EnsembleScore(target, radius=RADIUS, num_particles=PARTICLES, num_levels=LEVELS)
    result = sampler.run(1, seed=seed)
    x = result.particles.x.reshape(-1, PARTICLES, dim)
    members = [quality(target, part, generator) for part in x]
    # A run makes four ensembles after one pilot; one of them with the pilot is what one SMC run competes with.
    main = PARTICLES * (sampler.num_levels * sampler.recipe.num_points + 1)
    cell["ensemble"] = {
        **{name: sum(m[name] for m in members) / len(members) for name in ("sw2", "tv")},
        "evaluations": sampler.evaluations - (len(members) - 1) * main,
        "log_z": result.particles.log_replicates.tolist(),
        "ess": result.particles.ess / len(result.particles),
        "poor": result.poor,
        "cpu": (time.process_time() - began) / len(members),
    }
    began = time.process_time()
    runs, values, counts = [], [], []
    for repeat in range(4):
        counted = CountedTarget(target)
        run = smc(
            TemperedPath(GaussianReference(target.space, scale=RADIUS), counted),
            n=PARTICLES,
            generator=torch.Generator().manual_seed(10 * seed + repeat),
            num_islands=1,
            kernel=RandomWalk(target.space),
            conditional_ess=CONDITIONAL_ESS[dim],
        )
        runs.append(quality(target, run.particles.resample(PARTICLES, generator=generator), generator))
        values.append(run.particles.log_normalizer.value)
        counts.append(counted.evaluations)
    cell["smc"] = {
        **{name: sum(m[name] for m in runs) / len(runs) for name in ("sw2", "tv")},
        "evaluations": sum(counts) / len(counts),
        "log_z": values,
        "cpu": (time.process_time() - began) / len(runs),
    }
    return cell


def inversion_cell(target: Target, seed: int) -> dict[str, object]:
    samplers = {
        "ensemble": EnsembleScore(target, num_particles=PARTICLES),
        "smc": baselines.SMC(target, kernel=RandomWalk(target.space)),
        "smc_hmc": baselines.SMC(target),
        "hmc": baselines.HMC(target),
    }
    cell: dict[str, object] = {"exact": target.log_normalizer}
    for name, sampler in samplers.items():
        began = time.process_time()
        particles = sampler.sample(2048, seed=seed)
        mean, error = particles.expectation(particles.x)
        spread = particles.expectation((particles.x - mean).square())[0].sqrt()
        cell[name] = {
            "log_z": list(particles.log_normalizer[:2]),
            "mean": mean.tolist(),
            "error": error.tolist(),
            "spread": spread.tolist(),
            "ess": particles.ess,
            "evaluations": sampler.evaluations,
            "cpu": time.process_time() - began,
        }
    return cell


def write(path: Path, cell: dict[str, object]) -> None:
    """Atomically: a kill leaves no half cell behind."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps({"torch": torch.__version__, **cell}, indent=1))
    os.replace(part, path)


def spread_of(values: list[float]) -> str:
    tensor = torch.tensor(values, dtype=torch.float64)
    error = float(tensor.std()) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return f"{float(tensor.mean()):.3f} +- {error:.3f}"


def mixture_row(dim: int, cells: list[dict]) -> str:
    columns = [str(dim), str(len(cells))]
    for name in ("floor", "ensemble", "smc"):
        columns += [spread_of([c[name]["sw2"] for c in cells]), spread_of([c[name]["tv"] for c in cells])]
    for name in ("ensemble", "smc"):
        columns.append(f"{sum(c[name]['evaluations'] for c in cells) / len(cells) / 1000:.0f}k")
    columns.append(spread_of([value for c in cells for value in c["smc"]["log_z"]]))
    columns.append(spread_of([value for c in cells for value in c["ensemble"]["log_z"]]))
    columns.append(f"{sum(c['ensemble']['ess'] for c in cells) / len(cells):.3f}")
    return "| " + " | ".join(columns) + " |"


def inversion_rows(name: str, cells: list[dict]) -> list[str]:
    rows = []
    for method in ("ensemble", "smc", "smc_hmc", "hmc"):
        # Distances of means in posterior standard deviations, from those of HMC in the same cell.
        gaps = [
            max(abs(a - b) / s for a, b, s in zip(c[method]["mean"], c["hmc"]["mean"], c["hmc"]["spread"], strict=True))
            for c in cells
        ]
        ratio = [
            max(abs(math.log(a / b)) for a, b in zip(c[method]["spread"], c["hmc"]["spread"], strict=True))
            for c in cells
        ]
        value = sum(c[method]["log_z"][0] for c in cells) / len(cells)
        error = sum(c[method]["log_z"][1] for c in cells) / len(cells)
        exact = "" if cells[0]["exact"] is None else f"{cells[0]['exact']:.3f}"
        count = sum(c[method]["evaluations"] for c in cells) / len(cells) / 1000
        ess = sum(c[method]["ess"] for c in cells) / len(cells)
        cpu = sum(c[method]["cpu"] for c in cells) / len(cells)
        rows.append(
            f"| {name} | {method} | {exact} | {value:.3f} +- {error:.3f} | {sum(gaps) / len(gaps):.3f} "
            f"| {sum(ratio) / len(ratio):.3f} | {ess:.0f} | {count:.0f}k | {cpu:.1f} |"
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="*", default=list(range(8)))
    parser.add_argument("--inversion-seeds", type=int, nargs="*", default=[0])
    parser.add_argument("--dims", type=int, nargs="+", default=[5, 10, 20])
    parser.add_argument("--table-only", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("results/ensemble"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    for seed in options.seeds if not options.table_only else []:
        for dim in options.dims:
            path = options.out / f"mixture{dim}-{seed}.json"
            if not path.exists():
                write(path, mixture_cell(dim, seed))
    names = (
        "d | seeds | floor SW2 | floor TV | ensemble SW2 | ensemble TV | SMC SW2 | SMC TV | ensemble evals | SMC evals"
    )
    print(f"| {names} | SMC log Z | ensemble log Z | ensemble ESS / n |")
    print("|" + 13 * "---|")
    for dim in options.dims:
        found = sorted(options.out.glob(f"mixture{dim}-[0-9]*.json"))
        if found:
            print(mixture_row(dim, [json.loads(path.read_text()) for path in found]), flush=True)
    print(
        "| inversion | method | exact log Z | log Z | worst mean gap / sd | worst log sd ratio | ess | evals | CPU s |"
    )
    for name in ("travel_time_linear5", "travel_time5", "travel_time_linear20", "travel_time20"):
        for seed in options.inversion_seeds if not options.table_only else []:
            path = options.out / f"{name}-{seed}.json"
            if not path.exists():
                write(path, inversion_cell(targets.REGISTRY[name](), seed))
        found = sorted(options.out.glob(f"{name}-[0-9]*.json"))
        if found:
            print("\n".join(inversion_rows(name, [json.loads(path.read_text()) for path in found])), flush=True)


if __name__ == "__main__":
    main()
