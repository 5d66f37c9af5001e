"""The result of a pilot, judged."""

from __future__ import annotations

from typing import Any

import torch

from diffsampler.particles import Particles
from diffsampler.pilot.checks import FindingTuple, drift, judge
from diffsampler.pilot.guide import Guide, Knowledge
from diffsampler.pilot.modes import SearchReport
from diffsampler.pilot.passes import Job
from diffsampler.pilot.record import Pass, PilotResult
from diffsampler.pilot.search import MeanFieldFits
from diffsampler.pilot.transport import AffineMap, Composed, TransportMap
from diffsampler.smc import SMCResult

__all__ = ["finish", "refused"]

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
        job.target.evaluations, job.meter.elapsed(), {},
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
    findings = judge(
        profiles=guide.profiles,
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
        choices=_choices(passes, guide, final, knowledge) | {"separating_frame": frame is not None},
    )


def _drift(job: Job, last: Pass, final: SMCResult) -> float:
    """The test for drift with as many particles as the budget still pays for; zero below 128."""
    n = 1024
    if job.meter.limited:
        cost = last.cost / max(1, last.result.evaluations)
        n = min(n, int(max(0.0, 1.0 - job.meter.used()) / max(cost * DRIFT_COST, 1e-12)))
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


def _choices(passes: list[Pass], guide: Guide, final: SMCResult, knowledge: Knowledge | None) -> dict[str, Any]:
    """Everything that was chosen, as plain values."""
    return {
        "num_particles": len(final.particles),
        "num_islands": final.particles.replicates,
        "num_passes": len(passes),
        "betas": list(final.schedule.betas),
        "step_sizes": list(final.schedule.step_sizes),
        "num_moves": list(final.schedule.num_moves),
        "transport": type(guide.transport).__name__,
        "reference": guide.weights,
        "prior": knowledge is not None and knowledge.prior is not None,
        "search": knowledge is not None and knowledge.fits is not None,
    }
