"""Learned controlled diffusions against their published tables: one JSON file per case and seed, a table, a figure.

CPU seconds are of one thread and hold training with all it needs (search, pilot), not the draws of the evaluation. The
ELBO gap is ``log Z - ELBO`` of fresh draws; error and ESS/N are of their importance weights. The library's recipe mixes
its chain with draws of the pilot's reference: there the ELBO is the chain's own, and error, ESS/N and measures are of
the mixture. The ELBO of a chain that resamples is, as published, the sum of the weighted mean gains of its pieces; that
of whole chains without resampling is among the measures.

    OMP_NUM_THREADS=1 python experiments/published_table.py                           # all cases, 5 seeds: hours
    OMP_NUM_THREADS=1 python experiments/published_table.py --only mw32-best --seeds 1
    OMP_NUM_THREADS=1 python experiments/published_table.py --table                   # of what is there, no new runs
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from published_cases import CASES, Case
from table_cases import Folder

from diffsampler._report import number, table
from diffsampler.methods.scld import SCLD

Row = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """What all runs have in common.

    Arguments:
        share: Of every case's CPU seconds and steps; below 1 only to try the table out.
        draws: Of the evaluation at most.
    """

    share: float = 1.0
    draws: int = 8000


def run(case: Case, seed: int, settings: Settings) -> Row:
    """Train on one seed, evaluate fresh draws."""
    target = case.build()
    start, wall = time.process_time(), time.monotonic()
    sampler, notes = case.recipe.train(target, seed, settings.share)
    cpu, seconds = time.process_time() - start, time.monotonic() - wall
    evaluations = sampler.evaluations
    count = min(case.draws, settings.draws)
    particles = sampler.sample(count, seed=seed + 1000)
    elbo, measures = particles.elbo, case.measure(target, particles)
    if isinstance(sampler, SCLD):
        populations = sampler.populations(count, seed=seed + 2000)
        elbo = float(torch.cat([one.lower_bound for one in populations]).mean())
        whole = sampler.chain.sample(count, seed=seed + 3000)
        measures = {**measures, "gap of whole chains": target.log_normalizer - whole.elbo}
    return {
        "recipe": describe(case.recipe),
        "notes": notes,
        "cpu": notes.get("cpu", cpu),
        "seconds": seconds,
        "cpu_drawing": time.process_time() - start - cpu,
        "evaluations": evaluations,
        "exact": target.log_normalizer,
        "elbo": elbo,
        "log_normalizer": list(particles.log_normalizer)[:2],
        "ess_fraction": particles.ess / len(particles),
        "pareto_k": particles.pareto_k,
        "draws": len(particles),
        "measures": measures,
    }


def describe(recipe: object) -> dict[str, str]:
    """Every setting of a recipe as text."""
    settings = {"recipe": type(recipe).__name__}
    for name, value in vars(recipe).items():
        settings[name] = getattr(value, "__name__", None) or str(value)[:500]
    return settings


def gap(row: Row) -> float:
    return row["exact"] - row["elbo"]


def error(row: Row) -> float:
    return row["log_normalizer"][0] - row["exact"]


def spread(values: Iterable[float], form: str = ".3f") -> str:
    """Mean and standard deviation over seeds."""
    values = list(values)
    text = format(statistics.fmean(values), form)
    return f"{text} +- {format(statistics.stdev(values), form)}" if len(values) > 1 else text


def mean(rows: list[Row], name: str) -> float:
    return statistics.fmean(row["measures"][name] for row in rows)


def shortfalls(case: Case, rows: list[Row]) -> list[str]:
    """What the means over seeds miss."""
    wanted = case.wanted
    missed = []
    if wanted.gap is not None and not statistics.fmean(map(gap, rows)) <= wanted.gap:
        missed.append("gap")
    if wanted.error is not None and not statistics.fmean(abs(error(row)) for row in rows) <= wanted.error:
        missed.append("error")
    if wanted.ess is not None and not statistics.fmean(row["ess_fraction"] for row in rows) >= wanted.ess:
        missed.append("ESS")
    return missed + [
        name
        for name, (low, high) in wanted.measures.items()
        if name in rows[0]["measures"] and not low <= mean(rows, name) <= high
    ]


def demands(case: Case) -> str:
    wanted = case.wanted
    parts = [] if wanted.gap is None else [f"gap <= {wanted.gap:.3g}"]
    parts += [] if wanted.error is None else [f"error <= {wanted.error:g}"]
    parts += [] if wanted.ess is None else [f"ESS >= {wanted.ess:g}"]
    parts += [f"{name} {low:g} to {high:g}" for name, (low, high) in wanted.measures.items()]
    return ", ".join(parts) or "-"


HEADER = ("case", "seeds", "ELBO gap", "IS log Z error", "ESS/N", "CPU s", "wanted", "published", "verdict")


def summary(name: str, rows: list[Row]) -> tuple[str, ...]:
    case = CASES[name]
    missed = shortfalls(case, rows)
    return (
        name,
        str(len(rows)),
        spread(map(gap, rows)),
        spread(map(error, rows)),
        spread((row["ess_fraction"] for row in rows), ".2f"),
        number(statistics.fmean(row["cpu"] for row in rows), ".0f"),
        demands(case),
        case.wanted.published,
        "short: " + ", ".join(missed) if missed else "-" if demands(case) == "-" else "reached",
    )


def show(found: dict[str, list[Row]]) -> str:
    lines = [table(HEADER, [summary(name, rows) for name, rows in found.items()]), ""]
    for name, rows in found.items():
        if rows[0]["measures"]:
            parts = [f"{key} {spread(row['measures'][key] for row in rows)}" for key in rows[0]["measures"]]
            lines.append(f"{name}: {', '.join(parts)}")
    return "\n".join(lines)


def draw(found: dict[str, list[Row]], path: Path) -> None:
    """A line per case: gap, error and ESS of every seed, and what is wanted."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(found)[::-1]
    figure, panels = pyplot.subplots(
        1, 4, figsize=(13.0, 1.6 + 0.3 * len(names)), sharey=True, layout="constrained", width_ratios=(4, 4, 4, 3)
    )
    titles = ("ELBO gap, nats", "|log Z - exact|, nats", "ESS / N", "CPU seconds")
    limits = ((0.01, 20.0), (6e-4, 2.0), (-0.02, 1.02), (5.0, 500.0))
    for height, name in enumerate(names):
        rows, wanted = found[name], CASES[name].wanted
        colour = "#d1495b" if shortfalls(CASES[name], rows) else "#2a6f97"
        values = (
            [gap(row) for row in rows],
            [abs(error(row)) for row in rows],
            [row["ess_fraction"] for row in rows],
            [row["cpu"] for row in rows],
        )
        bounds = (wanted.gap, wanted.error, wanted.ess, None)
        for panel, seen, bound, limit in zip(panels, values, bounds, limits, strict=True):
            # What lies beyond an axis is drawn at its end.
            seen = [min(max(value, limit[0]), limit[1]) for value in seen]
            panel.scatter(seen, [height] * len(seen), s=16, color=colour, alpha=0.7, zorder=2, clip_on=False)
            if bound is not None:
                panel.scatter(bound, height, marker="|", s=170, color="black", zorder=1)
    for panel, title, limit in zip(panels, titles, limits, strict=True):
        panel.set(xlabel=title, xscale="linear" if limit[0] < 0.0 else "log", xlim=limit)
        panel.grid(alpha=0.3)
        panel.set_axisbelow(True)
    panels[0].set_yticks(range(len(names)), names)
    panels[0].set_ylim(-0.6, len(names) - 0.4)
    for label, style in (
        ("a seed, all bounds kept by the means", {"color": "#2a6f97", "s": 16}),
        ("a seed, some bound missed", {"color": "#d1495b", "s": 16}),
        ("what is wanted", {"color": "black", "marker": "|", "s": 170}),
    ):
        panels[3].scatter([], [], label=label, **style)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=list(CASES), choices=list(CASES), metavar="CASE")
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--share", type=float, default=1.0, help="of the training, to try it out")
    parser.add_argument("--draws", type=int, default=Settings.draws)
    parser.add_argument("--table", action="store_true", help="make no new runs")
    parser.add_argument("--out", type=Path, default=Path("results/published"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    folder = Folder(options.out, Settings(options.share, options.draws))
    # Seed by seed: an interrupted table has all cases with fewer seeds.
    for seed in range(options.first_seed, options.first_seed + options.seeds):
        for name in options.only:
            if not options.table and not folder.done(name, seed):
                row = run(CASES[name], seed, folder.settings)
                folder.write(name, seed, row)
                measures = ", ".join(f"{key} {value:.3g}" for key, value in row["measures"].items())
                text = f"gap {gap(row):.3f}, error {error(row):.3f}, ESS/N {row['ess_fraction']:.3f}"
                print(f"{name} {seed}: {text}, {row['cpu']:.0f} CPU s {measures}", flush=True)
    found = {name: rows for name in CASES if name in options.only and (rows := folder.read(name))}
    if found:
        folder.publish(show(found), lambda path: draw(found, path))


if __name__ == "__main__":
    main()
