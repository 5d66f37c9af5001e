"""What the learned refinement of a pilot costs and gives, and from which number of draws on it pays.

For every run: CPU seconds of pilot and refinement, the gap of the evidence lower bound, the error of log Z by
importance weights, ESS/N of fresh draws, the checks of the target on unweighted draws, and two break-evens against more
of the pilot's last pass: the number of effective draws, and the standard error of log Z, from which on the refinement
was the cheaper way (draws of a pass depend on each other).

Finished runs are kept: ``OMP_NUM_THREADS=1 python experiments/break_even.py --only gmm9 gmm40 --seeds 3``.
"""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from table_cases import CASES, Case, Folder

from diffsampler import estimators
from diffsampler._report import table
from diffsampler.particles import Particles
from diffsampler.pilot import PilotResult, run_pilot
from diffsampler.pilot.transport import PulledBack
from diffsampler.recipes import refined_sampler
from diffsampler.refinement import Course
from diffsampler.smc import smc
from diffsampler.target import Target
from diffsampler.tempering import Schedule, TemperedPath

USUAL = ("gmm9", "gmm40", "seven", "difficult", "rings", "banana", "funnel", "manywell8", "manywell32", "manywell64")


@dataclass(frozen=True)
class Settings:
    """What all runs have in common.

    Arguments:
        num_particles: Of the pilot.
        num_islands: Of the pilot's last pass.
        num_draws: Of the learned sampler.
    """

    num_particles: int = 4096
    num_islands: int = 16
    num_draws: int = 8000


def last_pass_seconds(target: Target, pilot: PilotResult) -> float:
    """CPU seconds of another last pass, per particle."""
    chosen = pilot.choices
    base = target if pilot.transport is None else PulledBack(target, pilot.transport)
    betas = tuple(chosen["betas"])
    schedule = Schedule(
        betas=betas,
        step_sizes=tuple(chosen["step_sizes"]),
        scales=(torch.ones(1, dtype=torch.float64),) * len(betas),
        num_moves=tuple(chosen["num_moves"]),
        resampled=(True,) * len(betas),
    )
    began = time.process_time()
    smc(
        TemperedPath(pilot.reference, base),
        n=chosen["num_particles"],
        num_islands=chosen["num_islands"],
        generator=torch.Generator().manual_seed(1),
        schedule=schedule,
    )
    return (time.process_time() - began) / chosen["num_particles"]


def run(case: Case, seed: int, settings: Settings) -> dict[str, Any]:
    target = case.build()
    generator = torch.Generator().manual_seed(seed)
    began = time.process_time()
    pilot = run_pilot(
        target, generator=generator, num_particles=settings.num_particles, num_islands=settings.num_islands
    )
    pilot_seconds = time.process_time() - began
    assert pilot.particles is not None
    began = time.process_time()
    sampler, choices = refined_sampler(target, pilot, generator=generator, dtype=torch.float32, course=Course())
    learned_seconds = time.process_time() - began
    began = time.process_time()
    particles = sampler.sample(settings.num_draws, seed=10_000 + seed)
    draw = (time.process_time() - began) / settings.num_draws
    log_weight = particles.log_weight
    ess = estimators.effective_sample_size(log_weight) / settings.num_draws
    truth = math.nan if target.log_normalizer is None else target.log_normalizer
    again = last_pass_seconds(target, pilot)
    saved = again - draw / ess
    # Cost of a standard error of 1: seconds per draw times the relative variance of a draw's weight.
    theirs = again * len(pilot.particles) * pilot.particles.log_normalizer.std_error**2
    saved_error = theirs - draw * (1.0 / ess - 1.0)
    return {
        "pilot_seconds": pilot_seconds,
        "learned_seconds": learned_seconds,
        "draw_microseconds": 1e6 * draw,
        "pilot_draw_microseconds": 1e6 * again,
        "pilot_error": pilot.particles.log_normalizer.value - truth,
        "elbo_gap": float(log_weight.mean()) - truth,
        "log_normalizer_error": estimators.log_mean_exp(log_weight) - truth,
        "ess": ess,
        "measures": case.measure(target, Particles(particles.x, torch.zeros_like(log_weight))),
        "break_even_draws": learned_seconds / saved if saved > 0.0 else math.inf,
        "break_even_error": math.sqrt(saved_error / learned_seconds) if saved_error > 0.0 else 0.0,
        "coordinates": choices["coordinates"],
        "stages": choices["stages"],
    }


HEADER = ("target", "seed", "pilot s", "learned s", "ELBO gap", "log Z error", "ESS/N", "us/draw", "us/draw, pilot")
BREAK_EVEN = ("pays from draws", "pays from s.e.", "checks", "coordinates")


def line(row: dict[str, Any]) -> tuple[str, ...]:
    return (
        row["case"],
        str(row["seed"]),
        f"{row['pilot_seconds']:.1f}",
        f"{row['learned_seconds']:.1f}",
        f"{row['elbo_gap']:+.3f}",
        f"{row['log_normalizer_error']:+.4f}",
        f"{row['ess']:.3f}",
        f"{row['draw_microseconds']:.0f}",
        f"{row['pilot_draw_microseconds']:.0f}",
        f"{row['break_even_draws']:.3g}",
        f"{row['break_even_error']:.2g}",
        ", ".join(f"{name} {value:.3g}" for name, value in row["measures"].items()) or "-",
        row["coordinates"],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=list(USUAL), choices=list(CASES), metavar="TARGET")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds, from 0 on")
    parser.add_argument("--out", type=Path, default=Path("results/break_even"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    settings = Settings()
    folder = Folder(options.out, settings)
    for name in options.only:
        for seed in range(options.seeds):
            if not folder.done(name, seed):
                folder.write(name, seed, run(CASES[name], seed, settings))
    print(table((*HEADER, *BREAK_EVEN), [line(row) for name in options.only for row in folder.read(name)]))


if __name__ == "__main__":
    main()
