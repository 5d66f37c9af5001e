r"""Linear Gaussian reference chains: what a controlled diffusion does without control.

.. math:: x_{k+1} = \kappa_k x_k + \sqrt{v_k}\,\xi_k, \qquad k = 0 \dots K - 1.

Between any two steps the chain is Gaussian. With :math:`\kappa_{jk} = \prod_{j \le i < k} \kappa_i` and
:math:`\Sigma_{jk} = \mathrm{Var}(x_k | x_j)`,

.. math::
   x_k | x_0 \sim N(\kappa_{0k} x_0, \Sigma_{0k}), \qquad
   x_k | x_0, x_K \sim N\Big(\frac{\kappa_{0k} \Sigma_{kK} x_0 + \kappa_{kK} \Sigma_{0k} x_K}{\Sigma_{0K}},\
   \frac{\Sigma_{0k} \Sigma_{kK}}{\Sigma_{0K}}\Big).

The noise of a step is the exact integral :math:`v_k = \int_{t_k}^{t_{k+1}} g^2\,dt` of a schedule, or, as published,
its left end point :math:`g(t_k)^2 (t_{k+1} - t_k)`; then :math:`\Sigma_{0K}` is the sum of those, not the integral
(1.16 times it for 50 geometric steps), and every density of this library uses the former.

Times are uniform unless given. Nothing here depends on the target's units: noise levels are in those of the particles.

References:
    Adjoint sampling: highly scalable diffusion samplers via adjoint matching (Havens et al., 2025),
    https://arxiv.org/abs/2504.11713 (geometric and constant schedules)
    Adjoint Schroedinger bridge sampler (Liu et al., 2025), https://arxiv.org/abs/2506.22565 (variance preserving)
    Elucidating the design space of diffusion-based generative models (Karras et al., 2022),
    https://arxiv.org/abs/2206.00364 (EDM levels)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Reference", "constant", "edm", "geometric", "product", "variance_preserving"]


class Reference(NamedTuple):
    """A linear Gaussian chain of ``K`` steps, all tensors float64."""

    time: Tensor
    """Times ``t_k``, from 0 to 1, shape ``(K + 1,)``."""
    contraction: Tensor
    """``kappa_k``, shape ``(K,)``, or ``(K, B)`` for the factors of a product of spaces."""
    variance: Tensor
    """``v_k``, likewise."""

    @property
    def num_steps(self) -> int:
        """Number of steps ``K``."""
        return len(self.variance)

    def in_columns(self) -> Reference:
        """The same chain with a column for each factor, ``(K, 1)`` if there is one."""
        if self.variance.ndim == 2:
            return self
        return Reference(self.time, self.contraction.unsqueeze(-1), self.variance.unsqueeze(-1))

    def from_start(self) -> tuple[Tensor, Tensor]:
        r""":math:`\kappa_{0k}` and :math:`\Sigma_{0k}`, each ``(K + 1,)`` or ``(K + 1, B)``."""
        shape = self.variance.shape[1:]
        scale, level = [self.variance.new_ones(shape)], [self.variance.new_zeros(shape)]
        for a, v in zip(self.contraction, self.variance, strict=True):
            scale.append(scale[-1] * a)
            level.append(a.square() * level[-1] + v)
        return torch.stack(scale), torch.stack(level)

    def to_end(self) -> tuple[Tensor, Tensor]:
        r""":math:`\kappa_{kK}` and :math:`\Sigma_{kK}`, each ``(K + 1,)`` or ``(K + 1, B)``."""
        shape = self.variance.shape[1:]
        scale, level = [self.variance.new_ones(shape)], [self.variance.new_zeros(shape)]
        for a, v in zip(self.contraction.flip(0), self.variance.flip(0), strict=True):
            level.append(level[-1] + scale[-1].square() * v)
            scale.append(scale[-1] * a)
        return torch.stack(scale).flip(0), torch.stack(level).flip(0)


def geometric(
    num_steps: int,
    *,
    sigma_min: float = 1e-3,
    sigma_max: float = 2.0,
    left_endpoint: bool = False,
    time: Tensor | None = None,
) -> Reference:
    r"""Brownian motion with :math:`\int_0^t g^2 = \sigma_{max}^2 (1 - r^{-2t})`, :math:`r = \sigma_{max}/\sigma_{min}`.

    Much noise first and little at the end: what is left to come at time t is log-uniform. The end point's variance is
    :math:`\sigma_{max}^2 - \sigma_{min}^2`.

    Arguments:
        num_steps: Number of steps ``K``.
        sigma_min: Standard deviation of the noise still to come near the end.
        sigma_max: That at the start; it must cover the target.
        left_endpoint: Use the published Euler step in place of the exact integral.
        time: Times ``(K + 1,)``, uniform by default.
    """
    if not 0.0 < sigma_min < sigma_max:
        raise ValueError(f"Expected 0 < sigma_min < sigma_max; got {sigma_min} and {sigma_max}.")
    log_ratio = math.log(sigma_max / sigma_min)

    def total(t: Tensor) -> Tensor:
        return -(sigma_max**2) * torch.expm1(-2.0 * log_ratio * t)

    def rate(t: Tensor) -> Tensor:
        return 2.0 * log_ratio * sigma_max**2 * torch.exp(-2.0 * log_ratio * t)

    return _driftless(num_steps, total, rate, left_endpoint=left_endpoint, time=time)


def constant(num_steps: int, *, sigma: float = 1.0, time: Tensor | None = None) -> Reference:
    r"""Brownian motion with :math:`g = \sigma`, where both discretizations agree."""
    if not sigma > 0.0:
        raise ValueError(f"Expected sigma > 0; got {sigma}.")
    return _driftless(num_steps, lambda t: sigma**2 * t, None, left_endpoint=False, time=time)


def edm(
    num_steps: int,
    *,
    sigma_min: float = 1e-3,
    sigma_max: float = 6.0,
    rho: float = 3.0,
    left_endpoint: bool = False,
    time: Tensor | None = None,
) -> Reference:
    r"""Brownian motion with :math:`g(t) = ((1 - t)\,\sigma_{max}^{1/\rho} + t\,\sigma_{min}^{1/\rho})^\rho`.

    .. math:: \int_0^t g^2 = \frac{\sigma_{max}^{2 + 1/\rho} - g(t)^{2 + 1/\rho}}
              {(\sigma_{max}^{1/\rho} - \sigma_{min}^{1/\rho})(2 \rho + 1)}

    Arguments:
        num_steps: Number of steps ``K``.
        sigma_min: ``g`` at the end.
        sigma_max: ``g`` at the start.
        rho: How much of the time is spent at small noise.
        left_endpoint: Use the published Euler step in place of the exact integral.
        time: Times ``(K + 1,)``, uniform by default.
    """
    if not 0.0 < sigma_min < sigma_max or not rho > 0.0:
        raise ValueError(f"Expected 0 < sigma_min < sigma_max and rho > 0; got {sigma_min}, {sigma_max} and {rho}.")
    first, last = sigma_max ** (1.0 / rho), sigma_min ** (1.0 / rho)

    def total(t: Tensor) -> Tensor:
        base = (1.0 - t) * first + t * last
        return (first ** (2.0 * rho + 1.0) - base ** (2.0 * rho + 1.0)) / ((first - last) * (2.0 * rho + 1.0))

    def rate(t: Tensor) -> Tensor:
        return ((1.0 - t) * first + t * last) ** (2.0 * rho)

    return _driftless(num_steps, total, rate, left_endpoint=left_endpoint, time=time)


def variance_preserving(
    num_steps: int,
    *,
    beta_start: float = 20.0,
    beta_end: float = 0.1,
    scale: float = 1.0,
    time: Tensor | None = None,
) -> Reference:
    r"""Ornstein-Uhlenbeck chain with exact kernels, stationary law :math:`N(0, s^2)`, forgetting first.

    .. math:: \kappa_k = e^{-\frac12 \int_{t_k}^{t_{k+1}} \beta}, \qquad v_k = s^2 (1 - \kappa_k^2)

    with a rate that falls linearly. From its stationary law it forgets where it began, and then needs no corrector.

    Arguments:
        num_steps: Number of steps ``K``.
        beta_start: Rate at the start.
        beta_end: Rate at the end.
        scale: The standard deviation ``s``.
        time: Times ``(K + 1,)``, uniform by default.
    """
    if not 0.0 < beta_end <= beta_start or not scale > 0.0:
        raise ValueError(
            f"Expected 0 < beta_end <= beta_start and scale > 0; got {beta_end}, {beta_start} and {scale}."
        )
    t = _times(num_steps, time)
    spent = (beta_start * t + 0.5 * (beta_end - beta_start) * t.square()).diff()
    return Reference(t, torch.exp(-0.5 * spent), -(scale**2) * torch.expm1(-spent))


def product(*factors: Reference) -> Reference:
    """Independent chains on the factors of a product of spaces, over the same times."""
    columns = [factor.in_columns() for factor in factors]
    if not columns or any(not torch.equal(other.time, columns[0].time) for other in columns[1:]):
        raise ValueError("Expected references over the same times.")
    contraction = torch.cat([factor.contraction for factor in columns], -1)
    return Reference(columns[0].time, contraction, torch.cat([factor.variance for factor in columns], -1))


def _driftless(
    num_steps: int,
    total: Callable[[Tensor], Tensor],
    rate: Callable[[Tensor], Tensor] | None,
    *,
    left_endpoint: bool,
    time: Tensor | None,
) -> Reference:
    t = _times(num_steps, time)
    variance = rate(t[:-1]) * t.diff() if left_endpoint and rate is not None else total(t).diff()
    return Reference(t, torch.ones_like(variance), variance)


def _times(num_steps: int, time: Tensor | None) -> Tensor:
    if num_steps < 1:
        raise ValueError(f"Expected num_steps >= 1; got {num_steps}.")
    if time is None:
        return torch.arange(num_steps + 1, dtype=torch.float64) / num_steps
    time = time.double()
    if time.shape != (num_steps + 1,) or time[0] != 0.0 or time[-1] != 1.0 or not bool((time.diff() > 0.0).all()):
        raise ValueError(f"Expected {num_steps + 1} rising times from 0 to 1; got {time.tolist()}.")
    return time
