"""The demo of the command line: real posteriors and hard benchmark densities, each by several samplers.

The demo is a list of cells, a problem times a method, with one runner, one printer and one set of figures.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import diffsampler as ds
from diffsampler import baselines, plotting, targets
from diffsampler._report import number, table, versions, write_json
from diffsampler.integrations import examples
from diffsampler.integrations.pyro_target import PyroTarget
from diffsampler.result import Fit
from diffsampler.target import Target

__all__ = ["run"]

Draws = Mapping[str, Tensor]
REFERENCE = "exact"
NUTS = "Pyro NUTS"
REFERENCE_DRAWS = 20_000
FOUND = 0.1
"""A mode counts as found when it holds this share of its exact weight."""


@dataclass(frozen=True)
class Problem:
    """A density with what is known about it.

    Arguments:
        name: Name in the table.
        build: Makes the target.
        quantities: Scalars of the posterior to report and plot, from constrained draws; None for benchmarks.
        labels: Mode labels ``(n,)`` from constrained draws, of ``num_labels`` modes with equal weights; None where
            the target itself declares its modes.
        num_labels: Number of those modes.
        exact: Exact log normalizer or, for draws that it can make, the target that knows both.
    """

    name: str
    build: Callable[[], Target]
    quantities: Callable[[Draws], dict[str, Tensor]] | None = None
    labels: Callable[[Draws], Tensor] | None = None
    num_labels: int = 0
    exact: Callable[[], Target] | None = None
    log_normalizer: float | None = None


@dataclass(frozen=True)
class Cell:
    """One problem by one method with a budget in seconds, or none."""

    problem: Problem
    method: str
    seconds: float | None
    num_samples: int = 4000


@dataclass
class Result:
    """What a cell gave; ``failure`` holds the error's message if it gave nothing."""

    problem: str
    method: str
    seconds: float
    log_normalizer: float = float("nan")
    std_error: float = float("nan")
    error: float = float("nan")
    elbo: float = float("nan")
    ess: float = float("nan")
    num_particles: int = 0
    pareto_k: float = float("nan")
    modes_found: int | None = None
    num_modes: int | None = None
    mode_total_variation: float = float("nan")
    mode_weights: list[float] = field(default_factory=list)
    evaluations: float = float("nan")
    parameters: dict[str, tuple[float, float]] = field(default_factory=dict)
    findings: list[str] = field(default_factory=list)
    verdict: str = "failed"
    failure: str | None = None


def _schools(draws: Draws) -> dict[str, Tensor]:
    theta = {f"theta[{i}]": draws["theta"][:, i] for i in (0, 6)}
    return {"mu": draws["mu"], "tau": draws["tau"], "log tau": draws["tau"].log(), **theta}


def _galaxies(draws: Draws) -> dict[str, Tensor]:
    """The means as labelled, whose marginals must coincide, and in order, which no labelling changes."""
    mean, order = draws["mean"].sort(-1)
    variance = draws["variance"].gather(-1, order)
    labelled = {f"mean[{i}]": draws["mean"][:, i] for i in range(3)}
    ordered = {f"{name} mean": mean[:, i] for i, name in enumerate(("lowest", "middle", "highest"))}
    return {**labelled, **ordered, "middle sd": variance[:, 1].sqrt()}


SCHOOLS = Problem("eight schools", examples.eight_schools, quantities=_schools, exact=targets.EightSchools)
GALAXIES = Problem(
    "galaxies, K = 3",
    examples.galaxies,
    quantities=_galaxies,
    labels=lambda draws: examples.labelling(draws["mean"]),
    num_labels=6,
    log_normalizer=examples.GALAXY_LOG_EVIDENCE,
)
BENCHMARKS = [
    Problem("40-mode mixture", targets.REGISTRY["gmm40"], exact=targets.REGISTRY["gmm40"]),
    Problem("funnel-10", targets.REGISTRY["funnel"], exact=targets.REGISTRY["funnel"]),
    Problem("many-well-32", targets.REGISTRY["manywell32"], exact=targets.REGISTRY["manywell32"]),
]
# Four minutes in all. NUTS has no budget of time: its number of draws is what fits. The galaxies have none, either: the
# answer takes two minutes, and must not depend on the load of a machine.
CELLS = [
    Cell(SCHOOLS, "auto", 15.0),
    Cell(SCHOOLS, NUTS, 15.0, num_samples=300),
    Cell(GALAXIES, "auto", None),
    Cell(GALAXIES, NUTS, 18.0, num_samples=200),
    *(Cell(problem, method, seconds) for problem in BENCHMARKS for method, seconds in
      (("auto", 14.0), ("cmcd", 8.0), ("smc", 6.0))),
]  # fmt: skip


def run(out: Path, *, seed: int = 0, cells: Sequence[Cell] = CELLS) -> int:
    """Run all cells, print the table, write ``results.json`` and the figures into ``out``.

    Returns:
        Exit status, 1 if a cell failed.
    """
    out.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    results, fits = [], {}
    for cell in cells:
        result, fit = run_cell(cell, seed=seed)
        results.append(result)
        if fit is not None:
            fits[cell.problem.name, cell.method] = fit
        print(f"{cell.problem.name:18}{cell.method:12}{result.seconds:6.1f} s", file=sys.stderr, flush=True)
    problems = list({cell.problem.name: cell.problem for cell in cells}.values())
    print(_summary(results))
    for problem in (p for p in problems if p.quantities is not None):
        print(f"\n{problem.name}: posterior mean (sd)\n{_parameters(problem, results)}")
    for result in results:
        for text in [f"failed: {result.failure}"] if result.failure else result.findings:
            print(f"\n{result.problem} by {result.method}: {text}")
    paths = [path for problem in problems for path in _figures(problem, fits, out)] + _comparison(results, out)
    seconds = time.perf_counter() - start
    settings = {"seed": seed, "cells": [_setting(cell) for cell in cells]}
    content = {
        "versions": versions(),
        "settings": settings,
        "seconds": seconds,
        "results": [asdict(r) for r in results],
    }
    write_json(out / "results.json", content)
    print(f"\n{seconds:.0f} s. Written to {out}: results.json, {', '.join(path.name for path in paths)}")
    return int(any(result.failure for result in results))


def _setting(cell: Cell) -> dict[str, Any]:
    return {
        "problem": cell.problem.name,
        "method": cell.method,
        "seconds": cell.seconds,
        "num_samples": cell.num_samples,
    }


def run_cell(cell: Cell, *, seed: int) -> tuple[Result, Fit | None]:
    """Sample one problem by one method; a failure is a row of the table, not the end of the demo."""
    target = cell.problem.build()
    start = time.perf_counter()
    try:
        if cell.method == NUTS:
            if not isinstance(target, PyroTarget):
                raise TypeError(f"Expected a Pyro model for {NUTS}; got {type(target).__name__}.")
            method: Any = baselines.PyroNUTS(target, num_chains=2, warmup_steps=cell.num_samples // 2)
            fit = ds.sample(target, method=method, num_samples=cell.num_samples, seed=seed)
        else:
            budget = None if cell.seconds is None else ds.Budget(seconds=cell.seconds)
            fit = ds.sample(target, method=cell.method, num_samples=cell.num_samples, seed=seed, budget=budget)
    except Exception as error:
        seconds = time.perf_counter() - start
        return Result(cell.problem.name, cell.method, seconds, failure=f"{type(error).__name__}: {error}"), None
    return _result(cell, target, fit, time.perf_counter() - start), fit


def _result(cell: Cell, target: Target, fit: Fit, seconds: float) -> Result:
    exact = _exact_log_normalizer(cell.problem)
    estimate = fit.log_normalizer
    levels = {finding.level for finding in fit.findings}
    result = Result(cell.problem.name, cell.method, seconds)
    result.evaluations = float(fit.evaluations)
    result.findings = [str(finding) for finding in fit.findings]
    result.verdict = next((level for level in ("error", "warning") if level in levels), "ok")
    result.num_particles = len(fit.particles)
    if result.verdict == "error":
        # The sampler itself says that its particles do not represent the target: their statistics mean nothing.
        return result
    result.log_normalizer, result.std_error = estimate.value, estimate.std_error
    result.error = float("nan") if exact is None else estimate.value - exact
    result.elbo, result.ess, result.pareto_k = fit.elbo, fit.ess, fit.pareto_k
    if cell.problem.quantities is not None:
        for name, values in cell.problem.quantities(fit.posterior).items():
            result.parameters[name] = _moments(values, fit.particles.log_weight)
    _count_modes(result, cell.problem, target, fit)
    return result


def _count_modes(result: Result, problem: Problem, target: Target, fit: Fit) -> None:
    """Fill in which modes were found and how far their weights are from the exact ones."""
    if problem.labels is not None:
        labels = problem.labels(fit.posterior)
        expected = torch.full((problem.num_labels,), 1.0 / problem.num_labels, dtype=torch.float64)
    elif target.num_modes is not None:
        labels, expected = target.mode_labels(fit.particles.x), target.mode_weights().double().cpu()
    else:
        return
    weight = torch.softmax(fit.particles.log_weight.double().cpu(), 0)
    share = torch.zeros_like(expected).index_add_(0, labels.cpu(), weight)
    result.num_modes = len(expected)
    result.modes_found = int((share >= FOUND * expected).sum())
    result.mode_total_variation = 0.5 * float((share - expected).abs().sum())
    result.mode_weights = share.tolist()


def _moments(values: Tensor, log_weight: Tensor) -> tuple[float, float]:
    weight = torch.softmax(log_weight.double(), 0)
    mean = (weight * values.double()).sum()
    return float(mean), float((weight * (values.double() - mean).square()).sum().sqrt())


def _exact_log_normalizer(problem: Problem) -> float | None:
    return problem.log_normalizer if problem.exact is None else problem.exact().log_normalizer


def _reference(problem: Problem) -> dict[str, Tensor] | None:
    """Exact draws of a posterior's quantities where they can be had."""
    if problem.exact is None or problem.quantities is None:
        return None
    target = problem.exact()
    x = target.sample(REFERENCE_DRAWS, generator=torch.Generator().manual_seed(0))
    return problem.quantities(target.constrain(x))


HEADER = (
    "problem",
    "method",
    "log Z",
    "+-",
    "error",
    "ESS",
    "of",
    "k-hat",
    "modes",
    "TV",
    "evaluations",
    "seconds",
    "verdict",
)


def _summary(results: Sequence[Result]) -> str:
    rows = [
        (
            r.problem,
            r.method,
            number(r.log_normalizer),
            number(r.std_error),
            number(r.error, "+.3f"),
            number(r.ess, ".0f"),
            str(r.num_particles),
            number(r.pareto_k if r.pareto_k > -math.inf else None, ".2f"),
            "-" if r.num_modes is None else f"{r.modes_found}/{r.num_modes}",
            number(r.mode_total_variation),
            number(r.evaluations or None, ".2g"),
            number(r.seconds, ".1f"),
            r.verdict,
        )
        for r in results
    ]
    return table(HEADER, rows)


def _parameters(problem: Problem, results: Sequence[Result]) -> str:
    columns = {r.method: r.parameters for r in results if r.problem == problem.name and r.parameters}
    reference = _reference(problem)
    if reference is not None:
        equal = torch.zeros(REFERENCE_DRAWS)
        columns = {REFERENCE: {name: _moments(values, equal) for name, values in reference.items()}, **columns}
    names = list(next(iter(columns.values()), {}))
    rows = [(name, *(f"{c[name][0]:.2f} ({c[name][1]:.2f})" for c in columns.values())) for name in names]
    lines = [table(("", *columns), rows)]
    if problem.labels is not None:
        lines.append(f"weights of its {problem.num_labels} modes, exactly {1 / problem.num_labels:.3f} each:")
        weights = {r.method: r.mode_weights for r in results if r.problem == problem.name and r.mode_weights}
        lines += [f"  {method:10}  {'  '.join(f'{w:.3f}' for w in values)}" for method, values in weights.items()]
    return "\n".join(lines)


def _figures(problem: Problem, fits: Mapping[tuple[str, str], Fit], out: Path) -> list[Path]:
    """Marginals of all samplers for a posterior, a weighted pair plot per sampler for a benchmark."""
    own = {method: fit for (name, method), fit in fits.items() if name == problem.name}
    stem = problem.name.replace(",", "").replace(" = ", "").replace(" ", "_").lower()
    if not own:
        return []
    figures = {}
    if problem.quantities is None:
        for method, fit in own.items():
            figures[f"{stem}_{method}"] = plotting.pair(fit.posterior, fit.particles.log_weight, max_dims=2)
    else:
        draws = {method: (problem.quantities(fit.posterior), fit.particles.log_weight) for method, fit in own.items()}
        reference = _reference(problem)
        if reference is not None:
            draws = {REFERENCE: (reference, torch.zeros(REFERENCE_DRAWS)), **draws}
        shown = list(next(iter(draws.values()))[0])[:6]
        figures[stem] = plotting.marginals(draws, names=shown, reference=REFERENCE, title=problem.name)
        if "auto" in draws:
            figures[f"{stem}_pair"] = plotting.pair(*draws["auto"], names=shown, max_dims=4)
    for name, figure in figures.items():
        figure.savefig(out / f"{name}.png")
    return [out / f"{name}.png" for name in figures]


def _comparison(results: Sequence[Result], out: Path) -> list[Path]:
    """Errors of log Z on the benchmarks, method by method."""
    names = {problem.name for problem in BENCHMARKS}
    shown = [r for r in results if r.problem in names]
    if not shown:
        return []
    rows = [{"target": r.problem, "method": r.method, "error": r.error, "std_error": r.std_error} for r in shown]
    path = out / "log_normalizer.png"
    plotting.comparison(rows).savefig(path)
    return [path]
