"""Chains whose forward and backward kernels share parameters, by three losses at equal steps: ELBO gap and ESS/N.

Annealed Langevin chains share step sizes and temperatures, bridges step sizes; CMCD shares its control, too. The
log-variance sees all of them at fixed paths only, where they mislead it. One JSON file per run, resumable.

    OMP_NUM_THREADS=1 python experiments/shared_table.py                # 3 seeds: 15 minutes
    OMP_NUM_THREADS=1 python experiments/shared_table.py --seeds 1
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from table_cases import Folder

import diffsampler as ds
from diffsampler import targets
from diffsampler._report import table
from diffsampler.objective import LogVariance, ReverseKL, ScoreFunctionKL

Row = dict[str, Any]
TARGETS = {
    "seven": (targets.GaussianMixture.seven, {"scale": 4.0, "local_scale": 0.15}),
    "mw54": (targets.DoubleWells.mw54, {"scale": 2.0, "local_scale": 0.1}),
}
KINDS = {"ula": ds.AnnealedULA, "mcd": ds.MCD, "cmcd": ds.CMCD, "gbs": ds.GBS}
LOSSES = {"variance": LogVariance, "score": ScoreFunctionKL, "path": ReverseKL}


@dataclass(frozen=True)
class Settings:
    """What all runs have in common."""

    num_steps: int = 32
    steps: int = 200
    batch_size: int = 256
    learning_rate: float = 5e-3
    draws: int = 4000


def run(target_name: str, kind: str, loss: str, seed: int, settings: Settings) -> Row:
    """Train, and weigh fresh draws."""
    build, options = TARGETS[target_name]
    target = build()
    sampler = KINDS[kind](target, num_steps=settings.num_steps, objective=LOSSES[loss](), seed=seed, **options)
    start = time.process_time()
    sampler.fit(steps=settings.steps, batch_size=settings.batch_size, learning_rate=settings.learning_rate, seed=seed)
    cpu = time.process_time() - start
    drawn = sampler.sample(settings.draws, seed=seed + 1000)
    return {"gap": target.log_normalizer - drawn.elbo, "ess": drawn.ess / len(drawn), "cpu": cpu}


def summary(rows: list[Row]) -> str:
    gap, ess, cpu = (statistics.fmean(row[name] for row in rows) for name in ("gap", "ess", "cpu"))
    return f"{gap:.2f}, {ess:.3f}, {cpu:.0f} s"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("results/shared"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    folder = Folder(options.out, Settings())
    for seed, name, kind, loss in itertools.product(range(options.seeds), TARGETS, KINDS, LOSSES):
        case = f"{name}-{kind}-{loss}"
        if not folder.done(case, seed):
            row = run(name, kind, loss, seed, folder.settings)
            folder.write(case, seed, row)
            print(f"{case} {seed}: {summary([row])}", flush=True)
    lines = [
        (name, kind, *(summary(folder.read(f"{name}-{kind}-{loss}")) for loss in LOSSES))
        for name, kind in itertools.product(TARGETS, KINDS)
    ]
    header = ("target", "chain", *(f"{kind.__name__}: gap, ESS/N, CPU" for kind in LOSSES.values()))
    folder.publish(table(header, lines))


if __name__ == "__main__":
    main()
