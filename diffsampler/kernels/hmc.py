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

from typing import final

import torch
from torch import Tensor

from diffsampler.kernel import Info, Kernel, KernelParams, LogDensity, State
from diffsampler.kernels.metropolis import columns, is_broken, metropolis
from diffsampler.space import Space

__all__ = ["HMC", "leapfrog"]


def leapfrog(
    space: Space, state: State, velocity: Tensor, log_density: LogDensity, step: Tensor, *, num_steps: int
) -> tuple[State, Tensor, Tensor]:
    """Integrate ``num_steps`` leapfrog steps.

    Arguments:
        space: Where the particles live.
        state: Start, positions ``(..., D)``.
        velocity: Whitened velocities ``(..., D)``.
        log_density: The density that makes the force.
        step: Step size times scale, broadcastable to ``(..., D)``.
        num_steps: Number of steps.

    Returns:
        The end point, its velocities, and who left the numbers on the way, boolean ``(...)``; the lost stay at their
        start, so that no density is asked about a point that is not a number.
    """
    start = state.x
    lost = torch.zeros_like(state.log_prob, dtype=torch.bool).unsqueeze(-1)
    velocity = velocity + 0.5 * step * space.project_vector(state.score)
    for k in range(num_steps):
        x = space.project(state.x + step * velocity)
        # A sum is finite only if its terms are, at a third of the cost of asking each.
        lost = lost | ~x.sum(-1, keepdim=True).isfinite()
        x = torch.where(lost, start, x)
        state = State(x, *log_density(x))
        kick = 0.5 if k == num_steps - 1 else 1.0
        velocity = velocity + kick * step * space.project_vector(state.score)
    return state, velocity, lost.squeeze(-1)


@final
class HMC(Kernel):
    """Hamiltonian Monte Carlo; all chains take the same number of leapfrog steps, so none waits for another.

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
        num_steps = self.num_steps
        step, scale = columns(params, state.x)
        batch = tuple(state.log_prob.shape)
        device = state.x.device
        if self.jitter_steps:
            num_steps = int(torch.randint(1, num_steps + 1, (), generator=generator, device=device))
        if self.smallest_step < 1.0:
            uniform = torch.rand(batch, generator=generator, dtype=state.x.dtype, device=device)
            step = step * self.smallest_step ** uniform.square().unsqueeze(-1)
        step = step * scale
        velocity = self.space.noise(batch, like=state.x, generator=generator)
        proposal, end_velocity, lost = leapfrog(self.space, state, velocity, log_density, step, num_steps=num_steps)
        kinetic = 0.5 * (
            velocity.square().sum(-1, dtype=torch.float64) - end_velocity.square().sum(-1, dtype=torch.float64)
        )
        log_accept = proposal.log_prob.double() - state.log_prob.double() + kinetic
        broken = lost | is_broken(proposal)
        state, acceptance, log_ratio = metropolis(state, proposal, log_accept, broken=broken, generator=generator)
        return state, Info(log_ratio, acceptance, num_steps, broken)
