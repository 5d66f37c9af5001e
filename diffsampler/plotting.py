"""Figures of weighted particles, of their weights, and of training.

Every function returns a :class:`matplotlib.figure.Figure` that belongs to nobody: no pyplot, no global state, nothing
is shown. A notebook displays it; in a script ``figure.savefig(path)`` writes it. Matplotlib is imported on first use.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from diffsampler import estimators

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["comparison", "marginals", "pair", "styled", "training", "weights"]

Limits = tuple[float, float]

# Okabe and Ito's palette, which stays distinct under colour blindness.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#4D4D4D")
STYLE: dict[Any, Any] = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#555555",
    "axes.labelcolor": "#222222",
    "axes.titlesize": 10,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "xtick.color": "#555555",
    "ytick.color": "#555555",
    "legend.fontsize": 8,
    "legend.frameon": False,
    "font.size": 9,
    "savefig.dpi": 130,
    "axes.formatter.useoffset": False,
}


@contextmanager
def styled(width: float, height: float, rows: int, columns: int, pad: float = 0.04) -> Iterator[tuple[Figure, Any]]:
    """A figure with ``(rows, columns)`` axes in the library's style, which ends with the block."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(w_pad=pad))
        yield figure, figure.subplots(rows, columns, squeeze=False)


def pair(
    posterior: Mapping[str, Tensor],
    log_weight: Tensor,
    *,
    names: Sequence[str] | None = None,
    max_dims: int = 5,
    truth: Mapping[str, Tensor | float] | None = None,
    bins: int = 64,
) -> Figure:
    """Weighted pair plot: marginals on the diagonal, pairs below it.

    Weights enter the histograms themselves; nothing is resampled. Shades of a pair are regions that hold 30, 60, 90
    and 99 percent of its mass.

    Arguments:
        posterior: Draws by name, each of shape ``(n, *event)``; every scalar entry becomes one coordinate.
        log_weight: Log weights, shape ``(n,)``.
        names: Names to show, all by default, in this order. Single entries are chosen as ``"theta[3]"``.
        max_dims: Coordinates to show at most.
        truth: Reference values by name, each of shape ``event``, drawn as lines.
        bins: Bins per axis of a pair.

    Raises:
        ValueError: If a name is unknown, or nothing finite is left to show.
    """
    columns = _columns(posterior, names)
    shown = dict(list(columns.items())[:max_dims])
    weight = torch.softmax(log_weight.detach().double().cpu(), 0)
    keep = (weight > 0) & torch.stack([torch.isfinite(values) for values in columns.values()]).all(0)
    if not bool(keep.any()):
        raise ValueError("Expected at least one finite draw with positive weight; got none.")
    weight = weight[keep] / weight[keep].sum()
    draws = {name: values[keep] for name, values in shown.items()}
    limits = {name: _limits(values, weight) for name, values in draws.items()}
    lines = _columns({k: torch.as_tensor(v).unsqueeze(0) for k, v in truth.items()}, None) if truth else {}
    size = len(draws)
    side = max(1.9 * size, 4.8)
    with styled(side, side, size, size) as (figure, axes):
        for i, (row, y) in enumerate(draws.items()):
            for j, (column, x) in enumerate(draws.items()):
                ax = axes[i][j]
                if j > i:
                    ax.set_axis_off()
                    continue
                if i == j:
                    _marginal(ax, x, weight, limits[row], color=COLORS[0], fill=True)
                else:
                    _density(ax, x, y, weight, (limits[column], limits[row]), bins)
                if column in lines:
                    ax.axvline(float(lines[column]), color=COLORS[1], linewidth=1.0)
                if row in lines and i != j:
                    ax.axhline(float(lines[row]), color=COLORS[1], linewidth=1.0)
                _label(ax, column if i == size - 1 else "", row if j == 0 and i > 0 else "")
        if len(columns) > size:
            caption = f"{size} of {len(columns)} coordinates"
            axes[0][-1].text(1.0, 1.0, caption, transform=axes[0][-1].transAxes, ha="right", va="top", color="#555555")
    return figure


def weights(log_weight: Tensor, *, title: str = "") -> Figure:
    """Histogram of the log weights and the share of the total that the largest of them carry.

    Arguments:
        log_weight: Log weights, shape ``(n,)``; non-finite ones are counted and left out.
        title: Heading of the figure.

    Raises:
        ValueError: If no weight is finite.
    """
    log_weight = log_weight.detach().double().cpu()
    finite = log_weight[torch.isfinite(log_weight)]
    if finite.numel() == 0:
        raise ValueError("Expected at least one finite log weight; got none.")
    n, lost = log_weight.numel(), log_weight.numel() - finite.numel()
    log_z = float(torch.logsumexp(finite, 0)) - math.log(n)
    share = torch.softmax(finite, 0).sort(descending=True).values.cumsum(0)
    rank = torch.arange(1, finite.numel() + 1, dtype=torch.float64) / n
    ess, k = estimators.effective_sample_size(finite), estimators.pareto_smooth(finite)[1]
    with styled(8.0, 3.3, 1, 2) as (figure, axes):
        left, right = axes[0]
        low, high = float(torch.quantile(finite[:1_000_000], 0.002)), float(finite.max())
        span = max(high - low, 1e-3)
        inside = finite.clamp_min(low - 0.05 * span)
        left.hist(inside.numpy() - log_z, bins=50, color=COLORS[0], alpha=0.85)
        left.axvline(0.0, color=COLORS[1], linewidth=1.2)
        left.text(0.0, 1.0, " log Z", transform=left.get_xaxis_transform(), va="top", color=COLORS[1])
        left.set(xlabel="log weight - log Z", ylabel="particles")
        right.plot(rank, share, color=COLORS[0], linewidth=1.8)
        right.plot([0, 1], [0, 1], color="#999999", linewidth=1.0, linestyle=(0, (4, 3)), label="equal weights")
        right.set(xlim=(0, 1), ylim=(0, 1.02), ylabel="share of the total weight")
        right.set_xlabel("fraction of particles, largest weights first")
        text = f"n = {n}\nESS = {ess:.0f} ({ess / n:.0%})\nk-hat = {k:.2f}" + f"\nnon-finite: {lost}" * bool(lost)
        right.text(0.97, 0.08, text, transform=right.transAxes, ha="right", va="bottom", linespacing=1.5)
        right.legend(loc="lower right", bbox_to_anchor=(1.0, 0.42))
        if title:
            figure.suptitle(title)
    return figure


TRAINING_PANELS = {"loss": "loss", "elbo": "ELBO", "log_normalizer": "log Z", "ess": "ESS"}


def training(history: Sequence[Mapping[str, float]], *, log_normalizer: float | None = None) -> Figure:
    """Loss, ELBO, log Z and ESS against the training step, with evaluations of the target on the upper axis.

    Arguments:
        history: Rows with the key ``step`` and any of ``loss``, ``elbo``, ``log_normalizer``, ``ess``, and
            ``evaluations``; a missing or non-finite value leaves a gap.
        log_normalizer: Exact log normalizer, drawn as a line where it is known.

    Raises:
        ValueError: If the history is empty.
    """
    from matplotlib.ticker import MaxNLocator

    if not history:
        raise ValueError("Expected at least one row of training history; got none.")
    panels = [key for key in TRAINING_PANELS if any(math.isfinite(_number(row.get(key))) for row in history)] or [
        "loss"
    ]
    columns = min(len(panels), 2)
    rows = math.ceil(len(panels) / columns)
    with styled(4.2 * columns, 2.7 * rows + 0.3, rows, columns) as (figure, axes):
        for ax, key in zip(axes.flat, panels, strict=False):
            points = [(row["step"], _number(row.get(key))) for row in history if row.get(key) is not None]
            steps, values = zip(*points, strict=True) if points else ((), ())
            ax.plot(steps, values, color=COLORS[0], linewidth=1.1, marker="." if len(points) < 40 else "")
            ax.set(xlabel="step", ylabel=TRAINING_PANELS[key])
            ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
            exact = [log_normalizer] if log_normalizer is not None and key in ("elbo", "log_normalizer") else []
            _robust_range(ax, [v for v in values if math.isfinite(v)], exact)
            if exact:
                ax.axhline(exact[0], color=COLORS[1], linewidth=1.0, linestyle=(0, (4, 3)), label="exact log Z")
                ax.legend(loc="lower right")
        for ax in list(axes.flat)[len(panels) :]:
            ax.set_axis_off()
        for ax in axes[0][: len(panels)]:
            _evaluations_axis(ax, history)
    return figure


def comparison(rows: Sequence[Mapping[str, Any]], *, title: str = "", floor: float = 1e-3) -> Figure:
    """Error of log Z per target and method, on a logarithmic axis, with each method's own standard error.

    Arguments:
        rows: One mapping per result with the keys ``target``, ``method``, ``error`` (of log Z, of any sign) and, where
            known, ``std_error``. A missing or non-finite error is shown as such.
        title: Heading of the figure.
        floor: Smallest error that the axis shows.

    Raises:
        ValueError: If there are no rows.
    """
    if not rows:
        raise ValueError("Expected at least one row to compare; got none.")
    targets = list(dict.fromkeys(row["target"] for row in rows))
    methods = list(dict.fromkeys(row["method"] for row in rows))
    width, highest = 0.8 / len(methods), floor
    with styled(max(1.4 * len(targets) * len(methods) ** 0.5, 5.0), 3.4, 1, 1) as (figure, axes):
        ax = axes[0][0]
        for row in rows:
            m = methods.index(row["method"])
            x = targets.index(row["target"]) + (m - (len(methods) - 1) / 2) * width
            error, spread = abs(_number(row.get("error"))), _number(row.get("std_error"))
            top = floor
            if math.isfinite(error):
                top = max(error, floor)
                ax.bar(x, top - floor, 0.88 * width, bottom=floor, color=COLORS[m % len(COLORS)])
            if math.isfinite(spread) and spread > floor:
                ax.plot([x - 0.4 * width, x + 0.4 * width], [spread, spread], color="#222222", linewidth=1.4)
                top = max(top, spread)
            highest = max(highest, top)
            text = f"{error:.2g}" if math.isfinite(error) else "none"
            ax.annotate(text, (x, top), (0, 2), textcoords="offset points", ha="center", fontsize=7, color="#333333")
        for m, method in enumerate(methods):
            ax.bar(0, 0, color=COLORS[m % len(COLORS)], label=method)
        ax.plot([], [], color="#222222", linewidth=1.4, label="stated standard error")
        ax.set_xticks(range(len(targets)), targets)
        ax.tick_params(axis="x", length=0)
        ax.set(ylim=(floor, 2.5 * highest), yscale="log", ylabel="absolute error of log Z")
        ax.set_title(title)
        figure.legend(loc="outside right upper")
    return figure


def marginals(
    results: Mapping[str, tuple[Mapping[str, Tensor], Tensor]],
    *,
    names: Sequence[str] | None = None,
    max_dims: int = 6,
    columns: int = 3,
    reference: str | None = None,
    title: str = "",
) -> Figure:
    """Marginals of several samplers over one another, each drawn with its own weights.

    Arguments:
        results: For each sampler its draws by name, each of shape ``(n, *event)``, and its log weights ``(n,)``.
        names: Names to show, those of the first sampler by default, in this order.
        max_dims: Coordinates to show at most.
        columns: Panels per row.
        reference: The sampler to fill in grey behind the others, such as a long run; it sets the range of each axis.
        title: Heading of the figure.

    Raises:
        ValueError: If there are no results or a name is unknown.
    """
    if not results:
        raise ValueError("Expected at least one sampler's draws; got none.")
    table = {label: _columns(posterior, names) for label, (posterior, _) in results.items()}
    mass = {label: torch.softmax(w.detach().double().cpu(), 0) for label, (_, w) in results.items()}
    shown = list(next(iter(table.values())))[:max_dims]
    columns = min(columns, len(shown))
    rows = math.ceil(len(shown) / columns)
    with styled(3.1 * columns, 2.3 * rows + 0.5, rows, columns, pad=0.12) as (figure, axes):
        for ax, name in zip(axes.flat, shown, strict=False):
            # One sampler that strays must not squeeze the reference into a line.
            ranges = [_limits(table[m][name], mass[m]) for m in ([reference] if reference in table else table)]
            limits = min(low for low, _ in ranges), max(high for _, high in ranges)
            colors = iter(COLORS * len(table))
            for label in table:
                fill = label == reference
                color = "#BBBBBB" if fill else next(colors)
                _marginal(ax, table[label][name], mass[label], limits, color=color, fill=fill, label=label)
            _label(ax, name, "")
        for ax in list(axes.flat)[len(shown) :]:
            ax.set_axis_off()
        handles, labels = axes[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper right", ncols=len(labels))
        if title:
            figure.suptitle(title, x=0.01, ha="left", fontsize=10)
    return figure


def _columns(posterior: Mapping[str, Tensor], names: Sequence[str] | None) -> dict[str, Tensor]:
    """Scalar coordinates by name: ``theta`` of shape ``(n, 2)`` gives ``theta[0]`` and ``theta[1]``."""
    groups: dict[str, dict[str, Tensor]] = {}
    for name, values in posterior.items():
        flat = values.detach().double().cpu()
        index = [f"[{','.join(map(str, i))}]" if i else "" for i in itertools.product(*map(range, flat.shape[1:]))]
        entry = flat.reshape(len(flat), -1).unbind(1)
        groups[name] = {name + suffix: column for suffix, column in zip(index, entry, strict=True)}
    entries = {name: values for group in groups.values() for name, values in group.items()}
    shown: dict[str, Tensor] = {}
    for name in entries if names is None else names:
        if name not in groups and name not in entries:
            raise ValueError(f"Expected names among {', '.join(dict.fromkeys([*groups, *entries]))}; got {name!r}.")
        shown |= {name: entries[name]} if name in entries else groups[name]
    return shown


def _limits(values: Tensor, weight: Tensor) -> Limits:
    """Range that shows all but the last half percent of the mass on each side, with a margin."""
    ordered, order = values[torch.isfinite(values)].sort()
    cumulative = weight[torch.isfinite(values)][order].cumsum(0)
    levels = cumulative.new_tensor([0.005, 0.995]) * cumulative[-1]
    low, high = ordered[torch.searchsorted(cumulative, levels).clamp_max(len(ordered) - 1)].tolist()
    if high <= low:
        return low - max(abs(low) * 1e-3, 1e-3), high + max(abs(low) * 1e-3, 1e-3)
    # The margin stops at the outermost draw: a bounded parameter must not appear to cross its bound.
    margin, gap = 0.12 * (high - low), 0.02 * (high - low)
    return max(low - margin, float(ordered[0]) - gap), min(high + margin, float(ordered[-1]) + gap)


def _marginal(
    ax: Axes, values: Tensor, weight: Tensor, limits: Limits, *, color: str, fill: bool, label: str | None = None
) -> None:
    """Weighted histogram as a density; the number of bins follows the effective sample size."""
    finite = torch.isfinite(values)
    ess = estimators.effective_sample_size(weight[finite].clamp_min(1e-300).log())
    bins = int(min(max(3.0 * ess ** (1 / 3), 16), 60))
    kind: dict[str, Any] = {"histtype": "stepfilled", "alpha": 0.55} if fill else {"histtype": "step", "linewidth": 1.5}
    kind |= {"bins": bins, "range": limits, "density": True, "color": color, "label": label}
    ax.hist(values[finite].numpy(), weights=weight[finite].numpy(), **kind)
    ax.set_xlim(limits)
    ax.set_yticks([])
    ax.spines["left"].set_visible(False)


def _density(ax: Axes, x: Tensor, y: Tensor, weight: Tensor, limits: tuple[Limits, Limits], bins: int) -> None:
    """Shaded regions of highest density of a weighted, lightly smoothed two-dimensional histogram."""
    import numpy as np
    from matplotlib.colors import LinearSegmentedColormap
    from scipy.ndimage import gaussian_filter

    mass, *edges = np.histogram2d(x.numpy(), y.numpy(), bins=bins, range=limits, weights=weight.numpy())
    ess = estimators.effective_sample_size(weight.log())
    # A cell must hold several effective draws before its height means anything.
    mass = gaussian_filter(mass, min(max(0.9, 10.0 * ess ** (-1 / 4)), 4.0), mode="nearest")
    ordered = np.sort(mass, axis=None)[::-1]
    cumulative = np.cumsum(ordered) / ordered.sum()
    cuts = [ordered[min(int(np.searchsorted(cumulative, p)), ordered.size - 1)] for p in (0.99, 0.9, 0.6, 0.3)]
    levels = np.unique([*cuts, ordered[0] * (1 + 1e-9)])
    levels = levels[levels > 0]
    centre = [0.5 * (e[1:] + e[:-1]) for e in edges]
    colors = LinearSegmentedColormap.from_list("mass", ["#DCEAF5", COLORS[0], "#002B47"])
    if levels.size > 1:
        ax.contourf(*centre, mass.T, levels=levels, colors=[colors(v) for v in np.linspace(0, 1, levels.size - 1)])
    ax.set_xlim(limits[0])
    ax.set_ylim(limits[1])


def _label(ax: Axes, x: str, y: str) -> None:
    from matplotlib.ticker import MaxNLocator

    ax.xaxis.set_major_locator(MaxNLocator(4, prune="both"))
    if ax.get_yticks().size:
        ax.yaxis.set_major_locator(MaxNLocator(4, prune="both"))
    ax.set_xlabel(x)
    ax.set_ylabel(y)
    ax.tick_params(labelbottom=bool(x), labelleft=bool(y))


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)


def _robust_range(ax: Axes, values: list[float], exact: list[float]) -> None:
    """Let the converged part fill the panel: the first, huge losses must not flatten the rest."""
    later = torch.tensor([*values[len(values) // 10 :], *exact], dtype=torch.float64)
    if len(values) < 10:
        return
    low, high = torch.quantile(later, later.new_tensor([0.005, 0.995])).tolist()
    low, high = min([low, *exact]), max([high, *exact])
    if high > low:
        margin = 0.08 * (high - low)
        ax.set_ylim(low - margin, high + margin)


def _evaluations_axis(ax: Axes, history: Sequence[Mapping[str, float]]) -> None:
    """Upper axis with the evaluations of the target that each step had spent."""
    points = [(r["step"], r["evaluations"]) for r in history if r.get("evaluations") is not None]
    if len(points) < 2:
        return
    upper = ax.twiny()
    upper.spines["top"].set_visible(True)
    upper.set_xlim(ax.get_xlim())
    wanted = [points[round(f * (len(points) - 1))] for f in (0.0, 0.5, 1.0)]
    upper.set_xticks([step for step, _ in wanted], [f"{count:.2g}" for _, count in wanted])
    upper.set_xlabel("evaluations", fontsize=8)
