"""What the learned refinement of a pilot costs and gives: a table over targets and seeds.

For every run: CPU seconds of pilot and refinement, the gap of the evidence lower bound, the error of log Z by
importance weights, ESS/N of fresh draws, coverage of the unweighted draws (total variation of mode shares, or the worst
error of a well's share), and two break-evens against more of the pilot's last pass: the number of effective draws, and
the standard error of log Z, from which on the refinement was the cheaper way (draws of a pass depend on each other).

Resumable: ``python experiments/refinement_table.py --out refinement.json gmm9:0 gmm40:0 ...``; finished runs are kept.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch

from diffsampler import estimators, targets
from diffsampler.particles import Particles
from diffsampler.pilot import PilotResult, run_pilot
from diffsampler.pilot.transport import PulledBack
from diffsampler.recipes import refined_sampler
from diffsampler.smc import smc
from diffsampler.target import Target
from diffsampler.tempering import Schedule, TemperedPath

TARGETS: dict[str, Callable[[], Target]] = {
    "gmm9": lambda: targets.GaussianMixture.grid(9),
    "gmm40": targets.GaussianMixture.forty,
    "seven": targets.GaussianMixture.seven,
    "difficult": targets.GaussianMixture.difficult,
    "rings": targets.Rings,
    "banana": targets.Banana,
    "funnel": lambda: targets.Funnel(dim=10, scale=3.0),
    "well8": lambda: targets.ManyWell(8),
    "well32": lambda: targets.ManyWell(32),
    "well64": lambda: targets.ManyWell(64),
    "rotated32": lambda: targets.ManyWell(32, rotation_seed=0),
}
DRAWS = 8000


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


def coverage(target: Target, particles: Particles) -> float:
    """Total variation between mode shares, or the worst error of a pair's right well; unweighted draws."""
    if isinstance(target, targets.ManyWell):
        return float((target.right_well_mass(particles.x) - target.right_mass).abs().max())
    if target.num_modes is None or target.num_modes < 2:
        return math.nan
    labels = target.mode_labels(particles.x)
    share = torch.bincount(labels[labels >= 0], minlength=target.num_modes).double() / len(particles)
    return 0.5 * float((share - target.mode_weights().double()).abs().sum())


def run(name: str, seed: int) -> dict[str, object]:
    target = TARGETS[name]()
    generator = torch.Generator().manual_seed(seed)
    began = time.process_time()
    pilot = run_pilot(target, generator=generator, num_particles=4096, num_islands=16)
    pilot_seconds = time.process_time() - began
    began = time.process_time()
    sampler, choices = refined_sampler(
        target,
        pilot,
        generator=generator,
        dtype=torch.float32,
        steps=None,
        limited=False,
        spent=lambda: 0.0,
        callback=lambda entry: None,
        start=lambda stage, number: None,
    )
    learned_seconds = time.process_time() - began
    began = time.process_time()
    particles = sampler.sample(DRAWS, seed=10_000 + seed)
    draw = (time.process_time() - began) / DRAWS
    log_weight = particles.log_weight
    ess = estimators.effective_sample_size(log_weight) / DRAWS
    truth = target.log_normalizer
    again = last_pass_seconds(target, pilot)
    saved = again - draw / ess
    # Cost of a standard error of 1: seconds per draw times the relative variance of a draw's weight.
    theirs = again * len(pilot.particles) * pilot.particles.log_normalizer.std_error**2
    saved_error = theirs - draw * (1.0 / ess - 1.0)
    return {
        "target": name,
        "seed": seed,
        "pilot_seconds": pilot_seconds,
        "learned_seconds": learned_seconds,
        "draw_microseconds": 1e6 * draw,
        "pilot_error": pilot.particles.log_normalizer.value - truth,
        "elbo_gap": float(log_weight.mean()) - truth,
        "log_normalizer_error": estimators.log_mean_exp(log_weight) - truth,
        "ess": ess,
        "coverage_error": coverage(target, particles),
        "break_even_draws": learned_seconds / saved if saved > 0.0 else math.inf,
        "break_even_error": math.sqrt(saved_error / learned_seconds) if saved_error > 0.0 else 0.0,
        "coordinates": choices["coordinates"],
        "stages": choices["stages"],
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="*", default=[f"{name}:{seed}" for name in TARGETS for seed in range(3)])
    parser.add_argument("--out", type=Path, default=Path("refinement.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = json.loads(options.out.read_text()) if options.out.exists() else {}
    for key in options.runs:
        if key not in rows:
            name, seed = key.split(":")
            rows[key] = run(name, int(seed))
            options.out.write_text(json.dumps(rows, indent=1))
        row = rows[key]
        print(
            f"{key:14s} pilot {row['pilot_seconds']:5.1f} s  learned {row['learned_seconds']:5.1f} s  "
            f"ELBO {row['elbo_gap']:+.3f}  log Z {row['log_normalizer_error']:+.4f}  ESS {row['ess']:.3f}  "
            f"cover {row['coverage_error']:.3f}  {row['draw_microseconds']:.0f} us/draw  "
            f"break-even {row['break_even_draws']:.3g} draws, s.e. {row['break_even_error']:.2g}  {row['coordinates']}",
            flush=True,
        )


if __name__ == "__main__":
    main()
