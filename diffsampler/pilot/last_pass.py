r"""The pilot's last pass: frozen, on replicate islands, in as many rounds as its moments call for.

Given the pilot, every round is an unbiased estimate with fresh randomness, so rounds are simply put side by side. The
islands say how precise the result is: for a bounded function :math:`f` and islands with evidence :math:`Z_i` and mean
:math:`f_i`,

.. math:: \mathrm{se}(f)^2 = \frac{1}{R (R - 1)} \sum_i \Big(\frac{Z_i}{\bar Z}\Big)^2 (f_i - \bar f)^2 .

Where islands disagree so much that rounds would not help, the reference is refitted to the last pass's own draws,
which are more than any adaptive pass has, and the pass is repeated.

References:
    On parallel implementation of sequential Monte Carlo methods: the island particle model (Verge, Dubarry, Del Moral,
    Moulines, 2015), https://arxiv.org/abs/1306.3911
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from diffsampler.particles import Particles
from diffsampler.pilot.guide import Knowledge
from diffsampler.pilot.passes import Job, adaptive_pass, refit
from diffsampler.pilot.record import Pass
from diffsampler.smc import SMCResult, smc
from diffsampler.target import Target

__all__ = ["imprecision", "joined", "last_pass"]

LAST_END = 0.85
"""Fraction of a budget that the last pass is planned to end at: its cost is known to some ten per cent only."""
SMALLEST_ISLAND = 16
MAX_ROUNDS = 4
REPAIRS = 2
PLENTY = 1.5
"""Wanted standard error of log Z and of means in standard deviations, times the root of the number of particles."""
HOPELESS = 3.0
"""Multiple of the wanted error beyond which the reference is refitted rather than the rounds multiplied."""


def imprecision(particles: Particles) -> float:
    """Largest standard error by the islands: of log Z, of means in standard deviations, of standard deviations.

    Coordinates are cut at four standard deviations: squares of heavy tails have no central limit theorem.
    """
    weight = torch.softmax(particles.log_weight, 0).unsqueeze(-1)
    mean = (weight * particles.x).sum(0)
    scale = (weight * (particles.x - mean).square()).sum(0).sqrt().clamp_min(1e-300)
    u = ((particles.x - mean) / scale).clamp(-4.0, 4.0)
    errors = particles.expectation(torch.cat([u, 0.5 * u.square()], -1))[1]
    return max(float(errors.max()), particles.log_normalizer.std_error)


def joined(rounds: list[SMCResult]) -> SMCResult:
    """Independent rounds of one frozen schedule as one result with the islands of all."""
    first = rounds[0]
    if len(rounds) == 1:
        return first
    size = len(first.particles)
    particles = Particles(
        torch.cat([r.particles.x for r in rounds]),
        torch.cat([r.particles.log_weight for r in rounds]),
        sum(r.particles.replicates for r in rounds),
        nonfinite=sum(r.particles.nonfinite for r in rounds),
    )
    return replace(
        first,
        particles=particles,
        z=torch.cat([r.z for r in rounds]),
        log_target=torch.cat([r.log_target for r in rounds]),
        acceptance=tuple(sum(a) / len(rounds) for a in zip(*(r.acceptance for r in rounds), strict=True)),
        ancestors=torch.cat([r.ancestors + i * size for i, r in enumerate(rounds)]),
        effective_ancestors=torch.cat([r.effective_ancestors for r in rounds]),
        evaluations=sum(r.evaluations for r in rounds),
        nonfinite=sum(r.nonfinite for r in rounds),
    )


def last_pass(job: Job, target: Target, knowledge: Knowledge | None, passes: list[Pass]) -> SMCResult:
    """Repeat the schedule of the last adaptive pass with everything frozen.

    Arguments:
        job: The run.
        target: The density, in the frame of the passes.
        knowledge: What references are built of; without it nothing can be refitted.
        passes: Adaptive passes; the last one is repeated, and refitted ones are appended.
    """
    job.tell("last pass")
    final, cost = _round(job, passes[-1])
    repairs = 0
    for _ in range(REPAIRS if knowledge is not None else 0):
        if final is None or knowledge is None or imprecision(_seen(passes[-1], final)) < HOPELESS * _wanted(job):
            break
        if job.meter.limited and job.meter.used() + passes[-1].cost + cost > LAST_END:
            break
        job.tell(f"pass {len(passes) + 1}")
        guide = refit(job, target, replace(passes[-1], result=final), knowledge)
        retry = adaptive_pass(job, target, guide, until=LAST_END - cost, last=passes[-1])
        if not retry.result.finished:
            break
        repeated, cost = _round(job, retry)
        if repeated is None:
            break
        passes.append(retry)
        final, repairs = repeated, repairs + 1
    job.chosen["repairs"], job.chosen["rounds"] = repairs, 0
    if final is None:
        if passes[-1].result.finished:
            job.cut("no frozen last pass, so log Z and its error are those of an adaptive one")
        return passes[-1].result
    rounds = [final, *_more(job, passes[-1], final, cost)]
    job.chosen["rounds"] = len(rounds)
    return joined(rounds)


def _wanted(job: Job) -> float:
    return PLENTY / math.sqrt(job.num_particles)


def _seen(last: Pass, final: SMCResult) -> Particles:
    """The particles in the coordinates of the target."""
    return replace(final.particles, x=last.guide.map(final.particles.x))


def _more(job: Job, last: Pass, final: SMCResult, cost: float) -> list[SMCResult]:
    """Further rounds until the worst error is as small as wanted, if the budget pays for them."""
    ratio = imprecision(_seen(last, final)) / _wanted(job)
    rounds: list[SMCResult] = []
    if len(final.particles) < job.num_particles or not math.isfinite(ratio):
        return rounds
    for _ in range(min(MAX_ROUNDS, math.ceil(ratio**2)) - 1):
        if job.meter.limited and job.meter.used() + cost > LAST_END:
            break
        job.tell(f"last pass, round {len(rounds) + 2}")
        another, cost = _round(job, last)
        if another is None or len(another.particles) != len(final.particles):
            break
        rounds.append(another)
    return rounds


def _round(job: Job, last: Pass) -> tuple[SMCResult | None, float]:
    """One frozen pass and its share of the budget; None if it did not finish or the budget does not pay for it."""
    adaptive, meter = last.result, job.meter
    began, n = meter.used(), job.num_particles
    if not adaptive.finished:
        return None, 0.0
    if meter.limited:
        share = max(0.0, LAST_END - began) / max(last.cost, 1e-9)
        n = min(n, int(share * len(adaptive.particles)))
    size = n // job.num_islands
    if size < SMALLEST_ISLAND:
        return None, 0.0
    frozen = smc(
        last.path,
        n=job.num_islands * size,
        num_islands=job.num_islands,
        generator=job.generator,
        schedule=adaptive.schedule,
        stop=(lambda: meter.used() > 1.0) if meter.limited else None,
    )
    return frozen if frozen.finished else None, meter.used() - began
