r"""Adaptation on many chains at once: separate objects with explicit state, frozen while recording.

Step sizes follow the acceptance probability averaged over all chains; the metric is the variance pooled over them.

References:
    The No-U-Turn Sampler (Hoffman & Gelman, 2014), https://arxiv.org/abs/1111.4246 (dual averaging)
    A stochastic approximation method (Robbins & Monro, 1951), https://doi.org/10.1214/aoms/1177729586
    Updating formulae and a pairwise algorithm for computing sample variances (Chan, Golub & LeVeque, 1979),
    http://i.stanford.edu/pub/cstr/reports/cs/tr/79/773/CS-TR-79-773.pdf
"""

from __future__ import annotations

import math
from typing import NamedTuple, final

import torch
from torch import Tensor

from diffsampler.kernel import Kernel, KernelParams, LogDensity, State
from diffsampler.space import Euclidean, Space, Torus

__all__ = [
    "DualAveraging",
    "DualAveragingState",
    "PooledVariance",
    "RobbinsMonro",
    "RobbinsMonroState",
    "VarianceState",
    "harmonic_mean",
    "reasonable_step_size",
    "spread",
    "windows",
    "worst_reach",
]


class RobbinsMonroState(NamedTuple):
    """Log step size and number of updates made."""

    log_step: float
    updates: int


@final
class RobbinsMonro:
    r"""Robbins-Monro search of a step size.

    .. math:: \log\epsilon_{t+1} = \log\epsilon_t + g\, (t + 1)^{-\kappa} (\bar\alpha_t - \alpha^*)

    Arguments:
        target: Acceptance rate :math:`\alpha^*` to reach.
        gain: The gain :math:`g`.
        decay: The exponent :math:`\kappa`.
    """

    def __init__(self, target: float, *, gain: float = 2.0, decay: float = 0.6) -> None:
        self.target = target
        self.gain = gain
        self.decay = decay

    def init(self, step_size: float) -> RobbinsMonroState:
        return RobbinsMonroState(math.log(step_size), 0)

    def update(self, state: RobbinsMonroState, acceptance: float) -> RobbinsMonroState:
        """One update from the mean acceptance of all chains."""
        gain = self.gain * (state.updates + 1) ** -self.decay
        return RobbinsMonroState(state.log_step + gain * (acceptance - self.target), state.updates + 1)

    def step_size(self, state: RobbinsMonroState) -> float:
        """The step size to use next."""
        return math.exp(state.log_step)


class DualAveragingState(NamedTuple):
    """Log step size, its running average, the mean error, the point shrunk to, and the number of updates."""

    log_step: float
    log_average: float
    error: float
    center: float
    updates: int


@final
class DualAveraging:
    """Dual averaging of a step size towards the acceptance rate ``target``; constants as in Hoffman & Gelman."""

    def __init__(self, target: float, *, gamma: float = 0.05, offset: float = 10.0, decay: float = 0.75) -> None:
        self.target = target
        self.gamma = gamma
        self.offset = offset
        self.decay = decay

    def init(self, step_size: float) -> DualAveragingState:
        log_step = math.log(step_size)
        # Many chains find the step size in a few updates; the usual head start of a factor 10 would only overshoot.
        return DualAveragingState(log_step, log_step, 0.0, log_step + math.log(2.0), 0)

    def update(self, state: DualAveragingState, acceptance: float) -> DualAveragingState:
        """One update from the mean acceptance of all chains."""
        count = state.updates + 1
        rate = 1.0 / (count + self.offset)
        error = (1.0 - rate) * state.error + rate * (self.target - acceptance)
        log_step = state.center - math.sqrt(count) / self.gamma * error
        weight = count**-self.decay
        return DualAveragingState(
            log_step, weight * log_step + (1.0 - weight) * state.log_average, error, state.center, count
        )

    def step_size(self, state: DualAveragingState) -> float:
        """The step size to use next."""
        return math.exp(state.log_step)

    def averaged(self, state: DualAveragingState) -> float:
        """The step size to freeze."""
        return math.exp(state.log_average)


def harmonic_mean(acceptance: Tensor) -> float:
    """Harmonic mean of the acceptance probabilities of all chains.

    It is led by the chains that hardly move, which a shared step size must not leave behind; a chain that accepts
    nothing counts as 0.02, so that it is one voice among many and not a reason to stop.
    """
    return 1.0 / float(acceptance.double().clamp_min(0.02).reciprocal().mean())


def windows(warmup: int) -> list[int]:
    """Steps after which a metric is renewed: windows double, and the last fifth adapts the step size only."""
    last, end, width = warmup - max(warmup // 5, 1), 0, max(warmup // 20, 1)
    ends = []
    while end + width <= last:
        end += width
        ends.append(end)
        width *= 2
    return ends


class VarianceState(NamedTuple):
    """Number of points, their mean ``(D,)`` and sum of squared deviations ``(D,)``, float64."""

    size: int
    mean: Tensor
    square: Tensor


@final
class PooledVariance:
    """Running variance per coordinate over all chains and steps, merged batch by batch (Chan et al., 1979).

    Arguments:
        space: Where the particles live; decides which metrics keep them there, see :func:`spread`.
    """

    def __init__(self, space: Space) -> None:
        self.space = space

    def init(self, like: Tensor) -> VarianceState:
        zero = torch.zeros(self.space.dim, dtype=torch.float64, device=like.device)
        return VarianceState(0, zero, zero)

    def update(self, state: VarianceState, x: Tensor) -> VarianceState:
        """Merge points ``(..., D)``."""
        x = x.reshape(-1, self.space.dim).double()
        size, mean = x.shape[0], x.mean(0)
        total = state.size + size
        delta = mean - state.mean
        square = state.square + (x - mean).square().sum(0) + delta.square() * (state.size * size / total)
        return VarianceState(total, state.mean + delta * (size / total), square)

    def scale(self, state: VarianceState) -> Tensor:
        """Standard deviations for ``KernelParams.scale``, ``(D,)`` or ``(1,)``, float64."""
        return _metric(self.space, state.square / max(state.size - 1, 1))


def spread(space: Space, x: Tensor, *, log_weight: Tensor | None = None) -> Tensor:
    """Standard deviation per coordinate of weighted points, the diagonal metric of a population.

    Arguments:
        space: Decides the shape: ``(D,)`` on Euclidean space; ``(1,)`` on MeanFree, where only isotropic moves keep the
            centre of mass; ones ``(1,)`` on a Torus, where the scale of an angle is given.
        x: Points, shape ``(n, D)``.
        log_weight: Log weights, shape ``(n,)``; equal by default.

    Returns:
        Standard deviations in float64. A coordinate without spread gets the median of the others (1 if all are flat).
    """
    x = x.double()
    if log_weight is None:
        variance = x.var(0, correction=0)
    else:
        weight = torch.softmax(log_weight, 0).unsqueeze(-1)
        mean = (weight * x).sum(0)
        variance = (weight * (x - mean).square()).sum(0)
    return _metric(space, variance)


def _metric(space: Space, variance: Tensor) -> Tensor:
    if isinstance(space, Torus):
        return torch.ones_like(variance[:1])
    if not isinstance(space, Euclidean):
        variance = (variance.sum() / space.dof).reshape(1)
    good = variance.isfinite() & (variance > 0)
    if not bool(good.any()):
        return torch.ones_like(variance)
    return torch.where(good, variance, variance[good].median()).sqrt()


def worst_reach(space: Space, x: Tensor, start: Tensor, scale: Tensor, weight: Tensor) -> float:
    """How far a population has moved: mean squared jump of the slowest coordinate in units of its variance.

    Arguments:
        space: Where the particles live.
        x: Where they are, shape ``(n, D)``.
        start: Where they were, shape ``(n, D)``.
        scale: Standard deviations, ``(D,)`` or ``(1,)``.
        weight: Normalized weights, shape ``(n,)``.

    Returns:
        The smallest over coordinates, 1.5 for independent draws of a Gaussian. Jumps are clipped at two standard
        deviations, so that a few particles in the tails cannot speak for all.
    """
    jump = space.project(x - start) / scale.to(x)
    return float((weight.unsqueeze(-1) * jump.square().clamp_max(4.0)).sum(0).min())


def reasonable_step_size(
    kernel: Kernel,
    state: State,
    log_density: LogDensity,
    params: KernelParams,
    *,
    generator: torch.Generator,
    max_tries: int = 60,
) -> tuple[float, int]:
    """A step size at which the mean acceptance of all chains crosses 1/2, by doubling or halving.

    Arguments:
        kernel: An exact kernel.
        state: Where the chains are; they are not moved.
        log_density: The density.
        params: Step size to start from; scale and length to use.
        generator: Source of randomness.
        max_tries: Most trial transitions.

    Returns:
        The step size and the number of evaluations spent per particle.
    """
    step_size = params.step_size
    direction, evaluations = 0, 0
    for _ in range(max_tries):
        _, info = kernel.step(state, log_density, params._replace(step_size=step_size), generator)
        evaluations += info.evaluations
        wanted = 1 if float(info.acceptance.mean()) > 0.5 else -1
        if direction == -wanted:
            break
        direction = wanted
        step_size = step_size * 2.0**wanted
    return float(step_size), evaluations
