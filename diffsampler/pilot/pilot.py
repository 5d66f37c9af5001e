r"""The automatic pilot: from a log density alone to weighted particles with an honest error bar.

1. Where a normalised prior is known, adaptive tempered SMC starts from it at once. Otherwise, and where passes from the
   prior do not agree, a scale-free variational multi-start and a mode search say where the mass is, and whether it can
   be finite; SMC then starts from a reference built of what was found.
2. The reference and a transport map are refitted to the draws, and the pass is repeated until successive estimates of
   log Z agree.
3. A last pass repeats the schedule with everything frozen on replicate islands: given the pilot,
   :math:`E[\hat Z] = Z` exactly, and the spread of the islands is the error bar. It is repeated in rounds until the
   moments of all coordinates are precise.

A budget makes every part smaller, and findings say which; without one nothing depends on the clock.

References:
    Adaptive importance sampling: the past, the present, and the future (Bugallo et al., 2017),
    https://doi.org/10.1109/MSP.2017.2699226
    Sequential Monte Carlo samplers (Del Moral, Doucet & Jasra, 2006), https://doi.org/10.1111/j.1467-9868.2006.00553.x
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import final

import torch

from diffsampler.pilot.density_fits import fit_product
from diffsampler.pilot.finish import finish, refused
from diffsampler.pilot.frame import separating_frame
from diffsampler.pilot.guard import Guarded
from diffsampler.pilot.guide import Guide, Knowledge, first_guide, prior_guide, wide_law
from diffsampler.pilot.improper import probe_tails
from diffsampler.pilot.last_pass import last_pass
from diffsampler.pilot.manifold import choose_reference
from diffsampler.pilot.modes import ModeSet, SearchReport, search_modes
from diffsampler.pilot.passes import Job, adaptive_pass, agree, repeat_passes, share_of
from diffsampler.pilot.record import Meter, Pass, PilotResult
from diffsampler.pilot.reference import EllipticalMixture
from diffsampler.pilot.search import MeanFieldFits, multistart, spread_over
from diffsampler.pilot.tails import probe_degrees
from diffsampler.pilot.transport import PulledBack
from diffsampler.space import Euclidean
from diffsampler.target import CountedTarget, Target

__all__ = ["Pilot", "PilotResult", "run_pilot"]

PRIOR_PASSES = 4
"""Passes from the prior before a search is called for."""
MULTISTART_COST, MODES_COST, SPREAD_COST = 4e5, 1e5, 4e4
"""Usual evaluations of the parts of the search."""


@final
class Pilot:
    """The pilot's settings; none of them needs to be touched.

    Arguments:
        num_particles: Particles of the last pass over all islands.
        num_islands: Replicate islands of the last pass; their spread is the error bar.
        max_passes: Most adaptive passes.
        search_evaluations: Most evaluations of the mode search.
    """

    def __init__(
        self,
        *,
        num_particles: int = 8192,
        num_islands: int = 16,
        max_passes: int = 8,
        search_evaluations: int = 2_500_000,
    ) -> None:
        if num_islands < 2 or num_particles < 32 * num_islands or num_particles % num_islands:
            raise ValueError(
                "Expected at least 2 islands and num_particles a multiple of num_islands, 32 per island or more; "
                f"got {num_particles} and {num_islands}."
            )
        self.num_particles = num_particles
        self.num_islands = num_islands
        self.max_passes = max_passes
        self.search_evaluations = search_evaluations

    def run(
        self,
        target: Target,
        *,
        generator: torch.Generator,
        prior: Target | None = None,
        seconds: float | None = None,
        evaluations: int | None = None,
        progress: Callable[[str], None] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> PilotResult:
        """Run the pilot on a target; see :func:`run_pilot`."""
        guard = Guarded(target)
        counted = CountedTarget(guard)
        job = Job(
            counted,
            guard,
            Meter(counted, seconds=seconds, evaluations=evaluations, clock=clock),
            generator,
            progress or (lambda _: None),
            self.num_particles,
            self.num_islands,
            self.max_passes,
            self.search_evaluations,
        )
        prior = target.prior if prior is None else prior
        if not isinstance(target.space, Euclidean):
            return _on_space(job)
        return _searched(job, []) if prior is None else _from_prior(job, prior)


def _from_prior(job: Job, prior: Target) -> PilotResult:
    """Passes from the prior; a search only where they do not agree and there is budget for another start."""
    knowledge = Knowledge(prior=prior)
    passes: list[Pass] = []
    guide = prior_guide(prior, generator=job.generator)
    limit = min(job.max_passes, PRIOR_PASSES)
    settled = repeat_passes(job, job.target, knowledge, guide, passes, limit=limit)
    if settled or job.meter.used() > 0.25:
        final = last_pass(job, job.target, knowledge, passes)
        return finish(job, knowledge, passes, final, settled=settled)
    return _searched(job, passes, prior=prior)


def _searched(job: Job, passes: list[Pass], *, prior: Target | None = None) -> PilotResult:
    """Variational and mode search, passes from what was found, and the last pass."""
    job.tell("variational search")
    fits = _fits(job, job.target)
    if prior is None:
        # With a proper prior the integral is finite almost surely.
        tails = probe_tails(job.target, fits, generator=job.generator)
        if tails.improper:
            return refused(job, fits, tails.describe())
    frame = separating_frame(job.target, fits)
    working: Target = job.target
    if frame is not None:
        job.tell("variational search in a separating frame")
        working = PulledBack(job.target, frame)
        prior = None if prior is None else PulledBack(prior, frame)
        fits = _fits(job, working)
    job.tell("mode search")
    modes, report = _modes(job, working, fits)
    knowledge = _knowledge(job, working, fits, modes, report, prior)
    settled = repeat_passes(job, working, knowledge, first_guide(knowledge), passes, limit=job.max_passes)
    final = last_pass(job, working, knowledge, passes)
    return finish(job, knowledge, passes, final, settled=settled, report=report, frame=frame)


def _fits(job: Job, target: Target) -> MeanFieldFits:
    """Variational fits; a small budget buys fewer and shorter ones, below 10 starts of 60 steps they would be none."""
    share = share_of(job, target, batch=480, share=0.12, usual=MULTISTART_COST)
    starts, steps = max(10, int(80 * share**0.5)), max(60, int(250 * share**0.5))
    if starts < 80:
        job.cut(f"{starts} starts of the variational search instead of 80")
    rounds = 3 if share > 0.1 else 2
    fits = multistart(target, num_starts=starts, rounds=rounds, steps=steps, generator=job.generator).good().distinct()
    job.chosen["variational"] = {"starts": starts, "rounds": rounds, "steps": steps, "fits": len(fits)}
    return fits


def _modes(job: Job, target: Target, fits: MeanFieldFits) -> tuple[ModeSet, SearchReport]:
    began, budget, first = job.meter.used(), job.search_evaluations, 600
    if job.meter.limited:
        budget = int(min(budget, job.meter.affords(target, batch=600, share=0.2)))
        first = min(600, max(20, budget // 200))
    batch = min(20_000, max(first, budget // 20))
    modes, report = search_modes(
        target,
        fits,
        first_batch=first,
        batch=batch,
        max_evaluations=budget,
        stop=(lambda: job.meter.used() > began + 0.15) if job.meter.limited else None,
        generator=job.generator,
    )
    job.chosen["modes"] = {"first_batch": first, "batch": batch, "max_evaluations": budget, **asdict(report)}
    if report.stopped == "budget" and job.meter.limited:
        job.cut(f"{report.starts} starts of the mode search")
    return modes, report


def _knowledge(
    job: Job, target: Target, fits: MeanFieldFits, modes: ModeSet, report: SearchReport, prior: Target | None
) -> Knowledge:
    generator = job.generator
    tails = probe_degrees(target, fits)
    wide = wide_law(fits, df=tails.elliptical_df())
    if report.continuum:
        share = share_of(job, target, batch=480, share=0.08, usual=SPREAD_COST)
        starts = max(3, int(24 * share))
        extra = spread_over(target, fits, num_starts=starts, generator=generator)
        job.chosen["spread"] = {"starts": starts, "fits": len(extra)}
        fits = fits.merged(extra).good().distinct()
    listed = None
    if not report.continuum:
        peaked = modes.peaked & (modes.hits > 0)
        # Modes without any share of the mass (ripples far down) are not worth a component.
        peaked = peaked & (
            modes.log_mass() > modes.log_mass()[modes.peaked].max() - 16.0 if bool(peaked.any()) else peaked
        )
        listed = modes.subset(peaked) if bool(peaked.any()) else None
    product = None
    if len(fits) > 1 and target.dim > 1:
        law = EllipticalMixture(fits.location, 1.1 * fits.scale, df=5.0)
        product = fit_product(law.sample(4096, generator=generator))
    return Knowledge(fits, listed, prior, wide, product, tails)


def _on_space(job: Job) -> PilotResult:
    """The simpler way on MeanFree and Torus: an isotropic reference, two adaptive passes, a frozen one."""
    job.tell("choice of a reference")
    meter = job.meter
    reference, scale = choose_reference(job.target, generator=job.generator, pace=meter.allotted)
    guide = Guide(None, reference, {"uniform" if math.isnan(scale) else f"gaussian {scale:.4g}": 1.0})
    passes: list[Pass] = []
    for number in (1, 2):
        job.tell(f"pass {number}")
        until = max(0.5, meter.used() + 0.1) if number == 1 else 0.65
        passes.append(adaptive_pass(job, job.target, guide, until=until, last=passes[-1] if passes else None))
        if not passes[-1].result.finished or (meter.limited and meter.used() + 0.5 * passes[-1].cost > 0.65):
            break
    settled = agree([p.result.particles.log_normalizer for p in passes])
    return finish(job, None, passes, last_pass(job, job.target, None, passes), settled=settled)


def run_pilot(
    target: Target,
    *,
    generator: torch.Generator,
    num_particles: int = 8192,
    num_islands: int = 16,
    prior: Target | None = None,
    seconds: float | None = None,
    evaluations: int | None = None,
    progress: Callable[[str], None] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> PilotResult:
    """Sample a target with nothing to tune.

    Arguments:
        target: The density, on any space.
        generator: Source of randomness.
        num_particles: Particles of the last pass, a multiple of ``num_islands``.
        num_islands: Replicate islands of the last pass.
        prior: Normalised prior with an exact sampler; ``target.prior`` by default.
        seconds: Wall-clock budget.
        evaluations: Budget in points at which the target is evaluated.
        progress: Told what is being done, one short phrase each.
        clock: Tells the time in seconds; with its readings repeated, so is a run that time shaped.

    Returns:
        The particles, everything that was chosen, and the findings.

    Raises:
        ValueError: If the density is finite at none of the starting points.
    """
    pilot = Pilot(num_particles=num_particles, num_islands=num_islands)
    return pilot.run(
        target,
        generator=generator,
        prior=prior,
        seconds=seconds,
        evaluations=evaluations,
        progress=progress,
        clock=clock,
    )
