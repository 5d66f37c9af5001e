r"""Metrics: the shape of the target that kernels move in, learned from all chains at once.

A metric is a diagonal scale, passed to kernels as ``KernelParams.scale``, or a dense one, passed as coordinates
:math:`z = L^{-1}(x - m)` in which any kernel runs with unit scale. Both are pooled over chains and steps.

References:
    Stan Reference Manual, section 15.2 (the shrinkage), https://mc-stan.org/docs/reference-manual
    Updating formulae and a pairwise algorithm for computing sample variances (Chan, Golub & LeVeque, 1979),
    http://i.stanford.edu/pub/cstr/reports/cs/tr/79/773/CS-TR-79-773.pdf
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple, final

import torch
from torch import Tensor

from diffsampler.kernel import State
from diffsampler.kernels.adaptation import PooledVariance, VarianceState, spread
from diffsampler.kernels.compiled import Frame
from diffsampler.space import Euclidean, Space

__all__ = ["DenseMetric", "DiagonalMetric", "Metric", "MetricState", "Shape", "enter", "leave"]

PRIOR_DRAWS = 5.0
"""How many draws the diagonal counts for against the covariance of the draws, as in Stan."""


class Shape(NamedTuple):
    """What kernels are given of a metric."""

    scale: Tensor
    """Standard deviations, ``(D,)`` or ``(1,)``, float64."""
    frame: Frame | None
    """Coordinates to run in; None for the original ones."""


class MetricState(NamedTuple):
    """Pooled moments."""

    variance: VarianceState
    product: Tensor
    """Sum of outer products of deviations, ``(D, D)``, float64; empty for diagonal metrics."""


class Metric(ABC):
    """Running moments of all chains, and the shape that follows from them."""

    @abstractmethod
    def first(self, x: Tensor) -> Shape:
        """A shape from the starting points ``(n, D)`` alone."""

    @abstractmethod
    def init(self, like: Tensor) -> MetricState:
        """No points yet."""

    @abstractmethod
    def update(self, state: MetricState, x: Tensor) -> MetricState:
        """Merge points ``(..., D)``, in original coordinates."""

    @abstractmethod
    def shape(self, state: MetricState) -> Shape:
        """The shape of the points so far."""


@final
class DiagonalMetric(Metric):
    """Standard deviation per coordinate (one for all on spaces that allow no other)."""

    def __init__(self, space: Space) -> None:
        self.space = space
        self._pool = PooledVariance(space)

    def first(self, x: Tensor) -> Shape:
        return Shape(spread(self.space, x), None)

    def init(self, like: Tensor) -> MetricState:
        return MetricState(self._pool.init(like), torch.empty(0, dtype=torch.float64, device=like.device))

    def update(self, state: MetricState, x: Tensor) -> MetricState:
        return state._replace(variance=self._pool.update(state.variance, x))

    def shape(self, state: MetricState) -> Shape:
        return Shape(self._pool.scale(state.variance), None)


@final
class DenseMetric(Metric):
    r"""The covariance :math:`\Sigma = L L^T`, shrunk towards its own diagonal as if that were five more draws.

    .. math:: \Sigma = \frac{n}{n + 5} S + \frac{5}{n + 5} \operatorname{diag} S

    Stan shrinks towards :math:`10^{-3} I`, which presumes a scale; the diagonal has the target's own. Worth its
    :math:`O(D^2)` per point and step where coordinates are correlated; not worth it in hundreds of dimensions, where
    the covariance is not known from the draws of a warm-up.

    Raises:
        ValueError: If the space is not Euclidean.
    """

    def __init__(self, space: Space) -> None:
        if not isinstance(space, Euclidean):
            raise ValueError(f"Expected a Euclidean space for a dense metric; got {space}. Use DiagonalMetric.")
        self.space = space
        self._pool = PooledVariance(space)

    def first(self, x: Tensor) -> Shape:
        scale = spread(self.space, x)
        return Shape(torch.ones_like(scale[:1]), Frame(x.double().mean(0), scale.diag()))

    def init(self, like: Tensor) -> MetricState:
        zero = torch.zeros(self.space.dim, self.space.dim, dtype=torch.float64, device=like.device)
        return MetricState(self._pool.init(like), zero)

    def update(self, state: MetricState, x: Tensor) -> MetricState:
        x = x.reshape(-1, self.space.dim).double()
        variance = self._pool.update(state.variance, x)
        size, old = x.shape[0], state.variance
        centred, delta = x - x.mean(0), x.mean(0) - old.mean
        product = state.product + centred.mT @ centred + delta.outer(delta) * (old.size * size / variance.size)
        return MetricState(variance, product)

    def shape(self, state: MetricState) -> Shape:
        n = state.variance.size
        scale = self._pool.scale(state.variance)
        correlation = state.product / max(n - 1, 1) / scale.outer(scale)
        # A coordinate that never moved got the scale of the others, and is no part of any correlation.
        still = correlation.diagonal() < 0.5
        correlation = correlation.masked_fill(still.unsqueeze(0) | still.unsqueeze(1), 0.0)
        identity = torch.eye(self.space.dim, dtype=torch.float64, device=scale.device)
        shrunk = (n * correlation.where(identity == 0.0, identity) + PRIOR_DRAWS * identity) / (n + PRIOR_DRAWS)
        factor, failed = torch.linalg.cholesky_ex(shrunk)
        if bool(failed) or not bool(factor.isfinite().all()):
            factor = identity
        return Shape(torch.ones_like(scale[:1]), Frame(state.variance.mean, scale.unsqueeze(-1) * factor))


def enter(state: State, frame: Frame | None) -> State:
    """A state of original coordinates in those of ``frame``."""
    if frame is None:
        return state
    return state._replace(x=frame.to_frame(state.x), score=state.score @ frame.factor.to(state.score))


def leave(state: State, frame: Frame | None) -> State:
    """A state of ``frame`` in original coordinates."""
    if frame is None:
        return state
    flat = state.score.double().reshape(-1, state.score.shape[-1])
    score = torch.linalg.solve_triangular(frame.factor.mT, flat.mT, upper=True).mT
    return state._replace(x=frame.to_original(state.x), score=score.reshape(state.score.shape).to(state.score))
