"""Table and figure of the benchmark against NUTS."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

from diffsampler._report import number, table

Row = dict[str, Any]
EVALUATIONS = 500_000.0
SECONDS = 2.0
ACCURACY = 0.1
UNMIXED = 1.05
OWN = ("ChEES", "NUTS", "SMC", "parallel tempering", "ensemble score")
PEERS = ("Pyro NUTS", "NumPyro NUTS", "BlackJAX NUTS", "BlackJAX ChEES", "BlackJAX SMC")
SAMPLERS = (*OWN, *PEERS)
# One colour for a kind of sampler; the library's are solid lines.
STYLES: dict[str, tuple[str, str, str]] = {
    "ChEES": ("tab:blue", "-", "o"),
    "BlackJAX ChEES": ("tab:blue", "--", "x"),
    "NUTS": ("tab:orange", "-", "o"),
    "BlackJAX NUTS": ("tab:orange", "--", "x"),
    "NumPyro NUTS": ("tab:orange", ":", "+"),
    "Pyro NUTS": ("tab:orange", "", "*"),
    "SMC": ("tab:green", "-", "o"),
    "BlackJAX SMC": ("tab:green", "--", "x"),
    "parallel tempering": ("tab:red", "-", "o"),
    "ensemble score": ("tab:purple", "-", "o"),
}
HEADER = (
    "target",
    "sampler",
    "CPU s",
    "compile",
    "evals",
    "ESS",
    "ESS/s",
    "ESS/1e3",
    "R-hat",
    "waste",
    "log Z",
    "s to .1",
    "evals to .1",
    *(f"{what} at {where}" for where in ("0.5M", "2 s") for what in ("mean", "TV", "log Z")),
)
NOTES = (
    "All with warm-up and tuning, without compilation. Evaluations of a batch count every chain, also those that wait.",
    "ESS: ArviZ bulk, the smallest coordinate; with ~ from the spread of independent blocks, the median coordinate.",
    "(ESS): R-hat above 1.05; such chains sit in the modes, or away from the neck, where they started.",
    "mean: worst error of a mean in standard deviations; TV: of the weights of modes (many wells: of the worst well).",
    "log Z: absolute error at the end.",
    "s to .1: CPU seconds after which the errors of means and TV stay below .1; > where they do not.",
    "At 0.5M evaluations and at 2 CPU s: errors of the last result that fits in; - for none, or not known.",
    "Pyro: one chain of 100 + 100 steps, whose rates are extrapolated.",
)


def fitting(curve: list[dict[str, float]], key: str, budget: float) -> dict[str, float]:
    """Last point of a curve within a budget, an empty one if there is none."""
    return next((point for point in reversed(curve) if point[key] <= budget), {})


def worst(point: dict[str, float]) -> float:
    """The error of means or of mode weights: on a symmetric target chains in few modes may have the right mean."""
    return max(point["mean"], point.get("tv", 0.0))


def reached(curve: list[dict[str, float]], key: str) -> float:
    """Work after which errors stay below the accuracy; infinite if they do not."""
    found = math.inf
    for point in reversed(curve):
        if not worst(point) < ACCURACY:
            break
        found = point[key]
    return found


def summary(rows: list[Row]) -> dict[str, float]:
    """Medians over seeds."""

    def middle(values: list[float | None]) -> float:
        known = [v for v in values if v is not None and not math.isnan(v)]
        return statistics.median(known) if known else math.nan

    result = {
        "seconds": middle([row["seconds"] for row in rows]),
        "compile": middle([row["compile_seconds"] for row in rows]),
        "evaluations": middle([row["evaluations"] for row in rows]),
        "ess": middle([row["ess"] for row in rows]),
        "ess_per_second": middle([row["ess"] / row["seconds"] for row in rows]),
        "ess_per_1000": middle([1000.0 * row["ess"] / row["evaluations"] for row in rows]),
        "rhat": middle([row["rhat"] for row in rows]),
        "waste": middle([row.get("waste") for row in rows]),
        "log_z": middle([row["curve"][-1].get("log_z") for row in rows]),
        "seconds_to": middle([reached(row["curve"], "seconds") for row in rows]),
        "evaluations_to": middle([reached(row["curve"], "evaluations") for row in rows]),
    }
    for where, key, budget in (("evaluations", "evaluations", EVALUATIONS), ("seconds", "seconds", SECONDS)):
        for what in ("mean", "tv", "log_z"):
            result[f"{what}_{where}"] = middle([fitting(row["curve"], key, budget).get(what) for row in rows])
    return result


def until(value: float, total: float, form: str) -> str:
    return f">{total:{form}}" if math.isinf(value) else number(value, form)


def line(target: str, sampler: str, rows: list[Row]) -> list[str]:
    found = summary(rows)
    form = "~{}" if rows[0].get("by_spread") else "({})" if found["rhat"] > UNMIXED else "{}"
    cells = [
        target,
        sampler,
        number(found["seconds"], ".2f"),
        number(found["compile"], ".1f"),
        number(found["evaluations"], ".2g"),
        form.format(number(found["ess"], ".0f")),
        form.format(number(found["ess_per_second"], ".0f")),
        form.format(number(found["ess_per_1000"], ".2f")),
        number(found["rhat"], ".2f"),
        number(found["waste"], ".2f"),
        number(found["log_z"], ".3f"),
        until(found["seconds_to"], found["seconds"], ".2f"),
        until(found["evaluations_to"], found["evaluations"], ".2g"),
    ]
    for where in ("evaluations", "seconds"):
        cells += [number(found[f"{what}_{where}"], ".3f") for what in ("mean", "tv", "log_z")]
    return cells


def grouped(rows: list[Row]) -> dict[str, dict[str, list[Row]]]:
    """Targets in order of appearance, samplers in the order of the table."""
    targets = list(dict.fromkeys(row["target"] for row in rows))
    found: dict[str, dict[str, list[Row]]] = {}
    for target in targets:
        mine = [row for row in rows if row["target"] == target]
        present = {s: [row for row in mine if row["sampler"] == s] for s in SAMPLERS}
        found[target] = {s: chosen for s, chosen in present.items() if chosen}
    return found


def absent(groups: dict[str, dict[str, list[Row]]]) -> list[str]:
    """Rows that the table lacks are said."""
    lines = []
    for target, samplers in groups.items():
        missing = [s for s in SAMPLERS if s not in samplers]
        if missing:
            lines.append(f"not run on {target}: {', '.join(missing)}")
    return lines


def draw(groups: dict[str, dict[str, list[Row]]], path: Path) -> None:
    """Error of means against evaluations (above) and CPU seconds (below), a column for each target."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import NullFormatter

    columns = min(5, len(groups))
    blocks = math.ceil(len(groups) / columns)
    legend = 0.25 * math.ceil(len(SAMPLERS) / min(5, 2 * columns)) + 0.2
    size = (3.6 * columns, 5.2 * blocks + legend)
    figure, axes = pyplot.subplots(2 * blocks, columns, figsize=size, squeeze=False, sharey=True)
    handles: dict[str, Any] = {}
    for axis in axes.flat:
        axis.set_visible(False)
    for index, (target, samplers) in enumerate(groups.items()):
        block, column = divmod(index, columns)
        for offset, (key, budget, label) in enumerate(
            (("evaluations", EVALUATIONS, "evaluations"), ("seconds", SECONDS, "CPU seconds"))
        ):
            axis = axes[2 * block + offset, column]
            axis.set_visible(True)
            axis.axvline(budget, color="0.8", linewidth=1.0)
            axis.axhline(ACCURACY, color="0.8", linewidth=1.0)
            for sampler, rows in samplers.items():
                color, dashes, marker = STYLES[sampler]
                style = {"color": color, "linestyle": dashes, "marker": marker, "markersize": 4.0, "linewidth": 1.3}
                for row in rows:
                    curve = row["curve"]
                    (handles[sampler],) = axis.plot([p[key] for p in curve], [worst(p) for p in curve], **style)
            axis.set(xscale="log", yscale="log", xlabel=label, ylim=(3e-3, 5.0))
            # Less than a decade would be labelled at every step, one label over the other.
            axis.xaxis.set_minor_formatter(NullFormatter())
            if offset == 0:
                axis.set_title(target)
            if column == 0:
                axis.set_ylabel("worst error of mean / sd, TV")
    order = [s for s in SAMPLERS if s in handles]
    figure.legend([handles[s] for s in order], order, loc="lower center", ncols=min(5, 2 * columns), frameon=False)
    figure.tight_layout(rect=(0.0, legend / size[1], 1.0, 1.0))
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def report(rows: list[Row], out: Path) -> None:
    """Print and write the table, and draw the figure."""
    if not rows:
        raise SystemExit(f"{out} holds no cells.")
    groups = grouped(rows)
    lines = [line(target, s, chosen) for target, samplers in groups.items() for s, chosen in samplers.items()]
    text = "\n".join([table(HEADER, lines), "", *NOTES, *absent(groups)])
    print(text)
    (out / "table.txt").write_text(text + "\n")
    draw(groups, out / "figure.png")
