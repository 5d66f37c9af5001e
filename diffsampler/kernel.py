r"""Markov transitions on batched particles, with explicit state.

A kernel is a pair of functions: ``init(x, log_density) -> State`` and ``step(state, log_density, params, generator) ->
(State, Info)``. The log density is an argument, so tempering never rebuilds a kernel, and nothing is hidden or mutated.
``Info.log_ratio`` is :math:`\log B(x|x') - \log F(x'|x)` of the transition that was made, so annealed importance
sampling, stochastic normalizing flows, SMC and learned diffusions share one weight formula. A kernel with velocities
adds the change of their log density, :math:`(|v|^2 - |v'|^2) / 2` over the moves that do not keep :math:`N(0, I)`
invariant, so that the formula holds for positions alone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from diffsampler.space import Space

__all__ = [
    "FreeRunningKernel",
    "Info",
    "Kernel",
    "KernelParams",
    "LogDensity",
    "State",
    "Trace",
    "with_path_weight",
]

LogDensity = Callable[[Tensor], tuple[Tensor, Tensor]]
"""A batched density with gradient: ``x (..., D) -> (log_prob (...), score (..., D))``, as Target.log_prob_and_score."""


class State(NamedTuple):
    """What the next step needs. All batched over chains."""

    x: Tensor
    """Positions, shape ``(..., D)``."""
    log_prob: Tensor
    """Log density at ``x``, shape ``(...)``."""
    score: Tensor
    """Gradient of the log density at ``x``, shape ``(..., D)``."""
    velocity: Tensor | None = None
    """Whitened velocities, shape ``(..., D)``, of kernels that keep them from step to step; None for all others."""

    def take(self, index: Tensor) -> State:
        """The states at ``index``, a mask or a tensor of positions along the first axis."""
        velocity = None if self.velocity is None else self.velocity[index]
        return State(self.x[index], self.log_prob[index], self.score[index], velocity)


class Info(NamedTuple):
    """What only weights, adaptation and diagnostics need."""

    log_ratio: Tensor
    """``log B(x|x') - log F(x'|x)`` of the step, shape ``(...)``, float64."""
    acceptance: Tensor
    """Acceptance probability, shape ``(...)``; 1 for unadjusted kernels."""
    evaluations: int
    """Density-and-gradient evaluations spent per particle."""
    nonfinite: Tensor
    """Boolean, shape ``(...)``: the proposal hit a non-finite density or gradient and was refused."""
    proposal: State | None = None
    """Where the particles would have gone, velocities included, for adaptation that learns from refused moves too."""
    useful: Tensor | None = None
    """Evaluations whose result was used, shape ``(...)``, where chains wait for each other; None if all were."""
    diverged: Tensor | None = None
    """Boolean, shape ``(...)``: the trajectory lost its energy; None for kernels without trajectories."""


class Trace(NamedTuple):
    """What many transitions leave behind, per chain."""

    x: Tensor
    """Recorded positions, shape ``(..., draws, D)``."""
    acceptance: Tensor
    """Mean acceptance probability over the evaluations of each chain, shape ``(...)``."""
    evaluations: int
    """Density-and-gradient evaluations spent per particle, those of waiting chains included."""
    useful: Tensor
    """Evaluations whose result was used, shape ``(...)``."""
    nonfinite: Tensor
    """Transitions that hit a non-finite density or gradient, shape ``(...)``, int64."""
    diverged: Tensor
    """Transitions whose trajectory lost its energy, shape ``(...)``, int64."""


class KernelParams(NamedTuple):
    """Tunable numbers of a kernel, adapted from outside and frozen while recording."""

    step_size: Tensor
    """Step size, a scalar tensor or one that broadcasts against ``(...)`` chains."""
    scale: Tensor
    """Diagonal metric: standard deviation per coordinate, shape ``(D,)`` or ``(1,)`` (isotropic)."""
    length: Tensor | None = None
    """Trajectory length, or time over which velocities decohere, of kernels that adapt one; None for all others."""


class Kernel(ABC):
    """A Markov transition on batched particles.

    Arguments:
        space: Where the particles live; noise and moves stay on it.
    """

    exact: bool
    """Whether the kernel leaves the density that it is given exactly invariant."""
    target_acceptance: float
    """Acceptance rate that step-size adaptation should aim at."""
    has_path_weight: bool = True
    """Whether ``Info.log_ratio`` is the exact path term. Where it is not tractable the ratio is NaN, never a guess."""

    def __init__(self, space: Space) -> None:
        self.space = space

    def init(self, x: Tensor, log_density: LogDensity, *, generator: torch.Generator | None = None) -> State:
        """State at positions ``x (..., D)``; kernels that keep velocities draw them from ``generator``."""
        return self.refresh(State(x, *log_density(x)), generator=generator)

    def refresh(self, state: State, *, generator: torch.Generator | None = None) -> State:
        """Draw what the kernel keeps beside positions anew; nothing for kernels without velocities."""
        return state

    @abstractmethod
    def step(
        self, state: State, log_density: LogDensity, params: KernelParams, generator: torch.Generator | None = None
    ) -> tuple[State, Info]:
        """Make one transition of all particles."""


class FreeRunningKernel(Kernel):
    """A kernel whose transitions take chains unequal work, and whose chains need not wait for each other."""

    @abstractmethod
    def run(
        self,
        state: State,
        log_density: LogDensity,
        params: KernelParams,
        generator: torch.Generator | None = None,
        *,
        draws: int,
        thin: int = 1,
    ) -> tuple[State, Trace]:
        """Make ``draws * thin`` transitions of every chain, each at its own pace, and record every ``thin``-th.

        The law of each chain is that of as many calls of :meth:`step`. Memory is that of all random starts, positions
        times ``draws * thin``.
        """


def with_path_weight(kernel: Kernel) -> Kernel:
    """The kernel itself, if weights can be made with it.

    Raises:
        ValueError: If it is unadjusted and has no path weight.
    """
    if not kernel.exact and not kernel.has_path_weight:
        raise ValueError(f"Expected a kernel with a path weight; got {type(kernel).__name__}, which has none.")
    return kernel
