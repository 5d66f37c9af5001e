"""What the front door builds from a name or from a pilot: samplers in coordinates that need no tuning."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, final

import torch
from torch import Tensor

from diffsampler.estimators import systematic_resample
from diffsampler.methods.adjoint_sampling import AdjointSampling
from diffsampler.methods.asbs import ASBS
from diffsampler.methods.cmcd import CMCD, MCD, AnnealedULA
from diffsampler.methods.dds import DDS
from diffsampler.methods.defensive import DefensiveSampler, defence_share
from diffsampler.methods.dis import DIS
from diffsampler.methods.gbs import GBS
from diffsampler.methods.gfn import DGFS, GFN
from diffsampler.methods.matching import Matching
from diffsampler.methods.pis import PIS
from diffsampler.methods.scld import SCLD
from diffsampler.methods.underdamped import LDVI, UCMCD, UHA
from diffsampler.objective import BridgeLikelihood, LogVariance
from diffsampler.particles import Particles
from diffsampler.pilot import PilotResult
from diffsampler.pilot.guide import wide_law
from diffsampler.pilot.search import MeanFieldFits, multistart
from diffsampler.pilot.transport import Pushforward
from diffsampler.refinement import Course, refine
from diffsampler.sampler import DiffusionSampler, Sampler
from diffsampler.schedule import variance_exploding
from diffsampler.smc import SMCResult, smc
from diffsampler.space import Euclidean, EuclideanTorus, MeanFree, Torus
from diffsampler.target import AffineTarget, Target
from diffsampler.tempering import TemperedPath

__all__ = ["MappedSampler", "learned_sampler", "plain_smc", "refined_sampler"]

LEARNING_RATES = {"dis": 5e-3}
"""Learning rates from scratch, where they are not 2e-3; exact kernels of a fixed chain bear a larger one."""
DIS_NOISE = 1.5
"""Largest noise level from scratch; a larger one costs resolution further down and brings little Gaussianity."""
SEARCH_COST = 300_000
"""Evaluations of a full search for the mass."""
SEARCH_SHARE = 1.0 / 6.0
"""Share of a budget that the search may take."""
NUM_STARTS = 80
SEARCH_BATCH = 6 * NUM_STARTS
"""Points per evaluation of the search."""
BRIDGE_STEPS = 400
POLISH_STEPS = 150
REFINED_BATCH = 256
BRIDGE_SHARE = 0.4
"""Share of the learned process' budget for simulation-free training; the rest polishes with the log-variance loss."""

Paid = Callable[[], float]
"""Evaluations that a search may take, asked for once it is needed: the answer may have to be measured."""


def _unlimited() -> float:
    return math.inf


@final
class MappedSampler(Sampler):
    """A learned sampler in convenient coordinates, whose particles are mapped back to the target's own.

    The normalizing constant does not change, so neither do the weights.

    Arguments:
        target: The target in its own coordinates.
        inner: Sampler of the mapped target.
        to_original: Map of points ``(n, D)``.
    """

    def __init__(self, target: Target, inner: DiffusionSampler | SCLD, to_original: Callable[[Tensor], Tensor]) -> None:
        self.target = target
        self.inner = inner
        self.to_original = to_original

    @property
    def evaluations(self) -> int:
        return self.inner.evaluations

    @property
    def findings(self) -> list[tuple[str, str, str]]:
        return self.inner.findings

    def sample(self, n: int, *, seed: int = 0) -> Particles:
        particles = self.inner.sample(n, seed=seed)
        x = self.to_original(particles.x)
        return Particles(x, particles.log_weight, replicates=particles.replicates, nonfinite=particles.nonfinite)


def locate(target: Target, *, generator: torch.Generator, paid: Paid = _unlimited) -> MeanFieldFits:
    """Variational fits of where the mass is, by a search of at most ``paid()`` evaluations, ten starts at least."""
    effort = min(1.0, paid() / SEARCH_COST) ** 0.5
    starts, steps = max(10, int(effort * NUM_STARTS)), max(40, int(effort * 250))
    return multistart(target, num_starts=starts, steps=steps, generator=generator).good().distinct()


def standardize(target: Target, *, generator: torch.Generator, paid: Paid = _unlimited) -> tuple[AffineTarget, float]:
    """Coordinates in which the mass sits at the origin with unit scale, and the smallest local scale in them.

    Fits count by their evidence: a wide fit of a funnel's mouth says little about where the funnel's mass is.
    """
    space = target.space
    device = generator.device
    one = torch.ones(1, dtype=torch.float64, device=device)
    origin = torch.zeros(space.dim, dtype=torch.float64, device=device)
    if isinstance(space, Torus | EuclideanTorus):
        # Angles have a scale already.
        return AffineTarget(target, origin, one), 0.3
    if not isinstance(space, Euclidean):
        return AffineTarget(target, origin, one * _isotropic_scale(target, generator)), 0.3
    fits = locate(target, generator=generator, paid=paid)
    weight = torch.softmax(fits.elbo, 0)
    location = weight @ fits.location
    scale = (weight @ (fits.scale.square() + (fits.location - location).square())).sqrt()
    local = float((fits.scale[weight > 1e-3] / scale).min().clamp(0.005, 1.0))
    return AffineTarget(target, location, scale), local


def _isotropic_scale(target: Target, generator: torch.Generator) -> float:
    """Scale of an isotropic Gaussian by a coarse search for the largest evidence lower bound."""
    like = torch.empty(0, dtype=torch.float64, device=generator.device)
    noise = target.space.noise((256,), like=like, generator=generator)
    scales = torch.logspace(-2, 2, 41, dtype=torch.float64, device=generator.device)
    with torch.no_grad():
        bound = [float(target.log_prob(s * noise).mean()) + target.space.dof * math.log(float(s)) for s in scales]
    finite = [b if math.isfinite(b) else -math.inf for b in bound]
    return float(scales[max(range(len(finite)), key=finite.__getitem__)])


def learned_sampler(
    name: str,
    target: Target,
    *,
    generator: torch.Generator,
    dtype: torch.dtype,
    paid: Paid = _unlimited,
) -> tuple[MappedSampler, dict[str, Any]]:
    """The sampler of a named method, in coordinates standardized by a search of at most ``paid()`` evaluations."""
    standard, local = standardize(target, generator=generator, paid=paid)
    seed = int(torch.randint(2**31, (), generator=generator, device=generator.device))
    features = 64 if target.dim <= 4 else 0
    noise_min = min(0.5, max(0.01, 0.5 * local))
    annealed: dict[str, Any] = {"scale": 1.5, "local_scale": local, "seed": seed}
    matched: dict[str, Any] = {
        "sigma_min": 0.5 * noise_min,
        "lesson": Matching(fresh=2048, every=25, reweight=0.3),
        "point_features": features,
        "seed": seed,
    }
    makers: dict[str, Callable[[], DiffusionSampler | SCLD]] = {
        "as": lambda: AdjointSampling(standard, **matched),
        "asbs": lambda: ASBS(standard, scale=1.0, sigma_max=1.5, **matched),
        "pis": lambda: PIS(standard, scale=1.5, point_features=features, seed=seed),
        "dds": lambda: DDS(standard, scale=1.5, point_features=features, seed=seed),
        "dis": lambda: DIS(
            standard,
            num_steps=32,
            schedule=variance_exploding(32, noise_min=noise_min, noise_max=DIS_NOISE),
            point_features=features,
            seed=seed,
        ),
        "gbs": lambda: GBS(standard, point_features=features, **annealed),
        "cmcd": lambda: CMCD(standard, **annealed),
        "mcd": lambda: MCD(standard, **annealed),
        "ula": lambda: AnnealedULA(standard, **annealed),
        "ucmcd": lambda: UCMCD(standard, **annealed),
        "ldvi": lambda: LDVI(standard, **annealed),
        "uha": lambda: UHA(standard, **annealed),
        "gfn": lambda: GFN(standard, scale=1.5, level_min=noise_min, point_features=features, seed=seed),
        "dgfs": lambda: DGFS(standard, scale=1.5, level_min=noise_min, point_features=features, seed=seed),
        "scld": lambda: SCLD(standard, **annealed),
    }
    sampler = makers[name]().to(device=generator.device, dtype=dtype)
    choices = {
        "location": standard.location.tolist(),
        "scale": standard.scale.tolist(),
        "local_scale": local,
        "learning_rate": LEARNING_RATES.get(name, 2e-3),
        "num_steps": sampler.process.num_steps,
    }
    return MappedSampler(target, sampler, standard.to_original), choices


def plain_smc(
    target: Target,
    n: int,
    num_islands: int,
    *,
    generator: torch.Generator,
    stop: Callable[[], bool],
    paid: Paid = _unlimited,
) -> SMCResult:
    """Adaptive tempered SMC, then the same schedule frozen: from the prior if there is one, else a wide Student-t."""
    reference = target.prior
    if reference is None:
        if not isinstance(target.space, Euclidean):
            raise ValueError(f"method='smc' needs a prior on {target.space}; use 'auto'.")
        reference = wide_law(locate(target, generator=generator, paid=paid))
    path = TemperedPath(reference, target)
    return smc(path, n=n, num_islands=num_islands, generator=generator, two_pass=True, stop=stop)


def refined_sampler(
    target: Target,
    pilot: PilotResult,
    *,
    generator: torch.Generator,
    dtype: torch.dtype,
    course: Course,
) -> tuple[MappedSampler | DefensiveSampler, dict[str, Any]]:
    """A sampler that draws cheaply, learned from a pilot's particles; see :mod:`diffsampler.refinement`.

    The pilot's reference density defends it against mass that it has not learned. Off Euclidean space there are no
    mixtures to build on: a network alone learns to reverse the noising chain.
    """
    assert pilot.particles is not None
    device = generator.device
    index = systematic_resample(pilot.particles.log_weight, generator=generator)
    x = pilot.particles.x[index].to(device)
    if not isinstance(target.space, Euclidean):
        return _refined_on_space(target, x, generator=generator, dtype=dtype, course=course)
    work, choices = refine(
        target,
        x,
        transport=pilot.transport,
        centres=pilot.modes if len(pilot.modes) > 1 else None,
        generator=generator,
        dtype=dtype,
        course=course,
    )
    choices["learned_steps"] = int(sum(_last_steps(work.history)))
    if pilot.reference is None or pilot.transport is None:
        return MappedSampler(target, work.sampler, work.frame.to_original), choices
    reference = Pushforward(pilot.reference, pilot.transport).to(device)
    with torch.no_grad():
        log_ratio = target.log_prob(x).double() - reference.log_prob(x).double()
    share = defence_share(work.sampler, work.frame.to_frame(x), log_ratio, generator=generator)
    choices["defence_share"] = share
    defended = DefensiveSampler(
        target,
        work.sampler,
        reference,
        share=share,
        to_original=work.frame.to_original,
        to_inner=work.frame.to_frame,
    )
    return defended, choices


def _refined_on_space(
    target: Target,
    x: Tensor,
    *,
    generator: torch.Generator,
    dtype: torch.dtype,
    course: Course,
) -> tuple[MappedSampler, dict[str, Any]]:
    """A network trained by bridge likelihood on the particles, then by log-variance on fresh and replayed paths."""
    standard = _standard(target, x)
    bank = standard.to_standard(x).to(dtype)
    local = _local_scale(standard, bank)
    seed = int(torch.randint(2**31, (), generator=generator, device=generator.device))
    num_steps = 32
    sampler = DIS(
        standard,
        num_steps=num_steps,
        schedule=variance_exploding(num_steps, noise_min=0.5 * local),
        width=96,
        seed=seed,
    )
    sampler.to(device=generator.device, dtype=dtype)
    history = []
    for objective, share, count, rate in (
        (BridgeLikelihood(), BRIDGE_SHARE, BRIDGE_STEPS, 2e-3),
        (LogVariance(), 1.0, POLISH_STEPS, 1e-3),
    ):
        sampler.objective = objective
        number = course.steps if course.steps is not None else (1_000_000 if course.limited else count)
        stage = "simulation-free training" if objective.needs_bridge else "polishing"
        course.start(stage, number if not course.limited else None)
        sampler.fit(
            steps=number,
            batch_size=REFINED_BATCH,
            learning_rate=rate,
            seed=seed,
            bank=bank,
            spent=course.until(share),
            callback=course.callback,
        )
        history += sampler.history
    sampler.history = history
    choices = {"num_steps": num_steps, "noise_min": 0.5 * local, "learned_steps": int(sum(_last_steps(history)))}
    return MappedSampler(target, sampler, standard.to_original), choices


def _last_steps(history: list[dict[str, float]]) -> list[float]:
    """Number of steps of each phase: the last entry before the count starts anew."""
    steps = [entry["step"] for entry in history]
    return [s for s, after in zip(steps, [*steps[1:], 0], strict=False) if after <= s]


def _standard(target: Target, z: Tensor) -> AffineTarget:
    if isinstance(target.space, Euclidean):
        return AffineTarget(target, z.mean(0), z.std(0))
    one = torch.ones(1, dtype=torch.float64, device=z.device)
    if isinstance(target.space, MeanFree):
        one = one * (z.square().sum(-1).mean() / target.space.dof).sqrt()
    return AffineTarget(target, torch.zeros(target.dim, dtype=torch.float64, device=z.device), one)


def _local_scale(target: Target, points: Tensor) -> float:
    """Smallest scale of the density about its particles, by the inverse size of the score."""
    score = target.score(points).double()
    size = score.square().mean(0).sqrt()
    return float((1.0 / size.max()).clamp(0.01, 1.0))
