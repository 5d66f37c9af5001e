r"""What the chains along a geometric path share: the path from prior to target, and where its temperatures start.

.. math:: \log\pi_\beta = \beta \log\rho + (1 - \beta) \log p_0

A mode of variance :math:`s^2` has variance :math:`s^2 / \beta` while annealed. Temperatures spaced evenly in
:math:`\log\beta` shrink it at an even pace, and steps in proportion to its scale are stable and still mix within it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from diffsampler.priors import Prior, default_prior
from diffsampler.space import Space

__all__ = ["annealed_score", "checked_prior", "initial_path", "num_scales", "regrid", "regrid_increments"]


def checked_prior(space: Space, prior: Prior | None, scale: float, local_scale: float, *, learn: bool = True) -> Prior:
    """The given prior, or the default one of the given scale.

    Raises:
        ValueError: If a scale is out of range, or the prior lives elsewhere.
    """
    if not scale > 0.0:
        raise ValueError(f"Expected scale > 0; got {scale}.")
    if not 0.0 < local_scale <= 1.0:
        raise ValueError(f"Expected local_scale in (0, 1]; got {local_scale}.")
    if prior is not None and prior.space != space:
        raise ValueError(f"Expected a prior on {space}; got one on {prior.space}.")
    return default_prior(space, scale, learn=learn) if prior is None else prior


def initial_path(num_steps: int, local_scale: float) -> tuple[Tensor, Tensor]:
    r"""Rising inverse temperatures, ``K + 1`` of them with :math:`\beta = 1` last, and the variance of modes there.

    Arguments:
        num_steps: Number of steps ``K``.
        local_scale: Smallest scale of the target relative to the prior's.

    Returns:
        The temperatures, and at each the smallest variance of a mode relative to the prior's, both float64.
    """
    first = min(local_scale**2, 1.0 / (num_steps + 1))
    beta = torch.logspace(math.log10(first), 0.0, num_steps + 1, dtype=torch.float64)
    return beta, (local_scale**2 / beta).clamp_max(1.0)


def annealed_score(prior: Prior, beta: Tensor, x: Tensor, score: Tensor) -> Tensor:
    r"""Score of :math:`\pi_\beta` at ``x (..., D)``, from the target's score there; ``beta`` of shape ``(..., 1)``."""
    return beta * score + (1.0 - beta) * prior.score(x)


def num_scales(space: Space) -> int:
    """Length of a vector of scales: one for mean-free particles, which have no coordinates of their own."""
    return space.dim if space.dof == space.dim else 1


def regrid(table: Tensor, num_steps: int) -> Tensor:
    """A table ``(K, ...)`` over the middles of ``K`` steps, interpolated linearly for ``num_steps`` of them."""
    if len(table) == 1:
        return table.repeat(num_steps, *[1] * (table.ndim - 1))
    place = ((torch.arange(num_steps, device=table.device) + 0.5) * len(table) / num_steps - 0.5).double()
    low = place.floor().clamp(0, len(table) - 2).long()
    share = (place - low).to(table).reshape(-1, *[1] * (table.ndim - 1))
    return torch.lerp(table[low], table[low + 1], share)


def regrid_increments(increments: Tensor, num_steps: int) -> Tensor:
    """Logits of temperature increments for another number of steps: the same path, linear in log temperature."""
    log_beta = torch.log_softmax(increments.double(), 0).logcumsumexp(0)
    beta = regrid(log_beta, num_steps).exp()
    return beta.diff(prepend=beta.new_zeros(1)).log().to(increments)
