r"""Controlled Monte Carlo diffusions, overdamped.

Annealed densities :math:`\log\pi_k = \beta_k \log\rho + (1 - \beta_k) \log p_0` with a learned schedule
:math:`\beta_k`, a learned Gaussian prior :math:`p_0`, and learned step sizes :math:`\epsilon_k`:

.. math::
   F_k = N(x + \epsilon_k g_k(x) + \delta\,u_\theta(t_k, x),\ 2\epsilon_k), \qquad
   B_k = N(x' + \epsilon_k g_k(x') - \delta\,u_\theta(t_{k+1}, x'),\ 2\epsilon_k)

with :math:`\delta = S / K` and :math:`g_k` the score of :math:`\pi_k`, smoothly clipped so that no drift exceeds a few
standard deviations of the noise. The clip is part of both kernels, so weights stay exact. Where neither kernel carries
the control this is annealed Langevin importance sampling (:class:`AnnealedULA`); where only the backward one does,
Monte Carlo diffusion (:class:`MCD`), which learns the reversal but not the dynamics. With ``local_steps`` each kernel's
step size carries a learned factor per coordinate evaluated at its own point, :math:`\epsilon_k(x)` in ``F`` and
:math:`\epsilon_k(x')` in ``B``: both stay Gaussian, and funnels and other densities of varying scale need far fewer
steps.

Both kernels share step sizes, temperatures and the control. At fixed paths larger steps make the kernels differ less,
whatever paths of larger steps would do: log-variance losses, the published ones, drive step sizes too far up and
training goes astray; with such losses the samplers keep the initial ones. The score-function form of the divergence has
the right slope in all that is shared.

References:
    Transport meets variational inference: controlled Monte Carlo diffusions (Vargas, Padhy, Blessing, Nuesken, 2024),
    https://arxiv.org/abs/2307.01050 (both controls)
    Score-based diffusion meets annealed importance sampling (Doucet, Grathwohl, Matthews, Strathmann, 2022),
    https://arxiv.org/abs/2208.07698 (the backward control)
    Monte Carlo variational auto-encoders (Thin, Kotelevskii, Doucet, Durmus, Moulines, Panov, 2021),
    https://arxiv.org/abs/2106.15921 (no control)
"""

from __future__ import annotations

import copy
import math
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn import functional

from diffsampler.methods.annealed import (
    annealed_score,
    checked_prior,
    initial_path,
    num_scales,
    regrid,
    regrid_increments,
)
from diffsampler.networks import Control, clip
from diffsampler.objective import Objective, ScoreFunctionKL
from diffsampler.priors import Prior
from diffsampler.process import Gaussian, Process
from diffsampler.sampler import DiffusionSampler
from diffsampler.space import Space
from diffsampler.target import Target

__all__ = ["CMCD", "MCD", "AnnealedULA", "CMCDProcess"]

STEP_SHARE = 0.1
"""Initial step size as a share of the annealed modes' variance."""


@final
class CMCDProcess(Process):
    """Controlled annealed Langevin chain.

    Arguments:
        space: Where the particles live.
        num_steps: Number of steps ``K``.
        scale: Scale of the target, and initial standard deviation of the default prior.
        local_scale: Smallest scale of the target relative to ``scale``, at most 1; the initial schedule and step sizes
            follow from it.
        learn_steps: Whether step sizes are trained; losses of the weights' variance drive them too far up.
        local_steps: Whether step sizes carry a learned factor per coordinate that depends on the point.
        forward_control: Whether forward kernels carry the control.
        backward_control: Whether backward kernels carry the control.
        prior: Initial law; by default a learned Gaussian, or the uniform law of a torus.
        width: Width of the network.
        point_features: Random Fourier features of the point.
        harmonics: Harmonics of a Fourier series in every coordinate, for targets of many separate wells.
        detach_score: Whether pathwise losses treat the score as a constant.
        seed: Seed of the network's initial parameters.
    """

    clip_bound = 4.0
    """Largest drift in standard deviations of the noise, per coordinate."""
    local_bound = 5.0
    """Largest logarithm of a local factor of the step size."""

    scale: Tensor
    time: Tensor

    def __init__(
        self,
        space: Space,
        num_steps: int = 64,
        *,
        scale: float = 1.0,
        local_scale: float = 0.3,
        learn_steps: bool = True,
        local_steps: bool = False,
        forward_control: bool = True,
        backward_control: bool = True,
        prior: Prior | None = None,
        width: int = 64,
        point_features: int = 0,
        harmonics: int = 0,
        detach_score: bool = False,
        seed: int = 0,
    ) -> None:
        prior = checked_prior(space, prior, scale, local_scale)
        super().__init__(
            space,
            num_steps,
            detach_score=detach_score,
            learns_backward=True,
            learns_initial=prior.learns,
            has_anchors=True,
            learns_anchors=True,
        )
        self.local_steps = local_steps
        self.forward_control = forward_control
        self.backward_control = backward_control
        self.prior = prior
        scales = num_scales(space)
        self.register_buffer("time", torch.arange(num_steps + 1) / num_steps)
        self.register_buffer("scale", torch.tensor(float(scale)))
        beta, variance = initial_path(num_steps, local_scale)
        self.increments = nn.Parameter(beta.diff(prepend=beta.new_zeros(1)).log().float())
        step = STEP_SHARE * scale**2 * variance[:-1]
        self.log_step = nn.Parameter(step.log().float().unsqueeze(-1).repeat(1, scales), requires_grad=learn_steps)
        self.control: Control | None = None
        if forward_control or backward_control or local_steps:
            self.control = Control(
                space,
                generator=torch.Generator().manual_seed(seed),
                gate_init=0.0,
                bound=self.clip_bound,
                feature_input=True,
                extra_outputs=scales if local_steps else 0,
                width=width,
                point_features=point_features,
                harmonics=harmonics,
            )

    @property
    def beta(self) -> Tensor:
        """Annealing schedule of the kernels, ``(K,)``, increasing inside (0, 1)."""
        share = torch.softmax(self.increments, 0)
        return share.cumsum(0)[:-1]

    def sample_initial(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        return self.prior.sample(n, generator=generator)

    def log_initial(self, x: Tensor) -> Tensor:
        return self.prior.log_prob(x)

    def forward(self, k: Tensor, x: Tensor, score: Tensor | None) -> Gaussian:
        drift, shift, variance = self._parts(k, k, x, score)
        mean = x + drift
        return Gaussian(mean + shift if self.forward_control else mean, variance)

    def backward(self, k: Tensor, x: Tensor, score: Tensor | None) -> Gaussian:
        drift, shift, variance = self._parts(k, k + 1, x, score)
        mean = x + drift
        return Gaussian(mean - shift if self.backward_control else mean, variance)

    def _parts(self, k: Tensor, at: Tensor, x: Tensor, score: Tensor | None) -> tuple[Tensor, Tensor | float, Tensor]:
        """Langevin drift of kernel ``k``, control displacement at time index ``at``, and the variance."""
        assert score is not None
        annealed = annealed_score(self.prior, self.beta[k].unsqueeze(-1), x, score)
        log_step, shift = self.log_step[k], 0.0
        if self.control is not None:
            # The network sees the drift in units of the noise, noise_scale * score / 2.
            seen = 0.5 * (math.log(2.0) + log_step).mul(0.5).exp() * annealed
            control, extra = self.control(self.time[at], self.space.scaled(x, self.scale), seen)
            shift = self.scale / self.num_steps * control
            if self.local_steps:
                log_step = log_step + clip(extra, self.local_bound)
        variance = 2.0 * log_step.exp()
        noise_scale = variance.sqrt()
        drift = self.space.project_vector(noise_scale * clip(0.5 * noise_scale * annealed, self.clip_bound))
        return drift, shift, variance

    def regridded(self, num_steps: int) -> CMCDProcess:
        """This chain with another number of steps: the same dynamics in continuous time, to be trained further.

        A coarse chain trains in a fraction of the time and its control, a function of time, is close to a fine one's.
        """
        new = copy.deepcopy(self)
        new.num_steps = num_steps
        new.time = (torch.arange(num_steps + 1) / num_steps).to(self.time)
        with torch.no_grad():
            new.increments = nn.Parameter(regrid_increments(self.increments, num_steps + 1))
            pace, learn = math.log(self.num_steps / num_steps), self.log_step.requires_grad
            new.log_step = nn.Parameter(regrid(self.log_step, num_steps) + pace, requires_grad=learn)
        return new

    def log_anchor(self, k: Tensor, x: Tensor, log_prob: Tensor) -> Tensor:
        # Anchor k sits at the temperature of the kernel that leaves it; the ends are p_0 and the target.
        beta = functional.pad(self.beta[1:].double(), (1, 1))
        beta = torch.cat([beta[:-1], beta.new_ones(1)])[k]
        return beta * log_prob + (1.0 - beta) * self.log_initial(x)


@final
class CMCD(DiffusionSampler):
    """Controlled Monte Carlo diffusion, overdamped.

    Arguments:
        target: The density to sample.
        num_steps: Number of steps ``K``.
        objective: The loss, the score-function KL by default.
        options: As in :class:`CMCDProcess`.
    """

    def __init__(
        self, target: Target, *, num_steps: int = 64, objective: Objective | None = None, **options: Any
    ) -> None:
        objective = ScoreFunctionKL() if objective is None else objective
        options = {"learn_steps": objective.trains_shared, **options}
        super().__init__(target, CMCDProcess(target.space, num_steps, **options), objective)


@final
class MCD(DiffusionSampler):
    """Monte Carlo diffusion: annealed Langevin dynamics whose reversal is learned.

    Arguments:
        target: The density to sample.
        num_steps: Number of steps ``K``.
        objective: The loss, the score-function KL by default.
        options: As in :class:`CMCDProcess`.
    """

    def __init__(
        self, target: Target, *, num_steps: int = 64, objective: Objective | None = None, **options: Any
    ) -> None:
        objective = ScoreFunctionKL() if objective is None else objective
        options = {"learn_steps": objective.trains_shared, **options}
        process = CMCDProcess(target.space, num_steps, forward_control=False, **options)
        super().__init__(target, process, objective)


@final
class AnnealedULA(DiffusionSampler):
    """Unadjusted annealed Langevin dynamics with exact weights; only prior, temperatures and steps are learned.

    Arguments:
        target: The density to sample.
        num_steps: Number of steps ``K``.
        objective: The loss, the score-function KL by default.
        options: As in :class:`CMCDProcess`.
    """

    def __init__(
        self, target: Target, *, num_steps: int = 64, objective: Objective | None = None, **options: Any
    ) -> None:
        objective = ScoreFunctionKL() if objective is None else objective
        options = {"learn_steps": objective.trains_shared, **options}
        process = CMCDProcess(target.space, num_steps, forward_control=False, backward_control=False, **options)
        super().__init__(target, process, objective)
