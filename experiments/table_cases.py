"""Targets of the tables with what is measured of an answer, and a folder of finished runs."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffsampler import targets
from diffsampler._report import versions
from diffsampler.particles import Particles
from diffsampler.pilot.modes import laplace
from diffsampler.pilot.reference import student_t
from diffsampler.pilot.search import climb
from diffsampler.target import Target

Measures = dict[str, float]
NUM_DRAWS = 4000
"""Equally weighted draws for shares of modes; exact ones would differ by about sqrt(modes / draws) / 2 in TV."""


class Case(NamedTuple):
    """A target of the tables."""

    build: Callable[[], Target]
    measure: Callable[[Target, Particles], Measures]
    improper: bool = False
    """Whether the only right answer is a refusal or a finding."""


def nothing(_: Target, __: Particles) -> Measures:
    return {}


def moments(particles: Particles) -> tuple[Tensor, Tensor]:
    weight, x = torch.softmax(particles.log_weight, 0).unsqueeze(-1), particles.x.double()
    mean = (weight * x).sum(0)
    return mean, (weight * (x - mean).square()).sum(0).sqrt()


def moment_errors(mean: Tensor, scale: Tensor) -> Callable[[Target, Particles], Measures]:
    """Worst error of a mean in standard deviations and worst relative error of a standard deviation."""

    def measure(_: Target, particles: Particles) -> Measures:
        location, spread = moments(particles)
        return {
            "mean": float(((location - mean) / scale).abs().max()),
            "sd": float((spread / scale - 1.0).abs().max()),
        }

    return measure


def sampled_errors(target: Target, particles: Particles) -> Measures:
    """The same against exact draws."""
    x = target.sample(200_000, generator=torch.Generator().manual_seed(0)).double()
    return moment_errors(x.mean(0), x.std(0))(target, particles)


def mode_errors(target: Target, particles: Particles) -> Measures:
    """Total variation of the mode weights among draws, and the number of modes that none of them hit."""
    draws = particles.resample(NUM_DRAWS, generator=torch.Generator().manual_seed(0))
    truth = target.mode_weights().double()
    share = torch.bincount(target.mode_labels(draws), minlength=len(truth)).double() / NUM_DRAWS
    return {"TV": 0.5 * float((share - truth).abs().sum()), "lost modes": float((share == 0).sum())}


def well_errors(target: Target, particles: Particles) -> Measures:
    """Worst error of the right-well mass over pairs."""
    assert isinstance(target, targets.ManyWell)
    mass = target.right_well_mass(particles.x, torch.softmax(particles.log_weight, 0))
    return {"well": float((mass - target.right_mass).abs().max())}


def neck_errors(index: int, mean: float, sd: float) -> Callable[[Target, Particles], Measures]:
    """Bias (in standard deviations) and ratio of the standard deviation of the coordinate that makes the neck."""

    def measure(_: Target, particles: Particles) -> Measures:
        location, spread = moments(particles)
        return {"neck bias": (float(location[index]) - mean) / sd, "neck sd ratio": float(spread[index]) / sd}

    return measure


def schools_errors(target: Target, particles: Particles) -> Measures:
    """Bias and ratio of the standard deviation of log tau."""
    log_tau = targets.EightSchools().sample(200_000, generator=torch.Generator().manual_seed(0))[:, 1].double()
    return neck_errors(1, float(log_tau.mean()), float(log_tau.std()))(target, particles)


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


def flat_somewhere(log_prob: Callable[[Tensor], Tensor], dim: int) -> Callable[[], Target]:
    return lambda: Target.from_log_prob(log_prob, dim=dim)


def ill_conditioned() -> Target:
    """Fifty independent coordinates of scales .1 to 10 about centres -5 to 5."""
    return gaussian(torch.linspace(-5.0, 5.0, 50).double(), torch.logspace(-1.0, 1.0, 50).double())


MEASURES: dict[str, Callable[[Target, Particles], Measures]] = {
    "gaussian": sampled_errors,
    "ill_scaled": sampled_errors,
    "banana": sampled_errors,
    "funnel": neck_errors(0, 0.0, 3.0),
    "eight_schools": schools_errors,
    **dict.fromkeys(("manywell8", "manywell32", "manywell64"), well_errors),
    **dict.fromkeys(("gmm9", "gmm25", "gmm40", "difficult", "seven", "mw54", "mw52", "rings"), mode_errors),
}
CASES: dict[str, Case] = {
    **{name: Case(build, MEASURES.get(name, nothing)) for name, build in targets.REGISTRY.items()},
    "gauss50": Case(
        ill_conditioned,
        moment_errors(torch.linspace(-5.0, 5.0, 50).double(), torch.logspace(-1.0, 1.0, 50).double()),
    ),
    "rotgauss20": Case(rotated_gaussian, nothing),
    "student20": Case(lambda: targets.StudentT(20), nothing),
    "manywell32_rotated": Case(lambda: targets.ManyWell(rotation_seed=0), well_errors),
    "schools_density": Case(lambda: without_prior(targets.EightSchools()), schools_errors),
    "logistic31": Case(logistic, nothing),
    "flat": Case(flat_somewhere(lambda x: -0.5 * x[:, 0].square() + 0.0 * x[:, 1], 2), nothing, improper=True),
    "slow": Case(
        flat_somewhere(lambda x: -0.5 * x[:, 0].square() - torch.log1p(x[:, 1].abs()), 2), nothing, improper=True
    ),
    "oblique": Case(
        flat_somewhere(lambda x: -0.5 * (x[:, 0] - 2.0 * x[:, 1]).square() - 0.5 * x[:, 2].square(), 3),
        nothing,
        improper=True,
    ),
    "cone": Case(flat_somewhere(lambda x: -0.75 * torch.log1p(x.square().sum(-1)), 2), nothing, improper=True),
}


@dataclass(frozen=True)
class Folder:
    """Finished runs, one JSON file each with its settings and versions; an interrupted table goes on where it was.

    Arguments:
        path: Of the folder.
        settings: A frozen dataclass of what all runs have in common; runs of other settings are refused.
    """

    path: Path
    settings: Any

    def __post_init__(self) -> None:
        assert is_dataclass(self.settings)
        self.path.mkdir(parents=True, exist_ok=True)

    def file(self, case: str, seed: int) -> Path:
        return self.path / f"{case}-{seed}.json"

    def done(self, case: str, seed: int) -> bool:
        return self.file(case, seed).exists()

    def write(self, case: str, seed: int, row: dict[str, Any]) -> None:
        """Atomically: a kill leaves no half run behind."""
        content = {"case": case, "seed": seed, "settings": asdict(self.settings), "versions": versions(), **row}
        part = self.file(case, seed).with_suffix(".part")
        part.write_text(json.dumps(content, indent=1))
        os.replace(part, self.file(case, seed))

    def read(self, case: str) -> list[dict[str, Any]]:
        """Finished runs of a case by seed."""
        rows = [
            json.loads(path.read_text()) for path in self.path.glob("*.json") if path.stem.rpartition("-")[0] == case
        ]
        for row in rows:
            if row["settings"] != json.loads(json.dumps(asdict(self.settings))):
                raise SystemExit(f"{self.path} holds runs with other settings ({row['settings']}): name another --out.")
        return sorted(rows, key=lambda row: row["seed"])

    def publish(self, text: str, draw: Callable[[Path], None] | None = None) -> None:
        """Print a table, keep it beside its runs, and draw its figure to the path that ``draw`` is called with."""
        print(text)
        (self.path / "table.txt").write_text(f"{asdict(self.settings)}\n{text}\n")
        if draw is not None:
            draw(self.path / "table.png")
            print(f"drawn to {self.path / 'table.png'}")
