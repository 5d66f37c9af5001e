r"""Standard errors of means over Markov chains.

For ``M`` chains of ``N`` draws of a scalar, with within-chain variance :math:`W` and between-chain variance
:math:`B / N`,

.. math::
    \mathrm{var}^+ = \tfrac{N-1}{N} W + \tfrac{B}{N}, \qquad
    \hat\rho_t = 1 - \frac{W - \overline{c_t}}{\mathrm{var}^+}, \qquad
    \hat\tau = -1 + 2 \sum_{t' } \hat P_{t'}, \quad \hat P_{t'} = \hat\rho_{2t'} + \hat\rho_{2t'+1},

the sum over the initial positive, monotone sequence, and the variance of the mean is
:math:`\mathrm{var}^+ \hat\tau / (MN)`. Chains that disagree keep :math:`\hat\rho_t` from falling, so the error grows.

References:
    Practical Markov chain Monte Carlo (Geyer, 1992), https://doi.org/10.1214/ss/1177011137
    Rank-normalization, folding, and localization (Vehtari, Gelman, Simpson, Carpenter, Buerkner, 2021),
    https://arxiv.org/abs/1903.08008
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["as_chains", "effective_size", "split_r_hat", "variance_of_mean"]


def as_chains(name: str, values: Tensor, *, event: int) -> Tensor:
    """Bring draws ``(draws, *event)`` or ``(chains, draws, *event)`` to the second form, in float64.

    Arguments:
        name: What to call the tensor in an error.
        values: The draws.
        event: Number of event axes.

    Raises:
        TypeError: If it is not a floating-point tensor.
        ValueError: If axes are missing, a chain has fewer than 8 draws, or a value is not finite.
    """
    if not isinstance(values, Tensor) or not values.is_floating_point():
        got = values.dtype if isinstance(values, Tensor) else type(values).__name__
        raise TypeError(f"Expected {name} to be a floating-point tensor; got {got}.")
    if values.ndim == event + 1:
        values = values.unsqueeze(0)
    tail = "".join(", D" for _ in range(event))
    if values.ndim != event + 2:
        raise ValueError(f"Expected {name} of shape (draws{tail}) or (chains, draws{tail}); got {tuple(values.shape)}.")
    if values.shape[1] < 8:
        raise ValueError(f"Expected at least 8 draws per chain in {name}; got {values.shape[1]}.")
    if bool(values.isnan().any()) or (event and not bool(values.isfinite().all())):
        raise ValueError(f"Expected {name} without non-finite values; remove them first and say so.")
    return values.detach().double()


def _pooled_variance(values: Tensor) -> tuple[Tensor, Tensor]:
    r"""Within-chain variance and :math:`\mathrm{var}^+` of ``(..., chains, draws)``, each ``(...)``."""
    chains, draws = values.shape[-2:]
    within = values.var(-1).mean(-1)
    pooled = within * (draws - 1) / draws
    if chains > 1:
        pooled = pooled + values.mean(-1).var(-1)
    return within, pooled


def _time(values: Tensor) -> tuple[Tensor, Tensor]:
    """Autocorrelation time and pooled variance of ``(..., chains, draws)``, each ``(...)``."""
    draws = values.shape[-1]
    within, pooled = _pooled_variance(values)
    centred = values - values.mean(-1, keepdim=True)
    spectrum = torch.fft.rfft(centred, 2 * draws)
    covariance = torch.fft.irfft(spectrum.abs().square(), 2 * draws)[..., :draws].mean(-2) / (draws - 1)
    safe = torch.where(pooled > 0.0, pooled, torch.ones_like(pooled)).unsqueeze(-1)
    rho = 1.0 - (within.unsqueeze(-1) - covariance) / safe
    rho[..., 0] = 1.0
    even = 2 * (draws // 2)
    pairs = rho[..., :even].unflatten(-1, (-1, 2)).sum(-1)
    alive = (pairs > 0.0).to(pairs).cumprod(-1)
    monotone = torch.cummin(pairs, -1).values * alive
    tau = 2.0 * monotone.sum(-1) - 1.0
    # Antithetic draws may beat independent ones, but no estimate of that from a finite chain deserves more credit.
    return tau.clamp_min(1.0 / max(math.log10(draws), 1.0)), pooled


def variance_of_mean(values: Tensor) -> Tensor:
    """Variance of the grand mean of ``(..., chains, draws)``, shape ``(...)``."""
    tau, pooled = _time(values)
    return pooled * tau / (values.shape[-2] * values.shape[-1])


def effective_size(values: Tensor) -> Tensor:
    """Effective number of independent draws in ``(..., chains, draws)``, shape ``(...)``."""
    return values.shape[-2] * values.shape[-1] / _time(values)[0]


def split_r_hat(values: Tensor) -> Tensor:
    r"""Potential scale reduction :math:`\sqrt{\mathrm{var}^+ / W}` of half chains, ``(..., chains, draws) -> (...)``.

    Infinite where chains stand still at different values, 1 where all values are equal.
    """
    half = values.shape[-1] // 2
    within, pooled = _pooled_variance(torch.cat([values[..., :half], values[..., -half:]], -2))
    return torch.where(pooled > 0.0, (pooled / within).sqrt(), torch.ones_like(pooled))
