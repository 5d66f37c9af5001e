r"""Tempered densities between a reference and a target.

The geometric path from a normalized reference :math:`p_0` to the target :math:`\rho` is

.. math:: \log \gamma_\beta(x) = (1 - \beta) \log p_0(x) + \beta \log \rho(x), \qquad 0 \le \beta \le 1,

optionally seen in other coordinates ``x = T(z)``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple, Protocol, final

import torch
from torch import Tensor

from diffsampler.kernel import State
from diffsampler.target import Target

__all__ = ["Points", "Schedule", "TemperedDensity", "TemperedPath", "Transport", "next_beta"]


class Transport(Protocol):
    """A differentiable change of coordinates ``x = T(z)`` in which particles are moved."""

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Map ``z (n, D)`` to ``x (n, D)`` and ``log |det dT/dz|`` ``(n,)``; differentiable in ``z``."""
        ...

    def inverse(self, x: Tensor) -> Tensor:
        """Map ``x (n, D)`` to ``z (n, D)``."""
        ...


class Points(NamedTuple):
    """Points with both ends of the path evaluated once, so that a change of temperature costs nothing."""

    z: Tensor
    """Move coordinates ``(n, D)``; the points themselves where there is no transport."""
    x: Tensor
    """Points ``(n, D)``."""
    log_reference: Tensor
    """``(n,)`` float64; NaN where it was not asked for (moves at temperature 1)."""
    log_target: Tensor
    """``(n,)`` float64."""
    score_reference: Tensor
    """``(n, D)``, with respect to ``x``."""
    score_target: Tensor
    """``(n, D)``, with respect to ``x``."""

    def take(self, index: Tensor) -> Points:
        return Points(*(value[index] for value in self))

    def where(self, mask: Tensor, other: Points) -> Points:
        """These points where ``mask (n,)`` holds, else ``other``."""
        column = mask.unsqueeze(-1)
        return Points(*(torch.where(column if a.ndim > 1 else mask, a, b) for a, b in zip(self, other, strict=True)))


@final
class TemperedPath:
    """The geometric path from a normalized reference to a target.

    Arguments:
        reference: A target with an exact sampler and a declared ``log_normalizer``, such as a prior.
        target: The unnormalized density to reach, on the same space.

    Raises:
        ValueError: If the reference has no sampler or normalizer, or the spaces differ.
    """

    def __init__(self, reference: Target, target: Target) -> None:
        if not reference.has_sampler:
            raise ValueError(f"Expected a reference with an exact sampler; got {type(reference).__name__}.")
        if reference.log_normalizer is None:
            raise ValueError(
                "Expected a reference with a declared log_normalizer; got None. "
                "Declare log_normalizer=0.0 if its log_prob is normalized."
            )
        if reference.space != target.space:
            raise ValueError(
                f"Expected reference and target on the same space; got {reference.space} and {target.space}."
            )
        self.reference = reference
        self.target = target
        self.space = target.space

    def evaluate(self, z: Tensor, x: Tensor, *, with_reference: bool = True) -> Points:
        """Evaluate both ends of the path at ``x (n, D)``, whose move coordinates are ``z (n, D)``."""
        log_target, score_target = self.target.log_prob_and_score(x)
        if with_reference:
            log_reference, score_reference = self.reference.log_prob_and_score(x)
            log_reference = log_reference.double() - (self.reference.log_normalizer or 0.0)
        else:
            log_reference = torch.full_like(log_target, math.nan, dtype=torch.float64)
            score_reference = torch.full_like(score_target, math.nan)
        return Points(z, x, log_reference, log_target.double(), score_reference.to(x), score_target.to(x))

    def density(self, beta: float | Tensor, *, coordinates: Transport | None = None) -> TemperedDensity:
        """The log density at one temperature, or at one for each point ``(n,)``, as kernels take it."""
        return TemperedDensity(self, beta, coordinates=coordinates)


@final
class TemperedDensity:
    r"""The log density of the path, in move coordinates, at one temperature or at one for each point.

    .. math:: z \mapsto \log\gamma_\beta(T(z)) + \log|\det \partial T / \partial z|

    Calling it evaluates reference and target once per point and remembers the result as ``last``, so that
    :meth:`points` can hand over what the kernel's new positions already paid for. ``evaluations`` counts points.
    """

    def __init__(self, path: TemperedPath, beta: float | Tensor, *, coordinates: Transport | None = None) -> None:
        inside = bool(((beta >= 0.0) & (beta <= 1.0)).all()) if isinstance(beta, Tensor) else 0.0 <= beta <= 1.0
        if not inside:
            raise ValueError(f"Expected beta in [0, 1]; got {beta}.")
        self.path = path
        self.beta = beta
        # Particles that exchange temperatures need both ends always.
        self.with_reference = isinstance(beta, Tensor) or beta < 1.0
        self.coordinates = coordinates
        self.evaluations = 0
        self.last: Points | None = None

    def __call__(self, z: Tensor) -> tuple[Tensor, Tensor]:
        self.evaluations += z.shape[0]
        if self.coordinates is None:
            self.last = self.path.evaluate(z, z, with_reference=self.with_reference)
            return self._mix(self.last)
        with torch.enable_grad():
            leaf = z.detach().requires_grad_()
            x, log_det = self.coordinates.forward(leaf)
        self.last = self.path.evaluate(z, x.detach(), with_reference=self.with_reference)
        return self._pull_back(self.last, leaf, x, log_det)

    def state(self, points: Points) -> State:
        """Kernel state at points that are already evaluated; costs no evaluation of the target."""
        if self.coordinates is None:
            return State(points.z, *self._mix(points))
        with torch.enable_grad():
            leaf = points.z.detach().requires_grad_()
            x, log_det = self.coordinates.forward(leaf)
        return State(points.z, *self._pull_back(points, leaf, x, log_det))

    def points(self, state: State, before: Points) -> Points:
        """The evaluated points at a kernel's new state, from ``last`` where it moved and ``before`` where it stayed."""
        if self.last is None:
            return before
        moved = (state.x == self.last.z).all(-1)
        stayed = (state.x == before.z).all(-1)
        if not bool((moved | stayed).all()):
            # A kernel that ends elsewhere than at its last evaluation pays for one more.
            self(state.x)
            return self.last
        return self.last.where(moved & ~stayed, before)

    def _mix(self, points: Points) -> tuple[Tensor, Tensor]:
        # The end points are taken as they are: zero times minus infinity would be NaN.
        if isinstance(self.beta, Tensor):
            return self._mix_each(points, self.beta)
        if self.beta == 0.0:
            return points.log_reference, points.score_reference
        if self.beta == 1.0:
            return points.log_target, points.score_target
        log_prob = (1.0 - self.beta) * points.log_reference + self.beta * points.log_target
        return log_prob, torch.lerp(points.score_reference, points.score_target, self.beta)

    @staticmethod
    def _mix_each(points: Points, beta: Tensor) -> tuple[Tensor, Tensor]:
        log_prob = (1.0 - beta) * points.log_reference + beta * points.log_target
        log_prob = torch.where(beta == 0.0, points.log_reference, log_prob)
        log_prob = torch.where(beta == 1.0, points.log_target, log_prob)
        column = beta.unsqueeze(-1).to(points.x)
        score = torch.lerp(points.score_reference, points.score_target, column)
        score = torch.where(column == 0.0, points.score_reference, score)
        return log_prob, torch.where(column == 1.0, points.score_target, score)

    def _pull_back(self, points: Points, z: Tensor, x: Tensor, log_det: Tensor) -> tuple[Tensor, Tensor]:
        log_prob, score = self._mix(points)
        # One scalar, because a log determinant may well be constant.
        with torch.enable_grad():
            total = (x * score.to(x)).sum() + log_det.sum()
        (score,) = torch.autograd.grad(total, z)
        return log_prob + log_det.detach().double(), score


@dataclass(frozen=True)
class Schedule:
    """Everything that an adaptive pass chose; a pass that repeats it is unbiased for ``Z``.

    Arguments:
        betas: Temperatures after 0, increasing; the last is 1 if the pass finished.
        step_sizes: Step size at each temperature.
        scales: Metric at each temperature, ``(D,)`` or ``(1,)`` each.
        num_moves: Kernel steps at each temperature.
        resampled: Whether islands were resampled before the moves.
    """

    betas: tuple[float, ...] = ()
    step_sizes: tuple[float, ...] = ()
    scales: tuple[Tensor, ...] = ()
    num_moves: tuple[int, ...] = ()
    resampled: tuple[bool, ...] = ()

    def __len__(self) -> int:
        return len(self.betas)


def next_beta(log_weight: Tensor, slope: Tensor, beta: float, fraction: float) -> float:
    r"""Largest next temperature whose conditional ESS is at least a fraction of what an infinitesimal step has.

    .. math:: \mathrm{CESS}(\beta') = \frac{(\sum_i W_i u_i)^2}{\sum_i W_i u_i^2}, \qquad
        u_i = e^{(\beta' - \beta) d_i}, \quad \sum_i W_i = 1

    Arguments:
        log_weight: Log weights, shape ``(n,)``, float64.
        slope: ``d = log_target - log_reference``, shape ``(n,)``; ``-inf`` where the target has no mass.
        beta: Present temperature.
        fraction: Fraction to keep, in (0, 1).
    """
    weight = torch.softmax(log_weight, 0)
    alive = slope.isfinite() & (weight > 0)
    weight, slope = weight[alive], slope[alive]
    mass, slope = weight.sum(), slope - slope.max()

    def conditional_ess(delta: float) -> float:
        increment = torch.exp(delta * slope)
        return float((weight @ increment).square() / (weight @ increment.square() * mass))

    if conditional_ess(1.0 - beta) >= fraction:
        return 1.0
    # In log delta: next to a prior of 1e5 times the target's scale the first step is 1e-10 of the path.
    low, high = math.log(1e-300), math.log(1.0 - beta)
    for _ in range(45):
        middle = 0.5 * (low + high)
        if conditional_ess(math.exp(middle)) >= fraction:
            low = middle
        else:
            high = middle
    # Never stand still by rounding.
    return max(beta + math.exp(low), math.nextafter(beta, 1.0))
