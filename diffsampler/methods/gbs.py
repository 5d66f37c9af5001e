r"""Diffusion bridge sampler: forward and backward chains both learned, between a fixed prior and the target.

With steps :math:`\epsilon_k` and the score :math:`g_t = (1 - t) \nabla\log p_0 + t \nabla\log\rho`,

.. math::
   F_k = N(x + \sigma_k u_\theta(t_k, x),\ \sigma_k^2), \qquad
   B_k = N(x' + \sigma_k v_\phi(t_{k+1}, x'),\ \sigma_k^2), \qquad \sigma_k^2 = 2 \epsilon_k,

where :math:`u` and :math:`v` are two networks, each with a gated score :math:`\tfrac12 \sigma_k g_t`, so that both
chains start as annealed Langevin dynamics. The kernels are exact Gaussians: there is no divergence, which the
continuous-time form of the bridge needs and whose weights are biased at any finite step. The solution is not unique;
losses find one of the many bridges.

References:
    Improved sampling via learned diffusions (Richter, Berner, 2024), https://arxiv.org/abs/2307.01198
    Beyond ELBOs: a large-scale evaluation of variational methods for sampling (Blessing et al., 2024),
    https://arxiv.org/abs/2406.07423 (exact kernels)
"""

from __future__ import annotations

from typing import Any, final

import torch
from torch import Tensor, nn

from diffsampler.methods.annealed import annealed_score, checked_prior, initial_path, num_scales
from diffsampler.networks import Control
from diffsampler.objective import Objective, ScoreFunctionKL
from diffsampler.priors import Prior
from diffsampler.process import Gaussian, Process
from diffsampler.sampler import DiffusionSampler
from diffsampler.space import Space
from diffsampler.target import Target

__all__ = ["GBS", "GBSProcess"]

STEP_SHARE = 0.1
"""Initial step size as a share of the annealed modes' variance."""


@final
class GBSProcess(Process):
    """Two learned chains between a prior and the target.

    Arguments:
        space: Where the particles live.
        num_steps: Number of steps ``K``.
        scale: Scale of the target, and standard deviation of the default prior, which is fixed.
        local_scale: Smallest scale of the target relative to ``scale``, at most 1; the initial step sizes follow.
        learn_steps: Whether step sizes are trained; losses of the weights' variance drive them too far up.
        prior: Initial law; by default a fixed Gaussian, or the uniform law of a torus.
        width: Width of the networks.
        point_features: Random Fourier features of the point.
        harmonics: Harmonics of a Fourier series in every coordinate, for targets of many separate wells.
        detach_score: Whether pathwise losses treat the score as a constant.
        seed: Seed of the networks' initial parameters.
    """

    clip_bound = 4.0
    """Largest part of the score in the drift, in standard deviations of the noise, per coordinate."""

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
        prior: Prior | None = None,
        width: int = 64,
        point_features: int = 0,
        harmonics: int = 0,
        detach_score: bool = True,
        seed: int = 0,
    ) -> None:
        prior = checked_prior(space, prior, scale, local_scale, learn=False)
        super().__init__(space, num_steps, detach_score=detach_score, learns_backward=True, learns_initial=prior.learns)
        self.prior = prior
        self.register_buffer("time", torch.arange(num_steps + 1) / num_steps)
        self.register_buffer("scale", torch.tensor(float(scale)))
        step = STEP_SHARE * scale**2 * initial_path(num_steps, local_scale)[1][:-1]
        table = step.log().float().unsqueeze(-1).repeat(1, num_scales(space))
        self.log_step = nn.Parameter(table, requires_grad=learn_steps)
        self.control, self.backward_control = (
            Control(
                space,
                generator=torch.Generator().manual_seed(2 * seed + direction),
                bound=self.clip_bound,
                width=width,
                point_features=point_features,
                harmonics=harmonics,
            )
            for direction in (0, 1)
        )

    def sample_initial(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        return self.prior.sample(n, generator=generator)

    def log_initial(self, x: Tensor) -> Tensor:
        return self.prior.log_prob(x)

    def forward(self, k: Tensor, x: Tensor, score: Tensor | None) -> Gaussian:
        return self._kernel(self.control, k, self.time[k], x, score)

    def backward(self, k: Tensor, x: Tensor, score: Tensor | None) -> Gaussian:
        return self._kernel(self.backward_control, k, self.time[k + 1], x, score)

    def _kernel(self, control: Control, k: Tensor, t: Tensor, x: Tensor, score: Tensor | None) -> Gaussian:
        assert score is not None
        variance = 2.0 * self.log_step[k].exp()
        noise_scale = variance.sqrt()
        feature = 0.5 * noise_scale * annealed_score(self.prior, t.unsqueeze(-1), x, score)
        return Gaussian(x + noise_scale * control(t, self.space.scaled(x, self.scale), feature)[0], variance)


@final
class GBS(DiffusionSampler):
    """Diffusion bridge sampler.

    Arguments:
        target: The density to sample.
        num_steps: Number of steps ``K``.
        objective: The loss, the score-function KL by default.
        options: As in :class:`GBSProcess`.
    """

    def __init__(
        self, target: Target, *, num_steps: int = 64, objective: Objective | None = None, **options: Any
    ) -> None:
        objective = ScoreFunctionKL() if objective is None else objective
        options = {"learn_steps": objective.trains_shared, **options}
        super().__init__(target, GBSProcess(target.space, num_steps, **options), objective)
