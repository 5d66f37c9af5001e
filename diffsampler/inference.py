"""The front door: a density in, weighted draws, the evidence and a verdict out."""

from __future__ import annotations

import difflib
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from diffsampler.budget import Budget, Task, TimeRecord
from diffsampler.catalog import METHODS as METHODS
from diffsampler.catalog import MethodInfo as MethodInfo
from diffsampler.checks import check_target, working_dtype
from diffsampler.options import (
    Options,
    check_checkpoint,
    checksum,
    find_device,
    record_options,
    repeat_options,
    unrepeated,
)
from diffsampler.progress import Progress
from diffsampler.result import Finding, Fit, diagnose
from diffsampler.runs import Answer, run_auto, run_given, run_learned, run_smc
from diffsampler.sampler import Sampler
from diffsampler.target import CastTarget, CountedTarget, Target

__all__ = ["METHODS", "Budget", "MethodInfo", "sample"]


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
    choices: Mapping[str, Any] | None = None,
) -> Fit:
    """Sample a density that is known up to its normalizing constant.

    Arguments:
        target: The density: ``Target.from_log_prob(f, dim=...)``, ``Target.from_energy(...)``,
            ``ds.pyro.PyroTarget(model, *args)`` or one of ``diffsampler.targets``.
        method: ``"auto"`` (nothing to tune), ``"smc"``, a learned method's acronym in lower case (``"pis"``, ``"dds"``,
            ``"dis"``, ``"cmcd"``), or a configured :class:`~diffsampler.sampler.Sampler` of this target.
        num_samples: Number of draws at least; samplers that work in blocks round up.
        seed: One seed for everything; two calls with it agree bit for bit on one device unless time ends them. A run
            that time ended is repeated by its ``choices``.
        device: Where to compute, by default where the target is (cpu).
        dtype: Arithmetic of learned processes; pilots and weights use float64.
        budget: What the run may spend.
        progress: Whether to show a progress bar.
        checkpoint: Folder for checkpoints of a learned method's training.
        resume: Continue from the folder's checkpoint if there is one.
        choices: ``fit.choices`` of another run, to repeat it: the same draws bit for bit on one machine, whatever the
            time it takes. Options besides must be left out or agree; a configured sampler must be handed over again,
            in the state in which it was. Where something comes out differently, a finding says what.

    Returns:
        The draws with their weights, log Z with its error, and the findings.

    Raises:
        TypeError: If the target is not a Target, or an option is of the wrong type.
        ValueError: If the density cannot be sampled as it is (shape, NaN, gradient, improper), an option is out of
            range or does not apply to the method, the method is unknown, or the device is not there.
    """
    began = time.monotonic()
    options = Options(method, num_samples, seed, device, dtype, Budget() if budget is None else budget)
    record = TimeRecord()
    if choices is not None:
        options, record = repeat_options(options, choices, resume=resume)
    method = options.method
    run = _find_method(method)
    options.check()
    check_checkpoint(method, checkpoint, resume=resume)
    place = find_device(options.device, target, method)
    if isinstance(target, Target):
        target.to(place)
    counted = CountedTarget(target) if isinstance(target, Target) else target
    remarks = check_target(counted, device=place)
    precise = working_dtype(counted, place)
    known = counted if precise == torch.float64 else CountedTarget(CastTarget(counted, precise))
    evaluations_before = _evaluations(method)
    with Progress(enabled=progress) as bar:
        task = Task(
            target=known,
            num_samples=options.num_samples,
            seed=options.seed,
            dtype=options.dtype,
            device=place,
            budget=options.budget,
            progress=bar,
            checkpoint=checkpoint,
            resume=resume,
            began=began,
            elsewhere=lambda: _evaluations(method) - evaluations_before,
            record=record,
        )
        answer = run(task, method)
    chosen = {**record_options(options, device=place, record=record, resumed=resume), **answer.choices}
    chosen["checksum"] = checksum(answer.particles.x, answer.particles.log_weight)
    remedy = "Particles there have weight zero."
    findings = [Finding(level, text, remedy) for level, text in remarks]  # type: ignore[arg-type]
    findings += answer.findings
    findings += [] if choices is None else _comparison(choices, chosen)
    evaluations = task.evaluations if _counts(method, since=evaluations_before) else 0
    return _fit(target, answer, findings, choices=chosen, evaluations=evaluations, seconds=task.seconds)


def _fit(
    target: Target,
    answer: Answer,
    findings: list[Finding],
    *,
    choices: dict[str, Any],
    evaluations: int,
    seconds: float,
) -> Fit:
    """The record of an answer, with what its weights say about it."""
    texts = {finding.message for finding in findings}
    findings = findings + [finding for finding in diagnose(answer.particles) if finding.message not in texts]
    return Fit(
        particles=answer.particles,
        posterior=target.constrain(answer.particles.x),
        findings=[finding for finding in findings if finding.level != "note"],
        evaluations=evaluations,
        seconds=seconds,
        method=answer.method,
        choices=choices,
        history=answer.history,
        true_log_normalizer=target.log_normalizer,
        notes=[finding.message for finding in findings if finding.level == "note"],
        sampler=answer.sampler,
        target=target,
    )


def _comparison(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[Finding]:
    names = unrepeated(before, after)
    if not names:
        return []
    message = f"The run did not repeat its choices: {', '.join(map(repr, names))} came out differently."
    return [Finding("warning", message, "The target, the sampler, the machine or the version is another one.")]


def _evaluations(method: str | Sampler) -> int:
    return 0 if isinstance(method, str) else method.evaluations


def _counts(method: str | Sampler, *, since: int) -> bool:
    """Whether all evaluations were seen; a sampler that does not count leaves only those of the checks."""
    return isinstance(method, str) or method.evaluations > since


_Run = Callable[[Task, "str | Sampler"], Answer]


def _find_method(method: str | Sampler) -> _Run:
    if isinstance(method, Sampler):
        return run_given
    if not isinstance(method, str):
        got = f"the class {method.__name__}" if isinstance(method, type) else type(method).__name__
        raise TypeError(f"Expected the name of a method or a Sampler, such as ds.CMCD(target); got {got}.")
    if method == "auto":
        return run_auto
    if method == "smc":
        return run_smc
    if method in METHODS:
        return run_learned
    near = difflib.get_close_matches(method.lower(), METHODS, n=1, cutoff=0.4)
    hint = f"Did you mean {near[0]!r}?" if near else "A classical sampler is passed as an object from baselines."
    raise ValueError(f"Expected one of {', '.join(METHODS)} or a Sampler; got {method!r}. {hint}")
