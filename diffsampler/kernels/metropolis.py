"""What Metropolis-Hastings kernels share: which proposals are broken, and who accepts."""

from __future__ import annotations

import torch
from torch import Tensor

from diffsampler.kernel import KernelParams, State
from diffsampler.space import MeanFree, Space

__all__ = ["columns", "decide", "is_broken", "kinetic", "metropolis", "scaled_columns", "select"]


def columns(params: KernelParams, like: Tensor) -> tuple[Tensor, Tensor]:
    """Step size ``(..., 1)`` and scale in the dtype of ``like``, so that float64 parameters never promote particles."""
    return params.step_size.to(like).unsqueeze(-1), params.scale.to(like)


def scaled_columns(space: Space, params: KernelParams, like: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`columns` after a look at whether the metric keeps particles on their space.

    Raises:
        ValueError: If the scale is not isotropic where only isotropic moves keep the centre of mass.
    """
    if isinstance(space, MeanFree) and params.scale.shape[-1] != 1:
        raise ValueError(f"Expected an isotropic scale of shape (1,) on {space}; got {tuple(params.scale.shape)}.")
    return columns(params, like)


def kinetic(velocity: Tensor) -> Tensor:
    """Kinetic energy of whitened velocities ``(..., D)``, shape ``(...)``, float64."""
    return 0.5 * velocity.square().sum(-1, dtype=torch.float64)


def is_broken(proposal: State) -> Tensor:
    """Where a proposal must be refused and reported, boolean, shape ``(...)``.

    Broken are a NaN or infinite density and a non-finite gradient of a finite density. A log density of ``-inf`` is
    none of these: it says that the point is outside the support, an ordinary rejection.
    """
    log_prob = proposal.log_prob
    gradient = log_prob.isfinite() & ~proposal.score.isfinite().all(-1)
    return log_prob.isnan() | log_prob.isposinf() | gradient


def select(mask: Tensor, new: State, old: State) -> State:
    """``new`` where ``mask (...)`` holds, else ``old``."""
    column = mask.unsqueeze(-1)
    velocity = new.velocity
    if velocity is not None and old.velocity is not None:
        velocity = torch.where(column, velocity, old.velocity)
    return State(
        torch.where(column, new.x, old.x),
        torch.where(mask, new.log_prob, old.log_prob),
        torch.where(column, new.score, old.score),
        velocity,
    )


def metropolis(
    state: State, proposal: State, log_accept: Tensor, *, broken: Tensor, generator: torch.Generator | None
) -> tuple[State, Tensor, Tensor]:
    r"""Accept each proposal with probability :math:`\min(1, e^{\ell})`.

    Arguments:
        state: Where the particles are.
        proposal: Where they would go.
        log_accept: The log ratio :math:`\ell` of the Metropolis-Hastings rule, shape ``(...)``, float64.
        broken: Proposals to refuse whatever their ratio, shape ``(...)``.
        generator: Source of randomness.

    Returns:
        The new state; the acceptance probability ``(...)``; and ``log_prob(x) - log_prob(x')`` ``(...)`` in float64,
        which is :math:`\log B(x|x') - \log F(x'|x)` of a reversible kernel taken as its own backward kernel.
    """
    uniform = torch.rand(log_accept.shape, generator=generator, dtype=log_accept.dtype, device=log_accept.device)
    return decide(state, proposal, log_accept, uniform, broken=broken)


def decide(
    state: State, proposal: State, log_accept: Tensor, uniform: Tensor, *, broken: Tensor
) -> tuple[State, Tensor, Tensor]:
    """:func:`metropolis` with its draws ``uniform (...)`` of the unit interval given."""
    # A NaN ratio (infinity minus infinity) comes from a point without density: nothing to accept.
    refused = broken | log_accept.isnan() | ~proposal.log_prob.isfinite()
    acceptance = torch.where(refused, torch.zeros_like(log_accept), log_accept.clamp_max(0.0).exp())
    accepted = uniform < acceptance
    log_ratio = state.log_prob.double() - proposal.log_prob.double()
    log_ratio = torch.where(accepted, log_ratio, torch.zeros_like(log_ratio))
    return select(accepted, proposal, state), acceptance, log_ratio
