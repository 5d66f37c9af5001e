r"""Langevin kernels on minibatches of data.

The density is :math:`\log\rho(x) = \log p(x) + \sum_{i=1}^N \ell_i(x)`. A batch :math:`B` of :math:`n` data gives the
unbiased estimate

.. math:: \hat g(x) = \nabla\log p(x) + \frac{N}{n} \sum_{i \in B} \nabla\ell_i(x),

and around a mode :math:`\hat x` the one with control variates, whose variance falls with :math:`|x - \hat x|^2`,

.. math::
    \hat g(x) = \nabla\log p(x) + \sum_{i=1}^N \nabla\ell_i(\hat x)
        + \frac{N}{n} \sum_{i \in B} [\nabla\ell_i(x) - \nabla\ell_i(\hat x)].

:class:`MinibatchDensity` is such an estimate as a log density: it draws a fresh batch each time that it is asked. The
kernels never weigh anything, so a noisy density does them no harm; do not hand it to an exact kernel.

References:
    Bayesian learning via stochastic gradient Langevin dynamics (Welling & Teh, 2011),
    https://www.stats.ox.ac.uk/~teh/research/compstats/WelTeh2011a.pdf
    Stochastic gradient Hamiltonian Monte Carlo (Chen, Fox & Guestrin, 2014), https://arxiv.org/abs/1402.4102
    Control variates for stochastic gradient MCMC (Baker, Fearnhead, Fox & Nemeth, 2019),
    https://arxiv.org/abs/1706.05439
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, final

import torch
from torch import Tensor

from diffsampler.kernel import Info, Kernel, KernelParams, LogDensity, State
from diffsampler.kernels.kinetic import KineticKernel, take_or_turn, velocity_of
from diffsampler.kernels.langevin import take_finite
from diffsampler.kernels.metropolis import is_broken, scaled_columns
from diffsampler.space import Space

__all__ = ["SGHMC", "SGLD", "BatchLikelihood", "MinibatchDensity", "MinibatchTarget", "differentiated"]

BatchLikelihood = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Sum over data of log likelihoods, and its gradient: ``x (..., D), index (..., n) or (n,) -> (...), (..., D)``."""


def differentiated(log_likelihood: Callable[[Tensor, Tensor], Tensor]) -> BatchLikelihood:
    """A batch likelihood from its value alone, ``(x, index) -> (...)``, by automatic differentiation."""

    def likelihood(x: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            value = log_likelihood(leaf, index)
            (score,) = torch.autograd.grad(value.sum(), leaf)
        return value.detach(), score

    return likelihood


class MinibatchTarget(NamedTuple):
    """A posterior that can be evaluated on part of its data."""

    prior: LogDensity
    """Log density of the prior and its gradient."""
    likelihood: BatchLikelihood
    """Summed log likelihood of the data with the given indices, and its gradient."""
    num_data: int
    """Number of data, ``N``."""

    def full(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Log density ``(...)`` and score ``(..., D)`` from all data."""
        index = torch.arange(self.num_data, device=x.device)
        log_prior, prior_score = self.prior(x)
        log_likelihood, score = self.likelihood(x, index)
        return log_prior + log_likelihood, prior_score + score


class _Center(NamedTuple):
    """What control variates need of the mode."""

    mode: Tensor
    """Where they are centred, shape ``(D,)``."""
    log_likelihood: Tensor
    """Of all data at the mode, shape ``()``."""
    score: Tensor
    """Gradient of the log likelihood of all data at the mode, shape ``(D,)``."""


@final
class MinibatchDensity:
    """The log density and score of a :class:`MinibatchTarget` estimated from a fresh batch at every call.

    Batches are drawn with replacement, for each particle its own, so that chains stay independent. With ``mode`` the
    estimate has control variates; its score is the gradient of its log density, and both are unbiased.

    Arguments:
        target: The posterior.
        batch_size: Number of data in a batch.
        generator: Source of the batches.
        mode: A point near the mode, shape ``(D,)``; costs one pass over the data. None for the plain estimate.
        share: Draw one batch for all particles: cheaper, but their errors then do not average out.

    Raises:
        ValueError: If the batch is empty or larger than the data.
    """

    def __init__(
        self,
        target: MinibatchTarget,
        *,
        batch_size: int,
        generator: torch.Generator,
        mode: Tensor | None = None,
        share: bool = False,
    ) -> None:
        if not 1 <= batch_size <= target.num_data:
            raise ValueError(f"Expected batch_size from 1 to num_data={target.num_data}; got {batch_size}.")
        self.target = target
        self.batch_size = batch_size
        self.generator = generator
        self.share = share
        self.center: _Center | None = None
        if mode is not None:
            index = torch.arange(target.num_data, device=mode.device)
            self.center = _Center(mode, *target.likelihood(mode, index))

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        target, center = self.target, self.center
        shape = (self.batch_size,) if self.share else (*x.shape[:-1], self.batch_size)
        index = torch.randint(target.num_data, shape, generator=self.generator, device=x.device)
        factor = target.num_data / self.batch_size
        log_prior, prior_score = target.prior(x)
        log_likelihood, score = target.likelihood(x, index)
        if center is None:
            return log_prior + factor * log_likelihood, prior_score + factor * score
        mode = center.mode.to(x).expand_as(x)
        at_mode, slope = target.likelihood(mode, index)
        away = x - mode
        # Both estimates of the first-order expansion around the mode: from the batch, and from all data.
        log_likelihood = factor * (log_likelihood - at_mode - (slope * away).sum(-1))
        log_likelihood = log_likelihood + center.log_likelihood.to(x) + (center.score.to(x) * away).sum(-1)
        return log_prior + log_likelihood, prior_score + center.score.to(x) + factor * (score - slope)


@final
class SGLD(Kernel):
    r"""Stochastic gradient Langevin dynamics with a constant step. **Biased** by the step size and by the batches.

    .. math:: x' = x + h \sigma^2 \hat g(x) + \sqrt{2h}\, \sigma \xi

    On a Gaussian of variance :math:`1/k` with gradient noise of variance :math:`V` the stationary variance is

    .. math:: \frac{2 + h V}{2 k - h k^2} .

    Control variates bring :math:`V` near a mode down to what is left of second order; without them :math:`V` is of the
    order :math:`N^2 / n`, and the variance of a concentrated posterior is wrong by factors unless :math:`h V \ll 1`.
    There is no path weight: the transition is a mixture over batches. ``Info.nonfinite`` counts refused steps.
    """

    exact = False
    has_path_weight = False
    target_acceptance = 1.0

    def step(
        self, state: State, log_density: LogDensity, params: KernelParams, generator: torch.Generator | None = None
    ) -> tuple[State, Info]:
        space = self.space
        step, scale = scaled_columns(space, params, state.x)
        std = (2.0 * step).sqrt() * scale
        noise = space.noise(tuple(state.log_prob.shape), like=state.x, generator=generator)
        x = space.project(state.x + 0.5 * std.square() * space.project_vector(state.score) + std * noise)
        lost = ~x.isfinite().all(-1)
        x = torch.where(lost.unsqueeze(-1), state.x, x)
        # The next step's gradient: its batch is drawn after the point, which keeps it unbiased there.
        proposal = State(x, *log_density(x))
        unknown = torch.full_like(proposal.log_prob, math.nan, dtype=torch.float64)
        state, info = take_finite(state, proposal, unknown, lost | is_broken(proposal), 1)
        return state, info._replace(log_ratio=unknown)


@final
class SGHMC(KineticKernel):
    r"""Stochastic gradient HMC. **Biased** by the step size and by the batches.

    In velocities whitened by the scale :math:`\sigma`, with friction :math:`\gamma` and gradient noise of variance
    :math:`\hat V` per coordinate,

    .. math::
        v' = (1 - \gamma h) v + h \sigma \hat g(x) + N(0, 2 \gamma h - h^2 \sigma^2 \hat V), \qquad
        x' = x + h \sigma v' .

    (The paper's learning rate is :math:`h^2`, its momentum decay :math:`\alpha = \gamma h`.) On :math:`N(0, 1)` with
    exact gradients the stationary variance of positions is

    .. math:: \frac{1 - \gamma h / 2}{1 - \gamma h / 2 - h^2 / 4} .

    Arguments:
        space: Where the particles live.
        friction: :math:`\gamma`, where ``KernelParams.length`` is None.
        gradient_variance: :math:`\hat V`, shape ``(D,)`` or ``(1,)``; None for zero.

    Raises:
        ValueError: If the step is so long that the gradient noise alone heats more than the friction cools.
    """

    exact = False
    has_path_weight = False
    target_acceptance = 1.0

    def __init__(self, space: Space, *, friction: float = 1.0, gradient_variance: Tensor | None = None) -> None:
        super().__init__(space, friction=friction)
        self.gradient_variance = gradient_variance

    def step(
        self, state: State, log_density: LogDensity, params: KernelParams, generator: torch.Generator | None = None
    ) -> tuple[State, Info]:
        space, velocity = self.space, velocity_of(state)
        step, scale = scaled_columns(space, params, state.x)
        decay = self.decay(params, step)
        variance = 2.0 * decay
        if self.gradient_variance is not None:
            variance = variance - (step * scale).square() * self.gradient_variance.to(step)
            if bool((variance < 0.0).any()):
                raise ValueError("Expected 2 * friction > step_size * scale**2 * gradient_variance; got a longer step.")
        noise = variance.sqrt() * space.noise(tuple(state.log_prob.shape), like=state.x, generator=generator)
        end = (1.0 - decay) * velocity + step * scale * space.project_vector(state.score) + noise
        x = space.project(state.x + step * scale * end)
        lost = ~x.isfinite().all(-1)
        x = torch.where(lost.unsqueeze(-1), state.x, x)
        proposal = State(x, *log_density(x), velocity=end)
        broken = lost | is_broken(proposal)
        refused = broken | ~proposal.log_prob.isfinite()
        state = take_or_turn(state, proposal, velocity, refused)
        unknown = torch.full_like(state.log_prob, math.nan, dtype=torch.float64)
        return state, Info(unknown, torch.ones_like(unknown), 1, broken)
