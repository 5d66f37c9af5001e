"""Adapt many chains together: step size, metric and trajectory length, each by its own object."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from diffsampler.kernel import FreeRunningKernel, Info, Kernel, KernelParams, LogDensity, State
from diffsampler.kernels.adaptation import (
    DualAveraging,
    DualAveragingState,
    harmonic_mean,
    reasonable_step_size,
    windows,
)
from diffsampler.kernels.chees import ChEES, TrajectoryState, halton, largest_spread
from diffsampler.kernels.compiled import Frame, whiten
from diffsampler.kernels.metric import Metric, MetricState, enter, leave

__all__ = ["Adapted", "jittered", "warm_up"]

MERGE_EVERY = 16
"""Steps whose positions are merged into the moments at once."""
SHRINKAGE = 0.3
"""Dual averaging's gain is its inverse: the usual 0.05 suits one noisy chain, and the mean of many would swing."""
APPROACH = 0.1
"""Share of the warm-up in which every chain has a step size of its own."""
APPROACH_STEPS = 8
"""Largest number of leapfrog steps meanwhile, where the length is learned."""


class Adapted(NamedTuple):
    """Where the chains are after adaptation, and what is frozen while they record."""

    state: State
    """In the coordinates of ``frame``."""
    params: KernelParams
    """With the full trajectory length, if one was adapted."""
    frame: Frame | None
    evaluations: int
    """Evaluations spent per chain."""
    divergences: int


class _Progress(NamedTuple):
    """What changes from step to step."""

    state: State
    params: KernelParams
    frame: Frame | None
    step: DualAveragingState
    moments: MetricState
    length: TrajectoryState | None


def jittered(params: KernelParams, step: int, *, jitter: bool) -> KernelParams:
    """The parameters of transition ``step`` (from 1): the length times a Halton point, where it is jittered."""
    if not jitter or params.length is None:
        return params
    return params._replace(length=params.length * halton(step))


def warm_up(
    kernel: Kernel,
    start: State,
    log_density: LogDensity,
    generator: torch.Generator,
    *,
    steps: int,
    metric: Metric,
    trajectory: ChEES | None = None,
    step_size: float | None = None,
    length: float | None = None,
) -> Adapted:
    r"""Adapt from the starting points, and freeze.

    First every chain has a step size of its own: one that starts in a narrow place gets out of it, and holds up nobody.
    Then they share one, which follows the acceptance of all by dual averaging: its mean, or its harmonic mean where the
    length is learned too. The metric is renewed at the ends of doubling windows. The length never falls below a quarter
    period, :math:`\pi / 2`, of the longest direction that the metric leaves.

    Arguments:
        kernel: An exact kernel.
        start: Where the chains are, in original coordinates.
        log_density: The density in original coordinates.
        generator: Source of randomness.
        steps: Number of transitions.
        metric: What learns the shape.
        trajectory: What learns the length, for kernels that take one.
        step_size: Fixed step size, instead of an adapted one.
        length: Fixed length, for kernels that take one.
    """
    approach = int(APPROACH * steps) if step_size is None else 0
    guess = step_size or 0.5 * kernel.space.dof**-0.25
    shape = metric.first(start.x)
    span = None if length is None else shape.scale.new_tensor(length)
    state, params = enter(start, shape.frame), KernelParams(shape.scale.new_tensor(guess), shape.scale, span)
    evaluations = 1
    if step_size is None:
        density = whiten(log_density, shape.frame)
        state, params, spent = _approach(
            kernel, state, density, params, generator, steps=approach, learns_length=trajectory is not None
        )
        evaluations += spent
        state, shape = leave(state, shape.frame), metric.first(leave(state, shape.frame).x)
        state, params = enter(state, shape.frame), params._replace(scale=shape.scale)
    tuner, learned = DualAveraging(kernel.target_acceptance, gamma=SHRINKAGE), None
    if trajectory is not None:
        # A few steps only: the metric is a guess yet, and long trajectories in a bad one cost much and teach little.
        learned = trajectory.init(min(4.0 * float(params.step_size), 0.5 * math.pi))
        params = params._replace(length=params.scale.new_tensor(trajectory.length(learned)))
    step = tuner.init(float(params.step_size))
    now = _Progress(state, params, shape.frame, step, metric.init(start.x), learned)
    diverged, held, ends, t, renewed = [], [], windows(steps - approach), 0, 0
    while t < steps - approach:
        end = min((end for end in ends if end > t), default=steps - approach)
        count = _stretch(kernel, since=t - renewed, left=end - t)
        moved = jittered(now.params, t + 1, jitter=trajectory is not None)
        state, info, x = _advance(kernel, now.state, whiten(log_density, now.frame), moved, generator, count=count)
        t += count
        evaluations += info.evaluations
        diverged.append(info.diverged)
        held.append(x)
        now = _learn(now, state, info, tuner, trajectory, jitter=halton(t), fixed=step_size is not None)
        if len(held) == MERGE_EVERY or t == end:
            x = torch.cat(held)
            now = now._replace(moments=metric.update(now.moments, x if now.frame is None else now.frame.to_original(x)))
            held = []
        if t in ends:
            now, renewed = _renew(now, metric, tuner, trajectory), t
    lost = sum(int(flags.sum()) for flags in diverged if flags is not None)
    return Adapted(now.state, _frozen(now, tuner, trajectory, step_size), now.frame, evaluations, lost)


def _stretch(kernel: Kernel, *, since: int, left: int) -> int:
    """How many transitions to make before the step size is looked at, ``since`` so many after the last renewal."""
    if not isinstance(kernel, FreeRunningKernel):
        return 1
    # Chains meet as rarely as the step size, which settles geometrically, allows.
    return min(max(since // 3, 1), MERGE_EVERY, left)


def _advance(
    kernel: Kernel,
    state: State,
    log_density: LogDensity,
    params: KernelParams,
    generator: torch.Generator,
    *,
    count: int,
) -> tuple[State, Info, Tensor]:
    """Make ``count`` transitions, more than one only of kernels that run freely; all positions ``(count, n, D)``."""
    if not isinstance(kernel, FreeRunningKernel):
        new, info = kernel.step(state, log_density, params, generator)
        return new, info, new.x.unsqueeze(0)
    new, trace = kernel.run(state, log_density, params, generator, draws=count)
    ratio = state.log_prob.double() - new.log_prob.double()
    info = Info(ratio, trace.acceptance, trace.evaluations, trace.nonfinite > 0, diverged=trace.diverged)
    return new, info, trace.x.movedim(-2, 0)


def _approach(
    kernel: Kernel,
    state: State,
    log_density: LogDensity,
    params: KernelParams,
    generator: torch.Generator,
    *,
    steps: int,
    learns_length: bool,
) -> tuple[State, KernelParams, int]:
    """Move every chain with a step size of its own, and find one for all: the geometric mean of theirs."""
    # Single leapfrog steps: a search that halves the step must not double their number.
    short = params._replace(length=params.scale.new_zeros(())) if learns_length else params
    found, spent = reasonable_step_size(kernel, state, log_density, short, generator=generator)
    log_step = torch.full_like(state.log_prob, math.log(found), dtype=torch.float64)
    for t in range(1, steps + 1):
        params = params._replace(step_size=log_step.exp())
        if learns_length:
            params = params._replace(length=params.step_size.mean() * APPROACH_STEPS * halton(t))
        state, info = kernel.step(state, log_density, params, generator)
        spent += info.evaluations
        log_step = log_step + info.acceptance - kernel.target_acceptance
    return state, params._replace(step_size=log_step.mean().exp()), spent


def _learn(
    now: _Progress,
    state: State,
    info: Info,
    tuner: DualAveraging,
    trajectory: ChEES | None,
    *,
    jitter: float,
    fixed: bool,
) -> _Progress:
    """Let step size and length follow one transition."""
    params, step, length = now.params, now.step, now.length
    if not fixed:
        accepted = _mean(info.acceptance) if trajectory is None else harmonic_mean(info.acceptance)
        step = tuner.update(step, accepted)
        params = params._replace(step_size=params.scale.new_tensor(tuner.step_size(step)))
    if trajectory is not None and length is not None:
        length = trajectory.update(length, now.state, info, scale=params.scale, jitter=jitter)
        params = params._replace(length=params.scale.new_tensor(trajectory.length(length)))
    return now._replace(state=state, params=params, step=step, length=length)


def _mean(acceptance: Tensor) -> float:
    return float(acceptance.mean())


def _renew(now: _Progress, metric: Metric, tuner: DualAveraging, trajectory: ChEES | None) -> _Progress:
    """Take the metric of the window that ends, and start the next."""
    shape = metric.shape(now.moments)
    state = enter(leave(now.state, now.frame), shape.frame)
    params = now.params._replace(scale=shape.scale)
    # The best step size belongs to the metric: look for it anew.
    step = tuner.init(tuner.averaged(now.step))
    length = now.length
    if trajectory is not None:
        floor = 0.5 * math.pi * largest_spread(state.x, shape.scale)
        length = trajectory.floor(trajectory.init(floor), floor)
        params = params._replace(length=params.scale.new_tensor(floor))
    return _Progress(state, params, shape.frame, step, metric.init(state.x), length)


def _frozen(now: _Progress, tuner: DualAveraging, trajectory: ChEES | None, step_size: float | None) -> KernelParams:
    """The averages of what was adapted."""
    params = now.params
    if step_size is None:
        params = params._replace(step_size=params.scale.new_tensor(tuner.averaged(now.step)))
    if trajectory is not None and now.length is not None:
        params = params._replace(length=params.scale.new_tensor(trajectory.averaged(now.length)))
    return params
