"""The front door: a density in, weighted draws, the evidence and a verdict out."""

from __future__ import annotations

import difflib
import itertools
import math
import time
from collections.abc import Callable
from pathlib import Path
from statistics import NormalDist
from typing import Literal, NamedTuple

import torch

from diffsampler.budget import Budget, Task, TrainingMeter
from diffsampler.catalog import LEARNED as LEARNED
from diffsampler.catalog import METHODS as METHODS
from diffsampler.catalog import MethodInfo as MethodInfo
from diffsampler.checks import check_target, differing_point, working_dtype
from diffsampler.particles import Particles, disagreement
from diffsampler.pilot import PilotResult, run_pilot
from diffsampler.pilot.checks import drift
from diffsampler.progress import Progress
from diffsampler.recipes import REFINED_BATCH, learned_sampler, plain_smc, refined_sampler
from diffsampler.result import Finding, Fit, diagnose
from diffsampler.sampler import DiffusionSampler, Sampler
from diffsampler.target import CastTarget, CountedTarget, Target

__all__ = ["METHODS", "Budget", "MethodInfo", "sample"]

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
FEWEST_DRAWS = 100
"""Draws that are made even if an evaluation budget does not pay for them; fewer are no answer."""


class _Answer(NamedTuple):
    """What a method hands back."""

    particles: Particles
    method: str
    findings: list[Finding]
    choices: dict[str, object]
    history: list[dict[str, float]]
    sampler: Sampler | None = None


def sample(
    target: Target,
    *,
    method: str | Sampler = "auto",
    num_samples: int = 4000,
    seed: int = 0,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    budget: Budget | None = None,
    progress: bool = False,
    checkpoint: str | Path | None = None,
    resume: bool = False,
) -> Fit:
    """Sample a density that is known up to its normalizing constant.

    Arguments:
        target: The density: ``Target.from_log_prob(f, dim=...)``, ``Target.from_energy(...)``,
            ``ds.pyro.PyroTarget(model, *args)`` or one of ``diffsampler.targets``.
        method: ``"auto"`` (nothing to tune), ``"smc"``, a learned method's acronym in lower case (``"pis"``, ``"dds"``,
            ``"dis"``, ``"cmcd"``), or a configured :class:`~diffsampler.sampler.Sampler` of this target.
        num_samples: Number of draws at least; samplers that work in blocks round up.
        seed: One seed for everything; two calls with it agree bit for bit on one device unless time ends them.
        device: Where to compute, by default where the target is (cpu).
        dtype: Arithmetic of learned processes; pilots and weights use float64.
        budget: What the run may spend.
        progress: Whether to show a progress bar.
        checkpoint: Folder for checkpoints of a learned method's training.
        resume: Continue from the folder's checkpoint if there is one.

    Returns:
        The draws with their weights, log Z with its error, and the findings.

    Raises:
        TypeError: If the target is not a Target, or an option is of the wrong type.
        ValueError: If the density cannot be sampled as it is (shape, NaN, gradient, improper), an option is out of
            range or does not apply to the method, the method is unknown, or the device is not there.
    """
    began = time.monotonic()
    budget = Budget() if budget is None else budget
    run = _find_method(method)
    _check_options(method, num_samples=num_samples, seed=seed, dtype=dtype, budget=budget)
    _check_checkpoint(method, checkpoint, resume=resume)
    place = _find_device(device, target, method)
    if isinstance(target, Target):
        target.to(place)
    counted = CountedTarget(target) if isinstance(target, Target) else target
    warnings = check_target(counted, device=place)
    precise = working_dtype(counted, place)
    known = counted if precise == torch.float64 else CountedTarget(CastTarget(counted, precise))
    evaluations_before = _evaluations(method)
    with Progress(enabled=progress) as bar:
        task = Task(
            target=known,
            num_samples=num_samples,
            seed=seed,
            dtype=dtype,
            device=place,
            budget=budget,
            progress=bar,
            checkpoint=checkpoint,
            resume=resume,
            began=began,
            elsewhere=lambda: _evaluations(method) - evaluations_before,
        )
        answer = run(task, method)
    findings = [Finding("warning", text, "Particles there have weight zero.") for text in warnings]
    findings += answer.findings
    texts = {finding.message for finding in findings}
    findings += [finding for finding in diagnose(answer.particles) if finding.message not in texts]
    return Fit(
        particles=answer.particles,
        posterior=target.constrain(answer.particles.x),
        findings=[finding for finding in findings if finding.level != "note"],
        evaluations=task.evaluations if _counts(method, since=evaluations_before) else 0,
        seconds=task.seconds,
        method=answer.method,
        choices={"seed": seed, "num_samples": num_samples, **answer.choices},
        history=answer.history,
        true_log_normalizer=target.log_normalizer,
        notes=[finding.message for finding in findings if finding.level == "note"],
        sampler=answer.sampler,
    )


def _check_options(method: str | Sampler, *, num_samples: int, seed: int, dtype: torch.dtype, budget: Budget) -> None:
    for name, value in (("num_samples", num_samples), ("seed", seed)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"Expected {name} to be an integer; got {value!r}.")
    if num_samples < 1:
        raise ValueError(f"Expected num_samples >= 1; got {num_samples}.")
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"Expected dtype to be torch.float32 or torch.float64; got {dtype}.")
    if not isinstance(budget, Budget):
        raise TypeError(f"Expected a Budget, such as ds.Budget(seconds=60); got {type(budget).__name__}.")


def _check_checkpoint(method: str | Sampler, checkpoint: str | Path | None, *, resume: bool) -> None:
    """Options that would have no effect are refused."""
    if resume and checkpoint is None:
        raise ValueError("Expected checkpoint=folder with resume=True; got no folder to resume from.")
    trains = isinstance(method, DiffusionSampler) or method in LEARNED
    if checkpoint is not None and not trains:
        name = method if isinstance(method, str) else type(method).__name__
        raise ValueError(
            f"Expected a learned method with checkpoint=; got {name!r}, which keeps none. Use one of "
            f"{', '.join(LEARNED)}, or leave checkpoint out."
        )


def _find_device(device: torch.device | str | None, target: Target, method: str | Sampler) -> torch.device:
    if device is None:
        if isinstance(method, DiffusionSampler):
            return method.device
        tensors = itertools.chain(target.buffers(), target.parameters()) if isinstance(target, Target) else iter(())
        first = next(tensors, None)
        return torch.device("cpu") if first is None else first.device
    try:
        place = torch.device(device)
        torch.empty(1, device=place).tolist()
    except (RuntimeError, AssertionError, TypeError, NotImplementedError) as error:
        there = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        raise ValueError(f"Expected a device that is there ({', '.join(there)}); got {device!r}.") from error
    return place


def _evaluations(method: str | Sampler) -> int:
    return 0 if isinstance(method, str) else method.evaluations


def _counts(method: str | Sampler, *, since: int) -> bool:
    """Whether all evaluations were seen; a sampler that does not count leaves only those of the checks."""
    return isinstance(method, str) or method.evaluations > since


_Run = Callable[[Task, "str | Sampler"], _Answer]


def _find_method(method: str | Sampler) -> _Run:
    if isinstance(method, Sampler):
        return _given
    if not isinstance(method, str):
        got = f"the class {method.__name__}" if isinstance(method, type) else type(method).__name__
        raise TypeError(f"Expected the name of a method or a Sampler, such as ds.CMCD(target); got {got}.")
    if method == "auto":
        return _auto
    if method == "smc":
        return _smc
    if method in METHODS:
        return _learned
    near = difflib.get_close_matches(method.lower(), METHODS, n=1, cutoff=0.4)
    hint = f"Did you mean {near[0]!r}?" if near else "A classical sampler is passed as an object from baselines."
    raise ValueError(f"Expected one of {', '.join(METHODS)} or a Sampler; got {method!r}. {hint}")


def _given(task: Task, method: str | Sampler) -> _Answer:
    """A configured sampler: trained if it is a learned one that has not been, or a budget asks for it."""
    assert isinstance(method, Sampler)
    _check_same_target(task.target, method, task.device)
    name = type(method).__name__
    if isinstance(method, DiffusionSampler):
        method.to(device=task.device)
        if task.budget != Budget() or not method.history:
            _train(task, method)
        particles, findings = _draw(task, method)
        return _Answer(particles, name, findings, {}, method.history, method)
    particles, findings = method.sample(task.num_samples, seed=task.seed), []
    if task.spent() > 1.1:
        message = f"{name} spent {task.spent():.1f} times the budget, which it does not keep."
        findings.append(Finding("warning", message, "Its length is set by num_samples and its own options."))
    return _Answer(particles, name, findings, {}, [], method)


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


def _train(task: Task, sampler: DiffusionSampler, *, learning_rate: float = 2e-3) -> None:
    default = 1_000_000 if task.limited else DEFAULT_STEPS
    steps = default if task.budget.steps is None else int(task.budget.steps)
    task.progress.start("training", None if task.limited else steps)
    sampler.fit(
        steps=steps,
        batch_size=BATCH_SIZE,
        learning_rate=learning_rate,
        seed=task.seed,
        spent=TrainingMeter(task, batch_size=BATCH_SIZE),
        checkpoint=task.checkpoint,
        resume=task.resume,
        callback=task.progress.training,
    )


def _draw(task: Task, sampler: Sampler) -> tuple[Particles, list[Finding]]:
    """The draws that were asked for, or as many as an evaluation budget pays for."""
    n, limit = task.num_samples, task.budget.evaluations
    if limit is not None:
        before = task.evaluations
        sampler.sample(2, seed=task.seed)
        cost = (task.evaluations - before) / 2
        paid = int((limit - task.evaluations) / cost) if cost > 0 else n
        n = min(n, max(paid, FEWEST_DRAWS))
    findings = []
    if n < task.num_samples:
        message = f"The budget of evaluations paid for {n} of {task.num_samples} draws."
        findings.append(Finding("warning", message, "Raise the budget."))
    return sampler.sample(n, seed=task.seed), findings


def _learned(task: Task, method: str | Sampler) -> _Answer:
    """A named learned method, in coordinates standardized by a short variational search."""
    task.progress.start("locating the target", None)
    mapped, choices = learned_sampler(
        str(method),
        task.target,
        generator=task.generator,
        dtype=task.dtype,
        seconds=task.budget.seconds,
        evaluations=task.budget.evaluations,
    )
    _train(task, mapped.inner, learning_rate=float(choices["learning_rate"]))
    particles, findings = _draw(task, mapped)
    return _Answer(particles, str(method), findings, choices, mapped.inner.history, mapped)


def _smc(task: Task, method: str | Sampler) -> _Answer:
    """Adaptive tempered SMC with a frozen second pass."""
    task.progress.start("tempered SMC", None)
    count = NUM_ISLANDS * max(32, math.ceil(task.num_samples / NUM_ISLANDS))
    first: list[float] = []

    def stop() -> bool:
        # The second pass costs as much as the first.
        first.append(task.spent())
        return first[-1] > first[0] + 0.48 * (1.0 - first[0])

    result = plain_smc(
        task.target,
        count,
        NUM_ISLANDS,
        generator=task.generator,
        stop=stop,
        seconds=task.budget.seconds,
        evaluations=task.budget.evaluations,
    )
    findings = []
    if not result.finished:
        message = f"The budget ended at temperature {result.beta:.3g}: the particles do not represent the target."
        findings.append(Finding("error", message, "Raise the budget."))
    elif task.budget.evaluations is None or task.budget.evaluations - task.evaluations > DRIFT_COST:
        shift = drift(task.target, result, generator=task.generator)
        if shift > MAX_DRIFT:
            message = f"Further moves shift the particles by {shift:.1f} standard errors: they have not settled."
            findings.append(Finding("warning", message, "Use method='auto', which refits its reference."))
    choices = {"betas": list(result.schedule.betas), "num_islands": NUM_ISLANDS}
    return _Answer(result.particles, "smc", findings, choices, [])


def _auto(task: Task, method: str | Sampler) -> _Answer:
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
    )
    findings = [Finding(*finding) for finding in pilot.findings]  # type: ignore[arg-type]
    if pilot.particles is None:
        raise ValueError(" ".join(f"{finding.message} {finding.remedy}" for finding in findings))
    choices: dict[str, object] = {"pilot": pilot.choices, "pilot_seconds": pilot.seconds}
    answer = _Answer(pilot.particles, "auto (pilot)", findings, choices, [])
    poor = budget.evaluations is not None and budget.evaluations - task.evaluations < FEWEST_LEFT
    if poor or any(finding.level == "error" for finding in findings) or task.spent() > 0.8:
        return answer
    return _refine(task, pilot, answer)


def _refine(task: Task, pilot: PilotResult, answer: _Answer) -> _Answer:
    """Train a process on the pilot's particles and keep it if its exact weights are better."""
    assert pilot.particles is not None
    mapped, choices = refined_sampler(
        task.target,
        pilot,
        generator=task.generator,
        dtype=task.dtype,
        steps=None if task.budget.steps is None else int(task.budget.steps),
        limited=task.limited,
        spent=TrainingMeter(task, batch_size=REFINED_BATCH),
        callback=task.progress.training,
        start=task.progress.start,
    )
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
        return _Answer(learned, "auto (learned)", findings, choices, mapped.inner.history, mapped)
    return answer._replace(findings=findings, choices=choices, history=mapped.inner.history, sampler=mapped)
