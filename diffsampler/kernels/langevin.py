r"""Langevin kernels with a diagonal preconditioner, overdamped.

With step size :math:`h`, scale :math:`\sigma` (a standard deviation per coordinate) and score :math:`s`,

.. math:: x' = x + h \sigma^2 s(x) + \sqrt{2h}\, \sigma \xi, \qquad \xi \sim N(0, I).

References:
    Exponential convergence of Langevin distributions and their discrete approximations (Roberts & Tweedie, 1996),
    https://doi.org/10.2307/3318418
    Optimal scaling of discrete approximations to Langevin diffusions (Roberts & Rosenthal, 1998),
    https://doi.org/10.1111/1467-9868.00123
    The randomized midpoint method for log-concave sampling (Shen & Lee, 2019), https://arxiv.org/abs/1909.05503
    On the ergodicity, bias and asymptotic normality of randomized midpoint sampling method
    (He, Balasubramanian & Erdogdu, 2020), https://arxiv.org/abs/2011.03176 (overdamped)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import final

import torch
from torch import Tensor

from diffsampler.kernel import Info, Kernel, KernelParams, LogDensity, State
from diffsampler.kernels.metropolis import is_broken, metropolis, scaled_columns, select
from diffsampler.space import Space

__all__ = ["MALA", "RLMC", "ULA", "Drift", "score_drift", "take_finite"]

Drift = Callable[[State, Tensor], Tensor]
"""Direction of a Langevin proposal at a state, ``(state, std) -> (..., D)``; ``std`` is that of the noise."""


def score_drift(state: State, std: Tensor) -> Tensor:
    """The score, which makes the plain Langevin proposal."""
    return state.score


def propose(
    space: Space,
    state: State,
    log_density: LogDensity,
    params: KernelParams,
    drift: Drift,
    generator: torch.Generator | None,
) -> tuple[State, Tensor, Tensor]:
    """Langevin proposal; its ``log B - log F``, the same kernel run backwards, float64; and who broke, boolean."""
    step, scale = scaled_columns(space, params, state.x)
    std = (2.0 * step).sqrt() * scale
    forth = 0.5 * std.square() * space.project_vector(drift(state, std))
    noise = std * space.noise(tuple(state.log_prob.shape), like=state.x, generator=generator)
    x = space.project(state.x + forth + noise)
    # A density must never be asked about a point that is not a number; such proposals are refused below.
    lost = ~x.isfinite().all(-1)
    x = torch.where(lost.unsqueeze(-1), state.x, x)
    proposal = State(x, *log_density(x))
    back = 0.5 * std.square() * space.project_vector(drift(proposal, std))
    # In differences, so that the ratio keeps its digits however far from the origin the particles are.
    origin = torch.zeros_like(noise)
    variance = std.square()
    log_ratio = space.log_gaussian(-(forth + noise + back), origin, variance) - space.log_gaussian(
        noise, origin, variance
    )
    return proposal, log_ratio, lost | is_broken(proposal)


def take_finite(
    state: State, proposal: State, log_ratio: Tensor, broken: Tensor, evaluations: int
) -> tuple[State, Info]:
    """Take every proposal with a finite density; the others stay put with ratio zero, an atom of both directions."""
    taken = ~broken & proposal.log_prob.isfinite()
    log_ratio = torch.where(taken, log_ratio, torch.zeros_like(log_ratio))
    return select(taken, proposal, state), Info(log_ratio, torch.ones_like(log_ratio), evaluations, broken)


@final
class ULA(Kernel):
    r"""Unadjusted Langevin algorithm: every finite proposal is taken. **Biased**: its stationary law is not the target.

    On :math:`N(0, 1)` the stationary variance is :math:`1 / (1 - h/2)`. In a path weight the bias is corrected by
    ``Info.log_ratio``, the log ratio of the two Gaussian transition densities. A refused proposal stays put and has
    ratio zero: the same atom appears in both directions.
    """

    exact = False
    target_acceptance = 1.0

    def step(
        self, state: State, log_density: LogDensity, params: KernelParams, generator: torch.Generator | None = None
    ) -> tuple[State, Info]:
        proposal, log_ratio, broken = propose(self.space, state, log_density, params, score_drift, generator)
        return take_finite(state, proposal, log_ratio, broken, 1)


@final
class MALA(Kernel):
    r"""Metropolis-adjusted Langevin algorithm: the proposal of :class:`ULA`, accepted or refused.

    The acceptance probability is

    .. math:: \min\Bigl(1, \frac{\rho(x')\, q(x | x')}{\rho(x)\, q(x' | x)}\Bigr).
    """

    exact = True
    target_acceptance = 0.574

    def step(
        self, state: State, log_density: LogDensity, params: KernelParams, generator: torch.Generator | None = None
    ) -> tuple[State, Info]:
        proposal, log_ratio, broken = propose(self.space, state, log_density, params, score_drift, generator)
        log_accept = proposal.log_prob.double() - state.log_prob.double() + log_ratio
        state, acceptance, log_ratio = metropolis(state, proposal, log_accept, broken=broken, generator=generator)
        return state, Info(log_ratio, acceptance, 1, broken)


@final
class RLMC(Kernel):
    r"""Overdamped Langevin with a randomized midpoint; two evaluations a step. **Biased**, less than :class:`ULA`.

    With :math:`a \sim U[0, 1]` for each particle and one Brownian path :math:`W`,

    .. math::
        z = x + a h \sigma^2 s(x) + \sqrt 2\, \sigma W_{ah}, \qquad
        x' = x + h \sigma^2 s(z) + \sqrt 2\, \sigma W_h.

    On :math:`N(0, 1)` the stationary variance is

    .. math:: \Bigl(1 - \frac{h^3}{3 (2 - 2h + h^2)}\Bigr)^{-1} = 1 + h^3 / 6 + O(h^4).

    The transition density is an integral over the midpoint, so there is no path weight (``has_path_weight`` is False).
    """

    exact = False
    has_path_weight = False
    target_acceptance = 1.0

    def step(
        self, state: State, log_density: LogDensity, params: KernelParams, generator: torch.Generator | None = None
    ) -> tuple[State, Info]:
        space, start = self.space, state.x
        batch = tuple(state.log_prob.shape)
        step, scale = scaled_columns(space, params, start)
        part = torch.rand((*batch, 1), generator=generator, dtype=start.dtype, device=start.device)
        std = (2.0 * step).sqrt() * scale
        first = part.sqrt() * std * space.noise(batch, like=start, generator=generator)
        rest = (1.0 - part).sqrt() * std * space.noise(batch, like=start, generator=generator)
        drift = 0.5 * std.square()
        middle = space.project(start + part * drift * space.project_vector(state.score) + first)
        lost = ~middle.isfinite().all(-1, keepdim=True)
        _, score = log_density(torch.where(lost, start, middle))
        x = space.project(start + drift * space.project_vector(score) + first + rest)
        lost = lost | ~x.isfinite().all(-1, keepdim=True)
        x = torch.where(lost, start, x)
        proposal = State(x, *log_density(x))
        unknown = torch.full_like(proposal.log_prob, math.nan, dtype=torch.float64)
        state, info = take_finite(state, proposal, unknown, lost.squeeze(-1) | is_broken(proposal), 2)
        return state, info._replace(log_ratio=unknown)
