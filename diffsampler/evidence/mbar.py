r"""The multistate Bennett acceptance ratio: normalizing constants of many densities from draws of all of them.

With :math:`n_k` draws of :math:`\gamma_k = Z_k \pi_k`, pooled to :math:`x_1 \dots x_N`, and :math:`f_k = -\log Z_k`,
the estimate solves

.. math:: \sum_n p_{kn} = n_k, \qquad
          p_{kn} = \frac{n_k\, \gamma_k(x_n) e^{f_k}}{\sum_j n_j\, \gamma_j(x_n) e^{f_j}}

up to a common constant, which is the gradient of a convex function of :math:`f`; Newton's method with backtracking
solves it in log space. For two densities it is optimal bridge sampling. The Hessian
:math:`H = \mathrm{diag}(\sum_n p_{kn}) - p p^T` gives the influence of a draw, :math:`-H^{+} p_n`, and from it the
covariance: a sum over states of the variance of their draws' mean influence, with autocorrelation.

When it fails: sets of densities that do not overlap through the others (the error is then huge); chains that have not
converged. Cost: every density at every draw, which for tempering is nothing beyond one log ratio per draw.

References:
    Statistically optimal analysis of samples from multiple equilibrium states (Shirts & Chodera, 2008),
    https://arxiv.org/abs/0801.1426
    A theory of statistical models for Monte Carlo integration (Kong, McCullagh, Meng, Nicolae & Tan, 2003),
    https://doi.org/10.1111/1467-9868.00404
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from diffsampler.estimators import Estimate
from diffsampler.evidence.series import variance_of_mean
from diffsampler.evidence.thermodynamic import check_ladder

__all__ = ["MBAR", "mbar", "mbar_ladder"]

MAX_STEPS = 200
"""Newton steps before the equations are declared unsolvable; ten are usual."""


class MBAR(NamedTuple):
    """Normalizing constants relative to the first density's."""

    log_normalizer: Tensor
    """``log Z_k - log Z_0``, shape ``(K,)``, float64."""
    std_error: Tensor
    """Standard errors of those, shape ``(K,)``, autocorrelation included."""
    covariance: Tensor
    """Their covariance were all draws independent (delta method), shape ``(K, K)``."""


def mbar(log_density: Tensor, counts: Sequence[int]) -> MBAR:
    """Estimate ratios of normalizing constants.

    Arguments:
        log_density: Unnormalized log density ``k`` at pooled draw ``n``, shape ``(K, N)``; draws of the first density
            come first, then those of the second, each in the order they were made. ``-inf`` is allowed.
        counts: Number of draws of each density, ``K`` numbers of at least 8 that sum to ``N``.

    Raises:
        ValueError: If shapes disagree, values are NaN or infinite, or the densities do not overlap.
    """
    if log_density.ndim != 2 or len(counts) != log_density.shape[0] or sum(counts) != log_density.shape[1]:
        raise ValueError(
            "Expected log_density of shape (K, N) and K counts that sum to N; "
            f"got {tuple(log_density.shape)} and {tuple(counts)}."
        )
    if len(counts) < 2 or min(counts) < 8:
        raise ValueError(f"Expected at least 2 densities with at least 8 draws each; got counts {tuple(counts)}.")
    log_density = log_density.detach().double()
    if bool((log_density.isnan() | log_density.isposinf()).any()):
        raise ValueError("Expected log_density below infinity; got NaN or infinity.")
    log_z, influence = _solve(log_density, counts)
    pieces = torch.split(influence, list(counts), 1)
    variance = torch.stack([n**2 * variance_of_mean(s.unsqueeze(1)) for n, s in zip(counts, pieces, strict=True)])
    covariance = torch.stack([n * torch.cov(s) for n, s in zip(counts, pieces, strict=True)])
    return MBAR(log_z, variance.sum(0).sqrt(), covariance.sum(0))


def mbar_ladder(log_ratio: Tensor, betas: Tensor | Sequence[float]) -> Estimate:
    r"""``log Z`` at the last temperature of a ladder minus that at the first, from all rungs' draws together.

    Rungs need only :math:`D = \log\gamma_1 - \log\gamma_0`: the common factor :math:`\gamma_0` drops out.

    Arguments:
        log_ratio: ``D`` at draws from each temperature, ``(rungs, draws)`` or ``(rungs, chains, draws)``, in the order
            they were made. Chains of the same number may belong together across rungs, as replicas of one parallel
            tempering system do: the error is that of their joint influence.
        betas: Temperatures, increasing.

    Raises:
        ValueError: If the ladder cannot be used or its rungs do not overlap.
    """
    values, grid = check_ladder(log_ratio, betas)
    rungs, chains, draws = values.shape
    pooled = values.flatten()
    # No power of a vanishing density but the zeroth has mass.
    log_density = torch.where(grid[:, None] == 0.0, torch.zeros_like(pooled), grid[:, None] * pooled)
    log_z, influence = _solve(log_density, [chains * draws] * rungs)
    joint = influence[-1].reshape(rungs, chains, draws).sum(0) * (chains * draws)
    return Estimate(float(log_z[-1]), math.sqrt(float(variance_of_mean(joint))), "mbar")


def _solve(log_density: Tensor, counts: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Solution ``log Z_k - log Z_0 (K,)`` and the influence of each draw on it, ``(K, N)``, up to a constant."""
    count = torch.tensor(counts, dtype=torch.float64, device=log_density.device)
    log_count = count.log().unsqueeze(-1)
    if not bool(log_density.isfinite().any(0).all()):
        raise ValueError("Expected every draw to have a positive density under its own law; got -inf under all.")
    f = _start(log_density, counts)

    def objective(f: Tensor) -> tuple[Tensor, Tensor]:
        terms = log_density + f.unsqueeze(-1) + log_count
        total = torch.logsumexp(terms, 0)
        return total.sum() - (count * f).sum(), (terms - total).exp()

    value, p = objective(f)
    for _ in range(MAX_STEPS):
        mass = p.sum(1)
        gradient = (mass - count)[1:]
        if float(gradient.abs().max()) < 1e-9 * float(count.min()):
            break
        hessian = (torch.diag(mass) - p @ p.mT)[1:, 1:]
        direction = _newton(hessian, gradient)
        step = 1.0
        while True:
            trial = f.clone()
            trial[1:] -= step * direction
            new_value, new_p = objective(trial)
            if bool(new_value <= value + 1e-12 * value.abs()) or step < 1e-8:
                break
            step *= 0.5
        f, value, p = trial, new_value, new_p
    else:
        raise ValueError("Expected densities that overlap through one another; the equations have no solution.")
    hessian = (torch.diag(p.sum(1)) - p @ p.mT)[1:, 1:]
    influence = torch.zeros_like(p)
    # log Z = -f and df = -H^{-1} dg, so the sum of this over draws is the error of log Z.
    influence[1:] = torch.linalg.solve(hessian, p[1:])
    return -(f - f[0]), influence


def _newton(hessian: Tensor, gradient: Tensor) -> Tensor:
    direction, failed = torch.linalg.solve_ex(hessian, gradient)
    if int(failed) or not bool(direction.isfinite().all()):
        return gradient / hessian.diagonal().clamp_min(1e-300)
    return direction


def _start(log_density: Tensor, counts: Sequence[int]) -> Tensor:
    """First guess of ``f``: importance sampling from each density to the next."""
    f = log_density.new_zeros(len(counts))
    pieces = torch.split(log_density, list(counts), 1)
    for k in range(len(counts) - 1):
        ratio = pieces[k][k + 1] - pieces[k][k]
        log_mean = torch.logsumexp(ratio[~ratio.isnan()], 0) - math.log(counts[k])
        f[k + 1] = f[k] - (log_mean if bool(log_mean.isfinite()) else 0.0)
    return f
