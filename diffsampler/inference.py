"""The front door: a density in, weighted draws, the evidence and a verdict out."""

from __future__ import annotations

import difflib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from diffsampler.checks import check_target, working_dtype
from diffsampler.particles import Particles
from diffsampler.pilot import PilotResult, run_pilot
from diffsampler.progress import Progress
from diffsampler.recipes import learned_sampler, plain_smc, refined_sampler
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


class MethodInfo(NamedTuple):
    """A row of the table of methods."""

    name: str
    paper: str
    year: int
    needs: str


METHODS: dict[str, MethodInfo] = {
    "auto": MethodInfo("auto", "pilot (variational search, tempered SMC) and a learned diffusion", 2026, "density"),
    "smc": MethodInfo("smc", "Sequential Monte Carlo samplers (Del Moral, Doucet, Jasra)", 2006, "gradient"),
    "pis": MethodInfo("pis", "Path Integral Sampler (Zhang, Chen)", 2022, "gradient"),
    "dds": MethodInfo("dds", "Denoising Diffusion Samplers (Vargas, Grathwohl, Doucet)", 2023, "gradient"),
    "dis": MethodInfo("dis", "Improved sampling via learned diffusions (Richter, Berner)", 2024, "gradient"),
    "cmcd": MethodInfo("cmcd", "Controlled Monte Carlo Diffusions (Vargas et al.)", 2024, "gradient"),
}


@dataclass(frozen=True)
class Budget:
    """What a run may spend; whichever limit is reached first ends it.

    Arguments:
        seconds: Wall-clock time.
        evaluations: Points at which the density or its gradient is computed.
        steps: Gradient steps of training.

    Raises:
        ValueError: If a limit is not positive.
    """

    seconds: float | None = None
    evaluations: int | None = None
    steps: int | None = None

    def __post_init__(self) -> None:
        for name in ("seconds", "evaluations", "steps"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"Expected a positive budget of {name}; got {value}. Leave it out for no limit.")


@dataclass
class _Task:
    """One call of :func:`sample` on its way."""

    target: CountedTarget
    num_samples: int
    seed: int
    dtype: torch.dtype
    device: torch.device
    budget: Budget
    progress: Progress
    checkpoint: str | Path | None
    resume: bool
    began: float

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began

    def spent(self) -> float:
        """Share of the budget that is used up, in seconds or evaluations."""
        shares = [0.0]
        if self.budget.seconds is not None:
            shares.append(self.seconds / self.budget.seconds)
        if self.budget.evaluations is not None:
            shares.append(self.target.evaluations / self.budget.evaluations)
        return max(shares)

    def spent_since(self) -> Callable[[], float]:
        """Share used up of what is left now; the time to draw the samples themselves is kept back."""
        start, reserve = self.spent(), 0.05
        left = max(1.0 - reserve - start, 1e-9)
        return lambda: (self.spent() - start) / left

    @property
    def generator(self) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(self.seed)


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
        TypeError: If the target is not a Target.
        ValueError: If the density cannot be sampled as it is (shape, NaN, gradient, improper), a limit is not positive,
            or the method is unknown.
    """
    if num_samples < 1:
        raise ValueError(f"Expected num_samples >= 1; got {num_samples}.")
    run = _find_method(method)
    place = torch.device("cpu") if device is None else torch.device(device)
    if isinstance(target, Target):
        target.to(place)
    warnings = check_target(target, device=place)
    precise = working_dtype(target, place)
    known = target if precise == torch.float64 else CastTarget(target, precise)
    with Progress(enabled=progress) as bar:
        task = _Task(
            target=CountedTarget(known),
            num_samples=num_samples,
            seed=seed,
            dtype=dtype,
            device=place,
            budget=Budget() if budget is None else budget,
            progress=bar,
            checkpoint=checkpoint,
            resume=resume,
            began=time.monotonic(),
        )
        evaluations_before = _evaluations(method)
        answer = run(task, method)
    findings = [Finding("warning", text, "Particles there have weight zero.") for text in warnings]
    findings += answer.findings
    texts = {finding.message for finding in findings}
    findings += [finding for finding in diagnose(answer.particles) if finding.message not in texts]
    return Fit(
        particles=answer.particles,
        posterior=target.constrain(answer.particles.x),
        findings=[finding for finding in findings if finding.level != "note"],
        evaluations=task.target.evaluations + _evaluations(method) - evaluations_before,
        seconds=task.seconds,
        method=answer.method,
        choices={"seed": seed, "num_samples": num_samples, **answer.choices},
        history=answer.history,
        true_log_normalizer=target.log_normalizer,
        notes=[finding.message for finding in findings if finding.level == "note"],
        sampler=answer.sampler,
    )


def _evaluations(method: str | Sampler) -> int:
    return 0 if isinstance(method, str) else method.evaluations


_Run = Callable[[_Task, "str | Sampler"], _Answer]


def _find_method(method: str | Sampler) -> _Run:
    if isinstance(method, Sampler):
        return _given
    if not isinstance(method, str):
        raise TypeError(f"Expected the name of a method or a Sampler; got {type(method).__name__}.")
    if method == "auto":
        return _auto
    if method == "smc":
        return _smc
    if method in METHODS:
        return _learned
    near = difflib.get_close_matches(method.lower(), METHODS, n=1, cutoff=0.4)
    hint = f"Did you mean {near[0]!r}?" if near else "A classical sampler is passed as an object from baselines."
    raise ValueError(f"Expected one of {', '.join(METHODS)} or a Sampler; got {method!r}. {hint}")


def _given(task: _Task, method: str | Sampler) -> _Answer:
    """A configured sampler: trained if it is a learned one that has not been, or a budget asks for it."""
    assert isinstance(method, Sampler)
    if method.target.space != task.target.space:
        raise ValueError(f"Expected a sampler of a target on {task.target.space}; got one on {method.target.space}.")
    name = type(method).__name__
    if not isinstance(method, DiffusionSampler):
        return _Answer(method.sample(task.num_samples, seed=task.seed), name, [], {}, [], method)
    if task.budget != Budget() or not method.history:
        before = method.evaluations
        limit = task.budget.evaluations

        def spent() -> float:
            used = 0.0 if limit is None else (method.evaluations - before) / limit
            return max(used, task.spent())

        _train(task, method, spent)
    return _Answer(method.sample(task.num_samples, seed=task.seed), name, [], {}, method.history, method)


def _train(task: _Task, sampler: DiffusionSampler, spent: Callable[[], float]) -> None:
    unlimited = task.budget.seconds is None and task.budget.evaluations is None
    steps = task.budget.steps or (DEFAULT_STEPS if unlimited else 1_000_000)
    task.progress.start("training", None if not unlimited else steps)
    sampler.fit(
        steps=steps,
        seed=task.seed,
        spent=spent,
        checkpoint=task.checkpoint,
        resume=task.resume,
        callback=task.progress.training,
    )


def _learned(task: _Task, method: str | Sampler) -> _Answer:
    """A named learned method, in coordinates standardized by a short variational search."""
    task.progress.start("locating the target", None)
    mapped, choices = learned_sampler(str(method), task.target, generator=task.generator, dtype=task.dtype)
    _train(task, mapped.inner, task.spent_since())
    particles = mapped.sample(task.num_samples, seed=task.seed)
    return _Answer(particles, str(method), [], choices, mapped.inner.history, mapped)


def _smc(task: _Task, method: str | Sampler) -> _Answer:
    """Adaptive tempered SMC with a frozen second pass."""
    task.progress.start("tempered SMC", None)
    count = NUM_ISLANDS * max(32, math.ceil(task.num_samples / NUM_ISLANDS))
    result = plain_smc(task.target, count, NUM_ISLANDS, generator=task.generator, stop=lambda: task.spent() > 0.9)
    findings = []
    if not result.finished:
        message = f"The budget ended at temperature {result.beta:.3g}: the particles do not represent the target."
        findings.append(Finding("error", message, "Raise the budget."))
    choices = {"betas": list(result.schedule.betas), "num_islands": NUM_ISLANDS}
    return _Answer(result.particles, "smc", findings, choices, [])


def _auto(task: _Task, method: str | Sampler) -> _Answer:
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
    if any(finding.level == "error" for finding in findings) or task.spent() > 0.8:
        return answer
    return _refine(task, pilot, answer)


def _refine(task: _Task, pilot: PilotResult, answer: _Answer) -> _Answer:
    """Train a process on the pilot's particles and keep it if its exact weights are better."""
    assert pilot.particles is not None
    mapped, choices = refined_sampler(
        task.target,
        pilot,
        generator=task.generator,
        dtype=task.dtype,
        steps=task.budget.steps,
        limited=task.budget.seconds is not None or task.budget.evaluations is not None,
        spent=task.spent_since(),
        callback=task.progress.training,
        start=task.progress.start,
    )
    learned = mapped.sample(task.num_samples, seed=task.seed)
    mine, theirs = learned.log_normalizer, pilot.particles.log_normalizer
    gap = abs(mine.value - theirs.value)
    agree = gap <= 4.0 * math.hypot(mine.std_error, theirs.std_error) + 0.02
    trusted = learned.pareto_k < 0.7 and learned.ess >= 100.0
    better = agree and trusted and mine.std_error < theirs.std_error
    choices = {
        **answer.choices,
        **choices,
        "learned_log_normalizer": list(mine[:2]),
        "learned_ess": learned.ess,
        "learned_pareto_k": learned.pareto_k,
        "pilot_log_normalizer": list(theirs[:2]),
        "chosen": "learned" if better else "pilot",
    }
    findings = list(answer.findings)
    if trusted and not agree:
        findings.append(
            Finding(
                "warning",
                f"The learned process and the pilot disagree on log Z ({mine.value:.3f} and {theirs.value:.3f}).",
                "One of them misses mass; raise the budget.",
            )
        )
    if better:
        return _Answer(learned, "auto (learned)", findings, choices, mapped.inner.history, mapped)
    return answer._replace(findings=findings, choices=choices, history=mapped.inner.history, sampler=mapped)
