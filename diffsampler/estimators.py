r"""What follows from log weights.

With :math:`\log w_i` from formula (W) of :mod:`diffsampler.trajectory`, :math:`E[w] = Z` exactly. All functions take
log weights ``(n,)`` and reduce in float64 with a max shift.

References:
    Pareto Smoothed Importance Sampling (Vehtari, Simpson, Gelman, Yao, Gabry, 2024), https://arxiv.org/abs/1507.02646
    Beyond ELBOs: a large-scale evaluation of variational methods for sampling (Blessing et al., 2024),
    https://arxiv.org/abs/2406.07423 (EUBO, forward ESS)
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from pyro.ops.stats import fit_generalized_pareto
from torch import Tensor

__all__ = [
    "Estimate",
    "effective_sample_size",
    "elbo",
    "eubo",
    "expectation",
    "forward_effective_sample_size",
    "importance_log_normalizer",
    "log_mean_exp",
    "pareto_smooth",
    "replicate_log_normalizer",
    "systematic_resample",
]


class Estimate(NamedTuple):
    """A number with its standard error; ``kind`` says what it is, such as ``"importance"`` or ``"lower bound"``."""

    value: float
    std_error: float
    kind: str

    def __str__(self) -> str:
        return f"{self.value:.4f} +- {self.std_error:.4f}"


def log_mean_exp(log_weight: Tensor) -> float:
    r""":math:`\log \frac{1}{n} \sum_i w_i`."""
    log_weight = log_weight.double()
    return float(torch.logsumexp(log_weight, -1)) - math.log(log_weight.shape[-1])


def importance_log_normalizer(log_weight: Tensor) -> Estimate:
    r""":math:`\log \hat Z` from independent weights, standard error by the delta method."""
    log_weight = log_weight.double()
    value = log_mean_exp(log_weight)
    return Estimate(value, _relative_error_of_mean(log_weight - value), "importance")


def replicate_log_normalizer(log_z: Tensor) -> Estimate:
    r""":math:`\log \frac{1}{R} \sum_r \hat Z_r` of independent unbiased replicates ``(R,)``.

    The standard error is the spread of :math:`\hat Z_r` over replicates. It is the one to use wherever particles
    interact (resampling), because the delta method over single particles is then too small.
    """
    log_z = log_z.double()
    value = log_mean_exp(log_z)
    return Estimate(value, _relative_error_of_mean(log_z - value), "replicates")


def _relative_error_of_mean(log_ratio: Tensor) -> float:
    n = log_ratio.shape[-1]
    if n < 2:
        return math.inf
    return float(log_ratio.exp().std() / math.sqrt(n))


def elbo(log_weight: Tensor) -> Estimate:
    r"""Evidence lower bound :math:`E_F[\log w] \le \log Z` from forward trajectories."""
    return _mean(log_weight, "lower bound")


def eubo(log_weight: Tensor) -> Estimate:
    r"""Evidence upper bound :math:`E_B[\log w] \ge \log Z` from backward trajectories of exact target samples."""
    return _mean(log_weight, "upper bound")


def _mean(log_weight: Tensor, kind: str) -> Estimate:
    log_weight = log_weight.double()
    n = log_weight.shape[-1]
    error = float(log_weight.std() / math.sqrt(n)) if n > 1 else math.inf
    return Estimate(float(log_weight.mean()), error, kind)


def effective_sample_size(log_weight: Tensor) -> float:
    r"""Reverse effective sample size :math:`(\sum w)^2 / \sum w^2`, a count in :math:`[1, n]`.

    It cannot see a mode that no particle visited.
    """
    log_weight = log_weight.double()
    return float(torch.exp(2.0 * torch.logsumexp(log_weight, -1) - torch.logsumexp(2.0 * log_weight, -1)))


def forward_effective_sample_size(log_weight: Tensor, log_normalizer: float) -> float:
    r"""Forward effective sample size as a fraction, :math:`1 / E_B[w / Z]`, from backward trajectories.

    Unlike the reverse ESS it falls to zero when the sampler misses a mode that the exact samples contain.
    """
    return math.exp(log_normalizer - log_mean_exp(log_weight))


def expectation(values: Tensor, log_weight: Tensor) -> tuple[Tensor, Tensor]:
    r"""Self-normalized weighted mean over the first axis and its Monte Carlo standard error.

    .. math:: \hat\mu = \sum_i W_i f_i, \qquad \mathrm{mcse}^2 = \sum_i W_i^2 (f_i - \hat\mu)^2

    Arguments:
        values: Function values, shape ``(n, *event)``.
        log_weight: Log weights, shape ``(n,)``.

    Returns:
        The mean and the standard error, each of shape ``event``.
    """
    weight = torch.softmax(log_weight.double(), 0).reshape(-1, *[1] * (values.ndim - 1))
    values = values.double()
    mean = (weight * values).sum(0)
    return mean, (weight.square() * (values - mean).square()).sum(0).sqrt()


def pareto_smooth(log_weight: Tensor) -> tuple[Tensor, float]:
    r"""Pareto-smoothed log weights and the tail shape :math:`\hat k`.

    The largest :math:`M = \min(n/5, 3\sqrt n)` weights are replaced by the order statistics of the generalized Pareto
    law fitted to them, truncated at the largest raw weight. Importance sampling is reliable while :math:`\hat k < 0.7`.

    Arguments:
        log_weight: Log weights, shape ``(n,)``.

    Returns:
        Smoothed log weights ``(n,)`` in the given order, on the given scale, and :math:`\hat k` (infinite when the tail
        holds fewer than five weights that count, minus infinity when it holds fewer than five different ones).
    """
    log_weight = log_weight.double()
    # Impossible particles are no part of the tail: they must not come back with the weight of a quantile.
    n = int((log_weight > -math.inf).sum())
    size = int(min(0.2 * n, 3.0 * math.sqrt(n)))
    if size < 5:
        return log_weight, math.inf
    top = log_weight.max()
    ordered, order = (log_weight - top).sort()
    cutoff = ordered[-size - 1].exp()
    tail = ordered[-size:].exp() - cutoff
    if float(tail[-1]) <= 1e-12 or torch.unique(ordered[-size:]).numel() < 5:
        # A handful of tied values, as resampling leaves behind, is no tail that a continuous law could be fitted to.
        return log_weight, -math.inf
    if int((tail > 1e-200).sum()) < 5:
        # A few weights outdo the others by more than numbers can say.
        return log_weight, math.inf
    # Ties with the cutoff have no excess; the fit needs positive values.
    k, sigma = fit_generalized_pareto(tail.clamp_min(1e-300).cpu())
    if not math.isfinite(k):
        return log_weight, math.inf
    p = (torch.arange(size, dtype=torch.float64, device=log_weight.device) + 0.5) / size
    quantile = -sigma * torch.log1p(-p) if abs(k) < 1e-12 else sigma * torch.expm1(-k * torch.log1p(-p)) / k
    ordered[-size:] = (quantile + cutoff).log().clamp_max(0.0)
    smoothed = torch.empty_like(ordered)
    smoothed[order] = ordered
    return smoothed + top, float(k)


def systematic_resample(
    log_weight: Tensor, n: int | None = None, *, generator: torch.Generator | None = None
) -> Tensor:
    """Systematic resampling: indices ``(..., n)`` such that index i appears ``n W_i`` times up to rounding.

    Arguments:
        log_weight: Log weights, shape ``(..., m)``; each row is resampled by itself with its own uniform draw.
        n: Number of draws per row, ``m`` by default.
        generator: Source of randomness.
    """
    weight = torch.softmax(log_weight.double(), -1)
    n = weight.shape[-1] if n is None else n
    shape = (*weight.shape[:-1], 1)
    start = torch.rand(shape, generator=generator, dtype=torch.float64, device=weight.device)
    points = (torch.arange(n, dtype=torch.float64, device=weight.device) + start) / n
    cumulative = weight.cumsum(-1)
    cumulative = cumulative / cumulative[..., -1:]
    # The last point can meet 1 by rounding; searchsorted would then step outside.
    return torch.searchsorted(cumulative, points.contiguous(), right=True).clamp_max(weight.shape[-1] - 1)
