r"""Noise schedules: how a chain from the target back to its prior adds noise.

A :class:`NoiseSchedule` fixes the linear Gaussian noising chain :math:`x_k = a_k x_{k+1} + \sqrt{v_k}\,\xi` from data
(:math:`k = K`) to noise (:math:`k = 0`), in units where the data have unit scale. Accumulated from the data,
:math:`x_k = A_k x_K + \sqrt{V_k}\,\xi` with

.. math:: A_k = \prod_{j \ge k} a_j, \qquad V_k = a_k^2 V_{k+1} + v_k, \qquad A_K = 1,\ V_K = 0.

References:
    Score-Based Generative Modeling through SDEs (Song et al., 2021), https://arxiv.org/abs/2011.13456 (VP, VE)
    Denoising Diffusion Samplers (Vargas, Grathwohl, Doucet, 2023), https://arxiv.org/abs/2302.13834 (cosine steps)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "NoiseSchedule",
    "chosen_schedule",
    "cosine_preserving",
    "exploding_levels",
    "variance_exploding",
    "variance_preserving",
]

DEFAULT_STEPS = 64


class NoiseSchedule(NamedTuple):
    """A noising chain of ``K`` steps, all tensors float64."""

    contraction: Tensor
    """``a_k``, shape ``(K,)``."""
    variance: Tensor
    """``v_k``, shape ``(K,)``."""
    total_contraction: Tensor
    """``A_k``, shape ``(K + 1,)``."""
    total_variance: Tensor
    """``V_k``, shape ``(K + 1,)``."""


def _accumulate(contraction: Tensor, variance: Tensor) -> NoiseSchedule:
    total_a, total_v = [torch.ones((), dtype=torch.float64)], [torch.zeros((), dtype=torch.float64)]
    for a, v in zip(contraction.flip(0), variance.flip(0), strict=True):
        total_a.append(total_a[-1] * a)
        total_v.append(a.square() * total_v[-1] + v)
    return NoiseSchedule(contraction, variance, torch.stack(total_a).flip(0), torch.stack(total_v).flip(0))


def _check_steps(num_steps: int) -> None:
    if num_steps < 1:
        raise ValueError(f"Expected num_steps >= 1; got {num_steps}.")


def variance_preserving(num_steps: int, *, beta_min: float = 0.1, beta_max: float = 10.0) -> NoiseSchedule:
    r"""Ornstein-Uhlenbeck noising with exact kernels, :math:`a_k = e^{-\beta(t_k)/(2K)}`, :math:`v_k = 1 - a_k^2`.

    The rate falls linearly from ``beta_max`` at the noise end to ``beta_min`` at the data end.
    """
    _check_steps(num_steps)
    middle = (torch.arange(num_steps, dtype=torch.float64) + 0.5) / num_steps
    beta = beta_max + (beta_min - beta_max) * middle
    return _accumulate(torch.exp(-0.5 * beta / num_steps), -torch.expm1(-beta / num_steps))


def cosine_preserving(num_steps: int, *, total: float = 5.0) -> NoiseSchedule:
    r"""Ornstein-Uhlenbeck noising whose rate falls as :math:`\cos^4`, with :math:`\sum_k \beta_k = ` ``total``."""
    _check_steps(num_steps)
    middle = (torch.arange(num_steps, dtype=torch.float64) + 0.5) / num_steps
    rate = torch.cos(0.5 * math.pi * middle).pow(4)
    # The last steps would have no noise at all; a floor keeps every kernel a density.
    rate = rate + 1e-3
    beta = total * rate / rate.sum()
    return _accumulate(torch.exp(-0.5 * beta), -torch.expm1(-beta))


def variance_exploding(num_steps: int, *, noise_min: float = 0.03, noise_max: float = 2.5) -> NoiseSchedule:
    r"""Brownian noising, :math:`a_k = 1`, levels :math:`\sqrt{V_k}` log-uniform from ``noise_max`` to ``noise_min``."""
    _check_steps(num_steps)
    if not 0.0 < noise_min < noise_max:
        raise ValueError(f"Expected 0 < noise_min < noise_max; got {noise_min} and {noise_max}.")
    return exploding_levels(
        torch.logspace(math.log10(noise_max), math.log10(noise_min), num_steps, dtype=torch.float64)
    )


def exploding_levels(levels: Tensor) -> NoiseSchedule:
    r"""Brownian noising with given levels :math:`\sqrt{V_0} > \dots > \sqrt{V_{K-1}} > 0`, shape ``(K,)``."""
    levels = levels.double()
    if levels.ndim != 1 or not bool((levels > 0.0).all() and (levels.diff() < 0.0).all()):
        raise ValueError(f"Expected falling positive levels of shape (K,); got {levels.tolist()}.")
    total = torch.cat([levels, levels.new_zeros(1)]).square()
    ones = torch.ones(len(levels), dtype=torch.float64)
    return NoiseSchedule(ones, total[:-1] - total[1:], torch.ones(len(levels) + 1, dtype=torch.float64), total)


def chosen_schedule(
    schedule: NoiseSchedule | None, num_steps: int | None, default: Callable[[int], NoiseSchedule]
) -> NoiseSchedule:
    """The given schedule, or the default one of ``num_steps`` steps (64 unless given).

    Raises:
        ValueError: If both are given and do not agree.
    """
    if schedule is None:
        return default(DEFAULT_STEPS if num_steps is None else num_steps)
    length = len(schedule.variance)
    if num_steps is not None and num_steps != length:
        raise ValueError(f"Expected num_steps={length}, the length of the schedule, or none; got {num_steps}.")
    return schedule
