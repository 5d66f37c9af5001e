r"""Diffusion samplers trained as generative flow networks.

A controlled Brownian motion from the origin with prior variance :math:`S^2` and equal steps :math:`\delta = 1/K`,

.. math::
   F_k = N(x + S\,\delta\,u_\theta(t_k, x),\ S^2 \delta\, e^{l_\theta(t_k, x)}), \qquad
   B_k = N\Big(\big(1 - \tfrac{c_\phi}{k+1}\big) x,\ S^2 \delta \tfrac{k}{k+1}\, c'_\phi\Big), \qquad x_0 = 0,

where :math:`l = 0` and :math:`c = c' = 1` (the Brownian bridge) unless they are learned. A flow function

.. math:: \log f_k(x) = \phi_\theta(t_k, x) + t_k \log\rho(x) + (1 - t_k) \log N(x; 0, S^2 t_k)

plays the density of the path's law at step :math:`k` and lets losses see parts of trajectories.

References:
    Diffusion generative flow samplers: improving learning signals through partial trajectory optimization (Zhang, Chen,
    Liu, Courville, Bengio, 2024), https://arxiv.org/abs/2310.02679 (DGFS: flow function, sub-trajectory balance)
    Improved off-policy training of diffusion samplers (Sendera et al., 2024), https://arxiv.org/abs/2402.05098 (GFN:
    trajectory balance, exploration, local search)
    A theory of continuous generative flow networks (Lahlou et al., 2023), https://arxiv.org/abs/2301.12594
    Adaptive destruction processes for diffusion samplers (Gritsaev et al., 2025), https://arxiv.org/abs/2506.01541
"""

from __future__ import annotations

from typing import Any, final

import torch
from torch import Tensor

from diffsampler.networks import Control, FourierMLP, clip
from diffsampler.objective import Objective, SubTrajectoryBalance, TrajectoryBalance
from diffsampler.process import Gaussian, Process
from diffsampler.sampler import DiffusionSampler
from diffsampler.space import Space, Torus
from diffsampler.target import Target

__all__ = ["DGFS", "GFN", "GFNProcess"]


@final
class GFNProcess(Process):
    """Controlled Brownian motion from the origin with a flow function.

    Arguments:
        space: Euclidean or mean-free space.
        num_steps: Number of steps ``K``.
        scale: Standard deviation ``S`` of the uncontrolled end point; it must cover the target.
        learn_variance: Whether forward variances carry a learned factor in ``(e^-2, e^2)``.
        backward_range: Backward means and variances carry learned factors within ``1 +- backward_range``; 0 for none.
        flow: Whether there is a flow function (an anchor for sub-trajectory losses).
        width: Width of the networks.
        point_features: Random Fourier features of the point.
        detach_score: Whether pathwise losses treat the score as a constant.
        seed: Seed of the networks' initial parameters.
    """

    scale: Tensor
    time: Tensor

    def __init__(
        self,
        space: Space,
        num_steps: int = 64,
        *,
        scale: float = 1.0,
        learn_variance: bool = False,
        backward_range: float = 0.0,
        flow: bool = True,
        width: int = 64,
        point_features: int = 0,
        detach_score: bool = True,
        seed: int = 0,
    ) -> None:
        if isinstance(space, Torus):
            raise ValueError("Expected a Euclidean or mean-free space: the Brownian bridge of a torus is not Gaussian.")
        if not scale > 0.0:
            raise ValueError(f"Expected scale > 0; got {scale}.")
        if not 0.0 <= backward_range < 1.0:
            raise ValueError(f"Expected backward_range in [0, 1); got {backward_range}.")
        super().__init__(
            space,
            num_steps,
            detach_score=detach_score,
            has_bridge=backward_range == 0.0,
            learns_backward=backward_range > 0.0,
            has_anchors=flow,
            learns_anchors=flow,
        )
        self.learn_variance = learn_variance
        self.backward_range = backward_range
        self.register_buffer("scale", torch.tensor(float(scale)))
        self.register_buffer("time", torch.arange(num_steps + 1) / num_steps)
        generator = torch.Generator().manual_seed(seed)
        # Mean-free kernels must stay isotropic: one learned factor for all coordinates.
        factors = space.dim if space.dof == space.dim else 1
        self.control = Control(
            space,
            generator=generator,
            extra_outputs=factors if learn_variance else 0,
            width=width,
            point_features=point_features,
        )
        if backward_range > 0.0:
            self.backward_control = FourierMLP(space.num_features, 2, generator=generator, width=width)
        if flow:
            self.flow = FourierMLP(
                space.num_features, 1, generator=generator, width=width, point_features=point_features
            )

    def sample_initial(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        return self.time.new_zeros(n, self.space.dim)

    def log_initial(self, x: Tensor) -> Tensor:
        return x.new_zeros(x.shape[:-1], dtype=torch.float64)

    def forward(self, k: Tensor, x: Tensor, score: Tensor | None) -> Gaussian:
        assert score is not None
        t, step = self.time[k], 1.0 / self.num_steps
        residual = self.scale * score + x / self.scale
        control, extra = self.control(t, x / self.scale, residual, t.unsqueeze(-1))
        variance = self.scale.square() * step * torch.ones_like(t).unsqueeze(-1)
        if self.learn_variance:
            variance = variance * clip(extra, 2.0).exp()
        return Gaussian(x + self.scale * step * control, variance)

    def backward(self, k: Tensor, x: Tensor, score: Tensor | None) -> Gaussian:
        share = (self.time[k] / self.time[k + 1]).unsqueeze(-1)
        if self.backward_range == 0.0:
            return Gaussian(share * x, self.scale.square() * share / self.num_steps)
        out = self.backward_control(self.time[k + 1], self.space.features(x / self.scale))
        pull, factor = (1.0 + self.backward_range * torch.tanh(out)).unbind(-1)
        # The last step back ends at the origin whatever was learned.
        pull = torch.where(k == 0, torch.ones_like(pull), pull).unsqueeze(-1)
        variance = self.scale.square() * share / self.num_steps * factor.unsqueeze(-1)
        return Gaussian((1.0 - (1.0 - share) * pull) * x, variance)

    def sample_bridge(self, k: Tensor, x: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        t = self.time[k].unsqueeze(-1)
        noise = self.space.noise(tuple(x.shape[:-1]), like=x, generator=generator)
        return t * x + self.scale * (t * (1.0 - t)).sqrt() * noise

    def log_anchor(self, k: Tensor, x: Tensor, log_prob: Tensor) -> Tensor:
        t = self.time[k]
        phi = self.flow(t, self.space.features(x / self.scale)).squeeze(-1).double()
        spread = self.scale.square() * t.clamp_min(0.5 / self.num_steps).unsqueeze(-1)
        base = self.space.log_gaussian(x, torch.zeros_like(x), spread)
        level = t.double() * log_prob + (1.0 - t.double()) * base + phi
        # The ends are what they are: a point mass, and the target.
        level = torch.where(k == 0, torch.zeros_like(level), level)
        return torch.where(k == self.num_steps, log_prob.double(), level)


@final
class DGFS(DiffusionSampler):
    """Diffusion generative flow sampler: a flow function and sub-trajectory balance.

    Arguments:
        target: The density to sample.
        num_steps: Number of steps ``K``.
        objective: The loss, sub-trajectory balance with decay 0.9 by default.
        options: As in :class:`GFNProcess`.
    """

    def __init__(
        self, target: Target, *, num_steps: int = 64, objective: Objective | None = None, **options: Any
    ) -> None:
        objective = SubTrajectoryBalance(num_steps) if objective is None else objective
        super().__init__(target, GFNProcess(target.space, num_steps, **options), objective)


@final
class GFN(DiffusionSampler):
    """Generative flow network on a diffusion: learned variances and trajectory balance with a learned log Z.

    Its paper trains it on exploratory and locally improved paths: pass ``sources`` to ``fit``, see
    :class:`~diffsampler.sources.Exploratory` and :class:`~diffsampler.replay.LocalSearch`.

    Arguments:
        target: The density to sample.
        num_steps: Number of steps ``K``.
        objective: The loss, trajectory balance by default.
        options: As in :class:`GFNProcess`.
    """

    def __init__(
        self,
        target: Target,
        *,
        num_steps: int = 64,
        objective: Objective | None = None,
        learn_variance: bool = True,
        flow: bool = False,
        **options: Any,
    ) -> None:
        objective = TrajectoryBalance() if objective is None else objective
        process = GFNProcess(target.space, num_steps, learn_variance=learn_variance, flow=flow, **options)
        super().__init__(target, process, objective)
