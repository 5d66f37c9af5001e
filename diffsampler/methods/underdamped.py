r"""Controlled annealing with velocities: an annealed Hamiltonian flow, refreshed once per step.

A state carries the point and the velocity half a step behind it, :math:`y_k = (x_k, w_k)`, in units in which velocities
are standard normal: a step size :math:`e_k` per coordinate is then a learned diagonal mass. With annealed densities
:math:`\log\pi_k = \beta_k \log\rho + (1 - \beta_k) \log p_0`, :math:`\beta_0 = 0`, :math:`\beta_K = 1`, and kicks
:math:`h_k(x) = \tfrac12 e_k \nabla\log\pi_k(x)`, :math:`h'_k(x) = \tfrac12 e_{k-1} \nabla\log\pi_k(x)`, one step is

.. math::
   v_k = w_k + h'_k(x_k), \qquad
   \tilde v_k \sim N(c_k v_k + s_k u^+_\theta(t_k, x_k, v_k),\ s_k^2), \qquad
   w_{k+1} = \tilde v_k + h_k(x_k), \qquad x_{k+1} = x_k + e_k w_{k+1},

a refresh of the velocity, :math:`c_k = e^{-\gamma_k}`, :math:`s_k^2 = 1 - c_k^2`, and a leapfrog step, with one score
per step. Backward, :math:`v_k \sim N(c_k \tilde v_k + s_k u^-_\theta(t_k, x_k, \tilde v_k), s_k^2)`. The controls
:math:`u^\pm = K^{-1/2} (a \pm b)` are outputs of one network; published ones have :math:`a = 0`, as in continuous time.
Initially :math:`v_0 = w_0 \sim N(0, 1)`; at the end :math:`v_K = w_K + h'_K(x_K) \sim N(0, 1)`. Both kernels are
Gaussians of :math:`w` at a given point, the shift of the point has unit Jacobian, and weights are exact. Kicks are
smoothly clipped.

With ``local_mass`` velocities have a learned scale per coordinate that depends on the point, in both refreshes
(:math:`s_k` becomes :math:`s_k m_\theta(t_k, x_k)`, times a factor of each direction's own), in the kicks and at the
end. The point's shift keeps its constant step sizes, so weights stay exact, and densities of varying scale need fewer
steps.

The refresh is the exact Ornstein-Uhlenbeck one, which leaves the velocities' law as it is for any friction; published
code takes Euler steps of it. The force at each grid point is that of its own temperature, which treats the
time-dependent Hamiltonian symmetrically; published code keeps one temperature per leapfrog step.

References:
    Transport meets variational inference: controlled Monte Carlo diffusions (Vargas, Padhy, Blessing, Nuesken, 2024),
    https://arxiv.org/abs/2307.01050 (UCMCD)
    Langevin diffusion variational inference (Geffner, Domke, 2023), https://arxiv.org/abs/2208.07743 (LDVI)
    MCMC variational inference via uncorrected Hamiltonian annealing (Geffner, Domke, 2021),
    https://arxiv.org/abs/2107.04150 (UHA)
    Underdamped diffusion bridges with applications to sampling (Blessing, Berner, Richter, Neumann, 2025),
    https://arxiv.org/abs/2503.01006
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
from diffsampler.objective import Objective, ReverseKL
from diffsampler.priors import Prior
from diffsampler.process import Gaussian, Process
from diffsampler.sampler import DiffusionSampler
from diffsampler.space import Euclidean, EuclideanTorus, Space, Torus
from diffsampler.target import Target

__all__ = ["LDVI", "UCMCD", "UHA", "UnderdampedProcess"]

STEP_SHARE = 0.5
"""Initial step size as a share of the annealed modes' scale."""


@final
class UnderdampedProcess(Process):
    """Controlled annealed Hamiltonian chain.

    Arguments:
        space: Where the points live; velocities on a torus are plain vectors.
        num_steps: Number of steps ``K``.
        scale: Scale of the target, and initial standard deviation of the default prior.
        local_scale: Smallest scale of the target relative to ``scale``, at most 1; the initial schedule and step sizes
            follow from it.
        friction: Initial friction per step.
        forward_control: Whether forward kernels carry the control.
        backward_control: Whether backward kernels carry the control.
        learn_steps: Whether step sizes (and so the mass) and friction are trained; only losses with a path gradient
            can: the points of a fixed path do not tell steps, and its weight hardly depends on friction.
        local_mass: Whether velocities carry a learned scale per coordinate that depends on the point.
        prior: Initial law; by default a learned Gaussian, or the uniform law of a torus.
        width: Width of the network.
        point_features: Random Fourier features of the point.
        harmonics: Harmonics of a Fourier series in every coordinate, for targets of many separate wells.
        detach_score: Whether pathwise losses treat the score as a constant.
        seed: Seed of the network's initial parameters.
    """

    clip_bound = 4.0
    """Largest kick in standard deviations of the velocity, per coordinate."""
    local_bound = 5.0
    """Largest logarithm of a local factor of the velocity's scale."""
    factor_bound = 1.0
    """Largest logarithm of the factor by which a direction's spread differs from the common one."""

    scale: Tensor
    time: Tensor

    def __init__(
        self,
        space: Space,
        num_steps: int = 64,
        *,
        scale: float = 1.0,
        local_scale: float = 0.3,
        friction: float = 0.5,
        forward_control: bool = True,
        backward_control: bool = True,
        learn_steps: bool = True,
        local_mass: bool = False,
        prior: Prior | None = None,
        width: int = 64,
        point_features: int = 0,
        harmonics: int = 0,
        detach_score: bool = False,
        seed: int = 0,
    ) -> None:
        if not friction > 0.0:
            raise ValueError(f"Expected friction > 0; got {friction}.")
        if isinstance(space, EuclideanTorus):
            raise ValueError(f"Expected a space of one kind for velocities; got {space}.")
        prior = checked_prior(space, prior, scale, local_scale)
        super().__init__(
            space,
            num_steps,
            detach_score=detach_score,
            learns_backward=True,
            learns_initial=prior.learns,
            has_shift=True,
            learns_shift=learn_steps,
            learns_carried=learn_steps or local_mass,
            drawn_space=Euclidean(space.dim) if isinstance(space, Torus) else space,
        )
        self.forward_control = forward_control
        self.backward_control = backward_control
        self.prior = prior
        scales = num_scales(space)
        self.register_buffer("time", torch.arange(num_steps + 1) / num_steps)
        self.register_buffer("scale", torch.tensor(float(scale)))
        beta, variance = initial_path(num_steps - 1, local_scale)
        self.increments = nn.Parameter(beta.diff(prepend=beta.new_zeros(1)).log().float())
        step = STEP_SHARE * scale * variance.sqrt()
        self.log_step = nn.Parameter(step.log().float().unsqueeze(-1).repeat(1, scales), requires_grad=learn_steps)
        rate = torch.full((num_steps, scales), math.log(friction))
        self.log_friction = nn.Parameter(rate, requires_grad=learn_steps)

        self.control: Control | None = None
        self.mass_control: Control | None = None
        shared: dict[str, Any] = {"gate_init": 0.0, "bound": self.clip_bound, "feature_input": True, "width": width}
        shared |= {"point_features": point_features, "harmonics": harmonics}
        shared |= {"generator": torch.Generator().manual_seed(seed)}
        if forward_control or backward_control:
            factors = 2 * scales if local_mass else 0
            self.control = Control(space, extra_inputs=space.dim, extra_outputs=space.dim + factors, **shared)
        if local_mass:
            self.mass_control = Control(space, extra_outputs=scales, **shared)

    @property
    def beta(self) -> Tensor:
        """Annealing schedule of the points, ``(K + 1,)``, from 0 to 1."""
        return functional.pad(torch.softmax(self.increments, 0).cumsum(0), (1, 0))

    def regridded(self, num_steps: int) -> UnderdampedProcess:
        """This chain with another number of steps: the same dynamics in continuous time, to be trained further."""
        new = copy.deepcopy(self)
        new.num_steps = num_steps
        new.time = (torch.arange(num_steps + 1) / num_steps).to(self.time)
        learn, pace = self.log_step.requires_grad, math.log(self.num_steps / num_steps)
        with torch.no_grad():
            new.increments = nn.Parameter(regrid_increments(self.increments, num_steps))
            new.log_step = nn.Parameter(regrid(self.log_step, num_steps) + pace, requires_grad=learn)
            new.log_friction = nn.Parameter(regrid(self.log_friction, num_steps) + pace, requires_grad=learn)
        return new

    def observed(self, state: Tensor) -> Tensor:
        return state[..., : self.space.dim]

    def point(self, state: Tensor) -> Tensor:
        return state[..., : self.space.dim]

    def drawn(self, state: Tensor) -> Tensor:
        return state[..., self.space.dim :]

    def place(self, state: Tensor, drawn: Tensor) -> Tensor:
        return torch.cat([self.point(state), drawn], -1)

    def shift(self, k: Tensor, state: Tensor) -> Tensor:
        x, velocity = self.point(state), self.drawn(state)
        return torch.cat([self.space.project(x + self.log_step[k].exp() * velocity), velocity], -1)

    def unshift(self, k: Tensor, state: Tensor) -> Tensor:
        x, velocity = self.point(state), self.drawn(state)
        return torch.cat([self.space.project(x - self.log_step[k].exp() * velocity), velocity], -1)

    def sample_initial(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        x = self.prior.sample(n, generator=generator)
        return torch.cat([x, self.drawn_space.noise((n,), like=x, generator=generator)], -1)

    def log_initial(self, x: Tensor) -> Tensor:
        return self.prior.log_prob(self.point(x)) + self._log_velocity(self.drawn(x))

    def complete(self, x: Tensor, score: Tensor | None, *, generator: torch.Generator | None = None) -> Tensor:
        kick, width = self._last(x, score)
        velocity = self.drawn_space.noise(tuple(x.shape[:-1]), like=x, generator=generator)
        return torch.cat([x, width * velocity - kick], -1)

    def log_carried(self, state: Tensor, score: Tensor | None) -> Tensor:
        kick, width = self._last(self.point(state), score)
        velocity = self.drawn(state) + kick
        return self.drawn_space.log_gaussian(velocity, torch.zeros_like(velocity), width.square())

    def _log_velocity(self, velocity: Tensor) -> Tensor:
        return self.drawn_space.log_gaussian(velocity, torch.zeros_like(velocity), velocity.new_ones(1))

    def _last(self, x: Tensor, score: Tensor | None) -> tuple[Tensor, Tensor]:
        """The half kick that ends the last step, and the velocity's standard deviation there."""
        assert score is not None
        k = torch.tensor(self.num_steps, device=x.device)
        width = self._width(k, x, 0.5 * self.log_step[-1].exp() * score)
        return self._kick(self.log_step[-1], score, width), width

    def _width(self, k: Tensor, x: Tensor, kick: Tensor) -> Tensor:
        if self.mass_control is None:
            return x.new_ones(1)
        _, extra = self.mass_control(self.time[k], self.space.scaled(x, self.scale), kick)
        return (clip(extra, self.local_bound) * (k > 0).unsqueeze(-1)).exp()

    def _kick(self, log_step: Tensor, force: Tensor, width: Tensor) -> Tensor:
        return self.space.project_vector(width * clip(0.5 * log_step.exp() * width * force, self.clip_bound))

    def forward(self, k: Tensor, x: Tensor, score: Tensor | None) -> Gaussian:
        before, after, width = self._kicks(k, self.point(x), score)
        mean, variance = self._refresh(k, self.point(x), self.drawn(x) + before, after, width, 1.0)
        return Gaussian(mean + after, variance)

    def backward(self, k: Tensor, x: Tensor, score: Tensor | None) -> Gaussian:
        before, after, width = self._kicks(k, self.point(x), score)
        mean, variance = self._refresh(k, self.point(x), self.drawn(x) - after, after, width, -1.0)
        return Gaussian(mean - before, variance)

    def _kicks(self, k: Tensor, x: Tensor, score: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Half kicks that end step ``k - 1`` (none before the first) and begin step ``k``; the local velocity scale."""
        assert score is not None
        force = annealed_score(self.prior, self.beta[k].unsqueeze(-1), x, score)
        log_step = self.log_step[k]
        width = self._width(k, x, 0.5 * log_step.exp() * force)
        before = self._kick(self.log_step[(k - 1).clamp_min(0)], force, width)
        return before * (k > 0).unsqueeze(-1), self._kick(log_step, force, width), width

    def _refresh(self, k: Tensor, x: Tensor, velocity: Tensor, kick: Tensor, width: Tensor, sign: float) -> Gaussian:
        """Law of the refreshed velocity, forward (``sign`` 1) or backward (-1)."""
        rate = self.log_friction[k].exp()
        mean = torch.exp(-rate) * velocity
        spread = width * (-torch.expm1(-2.0 * rate)).sqrt()
        if self.control is None or not (self.forward_control if sign > 0.0 else self.backward_control):
            return Gaussian(mean, spread.square())
        control, extra = self.control(
            self.time[k], self.space.scaled(x, self.scale), kick / width, beside=velocity / width
        )
        control = self.space.project_vector(sign * control + extra[..., : self.space.dim])
        if self.mass_control is not None:
            factor = extra[..., self.space.dim :].chunk(2, -1)[0 if sign > 0.0 else 1]
            spread = spread * clip(factor, self.factor_bound).exp()
        return Gaussian(mean + self.num_steps**-0.5 * spread * control, spread.square())


@final
class UCMCD(DiffusionSampler):
    """Controlled Monte Carlo diffusion, underdamped: the control acts in both directions.

    Arguments:
        target: The density to sample.
        num_steps: Number of steps ``K``.
        objective: The loss, reverse KL by default: it also trains step sizes and friction, which losses at fixed paths
            cannot.
        options: As in :class:`UnderdampedProcess`.
    """

    def __init__(
        self, target: Target, *, num_steps: int = 64, objective: Objective | None = None, **options: Any
    ) -> None:
        objective = ReverseKL() if objective is None else objective
        options = {"learn_steps": objective.needs_path_gradient, **options}
        process = UnderdampedProcess(target.space, num_steps, **options)
        super().__init__(target, process, objective)


@final
class LDVI(DiffusionSampler):
    """Langevin diffusion variational inference: annealed dynamics whose reversal is learned (underdamped MCD).

    Arguments:
        target: The density to sample.
        num_steps: Number of steps ``K``.
        objective: The loss, reverse KL by default.
        options: As in :class:`UnderdampedProcess`.
    """

    def __init__(
        self, target: Target, *, num_steps: int = 64, objective: Objective | None = None, **options: Any
    ) -> None:
        objective = ReverseKL() if objective is None else objective
        options = {"learn_steps": objective.needs_path_gradient, **options}
        process = UnderdampedProcess(target.space, num_steps, forward_control=False, **options)
        super().__init__(target, process, objective)


@final
class UHA(DiffusionSampler):
    """Uncorrected Hamiltonian annealing: only prior, temperatures, steps, mass and friction are learned.

    Arguments:
        target: The density to sample.
        num_steps: Number of steps ``K``.
        objective: The loss, reverse KL by default.
        options: As in :class:`UnderdampedProcess`.
    """

    def __init__(
        self, target: Target, *, num_steps: int = 64, objective: Objective | None = None, **options: Any
    ) -> None:
        objective = ReverseKL() if objective is None else objective
        options = {"learn_steps": objective.needs_path_gradient, **options}
        process = UnderdampedProcess(target.space, num_steps, forward_control=False, backward_control=False, **options)
        super().__init__(target, process, objective)
