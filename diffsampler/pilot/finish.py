"""The result of a pilot, judged."""

from __future__ import annotations

import math
from typing import Any

import torch

from diffsampler.particles import Particles
from diffsampler.pilot.checks import FindingTuple, confirmed_tail, drift, judge
from diffsampler.pilot.guide import Knowledge
from diffsampler.pilot.modes import ModeSet, SearchReport
from diffsampler.pilot.passes import Job
from diffsampler.pilot.profile import Profile, profile_from_draws, score_drivers
from diffsampler.pilot.record import Pass, PilotResult
from diffsampler.pilot.search import MeanFieldFits
from diffsampler.pilot.transport import AffineMap, Composed, PulledBack, TransportMap
from diffsampler.smc import SMCResult
from diffsampler.space import Euclidean
from diffsampler.target import Target

__all__ = ["finish", "refused"]

NECK_DRAWS, NECK_GRID, NECK_STEPS = 512, 32, 8
"""Draws that show which coordinate makes a neck; grid points and Newton steps of its profile."""
FEWEST_POINTS = 20
"""Grid points below which a profile does not resolve where the draws are."""
DRIFT_COST = 30
"""Evaluations per particle of the test for drift."""


def refused(job: Job, fits: MeanFieldFits, reason: str) -> PilotResult:
    """The result for a density without a finite integral: no particles."""
    mean, spread = fits.pooled()
    finding = (
        "error",
        f"The density looks improper: {reason}.",
        "Give flat directions a proper prior, or bound them; nothing was sampled.",
    )
    return PilotResult(
        None, (), mean, spread, mean.new_zeros(0, mean.shape[0]), None, None, None, (finding,),
        job.target.evaluations, job.meter.elapsed(),
        {"seed": job.generator.initial_seed(), "search": job.chosen},
    )  # fmt: skip


def finish(
    job: Job,
    knowledge: Knowledge | None,
    passes: list[Pass],
    final: SMCResult,
    *,
    settled: bool,
    report: SearchReport | None = None,
    frame: AffineMap | None = None,
) -> PilotResult:
    """Judge the last pass and write the result.

    Arguments:
        job: The run.
        knowledge: What the references were built of, or None on spaces without maps.
        passes: Adaptive passes; the last one's schedule was repeated.
        final: The last pass.
        settled: Whether they agreed.
        report: What the search did.
        frame: Separating frame in which the passes ran.
    """
    modes = None if knowledge is None else knowledge.modes
    last = passes[-1]
    guide, raw = last.guide, final.particles
    particles = Particles(
        guide.map(raw.x), raw.log_weight, raw.replicates, has_normalizer=raw.has_normalizer, nonfinite=raw.nonfinite
    )
    working: Target = job.target if frame is None else PulledBack(job.target, frame)
    necks = {_name(p.index, particles, frame): p for p in _necks(job, working, last, particles, final, modes)}
    tails = {
        name: confirmed_tail(working, particles, profile, generator=job.generator) for name, profile in necks.items()
    }
    findings = judge(
        lost={name: tail for name, tail in tails.items() if tail is not None},
        shift=_drift(job, last, final),
        particles=particles,
        final=final,
        passes=[p.result for p in passes],
        modes=modes,
        report=report,
        settled=settled,
        prior=knowledge is not None and knowledge.prior is not None,
    )
    findings += _budget_findings(job, passes, final)
    centres = raw.x.new_zeros(0, job.target.dim) if modes is None else modes.centre
    x = particles.x
    if frame is not None:
        centres, x = frame(centres)[0], frame(x)[0]
        particles = Particles(
            x, raw.log_weight, raw.replicates, has_normalizer=raw.has_normalizer, nonfinite=raw.nonfinite
        )
    weight = torch.softmax(particles.log_weight, 0).unsqueeze(-1)
    mean = (weight * x).sum(0)
    return PilotResult(
        particles=particles,
        passes=tuple(p.result.particles.log_normalizer for p in passes),
        location=mean,
        scale=(weight * (x - mean).square()).sum(0).sqrt(),
        modes=centres,
        search=report,
        reference=guide.reference,
        transport=_composed(frame, guide.transport),
        findings=tuple(findings),
        evaluations=job.target.evaluations,
        seconds=job.meter.elapsed(),
        choices=_choices(job, passes, final, knowledge, necks) | {"separating_frame": frame is not None},
    )


def _left(job: Job, last: Pass) -> float:
    """Evaluations that what is left of the budget pays for."""
    cost = last.cost / max(1, last.result.evaluations)
    return max(0.0, 1.0 - job.meter.used()) / max(cost, 1e-12) if job.meter.limited else math.inf


def _name(index: int, particles: Particles, frame: AffineMap | None) -> str:
    """A coordinate of the passes in the words of the target."""
    if frame is None:
        return f"coordinate {index}"
    part = (frame.matrix * particles.x.std(0)).square()
    share = part[:, index] / part.sum(1).clamp_min(1e-300)
    nearest = int(share.argmax())
    return f"coordinate {nearest}" if float(share[nearest]) > 0.9 else f"a direction near to coordinate {nearest}"


def _necks(
    job: Job, target: Target, last: Pass, particles: Particles, final: SMCResult, modes: ModeSet | None
) -> tuple[Profile, ...]:
    """Profiles along the coordinates that drive the scores of others: those of the reference, or new ones.

    Where a budget leaves a few hundred draws, no map shows the neck that they have lost; their scores do.
    """
    dim = target.dim
    # Separate modes have no single conditional peak to follow.
    several = modes is not None and len(modes) > 1
    if several or dim < 2 or not final.finished or not isinstance(target.space, Euclidean):
        return ()
    per_point = 1.5 * NECK_STEPS * (2 * dim - 1)
    size = int(min(NECK_GRID, (0.4 * _left(job, last) - NECK_DRAWS) / per_point))
    if size < FEWEST_POINTS:
        job.cut("no check for a lost neck")
        return ()
    x = particles.resample(NECK_DRAWS, generator=job.generator)
    known = {p.index: p for p in last.guide.profiles if len(p.grid) >= FEWEST_POINTS}
    profiles: list[Profile] = []
    for index in score_drivers(x, target.log_prob_and_score(x)[1]):
        # One new profile is what the size was chosen for.
        fresh = not any(p.index not in known for p in profiles)
        profile = known.get(index) or (
            profile_from_draws(target, index, x, size=size, steps=NECK_STEPS) if fresh else None
        )
        profiles += [] if profile is None else [profile]
    return tuple(profiles)


def _drift(job: Job, last: Pass, final: SMCResult) -> float:
    """The test for drift with as many particles as the budget still pays for; zero below 128."""
    n = 1024
    if job.meter.limited:
        n = min(n, int(_left(job, last) / DRIFT_COST))
    if not final.finished or n < 128:
        return 0.0
    return drift(last.path.target, final, n=n, generator=job.generator)


def _budget_findings(job: Job, passes: list[Pass], final: SMCResult) -> list[FindingTuple]:
    """What the budget made smaller, and points at which the density raised errors."""
    if final.finished and any(p.hurried for p in passes):
        job.cut("coarse steps in temperature")
    if job.meter.limited and final.finished and len(final.particles) < job.num_particles:
        job.cut(f"{len(final.particles)} particles instead of {job.num_particles}")
    findings: list[FindingTuple] = []
    if job.cuts:
        findings.append(("note", f"The budget cut the run short: {'; '.join(job.cuts)}.", "Raise the budget."))
    if job.guard.refused:
        message = f"The density raised errors at {job.guard.refused} points; they count as outside of its support."
        findings.append(("note", message, "Make the density return minus infinity where it is not defined."))
    return findings


def _composed(frame: AffineMap | None, transport: TransportMap | None) -> TransportMap | None:
    return transport if frame is None or transport is None else Composed(frame, transport)


def _choices(
    job: Job, passes: list[Pass], final: SMCResult, knowledge: Knowledge | None, necks: dict[str, Profile]
) -> dict[str, Any]:
    """Everything that was chosen, as plain values."""
    last = passes[-1]
    chosen = dict(job.chosen)
    search = {name: chosen.pop(name) for name in ("variational", "modes", "spread") if name in chosen}
    return {
        "seed": job.generator.initial_seed(),
        "num_particles": len(final.particles),
        "num_islands": final.particles.replicates,
        "num_passes": len(passes),
        "passes": [_described(p) for p in passes],
        **chosen,
        "betas": list(final.schedule.betas),
        "step_sizes": list(final.schedule.step_sizes),
        "num_moves": list(final.schedule.num_moves),
        "transport": type(last.guide.transport).__name__,
        "reference": last.guide.weights,
        "necks": list(necks),
        "prior": knowledge is not None and knowledge.prior is not None,
        "search": search or None,
    }


def _described(one: Pass) -> dict[str, Any]:
    """Size, length and reference of an adaptive pass."""
    return {
        "num_particles": len(one.result.particles),
        "num_islands": one.result.particles.replicates,
        "temperatures": len(one.result.schedule.betas),
        "moves": sum(one.result.schedule.num_moves),
        "transport": type(one.guide.transport).__name__,
        "reference": one.guide.weights,
        "hurried": one.hurried,
    }
