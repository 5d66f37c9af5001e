r"""Self-normalized importance sampling of the posterior of a noised particle, by one member or the whole ensemble.

With points :math:`y_k` drawn from :math:`q`, and :math:`W_{ik} \propto \gamma(y_k) N(x_i; y_k, \sigma^2 I) / q(y_k)`,

.. math:: E[y | x_i] \approx \sum_k W_{ik} y_k, \qquad \nabla\log p_\sigma(x_i) \approx (E[y | x_i] - x_i) / \sigma^2 .

* :class:`Independent`: member ``i`` uses its own points and its own component :math:`q_i`.
* :class:`Pooled`: every member uses all points, with the balance heuristic :math:`q = \frac1M \sum_j q_j`.
* :class:`Archive`: also the points of earlier levels, with all their components in :math:`q`.

The bias is O(1 / ESS). Pooling costs O(M^2 K D) arithmetic per level and no density evaluation.

Reference:
    Optimally combining sampling techniques for Monte Carlo rendering (Veach & Guibas, 1995; the balance heuristic),
    https://doi.org/10.1145/218380.218498
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple, final

import torch
from torch import Tensor

from diffsampler.ensemble.proposals import Components

__all__ = ["Archive", "Cloud", "Estimator", "Independent", "Pooled", "Points"]

CHUNK = 4_000_000
"""Kernel values that are held at once."""


class Points(NamedTuple):
    """What one level evaluated."""

    y: Tensor
    """``(R, M, K, D)``."""
    log_gamma: Tensor
    """``(R, M, K)``."""
    score: Tensor | None
    """``(R, M, K, D)``, only where a method asked for it."""
    components: Components
    """Where the points came from."""


class Cloud(NamedTuple):
    """Points that ``B`` groups of members share; ``B`` divides the number of members."""

    y: Tensor
    """``(B, P, D)``."""
    log_ratio: Tensor
    """``log gamma - log q``, ``(B, P)``."""
    score: Tensor | None
    """``(B, P, D)`` or None."""
    spread: Tensor | None = None
    """Variances that a Gaussian with the moments of gamma gives the posterior, ``(B, 1, D)``."""


class Estimator(ABC):
    """Decides which points serve which member, and their proposal density."""

    keeps: int = 1
    """Number of levels whose points are used."""

    @abstractmethod
    def cloud(self, levels: list[Points]) -> Cloud:
        """The cloud of the last level, given the last ``keeps`` levels in order."""


@final
class Independent(Estimator):
    """Every member by itself: ensembles of one."""

    def cloud(self, levels: list[Points]) -> Cloud:
        y, log_gamma, score, components = levels[-1]
        log_ratio = log_gamma - components.log_own(y)
        return Cloud(y.flatten(0, 1), log_ratio.flatten(0, 1), None if score is None else score.flatten(0, 1))


@final
class Pooled(Estimator):
    """All points of the level for every member."""

    def cloud(self, levels: list[Points]) -> Cloud:
        y, log_gamma, score, components = levels[-1]
        flat = y.flatten(1, 2)
        log_ratio = log_gamma.flatten(1) - components.log_mixture(flat, chunk=CHUNK)
        return Cloud(flat, log_ratio, None if score is None else score.flatten(1, 2))


@final
class Archive(Estimator):
    """All points of the last ``depth`` levels for every member. Cost grows with the square of ``depth``.

    Later components depend on earlier points, so self-normalized estimates carry a small extra bias; path weights do
    not.

    Arguments:
        depth: Number of levels, at least one.
    """

    def __init__(self, depth: int = 3) -> None:
        if isinstance(depth, bool) or not isinstance(depth, int) or depth < 1:
            raise ValueError(f"Expected depth to be a positive integer; got {depth!r}.")
        self.keeps = depth

    def cloud(self, levels: list[Points]) -> Cloud:
        y = torch.cat([points.y.flatten(1, 2) for points in levels], 1)
        log_gamma = torch.cat([points.log_gamma.flatten(1) for points in levels], 1)
        mixtures = torch.stack([points.components.log_mixture(y, chunk=CHUNK) for points in levels])
        sizes = [points.log_gamma[0].numel() for points in levels]
        log_share = torch.tensor(sizes, dtype=y.dtype, device=y.device).log().reshape(-1, 1, 1)
        log_q = torch.logsumexp(mixtures + log_share - torch.logsumexp(log_share, 0), 0)
        scores = [points.score.flatten(1, 2) for points in levels if points.score is not None]
        return Cloud(y, log_gamma - log_q, torch.cat(scores, 1) if scores else None)
