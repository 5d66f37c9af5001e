"""Log evidence of conjugate and quadrature-checked models by `ds.sample`: errors and coverage over many seeds.

Every run is one JSON file; runs that exist are not made again. Intervals are those of the islands, Student's with 15
degrees of freedom, and 95 % of them should cover. One seed gives all models one stream of random numbers, so their
errors lean the same way: a few seeds say less about coverage than their number of runs.

    OMP_NUM_THREADS=1 python experiments/evidence_table.py                              # defaults: 2 to 25 CPU s a run
    OMP_NUM_THREADS=1 python experiments/evidence_table.py --evaluations 900000         # the pilot alone: 1 to 3 CPU s
    OMP_NUM_THREADS=1 python experiments/evidence_table.py --evaluations 900000 --table # no new runs
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from evidence_models import KNOWN
from table_cases import Folder

import diffsampler as ds
from diffsampler._report import table

Row = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """What all runs have in common."""

    num_samples: int = 4000
    evaluations: int | None = None


def run(name: str, seed: int, settings: Settings) -> Row:
    target = KNOWN[name].build()
    cpu = time.process_time()
    budget = ds.Budget(evaluations=settings.evaluations)
    fit = ds.sample(target, num_samples=settings.num_samples, seed=seed, budget=budget)
    return {
        "log_normalizer": list(fit.log_normalizer),
        "replicates": fit.particles.replicates,
        "dim": target.dim,
        "cpu": time.process_time() - cpu,
        "method": fit.method,
        "pareto_k": fit.pareto_k,
        "ess": fit.ess,
        "evaluations": fit.evaluations,
        "findings": [str(finding) for finding in fit.findings],
    }


def score(row: Row, exact: float) -> float:
    """Error in units of the stated standard error."""
    return (row["log_normalizer"][0] - exact) / max(row["log_normalizer"][1], 1e-12)


def covered(row: Row, exact: float) -> bool:
    return abs(score(row, exact)) <= (2.131 if row["replicates"] == 16 else 1.96)


HEADER = ("model", "d", "by", "exact", "runs", "median error", "worst", "stated", "in s.e.", "95 %", "CPU s", "flagged")


def line(name: str, rows: list[Row]) -> tuple[str, ...]:
    exact = KNOWN[name].evidence()
    errors = [abs(row["log_normalizer"][0] - exact) for row in rows]
    return (
        name,
        str(KNOWN[name].dim),
        KNOWN[name].how,
        f"{exact:.4f}",
        str(len(rows)),
        f"{statistics.median(errors):.4f}",
        f"{max(errors):.4f}",
        f"{statistics.median(row['log_normalizer'][1] for row in rows):.4f}",
        f"{math.sqrt(statistics.fmean(score(row, exact) ** 2 for row in rows)):.2f}",
        f"{sum(covered(row, exact) for row in rows)}/{len(rows)}",
        f"{statistics.fmean(row['cpu'] for row in rows):.1f}",
        str(sum(bool(row["findings"]) for row in rows)),
    )


def show(found: dict[str, list[Row]]) -> str:
    rows = [(row, KNOWN[name].evidence()) for name, group in found.items() for row in group]
    good = sum(covered(row, exact) for row, exact in rows)
    middle = statistics.median(abs(row["log_normalizer"][0] - exact) for row, exact in rows)
    text = table(HEADER, [line(name, group) for name, group in found.items()])
    return f"{text}\n\ncovered {good} of {len(rows)} ({100.0 * good / len(rows):.1f} %), median error {middle:.4f}"


def draw(found: dict[str, list[Row]], path: Path) -> None:
    """One line per model, one dot per seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(found)[::-1]
    figure, panels = pyplot.subplots(
        1, 2, figsize=(10.0, 1.6 + 0.36 * len(names)), sharey=True, layout="constrained", width_ratios=(1, 1)
    )
    for height, name in enumerate(names):
        exact, rows = KNOWN[name].evidence(), found[name]
        for index, row in enumerate(rows):
            y = height + 0.5 * ((index + 0.5) / len(rows) - 0.5)
            style = {"color": "#2a6f97" if covered(row, exact) else "#d1495b", "s": 12, "lw": 0, "alpha": 0.8}
            panels[0].scatter(row["log_normalizer"][0] - exact, y, **style)
            panels[1].scatter(max(-5.0, min(5.0, score(row, exact))), y, **style)
    panels[0].axvspan(-0.05, 0.05, color="#2a6f97", alpha=0.1, lw=0)
    panels[1].axvspan(-2.131, 2.131, color="#2a6f97", alpha=0.1, lw=0)
    panels[0].set(xlabel="log Z - exact, nats (band: 0.05)")
    panels[1].set(xlabel="(log Z - exact) / its standard error (band: 95 %)", xlim=(-5.2, 5.2))
    panels[0].set_yticks(range(len(names)), [f"{name}, d = {KNOWN[name].dim}" for name in names])
    for panel in panels:
        panel.axvline(0.0, color="0.4", lw=0.8)
        panel.grid(axis="x", alpha=0.3)
        panel.set_axisbelow(True)
    figure.suptitle("Log evidence against closed forms and quadrature, one dot per seed", x=0.01, ha="left")
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=list(KNOWN), choices=list(KNOWN), metavar="MODEL")
    parser.add_argument("--seeds", type=int, default=50, help="number of seeds")
    parser.add_argument("--num-samples", type=int, default=Settings.num_samples)
    parser.add_argument("--evaluations", type=int, default=None, help="budget of a run")
    parser.add_argument("--table", action="store_true", help="make no new runs")
    parser.add_argument("--out", type=Path, default=Path("results/evidence"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    settings = Settings(options.num_samples, options.evaluations)
    folder = Folder(options.out, settings)
    # Seed by seed: an interrupted table has all models with fewer seeds.
    for seed in range(options.seeds):
        for name in options.only:
            if not options.table and not folder.done(name, seed):
                folder.write(name, seed, run(name, seed, settings))
    found = {name: rows for name in options.only if (rows := folder.read(name))}
    if found:
        folder.publish(show(found), lambda path: draw(found, path))


if __name__ == "__main__":
    main()
