"""Every named method on the same targets at an equal budget of CPU seconds: what a default setting is worth.

A run is ``ds.sample(target, method=name)`` with its default options, standardized by its own short search, and stops
when its process has used the budget of CPU seconds (one thread; drawing 4,000 paths is kept out of it and reported).
Every run is one JSON file with its settings and versions; runs that exist are not made again. The table and a figure
are made of what is there: median and worst error of log Z, ELBO gap, ESS/N and the number of runs with a finding.

    OMP_NUM_THREADS=1 python experiments/methods_table.py                      # 60 CPU s, 5 seeds: 8 hours
    OMP_NUM_THREADS=1 python experiments/methods_table.py --cpu 20 --seeds 1 --only gmm9 --methods dis cmcd
    OMP_NUM_THREADS=1 python experiments/methods_table.py --table              # of what is there, no new runs
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
from table_cases import CASES, Case, Folder

import diffsampler as ds
from diffsampler._report import number, table
from diffsampler.catalog import LEARNED
from diffsampler.recipes import SEARCH_BATCH, SEARCH_SHARE, learned_sampler
from diffsampler.result import diagnose
from diffsampler.runs import BATCH_SIZE
from diffsampler.target import Target

Row = dict[str, Any]
TARGETS = ("gmm9", "gmm40", "funnel", "manywell32", "brownian", "logistic31")
CLASSICAL = ("auto", "smc")


@dataclass(frozen=True)
class Settings:
    """What all runs have in common.

    Arguments:
        cpu: CPU seconds for the search and training of a learned method.
        num_samples: Draws of the evaluation.
    """

    cpu: float = 60.0
    num_samples: int = 4000


def run(case: Case, method: str, seed: int, settings: Settings) -> Row:
    """Train a method for its budget and weigh fresh draws; ``auto`` and ``smc`` set their own length."""
    target = case.build()
    start, wall = time.process_time(), time.monotonic()
    if method in CLASSICAL:
        fit = ds.sample(target, method=method, num_samples=settings.num_samples, seed=seed)
        particles, evaluations, steps = fit.particles, fit.evaluations, 0
        trained = time.process_time() - start
    else:
        sampler, choices = learned_sampler(
            method,
            target,
            generator=torch.Generator().manual_seed(seed),
            dtype=torch.float32,
            paid=lambda: affordable(target, settings.cpu * SEARCH_SHARE),
        )
        sampler.inner.fit(
            steps=1_000_000,
            batch_size=BATCH_SIZE,
            learning_rate=float(choices["learning_rate"]),
            seed=seed,
            spent=lambda: (time.process_time() - start) / settings.cpu,
        )
        trained, history = time.process_time() - start, sampler.inner.history
        steps = int(history[-1]["step"]) if history else 0
        evaluations = sampler.evaluations
        particles = sampler.sample(settings.num_samples, seed=seed + 1000)
    exact = target.log_normalizer
    return {
        "method": method,
        "cpu_training": trained,
        "cpu_drawing": time.process_time() - start - trained,
        "seconds": time.monotonic() - wall,
        "training_steps": steps,
        "training_evaluations": evaluations,
        "elbo": particles.elbo,
        "log_normalizer": list(particles.log_normalizer),
        "exact": exact,
        "ess_fraction": particles.ess / len(particles),
        "pareto_k": particles.pareto_k,
        "findings": [str(f) for f in diagnose(particles) if f.level != "note"],
        "measures": case.measure(target, particles),
    }


def affordable(target: Target, cpu: float) -> float:
    """Evaluations in batches of the search that fit into CPU seconds, from a few of them."""
    x = torch.randn(SEARCH_BATCH, target.dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    target.log_prob_and_score(x)
    start = time.process_time()
    for _ in range(5):
        target.log_prob_and_score(x)
    return cpu * 5 * SEARCH_BATCH / (time.process_time() - start)


def gap(row: Row) -> float:
    return row["exact"] - row["elbo"]


def error(row: Row) -> float:
    return row["log_normalizer"][0] - row["exact"]


HEADER = ("target", "method", "runs", "ELBO gap", "abs error", "worst", "s.e.", "ESS/N", "CPU s", "steps", "flagged")


def summary(name: str, method: str, rows: list[Row]) -> tuple[str, ...]:
    """One line of the table: medians over seeds, and the worst error."""
    sizes = [abs(error(row)) for row in rows]
    return (
        name,
        method,
        str(len(rows)),
        number(statistics.median(map(gap, rows))),
        number(statistics.median(sizes)),
        number(max(sizes)),
        number(statistics.median(row["log_normalizer"][1] for row in rows)),
        number(statistics.median(row["ess_fraction"] for row in rows)),
        number(statistics.fmean(row["cpu_training"] + row["cpu_drawing"] for row in rows), ".1f"),
        str(round(statistics.fmean(row["training_steps"] for row in rows))),
        f"{sum(bool(row['findings']) for row in rows)}/{len(rows)}",
    )


def draw(found: dict[tuple[str, str], list[Row]], path: Path) -> None:
    """A panel per target: error of log Z with its standard error, by method; the colour says ESS/N."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(dict.fromkeys(name for name, _ in found))
    methods = list(dict.fromkeys(method for _, method in found))[::-1]
    figure, panels = pyplot.subplots(
        1,
        len(names),
        figsize=(2.4 + 2.3 * len(names), 1.8 + 0.3 * len(methods)),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    marks = None
    for panel, name in zip(panels[0], names, strict=True):
        for height, method in enumerate(methods):
            for row in found.get((name, method), []):
                size = max(1e-4, abs(error(row)))
                panel.plot([size, size + row["log_normalizer"][1]], [height, height], color="0.7", lw=1.0, zorder=1)
                marks = panel.scatter(
                    size, height, c=[row["ess_fraction"]], cmap="viridis", vmin=0.0, vmax=1.0, s=34, zorder=2
                )
        panel.set(xscale="log", xlim=(7e-5, 1e2), title=name)
        panel.axvline(0.05, color="0.5", lw=0.8, ls="--")
        panel.grid(axis="x", alpha=0.3)
        panel.set_axisbelow(True)
    panels[0][0].set_yticks(range(len(methods)), methods)
    panels[0][len(names) // 2].set_xlabel("|log Z - exact|, nats (line: plus one standard error; dashed: 0.05)")
    if marks is not None:
        figure.colorbar(marks, ax=panels[0].tolist(), label="ESS / N", shrink=0.8)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=list(TARGETS), choices=list(CASES), metavar="TARGET")
    methods = [*CLASSICAL, *LEARNED]
    parser.add_argument("--methods", nargs="+", default=methods, choices=methods, metavar="METHOD")
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--cpu", type=float, default=Settings.cpu, help="CPU seconds of a learned method")
    parser.add_argument("--num-samples", type=int, default=Settings.num_samples)
    parser.add_argument("--table", action="store_true", help="make no new runs")
    parser.add_argument("--out", type=Path, default=None, help="folder, results/methods_<cpu> by default")
    options = parser.parse_args()
    torch.set_num_threads(1)
    out = options.out or Path(f"results/methods_{options.cpu:g}")
    folder = Folder(out, Settings(options.cpu, options.num_samples))
    # Seed by seed: an interrupted table has all targets and methods with fewer seeds.
    for seed in range(options.first_seed, options.first_seed + options.seeds):
        for name in options.only:
            for method in options.methods:
                key = f"{name}-{method}"
                if not options.table and not folder.done(key, seed):
                    try:
                        row = run(CASES[name], method, seed, folder.settings)
                    except RuntimeError as failure:
                        row = failed(method, failure)
                    folder.write(key, seed, row)
                    print(f"{key} {seed}: ESS/N {row['ess_fraction']:.3f}, ELBO {row['elbo']:.3f}", flush=True)
    show(folder, options.only, options.methods)


def failed(method: str, failure: RuntimeError) -> Row:
    """A row of a run whose training or draws gave no finite weight: worthless, and counted as such."""
    return {
        "method": method,
        "failed": str(failure),
        "elbo": -math.inf,
        "ess_fraction": 0.0,
        "findings": [str(failure)],
    }


def show(folder: Folder, names: list[str], methods: list[str]) -> None:
    """Print and store the table, and draw it."""
    every = {(n, m): rows for n in names for m in methods if (rows := folder.read(f"{n}-{m}"))}
    found = {key: good for key, rows in every.items() if (good := [row for row in rows if "failed" not in row])}
    lines = [f"{n} {m}: {sum('failed' in r for r in rows)} failed" for (n, m), rows in every.items()]
    if found:
        rows = [summary(*key, group) for key, group in found.items()]
        text = "\n".join([table(HEADER, rows), *(line for line in lines if not line.endswith(" 0 failed"))])
        folder.publish(text, lambda path: draw(found, path))


if __name__ == "__main__":
    main()
