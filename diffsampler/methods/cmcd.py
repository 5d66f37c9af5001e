r"""Controlled Monte Carlo diffusions, overdamped.

Annealed densities :math:`\log\pi_k = \beta_k \log\rho + (1 - \beta_k) \log p_0` with a learned schedule
:math:`\beta_k`, a learned Gaussian prior :math:`p_0`, and learned step sizes :math:`\epsilon_k`:

.. math::
   F_k = N(x + \epsilon_k g_k(x) + \delta\,u_\theta(t_k, x),\ 2\epsilon_k), \qquad
   B_k = N(x' + \epsilon_k g_k(x') - \delta\,u_\theta(t_{k+1}, x'),\ 2\epsilon_k)

with :math:`\delta = S / K` and :math:`g_k` the score of :math:`\pi_k`, smoothly clipped so that no drift exceeds a few
standard deviations of the noise. The clip is part of both kernels, so weights stay exact. Without the control this is
annealed Langevin importance sampling. With ``local_steps`` each kernel's step size carries a learned factor per
coordinate evaluated at its own point, :math:`\epsilon_k(x)` in ``F`` and :math:`\epsilon_k(x')` in ``B``: both stay
Gaussian, and funnels and other densities of varying scale need far fewer steps.

References:
    Transport meets variational inference: controlled Monte Carlo diffusions (Vargas, Padhy, Blessing, Nuesken, 2024),
    https://arxiv.org/abs/2307.01050
"""

from __future__ import annotations

import math
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn import functional

from diffsampler.networks import Control, clip
from diffsampler.objective import Objective
from diffsampler.process import Gaussian, Process
from diffsampler.sampler import DiffusionSampler
from diffsampler.space import Space, Torus
from diffsampler.target import Target

__all__ = ["CMCD", "CMCDProcess"]

STEP_SHARE = 0.1
"""Initial step size as a share of the annealed modes' variance."""


@final
class CMCDProcess(Process):
    """Controlled annealed Langevin chain.

    Arguments:
        space: Where the particles live; on a torus the prior is uniform.
        num_steps: Number of steps ``K``.
        scale: Initial standard deviation of the prior.
        local_scale: Smallest scale of the target relative to ``scale``, at most 1; the initial schedule and step sizes
            follow from it.
        local_steps: Whether step sizes carry a learned factor per coordinate that depends on the point.
        width: Width of the network.
        point_features: Random Fourier features of the point.
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
        local_steps: bool = False,
        width: int = 64,
        point_features: int = 0,
        detach_score: bool = False,
        seed: int = 0,
    ) -> None:
        if not scale > 0.0:
            raise ValueError(f"Expected scale > 0; got {scale}.")
        if not 0.0 < local_scale <= 1.0:
            raise ValueError(f"Expected local_scale in (0, 1]; got {local_scale}.")
        self.uniform_prior = isinstance(space, Torus)
        super().__init__(
            space,
            num_steps,
            detach_score=detach_score,
            learns_backward=True,
            learns_initial=not self.uniform_prior,
            has_anchors=True,
            learns_anchors=True,
        )
        self.local_steps = local_steps
        # Mean-free particles have no coordinates of their own: every scale is shared.
        scales = space.dim if space.dof == space.dim else 1
        self.register_buffer("time", torch.arange(num_steps + 1) / num_steps)
        self.register_buffer("scale", torch.tensor(float(scale)))
        self.prior_mean = nn.Parameter(torch.zeros(space.dim))
        self.prior_log_scale = nn.Parameter(torch.full((scales,), math.log(scale)))
        # A mode of variance s^2 has variance s^2 / beta while annealed. Temperatures spaced evenly in log beta shrink
        # it at an even pace, and a step of a tenth of its variance is stable and still mixes within it.
        first = min(local_scale**2, 1.0 / (num_steps + 1))
        beta = torch.logspace(math.log10(first), 0.0, num_steps + 1, dtype=torch.float64)
        self.increments = nn.Parameter(beta.diff(prepend=beta.new_zeros(1)).log().float())
        step = STEP_SHARE * scale**2 * (local_scale**2 / beta[:-1]).clamp_max(1.0)
        self.log_step = nn.Parameter(step.log().float().unsqueeze(-1).repeat(1, scales))
        generator = torch.Generator().manual_seed(seed)
        self.control = Control(
            space,
            generator=generator,
            gate_init=0.0,
            bound=self.clip_bound,
            feature_input=True,
            extra_outputs=scales if local_steps else 0,
            width=width,
            point_features=point_features,
        )

    @property
    def beta(self) -> Tensor:
        """Annealing schedule of the kernels, ``(K,)``, increasing inside (0, 1)."""
        share = torch.softmax(self.increments, 0)
        return share.cumsum(0)[:-1]

    def sample_initial(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        if self.uniform_prior:
            u = torch.rand(n, self.space.dim, generator=generator, dtype=self.time.dtype, device=self.time.device)
            return (2.0 * u - 1.0) * math.pi
        noise = self.space.noise((n,), like=self.time, generator=generator)
        return self.space.project(self.prior_mean) + self.prior_log_scale.exp() * noise

    def log_initial(self, x: Tensor) -> Tensor:
        if self.uniform_prior:
            return x.new_full(x.shape[:-1], -self.space.dim * math.log(2.0 * math.pi), dtype=torch.float64)
        return self.space.log_gaussian(x, self.space.project(self.prior_mean), (2.0 * self.prior_log_scale).exp())

    def forward(self, k: Tensor, x: Tensor, score: Tensor | None) -> Gaussian:
        drift, shift, variance = self._parts(k, k, x, score)
        return Gaussian(x + drift + shift, variance)

    def backward(self, k: Tensor, x: Tensor, score: Tensor | None) -> Gaussian:
        drift, shift, variance = self._parts(k, k + 1, x, score)
        return Gaussian(x + drift - shift, variance)

    def _parts(self, k: Tensor, at: Tensor, x: Tensor, score: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Langevin drift of kernel ``k``, control displacement at time index ``at``, and the variance."""
        assert score is not None
        beta = self.beta[k].unsqueeze(-1)
        annealed = beta * score
        if not self.uniform_prior:
            pull = (self.space.project(self.prior_mean) - x) * (-2.0 * self.prior_log_scale).exp()
            annealed = annealed + (1.0 - beta) * pull
        log_step = self.log_step[k]
        # The network sees the drift in units of the noise, noise_scale * score / 2.
        seen = 0.5 * (math.log(2.0) + log_step).mul(0.5).exp() * annealed
        control, extra = self.control(self.time[at], x / self.scale, seen)
        if self.local_steps:
            log_step = log_step + clip(extra, self.local_bound)
        variance = 2.0 * log_step.exp()
        noise_scale = variance.sqrt()
        drift = self.space.project_vector(noise_scale * clip(0.5 * noise_scale * annealed, self.clip_bound))
        return drift, self.scale / self.num_steps * control, variance

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
        objective: The loss, log-variance by default.
        options: As in :class:`CMCDProcess`.
    """

    def __init__(
        self, target: Target, *, num_steps: int = 64, objective: Objective | None = None, **options: Any
    ) -> None:
        super().__init__(target, CMCDProcess(target.space, num_steps, **options), objective)
