r"""Time-reversed diffusion sampler with exact Gaussian kernels.

A fixed linear noising chain :math:`B_k = N(a_k x, S^2 v_k)` (:mod:`diffsampler.schedule`; variance preserving or
exploding) is reversed by predicting the data point. With :math:`A_k, V_k` accumulated from the data, in units of ``S``,
and :math:`R_k^2 = A_k^2 + V_k`,

.. math::
   \hat z = \frac{A_k}{R_k^2} x + \frac{\sqrt{V_k}}{R_k}\,u_\theta(t_k, x), \qquad
   F_k = N\Big(\frac{a_k V_{k+1} x + v_k A_{k+1} \hat z}{V_k},\
               \frac{V_{k+1} v_k}{V_k} + \Big(\frac{v_k A_{k+1}}{V_k}\Big)^2 \frac{V_k}{R_k^2}\Big),

the exact posterior kernel for the predicted point, and exact outright (zero control) when the target is
:math:`N(0, S^2)`. The variance may carry a learned factor. No divergence is needed and the weights are exact.

On a torus the kernels are wrapped normal laws of an exploding schedule, and :math:`p_0` is uniform.

References:
    An optimal control perspective on diffusion-based generative modeling (Berner, Richter, Ullrich, 2024),
    https://arxiv.org/abs/2211.01364
    Improved sampling via learned diffusions (Richter, Berner, 2024), https://arxiv.org/abs/2307.01198
"""

from __future__ import annotations

import math
from typing import Any, final

import torch
from torch import Tensor

from diffsampler.controls import ScoreFeature, chosen_control, gated, needs_score
from diffsampler.networks import ControlModule
from diffsampler.objective import Objective
from diffsampler.process import Gaussian, Process
from diffsampler.sampler import DiffusionSampler
from diffsampler.schedule import NoiseSchedule, chosen_schedule, variance_exploding
from diffsampler.space import Space, Torus
from diffsampler.target import Target

__all__ = ["DIS", "DISProcess"]


@final
class DISProcess(Process):
    """Learned reversal of a fixed noising chain.

    Arguments:
        space: Where the particles live; a torus needs an exploding schedule (``a_k = 1``).
        schedule: The noising chain.
        scale: Scale ``S`` of the target (on a torus 1).
        learn_variance: Whether forward variances carry a learned factor in ``(e^-2, e^2)``.
        control: What steers the chain, a network by default (:mod:`diffsampler.controls`); then options of the network
            have no effect.
        feature: Which score its gate multiplies, by default the difference between the target's and the prior's.
        width: Width of the network.
        point_features: Random Fourier features of the point.
        harmonics: Harmonics of a Fourier series in every coordinate, for targets of many separate wells.
        extra_inputs: Inputs of the network beside the point (a context).
        detach_score: Whether pathwise losses treat the score as a constant.
        seed: Seed of the network's initial parameters.
    """

    scale: Tensor
    time: Tensor
    contraction: Tensor
    noise: Tensor
    keep: Tensor
    share: Tensor
    recall: Tensor
    reach: Tensor
    level: Tensor
    spread: Tensor
    signal: Tensor
    variance: Tensor
    total_contraction: Tensor
    total_noise: Tensor

    def __init__(
        self,
        space: Space,
        schedule: NoiseSchedule,
        *,
        scale: float = 1.0,
        learn_variance: bool = True,
        control: ControlModule | None = None,
        feature: ScoreFeature | None = None,
        width: int = 64,
        point_features: int = 0,
        harmonics: int = 0,
        extra_inputs: int = 0,
        detach_score: bool = True,
        seed: int = 0,
    ) -> None:
        if not scale > 0.0:
            raise ValueError(f"Expected scale > 0; got {scale}.")
        self.uniform_start = isinstance(space, Torus)
        if self.uniform_start and not bool((schedule.contraction == 1.0).all()):
            raise ValueError("Expected an exploding schedule (a_k = 1) on a torus: it cannot contract.")
        num_steps = len(schedule.variance)
        super().__init__(space, num_steps, needs_score=needs_score(feature), detach_score=detach_score, has_bridge=True)
        self.learn_variance = learn_variance
        a, v, total_a, total_v = schedule
        spread = (total_a.square() + total_v).sqrt()
        share = v * total_a[1:] / total_v[:-1]
        table = {
            "contraction": a,
            "noise": v,
            "keep": a * total_v[1:] / total_v[:-1],
            "share": share,
            "recall": total_a[:-1] / spread[:-1].square(),
            "reach": total_v[:-1].sqrt() / spread[:-1],
            "level": total_v[:-1].sqrt(),
            "spread": spread[:-1],
            "signal": (total_a[:-1] / spread[:-1]).square(),
            "variance": total_v[1:] * v / total_v[:-1] + share.square() * total_v[:-1] / spread[:-1].square(),
        }
        for name, value in table.items():
            self.register_buffer(name, value.float().unsqueeze(-1))
        self.register_buffer("total_contraction", total_a.float().unsqueeze(-1))
        self.register_buffer("total_noise", total_v.sqrt().float().unsqueeze(-1))
        self.register_buffer("scale", torch.tensor(float(scale)))
        self.register_buffer("time", torch.arange(num_steps + 1) / num_steps)
        # Mean-free kernels must stay isotropic: one learned factor for all coordinates.
        factors = space.dim if space.dof == space.dim else 1
        self.feature = feature
        self.control = chosen_control(
            control,
            space,
            generator=torch.Generator().manual_seed(seed),
            bound=5.0,
            feature_input=True,
            extra_inputs=extra_inputs,
            extra_outputs=factors if learn_variance else 0,
            width=width,
            point_features=point_features,
            harmonics=harmonics,
        )

    def sample_initial(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        if self.uniform_start:
            u = torch.rand(n, self.space.dim, generator=generator, dtype=self.time.dtype, device=self.time.device)
            return (2.0 * u - 1.0) * math.pi
        return self.scale * self.spread[0] * self.space.noise((n,), like=self.time, generator=generator)

    def log_initial(self, x: Tensor) -> Tensor:
        if self.uniform_start:
            return x.new_full(x.shape[:-1], -self.space.dim * math.log(2.0 * math.pi), dtype=torch.float64)
        return self.space.log_gaussian(x, torch.zeros_like(x), (self.scale * self.spread[0]).square())

    def forward(self, k: Tensor, x: Tensor, score: Tensor | None, *, beside: Tensor | None = None) -> Gaussian:
        t, z = self.time[k], x / self.scale
        score = None if score is None else self.scale * score
        prior_score = torch.zeros_like(z) if self.uniform_start else -z
        level, reach = self.level[k], self.reach[k]
        seen, weight = gated(self.feature, t, score, prior_score, self.signal[k])
        unit = self.space.scaled(x, self.scale * self.spread[k])
        control, extra = self.control(t, unit, level * seen, weight, beside=beside)
        if self.uniform_start:
            # There is no linear prediction on a torus: the noised score is the control itself.
            mean = x + self.noise[k] / level * control
            variance = self.noise[k]
        else:
            data = self.recall[k] * z + reach * control
            mean = self.scale * (self.keep[k] * z + self.share[k] * data)
            variance = self.scale.square() * self.variance[k]
        if self.learn_variance:
            variance = variance * (2.0 * torch.tanh(0.5 * extra)).exp()
        return Gaussian(mean, variance)

    def backward(self, k: Tensor, x: Tensor, score: Tensor | None) -> Gaussian:
        return Gaussian(self.contraction[k] * x, self.scale.square() * self.noise[k])

    def sample_bridge(self, k: Tensor, x: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        noise = self.space.noise(tuple(x.shape[:-1]), like=x, generator=generator)
        return self.space.project(self.total_contraction[k] * x + self.scale * self.total_noise[k] * noise)


@final
class DIS(DiffusionSampler):
    """Time-reversed diffusion sampler with exact kernels.

    Arguments:
        target: The density to sample.
        num_steps: Number of steps ``K``, 64 or the schedule's by default.
        objective: The loss, log-variance by default.
        schedule: The noising chain in place of ``num_steps`` variance-exploding steps.
        point_features: Random Fourier features of the point; more resolve more modes.
        options: As in :class:`DISProcess`.
    """

    def __init__(
        self,
        target: Target,
        *,
        num_steps: int | None = None,
        objective: Objective | None = None,
        schedule: NoiseSchedule | None = None,
        point_features: int = 64,
        **options: Any,
    ) -> None:
        schedule = chosen_schedule(schedule, num_steps, variance_exploding)
        super().__init__(
            target, DISProcess(target.space, schedule, point_features=point_features, **options), objective
        )
