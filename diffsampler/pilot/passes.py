"""Adaptive passes of the pilot, each from a reference refitted to the draws of the one before."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from diffsampler.estimators import Estimate, systematic_resample
from diffsampler.pilot.guard import Guarded
from diffsampler.pilot.guide import Guide, Knowledge, refit_guide
from diffsampler.pilot.record import Meter, Pass
from diffsampler.smc import smc
from diffsampler.target import CountedTarget, Target
from diffsampler.tempering import TemperedPath

__all__ = ["Job", "adaptive_pass", "agree", "refit", "repeat_passes", "share_of"]

FIRST_COST = 120.0
"""Evaluations per particle that a first pass is expected to take."""
PASSES_END = 0.6
"""Fraction of a budget by which the adaptive passes are over."""
FEWEST = 128


@dataclass
class Job:
    """One run of the pilot: what does not change, and a list of what the budget cut.

    Arguments:
        target: The density, counted.
        guard: The same, as it counts errors.
        meter: The budget.
        generator: Source of randomness.
        tell: Told what is being done.
        num_particles: Particles of the last pass.
        num_islands: Islands of the last pass.
        max_passes: Most adaptive passes.
        search_evaluations: Most evaluations of the mode search.
        cuts: What the budget made smaller, for a finding.
        chosen: What the parts of the run chose, as plain values.
    """

    target: CountedTarget
    guard: Guarded
    meter: Meter
    generator: torch.Generator
    tell: Callable[[str], None]
    num_particles: int
    num_islands: int
    max_passes: int
    search_evaluations: int
    cuts: list[str] = field(default_factory=list)
    chosen: dict[str, Any] = field(default_factory=dict)

    def cut(self, what: str) -> None:
        if what not in self.cuts:
            self.cuts.append(what)


def share_of(job: Job, target: Target, *, batch: int, share: float, usual: float) -> float:
    """Fraction of the usual evaluations that a share of the budget pays for; 1 without a budget."""
    return min(1.0, job.meter.affords(target, batch=batch, share=share) / usual) if job.meter.limited else 1.0


def _size(job: Job, path: TemperedPath, until: float, last: Pass | None) -> int:
    """Particles of an adaptive pass: as many as its share of the budget pays for."""
    size = min(job.num_particles, 2048 if path.target.dim <= 4 else 4096)
    meter = job.meter
    if not meter.limited:
        return size
    share = until - meter.used()
    if last is None:
        affordable = meter.affords(path.target, batch=512, share=share) / FIRST_COST
    else:
        # A refitted reference needs fewer temperatures; what the last pass took is on the safe side.
        affordable = share / max(last.cost, 1e-9) * len(last.result.particles)
    return max(FEWEST, min(size, 4 * int(affordable / 4)))


def adaptive_pass(job: Job, target: Target, guide: Guide, *, until: float, last: Pass | None) -> Pass:
    """Tempered SMC that chooses its schedule and, with a budget, is over when a fraction ``until`` of it is spent."""
    path = TemperedPath(guide.reference, guide.pull_back(target))
    began = job.meter.used()
    size = _size(job, path, until, last)
    spent = job.meter.allotted(until)
    result = smc(
        path,
        n=size,
        num_islands=4,
        generator=job.generator,
        conditional_ess=0.7 if last is None else 0.5,
        final_moves=6,
        # Particles without weight must not set the step size.
        resample_below=0.9,
        pace=spent if job.meter.limited else None,
    )
    return Pass(guide, path, result, job.meter.used() - began, job.meter.limited and spent() > 0.6)


def repeat_passes(
    job: Job, target: Target, knowledge: Knowledge, guide: Guide, passes: list[Pass], *, limit: int
) -> bool:
    """Append adaptive passes, refitting in between, until two in a row agree; whether they did.

    Arguments:
        job: The run.
        target: The density, in the frame of the guide.
        knowledge: What is known beyond the draws.
        guide: The first reference.
        passes: List to append to.
        limit: Most passes to append.
    """
    own: list[Pass] = []
    while True:
        job.tell(f"pass {len(passes) + 1}")
        used = job.meter.used()
        # The first pass has the longest way; it must leave as much again for the last one.
        until = max(used + 0.5 * (PASSES_END - used), 0.55) if not own else max(PASSES_END, used + 0.1)
        own.append(adaptive_pass(job, target, guide, until=until, last=own[-1] if own else None))
        passes.append(own[-1])
        if not own[-1].result.finished:
            return False
        if agree([p.result.particles.log_normalizer for p in own]):
            return True
        if len(own) >= limit:
            return False
        if job.meter.limited and job.meter.used() + 0.5 * own[-1].cost > PASSES_END:
            return False
        guide = refit(job, target, own[-1], knowledge)


def refit(job: Job, target: Target, last: Pass, knowledge: Knowledge) -> Guide:
    """Fit on the draws of half of the islands, choose on those of the other half."""
    x, log_weight = last.x, last.result.particles.log_weight
    half = x.shape[0] // 2
    draws = []
    for part in (slice(0, half), slice(half, None)):
        # An even split of islands without weight: the other half then has to do.
        weight = log_weight[part] if bool(log_weight[part].isfinite().any()) else torch.zeros(half).double()
        draws.append(x[part][systematic_resample(weight, generator=job.generator)])
    cost = 40.0 * target.dim
    size = int(64 * share_of(job, target, batch=512, share=0.05, usual=96 * cost))
    return refit_guide(
        target, draws[0], draws[1], knowledge,
        profile_size=size, profiles=last.guide.profiles, generator=job.generator,
    )  # fmt: skip


def agree(estimates: list[Estimate]) -> bool:
    """Whether the last two estimates agree within their errors and do not still climb."""
    if len(estimates) < 2:
        return False
    value = [e.value for e in estimates]
    error = math.hypot(estimates[-1].std_error, estimates[-2].std_error)
    if not abs(value[-1] - value[-2]) <= 1.5 * error + 0.02:
        return False
    climbing = len(value) >= 3 and value[-1] > value[-2] > value[-3] and value[-1] - value[-3] > 2.0 * error + 0.03
    return not climbing
