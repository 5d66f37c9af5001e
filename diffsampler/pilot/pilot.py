r"""The automatic pilot: from a log density alone to weighted particles with an honest error bar.

1. A scale-free variational multi-start and a mode search say where the mass is, and whether it can be finite.
2. Adaptive tempered SMC runs from a reference built of what was found; the reference and a transport map are refitted
   to its draws, and the pass is repeated until successive estimates of log Z agree.
3. A last pass repeats the schedule with everything frozen on replicate islands: given the pilot,
   :math:`E[\hat Z] = Z` exactly, and the spread of the islands is the error bar.

References:
    Adaptive importance sampling: the past, the present, and the future (Bugallo et al., 2017),
    https://doi.org/10.1109/MSP.2017.2699226
    Sequential Monte Carlo samplers (Del Moral, Doucet & Jasra, 2006), https://doi.org/10.1111/j.1467-9868.2006.00553.x
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, final

import torch

from diffsampler.estimators import Estimate, systematic_resample
from diffsampler.particles import Particles
from diffsampler.pilot.checks import drift, judge
from diffsampler.pilot.density_fits import fit_product
from diffsampler.pilot.frame import separating_frame
from diffsampler.pilot.guide import Guide, Knowledge, first_guide, prior_guide, refit_guide, wide_law
from diffsampler.pilot.improper import probe_tails
from diffsampler.pilot.manifold import choose_reference
from diffsampler.pilot.modes import ModeSet, SearchReport, search_modes
from diffsampler.pilot.record import Meter, Pass, PilotResult
from diffsampler.pilot.reference import EllipticalMixture
from diffsampler.pilot.search import MeanFieldFits, multistart, spread_over
from diffsampler.pilot.transport import AffineMap, Composed, PulledBack, TransportMap
from diffsampler.smc import SMCResult, smc
from diffsampler.space import Euclidean
from diffsampler.target import CountedTarget, Target
from diffsampler.tempering import TemperedPath

__all__ = ["Pilot", "PilotResult", "run_pilot"]


@final
class Pilot:
    """The pilot's settings; none of them needs to be touched.

    Arguments:
        num_particles: Particles of the last pass over all islands.
        num_islands: Replicate islands of the last pass; their spread is the error bar.
        max_passes: Most adaptive passes.
        search_seconds: Most seconds of mode search without a budget.
    """

    def __init__(
        self, *, num_particles: int = 8192, num_islands: int = 16, max_passes: int = 8, search_seconds: float = 6.0
    ) -> None:
        if num_islands < 2 or num_particles < 32 * num_islands or num_particles % num_islands:
            raise ValueError(
                "Expected at least 2 islands and num_particles a multiple of num_islands, 32 per island or more; "
                f"got {num_particles} and {num_islands}."
            )
        self.num_particles = num_particles
        self.num_islands = num_islands
        self.max_passes = max_passes
        self.search_seconds = search_seconds

    def run(
        self,
        target: Target,
        *,
        generator: torch.Generator,
        prior: Target | None = None,
        seconds: float | None = None,
        evaluations: int | None = None,
        progress: Callable[[str], None] | None = None,
    ) -> PilotResult:
        """Run the pilot on a target; see :func:`run_pilot`."""
        counted = CountedTarget(target)
        meter = Meter(counted, seconds=seconds, evaluations=evaluations)
        tell = progress or (lambda _: None)
        prior = target.prior if prior is None else prior
        if not isinstance(target.space, Euclidean):
            return self._run_on_space(counted, meter, generator, tell)
        tell("variational search")
        fits = self._fits(counted, meter, generator)
        tails = probe_tails(counted, fits, generator=generator)
        if tails.improper:
            return _refused(fits, tails.describe(), meter)
        frame = separating_frame(counted, fits)
        working: Target = counted
        if frame is not None:
            tell("variational search in a separating frame")
            working = PulledBack(counted, frame)
            prior = None if prior is None else PulledBack(prior, frame)
            fits = self._fits(working, meter, generator)
        tell("mode search")
        modes, report = self._modes(working, fits, meter, generator)
        knowledge = _knowledge(working, fits, modes, report, prior, generator)
        passes, settled = self._passes(working, knowledge, meter, generator, tell)
        tell("last pass")
        return self._last(counted, knowledge, passes, report, meter, generator, settled=settled, frame=frame)

    def _fits(self, target: Target, meter: Meter, generator: torch.Generator) -> MeanFieldFits:
        num_starts, steps = 80, 250
        if meter.limited:
            # A small budget buys a coarser search; below 10 starts and 80 steps it would not be one.
            share = min(1.0, 0.2 * meter.affords(target, batch=6 * num_starts) / (15 * num_starts * steps))
            num_starts = max(10, int(num_starts * share**0.5))
            steps = max(80, int(steps * share**0.5))
        return multistart(target, num_starts=num_starts, steps=steps, generator=generator).good().distinct()

    def _modes(
        self, target: Target, fits: MeanFieldFits, meter: Meter, generator: torch.Generator
    ) -> tuple[ModeSet, SearchReport]:
        began, used = meter.elapsed(), meter.used()
        limit = min(self.search_seconds, 0.3 * meter.seconds)
        budget = int(min(5e6, 0.3 * meter.evaluations))
        if meter.limited:
            budget = min(budget, int(meter.affords(target, batch=600)))

        def stop() -> bool:
            return meter.elapsed() - began > limit or meter.used() > used + 0.3

        return search_modes(
            target,
            fits,
            first_batch=min(600, max(30, budget // 600)),
            batch=min(20_000, max(600, budget // 20)),
            max_evaluations=budget,
            stop=stop,
            generator=generator,
        )

    def _adaptive_size(self, target: Target, meter: Meter) -> int:
        """Particles of an adaptive pass: fewer where the budget would not pay for a hundred evaluations of each."""
        size = min(self.num_particles, 2048 if target.dim <= 4 else 4096)
        if meter.limited:
            affordable = 0.25 * meter.affords(target, batch=size) / 100.0
            size = max(256, min(size, 4 * int(affordable / 4)))
        return size

    def _adaptive(
        self, target: Target, guide: Guide, meter: Meter, generator: torch.Generator, *, conditional_ess: float
    ) -> Pass:
        path = TemperedPath(guide.reference, guide.pull_back(target))
        began = meter.used()
        result = smc(
            path,
            n=self._adaptive_size(target, meter),
            num_islands=4,
            generator=generator,
            conditional_ess=conditional_ess,
            final_moves=6,
            # Particles without weight must not set the step size.
            resample_below=0.9,
            stop=lambda: meter.used() > 0.9,
        )
        return Pass(guide, path, result, meter.used() - began)

    def _passes(
        self,
        target: Target,
        knowledge: Knowledge,
        meter: Meter,
        generator: torch.Generator,
        tell: Callable[[str], None],
    ) -> tuple[list[Pass], bool]:
        """Adaptive passes until two in a row agree; whether they did."""
        prior = knowledge.prior
        guide = first_guide(knowledge) if prior is None else prior_guide(prior, generator=generator)
        passes: list[Pass] = []
        while True:
            tell(f"pass {len(passes) + 1}")
            passes.append(self._adaptive(target, guide, meter, generator, conditional_ess=0.5 if passes else 0.7))
            if not passes[-1].result.finished or len(passes) == self.max_passes:
                return passes, False
            if agree([p.result.particles.log_normalizer for p in passes]):
                return passes, True
            if meter.used() > 0.5:
                return passes, False
            guide = self._refit(target, passes[-1], knowledge, generator)

    def _refit(self, target: Target, last: Pass, knowledge: Knowledge, generator: torch.Generator) -> Guide:
        """Fit on the draws of half of the islands, choose on those of the other half."""
        x, log_weight = last.x, last.result.particles.log_weight
        half = x.shape[0] // 2
        draws = []
        for part in (slice(0, half), slice(half, None)):
            index = systematic_resample(log_weight[part], generator=generator)
            draws.append(x[part][index])
        return refit_guide(target, draws[0], draws[1], knowledge, generator=generator)

    def _run_on_space(
        self, target: CountedTarget, meter: Meter, generator: torch.Generator, tell: Callable[[str], None]
    ) -> PilotResult:
        """The simpler way on MeanFree and Torus: an isotropic reference, two adaptive passes, a frozen one."""
        tell("choice of a reference")
        reference, scale = choose_reference(target, generator=generator, stop=lambda: meter.used() > 0.5)
        guide = Guide(None, reference, {"uniform" if math.isnan(scale) else f"gaussian {scale:.4g}": 1.0})
        passes = []
        for number in (1, 2):
            tell(f"pass {number}")
            passes.append(self._adaptive(target, guide, meter, generator, conditional_ess=0.7))
            if not passes[-1].result.finished:
                break
        settled = agree([p.result.particles.log_normalizer for p in passes])
        tell("last pass")
        return self._last(target, None, passes, None, meter, generator, settled=settled)

    def _last(
        self,
        target: CountedTarget,
        knowledge: Knowledge | None,
        passes: list[Pass],
        report: SearchReport | None,
        meter: Meter,
        generator: torch.Generator,
        *,
        settled: bool,
        frame: AffineMap | None = None,
    ) -> PilotResult:
        last = passes[-1]
        guide, adaptive = last.guide, last.result
        final = adaptive
        if adaptive.finished:
            final = smc(
                last.path,
                n=self._affordable(adaptive, last.cost, meter),
                num_islands=self.num_islands,
                generator=generator,
                schedule=adaptive.schedule,
            )
        raw = final.particles
        particles = Particles(guide.map(raw.x), raw.log_weight, raw.replicates, nonfinite=raw.nonfinite)
        modes = None if knowledge is None else knowledge.modes
        shift = drift(last.path.target, final, generator=generator) if final.finished and meter.used() < 0.95 else 0.0
        findings = judge(
            profiles=guide.profiles,
            shift=shift,
            particles=particles,
            final=final,
            passes=[p.result for p in passes],
            modes=modes,
            report=report,
            settled=settled,
        )
        centres = raw.x.new_zeros(0, target.dim) if modes is None else modes.centre
        if frame is not None:
            centres = frame(centres)[0]
            particles = replace(particles, x=frame(particles.x)[0])
        x, weight = particles.x, torch.softmax(particles.log_weight, 0).unsqueeze(-1)
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
            evaluations=target.evaluations,
            seconds=meter.elapsed(),
            choices=_choices(passes, guide, final, knowledge) | {"separating_frame": frame is not None},
        )

    def _affordable(self, adaptive: SMCResult, cost: float, meter: Meter) -> int:
        """Particles of the last pass that what is left of the budget pays for."""
        n = self.num_particles
        if meter.limited:
            share = max(0.0, 0.9 - meter.used()) / max(cost, 1e-9)
            n = min(n, int(share * len(adaptive.particles)))
        return self.num_islands * max(32, n // self.num_islands)


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
    }


def _knowledge(
    target: Target,
    fits: MeanFieldFits,
    modes: ModeSet,
    report: SearchReport,
    prior: Target | None,
    generator: torch.Generator,
) -> Knowledge:
    wide = wide_law(fits)
    if report.continuum or len(modes) > 1:
        extra = spread_over(target, fits, generator=generator)
        both = fits.merged(extra)
        fits = both.good().distinct() if report.continuum else fits
    listed = None
    if not report.continuum:
        peaked = modes.peaked & (modes.hits > 0)
        # Modes without any share of the mass (ripples far down) are not worth a component.
        peaked = peaked & (
            modes.log_mass() > modes.log_mass()[modes.peaked].max() - 16.0 if bool(peaked.any()) else peaked
        )
        if bool(peaked.any()):
            listed = ModeSet(
                modes.centre[peaked],
                modes.tril[peaked],
                modes.log_prob[peaked],
                modes.peaked[peaked],
                modes.hits[peaked],
            )
    product = None
    if len(fits) > 1 and target.dim > 1:
        law = EllipticalMixture(fits.location, 1.1 * fits.scale, df=5.0)
        product = fit_product(law.sample(4096, generator=generator))
    return Knowledge(fits, listed, prior, wide, product)


def _refused(fits: MeanFieldFits, reason: str, meter: Meter) -> PilotResult:
    mean, spread = fits.pooled()
    finding = (
        "error",
        f"The density looks improper: {reason}.",
        "Give flat directions a proper prior, or bound them; nothing was sampled.",
    )
    return PilotResult(
        None, (), mean, spread, mean.new_zeros(0, mean.shape[0]), None, None, None, (finding,),
        meter.target.evaluations, meter.elapsed(), {},
    )  # fmt: skip


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

    Returns:
        The particles, everything that was chosen, and the findings.

    Raises:
        ValueError: If the density is finite at none of the starting points.
    """
    pilot = Pilot(num_particles=num_particles, num_islands=num_islands)
    return pilot.run(
        target, generator=generator, prior=prior, seconds=seconds, evaluations=evaluations, progress=progress
    )
