r"""Langevin kernels with a diagonal preconditioner.

With step size :math:`h`, scale :math:`\sigma` (a standard deviation per coordinate) and score :math:`s`,

.. math:: x' = x + h \sigma^2 s(x) + \sqrt{2h}\, \sigma \xi, \qquad \xi \sim N(0, I).

References:
    Exponential convergence of Langevin distributions and their discrete approximations (Roberts & Tweedie, 1996),
    https://doi.org/10.2307/3318418
    Optimal scaling of discrete approximations to Langevin diffusions (Roberts & Rosenthal, 1998),
    https://doi.org/10.1111/1467-9868.00123
"""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from diffsampler.kernel import Info, Kernel, KernelParams, LogDensity, State
from diffsampler.kernels.metropolis import columns, is_broken, metropolis, select
from diffsampler.space import Space

__all__ = ["MALA", "ULA"]


def _propose(
    space: Space, state: State, log_density: LogDensity, params: KernelParams, generator: torch.Generator | None
) -> tuple[State, Tensor, Tensor]:
    """Langevin proposal; its ``log B - log F``, the same kernel run backwards, float64; and who broke, boolean."""
    step, scale = columns(params, state.x)
    std = (2.0 * step).sqrt() * scale
    drift = 0.5 * std.square() * space.project_vector(state.score)
    noise = std * space.noise(tuple(state.log_prob.shape), like=state.x, generator=generator)
    x = space.project(state.x + drift + noise)
    # A density must never be asked about a point that is not a number; such proposals are refused below.
    lost = ~x.isfinite().all(-1)
    x = torch.where(lost.unsqueeze(-1), state.x, x)
    proposal = State(x, *log_density(x))
    back_drift = 0.5 * std.square() * space.project_vector(proposal.score)
    # In differences, so that the ratio keeps its digits however far from the origin the particles are.
    origin = torch.zeros_like(noise)
    back_noise = -(drift + noise + back_drift)
    log_ratio = space.log_gaussian(back_noise, origin, std.square()) - space.log_gaussian(noise, origin, std.square())
    return proposal, log_ratio, lost | is_broken(proposal)


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
        proposal, log_ratio, broken = _propose(self.space, state, log_density, params, generator)
        taken = ~broken & proposal.log_prob.isfinite()
        log_ratio = torch.where(taken, log_ratio, torch.zeros_like(log_ratio))
        acceptance = torch.ones_like(log_ratio)
        return select(taken, proposal, state), Info(log_ratio, acceptance, 1, broken)


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
        proposal, log_ratio, broken = _propose(self.space, state, log_density, params, generator)
        log_accept = proposal.log_prob.double() - state.log_prob.double() + log_ratio
        state, acceptance, log_ratio = metropolis(state, proposal, log_accept, broken=broken, generator=generator)
        return state, Info(log_ratio, acceptance, 1, broken)
