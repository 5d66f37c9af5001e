r"""Path integral sampler: a controlled Brownian motion from a point mass.

With prior variance :math:`S^2` and equal steps :math:`\delta = 1/K`,

.. math::
   F_k = N(x + S\,\delta\,u_\theta(t_k, x),\ S^2 \delta), \qquad
   B_k = N\Big(\tfrac{k}{k+1} x,\ S^2 \delta \tfrac{k}{k+1}\Big), \qquad x_0 = 0,

the Brownian bridge back to the origin (:math:`B_0` is a point mass on both sides and cancels). The control starts
at the Langevin-like drift :math:`t\,(S \nabla\log\rho + x / S)`, exact as :math:`t \to 1`.

References:
    Path Integral Sampler: a stochastic control approach for sampling (Zhang, Chen, 2022),
    https://arxiv.org/abs/2111.15141
"""

from __future__ import annotations

from typing import Any, final

import torch
from torch import Tensor

from diffsampler.controls import ScoreFeature, chosen_control, gated, needs_score
from diffsampler.networks import ControlModule
from diffsampler.objective import Objective
from diffsampler.process import Gaussian, Process
from diffsampler.sampler import DiffusionSampler
from diffsampler.space import EuclideanTorus, Space, Torus
from diffsampler.target import Target

__all__ = ["PIS", "PISProcess"]


@final
class PISProcess(Process):
    """Controlled Brownian motion from the origin.

    Arguments:
        space: Euclidean or mean-free space.
        num_steps: Number of steps ``K``.
        scale: Standard deviation ``S`` of the uncontrolled end point; it must cover the target.
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

    def __init__(
        self,
        space: Space,
        num_steps: int = 64,
        *,
        scale: float = 1.0,
        control: ControlModule | None = None,
        feature: ScoreFeature | None = None,
        width: int = 64,
        point_features: int = 0,
        harmonics: int = 0,
        detach_score: bool = True,
        seed: int = 0,
    ) -> None:
        if isinstance(space, Torus | EuclideanTorus):
            raise ValueError("Expected a Euclidean or mean-free space: the Brownian bridge of a torus is not Gaussian.")
        super().__init__(space, num_steps, needs_score=needs_score(feature), detach_score=detach_score, has_bridge=True)
        self.register_buffer("scale", torch.tensor(_positive("scale", scale)))
        self.register_buffer("time", torch.arange(num_steps + 1) / num_steps)
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
        return self.time.new_zeros(n, self.space.dim)

    def log_initial(self, x: Tensor) -> Tensor:
        return x.new_zeros(x.shape[:-1], dtype=torch.float64)

    def forward(self, k: Tensor, x: Tensor, score: Tensor | None) -> Gaussian:
        t, step, z = self.time[k], 1.0 / self.num_steps, x / self.scale
        score = None if score is None else self.scale * score
        control, _ = self.control(t, z, *gated(self.feature, t, score, -z, t.unsqueeze(-1)))
        variance = self.scale.square() * step * torch.ones_like(t).unsqueeze(-1)
        return Gaussian(x + self.scale * step * control, variance)

    def backward(self, k: Tensor, x: Tensor, score: Tensor | None) -> Gaussian:
        shrink = (self.time[k] / self.time[k + 1]).unsqueeze(-1)
        return Gaussian(shrink * x, self.scale.square() * shrink / self.num_steps)

    def sample_bridge(self, k: Tensor, x: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        t = self.time[k].unsqueeze(-1)
        noise = self.space.noise(tuple(x.shape[:-1]), like=x, generator=generator)
        return t * x + self.scale * (t * (1.0 - t)).sqrt() * noise


def _positive(name: str, value: float) -> float:
    if not value > 0.0:
        raise ValueError(f"Expected {name} > 0; got {value}.")
    return float(value)


@final
class PIS(DiffusionSampler):
    """Path integral sampler.

    Arguments:
        target: The density to sample.
        num_steps: Number of steps ``K``.
        objective: The loss, log-variance by default.
        options: As in :class:`PISProcess`.
    """

    def __init__(
        self, target: Target, *, num_steps: int = 64, objective: Objective | None = None, **options: Any
    ) -> None:
        super().__init__(target, PISProcess(target.space, num_steps, **options), objective)
