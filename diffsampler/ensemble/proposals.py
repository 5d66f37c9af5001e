r"""Where the points are drawn at which the density is evaluated.

At noise level :math:`\sigma`, member :math:`j` at :math:`x_j` draws :math:`K` points from
:math:`q_j = N(c_j, \Sigma)` with one covariance for the ensemble. Its posterior is
:math:`p(y | x_j) \propto \gamma(y) N(x_j; y, \sigma^2 I)`.

* :class:`Natural`: :math:`c_j = x_j`, :math:`\Sigma = \sigma^2 I`, right for a flat :math:`\gamma`.
* :class:`Kalman`: the posterior of a Gaussian with the moments :math:`m, C` of :math:`\gamma`,
  :math:`c_j = m + C (C + \sigma^2 I)^{-1} (x_j - m)`, :math:`\Sigma = a^2 (C^{-1} + \sigma^{-2} I)^{-1}`, wider by
  ``a``.

Moments come from the points of the level before, whose weights :math:`\gamma / q` do not depend on the noise. Whatever
a proposal makes of the past, path weights stay exact, since they condition on it.

Reference:
    Gradient-Free Score-Based Sampling Methods with Ensembles (Riel & Bischoff, 2024), https://arxiv.org/abs/2401.17539
    (the class of methods; the proposals, and the weights that follow from them, are derived here)
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import NamedTuple, final

import torch
from torch import Tensor

from diffsampler.ensemble.frame import Moments

__all__ = [
    "Belief",
    "Components",
    "Kalman",
    "LocalKalman",
    "Natural",
    "Posterior",
    "Proposal",
    "kalman",
    "square_distance",
]

LOG_2PI = math.log(2.0 * math.pi)


def square_distance(x: Tensor, y: Tensor) -> Tensor:
    """Squared distances ``(..., m, P)`` between ``x (..., m, D)`` and ``y (..., P, D)``, by a matrix product.

    In float64 and in a frame of unit scale the cancellation is below 1e-13.
    """
    square = torch.baddbmm(x.square().sum(-1, keepdim=True) + y.square().sum(-1).unsqueeze(-2), x, y.mT, alpha=-2.0)
    return square.clamp_min_(0.0)


class Components(NamedTuple):
    """Gaussians ``N(mean_j, A diag(scale_j^2) A^T)`` with one lower triangular ``A`` per ensemble."""

    mean: Tensor
    """``(R, M, D)``."""
    factor: Tensor
    """``A (R, D, D)``."""
    scale: Tensor
    """``(R, M, D)``."""

    def sample(self, num_points: int, *, generator: torch.Generator) -> Tensor:
        """Draw ``num_points`` of each, ``(R, M, K, D)``; in mirrored pairs, whose noise cancels where weights agree."""
        half = (num_points + 1) // 2
        shape = (*self.mean.shape[:-1], half, self.mean.shape[-1])
        z = torch.randn(shape, generator=generator, dtype=self.mean.dtype, device=self.mean.device)
        z = torch.cat([z, -z], -2)[..., :num_points, :] * self.scale.unsqueeze(-2)
        return self.mean.unsqueeze(-2) + z @ self.factor.mT.unsqueeze(-3)

    def log_own(self, y: Tensor) -> Tensor:
        """Log density of each member's own component at its points, ``(R, M, K, D) -> (R, M, K)``."""
        delta = self._whiten(y.flatten(1, 2)).unflatten(1, y.shape[1:3]) - self._whiten(self.mean).unsqueeze(-2)
        return self._log_norm().unsqueeze(-1) - 0.5 * (delta / self.scale.unsqueeze(-2)).square().sum(-1)

    def log_mixture(self, y: Tensor, *, chunk: int) -> Tensor:
        """Log density of the equal mixture, ``(R, P, D) -> (R, P)``, ``chunk`` kernel values at a time."""
        mean, points, precision = self._whiten(self.mean), self._whiten(y), self.scale.square().reciprocal()
        # The square completed, so that components of unequal widths cost two matrix products.
        linear = (mean * precision).mT
        constant = self._log_norm() - 0.5 * (mean.square() * precision).sum(-1)
        size = max(1, chunk // (mean.shape[0] * mean.shape[1]))
        parts = []
        for part in points.split(size, -2):
            exponent = torch.baddbmm(constant.unsqueeze(-2), part, linear)
            parts.append(torch.logsumexp(exponent.baddbmm_(part.square(), precision.mT, alpha=-0.5), -1))
        return torch.cat(parts, -1) - math.log(mean.shape[1])

    def _whiten(self, y: Tensor) -> Tensor:
        return torch.linalg.solve_triangular(self.factor, y.mT, upper=False).mT

    def _log_norm(self) -> Tensor:
        """Log of the constant of each component, ``(R, M)``."""
        volume = self.factor.diagonal(dim1=-2, dim2=-1).log().sum(-1).unsqueeze(-1) + self.scale.log().sum(-1)
        return -volume - 0.5 * self.mean.shape[-1] * LOG_2PI


class Belief(NamedTuple):
    """What the past says about the posteriors."""

    moments: Moments
    """Of gamma, from all points of the last level."""
    local: Posterior | None
    """Of each member at the last level, ``None`` at the first."""


class Posterior(NamedTuple):
    """Posterior moments of members at one noise level, as estimated there."""

    x: Tensor
    """Where the members were, ``(R, M, D)``."""
    sigma: float
    mean: Tensor
    """``(R, M, D)``."""
    variance: Tensor
    """Diagonal, ``(R, M, D)``."""
    ess: Tensor
    """Effective number of points behind them, ``(R, M)``."""


class Proposal(ABC):
    """Makes the components of a level."""

    @abstractmethod
    def components(self, x: Tensor, sigma: float, belief: Belief) -> Components:
        """Components of members ``x (R, M, D)`` at noise level ``sigma``."""


@final
class Natural(Proposal):
    """Around the members themselves, as wide as the noise: exponentially wasteful in the dimension at high noise."""

    def components(self, x: Tensor, sigma: float, belief: Belief) -> Components:
        return Components(x, _eye(x), torch.full_like(x, sigma))


@final
class Kalman(Proposal):
    r"""Around the posterior mean of one Gaussian approximation for all members.

    Arguments:
        excess: Proposals are wider by :math:`a = 1 + e / \sqrt{D}` while the noise exceeds the target's scale (the
            waste of a fixed factor grows exponentially with the dimension). The factor falls to one with the noise,
            :math:`1 + (a - 1) \sqrt{\mathrm{tr} S / \mathrm{tr} C}`, as the posterior becomes the kernel itself.
    """

    def __init__(self, *, excess: float = 1.0) -> None:
        if not 0.0 <= excess < math.inf:
            raise ValueError(f"Expected excess >= 0; got {excess}.")
        self.excess = excess

    def components(self, x: Tensor, sigma: float, belief: Belief) -> Components:
        mean, gain, share = kalman(x, sigma, belief.moments)
        width = 1.0 + self.excess / math.sqrt(x.shape[-1]) * share
        factor = sigma * torch.linalg.cholesky(gain)
        return Components(mean, factor, width.reshape(-1, 1, 1).expand_as(x))


@final
class LocalKalman(Proposal):
    r"""Around each member's own Gaussian posterior, updated from the level before; for several modes.

    The estimated moments :math:`m_j, V_j` of member ``j`` at :math:`(x_j, \sigma)` are read as the posterior of a local
    Gaussian with precision :math:`\lambda_j = V_j^{-1} - \sigma^{-2}`. At :math:`(x_j', \sigma')` its posterior is

    .. math::
       V_j' = (\lambda_j + \sigma'^{-2})^{-1}, \qquad m_j' = V_j' (V_j^{-1} m_j - \sigma^{-2} x_j + \sigma'^{-2} x_j').

    Variances from few effective points are drawn towards those of :class:`Kalman`, which also serves the first level.

    Arguments:
        excess: As in :class:`Kalman`.
        prior_points: Number of points that the common Gaussian counts for against a member's own.
    """

    def __init__(self, *, excess: float = 1.0, prior_points: float = 5.0) -> None:
        if not prior_points > 0.0:
            raise ValueError(f"Expected prior_points to be positive; got {prior_points}.")
        self.common = Kalman(excess=excess)
        self.prior_points = prior_points

    def components(self, x: Tensor, sigma: float, belief: Belief) -> Components:
        local = belief.local
        if local is None:
            return self.common.components(x, sigma, belief)
        mean, gain, _ = kalman(local.x, local.sigma, belief.moments)
        common = local.sigma**2 * gain.diagonal(dim1=-2, dim2=-1).unsqueeze(-2)
        count = local.ess.unsqueeze(-1)
        share = count / (count + self.prior_points)
        # No posterior is taken to be wider than its kernel: between modes it is, and the other members cover that.
        variance = (share * local.variance + (1.0 - share) * common).clamp_max(local.sigma**2 * (1.0 - 1e-9))
        centre = share * local.mean + (1.0 - share) * mean
        precision = variance.reciprocal() - local.sigma**-2
        updated = (precision + sigma**-2).reciprocal()
        mean = updated * (centre / variance - local.x / local.sigma**2 + x / sigma**2)
        shrunk = (1.0 - updated / sigma**2).clamp(0.0, 1.0)
        width = 1.0 + self.common.excess / math.sqrt(x.shape[-1]) * shrunk
        return Components(mean, _eye(x), width * updated.sqrt())


def _eye(x: Tensor) -> Tensor:
    return torch.eye(x.shape[-1], dtype=x.dtype, device=x.device).expand(x.shape[0], -1, -1)


def kalman(x: Tensor, sigma: float, moments: Moments) -> tuple[Tensor, Tensor, Tensor]:
    """Posterior means ``(R, M, D)``, the gain ``(R, D, D)`` and ``tr S / tr C`` to the power 1/2, ``(R,)``."""
    eye = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    covariance = moments.covariance + 1e-6 * eye
    # C and (C + sigma^2)^-1 commute, so the gain is symmetric.
    gain = torch.linalg.solve(covariance + sigma**2 * eye, covariance)
    gain = 0.5 * (gain + gain.mT)
    mean = moments.mean.unsqueeze(-2)
    trace = covariance.diagonal(dim1=-2, dim2=-1).sum(-1)
    share = (sigma**2 * gain.diagonal(dim1=-2, dim2=-1).sum(-1) / trace).clamp(0.0, 1.0).sqrt()
    return mean + (x - mean) @ gain, gain, share
