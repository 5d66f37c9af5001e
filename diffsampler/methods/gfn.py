r"""Diffusion samplers trained as generative flow networks.

A controlled Brownian motion from the origin with prior variance :math:`S^2` on a grid
:math:`0 = \tau_0 < \dots < \tau_K = 1` with steps :math:`\delta_k`,

.. math::
   F_k = N\Big(x + \frac{S\,\delta_k}{\sqrt{1 - \tau_k}} u_\theta(t_k, x),\ S^2 \delta_k e^{l_\theta(t_k, x)}\Big),
   \qquad B_k = N\Big(\big(1 - \tfrac{\delta_k}{\tau_{k+1}} c_\phi\big) x,\
   S^2 \tfrac{\delta_k \tau_k}{\tau_{k+1}}\, c'_\phi\Big), \qquad x_0 = 0,

where :math:`c = c' = 1` (the Brownian bridge) unless they are learned. The control is in units of the standard
deviation of :math:`x_K` given :math:`x_k` under the prior, and starts at the first-order effect of the target,
:math:`\tau \sqrt{1 - \tau}\,(S \nabla\log\rho + x / S)`; :math:`l = 0` unless variances are learned. The levels
:math:`\sqrt{(1 - \tau) / \tau}` are log-uniform, so that the last steps are as small as the target's details; equal
steps, as published, are ``level_min=None``. A flow function

.. math:: \log f_k(x) = \phi_\theta(t_k, x) + \tau_k \log\rho(x) + (1 - \tau_k) \log N(x; 0, S^2 \tau_k)

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

import math
from typing import Any, final

import torch
from torch import Tensor

from diffsampler.controls import ScoreFeature, chosen_control, gated, needs_score
from diffsampler.networks import ControlModule, FourierMLP, clip
from diffsampler.objective import Objective, SubTrajectoryBalance, TrajectoryBalance
from diffsampler.process import Gaussian, Process
from diffsampler.sampler import DiffusionSampler
from diffsampler.space import EuclideanTorus, Space, Torus
from diffsampler.target import Target

__all__ = ["DGFS", "GFN", "GFNProcess"]

LEVEL_MAX = 3.0
"""Level after the first step, in units of the scale: the target's shape hardly shows through it."""


@final
class GFNProcess(Process):
    """Controlled Brownian motion from the origin with a flow function.

    Arguments:
        space: Euclidean or mean-free space.
        num_steps: Number of steps ``K``.
        scale: Standard deviation ``S`` of the uncontrolled end point; it must cover the target.
        level_min: Smallest level of the grid, in units of ``scale``; None for equal steps.
        learn_variance: Whether forward variances carry a learned factor in ``(e^-4, e^4)``.
        backward_range: Backward means and variances carry learned factors within ``1 +- backward_range``; 0 for none.
        flow: Whether there is a flow function (an anchor for sub-trajectory losses).
        control: What steers the chain, a network by default (:mod:`diffsampler.controls`); then options of the network
            have no effect.
        feature: Which score its gate multiplies, by default the difference between the target's and the prior's.
        width: Width of the networks.
        point_features: Random Fourier features of the point.
        harmonics: Harmonics of a Fourier series in every coordinate, for targets of many separate wells.
        detach_score: Whether pathwise losses treat the score as a constant.
        seed: Seed of the networks' initial parameters.
    """

    scale: Tensor
    time: Tensor
    tau: Tensor

    def __init__(
        self,
        space: Space,
        num_steps: int = 64,
        *,
        scale: float = 1.0,
        level_min: float | None = 0.03,
        learn_variance: bool = False,
        backward_range: float = 0.0,
        flow: bool = True,
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
        if not scale > 0.0:
            raise ValueError(f"Expected scale > 0; got {scale}.")
        if not 0.0 <= backward_range < 1.0:
            raise ValueError(f"Expected backward_range in [0, 1); got {backward_range}.")
        super().__init__(
            space,
            num_steps,
            needs_score=needs_score(feature) or flow,
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
        self.register_buffer("tau", _grid(num_steps, level_min).float().unsqueeze(-1))
        generator = torch.Generator().manual_seed(seed)
        # Mean-free kernels must stay isotropic: one learned factor for all coordinates.
        factors = space.dim if space.dof == space.dim else 1
        self.feature = feature
        self.control = chosen_control(
            control,
            space,
            generator=generator,
            bound=5.0,
            feature_input=True,
            extra_outputs=factors if learn_variance else 0,
            width=width,
            point_features=point_features,
            harmonics=harmonics,
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
        tau, after = self.tau[k], self.tau[k + 1]
        step, left = after - tau, 1.0 - tau
        score = None if score is None else self.scale * score
        residual, weight = gated(self.feature, self.time[k], score, -x / self.scale, tau)
        # The marginal spread of the prior, from the first step on: there x is the origin.
        seen = x / (self.scale * torch.maximum(tau, self.tau[1]).sqrt())
        control, extra = self.control(self.time[k], seen, left.sqrt() * residual, weight)
        mean = x + self.scale * step / left.sqrt() * control
        variance = self.scale.square() * step
        if self.learn_variance:
            variance = variance * clip(extra, 4.0).exp()
        return Gaussian(mean, variance * torch.ones_like(tau))

    def backward(self, k: Tensor, x: Tensor, score: Tensor | None) -> Gaussian:
        share = self.tau[k] / self.tau[k + 1]
        variance = self.scale.square() * share * (self.tau[k + 1] - self.tau[k])
        if self.backward_range == 0.0:
            return Gaussian(share * x, variance)
        out = self.backward_control(self.time[k + 1], self.space.features(x / self.scale))
        pull, factor = (1.0 + self.backward_range * torch.tanh(out)).split(1, -1)
        # The last step back ends at the origin whatever was learned.
        pull = torch.where((k == 0).unsqueeze(-1), torch.ones_like(pull), pull)
        return Gaussian((1.0 - (1.0 - share) * pull) * x, variance * factor)

    def sample_bridge(self, k: Tensor, x: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        tau = self.tau[k]
        noise = self.space.noise(tuple(x.shape[:-1]), like=x, generator=generator)
        return tau * x + self.scale * (tau * (1.0 - tau)).sqrt() * noise

    def log_anchor(self, k: Tensor, x: Tensor, log_prob: Tensor) -> Tensor:
        tau = self.tau[k]
        reach = torch.maximum(tau, self.tau[1])
        phi = self.flow(self.time[k], self.space.features(x / (self.scale * reach.sqrt()))).squeeze(-1).double()
        base = self.space.log_gaussian(x, torch.zeros_like(x), self.scale.square() * reach)
        share = tau.squeeze(-1).double()
        level = share * log_prob + (1.0 - share) * base + phi
        # The ends are what they are: a point mass, and the target.
        level = torch.where(k == 0, torch.zeros_like(level), level)
        return torch.where(k == self.num_steps, log_prob.double(), level)


def _grid(num_steps: int, level_min: float | None) -> Tensor:
    """Times ``tau_k``, shape ``(K + 1,)``, float64."""
    if level_min is None or num_steps == 1:
        return torch.arange(num_steps + 1, dtype=torch.float64) / num_steps
    if not 0.0 < level_min < LEVEL_MAX:
        raise ValueError(f"Expected 0 < level_min < {LEVEL_MAX}; got {level_min}.")
    level = torch.logspace(math.log10(LEVEL_MAX), math.log10(level_min), num_steps - 1, dtype=torch.float64)
    return torch.cat([level.new_zeros(1), 1.0 / (1.0 + level.square()), level.new_ones(1)])


@final
class DGFS(DiffusionSampler):
    """Diffusion generative flow sampler: a flow function and sub-trajectory balance.

    Arguments:
        target: The density to sample.
        num_steps: Number of steps ``K``.
        objective: The loss, sub-trajectory balance by default.
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
