r"""Annealed importance sampling along a tempered path, in both directions.

With temperatures :math:`0 = \beta_0 < \dots < \beta_K = 1`, kernels :math:`F_k` for :math:`\gamma_{\beta_k}` and their
backward kernels :math:`B_k`, a path :math:`x_0 \to \dots \to x_K` has the weight

.. math:: \log w = \sum_{k=1}^K \Bigl[\log\frac{\gamma_{\beta_k}(x_{k-1})}{\gamma_{\beta_{k-1}}(x_{k-1})}
    + \log\frac{\gamma_{\beta_k}(x_k)\, B_k(x_{k-1} | x_k)}{\gamma_{\beta_k}(x_{k-1})\, F_k(x_k | x_{k-1})}\Bigr].

The second term vanishes for exact kernels. Started from the reference, :math:`E[w] = Z` for any schedule; started from
exact draws of the target and run backward, :math:`E[1/w] = 1/Z`, so :math:`E[\log w]` bounds :math:`\log Z` from below
forward and from above backward.

References:
    Annealed importance sampling (Neal, 2001), https://arxiv.org/abs/physics/9803008
    Sandwiching the marginal likelihood using bidirectional Monte Carlo (Grosse, Ghahramani & Adams, 2015),
    https://arxiv.org/abs/1511.02543
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from diffsampler.estimators import systematic_resample
from diffsampler.kernel import Kernel, KernelParams, State, with_path_weight
from diffsampler.kernels.adaptation import RobbinsMonro, reasonable_step_size, spread
from diffsampler.kernels.metropolis import is_broken
from diffsampler.tempering import Points, Schedule, TemperedPath

__all__ = ["Annealed", "anneal", "linear_betas", "sigmoid_betas", "tune_schedule"]


class Annealed(NamedTuple):
    """What :func:`anneal` returns."""

    x: Tensor
    """End points, ``(n, D)``: weighted draws of the target forward, of the reference backward."""
    log_weight: Tensor
    """``log w`` of the path, ``(n,)`` float64, in the forward convention in both directions."""
    acceptance: tuple[float, ...]
    """Mean acceptance probability at each temperature, in the order of ``betas``."""
    evaluations: int
    """Points at which the target was evaluated."""
    nonfinite: int
    """Starting points without a finite density or gradient (their weight is zero) plus proposals refused for it."""


def linear_betas(num: int) -> tuple[float, ...]:
    """``k / num`` for ``k = 1 .. num``."""
    _positive("num", num)
    return tuple(k / num for k in range(1, num + 1))


def sigmoid_betas(num: int, *, sharpness: float = 4.0) -> tuple[float, ...]:
    r"""A logistic curve from 0 to 1, dense at both ends.

    .. math:: \beta_k = \frac{s(\delta (2k/K - 1)) - s(-\delta)}{s(\delta) - s(-\delta)}, \qquad s(t) = 1/(1 + e^{-t})

    Arguments:
        num: Number ``K`` of temperatures after 0.
        sharpness: :math:`\delta > 0`.
    """
    _positive("num", num)
    if not sharpness > 0.0:
        raise ValueError(f"Expected sharpness to be positive; got {sharpness}.")
    low = 1.0 / (1.0 + math.exp(sharpness))
    curve = [1.0 / (1.0 + math.exp(-sharpness * (2.0 * k / num - 1.0))) for k in range(1, num)]
    return (*((value - low) / (1.0 - 2.0 * low) for value in curve), 1.0)


def anneal(
    path: TemperedPath,
    betas: Sequence[float],
    kernel: Kernel,
    params: KernelParams | Sequence[KernelParams],
    x0: Tensor,
    generator: torch.Generator,
    *,
    reverse: bool = False,
    num_moves: int | Sequence[int] = 1,
    stop: Callable[[], bool] | None = None,
) -> Annealed:
    """Move particles along the path, each with the log weight of its own path; particles never interact.

    Forward, every temperature reweights and then moves; backward, it moves and then reweights, which is the same path
    read from its end. Kernels must be their own backward kernels up to a flip of velocities, as all of the library are.

    Arguments:
        path: Reference and target.
        betas: Temperatures after 0, increasing, the last one 1.
        kernel: Exact, or unadjusted: then the weight takes its ``Info.log_ratio``.
        params: Step size and metric, one for all temperatures or one for each of ``betas``; never adapted here.
        x0: Starting points ``(n, D)``: draws of the reference, or with ``reverse`` of the target.
        generator: Source of randomness.
        reverse: Run from the target to the reference.
        num_moves: Kernel steps at each temperature.
        stop: Asked between temperatures; True raises RuntimeError, since half a path has no weight.

    Raises:
        ValueError: If the schedule does not increase to 1, parameters and temperatures do not match, or the kernel is
            unadjusted and without a path weight.
    """
    with_path_weight(kernel)
    schedule = _steps(betas, params, num_moves)
    points = path.evaluate(x0, x0)
    broken = is_broken(State(x0, points.log_target, points.score_target))
    log_weight = torch.zeros_like(points.log_target).masked_fill(broken, -math.inf)
    nonfinite, evaluations = int(broken.sum()), x0.shape[0]
    acceptance = []
    for previous, beta, frozen, moves in reversed(schedule) if reverse else schedule:
        if stop is not None and stop():
            raise RuntimeError(f"Stopped at temperature {previous} of an annealed path.")
        if not reverse:
            log_weight = _reweight(log_weight, points, beta - previous)
        density = path.density(beta)
        state = kernel.refresh(density.state(points), generator=generator)
        total = 0.0
        for _ in range(moves):
            before = state
            state, info = kernel.step(state, density, frozen, generator)
            points = density.points(state, points)
            nonfinite += int((info.nonfinite & before.log_prob.isfinite()).sum())
            total += float(info.acceptance.mean())
            if not kernel.exact:
                gain = state.log_prob.double() - before.log_prob.double() + info.log_ratio
                dead = log_weight.isinf() | gain.isnan()
                log_weight = torch.where(dead, log_weight, log_weight - gain if reverse else log_weight + gain)
        evaluations += density.evaluations
        acceptance.append(total / max(moves, 1))
        if reverse:
            points = _with_reference(path, points)
            log_weight = _reweight(log_weight, points, beta - previous)
    return Annealed(points.x, log_weight, tuple(acceptance[:: -1 if reverse else 1]), evaluations, nonfinite)


def tune_schedule(
    path: TemperedPath,
    betas: Sequence[float],
    kernel: Kernel,
    *,
    n: int,
    generator: torch.Generator,
    num_moves: int = 4,
    dtype: torch.dtype = torch.float64,
) -> Schedule:
    """Step sizes and metrics for given temperatures, from a short SMC run whose particles are thrown away.

    Every temperature reweights, resamples, takes the population's spread as the metric and follows the acceptance rate
    while it moves ``num_moves`` steps.

    Arguments:
        path: Reference and target.
        betas: Temperatures after 0, increasing, the last one 1.
        kernel: An exact kernel (an unadjusted one has no acceptance to follow; tune its exact sibling).
        n: Number of particles.
        generator: Source of randomness.
        num_moves: Kernel steps at each temperature, repeated in the schedule.
        dtype: Dtype of the particles.

    Raises:
        ValueError: If the kernel is not exact, or the target is finite at none of the reference draws.
    """
    if not kernel.exact:
        raise ValueError(f"Expected an exact kernel to tune; got {type(kernel).__name__}.")
    _positive("num_moves", num_moves)
    check_betas(betas)
    x = path.reference.sample(n, generator=generator).to(device=generator.device, dtype=dtype)
    points, previous, step_size = path.evaluate(x, x), 0.0, 0.0
    tuner = RobbinsMonro(kernel.target_acceptance)
    step_sizes, scales = [], []
    for beta in betas:
        log_weight = _reweight(torch.zeros_like(points.log_target), points, beta - previous)
        if not bool(log_weight.isfinite().any()):
            raise ValueError(f"Expected a finite target density at some of the {n} reference draws; got none.")
        points = points.take(systematic_resample(log_weight, generator=generator))
        density, scale = path.density(beta), spread(path.space, points.x)
        state = kernel.refresh(density.state(points), generator=generator)
        if not step_size:
            guess = KernelParams(scale.new_tensor(0.5 * path.space.dof**-0.25), scale)
            step_size, _ = reasonable_step_size(kernel, state, density, guess, generator=generator)
            density.last = None
        tuned = tuner.init(step_size)
        for _ in range(num_moves):
            params = KernelParams(scale.new_tensor(tuner.step_size(tuned)), scale)
            state, info = kernel.step(state, density, params, generator)
            points = density.points(state, points)
            tuned = tuner.update(tuned, float(info.acceptance.mean()))
        step_size, previous = tuner.step_size(tuned), beta
        step_sizes.append(step_size)
        scales.append(scale)
        points = _with_reference(path, points)
    count = len(betas)
    return Schedule(tuple(betas), tuple(step_sizes), tuple(scales), (num_moves,) * count, (False,) * count)


def check_betas(betas: Sequence[float]) -> None:
    """Temperatures must increase from above 0 to 1.

    Raises:
        ValueError: If they do not.
    """
    grid = [0.0, *betas]
    rises = all(a < b for a, b in zip(grid[:-1], grid[1:], strict=True))
    if len(grid) < 2 or not rises or grid[-1] != 1.0:
        raise ValueError(f"Expected betas to increase from above 0 to exactly 1; got {tuple(betas)}.")


def _steps(
    betas: Sequence[float], params: KernelParams | Sequence[KernelParams], num_moves: int | Sequence[int]
) -> list[tuple[float, float, KernelParams, int]]:
    check_betas(betas)
    each = [params] * len(betas) if isinstance(params, KernelParams) else list(params)
    moves = [num_moves] * len(betas) if isinstance(num_moves, int) else list(num_moves)
    if len(each) != len(betas) or len(moves) != len(betas):
        raise ValueError(
            f"Expected params and num_moves for each of {len(betas)} temperatures; got {len(each)} and {len(moves)}."
        )
    return list(zip([0.0, *betas[:-1]], betas, each, moves, strict=True))


def _reweight(log_weight: Tensor, points: Points, delta: float) -> Tensor:
    """Multiply weights by ``(target / reference) ** delta``; those outside the support of either keep theirs."""
    slope = points.log_target - points.log_reference
    slope = torch.where(slope.isnan(), torch.full_like(slope, -math.inf), slope)
    return torch.where(log_weight.isinf(), log_weight, log_weight + delta * slope)


def _with_reference(path: TemperedPath, points: Points) -> Points:
    """The reference's values where moves at temperature 1 did not ask for them."""
    if not bool(points.log_reference.isnan().any()):
        return points
    log_reference, score = path.reference.log_prob_and_score(points.x)
    log_reference = log_reference.double() - (path.reference.log_normalizer or 0.0)
    return points._replace(log_reference=log_reference, score_reference=score.to(points.x))


def _positive(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"Expected {name} to be a positive integer; got {value}.")
