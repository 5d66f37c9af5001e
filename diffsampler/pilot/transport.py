r"""Transport maps :math:`x = T(z)` with closed-form fits, and densities seen through them.

Sampling moves in ``z``, where the target is close to a standard Gaussian: necks are widened and correlations removed.

* :class:`AffineMap`: :math:`x = m + L z`.
* :class:`TriangularMap`: in an order of the coordinates and with :math:`y = (x - m) / S`,

.. math::
    y_j = f_j(z_{<j}) + e^{\eta_j(z_{<j})} z_j, \qquad
    \log|\det T'| = \sum_j \eta_j + \log S_j,

with :math:`f` linear in :math:`(1, z, z^2, \sigma, \sigma z)`, :math:`\eta` linear in :math:`(1, z, h(z))`,
:math:`\sigma = \mathrm{sigmoid}(1.5 z_1) - 1/2` and :math:`h(z) = \mathrm{softplus}(2 z) / 2`. Only the coefficients
that the draws call for are not zero. The way ``z`` to ``x`` is parallel; the inverse takes one step per coordinate.

References:
    Inference via low-dimensional couplings (Spantini, Bigoni, Marzouk, 2018), https://arxiv.org/abs/1703.06131
    A general framework for the parametrization of hierarchical models (Papaspiliopoulos, Roberts, Skold, 2007),
    https://arxiv.org/abs/0708.3797 (what the scale part does by itself)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import final

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from diffsampler.space import Euclidean
from diffsampler.target import Target

__all__ = ["AffineMap", "Composed", "PulledBack", "Pushforward", "TransportMap", "TriangularMap", "fit_affine"]

# The log-scale saturates smoothly here, so that a far-away z never overflows.
LARGEST_LOG_SCALE = 12.0


class TransportMap(nn.Module, ABC):
    """A differentiable bijection ``z (..., D) -> x (..., D)``."""

    @abstractmethod
    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """The image ``x (..., D)`` and ``log |det dx/dz|``, shape ``(...)``; differentiable."""

    @abstractmethod
    def inverse(self, x: Tensor) -> Tensor:
        """The point ``z (..., D)`` with ``forward(z)[0] == x``."""

    @abstractmethod
    def pull_score(self, z: Tensor, score: Tensor) -> Tensor:
        """Gradient in ``z`` of ``f(T(z)) + log |det|`` from ``score`` = gradient of ``f`` at ``T(z)``, ``(..., D)``."""


@final
class AffineMap(TransportMap):
    """``x = shift + matrix @ z``.

    Arguments:
        shift: Shape ``(D,)``.
        matrix: Invertible, shape ``(D, D)``.
    """

    shift: Tensor
    matrix: Tensor
    inverse_matrix: Tensor
    log_det: Tensor

    def __init__(self, shift: Tensor, matrix: Tensor) -> None:
        super().__init__()
        if shift.ndim != 1 or matrix.shape != (shift.shape[0], shift.shape[0]):
            raise ValueError(f"Expected shift (D,) and matrix (D, D); got {tuple(shift.shape)}, {tuple(matrix.shape)}.")
        self.register_buffer("shift", shift.double())
        self.register_buffer("matrix", matrix.double())
        self.register_buffer("inverse_matrix", torch.linalg.inv(matrix.double()))
        self.register_buffer("log_det", torch.linalg.slogdet(matrix.double())[1])

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return self.shift + z @ self.matrix.mT, self.log_det.expand(z.shape[:-1])

    def inverse(self, x: Tensor) -> Tensor:
        return (x - self.shift) @ self.inverse_matrix.mT

    def pull_score(self, z: Tensor, score: Tensor) -> Tensor:
        return score @ self.matrix


def fit_affine(x: Tensor, *, shrink: float | None = None) -> AffineMap:
    """Affine map to zero mean and unit covariance; the covariance of few draws is shrunk towards its diagonal.

    Arguments:
        x: Draws, shape ``(n, D)``.
        shrink: Weight of the diagonal, ``(D + 1) / (n + D + 1)`` by default.
    """
    n, dim = x.shape
    mean, scale = x.mean(0), x.std(0)
    scale = torch.where(scale > 0, scale, 1.0)
    u = (x - mean) / scale
    weight = (dim + 1.0) / (n + dim + 1.0) if shrink is None else shrink
    cov = (1.0 - weight) * (u.mT @ u) / n + weight * torch.eye(dim, dtype=x.dtype, device=x.device)
    return AffineMap(mean, scale.unsqueeze(-1) * torch.linalg.cholesky(cov))


@final
class TriangularMap(TransportMap):
    r"""Sparse non-linear triangular map; see the module for its equation.

    Arguments:
        order: Coordinate of ``x`` that each position ``j`` stands for, shape ``(D,)``, a permutation.
        shift: Shift ``m`` per position, shape ``(D,)``.
        scale: Scale ``S`` per position, shape ``(D,)``, positive.
        location: Coefficients of ``f``: shape ``(2 + 3 D, D)``, rows ``1, z, z^2, sigma, sigma z``.
        log_scale: Coefficients of ``eta``: shape ``(1 + 2 D, D)``, rows ``1, z, h(z)``.
    """

    order: Tensor
    rank: Tensor
    shift: Tensor
    scale: Tensor
    location: Tensor
    log_scale: Tensor

    def __init__(self, order: Tensor, shift: Tensor, scale: Tensor, location: Tensor, log_scale: Tensor) -> None:
        super().__init__()
        dim = order.shape[0]
        if location.shape != (2 + 3 * dim, dim) or log_scale.shape != (1 + 2 * dim, dim):
            raise ValueError(
                f"Expected coefficients of shapes {(2 + 3 * dim, dim)} and {(1 + 2 * dim, dim)}; "
                f"got {tuple(location.shape)} and {tuple(log_scale.shape)}."
            )
        self.dim = dim
        self.register_buffer("order", order)
        self.register_buffer("rank", order.argsort())
        self.register_buffer("shift", shift.double())
        self.register_buffer("scale", scale.double())
        self.register_buffer("location", location.double())
        self.register_buffer("log_scale", log_scale.double())

    @staticmethod
    def location_features(z: Tensor) -> Tensor:
        """``(1, z, z^2, sigma, sigma z)``, shape ``(..., 2 + 3 D)``."""
        gate = torch.sigmoid(1.5 * z[..., :1]) - 0.5
        return torch.cat([torch.ones_like(gate), z, z.square(), gate, gate * z], -1)

    @staticmethod
    def scale_features(z: Tensor) -> Tensor:
        """``(1, z, h(z))``, shape ``(..., 1 + 2 D)``."""
        return torch.cat([torch.ones_like(z[..., :1]), z, 0.5 * softplus(2.0 * z)], -1)

    def _saturated(self, eta: Tensor) -> Tensor:
        return LARGEST_LOG_SCALE * torch.tanh(eta / LARGEST_LOG_SCALE)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        eta = self._saturated(self.scale_features(z) @ self.log_scale)
        y = self.location_features(z) @ self.location + eta.exp() * z
        x = self.shift + self.scale * y
        return x[..., self.rank], eta.sum(-1) + self.scale.log().sum()

    def inverse(self, x: Tensor) -> Tensor:
        y = (x[..., self.order] - self.shift) / self.scale
        z = torch.zeros_like(y)
        for j in range(self.dim):
            # The strictly lower columns make later entries of z irrelevant.
            eta = self._saturated(self.scale_features(z) @ self.log_scale[:, j])
            z[..., j] = (y[..., j] - self.location_features(z) @ self.location[:, j]) * (-eta).exp()
        return z

    def pull_score(self, z: Tensor, score: Tensor) -> Tensor:
        d = self.dim
        tanh = torch.tanh(self.scale_features(z) @ self.log_scale / LARGEST_LOG_SCALE)
        spread = (LARGEST_LOG_SCALE * tanh).exp()
        pull = score[..., self.order] * self.scale
        by_location = pull @ self.location.mT
        by_eta = ((pull * spread * z + 1.0) * (1.0 - tanh.square())) @ self.log_scale.mT
        sigmoid = torch.sigmoid(1.5 * z[..., :1])
        linear, square = by_location[..., 1 : d + 1], by_location[..., d + 1 : 2 * d + 1]
        gate, gated = by_location[..., 2 * d + 1 : 2 * d + 2], by_location[..., 2 * d + 2 :]
        grad = pull * spread + linear + 2.0 * z * square + (sigmoid - 0.5) * gated
        grad = grad + by_eta[..., 1 : d + 1] + torch.sigmoid(2.0 * z) * by_eta[..., d + 1 :]
        slope = 1.5 * sigmoid * (1.0 - sigmoid)
        first = slope * (gate + (gated * z).sum(-1, keepdim=True))
        return torch.cat([grad[..., :1] + first, grad[..., 1:]], -1)


@final
class Composed(TransportMap):
    """``outer(inner(z))``."""

    def __init__(self, outer: TransportMap, inner: TransportMap) -> None:
        super().__init__()
        self.outer = outer
        self.inner = inner

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        y, first = self.inner(z)
        x, second = self.outer(y)
        return x, first + second

    def inverse(self, x: Tensor) -> Tensor:
        return self.inner.inverse(self.outer.inverse(x))

    def pull_score(self, z: Tensor, score: Tensor) -> Tensor:
        return self.inner.pull_score(z, self.outer.pull_score(self.inner(z)[0], score))


@final
class PulledBack(Target):
    r"""A target in map coordinates: :math:`\log\rho(T(z)) + \log|\det T'(z)|`, with the same normaliser.

    Arguments:
        target: A target on Euclidean space.
        transport: The map.
    """

    def __init__(self, target: Target, transport: TransportMap) -> None:
        super().__init__(Euclidean(target.dim), log_normalizer=target.log_normalizer, has_sampler=target.has_sampler)
        self.target = target
        self.transport = transport

    def log_prob(self, x: Tensor) -> Tensor:
        image, log_det = self.transport(x)
        return self.target.log_prob(image).double() + log_det

    def log_prob_and_score(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            image, log_det = self.transport(x)
            log_prob, score = self.target.log_prob_and_score(image)
            return log_prob.double() + log_det, self.transport.pull_score(x, score.to(x.dtype))

    def sample(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        return self.transport.inverse(self.target.sample(n, generator=generator))


@final
class Pushforward(Target):
    r"""The law of :math:`T(z)`, :math:`z \sim q`: :math:`\log q(T^{-1}(x)) - \log|\det T'|`.

    Arguments:
        base: A normalised density of ``z`` with an exact sampler.
        transport: The map.
    """

    def __init__(self, base: Target, transport: TransportMap) -> None:
        super().__init__(Euclidean(base.dim), log_normalizer=base.log_normalizer, has_sampler=base.has_sampler)
        self.base = base
        self.transport = transport

    def log_prob(self, x: Tensor) -> Tensor:
        z = self.transport.inverse(x)
        return self.base.log_prob(z).double() - self.transport(z)[1]

    def sample(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        return self.transport(self.base.sample(n, generator=generator))[0]
