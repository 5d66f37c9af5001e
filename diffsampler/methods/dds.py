r"""Denoising diffusion sampler: the controlled reversal of a stationary Ornstein-Uhlenbeck process.

With :math:`p_0 = N(0, S^2)`, contractions :math:`a_k` and :math:`\beta_k^2 = 1 - a_k^2`,

.. math::
   F_k = N(a_k x + S\,\beta_k^2\,u_\theta(t_k, x),\ S^2 \beta_k^2), \qquad B_k = N(a_k x,\ S^2 \beta_k^2).

The exponential integrator keeps :math:`N(0, S^2)` exactly, so the weights are exact for any number of steps, and for
any rates :math:`r_k = -2 \log a_k`, which may be learned (``learn_noise``). Both chains change with them then, so
there is no fixed noising to draw bridges from.

References:
    Denoising Diffusion Samplers (Vargas, Grathwohl, Doucet, 2023), https://arxiv.org/abs/2302.13834
"""

from __future__ import annotations

from typing import Any, final

import torch
from torch import Tensor, nn

from diffsampler.controls import ScoreFeature, chosen_control, gated, needs_score
from diffsampler.networks import ControlModule
from diffsampler.objective import Objective, ScoreFunctionKL
from diffsampler.process import Gaussian, Process
from diffsampler.sampler import DiffusionSampler
from diffsampler.schedule import NoiseSchedule, chosen_schedule, cosine_preserving
from diffsampler.space import EuclideanTorus, Space, Torus
from diffsampler.target import Target

__all__ = ["DDS", "DDSProcess"]


@final
class DDSProcess(Process):
    """Controlled reversal of a stationary Ornstein-Uhlenbeck process.

    Arguments:
        space: Euclidean or mean-free space.
        schedule: A variance-preserving noise schedule.
        scale: Standard deviation ``S`` of the prior; it must cover the target.
        learn_noise: Whether the rates of the schedule are trained. Both chains share them: losses of the weights'
            variance drive them up, whatever paths of more noise would do.
        control: What steers the chain, a network by default (:mod:`diffsampler.controls`); then options of the network
            have no effect.
        feature: Which score its gate multiplies, by default the difference between the target's and the prior's.
        width: Width of the network.
        point_features: Random Fourier features of the point.
        harmonics: Harmonics of a Fourier series in every coordinate, for targets of many separate wells.
        detach_score: Whether pathwise losses treat the score as a constant.
        seed: Seed of the network's initial parameters.
    """

    scale: Tensor
    time: Tensor
    contraction: Tensor
    variance: Tensor
    signal: Tensor
    total_contraction: Tensor
    total_noise: Tensor

    def __init__(
        self,
        space: Space,
        schedule: NoiseSchedule,
        *,
        scale: float = 1.0,
        learn_noise: bool = False,
        control: ControlModule | None = None,
        feature: ScoreFeature | None = None,
        width: int = 64,
        point_features: int = 0,
        harmonics: int = 0,
        detach_score: bool = True,
        seed: int = 0,
    ) -> None:
        if isinstance(space, Torus | EuclideanTorus):
            raise ValueError("Expected a Euclidean or mean-free space: a torus has no Ornstein-Uhlenbeck process.")
        if not scale > 0.0:
            raise ValueError(f"Expected scale > 0; got {scale}.")
        if not torch.allclose(schedule.contraction.square() + schedule.variance, torch.ones_like(schedule.variance)):
            raise ValueError("Expected a variance-preserving schedule, a_k^2 + v_k = 1.")
        num_steps = len(schedule.variance)
        super().__init__(
            space,
            num_steps,
            needs_score=needs_score(feature),
            detach_score=detach_score,
            has_bridge=not learn_noise,
            learns_backward=learn_noise,
        )
        self.register_buffer("scale", torch.tensor(float(scale)))
        self.register_buffer("time", torch.arange(num_steps + 1) / num_steps)
        self.register_buffer("contraction", schedule.contraction.float().unsqueeze(-1))
        self.register_buffer("variance", schedule.variance.float().unsqueeze(-1))
        self.register_buffer("signal", schedule.total_contraction[:-1].square().float().unsqueeze(-1))
        self.register_buffer("total_contraction", schedule.total_contraction.float().unsqueeze(-1))
        self.register_buffer("total_noise", schedule.total_variance.sqrt().float().unsqueeze(-1))
        self.log_rate: nn.Parameter | None = None
        if learn_noise:
            self.log_rate = nn.Parameter((-2.0 * schedule.contraction.log()).log().float().unsqueeze(-1))
        generator = torch.Generator().manual_seed(seed)
        self.feature = feature
        self.control = chosen_control(
            control,
            space,
            generator=generator,
            width=width,
            point_features=point_features,
            harmonics=harmonics,
        )

    def sample_initial(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        return self.scale * self.space.noise((n,), like=self.time, generator=generator)

    def log_initial(self, x: Tensor) -> Tensor:
        return self.space.log_gaussian(x, torch.zeros_like(x), self.scale.square().reshape(1))

    def forward(self, k: Tensor, x: Tensor, score: Tensor | None) -> Gaussian:
        t, z = self.time[k], x / self.scale
        score = None if score is None else self.scale * score
        control, _ = self.control(t, z, *gated(self.feature, t, score, -z, self.signal[k]))
        contraction, variance = self._noise(k)
        return Gaussian(contraction * x + self.scale * variance * control, self.scale.square() * variance)

    def backward(self, k: Tensor, x: Tensor, score: Tensor | None) -> Gaussian:
        contraction, variance = self._noise(k)
        return Gaussian(contraction * x, self.scale.square() * variance)

    def _noise(self, k: Tensor) -> tuple[Tensor, Tensor]:
        """Contraction and variance, in units of the prior's, of step ``k``."""
        if self.log_rate is None:
            return self.contraction[k], self.variance[k]
        rate = self.log_rate[k].exp()
        return torch.exp(-0.5 * rate), -torch.expm1(-rate)

    def sample_bridge(self, k: Tensor, x: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        if self.log_rate is not None:
            return super().sample_bridge(k, x, generator=generator)
        noise = self.space.noise(tuple(x.shape[:-1]), like=x, generator=generator)
        return self.space.project(self.total_contraction[k] * x + self.scale * self.total_noise[k] * noise)


@final
class DDS(DiffusionSampler):
    """Denoising diffusion sampler.

    Arguments:
        target: The density to sample.
        num_steps: Number of steps ``K``, 64 or the schedule's by default.
        objective: The loss, log-variance by default, with ``learn_noise`` the score-function KL.
        schedule: Variance-preserving noise schedule in place of ``num_steps`` cosine steps.
        options: As in :class:`DDSProcess`.

    Raises:
        ValueError: If ``learn_noise`` is to be trained by a loss that misleads it.
    """

    def __init__(
        self,
        target: Target,
        *,
        num_steps: int | None = None,
        objective: Objective | None = None,
        schedule: NoiseSchedule | None = None,
        **options: Any,
    ) -> None:
        schedule = chosen_schedule(schedule, num_steps, cosine_preserving)
        if options.get("learn_noise", False):
            objective = ScoreFunctionKL() if objective is None else objective
            if not objective.trains_shared:
                name = type(objective).__name__
                raise ValueError(f"Expected a loss that trains shared noise (ScoreFunctionKL, ReverseKL); got {name}.")
        super().__init__(target, DDSProcess(target.space, schedule, **options), objective)
