"""`ds.sample(model)` with its defaults on posteriors of posteriordb, against their reference draws.

Every run is one JSON file; runs that exist are not made again. Errors of means are in standard deviations of the
reference; errors of quantiles as well, and there the reference itself is uncertain by up to 0.05. "Stein" is a test of
the port and has nothing to do with sampling: the largest of the 2 d z-scores of Stein's identities under the reference
draws, usually below 3.

    OMP_NUM_THREADS=1 python experiments/posteriordb_table.py --data posteriordb          # a checkout, or plain files
    OMP_NUM_THREADS=1 python experiments/posteriordb_table.py --data posteriordb --only arK-arK --seeds 3
    OMP_NUM_THREADS=1 python experiments/posteriordb_table.py --data posteriordb --table  # no new runs
"""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from posteriordb_data import Reference, read_reference
from posteriordb_models import POSTERIORS, build, latents_of, parameters, stein
from table_cases import Folder
from torch import Tensor

import diffsampler as ds
from diffsampler._report import number, table

Row = dict[str, Any]
LEVELS = (0.05, 0.25, 0.5, 0.75, 0.95)
MEAN_LIMIT, RATIO_LIMIT, K_LIMIT = 0.1, 0.1, 0.7


@dataclass(frozen=True)
class Settings:
    """What all runs have in common; the defaults are those of the library."""

    num_samples: int = 4000


def quantiles(values: Tensor, log_weight: Tensor) -> Tensor:
    """Weighted quantiles ``(levels, k)`` of values ``(n, k)``."""
    order = values.argsort(0)
    weight = torch.softmax(log_weight.double(), 0)
    cumulative = weight[order].cumsum(0)
    levels = torch.tensor(LEVELS, dtype=torch.float64)
    index = torch.stack([torch.searchsorted(column.contiguous(), levels) for column in cumulative.mT], -1)
    return values.gather(0, order.gather(0, index.clamp_max(len(values) - 1)))


def compare(values: Tensor, log_weight: Tensor, reference: Reference) -> Row:
    """Errors of weighted draws ``(n, k)`` against the reference."""
    weight = torch.softmax(log_weight.double(), 0)
    mean = weight @ values
    sd = (weight @ (values - mean).square()).sqrt()
    true_mean, true_sd = torch.from_numpy(reference.mean), torch.from_numpy(reference.sd)
    errors = (mean - true_mean) / true_sd
    ratios = sd / true_sd
    expected = torch.from_numpy(np.quantile(reference.draws, LEVELS, axis=0))
    shifts = (quantiles(values, log_weight) - expected) / true_sd
    return {
        "names": reference.names,
        "mean_errors": errors.tolist(),
        "sd_ratios": ratios.tolist(),
        "quantile_errors": shifts.tolist(),
    }


def run(name: str, seed: int, folder: Path | None, settings: Settings) -> Row:
    reference = read_reference(name, folder)
    if reference is None:
        raise SystemExit(f"no reference draws of {name} in {folder}")
    target = build(name, folder)
    known = latents_of(name, reference)
    row: Row = {"dim": target.dim, "kind": POSTERIORS[name].kind, "prior": target.prior is not None}
    row["stein"] = None if known is None else stein(target, known)
    wall, cpu = time.monotonic(), time.process_time()
    try:
        fit = ds.sample(target, num_samples=settings.num_samples, seed=seed)
    except (ValueError, RuntimeError) as error:
        return {**row, "failed": f"{type(error).__name__}: {error}", "cpu": time.process_time() - cpu}
    row |= {"failed": None, "cpu": time.process_time() - cpu, "seconds": time.monotonic() - wall}
    row |= compare(parameters(target, fit.particles.x, reference.names), fit.particles.log_weight, reference)
    return row | {
        "method": fit.method,
        "evaluations": fit.evaluations,
        "log_normalizer": list(fit.log_normalizer),
        "ess": fit.ess,
        "num_particles": len(fit.particles),
        "pareto_k": fit.pareto_k,
        "findings": [str(finding) for finding in fit.findings],
        "notes": fit.notes,
        "choices": fit.choices,
    }


def worst(row: Row) -> tuple[float, float, float, float]:
    """Worst error of a mean, smallest and largest ratio of standard deviations, worst error of a quantile."""
    shifts = np.abs(np.array(row["quantile_errors"]))
    return max(map(abs, row["mean_errors"])), min(row["sd_ratios"]), max(row["sd_ratios"]), float(shifts.max())


def passed(row: Row) -> bool:
    if row["failed"]:
        return False
    mean, low, high, _ = worst(row)
    accurate = mean <= MEAN_LIMIT and low >= 1.0 - RATIO_LIMIT and high <= 1.0 + RATIO_LIMIT
    return accurate and row["pareto_k"] < K_LIMIT


HEADER = (
    "posterior", "d", "seed", "Stein", "mean err.", "sd ratios", "quantile err.", "k-hat", "ESS", "log Z", "+-",
    "method", "CPU s", "1e6 eval.", "findings", "passed",
)  # fmt: skip


def line(row: Row) -> tuple[str, ...]:
    first = (row["case"], str(row["dim"]), str(row["seed"]), number(row["stein"], ".1f"))
    if row["failed"]:
        return (*first, *["-"] * 8, f"{row['cpu']:.0f}", "-", row["failed"][:40], "no")
    mean, low, high, shift = worst(row)
    return (
        *first,
        f"{mean:.3f}",
        f"{low:.3f} to {high:.3f}",
        f"{shift:.3f}",
        f"{row['pareto_k']:.2f}" if math.isfinite(row["pareto_k"]) else "none",
        f"{row['ess']:.0f}",
        # With a flat prior the evidence is a number without a scale.
        f"{row['log_normalizer'][0]:.3f}" if row["prior"] else "-",
        f"{row['log_normalizer'][1]:.3f}" if row["prior"] else "-",
        row["method"],
        f"{row['cpu']:.0f}",
        f"{row['evaluations'] / 1e6:.2f}",
        str(len(row["findings"])),
        "yes" if passed(row) else "no",
    )


def show(found: dict[str, list[Row]]) -> str:
    rows = [row for group in found.values() for row in group]
    lines = [table(HEADER, [line(row) for row in rows]), ""]
    lines += [f"passed {sum(map(passed, rows))} of {len(rows)} runs", ""]
    for row in rows:
        said = [row["failed"]] if row["failed"] else row["findings"]
        lines += [f"{row['case']} seed {row['seed']}: {text}" for text in said]
    return "\n".join(lines)


def draw(found: dict[str, list[Row]], path: Path) -> None:
    """One line per posterior, one dot per parameter and seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(found)[::-1]
    figure, panels = pyplot.subplots(
        1, 3, figsize=(12.0, 1.6 + 0.32 * len(names)), sharey=True, layout="constrained", width_ratios=(4, 4, 3)
    )
    for height, name in enumerate(names):
        for row in found[name]:
            if row["failed"]:
                panels[0].text(0.0, height, "failed", ha="center", va="center", color="#d1495b")
                continue
            color = "#2a6f97" if passed(row) else "#d1495b"
            style = {"color": color, "s": 14, "alpha": 0.7, "lw": 0}
            for panel, values in ((panels[0], row["mean_errors"]), (panels[1], row["sd_ratios"])):
                panel.scatter(values, [height] * len(values), **style)
            panels[2].scatter(row["cpu"], height, **style)
    panels[0].axvspan(-MEAN_LIMIT, MEAN_LIMIT, color="#2a6f97", alpha=0.1, lw=0)
    panels[1].axvspan(1.0 - RATIO_LIMIT, 1.0 + RATIO_LIMIT, color="#2a6f97", alpha=0.1, lw=0)
    panels[0].set(xlabel="error of the mean / reference sd", xlim=(-0.2, 0.2))
    panels[1].set(xlabel="sd / reference sd", xlim=(0.8, 1.2))
    panels[2].set(xscale="log", xlabel="CPU seconds of one thread")
    panels[0].set_yticks(range(len(names)), [f"{name.partition('-')[2]} ({found[name][0]['kind']})" for name in names])
    for panel in panels:
        panel.grid(alpha=0.3)
        panel.set_axisbelow(True)
    figure.suptitle("Every parameter of every posterior against posteriordb (bands: what is wanted)", x=0.01, ha="left")
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="folders, searched in this order")
    parser.add_argument("--only", nargs="+", choices=list(POSTERIORS), metavar="POSTERIOR")
    parser.add_argument("--seeds", type=int, default=1, help="number of seeds")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--num-samples", type=int, default=Settings.num_samples)
    parser.add_argument("--table", action="store_true", help="make no new runs")
    parser.add_argument("--out", type=Path, default=Path("results/posteriordb"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    settings = Settings(options.num_samples)
    done = Folder(options.out, settings)
    names = options.only or list(POSTERIORS)
    for seed in range(options.first_seed, options.first_seed + options.seeds):
        for name in names:
            folder = next((path for path in options.data if read_reference(name, path) is not None), None)
            if options.table or done.done(name, seed) or folder is None:
                continue
            row = run(name, seed, folder, settings)
            done.write(name, seed, row)
            verdict = row["failed"] or ("passed" if passed(row) else "missed")
            print(f"{name} {seed}: {row['cpu']:.1f} CPU s, {verdict}", flush=True)
    found = {name: rows for name in names if (rows := done.read(name))}
    if found:
        done.publish(show(found), lambda path: draw(found, path))


if __name__ == "__main__":
    main()
