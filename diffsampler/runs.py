"""What each method does with a task: the pilot, tempered SMC, training, and the choice between their answers."""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import NormalDist
from typing import Literal, NamedTuple

import torch

from diffsampler.budget import Budget, Task, TrainingMeter
from diffsampler.checks import differing_point
from diffsampler.methods.scld import SCLD
from diffsampler.particles import Particles, disagreement
from diffsampler.pilot import PilotResult, run_pilot
from diffsampler.pilot.checks import drift, island_findings
from diffsampler.pilot.record import Meter
from diffsampler.recipes import (
    REFINED_BATCH,
    SEARCH_BATCH,
    SEARCH_SHARE,
    learned_sampler,
    plain_smc,
    refined_sampler,
)
from diffsampler.refinement import Course
from diffsampler.result import Finding
from diffsampler.sampler import DiffusionSampler, Sampler
from diffsampler.target import Target

__all__ = ["Answer", "run_auto", "run_given", "run_learned", "run_smc"]

NUM_ISLANDS = 16
MIN_PARTICLES = 4096
"""Particles of the pilot's last pass at least: its log Z is worth more than a handful of draws."""
PILOT_SHARE = 0.5
"""Share of a budget that the pilot may spend before the learned process starts."""
DEFAULT_STEPS = 1000
"""Gradient steps of a named learned method without a budget."""
BATCH_SIZE = 256
"""Trajectories per gradient step of a learned method."""
DRIFT_COST = 50_000
"""Evaluations of the drift test."""
MAX_DRIFT = 5.0
"""Drift under further moves, in standard errors; ordinary runs stay below 4."""
FEWEST_LEFT = 600_000
"""Evaluations that must be left after the pilot for a process to be learned: less does not pay for its checks."""
FEWEST_STEPS = 50
"""Gradient steps below which a process has hardly been trained; the shortest recipe of a paper takes hundreds."""
FEWEST_DRAWS = 100
"""Draws that are made even if an evaluation budget does not pay for them; fewer are no answer."""


class Answer(NamedTuple):
    """What a method hands back."""

    particles: Particles
    method: str
    findings: list[Finding]
    choices: dict[str, object]
    history: list[dict[str, float]]
    sampler: Sampler | None = None


def run_given(task: Task, method: str | Sampler) -> Answer:
    """A configured sampler: trained if it is a learned one that has not been, or a budget asks for it."""
    assert isinstance(method, Sampler)
    _check_same_target(task.target, method, task.device)
    name = type(method).__name__
    if isinstance(method, DiffusionSampler | SCLD):
        method.to(device=task.device)
        choices: dict[str, object] = {"steps_before": int(method.history[-1]["step"]) if method.history else 0}
        if task.budget != Budget() or not method.history:
            _train(task, method)
        particles, findings = _draw(task, method)
        findings = [*_hardly_trained(method), *findings]
        return Answer(particles, name, findings, choices, method.history, method)
    particles = method.sample(task.num_samples, seed=task.seed)
    findings = [Finding(*finding) for finding in method.findings]  # type: ignore[arg-type]
    if task.spent() > 1.1:
        message = f"{name} spent {task.spent():.1f} times the budget, which it does not keep."
        findings.append(Finding("warning", message, "Its length is set by num_samples and its own options."))
    return Answer(particles, name, findings, {}, [], method)


def _check_same_target(target: Target, method: Sampler, device: torch.device) -> None:
    """A sampler of another density would answer the wrong question without a sign."""
    if method.target.space != target.space:
        raise ValueError(f"Expected a sampler of a target on {target.space}; got one on {method.target.space}.")
    method.target.to(device)
    found = differing_point(target, method.target, device=device)
    if found is not None:
        where, here, there = found
        raise ValueError(
            f"Expected a sampler of this target; got one of another: log_prob is {here:.6g} here and {there:.6g} there "
            f"at x = {where}."
        )


def _train(task: Task, sampler: DiffusionSampler | SCLD, *, learning_rate: float = 2e-3) -> None:
    default = 1_000_000 if task.limited else DEFAULT_STEPS
    steps = default if task.budget.steps is None else int(task.budget.steps)
    task.progress.start("training", None if task.limited else steps)
    # Replayed paths cost nothing, fresh ones do.
    fresh = 1.0 - sampler.lesson.replay_share if isinstance(sampler, SCLD) else 1.0
    sampler.fit(
        steps=steps,
        batch_size=BATCH_SIZE,
        learning_rate=learning_rate,
        seed=task.seed,
        spent=task.watch("training", TrainingMeter(task, batch_size=max(1, round(fresh * BATCH_SIZE)))),
        checkpoint=task.checkpoint,
        resume=task.resume,
        callback=task.progress.training,
    )


def _hardly_trained(sampler: DiffusionSampler | SCLD) -> list[Finding]:
    """A process without training may miss tails and modes altogether, and no weight of its own paths shows that."""
    steps = int(sampler.history[-1]["step"]) if sampler.history else 0
    if steps >= FEWEST_STEPS:
        return []
    message = f"The process was trained for {steps} gradient steps only: it may miss mass that its weights do not show."
    return [Finding("warning", message, "Raise the budget.")]


def _draw(task: Task, sampler: Sampler) -> tuple[Particles, list[Finding]]:
    """The draws that were asked for, or as many as an evaluation budget pays for."""
    n, limit = task.num_samples, task.budget.evaluations
    if limit is not None:
        before = task.evaluations
        trial = sampler.sample(2, seed=task.seed)
        cost = (task.evaluations - before) / (len(trial) + trial.nonfinite)
        paid = int((limit - task.evaluations) / cost) if cost > 0 else n
        # How many are left may depend on when time ended what came before.
        n = int(task.watch("draws", lambda: min(n, max(paid, FEWEST_DRAWS)), levels=None)())
    findings = []
    if n < task.num_samples:
        message = f"The budget of evaluations paid for {n} of {task.num_samples} draws."
        findings.append(Finding("warning", message, "Raise the budget."))
    particles = sampler.sample(n, seed=task.seed)
    return particles, [*findings, *(Finding(*finding) for finding in sampler.findings)]  # type: ignore[arg-type]


def _search_limit(task: Task) -> Callable[[], float]:
    """Evaluations that the search of a named method may take, as measured on the target where time is limited."""
    if not task.limited:
        return lambda: math.inf
    meter = Meter(task.target, seconds=task.budget.seconds, evaluations=task.budget.evaluations)
    return task.watch("search", lambda: meter.affords(task.target, batch=SEARCH_BATCH, share=SEARCH_SHARE), levels=None)


def run_learned(task: Task, method: str | Sampler) -> Answer:
    """A named learned method, in coordinates standardized by a short variational search."""
    task.progress.start("locating the target", None)
    mapped, choices = learned_sampler(
        str(method),
        task.target,
        generator=task.generator,
        dtype=task.dtype,
        paid=_search_limit(task),
    )
    _train(task, mapped.inner, learning_rate=float(choices["learning_rate"]))
    particles, findings = _draw(task, mapped)
    findings = [*_hardly_trained(mapped.inner), *findings]
    return Answer(particles, str(method), findings, choices, mapped.inner.history, mapped)


def run_smc(task: Task, method: str | Sampler) -> Answer:
    """Adaptive tempered SMC with a frozen second pass."""
    task.progress.start("tempered SMC", None)
    count = NUM_ISLANDS * max(32, math.ceil(task.num_samples / NUM_ISLANDS))
    spent = task.watch("smc", task.spent)
    first: list[float] = []

    def stop() -> bool:
        # The second pass costs as much as the first.
        first.append(spent())
        return first[-1] > first[0] + 0.48 * (1.0 - first[0])

    result = plain_smc(
        task.target,
        count,
        NUM_ISLANDS,
        generator=task.generator,
        stop=stop,
        paid=_search_limit(task),
    )
    findings = []
    if not result.finished:
        message = f"The budget ended at temperature {result.beta:.3g}: the particles do not represent the target."
        findings.append(Finding("error", message, "Raise the budget."))
    else:
        found = island_findings(result, prior=task.target.prior is not None)
        findings += [Finding(*finding) for finding in found]  # type: ignore[arg-type]
    if result.finished and (task.budget.evaluations is None or task.budget.evaluations - task.evaluations > DRIFT_COST):
        shift = drift(task.target, result, generator=task.generator)
        if shift > MAX_DRIFT:
            message = f"Further moves shift the particles by {shift:.1f} standard errors: they have not settled."
            findings.append(Finding("warning", message, "Use method='auto', which refits its reference."))
    choices = {"betas": list(result.schedule.betas), "num_islands": NUM_ISLANDS}
    return Answer(result.particles, "smc", findings, choices, [])


def run_auto(task: Task, method: str | Sampler) -> Answer:
    """Pilot, then a process trained on its particles; the better of the two by exact weights."""
    budget = task.budget
    count = NUM_ISLANDS * math.ceil(max(task.num_samples, MIN_PARTICLES) / NUM_ISLANDS)
    task.progress.start("pilot", None)
    pilot = run_pilot(
        task.target,
        generator=task.generator,
        num_particles=count,
        num_islands=NUM_ISLANDS,
        seconds=None if budget.seconds is None else PILOT_SHARE * budget.seconds,
        evaluations=None if budget.evaluations is None else int(PILOT_SHARE * budget.evaluations),
        progress=task.progress.tell,
        clock=task.watch("pilot", lambda: task.seconds, levels=None),
    )
    findings = [Finding(*finding) for finding in pilot.findings]  # type: ignore[arg-type]
    if pilot.particles is None:
        raise ValueError(" ".join(f"{finding.message} {finding.remedy}" for finding in findings))
    choices: dict[str, object] = {"pilot": pilot.choices, "chosen": "pilot"}
    answer = Answer(pilot.particles, "auto (pilot)", findings, choices, [])
    poor = budget.evaluations is not None and budget.evaluations - task.evaluations < FEWEST_LEFT
    if poor or any(finding.level == "error" for finding in findings) or task.watch("learn", task.spent)() > 0.8:
        return answer
    return _refine(task, pilot, answer)


def _refine(task: Task, pilot: PilotResult, answer: Answer) -> Answer:
    """Train a process on the pilot's particles and keep it if its exact weights are better."""
    assert pilot.particles is not None
    try:
        mapped, choices = refined_sampler(
            task.target,
            pilot,
            generator=task.generator,
            dtype=task.dtype,
            course=Course(
                steps=None if task.budget.steps is None else int(task.budget.steps),
                limited=task.limited,
                spent=task.watch("refinement", TrainingMeter(task, batch_size=REFINED_BATCH)),
                callback=task.progress.training,
                start=task.progress.start,
            ),
        )
    except RuntimeError as error:
        # Where a density or its gradient breaks off, a chain may not train; the pilot has answered already.
        message = f"No process could be learned: {error}"
        remedy = "The answer is the pilot's; look at the density where it is not finite."
        return answer._replace(findings=[*answer.findings, Finding("warning", message, remedy)])
    learned, too_few = _draw(task, mapped)
    mine, theirs = learned.log_normalizer, pilot.particles.log_normalizer
    agree = abs(mine.value - theirs.value) <= 4.0 * math.hypot(mine.std_error, theirs.std_error) + 0.02
    trusted = learned.pareto_k < 0.7 and learned.ess >= 100.0
    # Weights are exact for both: mass that is missed can only lower log Z.
    found_more = trusted and not agree and mine.value > theirs.value
    differ = disagreement(learned, pilot.particles)
    # Six statistics per coordinate: two in a hundred good processes are turned away.
    limit = NormalDist().inv_cdf(1.0 - 0.01 / (6.0 * task.target.dim))
    same = agree and differ < limit
    # The pilot is the surer of the two in the tails: the process must be clearly more precise.
    precise = mine.std_error < 0.8 * theirs.std_error
    better = not too_few and (found_more or (same and trusted and precise))
    choices = {
        **answer.choices,
        **choices,
        "learned_log_normalizer": list(mine[:2]),
        "learned_ess": learned.ess,
        "learned_pareto_k": learned.pareto_k,
        "largest_difference": differ,
        "pilot_log_normalizer": list(theirs[:2]),
        "chosen": "learned" if better else "pilot",
    }
    findings = list(answer.findings)
    if trusted and not agree:
        loser = "pilot" if found_more else "learned process"
        message = f"The {loser} missed mass: log Z is {mine.value:.3f} learned and {theirs.value:.3f} by the pilot."
        # That a process which is not used failed says nothing against the answer.
        level: Literal["note", "warning"] = "warning" if found_more else "note"
        findings.append(Finding(level, message, "The answer is the larger one; raise the budget to confirm it."))
    if better:
        return Answer(learned, "auto (learned)", findings, choices, mapped.inner.history, mapped)
    return answer._replace(findings=findings, choices=choices, history=mapped.inner.history, sampler=mapped)
