r"""Distances between samples of angles, in radians."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from diffsampler.metrics.clouds import optimal_cost
from diffsampler.metrics.line import shares

__all__ = ["angle_wasserstein", "torsion_divergence"]

TURN = 2.0 * math.pi


def torsion_divergence(
    reference: Tensor,
    x: Tensor,
    *,
    bins: int = 200,
    floor: float = 1e-5,
    reference_log_weight: Tensor | None = None,
    log_weight: Tensor | None = None,
) -> Tensor:
    r"""Kullback-Leibler divergence of the histogram of each angle, from the reference to the samples.

    .. math:: D_j = \sum_b p_{jb} \log \frac{p_{jb} + \varepsilon}{q_{jb} + \varepsilon}

    with :math:`p` the masses of the reference and :math:`q` those of the samples on equal bins over the circle. The
    tables on alanine dipeptide use 200 bins and :math:`\varepsilon = 10^{-5}`. With few samples the noise
    dominates: ``n`` exact samples score about ``bins / (2 n)`` against a long reference.

    Arguments:
        reference: Angles of the reference, shape ``(M,)`` or ``(M, m)``.
        x: Angles of the samples, shape ``(N,)`` or ``(N, m)``; any turn.
        bins: Number of bins.
        floor: :math:`\varepsilon > 0`.
        reference_log_weight: Log weights of the reference, shape ``(M,)``; equal by default.
        log_weight: Log weights of the samples, shape ``(N,)``; equal by default.

    Returns:
        The divergences, shape ``()`` or ``(m,)``, float64.
    """
    if bins < 1 or not floor > 0.0:
        raise ValueError(f"Expected at least one bin and a positive floor; got bins={bins} and floor={floor}.")
    if reference.shape[1:] != x.shape[1:] or x.ndim not in (1, 2):
        raise ValueError(
            f"Expected the same angles in both, (N,) or (N, m); got {tuple(reference.shape)} and {tuple(x.shape)}."
        )
    p = _histogram(reference, shares(reference, reference_log_weight, name="reference"), bins)
    q = _histogram(x, shares(x, log_weight), bins)
    return (p * ((p + floor) / (q + floor)).log()).sum(-1)


def angle_wasserstein(x: Tensor, y: Tensor) -> float:
    r"""Wasserstein-2 distance between two equally large sets of angles with the geodesic distance of the torus.

    .. math:: W_2^2 = \min_\sigma \frac1N \sum_i \sum_j d(x_{ij}, y_{\sigma(i) j})^2, \qquad
              d(a, b) = \min_k |a - b + 2 \pi k|

    Exact. Time grows with the cube of ``N``: a second for 2,000 points.

    Arguments:
        x: Angles, shape ``(N, m)``.
        y: Angles, shape ``(N, m)``.
    """
    if x.ndim != 2 or x.shape != y.shape:
        raise ValueError(f"Expected two sets of the same shape (N, m); got {tuple(x.shape)} and {tuple(y.shape)}.")
    square = torch.zeros(len(x), len(x), dtype=torch.float64, device=x.device)
    for a, b in zip(x.detach().double().unbind(-1), y.detach().double().unbind(-1), strict=True):
        delta = a.unsqueeze(-1) - b
        square += (delta - TURN * torch.round(delta / TURN)).square()
    return math.sqrt(optimal_cost(square))


def _histogram(x: Tensor, share: Tensor, bins: int) -> Tensor:
    """Masses of equal bins over the circle, shape ``(bins,)`` or ``(m, bins)``."""
    turns = x.detach().double() / TURN
    index = ((turns - turns.floor()) * bins).long().clamp_max(bins - 1)
    columns = index.reshape(len(x), -1).T
    mass = torch.zeros(len(columns), bins, dtype=torch.float64, device=x.device)
    mass = mass.scatter_add(1, columns, share.expand_as(columns).contiguous())
    return mass.reshape(*x.shape[1:], bins)
