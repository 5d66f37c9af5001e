"""Chains with velocities on the funnel: one JSON file per case and seed in ``results/underdamped``.

Neal's funnel in 10 dimensions with scale 3, whose log normalizer is 0. The published overdamped chain (Vargas, Padhy,
Blessing, Nuesken, 2024, https://arxiv.org/abs/2307.01050, 11,000 iterations of batch 300) reaches an ELBO of -0.587
with 64 steps, -0.343 with 128 and -0.230 with 256.

    python experiments/underdamped_table.py                 # all cases
    python experiments/underdamped_table.py ucmcd_64        # one case
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import diffsampler as ds
from diffsampler import targets
from diffsampler.objective import ReverseKL
from diffsampler.sampler import DiffusionSampler

SEEDS = (0, 1, 2, 3, 4)


@dataclass(frozen=True)
class Case:
    """Settings of one row."""

    kind: type[DiffusionSampler]
    num_steps: int
    options: dict[str, Any]
    steps: int = 600
    batch_size: int = 128
    learning_rate: float = 4e-3
    particles: int = 20_000


CASES: dict[str, Case] = {
    "uha_64": Case(ds.UHA, 64, {}),
    "ldvi_64": Case(ds.LDVI, 64, {}),
    "ucmcd_64": Case(ds.UCMCD, 64, {}),
    "ucmcd_local_64": Case(ds.UCMCD, 64, {"local_mass": True}),
    "ucmcd_local_128": Case(ds.UCMCD, 128, {"local_mass": True}),
    "ucmcd_local_256": Case(ds.UCMCD, 256, {"local_mass": True}),
    "cmcd_local_64": Case(ds.CMCD, 64, {"local_steps": True}),
    "cmcd_local_256": Case(ds.CMCD, 256, {"local_steps": True}),
}


def run(case: Case, seed: int) -> dict[str, Any]:
    """Train on one seed, evaluate on fresh draws."""
    target = targets.Funnel(dim=10, scale=3.0)
    sampler = case.kind(target, num_steps=case.num_steps, objective=ReverseKL(), seed=seed, **case.options)
    start = time.process_time()
    sampler.fit(steps=case.steps, batch_size=case.batch_size, learning_rate=case.learning_rate, seed=seed)
    cpu = time.process_time() - start
    drawn = sampler.sample(case.particles, seed=seed + 1000)
    return {
        "settings": {**asdict(case), "kind": case.kind.__name__},
        "seed": seed,
        "cpu_seconds": cpu,
        "evaluations": sampler.evaluations,
        "elbo": drawn.elbo,
        "log_normalizer": drawn.log_normalizer.value,
        "log_normalizer_error": drawn.log_normalizer.std_error,
        "ess_fraction": drawn.ess / len(drawn),
        "pareto_k": drawn.pareto_k,
        "version": ds.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", choices=[*CASES, []], help="cases to run, all by default")
    parser.add_argument("--seeds", type=int, nargs="*", default=list(SEEDS))
    parser.add_argument("--out", type=Path, default=Path("results/underdamped"))
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name in arguments.cases or CASES:
        for seed in arguments.seeds:
            path = arguments.out / f"{name}_{seed}.json"
            if not path.exists():
                path.write_text(json.dumps(run(CASES[name], seed), indent=2))
            row = json.loads(path.read_text())
            print(
                f"{name} seed {seed}: ELBO {row['elbo']:.3f}, log Z {row['log_normalizer']:.3f} "
                f"+- {row['log_normalizer_error']:.3f}, ESS {row['ess_fraction']:.3f}, {row['cpu_seconds']:.0f} CPU s"
            )


if __name__ == "__main__":
    main()
