"""Figures of particle systems: energies, pair distances and radial distribution functions, over a reference.

Every sampler is drawn with its own weights, the reference is filled in grey behind it and sets the range of the axes;
what a sampler has outside of that range is stated in the legend, where a histogram would hide it. As in
:mod:`diffsampler.plotting`, figures belong to nobody and Matplotlib is imported on first use.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from diffsampler import metrics
from diffsampler.plotting import COLORS, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["Curve", "energies", "pair_distances", "radial_distributions"]

GREY = "#BBBBBB"

Weighted = tuple[Tensor, Tensor | None]
"""Samples and their log weights, None for equal ones."""


class Curve(NamedTuple):
    """An exact density to draw over the histograms."""

    x: Tensor
    density: Tensor
    label: str = "exact"


def energies(
    results: Mapping[str, Weighted], *, reference: str | None = None, bins: int = 60, title: str = ""
) -> Figure:
    """Histograms of the energy, each with its own weights.

    Arguments:
        results: For each sampler the energies ``(N,)`` of its samples and their log weights, or None.
        reference: Name of the reference among them.
        bins: Largest number of bins; few draws get fewer, twice the cube root of the smallest number of them.
        title: Heading of the figure.

    Raises:
        ValueError: If there are no results, the reference is not among them, or one has no finite energy.
    """
    with styled(5.0, 3.2, 1, 1) as (figure, axes):
        checked = _checked(results, reference)
        few = min(len(values) for values, _ in checked.values())
        _histograms(axes[0][0], checked, reference, max(10, min(bins, round(2.0 * few ** (1.0 / 3.0)))))
        axes[0][0].set(xlabel="energy [kT]", ylabel="density", title=title)
    return figure


def pair_distances(
    results: Mapping[str, Weighted],
    *,
    n: int,
    box: float | None = None,
    reference: str | None = None,
    exact: Curve | None = None,
    bins: int = 80,
    title: str = "",
) -> Figure:
    """Histograms of the distances of all pairs, pooled, each with its own weights.

    Arguments:
        results: For each sampler its configurations ``(N, n * d)`` and their log weights, or None.
        n: Number of particles.
        box: Side of a cubic periodic box, None for open space.
        reference: Name of the reference among the results.
        exact: The exact density, where it is known.
        bins: Number of bins.
        title: Heading of the figure.
    """
    pooled: dict[str, Weighted] = {}
    for label, (x, log_weight) in _checked(results, reference).items():
        distances = metrics.pair_distances(x.detach().double(), n=n, box=box)
        spread = None if log_weight is None else log_weight.unsqueeze(-1).expand_as(distances).flatten()
        pooled[label] = (distances.flatten(), spread)
    with styled(5.0, 3.2, 1, 1) as (figure, axes):
        ax = axes[0][0]
        _histograms(ax, pooled, reference, bins)
        if exact is not None:
            low, high = ax.get_xlim()
            inside = (exact.x >= low) & (exact.x <= high)
            ax.plot(
                exact.x[inside].cpu(), exact.density[inside].cpu(), color="#222222", linewidth=1.0, label=exact.label
            )
            ax.legend()
        ax.set(xlabel="distance of a pair", ylabel="density", title=title)
    return figure


def radial_distributions(
    results: Mapping[str, Weighted],
    *,
    n: int,
    box: float | None = None,
    cutoff: float | None = None,
    reference: str | None = None,
    bins: int = 100,
    title: str = "",
) -> Figure:
    """Radial distribution functions, each with its own weights; see :func:`diffsampler.metrics.radial_distribution`.

    Arguments:
        results: For each sampler its configurations ``(N, n * d)`` and their log weights, or None.
        n: Number of particles.
        box: Side of a cubic periodic box, None for open space.
        cutoff: Largest distance; by default half the box, or the largest distance of the reference.
        reference: Name of the reference among the results.
        bins: Number of bins.
        title: Heading of the figure.
    """
    table = _checked(results, reference)
    if cutoff is None and box is None:
        first = table[reference if reference is not None else next(iter(table))][0]
        cutoff = float(metrics.pair_distances(first.detach().double(), n=n).max())
    with styled(5.0, 3.2, 1, 1) as (figure, axes):
        ax, colors = axes[0][0], iter(COLORS * len(table))
        for label, (x, log_weight) in table.items():
            counts = metrics.radial_distribution(x, n=n, bins=bins, cutoff=cutoff, box=box, log_weight=log_weight)
            r, g = counts.distance.cpu(), counts.radial.cpu()
            if label == reference:
                ax.fill_between(r, g, color=GREY, alpha=0.55, linewidth=0.0, label=label, zorder=0)
            else:
                ax.plot(r, g, color=next(colors), linewidth=1.4, label=label)
        if box is not None:
            ax.axhline(1.0, color="#999999", linewidth=0.8, linestyle=(0, (4, 3)))
        ax.set(
            xlabel="distance of a pair", xlim=(0.0, cutoff if cutoff is not None else 0.5 * (box or 0.0)), title=title
        )
        ax.set_ylabel("number density around a particle" if box is None else "g(r)")
        ax.set_ylim(bottom=0.0)
        ax.legend()
    return figure


def _checked(results: Mapping[str, Weighted], reference: str | None) -> Mapping[str, Weighted]:
    if not results:
        raise ValueError("Expected at least one sampler's results; got none.")
    if reference is not None and reference not in results:
        raise ValueError(f"Expected reference to be one of {', '.join(results)}; got {reference!r}.")
    return results


def _histograms(ax: Axes, results: Mapping[str, Weighted], reference: str | None, bins: int) -> None:
    """Weighted densities over one another, normalized by all of a sampler's mass, inside the range and outside."""
    table = {label: _finite(label, *entry) for label, entry in results.items()}
    ranges = [_range(*table[label]) for label in ([reference] if reference is not None else table)]
    low, high = min(r[0] for r in ranges), max(r[1] for r in ranges)
    width, colors = (high - low) / bins, iter(COLORS * len(table))
    for label, (values, share) in table.items():
        inside = (values >= low) & (values <= high)
        outside = 1.0 - float(share[inside].sum())
        name = label if outside < 0.01 else f"{label} ({outside:.0%} outside)"
        style: dict[str, Any] = {"histtype": "step", "linewidth": 1.4}
        if label == reference:
            style = {"histtype": "stepfilled", "alpha": 0.55, "color": GREY, "zorder": 0}
        else:
            style["color"] = next(colors)
        ax.hist(
            values[inside].numpy(),
            bins=bins,
            range=(low, high),
            weights=(share[inside] / width).numpy(),
            label=name,
            **style,
        )
    ax.set_xlim(low, high)
    ax.legend()


def _finite(label: str, values: Tensor, log_weight: Tensor | None) -> tuple[Tensor, Tensor]:
    """Finite values and their shares; energies of lost particles are left out as a histogram must."""
    if values.ndim != 1 or (log_weight is not None and log_weight.shape != values.shape):
        shapes = f"{tuple(values.shape)} and {None if log_weight is None else tuple(log_weight.shape)}"
        raise ValueError(f"Expected values of shape (N,) with as many log weights for {label!r}; got {shapes}.")
    share = (
        torch.ones_like(values, dtype=torch.float64) if log_weight is None else torch.softmax(log_weight.double(), 0)
    )
    values, share = values.detach().double().cpu(), share.detach().cpu()
    keep = torch.isfinite(values) & (share > 0.0)
    if not bool(keep.any()):
        raise ValueError(f"Expected at least one finite value with positive weight for {label!r}; got none.")
    return values[keep], share[keep] / share[keep].sum()


def _range(values: Tensor, share: Tensor) -> tuple[float, float]:
    """Range of all but the last thousandth of the mass on each side, with a margin."""
    ordered, order = values.sort()
    below = share[order].cumsum(0)
    ends = torch.searchsorted(below, below.new_tensor([0.001, 0.999])).clamp_max(len(ordered) - 1)
    low, high = ordered[ends].tolist()
    margin = 0.05 * (high - low) if high > low else max(1e-3 * abs(low), 1e-3)
    return low - margin, high + margin
