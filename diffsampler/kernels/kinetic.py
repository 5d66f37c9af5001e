r"""Kinetic (underdamped) Langevin by splitting: OBABO, BAOAB, and generalized HMC.

In velocities :math:`v` whitened by the scale :math:`\sigma`, with step size :math:`h`, friction :math:`\gamma` and
score :math:`s`, a step is composed of

.. math::
    \mathrm{A}(h):\ x \leftarrow x + h \sigma v, \qquad
    \mathrm{B}(h):\ v \leftarrow v + h \sigma s(x), \qquad
    \mathrm{O}(h):\ v \leftarrow e^{-\gamma h} v + \sqrt{1 - e^{-2 \gamma h}}\, \xi .

A and B keep volume and O keeps :math:`N(0, I)` reversible, so the path weight of a step is the kinetic energy that A
and B bring in: ``Info.log_ratio`` is :math:`\sum (|v|^2 - |v'|^2) / 2` over the moves that are not O. A refused
particle stays and turns around, so that the step run backwards with velocities reversed refuses it just as often.

One evaluation a step. The friction is one over ``KernelParams.length`` if that is given, the time over which velocities
decohere, and the constructor's otherwise; in whitened coordinates 1 is near critical.

References:
    Rational construction of stochastic numerical methods for molecular sampling (Leimkuhler & Matthews, 2013),
    https://arxiv.org/abs/1203.5428 (BAOAB)
    Accurate sampling using Langevin dynamics (Bussi & Parrinello, 2007), https://arxiv.org/abs/0803.4083 (OBABO)
    A generalized guided Monte Carlo algorithm (Horowitz, 1991), https://doi.org/10.1016/0370-2693(91)90812-5
    MCMC variational inference via uncorrected Hamiltonian annealing
    (Geffner & Domke, 2021), https://arxiv.org/abs/2107.04150 (path weight)
"""

from __future__ import annotations

import math
from typing import final

import torch
from torch import Tensor

from diffsampler.kernel import Info, Kernel, KernelParams, LogDensity, State
from diffsampler.kernels.hmc import leapfrog
from diffsampler.kernels.metropolis import is_broken, kinetic, metropolis, scaled_columns, select
from diffsampler.space import Space

__all__ = ["BAOAB", "GHMC", "OBABO", "KineticKernel"]


class KineticKernel(Kernel):
    """A kernel that keeps velocities from step to step.

    Arguments:
        space: Where the particles live.
        friction: Rate at which velocities decohere where ``KernelParams.length`` is None; positive.
    """

    def __init__(self, space: Space, *, friction: float = 1.0) -> None:
        super().__init__(space)
        if not 0.0 < friction < math.inf:
            raise ValueError(f"Expected friction to be positive; got {friction}.")
        self.friction = friction

    def refresh(self, state: State, *, generator: torch.Generator | None = None) -> State:
        """Draw velocities from the standard Gaussian law."""
        batch = tuple(state.log_prob.shape)
        return state._replace(velocity=self.space.noise(batch, like=state.x, generator=generator))

    def decay(self, params: KernelParams, step: Tensor) -> Tensor:
        r"""The product :math:`\gamma h`, shape of ``step``."""
        if params.length is None:
            return self.friction * step
        return step / params.length.to(step).unsqueeze(-1)

    def partial_refresh(self, velocity: Tensor, decay: Tensor, generator: torch.Generator | None) -> Tensor:
        r"""The O step over :math:`\gamma h =` ``decay``; keeps the standard Gaussian law reversible."""
        noise = self.space.noise(tuple(velocity.shape[:-1]), like=velocity, generator=generator)
        return torch.exp(-decay) * velocity + torch.sqrt(-torch.expm1(-2.0 * decay)) * noise


def velocity_of(state: State) -> Tensor:
    """The velocities that a kinetic kernel needs.

    Raises:
        ValueError: If the state has none.
    """
    if state.velocity is None:
        raise ValueError("Expected a state with velocities; got None. Make it by the kernel's init or refresh.")
    return state.velocity


def take_or_turn(state: State, proposal: State, velocity: Tensor, refused: Tensor) -> State:
    """The proposal, or where ``refused (...)`` the old position with ``velocity`` reversed."""
    new = select(~refused, proposal, state._replace(velocity=None))
    return new._replace(velocity=torch.where(refused.unsqueeze(-1), -velocity, velocity_of(proposal)))


@final
class OBABO(KineticKernel):
    r"""Uncorrected kinetic Langevin: half O, one leapfrog step BAB, half O. **Biased**: no proposal is weighed.

    On :math:`N(0, 1)` the stationary variances are :math:`1 / (1 - h^2/4)` of positions and 1 of velocities, whatever
    the friction. Its path weight makes uncorrected Hamiltonian annealing.
    """

    exact = False
    target_acceptance = 1.0

    def step(
        self, state: State, log_density: LogDensity, params: KernelParams, generator: torch.Generator | None = None
    ) -> tuple[State, Info]:
        step, scale = scaled_columns(self.space, params, state.x)
        decay = 0.5 * self.decay(params, step)
        velocity = self.partial_refresh(velocity_of(state), decay, generator)
        proposal, end, lost = leapfrog(self.space, state, velocity, log_density, step * scale, num_steps=1)
        broken = lost | is_broken(proposal)
        refused = broken | ~proposal.log_prob.isfinite()
        log_ratio = kinetic(velocity) - kinetic(end)
        log_ratio = torch.where(refused, torch.zeros_like(log_ratio), log_ratio)
        state = take_or_turn(state, proposal._replace(velocity=end), velocity, refused)
        state = state._replace(velocity=self.partial_refresh(velocity_of(state), decay, generator))
        return state, Info(log_ratio, torch.ones_like(log_ratio), 1, broken)


@final
class BAOAB(KineticKernel):
    r"""Uncorrected kinetic Langevin with the O step in the middle. **Biased**, but very little in positions.

    On :math:`N(0, 1)` positions have variance exactly 1 at every stable step size and velocities
    :math:`1 - h^2/4`; elsewhere the bias of positions is :math:`O(h^2)`, and :math:`O(h^4)` at high friction.
    """

    exact = False
    target_acceptance = 1.0

    def step(
        self, state: State, log_density: LogDensity, params: KernelParams, generator: torch.Generator | None = None
    ) -> tuple[State, Info]:
        space, start = self.space, velocity_of(state)
        step, scale = scaled_columns(space, params, state.x)
        half = 0.5 * step * scale
        before = start + half * space.project_vector(state.score)
        after = self.partial_refresh(before, self.decay(params, step), generator)
        x = space.project(state.x + half * (before + after))
        lost = ~x.isfinite().all(-1)
        x = torch.where(lost.unsqueeze(-1), state.x, x)
        proposal = State(x, *log_density(x))
        end = after + half * space.project_vector(proposal.score)
        broken = lost | is_broken(proposal)
        refused = broken | ~proposal.log_prob.isfinite()
        log_ratio = kinetic(start) - kinetic(before) + kinetic(after) - kinetic(end)
        log_ratio = torch.where(refused, torch.zeros_like(log_ratio), log_ratio)
        state = take_or_turn(state, proposal._replace(velocity=end), start, refused)
        return state, Info(log_ratio, torch.ones_like(log_ratio), 1, broken)


@final
class GHMC(KineticKernel):
    r"""Generalized HMC: the leapfrog step of :class:`OBABO`, accepted with probability :math:`\min(1, e^{H - H'})`.

    Exact. A refused particle turns around; without that the law would not stay, and with it momentum is lost at every
    refusal, so that step sizes should be small enough for refusals to be rare.

    Not reversible: :math:`\pi(x) N(v)` is invariant, and the kernel run backwards is itself with velocities reversed.
    """

    exact = True
    target_acceptance = 0.9

    def step(
        self, state: State, log_density: LogDensity, params: KernelParams, generator: torch.Generator | None = None
    ) -> tuple[State, Info]:
        step, scale = scaled_columns(self.space, params, state.x)
        decay = 0.5 * self.decay(params, step)
        velocity = self.partial_refresh(velocity_of(state), decay, generator)
        proposal, end, lost = leapfrog(self.space, state, velocity, log_density, step * scale, num_steps=1)
        broken = lost | is_broken(proposal)
        log_accept = proposal.log_prob.double() - state.log_prob.double() + kinetic(velocity) - kinetic(end)
        state, acceptance, log_ratio = metropolis(
            state._replace(velocity=-velocity),
            proposal._replace(velocity=end),
            log_accept,
            broken=broken,
            generator=generator,
        )
        state = state._replace(velocity=self.partial_refresh(velocity_of(state), decay, generator))
        return state, Info(log_ratio, acceptance, 1, broken)
