"""Cases of the published tables: a target, how its sampler is trained, and what it must reach.

Settings were chosen on seeds of 900 and above. A ``Trained`` case is a method on its own path, stopped after CPU
seconds (or steps); a ``Best`` one is the library's own recipe, a pilot and a process refined from its particles; a
``Ladder`` is a method trained with few steps and carried over to more, on posteriors in coordinates whitened by a
pilot's map (the papers whiten by a diagonal variational fit).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from published_recipes import Best, Ladder, Trained

import diffsampler as ds
from diffsampler import targets
from diffsampler.metrics import wasserstein
from diffsampler.objective import LogVariance, Objective, ReverseKL, TrajectoryBalance, VarGrad
from diffsampler.particles import Particles
from diffsampler.replay import LocalSearch
from diffsampler.sampler import DiffusionSampler
from diffsampler.schedule import cosine_preserving, variance_exploding
from diffsampler.sources import Exploratory, OnPolicy, Source
from diffsampler.target import Target
from diffsampler.trust_region import TrustRegion

DATA = Path("results/data")
CLOUD = 2000
"""Points per cloud of a Wasserstein distance, as in the published tables."""
Measures = dict[str, float]
Rungs = tuple[tuple[int, float, int, float], ...]


class Wanted(NamedTuple):
    """Bounds on means over seeds; None where nothing is asked."""

    gap: float | None = None
    """Most of ``log Z - ELBO``."""
    error: float | None = None
    """Most of the mean absolute error of the importance-sampling ``log Z``."""
    ess: float | None = None
    """Least of ``ESS / N``."""
    measures: dict[str, tuple[float, float]] = {}
    """Ranges of measures by name."""
    published: str = ""
    """What papers report."""


@dataclass(frozen=True)
class Case:
    """A row of the table."""

    build: Callable[[], Target]
    recipe: Trained | Ladder | Best
    wanted: Wanted
    measure: Callable[[Target, Particles], Measures] = lambda *_: {}
    draws: int = 8000


def modes(target: Target, particles: Particles) -> Measures:
    """Total variation of the shares of modes among draws without and with weights; modes with a tenth of their mass."""
    exact = target.mode_weights().double()
    label = target.mode_labels(particles.x)
    weight = torch.softmax(particles.log_weight, 0)
    plain = torch.bincount(label, minlength=len(exact)).double() / len(label)
    weighed = torch.zeros_like(exact).index_add_(0, label, weight.to(exact))
    noise = (exact * (1.0 - exact) * 2.0 / math.pi / len(label)).sqrt()
    return {
        "TV": 0.5 * float((plain - exact).abs().sum()),
        "TV of exact draws": 0.5 * float(noise.sum()),
        "weighted TV": 0.5 * float((weighed - exact).abs().sum()),
        "modes": float((plain > 0.1 * exact).sum()),
    }


def wells(target: Target, particles: Particles) -> Measures:
    """Worst right-well mass over pairs, without and with weights; W2 of draws to as many exact ones."""
    assert isinstance(target, targets.ManyWell)
    weight = torch.softmax(particles.log_weight, 0)
    plain = target.right_well_mass(particles.x) - target.right_mass
    weighed = target.right_well_mass(particles.x, weight) - target.right_mass
    found = {"worst pair": float(plain.abs().max()), "worst pair, weighted": float(weighed.abs().max())}
    if target.dim == 32:
        generator = torch.Generator().manual_seed(0)
        drawn = particles.x[: min(CLOUD, len(particles))].double()
        again = particles.resample(len(drawn), generator=generator).double()
        exact = target.sample(len(drawn), generator=generator).double()
        found |= {"W2": wasserstein(drawn, exact), "W2, resampled": wasserstein(again, exact)}
    return found


def posterior(name: str, log_z: float) -> Callable[[], Target]:
    """Logistic regression on ``name.csv`` (a row per case, its class last) of the data folder, standard normal prior.

    The sonar and ionosphere data of the UCI repository as published: standardized, a constant feature left as zero.
    """

    @cache
    def build() -> Target:
        path = DATA / f"{name}.csv"
        if not path.exists():
            raise SystemExit(f"{path} is missing: put the UCI file {name} there, as comma-separated rows.")
        rows = [line.split(",") for line in path.read_text().split()]
        features = torch.tensor([[float(cell) for cell in row[:-1]] for row in rows], dtype=torch.float64)
        features = features - features.mean(0)
        spread = features.std(0, correction=0)
        features = features / torch.where(spread > 0.0, spread, torch.ones_like(spread))
        labels = torch.tensor([row[-1] in ("g", "M") for row in rows])
        target = targets.LogisticRegression(features, labels, standardize=False)
        target.log_normalizer = log_z
        return target

    return build


IONOSPHERE, SONAR = -111.611, -108.38
"""Log evidences by importance sampling from Student-t laws; published sequential Monte Carlo: -111.63 and -108.37."""
BROWNIAN = 1.187749


def search() -> list[tuple[Source, float]]:
    """Fresh, exploratory and locally improved paths, as in the published recipe."""
    return [(OnPolicy(), 0.4), (Exploratory(), 0.2), (LocalSearch(every=50), 0.4)]


RUNGS = ((16, 8.0, 128, 1e-2), (64, 10.0, 128, 5e-3), (128, 8.0, 128, 3e-3), (256, 10.0, 128, 2e-3))
PATHWISE = ((64, 25.0, 128, 5e-3), (128, 20.0, 128, 3e-3), (256, 35.0, 128, 2e-3))
"""Of chains on posteriors; the papers take 150,000 steps at each number of steps."""


def dds(target: Target, *, num_steps: int, **options: Any) -> ds.DDS:
    return ds.DDS(target, schedule=cosine_preserving(num_steps, total=5.0), num_steps=num_steps, **options)


CHAINS: dict[str, tuple[Callable[..., DiffusionSampler], dict[str, Any], Callable[[], Objective], Rungs]] = {
    # In few steps, from one peak and in whitened coordinates, growing step sizes help.
    "cmcd": (ds.CMCD, {"local_scale": 0.8, "learn_steps": True}, LogVariance, RUNGS),
    "ucmcd": (ds.UCMCD, {"local_scale": 0.3}, ReverseKL, PATHWISE),
    "dds": (dds, {}, LogVariance, RUNGS),
}
"""Sampler, options, loss and rungs; step sizes of the underdamped chain learn from a pathwise loss only."""


def chains(
    name: str, build: Callable[[], Target], log_z: float, bounds: dict[str, Sequence[float]], *, refit: bool = False
) -> dict[str, Case]:
    """CMCD, its underdamped version and DDS at 64, 128 and 256 steps; ``bounds`` are published ELBOs."""
    cases = {}
    for kind, (maker, options, objective, rungs) in CHAINS.items():
        for number, steps in enumerate((64, 128, 256)):
            count = 1 + [rung[0] for rung in rungs].index(steps)
            # No ELBO of DDS was published: it is held against the overdamped chain.
            published = bounds.get(kind, bounds["cmcd"])[number]
            cases[f"{name}-{kind}{steps}"] = Case(
                build,
                Ladder(maker, options, rungs[:count], objective, whiten=True, refit=refit),
                Wanted(gap=log_z - published, published=f"ELBO {published}"),
                draws=4000,
            )
    return cases


def noising(num_steps: int, noise_min: float, noise_max: float = 2.5) -> dict[str, Any]:
    return {"num_steps": num_steps, "schedule": variance_exploding(num_steps, noise_min=noise_min, noise_max=noise_max)}


GMM25 = partial(targets.GaussianMixture.grid, 25)
PAIR = {"worst pair, weighted": (0.0, 0.02)}
FUNNEL = ((16, 25.0, 128, 1e-2), (64, 30.0, 128, 5e-3), (256, 25.0, 128, 2e-3))
WELLS = {"harmonics": 8, "point_features": 0}
GRID = {"num_steps": 32, "scale": 10.0, "point_features": 128}
SPREAD = {"scale": 25.0, "local_scale": 0.06, "point_features": 128}
MAPPED = ((16, 10.0, 128, 5e-3), (64, 10.0, 128, 3e-3), (256, 10.0, 128, 1e-3))
CASES: dict[str, Case] = {
    "mw32-best": Case(
        targets.ManyWell,
        Best(),
        Wanted(0.45, 0.02, 0.5, {**PAIR, "W2, resampled": (5.37, 5.47)}, "gap 3.85, error .02-.07"),
        wells,
    ),
    "gmm40-best": Case(
        targets.GaussianMixture.forty, Best(), Wanted(0.2, None, 0.75, {}, "ESS .655-.734, NETS .95"), modes
    ),
    "gmm25-best": Case(GMM25, Best(), Wanted(0.17, 0.01, None, {}, "gap .171, error .004"), modes),
    "rotated32-best": Case(
        partial(targets.ManyWell, rotation_seed=0), Best(), Wanted(3.0, None, 0.05, {}, "prototype: gap 13.5"), wells
    ),
    "mw64-best": Case(
        partial(targets.ManyWell, 64), Best(), Wanted(1.1, 0.02, 0.2, PAIR, "prototype: gap 1.1, ESS .2"), wells
    ),
    "mw54-best": Case(targets.DoubleWells.mw54, Best(), Wanted(None, 0.2, 0.67, {}, "ESS .27-.67, error .2"), modes),
    "wells50-best": Case(
        targets.DoubleWells.mw52, Best(cpu=150.0), Wanted(None, None, 0.85, {}, "ESS .85, error .09"), modes
    ),
    "mw54-dis": Case(
        targets.DoubleWells.mw54,
        Trained(ds.DIS, {**noising(48, 0.04), "scale": 2.0, **WELLS}, cpu=60.0, learning_rate=4e-3),
        Wanted(None, 0.2, 0.67, {}, "ESS .27-.67, error .2"),
        modes,
    ),
    "wells50-dis": Case(
        targets.DoubleWells.mw52,
        Trained(ds.DIS, {**noising(32, 0.1), **WELLS}, cpu=90.0, learning_rate=4e-3),
        Wanted(None, None, 0.85, {}, "ESS .85, error .09"),
        modes,
    ),
    "gmm25-tb": Case(
        GMM25,
        Trained(ds.GFN, GRID, cpu=150.0, objective=TrajectoryBalance, sources=search, learning_rate=5e-3),
        Wanted(0.17, 0.01, None, {}, "gap .171, error .004"),
        modes,
    ),
    "gmm25-lv": Case(
        GMM25,
        Trained(ds.DIS, {**noising(32, 0.02), "scale": 8.0, "point_features": 128}, learning_rate=5e-3),
        Wanted(0.17, 0.01, None, {}, "gap .171, error .004"),
        modes,
    ),
    "gmm25-dgfs": Case(
        GMM25,
        Trained(ds.DGFS, {**GRID, "learn_variance": True}, cpu=90.0, sources=search, learning_rate=5e-3),
        Wanted(0.17, 0.01, None, {}, "gap .171, error .004"),
        modes,
    ),
}
CASES |= {
    "gmm40-cmcd": Case(
        targets.GaussianMixture.forty,
        # Carried to 256 steps; with 64 alone the gap stays at .30 and ESS/N at .55 in 120 s.
        Ladder(ds.CMCD, SPREAD, ((32, 50.0, 256, 5e-3), (256, 100.0, 128, 2e-3)), LogVariance),
        Wanted(0.2, None, 0.655, {}, "ESS .655"),
        modes,
    ),
    "mw32-vargrad": Case(
        targets.ManyWell,
        Trained(ds.DIS, {**noising(32, 0.1), "scale": 1.5, **WELLS}, cpu=150.0, objective=VarGrad, learning_rate=4e-3),
        Wanted(3.85, None, None, {}, "gap 4.11, error .02; best gap 3.85"),
        wells,
    ),
    "rotated32-dis": Case(
        partial(targets.ManyWell, rotation_seed=0),
        Trained(ds.DIS, {**noising(32, 0.1), "scale": 1.5, "point_features": 0}, cpu=90.0, learning_rate=4e-3),
        Wanted(3.0, None, 0.05, {}, "net without pilot; prototype: gap 13.5"),
        wells,
    ),
    "mw128-best": Case(partial(targets.ManyWell, 128), Best(cpu=300.0), Wanted(None, 0.5, None, {}, "error 14"), wells),
    "wells50-trust": Case(
        targets.DoubleWells.mw52,
        Trained(ds.DIS, {**noising(32, 0.1), **WELLS}, cpu=90.0, lesson=TrustRegion, learning_rate=4e-3),
        Wanted(None, None, 0.85, {}, "error .000 +- .000"),
        modes,
    ),
}
# The log-variance is the published loss of both; CMCD's own here is the score-function KL.
for method, steps, objective in (
    ("scld", 50, LogVariance),
    ("cmcd", 50, LogVariance),
    ("cmcd", 500, LogVariance),
    ("cmcd-score", 500, None),
):
    for name, build, options in (
        ("mw54", targets.DoubleWells.mw54, {"scale": 2.0, "local_scale": 0.09}),
        ("gmm40", targets.GaussianMixture.forty, SPREAD),
    ):
        kind = ds.SCLD if method == "scld" else ds.CMCD
        recipe = Trained(
            kind, {"num_steps": 32, **options}, cpu=600.0, steps=steps, objective=objective, learning_rate=5e-3
        )
        CASES[f"{name}-{method}-{steps}steps"] = Case(
            build,
            recipe,
            Wanted(published="SCLD in a tenth of CMCD's steps"),
            modes,
        )
CASES["gmm40-cmcd-learned500steps"] = Case(
    targets.GaussianMixture.forty,
    Trained(
        ds.CMCD,
        {"num_steps": 32, **SPREAD, "learn_steps": True},
        cpu=600.0,
        steps=500,
        objective=LogVariance,
        learning_rate=5e-3,
    ),
    Wanted(published="what must not be done: step sizes trained by the log-variance"),
    modes,
)
for number, (count, gap, error, published) in enumerate(
    ((64, 0.587, 0.108, "ELBO -.587, log Z -.108"), (256, 0.23, 0.03, "ELBO -.230, log Z -.019"))
):
    wanted = Wanted(gap, error, published=published)
    # In its own coordinates with learned local steps, and in those of a pilot's map.
    plain = Ladder(ds.CMCD, {"local_steps": True}, FUNNEL[: 2 + number])
    over = Ladder(ds.CMCD, {"local_steps": True}, MAPPED[: 2 + number], whiten=True)
    under = Ladder(ds.UCMCD, {"local_scale": 0.8}, MAPPED[: 2 + number], whiten=True)
    for name, recipe in (("cmcd", plain), ("mapped-cmcd", over), ("mapped-ucmcd", under)):
        CASES[f"funnel-{name}{count}"] = Case(targets.Funnel, recipe, wanted, draws=4000)
CASES |= chains(
    "ionosphere",
    posterior("ionosphere", IONOSPHERE),
    IONOSPHERE,
    {"cmcd": (-112.220, -111.980, -111.925), "ucmcd": (-111.985, -111.879, -111.814)},
)
CASES |= chains(
    "brownian",
    targets.BrownianMotion,
    BROWNIAN,
    {"cmcd": (0.376, 0.578, 0.722), "ucmcd": (0.528, 0.708, 0.835)},
    # This far from a Gaussian the pilot's own map is worth several nats less.
    refit=True,
)
CASES |= chains(
    "sonar",
    posterior("sonar", SONAR),
    SONAR,
    {"cmcd": (-109.503, -109.608, -109.250), "ucmcd": (-109.278, -109.021, -108.904)},
)
