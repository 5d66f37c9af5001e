"""Tempering samplers on three multimodal targets: modes, mode weights, log Z and the coverage of its error bar.

Every cell (method, target, seed) is one line of ``results/tempering/<method>-<target>.jsonl``; finished cells are not
run again. CPU seconds of one thread.

    python experiments/tempering_table.py                      # 50 seeds of everything, then the table
    python experiments/tempering_table.py smc manywell32 0 25  # one method, one target, seeds 0 .. 24
    python experiments/tempering_table.py --table              # what is there
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from scipy import special

from diffsampler import baselines, targets
from diffsampler.sampler import Sampler
from diffsampler.target import Target

SEEDS = 50
FOLDER = Path("results/tempering")
WANTED = {"gmm40": 0.05, "manywell32": 0.2, "label_switching": 0.2}
SCALE = {"gmm40": 30.0, "manywell32": 2.0, "label_switching": None}

# Sampler and number of draws for each target.
METHODS: dict[str, Callable[[Target, float | None], Sampler]] = {
    "smc": lambda t, s: baselines.SMC(t, reference_scale=s),
    "waste_free": lambda t, s: baselines.WasteFreeSMC(t, reference_scale=s, chain_length=16),
    # Many systems cost little more than few, and give the error bar its Gaussian limit.
    "parallel_tempering": lambda t, s: baselines.ParallelTempering(
        t, reference_scale=s, num_systems=64 if t.dim > 10 else 128
    ),
}
DRAWS: dict[str, dict[str, int]] = {
    "smc": {"gmm40": 16 * 512, "manywell32": 16 * 2048, "label_switching": 16 * 256},
    "waste_free": {"gmm40": 16 * 2048, "manywell32": 16 * 4096, "label_switching": 16 * 1024},
    "parallel_tempering": {"gmm40": 128 * 500, "manywell32": 64 * 1500, "label_switching": 128 * 250},
}


def shares(target: Target, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Indicators of modes ``(n, m)`` and their exact means; the right wells where modes are too many to number."""
    if isinstance(target, targets.ManyWell) and target.num_modes is None:
        right = (x[:, 0::2] > 0).double()
        return right, torch.full_like(right[0], target.right_mass)
    weights = target.mode_weights().double()
    return torch.nn.functional.one_hot(target.mode_labels(x), len(weights)).double(), weights


def cell(method: str, name: str, seed: int) -> dict[str, Any]:
    target = targets.REGISTRY[name]()
    sampler = METHODS[method](target, SCALE[name])
    start = time.process_time()
    particles = sampler.sample(DRAWS[method][name], seed=seed)
    cpu = time.process_time() - start
    value, error, _ = particles.log_normalizer
    indicators, exact = shares(target, particles.x)
    mean, mean_error = particles.expectation(indicators)
    assert target.log_normalizer is not None
    z = (mean - exact) / mean_error
    return {
        "seed": seed,
        "cpu": cpu,
        "evaluations": sampler.evaluations,
        "log_z_error": value - target.log_normalizer,
        "log_z_se": error,
        "replicates": particles.replicates,
        "weights_rms_z": float(z.square().mean().sqrt()),
        "weights_max_z": float(z.abs().max()),
        "weights_error": float((mean - exact).abs().max()),
        "lightest": float((mean / exact).min()),
        "ess": particles.ess,
    }


def run(method: str, name: str, first: int, last: int) -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    path = FOLDER / f"{method}-{name}.jsonl"
    done = {row["seed"] for row in read(path)}
    for seed in range(first, last):
        if seed not in done:
            with path.open("a") as file:
                file.write(json.dumps(cell(method, name, seed)) + "\n")


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def table() -> None:
    print(
        "method target runs | log Z rms err, max, wanted | covered (t 95 %) | z rms, share of modes within 3 se | cpu s"
    )
    for method in METHODS:
        for name, wanted in WANTED.items():
            rows = read(FOLDER / f"{method}-{name}.jsonl")
            if not rows:
                continue
            error = torch.tensor([row["log_z_error"] for row in rows])
            limit = float(special.stdtrit(rows[0]["replicates"] - 1, 0.975))
            covered = sum(abs(row["log_z_error"]) <= limit * row["log_z_se"] for row in rows)
            ratio = error.exp()
            bias = float((ratio.mean() - 1.0) / (ratio.std() / math.sqrt(len(rows)))) if len(rows) > 1 else math.nan
            rms = math.sqrt(sum(row["weights_rms_z"] ** 2 for row in rows) / len(rows))
            print(
                f"{method} {name} {len(rows)} runs: log Z rms {float(error.square().mean().sqrt()):.4f}, "
                f"max {float(error.abs().max()):.4f}, within {wanted}: {int((error.abs() <= wanted).sum())}, "
                f"E[Zhat]/Z {float(ratio.mean()):.4f} ({bias:+.1f} se), covered {covered}; "
                f"weights: z rms {rms:.2f}, max {max(row['weights_max_z'] for row in rows):.1f}, "
                f"worst error {max(row['weights_error'] for row in rows):.4f}, "
                f"lightest mode {min(row['lightest'] for row in rows):.2f} of its weight; "
                f"{sum(row['cpu'] for row in rows) / len(rows):.2f} s, "
                f"{sum(row['evaluations'] for row in rows) / len(rows):.3g} evaluations"
            )


def main() -> None:
    arguments = [a for a in sys.argv[1:] if a != "--table"]
    if arguments:
        run(arguments[0], arguments[1], int(arguments[2]), int(arguments[3]))
    elif "--table" not in sys.argv:
        for method in METHODS:
            for name in WANTED:
                run(method, name, 0, SEEDS)
    table()


if __name__ == "__main__":
    main()
