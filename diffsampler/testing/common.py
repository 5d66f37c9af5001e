"""What the suites share: how they fail, and how they compare two sets of draws."""

from __future__ import annotations

import torch
from torch import Tensor

from diffsampler.space import Space, Torus

__all__ = ["FALSE_ALARM", "moments", "normal_quantile", "require", "require_same_law"]

FALSE_ALARM = 1e-6
"""Probability that one statistical check of a suite fails on a correct class (Gaussian limit, Bonferroni inside)."""


def require(condition: bool, message: str) -> None:  # noqa: FBT001
    """Raise AssertionError with the message unless the condition holds."""
    if not condition:
        raise AssertionError(message)


def normal_quantile(probability: float) -> float:
    """Two-sided limit that a standard normal variable exceeds with the given probability."""
    return -torch.special.ndtri(torch.tensor(0.5 * probability, dtype=torch.float64)).item()


def moments(space: Space, x: Tensor) -> Tensor:
    """Bounded or polynomial statistics ``(n, S)`` whose means identify a Gaussian."""
    z = space.features(x).double()
    return z if isinstance(space, Torus) else torch.cat([z, z.square()], -1)


def require_same_law(name: str, first: Tensor, second: Tensor) -> None:
    """Compare the means of two sets of statistics, each ``(n, S)``."""
    error = (first.var(0) / len(first) + second.var(0) / len(second)).sqrt()
    z = ((first.mean(0) - second.mean(0)).abs() - 1e-6 * (1.0 + first.mean(0).abs())).clamp_min(0.0) / (error + 1e-12)
    limit = normal_quantile(FALSE_ALARM / z.numel())
    require(
        z.max().item() < limit, f"{name}: moments differ by {z.max().item():.1f} standard errors (limit {limit:.1f})."
    )
