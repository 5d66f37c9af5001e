r"""The normalizing constant from draws at a ladder of temperatures.

Along :math:`\log\gamma_\beta = \log\gamma_0 + \beta D` with :math:`D = \log\gamma_1 - \log\gamma_0`,

.. math:: \frac{d \log Z_\beta}{d\beta} = E_\beta[D] =: m(\beta), \qquad
          m'(\beta) = \mathrm{Var}_\beta(D) =: v(\beta) \ge 0.

**Thermodynamic integration** is the trapezoid rule with its second-order correction,

.. math:: \log \frac{Z_1}{Z_0} \approx \sum_k \Bigl[\frac{\Delta_k}{2} (m_k + m_{k+1})
          - \frac{\Delta_k^2}{12} (v_{k+1} - v_k)\Bigr],

with an error of the fourth order in :math:`\Delta`. Because :math:`m` never falls, the sums over left and right ends
bracket the integral whatever the ladder. **Stepping stone** is the product of

.. math:: \hat r_k = \frac1n \sum_i e^{\Delta_k D(x_{k,i})}, \qquad x_{k,i} \sim \gamma_{\beta_k},

unbiased for :math:`Z_1 / Z_0` for independent draws and any ladder.

When they fail: integration, where :math:`E_\beta[D]` is huge or infinite at the first rung (a likelihood that vanishes
on part of the prior); stepping stone, where neighbouring temperatures do not overlap, since the mean of heavy weights
then misses its tail and is too small. Both cost nothing beyond the values of ``D``.
:func:`~diffsampler.evidence.mbar_ladder` makes the best use of the same numbers.

References:
    Simulating normalizing constants: from importance sampling to bridge sampling to path sampling (Gelman & Meng,
    1998), https://doi.org/10.1214/ss/1028905934
    Improving power posterior estimation of statistical evidence (Friel, Hurn & Wyse, 2014),
    https://arxiv.org/abs/1209.3198
    Improving marginal likelihood estimation for Bayesian phylogenetic model selection (Xie, Lewis, Fan, Kuo & Chen,
    2011), https://doi.org/10.1093/sysbio/syq085
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from diffsampler.estimators import Estimate
from diffsampler.evidence.series import variance_of_mean

__all__ = ["Thermodynamic", "check_ladder", "stepping_stone", "thermodynamic_integration"]


class Thermodynamic(NamedTuple):
    """What thermodynamic integration knows."""

    estimate: Estimate
    """``log Z_1 - log Z_0``; the standard error joins the two errors below."""
    monte_carlo_error: float
    """Standard error of the quadrature sum for this ladder."""
    quadrature_error: float
    """Bound of the ladder's own bias: the change when every other rung is left out, over three."""
    lower: float
    """Left sum: below the truth up to Monte Carlo error, for any ladder."""
    upper: float
    """Right sum: above the truth up to Monte Carlo error, for any ladder."""


def check_ladder(log_ratio: Tensor, betas: Tensor | Sequence[float]) -> tuple[Tensor, Tensor]:
    """Bring a ladder to ``log_ratio (rungs, chains, draws)`` and ``betas (rungs,)``, float64.

    Raises:
        TypeError: If the ratios are not floating-point.
        ValueError: If shapes, temperatures or values cannot be used.
    """
    if not isinstance(log_ratio, Tensor) or not log_ratio.is_floating_point():
        got = log_ratio.dtype if isinstance(log_ratio, Tensor) else type(log_ratio).__name__
        raise TypeError(f"Expected log_ratio to be a floating-point tensor; got {got}.")
    if log_ratio.ndim == 2:
        log_ratio = log_ratio.unsqueeze(1)
    if log_ratio.ndim != 3 or log_ratio.shape[0] < 2 or log_ratio.shape[-1] < 8:
        raise ValueError(
            "Expected log_ratio of shape (rungs, draws) or (rungs, chains, draws) with at least 2 rungs and 8 draws; "
            f"got {tuple(log_ratio.shape)}."
        )
    grid = torch.as_tensor(betas, dtype=torch.float64, device=log_ratio.device)
    if grid.shape != log_ratio.shape[:1]:
        raise ValueError(f"Expected one temperature for each of {log_ratio.shape[0]} rungs; got {tuple(grid.shape)}.")
    if not bool(grid.isfinite().all()) or not bool((grid.diff() > 0.0).all()):
        raise ValueError(f"Expected betas to increase; got {grid.tolist()}.")
    if bool((log_ratio.isnan() | log_ratio.isposinf()).any()):
        raise ValueError("Expected log_ratio below infinity; got NaN or infinity.")
    return log_ratio.detach().double(), grid


def _quadrature(mean: Tensor, variance: Tensor, betas: Tensor) -> float:
    step = betas.diff()
    trapezoid = 0.5 * step * (mean[1:] + mean[:-1])
    return float((trapezoid - step.square() / 12.0 * variance.diff()).sum())


def thermodynamic_integration(log_ratio: Tensor, betas: Tensor | Sequence[float]) -> Thermodynamic:
    """Integrate the mean log ratio over temperature, corrected by its variance.

    Arguments:
        log_ratio: ``D`` at draws from each temperature, ``(rungs, draws)`` or ``(rungs, chains, draws)``, in the order
            they were made. Chains of the same number may belong together across rungs, as replicas of one parallel
            tempering system do: the error allows for it.
        betas: Temperatures, increasing; usually from 0 to 1.

    Raises:
        ValueError: If the ladder cannot be used, or ``D`` is ``-inf`` somewhere.
    """
    values, grid = check_ladder(log_ratio, betas)
    if not bool(values.isfinite().all()):
        raise ValueError("Expected a finite log_ratio everywhere; got -inf. Use stepping_stone or mbar_ladder.")
    flat = values.flatten(1)
    mean, variance = flat.mean(-1), flat.var(-1)
    step = grid.diff()
    value = _quadrature(mean, variance, grid)
    padded = torch.nn.functional.pad(step, (1, 1))
    of_mean = 0.5 * (padded[1:] + padded[:-1])
    of_variance = (padded[1:].square() - padded[:-1].square()) / 12.0
    centred = values - mean[:, None, None]
    influence = of_mean[:, None, None] * centred + of_variance[:, None, None] * centred.square()
    monte_carlo = math.sqrt(float(variance_of_mean(influence.sum(0))))
    quadrature = abs(value - _halved(mean, variance, grid)) / 3.0
    error = math.hypot(monte_carlo, quadrature)
    left, right = float((step * mean[:-1]).sum()), float((step * mean[1:]).sum())
    return Thermodynamic(
        Estimate(value, error, "thermodynamic integration"), monte_carlo, quadrature, min(left, right), max(left, right)
    )


def _halved(mean: Tensor, variance: Tensor, betas: Tensor) -> float:
    """The same quadrature on every other rung, both ends kept."""
    keep = torch.arange(0, betas.shape[0], 2, device=betas.device)
    if int(keep[-1]) != betas.shape[0] - 1:
        keep = torch.cat([keep, keep.new_tensor([betas.shape[0] - 1])])
    if keep.shape[0] == betas.shape[0]:
        # Two rungs: nothing to leave out; the uncorrected rule is the coarser one.
        return float((0.5 * betas.diff() * (mean[1:] + mean[:-1])).sum())
    return _quadrature(mean[keep], variance[keep], betas[keep])


def stepping_stone(log_ratio: Tensor, betas: Tensor | Sequence[float]) -> Estimate:
    r"""Product of importance sampling estimates from each temperature to the next.

    The standard error is that of :math:`\sum_k \log \hat r_k` by the delta method, autocorrelation included.

    Arguments:
        log_ratio: As for :func:`thermodynamic_integration`; ``-inf`` is allowed. The last rung's draws are not used.
        betas: Temperatures, increasing.

    Raises:
        ValueError: If the ladder cannot be used, or all draws of a rung have weight zero at the next.
    """
    values, grid = check_ladder(log_ratio, betas)
    increment = grid.diff()[:, None, None] * values[:-1]
    log_mean = torch.logsumexp(increment.flatten(1), -1) - math.log(values[0].numel())
    if not bool(log_mean.isfinite().all()):
        raise ValueError("Expected neighbouring temperatures to overlap; got a rung whose draws all have weight zero.")
    influence = (increment - log_mean[:, None, None]).exp().sum(0)
    return Estimate(float(log_mean.sum()), math.sqrt(float(variance_of_mean(influence))), "stepping stone")
