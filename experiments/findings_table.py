"""Are findings calibrated? Twenty runs that are right and twenty that were sabotaged.

A good run must be right (its errors are checked against the truth, otherwise the case does not count as good) and
should carry no finding; a sabotaged run must carry a finding or be refused. Sabotage is what happens to users: budgets
that are far too small, processes that were hardly trained, chains that are too short or sit in different modes,
densities with holes, noise or infinite mass. Every run is one JSON file; runs that exist are not made again.

    OMP_NUM_THREADS=1 python experiments/findings_table.py
    OMP_NUM_THREADS=1 python experiments/findings_table.py --table       # no new runs
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from evidence_models import KNOWN
from table_cases import Folder, without_prior
from torch import Tensor

import diffsampler as ds
from diffsampler import baselines, targets
from diffsampler._report import number, table
from diffsampler.integrations.examples import eight_schools

Row = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """What all runs have in common."""

    tolerance: float = 0.1


class Run(NamedTuple):
    """A case: the call, and the exact log normalizer of a good one."""

    call: Callable[[int], ds.Fit]
    exact: Callable[[], float | None] = lambda: None


def gaussian(x: Tensor) -> Tensor:
    return -0.5 * x.square().sum(-1)


def density(function: Callable[[Tensor], Tensor], dim: int = 2) -> ds.Target:
    return ds.Target.from_log_prob(function, dim=dim)


def _registered(name: str, method: str = "auto", num_samples: int = 4000) -> Run:
    build = targets.REGISTRY[name]
    return Run(
        lambda seed: ds.sample(build(), method=method, num_samples=num_samples, seed=seed),
        lambda: build().log_normalizer,
    )


def _known(name: str, method: str = "auto", num_samples: int = 4000) -> Run:
    case = KNOWN[name]
    return Run(lambda seed: ds.sample(case.build(), method=method, num_samples=num_samples, seed=seed), case.evidence)


def _budget(build: Callable[[], ds.Target], evaluations: int) -> Run:
    return Run(lambda seed: ds.sample(build(), seed=seed, budget=ds.Budget(evaluations=evaluations)))


def _untrained(build: Callable[[], ds.Target], method: str, steps: int = 3) -> Run:
    return Run(lambda seed: ds.sample(build(), method=method, seed=seed, budget=ds.Budget(steps=steps)))


def _scratch(build: Callable[[], ds.Target]) -> Run:
    """Without the search that the names of methods bring along."""

    def call(seed: int) -> ds.Fit:
        target = build()
        return ds.sample(target, method=ds.CMCD(target, num_steps=16), seed=seed, budget=ds.Budget(steps=3))

    return Run(call)


def _smc(build: Callable[[], ds.Target], num_samples: int) -> Run:
    return Run(lambda seed: ds.sample(build(), method="smc", num_samples=num_samples, seed=seed))


def _chains(sampler: Callable[[], ds.Sampler], num_samples: int) -> Run:
    def call(seed: int) -> ds.Fit:
        chosen = sampler()
        return ds.sample(chosen.target, method=chosen, num_samples=num_samples, seed=seed)

    return Run(call)


def _density(function: Callable[[Tensor], Tensor], dim: int = 2) -> Run:
    return Run(lambda seed: ds.sample(density(function, dim), seed=seed))


def spread(num_chains: int, dim: int, scale: float) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return scale * torch.randn(num_chains, dim, generator=generator, dtype=torch.float64)


NOISE = torch.Generator().manual_seed(0)
GOOD: dict[str, Run] = {
    **{f"{name}, auto": _known(name) for name in ("binomial", "poisson", "logistic", "regression3", "linear10")},
    **{f"{name}, auto": _registered(name) for name in ("gaussian", "ill_scaled", "student_t", "banana", "gmm9")},
    **{
        f"{name}, smc": _known(name, "smc", 8192)
        for name in ("poisson", "logistic", "multinomial", "hierarchical", "schools", "regression8")
    },
    **{f"{name}, smc": _registered(name, "smc", 8192) for name in ("gaussian", "gmm9", "banana", "manywell8")},
}
BAD: dict[str, Run] = {
    "gmm40, 20,000 evaluations": _budget(targets.REGISTRY["gmm40"], 20_000),
    "linear20, 900,000 evaluations": _budget(KNOWN["linear20"].build, 900_000),
    "linear10, 300,000 evaluations": _budget(KNOWN["linear10"].build, 300_000),
    "schools without prior, 100,000": _budget(lambda: without_prior(targets.EightSchools()), 100_000),
    "manywell32, 100,000 evaluations": _budget(targets.REGISTRY["manywell32"], 100_000),
    "funnel, DIS after 3 steps": _untrained(targets.REGISTRY["funnel"], "dis"),
    "gmm40, CMCD from scratch, 3 steps": _scratch(targets.REGISTRY["gmm40"]),
    "manywell8, PIS after 3 steps": _untrained(targets.REGISTRY["manywell8"], "pis"),
    "student_t, DDS after 3 steps": _untrained(lambda: targets.StudentT(20), "dds"),
    "manywell32, DIS after 100 steps": _untrained(targets.REGISTRY["manywell32"], "dis", 100),
    "manywell64, SMC of 512": _smc(targets.REGISTRY["manywell64"], 512),
    "linear20, SMC of 512": _smc(KNOWN["linear20"].build, 512),
    "manywell32, SMC of 512": _smc(targets.REGISTRY["manywell32"], 512),
    "gmm9, HMC chains from afar": _chains(
        lambda: baselines.HMC(targets.GaussianMixture.grid(9), num_chains=8, warmup=50, init=spread(8, 2, 8.0)), 800
    ),
    "ill_scaled, MALA of 20 steps": _chains(
        lambda: baselines.MALA(targets.Gaussian.ill_scaled(), num_chains=8, warmup=20), 160
    ),
    "eight schools, NUTS of 30 steps": _chains(lambda: baselines.NUTS(eight_schools(), num_chains=4, warmup=30), 120),
    "density with a hole of NaN": _density(lambda x: torch.where(x[:, 0] > 2.5, torch.nan, 1.0) * gaussian(x) / 9.0),
    "noisy density": _density(lambda x: gaussian(x) + 0.3 * torch.randn(len(x), generator=NOISE)),
    "flat direction": _density(lambda x: -0.5 * (x[:, 0] - 2.0 * x[:, 1]).square(), 2),
    "tails like 1/|x|": _density(lambda x: -0.5 * x[:, 0].square() - torch.log1p(x[:, 1].abs())),
}


def run(case: Run, seed: int) -> Row:
    cpu = time.process_time()
    exact = case.exact()
    try:
        fit = case.call(seed)
    except (ValueError, RuntimeError) as error:
        text = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        return {"refused": text, "findings": [], "cpu": time.process_time() - cpu, "exact": exact}
    return {
        "refused": None,
        "findings": [str(finding) for finding in fit.findings],
        "notes": fit.notes,
        "method": fit.method,
        "exact": exact,
        "log_normalizer": list(fit.log_normalizer) if fit.particles.has_normalizer else None,
        "pareto_k": fit.pareto_k,
        "ess": fit.ess,
        "cpu": time.process_time() - cpu,
    }


def flagged(row: Row) -> bool:
    return row["refused"] is not None or bool(row["findings"])


def error(row: Row) -> float | None:
    if row["refused"] or row["exact"] is None or row["log_normalizer"] is None:
        return None
    return abs(row["log_normalizer"][0] - row["exact"])


def show(found: dict[str, dict[str, list[Row]]], settings: Settings) -> str:
    lines, count = [], {}
    for kind, cases in found.items():
        for name, rows in cases.items():
            for row in rows:
                first = row["refused"] or (row["findings"][0] if row["findings"] else "-")
                lines.append((kind, name, str(row["seed"]), number(error(row), ".4f"), f"{row['cpu']:.1f}", first[:90]))
        rows = [row for group in cases.values() for row in group]
        count[kind] = f"{sum(map(flagged, rows))} of {len(rows)} {kind} runs flagged"
        wrong = [row for row in rows if (error(row) or 0.0) > settings.tolerance]
        if kind == "good" and wrong:
            count[kind] += f"; {len(wrong)} were not good: {', '.join(row['case'] for row in wrong)}"
    text = table(("run", "case", "seed", "error of log Z", "CPU s", "first finding"), lines)
    return "\n".join([text, "", *count.values()])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=1, help="number of seeds")
    parser.add_argument("--table", action="store_true", help="make no new runs")
    parser.add_argument("--out", type=Path, default=Path("results/findings"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    settings = Settings()
    folder = Folder(options.out, settings)
    kinds = {"sabotaged": BAD, "good": GOOD}
    for seed in range(options.seeds):
        for kind, cases in kinds.items():
            for name, case in cases.items():
                key = f"{kind} {name}".replace("/", " over ")
                if not options.table and not folder.done(key, seed):
                    folder.write(key, seed, run(case, seed))
    found: dict[str, dict[str, list[Row]]] = {kind: {} for kind in kinds}
    for kind, cases in kinds.items():
        for name in cases:
            rows = folder.read(f"{kind} {name}".replace("/", " over "))
            if rows:
                found[kind][name] = rows
    folder.publish(show(found, settings))


if __name__ == "__main__":
    main()
