"""Records of a pilot run: the result, its adaptive passes, and the meter of its budget."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor

from diffsampler.estimators import Estimate
from diffsampler.particles import Particles
from diffsampler.pilot.checks import FindingTuple
from diffsampler.pilot.guide import Guide
from diffsampler.pilot.modes import SearchReport
from diffsampler.pilot.transport import TransportMap
from diffsampler.smc import SMCResult
from diffsampler.target import CountedTarget, Target
from diffsampler.tempering import TemperedPath

__all__ = ["Meter", "Pass", "PilotResult"]


@dataclass(frozen=True)
class PilotResult:
    """What the pilot found.

    Arguments:
        particles: Weighted particles of the frozen last pass, islands as replicates; None if the target was refused.
        passes: Estimates of log Z of the adaptive passes, in order.
        location: Pooled mean, shape ``(D,)``.
        scale: Pooled standard deviation, shape ``(D,)``.
        modes: Centres of the modes that the search found, shape ``(M, D)``; empty where they do not repeat.
        search: What the mode search did, or None where there was none.
        reference: Reference density of the last pass, in the coordinates ``z`` of ``transport``; None if refused.
        transport: Map ``x = T(z)`` of the last pass; None if refused or on a space without maps.
        findings: Tuples (level, message, remedy), level "error", "warning" or "note".
        evaluations: Points at which the target was evaluated.
        seconds: Wall-clock time.
        choices: Everything that was chosen, as plain values.
    """

    particles: Particles | None
    passes: tuple[Estimate, ...]
    location: Tensor
    scale: Tensor
    modes: Tensor
    search: SearchReport | None
    reference: Target | None
    transport: TransportMap | None
    findings: tuple[FindingTuple, ...]
    evaluations: int
    seconds: float
    choices: dict[str, Any] = field(default_factory=dict)


@final
class Meter:
    """Budget in seconds and evaluations, whichever ends first.

    Arguments:
        target: Counts its evaluations.
        seconds: Wall-clock budget, or None.
        evaluations: Budget of evaluations, or None.
        clock: Tells the time in seconds; all that depends on time goes through it.
    """

    def __init__(
        self,
        target: CountedTarget,
        *,
        seconds: float | None,
        evaluations: int | None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.target = target
        self.clock = clock
        self.start = clock()
        self.seconds = math.inf if seconds is None else seconds
        self.evaluations = math.inf if evaluations is None else evaluations

    def elapsed(self) -> float:
        """Seconds since the start."""
        return self.clock() - self.start

    def used(self) -> float:
        """Fraction of the budget that is spent."""
        return max(self.elapsed() / self.seconds, self.target.evaluations / self.evaluations)

    def affords(self, target: Target, *, batch: int, share: float = 1.0) -> float:
        """Evaluations that a share of the whole budget pays for, by the time that one batch takes."""
        count = share * self.evaluations
        if math.isfinite(self.seconds):
            x = torch.randn((batch, target.dim), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
            took = math.inf
            # The first call warms up; where it is slow, it has to do.
            for _ in range(2):
                began = self.clock()
                target.log_prob_and_score(x)
                took = min(took, self.clock() - began)
                if took > 0.01 * self.seconds:
                    break
            # What surrounds an evaluation takes about as long as a cheap evaluation itself.
            count = min(count, share * batch * self.seconds / (took + 1e-3 + 0.5 * took))
        return max(count, 0.0)

    def allotted(self, until: float) -> Callable[[], float]:
        """How much of the budget between now and ``until`` (a fraction of the whole) is spent."""
        began = self.used()
        span = max(until - began, 1e-9)
        return lambda: (self.used() - began) / span

    @property
    def limited(self) -> bool:
        """Whether there is a budget at all."""
        return math.isfinite(self.seconds) or math.isfinite(self.evaluations)


@dataclass(frozen=True)
class Pass:
    """One adaptive pass, its guide, the fraction of the budget that it took, and whether it hurried."""

    guide: Guide
    path: TemperedPath
    result: SMCResult
    cost: float
    hurried: bool = False

    @property
    def x(self) -> Tensor:
        """Particles in the target's own coordinates, ``(n, D)``."""
        return self.guide.map(self.result.particles.x)
