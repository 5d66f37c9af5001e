r"""Amortized sampling: one diffusion for a family of densities :math:`\rho(x; c)`.

The state is :math:`y = (x, c)`: the context ``c`` is drawn with the path, carried along unchanged and shown to the
control, so one network learns all posteriors of a family and :math:`\log Z(c)` comes from the weights of paths with
that context. Formula (W) holds given ``c``, and the law of the contexts cancels.

A batch holds several paths of each context. The variance of log weights is taken within contexts
(:class:`ContextLogVariance`), as :math:`\log Z(c)` differs between them.

References:
    Improved off-policy training of diffusion samplers (Sendera et al., 2024), https://arxiv.org/abs/2402.05098
    (conditional samplers of a variational autoencoder's posterior, grouped VarGrad)
    Robust scheduling with GFlowNets (Zhang et al., 2023), https://arxiv.org/abs/2302.05446
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any, final

import torch
from torch import Tensor

from diffsampler import estimators
from diffsampler.methods.dis import DISProcess
from diffsampler.objective import Objective
from diffsampler.particles import Particles
from diffsampler.process import Gaussian, Process
from diffsampler.sampler import DiffusionSampler
from diffsampler.schedule import NoiseSchedule, chosen_schedule, variance_exploding
from diffsampler.space import Space
from diffsampler.target import ForwardingTarget, Target
from diffsampler.trajectory import Trajectory, simulate

__all__ = ["ConditionalDIS", "ConditionalProcess", "ConditionalTarget", "ContextLogVariance"]

CONTEXTS_SEEN = 1024
"""Contexts from which their scale is estimated."""


class ConditionalTarget(Target):
    """A family of densities of ``x``, one for each context ``c``.

    Everywhere a :class:`~diffsampler.target.Target` is asked about points, this one is asked about ``(x, c)``, joined
    along the last axis, shape ``(..., D + C)``; scores have shape ``(..., D)``.

    Arguments:
        space: Where ``x`` lives.
        context_dim: Length ``C`` of a context.
    """

    def __init__(self, space: Space, context_dim: int) -> None:
        super().__init__(space)
        if context_dim < 1:
            raise ValueError(f"Expected context_dim >= 1; got {context_dim}.")
        self.context_dim = context_dim

    @abstractmethod
    def log_prob_given(self, x: Tensor, context: Tensor) -> Tensor:
        """Unnormalized log density of ``x (..., D)`` given contexts ``(..., C)``, shape ``(...)``."""

    @abstractmethod
    def sample_context(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        """Draw ``n`` contexts of the kind that will be asked for, shape ``(n, C)``."""

    def log_prob(self, x: Tensor) -> Tensor:
        return self.log_prob_given(x[..., : self.dim], x[..., self.dim :])

    def log_prob_and_score(self, x: Tensor) -> tuple[Tensor, Tensor]:
        point, context = x[..., : self.dim].detach(), x[..., self.dim :].detach()
        with torch.enable_grad():
            point = point.requires_grad_()
            log_prob = self.log_prob_given(point, context)
            (score,) = torch.autograd.grad(log_prob.sum(), point)
        return log_prob.detach(), score

    @final
    def given(self, context: Tensor) -> Target:
        """The density of one context ``(C,)``, an ordinary target for any sampler."""
        if context.shape != (self.context_dim,):
            raise ValueError(f"Expected a context of shape {(self.context_dim,)}; got {tuple(context.shape)}.")
        return _Given(self, context)


@final
class _Given(ForwardingTarget):
    """A conditional target at one context."""

    context: Tensor

    def __init__(self, family: ConditionalTarget, context: Tensor) -> None:
        super().__init__(family)
        self.register_buffer("context", context)

    def _join(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.context.to(x).expand(*x.shape[:-1], -1)], -1)

    def log_prob(self, x: Tensor) -> Tensor:
        return self.target.log_prob(self._join(x))

    def log_prob_and_score(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.target.log_prob_and_score(self._join(x))


@final
class ConditionalProcess(Process):
    """A time-reversed chain that carries a context.

    Arguments:
        target: The family; its contexts are drawn when paths are.
        base: The chain of ``x``, whose network has ``context_dim`` extra inputs.
        repeats: Paths of each context in a batch, at least 2.
    """

    shift_context: Tensor
    scale_context: Tensor

    def __init__(self, target: ConditionalTarget, base: DISProcess, *, repeats: int = 8) -> None:
        if repeats < 2:
            raise ValueError(f"Expected repeats >= 2: a variance needs two paths of a context; got {repeats}.")
        super().__init__(base.space, base.num_steps, has_bridge=base.has_bridge)
        self.base = base
        self.repeats = repeats
        self._family = [target]  # in a list: the target is no part of the process
        self.fixed: Tensor | None = None
        seen = target.sample_context(CONTEXTS_SEEN, generator=torch.Generator().manual_seed(0)).double()
        scale = seen.std(0)
        self.register_buffer("shift_context", seen.mean(0).float())
        self.register_buffer("scale_context", torch.where(scale > 0.0, scale, torch.ones_like(scale)).float())

    def _split(self, state: Tensor) -> tuple[Tensor, Tensor]:
        return state[..., : self.space.dim], state[..., self.space.dim :]

    def sample_initial(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        x = self.base.sample_initial(n, generator=generator)
        if self.fixed is not None:
            context = self.fixed
        else:
            count = math.ceil(n / self.repeats)
            context = self._family[0].sample_context(count, generator=generator).repeat_interleave(self.repeats, 0)[:n]
        return torch.cat([x, context.to(x).expand(n, -1)], -1)

    def log_initial(self, x: Tensor) -> Tensor:
        return self.base.log_initial(self.point(x))

    def point(self, state: Tensor) -> Tensor:
        return self._split(state)[0]

    def drawn(self, state: Tensor) -> Tensor:
        return self._split(state)[0]

    def place(self, state: Tensor, drawn: Tensor) -> Tensor:
        return torch.cat([drawn, self._split(state)[1]], -1)

    def forward(self, k: Tensor, x: Tensor, score: Tensor | None) -> Gaussian:
        point, context = self._split(x)
        return self.base(k, point, score, beside=(context - self.shift_context) / self.scale_context)

    def backward(self, k: Tensor, x: Tensor, score: Tensor | None) -> Gaussian:
        return self.base.backward(k, self.point(x), score)

    def sample_bridge(self, k: Tensor, x: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        return self.place(x, self.base.sample_bridge(k, self.point(x), generator=generator))


@final
class ContextLogVariance(Objective):
    """Variance of the log weights within each context, averaged over contexts.

    Arguments:
        dim: Length ``D`` of the points; what follows in a state is its context.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, trajectory: Trajectory) -> Tensor:
        context = trajectory.x[0, :, self.dim :]
        _, group, size = torch.unique(context, dim=0, return_inverse=True, return_counts=True)
        log_weight = trajectory.log_weight
        mean = log_weight.new_zeros(len(size)).index_add(0, group, log_weight) / size
        # One degree of freedom goes to each mean; lost paths may leave a context with a single one.
        free = (log_weight.shape[0] - len(size)) or 1
        return (log_weight - mean[group]).square().sum() / free


@final
class ConditionalDIS(DiffusionSampler):
    """Time-reversed diffusion sampler of a family of densities.

    :meth:`sample` draws contexts and points together; :meth:`sample_given` draws points of one context, with its own
    log Z.

    Arguments:
        target: The family.
        num_steps: Number of steps ``K``, 64 or the schedule's by default.
        objective: The loss, variance within contexts by default.
        schedule: The noising chain in place of ``num_steps`` variance-exploding steps.
        repeats: Paths of each context in a batch.
        options: As in :class:`~diffsampler.methods.dis.DISProcess`.
    """

    target: ConditionalTarget

    def __init__(
        self,
        target: ConditionalTarget,
        *,
        num_steps: int | None = None,
        objective: Objective | None = None,
        schedule: NoiseSchedule | None = None,
        repeats: int = 8,
        **options: Any,
    ) -> None:
        if not isinstance(target, ConditionalTarget):
            raise TypeError(f"Expected a ConditionalTarget; got {type(target).__name__}.")
        schedule = chosen_schedule(schedule, num_steps, variance_exploding)
        base = DISProcess(target.space, schedule, extra_inputs=target.context_dim, **options)
        process = ConditionalProcess(target, base, repeats=repeats)
        super().__init__(target, process, ContextLogVariance(target.dim) if objective is None else objective)
        self._conditional = process

    def sample_given(self, context: Tensor, n: int, *, seed: int = 0) -> Particles:
        """Draw ``n`` weighted particles of the density with one context ``(C,)``."""
        if context.shape != (self.target.context_dim,):
            raise ValueError(f"Expected a context of shape {(self.target.context_dim,)}; got {tuple(context.shape)}.")
        self._conditional.fixed = context
        try:
            return self.sample(n, seed=seed)
        finally:
            self._conditional.fixed = None

    def log_normalizer_given(self, contexts: Tensor, *, paths: int = 64, seed: int = 0) -> tuple[Tensor, Tensor]:
        """Log Z and its standard error for every row of ``contexts (m, C)``, from ``paths`` paths each, ``(m,)``."""
        generator = torch.Generator(self.device).manual_seed(seed)
        self._conditional.fixed = contexts.repeat_interleave(paths, 0)
        try:
            count = contexts.shape[0] * paths
            log_weight = simulate(self.process, self._counted, count, generator=generator).log_weight
        finally:
            self._conditional.fixed = None
        rows = [estimators.importance_log_normalizer(row) for row in log_weight.reshape(-1, paths)]
        return torch.tensor([row.value for row in rows]), torch.tensor([row.std_error for row in rows])
