r"""Statistics of the distances between particles, which know neither frame nor labels."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from diffsampler.metrics.line import shares, total_variation, wasserstein_line

__all__ = ["PairCounts", "pair_distances", "pair_total_variation", "pair_wasserstein", "radial_distribution"]


class PairCounts(NamedTuple):
    """A histogram of pair distances and what it says about the structure."""

    distance: Tensor
    """Centres of the bins, shape ``(bins,)``."""
    density: Tensor
    """Probability density of the distance of a random pair, shape ``(bins,)``; integrates to the share inside."""
    radial: Tensor
    """Radial distribution function, shape ``(bins,)``."""


def pair_distances(x: Tensor, *, n: int, box: float | None = None) -> Tensor:
    """Distances of all pairs, ``(..., n * d) -> (..., n (n - 1) / 2)``.

    Arguments:
        x: Positions, particle after particle.
        n: Number of particles, at least 2.
        box: Side of a cubic periodic box, in which the nearest image counts; None for open space.

    Raises:
        ValueError: If the length of ``x`` is not a multiple of ``n``.
    """
    if n < 2 or x.shape[-1] % n:
        raise ValueError(f"Expected positions of n={n} particles, at least 2, in x; got trailing length {x.shape[-1]}.")
    points = x.unflatten(-1, (n, -1))
    i, j = torch.triu_indices(n, n, 1, device=x.device)
    delta = points[..., i, :] - points[..., j, :]
    if box is not None:
        delta = delta - box * torch.round(delta / box)
    return delta.square().sum(-1).sqrt()


def pair_wasserstein(
    x: Tensor, y: Tensor, *, n: int, x_log_weight: Tensor | None = None, y_log_weight: Tensor | None = None
) -> float:
    r"""Wasserstein-2 distance between the pooled pair distances of two sets of configurations.

    All pairs of all configurations make one sample of numbers on each side, and the root is taken. The public code of
    the adjoint samplers prints the same quantity *without* the root: square this one to compare.

    Arguments:
        x: Configurations, shape ``(N, n * d)``.
        y: Configurations, shape ``(M, n * d)``.
        n: Number of particles.
        x_log_weight: Log weights of the configurations ``x``, shape ``(N,)``; equal by default.
        y_log_weight: Log weights of the configurations ``y``, shape ``(M,)``; equal by default.
    """
    (r, p), (s, q) = _pooled(x, n, x_log_weight), _pooled(y, n, y_log_weight)
    return wasserstein_line(r, s, x_log_weight=p, y_log_weight=q)


def pair_total_variation(
    x: Tensor,
    y: Tensor,
    *,
    n: int,
    bins: int = 200,
    limits: tuple[float, float] | None = None,
    x_log_weight: Tensor | None = None,
    y_log_weight: Tensor | None = None,
) -> float:
    """Total variation between histograms of the pooled pair distances; see :func:`pair_wasserstein`."""
    (r, p), (s, q) = _pooled(x, n, x_log_weight), _pooled(y, n, y_log_weight)
    return total_variation(r, s, bins=bins, limits=limits, x_log_weight=p, y_log_weight=q)


def radial_distribution(
    x: Tensor,
    *,
    n: int,
    bins: int = 100,
    cutoff: float | None = None,
    box: float | None = None,
    log_weight: Tensor | None = None,
) -> PairCounts:
    r"""Histogram of the pair distances, and the density of particles as another particle sees it.

    .. math:: g(r) = \frac{2}{n \varrho} \frac{E[\text{pairs with distance in } dr]}{\text{volume of the shell}}

    In a periodic box :math:`\varrho = (n - 1) / L^d`, so that :math:`g = 1` without correlations. A cluster in open
    space has no such density: there :math:`\varrho = 1`, and ``radial`` is the mean number density at distance ``r``.

    Arguments:
        x: Configurations, shape ``(N, n * d)``.
        n: Number of particles.
        bins: Number of equal bins from zero to the cutoff.
        cutoff: Largest distance; by default half the box, or the largest distance in open space.
        box: Side of a cubic periodic box.
        log_weight: Log weights of the configurations, shape ``(N,)``; equal by default.

    Raises:
        ValueError: If a shape is wrong, or the cutoff exceeds half the box, beyond which shells leave it.
    """
    if bins < 1:
        raise ValueError(f"Expected bins to be at least 1; got {bins}.")
    distances, share = pair_distances(x.detach().double(), n=n, box=box), shares(x, log_weight)
    if cutoff is None:
        cutoff = 0.5 * box if box is not None else float(distances.max())
    if not cutoff > 0.0 or (box is not None and cutoff > 0.5 * box * (1.0 + 1e-12)):
        raise ValueError(f"Expected cutoff to be positive and at most half the box; got {cutoff}.")
    d, width = x.shape[-1] // n, cutoff / bins
    index = (distances / width).long().clamp_max(bins)
    # The largest distance of an open cluster lies on the last edge and belongs inside.
    index = torch.where(distances == cutoff, bins - 1, index)
    mass = (share / distances.shape[-1]).unsqueeze(-1).expand_as(distances)
    count = torch.zeros(bins + 1, dtype=torch.float64, device=x.device)
    count = count.index_add(0, index.flatten(), mass.flatten())[:bins]
    edge = width * torch.arange(bins + 1, dtype=torch.float64, device=x.device)
    ball = math.pi ** (0.5 * d) / math.gamma(0.5 * d + 1.0)
    volume = ball * edge.pow(d).diff()
    density = 1.0 if box is None else (n - 1) / box**d
    return PairCounts(edge[:-1] + 0.5 * width, count / width, (n - 1) * count / (density * volume))


def _pooled(x: Tensor, n: int, log_weight: Tensor | None) -> tuple[Tensor, Tensor]:
    """All pair distances as one sample of numbers, with the log weights of their configurations."""
    if x.ndim != 2:
        raise ValueError(f"Expected configurations of shape (N, n * d); got {tuple(x.shape)}.")
    distances = pair_distances(x.detach().double(), n=n)
    log_share = shares(x, log_weight).log()
    return distances.flatten(), log_share.unsqueeze(-1).expand_as(distances).flatten()
