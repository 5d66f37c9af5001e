r"""The length of Hamiltonian trajectories, learned from many chains: ChEES and its Halton jitter.

A trajectory is long enough when it changes the distance from the centre. In coordinates whitened by the metric, with
proposals :math:`x'` and their velocities :math:`v'`, the criterion is

.. math:: \mathrm{ChEES}(T) = \tfrac14 E\bigl[(|x' - \bar x'|^2 - |x - \bar x|^2)^2\bigr],

and since a trajectory of length :math:`u T` ends with velocity :math:`v'`, its gradient with respect to
:math:`\log T` is the mean over chains, weighted by acceptance probabilities :math:`\alpha`, of

.. math:: u\, T\, (|x' - \bar x'|^2 - |x - \bar x|^2)\, \langle x' - \bar x', v' \rangle.

:math:`u` is the next point of a Halton sequence, shared by all chains: every chain takes the same number of leapfrog
steps, and no length resonates with a period of the target.

References:
    An Adaptive-MCMC Scheme for Setting Trajectory Lengths in Hamiltonian Monte Carlo (Hoffman, Radul & Sountsov, 2021),
    https://proceedings.mlr.press/v130/hoffman21a.html
    Adam: A Method for Stochastic Optimization (Kingma & Ba, 2015), https://arxiv.org/abs/1412.6980
"""

from __future__ import annotations

import math
from typing import NamedTuple, final

import torch
from torch import Tensor

from diffsampler.kernel import Info, State
from diffsampler.space import EuclideanTorus, Space, Torus

__all__ = ["ChEES", "TrajectoryState", "halton", "largest_spread"]


def halton(index: int, *, base: int = 2) -> float:
    """Point ``index`` (from 1) of the Halton sequence of a base, in (0, 1): digits mirrored at the point."""
    value, weight = 0.0, 1.0
    while index > 0:
        weight /= base
        value += weight * (index % base)
        index //= base
    return value


class TrajectoryState(NamedTuple):
    """Log length, its running average, Adam's second moment, the lower bound, and the number of updates."""

    log_length: float
    log_average: float
    square: float
    log_floor: float
    updates: int


@final
class ChEES:
    r"""Stochastic ascent of the ChEES criterion on :math:`\log T`, by Adam without momentum.

    Arguments:
        space: Where the chains live; angles have no distance from a centre, so a torus is refused.
        rate: Learning rate of Adam.
        decay: Decay of Adam's second moment.
        clip: Largest change of :math:`\log T` in one update.
        averaging: The frozen length averages update :math:`t` with weight :math:`t^{-\kappa}`; this is :math:`\kappa`.

    Raises:
        ValueError: If the space is a torus.
    """

    def __init__(
        self, space: Space, *, rate: float = 0.05, decay: float = 0.95, clip: float = 0.35, averaging: float = 0.5
    ) -> None:
        if isinstance(space, Torus | EuclideanTorus):
            raise ValueError(f"Expected a space with distances from a centre; got {space}. Use HMC or NUTS.")
        self.space = space
        self.rate = rate
        self.decay = decay
        self.clip = clip
        self.averaging = averaging

    def init(self, length: float) -> TrajectoryState:
        """Start at a length in whitened units."""
        log_length = math.log(length)
        return TrajectoryState(log_length, log_length, 0.0, -math.inf, 0)

    def length(self, state: TrajectoryState) -> float:
        """The length :math:`T` to use next."""
        return math.exp(max(state.log_length, state.log_floor))

    def averaged(self, state: TrajectoryState) -> float:
        """The length to freeze."""
        return math.exp(max(state.log_average, state.log_floor))

    def floor(self, state: TrajectoryState, length: float) -> TrajectoryState:
        """Never fall below ``length``."""
        return state._replace(log_floor=math.log(length))

    def update(
        self, state: TrajectoryState, start: State, info: Info, *, scale: Tensor, jitter: float
    ) -> TrajectoryState:
        """One update from the proposals of all chains, accepted or not.

        Arguments:
            state: The adaptation's state.
            start: Where the trajectories began.
            info: What the kernel says of them, proposals with velocities included.
            scale: Standard deviations of the metric, ``(D,)`` or ``(1,)``.
            jitter: The point :math:`u` of this transition.
        """
        slope = self.length(state) * jitter * self.slope(start, info, scale=scale)
        if not math.isfinite(slope):
            return state
        count = state.updates + 1
        square = self.decay * state.square + (1.0 - self.decay) * slope * slope
        size = math.sqrt(square / (1.0 - self.decay**count))
        change = self.rate * slope / size if size > 0.0 else 0.0
        log_length = max(state.log_length, state.log_floor) + max(-self.clip, min(self.clip, change))
        weight = count**-self.averaging
        average = weight * log_length + (1.0 - weight) * state.log_average
        return TrajectoryState(log_length, average, square, state.log_floor, count)

    def slope(self, start: State, info: Info, *, scale: Tensor) -> float:
        """Derivative of the criterion with respect to the trajectory's own length, a weighted mean over chains."""
        proposal = info.proposal
        if proposal is None or proposal.velocity is None:
            raise ValueError("Expected a kernel that reports proposals with velocities, such as HMC; got none.")
        weight = info.acceptance
        # Proposals that were lost have weight zero, and must not make the sum a non-number.
        x = torch.where((weight > 0.0).unsqueeze(-1), proposal.x, start.x)
        velocity = torch.where((weight > 0.0).unsqueeze(-1), proposal.velocity, torch.zeros_like(x))
        total = weight.sum()
        after = (x - (weight.to(x) @ x) / total.to(x)) / scale.to(x)
        before = (start.x - start.x.mean(0)) / scale.to(x)
        change = after.square().sum(-1) - before.square().sum(-1)
        return float((weight * change * (after * velocity).sum(-1)).sum() / total)


def largest_spread(x: Tensor, scale: Tensor) -> float:
    r"""Standard deviation of a population along its longest direction, in units of ``scale``, from below.

    :math:`\mathrm{tr}(C^2) / \mathrm{tr}(C) \le \lambda_{\max}(C)`, with both traces estimated without bias from the
    points' inner products, so that few points in many dimensions do not look long.

    Arguments:
        x: Points, shape ``(n, D)``.
        scale: Standard deviations, shape ``(D,)`` or ``(1,)``.
    """
    n = x.shape[0]
    z = ((x - x.mean(0)) / scale.to(x)).double()
    gram = z @ z.mT
    trace = gram.diagonal().sum() / n
    square = (gram.square().sum() - gram.diagonal().square().sum()) / (n * (n - 1))
    return float((square / trace).sqrt()) if bool(trace > 0.0) else 1.0
