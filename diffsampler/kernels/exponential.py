r"""Kinetic Langevin by exponential integrators: the force is frozen and everything else is solved exactly.

In velocities whitened by the scale :math:`\sigma`, with step size :math:`h`, friction :math:`\gamma` and
:math:`t = \gamma h`, the equation :math:`dx = \sigma v\, dt,\ dv = (\sigma s - \gamma v)\, dt + \sqrt{2\gamma}\, dW`
with constant :math:`s` moves by

.. math::
    v' = e^{-t} v + h a_1 \sigma s + n_v, \qquad
    x' = x + \sigma (h a_1 v + h^2 a_2 \sigma s + h n_x),

.. math::
    a_1 = (1 - e^{-t}) / t, \quad a_2 = (1 - a_1) / t, \quad
    \mathrm{Var}\, n_v = 1 - e^{-2t}, \quad \mathrm{Var}\, n_x = 2 a_2 - a_1^2, \quad
    \mathrm{Cov}(n_x, n_v) = (1 - e^{-t}) a_1 .

References:
    Underdamped Langevin MCMC: a non-asymptotic analysis (Cheng, Chatterji, Bartlett & Jordan, 2018),
    https://arxiv.org/abs/1707.03663 (KLMC)
    On sampling from a log-concave density using kinetic Langevin diffusions (Dalalyan & Riou-Durand, 2020),
    https://arxiv.org/abs/1807.09382 (KLMC)
    The randomized midpoint method for log-concave sampling (Shen & Lee, 2019), https://arxiv.org/abs/1909.05503
"""

from __future__ import annotations

import math
from typing import NamedTuple, final

import torch
from torch import Tensor

from diffsampler.kernel import Info, KernelParams, LogDensity, State
from diffsampler.kernels.kinetic import KineticKernel, take_or_turn, velocity_of
from diffsampler.kernels.metropolis import is_broken, kinetic, scaled_columns
from diffsampler.space import Space

__all__ = ["KLMC", "RMKLMC"]

SERIES_BELOW = 0.01


class _Flow(NamedTuple):
    """Coefficients of the exact solution over one step, all of the shape of the step."""

    keep: Tensor
    """What is left of a velocity."""
    drift: Tensor
    """``a_1``."""
    force: Tensor
    """``a_2``."""
    std: Tensor
    """Standard deviation of the velocity's noise."""
    slope: Tensor
    """Regression of the position's noise on the velocity's unit noise."""
    rest: Tensor
    """Standard deviation of what the regression leaves."""


def _flow(decay: Tensor, dtype: torch.dtype) -> _Flow:
    """Coefficients for ``t = decay``; in float64, and by series where differences would lose their digits."""
    t = decay.double()
    small = t < SERIES_BELOW
    safe = torch.where(small, torch.ones_like(t), t)
    lost = -torch.expm1(-t)
    drift = torch.where(small, 1 - t / 2 * (1 - t / 3 * (1 - t / 4 * (1 - t / 5))), lost / safe)
    force = torch.where(small, 0.5 - t / 6 * (1 - t / 4 * (1 - t / 5 * (1 - t / 6))), (1.0 - drift) / safe)
    series = t * (2 / 3 - t * (1 / 2 - t * (7 / 30 - t * (1 / 12 - t * 31 / 1260))))
    variance = torch.where(small, series, 2.0 * force - drift.square())
    slope = drift * (lost / (2.0 - lost)).sqrt()
    rest = (variance - slope.square()).sqrt()
    parts = (torch.exp(-t), drift, force, (lost * (2.0 - lost)).sqrt(), slope, rest)
    return _Flow(*(part.to(dtype) for part in parts))


def _noise(space: Space, flow: _Flow, like: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor, Tensor]:
    """Noise of the position and of the velocity, ``(..., D)`` each, and the squared norm of what made it, float64."""
    batch = tuple(like.shape[:-1])
    first = space.noise(batch, like=like, generator=generator)
    second = space.noise(batch, like=like, generator=generator)
    return flow.slope * first + flow.rest * second, flow.std * first, kinetic(first) + kinetic(second)


@final
class KLMC(KineticKernel):
    r"""Kinetic Langevin Monte Carlo, one evaluation a step. **Biased**, as much as ULA: :math:`O(h)`.

    On :math:`N(0, 1)` at :math:`\gamma = 1` the stationary variance of positions is 1.111, 1.325, 1.865 at
    :math:`h = 0.2, 0.5, 1`. The two Gaussian noises make the joint transition density of position and velocity
    tractable, and with the same kernel run backwards with velocities reversed the exact path weight.
    """

    exact = False
    target_acceptance = 1.0

    def step(
        self, state: State, log_density: LogDensity, params: KernelParams, generator: torch.Generator | None = None
    ) -> tuple[State, Info]:
        space, velocity = self.space, velocity_of(state)
        step, scale = scaled_columns(space, params, state.x)
        flow = _flow(self.decay(params, step), state.x.dtype)
        kick = step * scale * space.project_vector(state.score)
        noise_x, noise_v, forward = _noise(space, flow, state.x, generator)
        # In units of the step; the reverse step is read off in these differences and not off positions.
        move = flow.drift * velocity + flow.force * kick + noise_x
        end = flow.keep * velocity + flow.drift * kick + noise_v
        x = space.project(state.x + step * scale * move)
        lost = ~x.isfinite().all(-1)
        x = torch.where(lost.unsqueeze(-1), state.x, x)
        proposal = State(x, *log_density(x), velocity=end)
        kick = step * scale * space.project_vector(proposal.score)
        # Noise that would bring the reversed velocity and the position back.
        back_v = flow.keep * end - velocity - flow.drift * kick
        back_x = flow.drift * end - move - flow.force * kick
        still = step == 0.0
        first = back_v / torch.where(still, math.inf, flow.std)
        second = (back_x - flow.slope * first) / torch.where(still, math.inf, flow.rest)
        log_ratio = forward - kinetic(first) - kinetic(second) + kinetic(velocity) - kinetic(end)
        broken = lost | is_broken(proposal)
        refused = broken | ~proposal.log_prob.isfinite()
        nothing = refused | still.squeeze(-1)
        log_ratio = torch.where(nothing, torch.zeros_like(log_ratio), log_ratio)
        state = take_or_turn(state, proposal, velocity, refused)
        return state, Info(log_ratio, torch.ones_like(log_ratio), 1, broken)


@final
class RMKLMC(KineticKernel):
    r"""Kinetic Langevin with a randomized midpoint; two evaluations a step. **Biased**, much less than :class:`KLMC`.

    With :math:`a \sim U[0, 1]` for each particle, the exact solution with the force frozen at :math:`x` gives a
    midpoint :math:`z` after :math:`a h`. The step is the free motion along the same Brownian path plus the force at
    :math:`z`, weighted to be unbiased over :math:`a`; :math:`r = \gamma (1 - a) h`:

    .. math:: v' = e^{-t} v + h e^{-r} \sigma s(z) + n_v, \qquad
        x' = x + \sigma (h a_1 v + h (1 - a) h\, a_1(r)\, \sigma s(z) + n_x).

    On :math:`N(0, 1)` at :math:`\gamma = 1` the stationary variance of positions is 1.0003, 1.0057, 1.0566 at
    :math:`h = 0.2, 0.5, 1`. The transition density is an integral over the midpoint, so there is no path weight.
    """

    exact = False
    has_path_weight = False
    target_acceptance = 1.0

    def step(
        self, state: State, log_density: LogDensity, params: KernelParams, generator: torch.Generator | None = None
    ) -> tuple[State, Info]:
        space, velocity, start = self.space, velocity_of(state), state.x
        step, scale = scaled_columns(space, params, start)
        part = torch.rand((*start.shape[:-1], 1), generator=generator, dtype=start.dtype, device=start.device)
        decay = self.decay(params, step)
        first, second = part * step, (1.0 - part) * step
        flow, flow_rest = _flow(part * decay, start.dtype), _flow((1.0 - part) * decay, start.dtype)
        noise_x, noise_v, _ = _noise(space, flow, start, generator)
        later_x, later_v, _ = _noise(space, flow_rest, start, generator)
        kick = first * scale * space.project_vector(state.score)
        # The free motion over both parts, and the force of the first part for the midpoint alone.
        free = first * (flow.drift * velocity + noise_x)
        middle = space.project(start + scale * (free + first * flow.force * kick))
        lost = ~middle.isfinite().all(-1, keepdim=True)
        _, score = log_density(torch.where(lost, start, middle))
        kick = step * scale * space.project_vector(score)
        turned = flow.keep * velocity + noise_v
        x = space.project(start + scale * (free + second * (flow_rest.drift * (turned + kick) + later_x)))
        end = flow_rest.keep * (turned + kick) + later_v
        lost = lost | ~x.isfinite().all(-1, keepdim=True)
        x = torch.where(lost, start, x)
        proposal = State(x, *log_density(x), velocity=end)
        broken = lost.squeeze(-1) | is_broken(proposal)
        refused = broken | ~proposal.log_prob.isfinite()
        state = take_or_turn(state, proposal, velocity, refused)
        unknown = torch.full_like(state.log_prob, math.nan, dtype=torch.float64)
        return state, Info(unknown, torch.ones_like(unknown), 2, broken)
