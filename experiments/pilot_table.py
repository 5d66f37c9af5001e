"""Table of the automatic pilot: targets x seeds, one fixed configuration, error, coverage, cost and findings.

Every cell is one JSON file; cells that exist are not run again. CPU seconds are of one thread.

    python experiments/pilot_table.py --seeds 100 101 102 --out results/pilot
    python experiments/pilot_table.py --only funnel rot32 --out results/pilot
    python experiments/pilot_table.py --table-only --out results/pilot
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from diffsampler import targets
from diffsampler.pilot import PilotResult, run_pilot
from diffsampler.pilot.modes import laplace
from diffsampler.pilot.reference import student_t
from diffsampler.pilot.search import climb
from diffsampler.target import Target

Case = tuple[Callable[[], Target], Callable[[Target, PilotResult], dict[str, float]]]


def weights(result: PilotResult) -> Tensor:
    assert result.particles is not None
    return torch.softmax(result.particles.log_weight, 0)


def moment_errors(mean: Tensor, scale: Tensor) -> Callable[[Target, PilotResult], dict[str, float]]:
    """Worst error of a mean in standard deviations and worst relative error of a standard deviation."""

    def measure(_: Target, result: PilotResult) -> dict[str, float]:
        return {
            "mean": float(((result.location - mean) / scale).abs().max()),
            "sd": float((result.scale / scale - 1.0).abs().max()),
        }

    return measure


def mode_errors(target: Target, result: PilotResult) -> dict[str, float]:
    """Total variation of the mode weights with 4000 draws, and the number of modes hit."""
    assert result.particles is not None
    draws = result.particles.resample(4000, generator=torch.Generator().manual_seed(0))
    truth = target.mode_weights()
    share = torch.bincount(target.mode_labels(draws), minlength=len(truth)).double() / 4000.0
    return {"tv": 0.5 * float((share - truth).abs().sum()), "modes": float((share > 0).sum())}


def well_errors(target: Target, result: PilotResult) -> dict[str, float]:
    """Worst error of the right-well mass over pairs; the exact value is that of the target's own mode weights."""
    assert isinstance(target, targets.ManyWell) and result.particles is not None
    mass = target.right_well_mass(result.particles.x, weights(result))
    exact = target.right_well_mass(target.sample(200_000, generator=torch.Generator().manual_seed(0)))
    return {"well": float((mass - exact.mean()).abs().max())}


def neck_errors(index: int, mean: float, sd: float) -> Callable[[Target, PilotResult], dict[str, float]]:
    """Bias (in standard deviations) and ratio of the standard deviation of the coordinate that makes the neck."""

    def measure(_: Target, result: PilotResult) -> dict[str, float]:
        return {"bias": (float(result.location[index]) - mean) / sd, "ratio": float(result.scale[index]) / sd}

    return measure


def nothing(_: Target, __: PilotResult) -> dict[str, float]:
    return {}


def gaussian(mean: Tensor, scale: Tensor) -> Target:
    log_z = 0.5 * len(mean) * math.log(2.0 * math.pi) + float(scale.log().sum())
    return Target.from_log_prob(
        lambda x: -0.5 * ((x - mean) / scale).square().sum(-1), dim=len(mean), log_normalizer=log_z
    )


def rotated_gaussian(dim: int = 20, *, condition: float = 1e4) -> Target:
    generator = torch.Generator().manual_seed(4)
    rotation = torch.linalg.qr(torch.randn(dim, dim, generator=generator, dtype=torch.float64))[0]
    variance = torch.logspace(-0.5 * math.log10(condition), 0.5 * math.log10(condition), dim, dtype=torch.float64)
    log_z = 0.5 * dim * math.log(2.0 * math.pi) + 0.5 * float(variance.log().sum())
    return Target.from_log_prob(
        lambda x: -0.5 * ((x @ rotation).square() / variance).sum(-1), dim=dim, log_normalizer=log_z
    )


def without_prior(target: Target) -> Target:
    """The density alone."""
    return Target.from_log_prob(
        target.log_prob, dim=target.dim, score=target.score, log_normalizer=target.log_normalizer
    )


def logistic(*, rows: int = 400, dim: int = 31) -> Target:
    """Synthetic logistic regression; reference evidence by importance sampling from a Student-t law at the mode."""
    generator = torch.Generator().manual_seed(5)
    features = torch.randn(rows, dim - 1, generator=generator, dtype=torch.float64)
    logits = features @ torch.randn(dim - 1, generator=generator, dtype=torch.float64)
    labels = torch.rand(rows, generator=generator, dtype=torch.float64) < torch.sigmoid(logits)
    target = targets.LogisticRegression(features, labels)
    mode, _ = climb(target, torch.zeros(1, dim, dtype=torch.float64), torch.full((dim,), 0.1).double(), steps=200)
    tril = laplace(target, mode, torch.full((1, dim), 0.1).double())[0]
    law, log_weight, weight = student_t(mode[0], tril[0], df=20.0), tril.new_zeros(0), tril.new_zeros(0)
    for count in (50_000, 400_000):
        # The second law takes the moments of the posterior from the first.
        x = law.sample(count, generator=generator)
        log_weight = target.log_prob(x) - law.log_prob(x)
        weight = torch.softmax(log_weight, 0)
        centred = x - weight @ x
        law = student_t(weight @ x, torch.linalg.cholesky((weight.unsqueeze(-1) * centred).mT @ centred), df=20.0)
    target.log_normalizer = float(torch.logsumexp(log_weight, 0)) - math.log(len(weight))
    # About 0.002 nats of error in the reference.
    assert float(1.0 / weight.square().sum()) > 100_000, "the reference evidence is not exact enough"
    return target


def improper(log_prob: Callable[[Tensor], Tensor], dim: int) -> Callable[[], Target]:
    return lambda: Target.from_log_prob(log_prob, dim=dim)


def cases() -> dict[str, Case]:
    mean = torch.tensor([1e5, -3.0, 0.0, 100.0], dtype=torch.float64)
    scale = torch.tensor([1e4, 1e-3, 1.0, 10.0], dtype=torch.float64)
    center, width = torch.linspace(-5.0, 5.0, 50).double(), torch.logspace(-1.0, 1.0, 50).double()
    schools = targets.EightSchools().sample(200_000, generator=torch.Generator().manual_seed(0))[:, 1]
    tau = neck_errors(1, float(schools.mean()), float(schools.std()))
    return {
        "gauss2": (lambda: gaussian(torch.zeros(2), torch.ones(2)), moment_errors(torch.zeros(2), torch.ones(2))),
        "illscaled": (lambda: gaussian(mean, scale), moment_errors(mean, scale)),
        "gauss50": (lambda: gaussian(center, width), moment_errors(center, width)),
        "rotgauss20": (rotated_gaussian, nothing),
        "student20": (lambda: targets.StudentT(20), nothing),
        "banana": (targets.Banana, nothing),
        "gmm40": (targets.GaussianMixture.forty, mode_errors),
        "mix7": (targets.GaussianMixture.seven, mode_errors),
        "funnel10": (targets.Funnel, neck_errors(0, 0.0, 3.0)),
        "manywell32": (targets.ManyWell, well_errors),
        "rot32": (lambda: targets.ManyWell(rotation_seed=0), well_errors),
        "schools": (lambda: without_prior(targets.EightSchools()), tau),
        "schools prior": (targets.EightSchools, tau),
        "flat": (improper(lambda x: -0.5 * x[:, 0].square() + 0.0 * x[:, 1], 2), nothing),
        "slow": (improper(lambda x: -0.5 * x[:, 0].square() - torch.log1p(x[:, 1].abs()), 2), nothing),
        "oblique": (
            improper(lambda x: -0.5 * (x[:, 0] - 2.0 * x[:, 1]).square() - 0.5 * x[:, 2].square(), 3),
            nothing,
        ),
        "cone": (improper(lambda x: -0.75 * torch.log1p(x.square().sum(-1)), 2), nothing),
        "logistic31": (logistic, nothing),
    }


def run_cell(case: Case, seed: int) -> dict[str, object]:
    build, measure = case
    target = build()
    began = time.process_time()
    result = run_pilot(target, generator=torch.Generator().manual_seed(seed))
    cell: dict[str, object] = {
        "seed": seed,
        "torch": torch.__version__,
        "cpu": time.process_time() - began,
        "evaluations": result.evaluations,
        "findings": [message for _, message, _ in result.findings],
        "refused": result.particles is None,
        "choices": result.choices,
    }
    if result.particles is not None:
        estimate = result.particles.log_normalizer
        truth = target.log_normalizer
        cell["error"] = None if truth is None else estimate.value - truth
        cell["std_error"] = estimate.std_error
        cell["passes"] = len(result.passes)
        cell["measures"] = measure(target, result)
    return cell


def write(path: Path, cell: dict[str, object]) -> None:
    """Atomically: a kill leaves no half cell behind."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(cell, indent=1))
    os.replace(part, path)


def row(name: str, cells: list[dict]) -> str:
    cpu = sum(c["cpu"] for c in cells) / len(cells)
    count = sum(c["evaluations"] for c in cells) / len(cells) / 1e6
    flagged = sum(bool(c["findings"]) for c in cells)
    ran = [c for c in cells if not c["refused"] and c.get("error") is not None]
    if not ran:
        refused = sum(c["refused"] for c in cells)
        return (
            f"| {name} | {len(cells)} | refused {refused}/{len(cells)} | | | | | {cpu:.1f} | {count:.2f} | {flagged} |"
        )
    errors = torch.tensor([c["error"] for c in ran], dtype=torch.float64)
    covered = sum(abs(c["error"]) < 2.131 * c["std_error"] for c in ran)
    names = sorted({k for c in ran for k in c["measures"]})
    spans = [(k, [c["measures"][k] for c in ran]) for k in names]
    text = ", ".join(f"{k} {min(v):.3f}..{max(v):.3f}" for k, v in spans)
    spread = float(errors.std()) if len(ran) > 1 else 0.0
    worst, median = float(errors.abs().max()), float(errors.abs().median())
    return (
        f"| {name} | {len(cells)} | {float(errors.mean()):+.4f} ({spread:.4f}) | {median:.4f} | {worst:.4f} "
        f"| {covered}/{len(ran)} | {text} | {cpu:.1f} | {count:.2f} | {flagged} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(100, 103)))
    parser.add_argument("--only", nargs="+", default=None)
    parser.add_argument("--table-only", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("results/pilot"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    print(
        "| target | runs | log Z error mean (sd) | median | worst | 95 % cover | measures | CPU s | 1e6 evaluations "
        "| flagged |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for name, case in cases().items():
        if options.only and name not in options.only:
            continue
        for seed in options.seeds:
            path = options.out / f"{name.replace(' ', '_')}-{seed}.json"
            if not path.exists() and not options.table_only:
                write(path, run_cell(case, seed))
        found = sorted(options.out.glob(f"{name.replace(' ', '_')}-[0-9]*.json"))
        if found:
            cells = [json.loads(path.read_text()) for path in found]
            print(row(name, cells), flush=True)
            for text, count in Counter(f for c in cells for f in c["findings"]).most_common(3):
                print(f"    {count} x {text}", flush=True)


if __name__ == "__main__":
    main()
