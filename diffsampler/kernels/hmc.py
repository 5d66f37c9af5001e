r"""Hamiltonian Monte Carlo for many chains at once.

In velocities whitened by the scale :math:`\sigma`, one leapfrog step of size :math:`\epsilon` is

.. math::
    v \leftarrow v + \tfrac{\epsilon}{2} \sigma s(x), \quad
    x \leftarrow x + \epsilon \sigma v, \quad
    v \leftarrow v + \tfrac{\epsilon}{2} \sigma s(x),

and the end point is accepted with probability :math:`\min(1, e^{H - H'})`, :math:`H = -\log\rho(x) + |v|^2 / 2`.

References:
    MCMC using Hamiltonian dynamics (Neal, 2011), https://arxiv.org/abs/1206.1901
    Optimal tuning of the hybrid Monte Carlo algorithm (Beskos et al., 2013), https://arxiv.org/abs/1001.4460
"""

from __future__ import annotations

import math
from typing import final

import torch
from torch import Tensor

from diffsampler.kernel import Info, Kernel, KernelParams, LogDensity, State
from diffsampler.kernels.compiled import evaluate, while_loop
from diffsampler.kernels.metropolis import columns, decide, is_broken, kinetic
from diffsampler.space import Space

__all__ = ["DIVERGENCE", "HMC", "leapfrog"]

DIVERGENCE = 1000.0
"""Loss of energy above which a trajectory is called divergent, as in Stan."""


def leapfrog(
    space: Space, state: State, velocity: Tensor, log_density: LogDensity, step: Tensor, *, num_steps: int | Tensor
) -> tuple[State, Tensor, Tensor]:
    """Integrate ``num_steps`` leapfrog steps, in one graph if the density is compiled.

    Arguments:
        space: Where the particles live.
        state: Start, positions ``(..., D)``.
        velocity: Whitened velocities ``(..., D)``.
        log_density: The density that makes the force.
        step: Step size times scale, broadcastable to ``(..., D)``.
        num_steps: Number of steps, at least 1.

    Returns:
        The end point, its velocities, and who left the numbers on the way, boolean ``(...)``; the lost stay at their
        start, so that no density is asked about a point that is not a number.
    """
    start = state.x

    def unfinished(k: Tensor, *_: Tensor) -> Tensor:
        return k < num_steps

    def body(
        k: Tensor, x: Tensor, _log_prob: Tensor, _score: Tensor, velocity: Tensor, lost: Tensor
    ) -> tuple[Tensor, ...]:
        x = space.project(x + step * velocity)
        # A sum is finite only if its terms are, at a third of the cost of asking each.
        lost = lost | ~x.sum(-1, keepdim=True).isfinite()
        x = torch.where(lost, start, x)
        log_prob, score = log_density(x)
        # Whole kicks: two half ones of neighbouring steps. The last is half taken back below.
        return k + 1, x, log_prob, score, velocity + step * space.project_vector(score), lost

    velocity = velocity + 0.5 * step * space.project_vector(state.score)
    none = torch.zeros_like(state.log_prob, dtype=torch.bool).unsqueeze(-1)
    first = torch.zeros((), dtype=torch.int64, device=start.device)
    carry = (first, start, state.log_prob, state.score, velocity, none)
    _, x, log_prob, score, velocity, lost = while_loop(unfinished, body, carry)
    velocity = velocity - 0.5 * step * space.project_vector(score)
    return State(x, log_prob, score), velocity, lost.squeeze(-1)


@final
class HMC(Kernel):
    """Hamiltonian Monte Carlo; all chains take the same number of leapfrog steps, so none waits for another.

    With ``KernelParams.length`` the trajectory has that length in whitened units, ``ceil(length / step_size)`` steps up
    to ``num_steps``, and whoever passes it varies it from transition to transition. Without, the number of steps is
    drawn from ``1 .. num_steps``.

    Arguments:
        space: Where the particles live.
        num_steps: Largest number of leapfrog steps.
        jitter_steps: Draw the number of steps uniformly from ``1 .. num_steps`` at each transition, which keeps
            trajectories from resonating with a period of the target.
        smallest_step: Each particle's step size is multiplied by ``smallest_step ** (u ** 2)``, ``u`` uniform: 1 for
            none, 0.15 to reach into necks that are narrower than the rest. The law is heaviest near 1.
    """

    exact = True
    target_acceptance = 0.651

    def __init__(
        self, space: Space, *, num_steps: int = 8, jitter_steps: bool = True, smallest_step: float = 1.0
    ) -> None:
        super().__init__(space)
        if num_steps < 1:
            raise ValueError(f"Expected num_steps to be a positive integer; got {num_steps}.")
        if not 0.0 < smallest_step <= 1.0:
            raise ValueError(f"Expected smallest_step in (0, 1]; got {smallest_step}.")
        self.num_steps = num_steps
        self.jitter_steps = jitter_steps
        self.smallest_step = smallest_step
        if smallest_step < 1.0:
            # A mixture of step sizes reaches further at a higher mean acceptance than its largest member would.
            self.target_acceptance = 0.75

    def step(
        self, state: State, log_density: LogDensity, params: KernelParams, generator: torch.Generator | None = None
    ) -> tuple[State, Info]:
        num_steps = self._draw_steps(params, state.x.device, generator)
        step, scale = columns(params, state.x)
        batch = tuple(state.log_prob.shape)
        if self.smallest_step < 1.0:
            uniform = torch.rand(batch, generator=generator, dtype=state.x.dtype, device=state.x.device)
            step = step * self.smallest_step ** uniform.square().unsqueeze(-1)
        velocity = self.space.noise(batch, like=state.x, generator=generator)
        uniform = torch.rand(batch, generator=generator, dtype=torch.float64, device=state.x.device)
        moved = evaluate(
            log_density,
            self._move,
            state.x,
            state.log_prob,
            state.score,
            velocity,
            step * scale,
            uniform,
            torch.tensor(num_steps, device=state.x.device),
        )
        acceptance, log_ratio, broken, diverged = moved[7:]
        info = Info(log_ratio, acceptance, num_steps, broken, proposal=State(*moved[3:7]), diverged=diverged)
        return State(*moved[:3]), info

    def _draw_steps(self, params: KernelParams, device: torch.device, generator: torch.Generator | None) -> int:
        if params.length is not None:
            # Particles with steps of their own share the number of steps that the mean of them needs.
            steps = float(params.length) / float(params.step_size.double().mean())
            return max(1, min(math.ceil(steps), self.num_steps)) if math.isfinite(steps) else self.num_steps
        if self.jitter_steps:
            return int(torch.randint(1, self.num_steps + 1, (), generator=generator, device=device))
        return self.num_steps

    def _move(
        self,
        log_density: LogDensity,
        x: Tensor,
        log_prob: Tensor,
        score: Tensor,
        velocity: Tensor,
        step: Tensor,
        uniform: Tensor,
        num_steps: Tensor,
    ) -> tuple[Tensor, ...]:
        """The transition without its draws: new state, proposal with velocities, acceptance, log ratio, flags."""
        state = State(x, log_prob, score)
        proposal, end_velocity, lost = leapfrog(self.space, state, velocity, log_density, step, num_steps=num_steps)
        log_accept = proposal.log_prob.double() - log_prob.double() + (kinetic(velocity) - kinetic(end_velocity))
        broken = lost | is_broken(proposal)
        diverged = lost | (log_accept < -DIVERGENCE) & proposal.log_prob.isfinite()
        new, acceptance, log_ratio = decide(state, proposal, log_accept, uniform, broken=broken)
        return (*new[:3], *proposal[:3], end_velocity, acceptance, log_ratio, broken, diverged)
