"""`ds.sample(target)` and nothing else, on all targets and several seeds: errors, coverage, cost and findings.

Every run is one JSON file; runs that exist are not made again, so that an interrupted table goes on where it was. The
table is printed and drawn. CPU seconds are of one thread and hold everything: search, pilot and learned process.

    OMP_NUM_THREADS=1 python experiments/auto_table.py                            # all targets, seeds 0 to 9: hours
    OMP_NUM_THREADS=1 python experiments/auto_table.py --only gmm9 funnel --seeds 3
    OMP_NUM_THREADS=1 python experiments/auto_table.py --table                    # of what is there, no new runs
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from table_cases import CASES, Case, Folder

import diffsampler as ds
from diffsampler._report import table

Row = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """What all runs have in common; the defaults are those of the library.

    Arguments:
        num_samples: Draws at least.
        seconds: Budget, or None.
        evaluations: Budget, or None.
    """

    num_samples: int = 4000
    seconds: float | None = None
    evaluations: int | None = None


def run(case: Case, seed: int, settings: Settings) -> Row:
    target = case.build()
    budget = ds.Budget(seconds=settings.seconds, evaluations=settings.evaluations)
    wall, cpu = time.monotonic(), time.process_time()
    try:
        fit = ds.sample(target, num_samples=settings.num_samples, seed=seed, budget=budget)
    except ValueError as error:
        return {"refused": str(error), "cpu": time.process_time() - cpu, "seconds": time.monotonic() - wall}
    row: Row = {
        "refused": None,
        "cpu": time.process_time() - cpu,
        "seconds": time.monotonic() - wall,
        "evaluations": fit.evaluations,
        "method": fit.method,
        "log_normalizer": list(fit.log_normalizer),
        "exact": target.log_normalizer,
        "ess_fraction": fit.ess / len(fit.particles),
        "pareto_k": fit.pareto_k,
        "replicates": fit.particles.replicates,
        "findings": [str(finding) for finding in fit.findings],
        "notes": fit.notes,
        "measures": case.measure(target, fit.particles),
        "choices": fit.choices,
    }
    return row


def error(row: Row) -> float | None:
    """Error of log Z; None if the run was refused or the truth is not known."""
    if row["refused"] is not None or row["exact"] is None:
        return None
    return row["log_normalizer"][0] - row["exact"]


def score(row: Row) -> float:
    """The error in units of the standard error that the run itself states."""
    found = error(row)
    assert found is not None
    return found / max(row["log_normalizer"][1], 1e-12)


def covered(row: Row) -> bool:
    """Whether the 95 % interval holds the truth: Student's for the islands of a pilot, else the normal one."""
    degrees = row["replicates"] - 1
    quantile = 2.131 if degrees == 15 else 1.96
    return abs(score(row)) <= quantile


OUTCOMES = {
    "answered, no findings": {"marker": "o", "color": "#2a6f97", "s": 20},
    "flagged by a finding, or refused": {"marker": "X", "color": "#d1495b", "s": 42},
    "improper density, refused or flagged as it must be": {"marker": "s", "color": "#6a994e", "s": 26},
    "improper density, not noticed": {"marker": "D", "color": "black", "s": 42},
}


def outcome(row: Row) -> str:
    plain, caught, improper, missed = OUTCOMES
    if CASES[row["case"]].improper:
        return improper if flagged(row) else missed
    return caught if flagged(row) else plain


def flagged(row: Row) -> bool:
    return row["refused"] is not None or bool(row["findings"])


HEADER = ("target", "runs", "abs error", "worst", "in s.e.", "95 %", "checks, worst", "learned", "CPU s", "1e6 eval.")


def summary(name: str, rows: list[Row]) -> tuple[str, ...]:
    """One line of the table; errors as median and worst, each check at its worst."""
    known = [row for row in rows if error(row) is not None]
    sizes = [abs(error(row) or 0.0) for row in known]
    answered = [row for row in rows if row["refused"] is None]
    checks = []
    for check in sorted({check for row in answered for check in row["measures"]}):
        values = [row["measures"][check] for row in answered]
        centre = 1.0 if check.endswith("ratio") else 0.0
        checks.append(f"{check} {max(values, key=lambda value: abs(value - centre)):.3g}")
    return (
        name,
        str(len(rows)),
        f"{statistics.median(sizes):.4f}" if known else "-",
        f"{max(sizes):.4f}" if known else "-",
        f"{math.sqrt(statistics.fmean(score(row) ** 2 for row in known)):.2f}" if known else "-",
        f"{sum(map(covered, known))}/{len(known)}" if known else "-",
        ", ".join(checks) or "-",
        f"{sum('learned' in row['method'] for row in answered)}/{len(answered)}" if answered else "-",
        f"{statistics.fmean(row['cpu'] for row in rows):.1f}",
        f"{statistics.fmean(row['evaluations'] for row in answered) / 1e6:.2f}" if answered else "-",
        f"{sum(map(flagged, rows))}/{len(rows)}",
    )


def show(found: dict[str, list[Row]]) -> str:
    lines = [table((*HEADER, "flagged"), [summary(name, rows) for name, rows in found.items()]), ""]
    for name, rows in found.items():
        texts = Counter(text for row in rows for text in ([row["refused"]] if row["refused"] else row["findings"]))
        lines += [f"{name}: {count} x {text}" for text, count in texts.most_common(4)]
    return "\n".join(lines)


def draw(found: dict[str, list[Row]], path: Path) -> None:
    """One line of dots per target, one dot per seed: error over standard error, error, and cost."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(found)[::-1]
    figure, panels = pyplot.subplots(
        1, 3, figsize=(13.0, 1.9 + 0.34 * len(names)), sharey=True, layout="constrained", width_ratios=(5, 4, 4)
    )
    limit, floor, cheapest = 5.0, 1e-5, 0.05
    for height, name in enumerate(names):
        rows = found[name]
        for index, row in enumerate(rows):
            y = height + (0.5 * (index + 0.5) / len(rows) - 0.25)
            style = OUTCOMES[outcome(row)]
            panels[2].scatter(max(cheapest, row["cpu"]), y, **style)
            if error(row) is None:
                continue
            z = score(row)
            outside = {"marker": ">" if z > 0.0 else "<"} if abs(z) > limit else {}
            panels[0].scatter(max(-limit, min(limit, z)), y, **{**style, **outside}, clip_on=False)
            panels[1].scatter(max(floor, abs(error(row) or 0.0)), y, **style)
        if not any(error(row) is not None for row in rows):
            caught = f"{sum(map(flagged, rows))} of {len(rows)} runs"
            text = f"improper: refused or flagged in {caught}" if CASES[name].improper else "no exact log Z known"
            for panel in panels[:2]:
                panel.text(
                    0.5,
                    height,
                    text,
                    transform=panel.get_yaxis_transform(),
                    ha="center",
                    va="center",
                    size=9,
                    bbox={"color": "white", "pad": 1.0},
                )
    panels[0].axvspan(-1.96, 1.96, color="#2a6f97", alpha=0.12, lw=0)
    panels[0].axvline(0.0, color="0.4", lw=0.8)
    panels[0].set(xlim=(-limit, limit), xlabel="(log Z - exact) / its standard error\n(band: where 95 % should be)")
    panels[1].axvline(0.05, color="0.4", lw=0.8, ls="--")
    panels[1].set(
        xscale="log", xlim=(0.7 * floor, None), xlabel="|log Z - exact|, nats\n(dashed: 0.05, the most that is wanted)"
    )
    panels[2].set(
        xscale="log", xlim=(0.8 * cheapest, None), xlabel="CPU seconds of one thread\n(0.05 or less at the left edge)"
    )
    panels[0].set_yticks(range(len(names)), names)
    panels[0].set_ylim(-0.6, len(names) - 0.4)
    for panel in panels:
        panel.grid(axis="x", alpha=0.3)
        panel.set_axisbelow(True)
        for height in range(len(names) - 1):
            panel.axhline(height + 0.5, color="0.9", lw=0.8)
    present = {outcome(row) for rows in found.values() for row in rows}
    for label, style in OUTCOMES.items():
        if label in present:
            panels[2].scatter([], [], label=label, **style)
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    figure.suptitle(
        "ds.sample(target) without any options, one mark per seed (triangles: further out than the axis)",
        x=0.01,
        ha="left",
    )
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=list(CASES), choices=list(CASES), metavar="TARGET")
    parser.add_argument("--seeds", type=int, default=10, help="number of seeds")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--num-samples", type=int, default=Settings.num_samples)
    parser.add_argument("--seconds", type=float, default=None, help="budget of a run")
    parser.add_argument("--evaluations", type=int, default=None, help="budget of a run")
    parser.add_argument("--table", action="store_true", help="make no new runs")
    parser.add_argument("--out", type=Path, default=Path("results/auto"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    settings = Settings(options.num_samples, options.seconds, options.evaluations)
    folder = Folder(options.out, settings)
    # Seed by seed: an interrupted table has all targets with fewer seeds.
    for seed in range(options.first_seed, options.first_seed + options.seeds):
        for name in options.only:
            if not options.table and not folder.done(name, seed):
                row = run(CASES[name], seed, settings)
                folder.write(name, seed, row)
                print(f"{name} {seed}: {row['cpu']:.1f} CPU s{', flagged' if flagged(row) else ''}", flush=True)
    found = {name: rows for name in options.only if (rows := folder.read(name))}
    if found:
        folder.publish(show(found), lambda path: draw(found, path))


if __name__ == "__main__":
    main()
