r"""Adaptive tempered sequential Monte Carlo.

The path is geometric,

.. math:: \log \gamma_\beta(x) = (1 - \beta) \log p_0(x) + \beta \log \rho(x), \qquad 0 \le \beta \le 1,

from a normalized reference :math:`p_0` to the target :math:`\rho = Z \pi`. With the prior as the reference this
is likelihood tempering. At each temperature every particle is reweighted by :math:`(\rho / p_0)^{\Delta\beta}`, islands
are resampled when their weights degenerate, and a Markov kernel moves all particles. The mean weight of an island is
its estimate of :math:`Z`; islands are independent once the schedule is frozen, and then :math:`E[\hat Z] = Z` exactly.

References:
    Sequential Monte Carlo samplers (Del Moral, Doucet & Jasra, 2006), https://doi.org/10.1111/j.1467-9868.2006.00553.x
    Toward automatic model comparison: an adaptive sequential Monte Carlo approach (Zhou, Johansen & Aston, 2016),
    https://arxiv.org/abs/1303.3123 (conditional ESS)
    On the convergence of adaptive sequential Monte Carlo methods (Beskos, Jasra, Kantas & Thiery, 2016),
    https://arxiv.org/abs/1306.6462
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from diffsampler.estimators import systematic_resample
from diffsampler.kernel import Kernel, KernelParams, State, with_path_weight
from diffsampler.kernels.adaptation import RobbinsMonro, reasonable_step_size, spread, worst_reach
from diffsampler.kernels.hmc import HMC
from diffsampler.kernels.metropolis import is_broken
from diffsampler.particles import Particles
from diffsampler.tempering import Points, Schedule, TemperedDensity, TemperedPath, Transport, next_beta

__all__ = ["Points", "SMCResult", "Schedule", "TemperedDensity", "TemperedPath", "Transport", "smc"]


@dataclass(frozen=True)
class SMCResult:
    """What a run of :func:`smc` returns.

    Arguments:
        particles: Weighted particles; islands are the replicates and the mean weight is the estimate of ``Z``.
        schedule: What was chosen; hand it back to repeat the pass frozen.
        z: Move coordinates of the particles ``(n, D)``.
        log_target: Log density of the target at the particles ``(n,)``, float64.
        finished: Whether temperature 1 was reached. If not, the weights belong to temperature ``beta``.
        beta: Temperature reached.
        acceptance: Mean acceptance probability at each temperature.
        ancestors: Index of each particle's reference draw ``(n,)``.
        effective_ancestors: Effective number of reference draws per island, one over the sum of squared family
            weights, ``(num_islands,)``, float64.
        evaluations: Points at which the target was evaluated, over both passes.
        nonfinite: Reference draws lost to non-finite values (they alone are in ``particles.nonfinite``) plus proposals
            refused for them, over both passes.
        adaptive: The adaptive pass, where this is the frozen one that followed it.
    """

    particles: Particles
    schedule: Schedule
    z: Tensor
    log_target: Tensor
    finished: bool
    beta: float
    acceptance: tuple[float, ...]
    ancestors: Tensor
    effective_ancestors: Tensor
    evaluations: int
    nonfinite: int
    adaptive: SMCResult | None = None


class _Population(NamedTuple):
    """Particles on their way."""

    points: Points
    log_weight: Tensor
    ancestors: Tensor
    beta: float


@dataclass(frozen=True, kw_only=True)
class _Settings:
    """The arguments of :func:`smc`, checked."""

    path: TemperedPath
    n: int
    generator: torch.Generator
    num_islands: int
    kernel: Kernel
    coordinates: Transport | None
    conditional_ess: float
    resample_below: float
    num_moves: int | None
    max_moves: int
    final_moves: int
    growth: float
    step_size: float | None
    max_temperatures: int
    dtype: torch.dtype
    stop: Callable[[], bool] | None
    pace: Callable[[], float] | None
    progress: Callable[[float], None] | None

    def __post_init__(self) -> None:
        n, islands = self.n, self.num_islands
        if islands < 1 or n < 2 * islands or n % islands:
            raise ValueError(f"Expected n to be a multiple of num_islands={islands}, at least twice it; got {n}.")
        if not 0.0 < self.conditional_ess < 1.0:
            raise ValueError(f"Expected conditional_ess in (0, 1); got {self.conditional_ess}.")
        if self.num_moves is not None and self.num_moves < 1:
            raise ValueError(f"Expected num_moves to be a positive integer; got {self.num_moves}.")
        if self.max_moves < 2:
            raise ValueError(f"Expected max_moves to be at least 2; got {self.max_moves}.")
        if self.step_size is not None and not self.step_size > 0.0:
            raise ValueError(f"Expected step_size to be positive; got {self.step_size}.")


@dataclass
class _Log:
    """What a pass writes down as it goes."""

    betas: list[float] = field(default_factory=list)
    step_sizes: list[float] = field(default_factory=list)
    scales: list[Tensor] = field(default_factory=list)
    num_moves: list[int] = field(default_factory=list)
    resampled: list[bool] = field(default_factory=list)
    acceptance: list[float] = field(default_factory=list)
    evaluations: int = 0
    lost: int = 0
    refused: int = 0

    def schedule(self) -> Schedule:
        return Schedule(
            tuple(self.betas),
            tuple(self.step_sizes),
            tuple(self.scales),
            tuple(self.num_moves),
            tuple(self.resampled),
        )


def smc(
    path: TemperedPath,
    *,
    n: int,
    generator: torch.Generator,
    num_islands: int = 16,
    kernel: Kernel | None = None,
    coordinates: Transport | None = None,
    schedule: Schedule | None = None,
    two_pass: bool = False,
    conditional_ess: float = 0.7,
    resample_below: float = 0.5,
    num_moves: int | None = None,
    max_moves: int = 12,
    final_moves: int = 2,
    growth: float = 0.05,
    step_size: float | None = None,
    max_temperatures: int = 1000,
    dtype: torch.dtype = torch.float64,
    stop: Callable[[], bool] | None = None,
    pace: Callable[[], float] | None = None,
    progress: Callable[[float], None] | None = None,
) -> SMCResult:
    """Move ``n`` particles from the reference to the target.

    Arguments:
        path: Reference and target.
        n: Number of particles, a multiple of ``num_islands``.
        generator: Source of randomness; its device is where the particles live.
        num_islands: Equal contiguous blocks that are resampled each by itself.
        kernel: Transition; HMC of 1 to 6 leapfrog steps and mixed step sizes by default. With an unadjusted kernel the
            weights take its ``Info.log_ratio``; it needs ``step_size`` and ``num_moves``.
        coordinates: Moves happen in ``z``, ``x = T(z)``; in ``x`` itself by default.
        schedule: Repeat this schedule with everything frozen, so that ``E[mean weight] = Z`` exactly.
        two_pass: Run an adaptive pass, then a frozen one with fresh randomness, and return the latter.
        conditional_ess: Fraction in (0, 1) that sets the next temperature, pooled over islands.
        resample_below: Resample all islands when their mean ESS falls below this fraction; 1 or more for always.
        num_moves: Kernel steps per temperature; by default until the slowest coordinate's ``worst_reach`` settles.
        max_moves: Most kernel steps per temperature; the fewest are 2.
        final_moves: Fewest kernel steps at temperature 1.
        growth: The reach has settled when a step adds less than this fraction.
        step_size: First step size, in units of the population's spread; found by doubling by default.
        max_temperatures: Give up after so many.
        dtype: Dtype of the particles; weights are float64 always.
        stop: Asked between temperatures; True ends the run early.
        pace: Share of an adaptive pass's budget that is spent. Beyond one half, steps in temperature grow and moves
            become fewer; at one the pass goes to temperature 1 at once. It ends coarse rather than unfinished.
        progress: Told each temperature reached.

    Raises:
        ValueError: If arguments do not fit, or the target is finite at none of the reference draws.
    """
    arguments = dict(locals())
    del arguments["schedule"], arguments["two_pass"]
    arguments["kernel"] = with_path_weight(kernel or HMC(path.space, num_steps=6, smallest_step=0.15))
    settings = _Settings(**arguments)
    _check_schedule(settings, schedule, two_pass=two_pass)
    first = _run(settings, schedule)
    return _run(settings, first.schedule, adaptive=first) if two_pass and first.finished else first


def _check_schedule(settings: _Settings, schedule: Schedule | None, *, two_pass: bool) -> None:
    if schedule is None:
        if not settings.kernel.exact and (settings.step_size is None or settings.num_moves is None):
            name = type(settings.kernel).__name__
            raise ValueError(f"Expected step_size and num_moves with the unadjusted kernel {name}; got None.")
        return
    if two_pass:
        raise ValueError("Expected at most one of schedule and two_pass=True; got both.")
    if not schedule.betas or schedule.betas[-1] != 1.0:
        raise ValueError("Expected a schedule that ends at temperature 1; got an unfinished one.")


def _run(settings: _Settings, frozen: Schedule | None, *, adaptive: SMCResult | None = None) -> SMCResult:
    log = _Log()
    population = _start(settings, log)
    for k in range(settings.max_temperatures if frozen is None else len(frozen)):
        if settings.stop is not None and settings.stop():
            break
        paced = settings if frozen is not None else _hurried(settings)
        population = _reweight(paced, population, None if frozen is None else frozen.betas[k], log)
        population = _resample(paced, population, log, decided=None if frozen is None else frozen.resampled[k])
        population = _move(paced, population, frozen, k, log)
        if settings.progress is not None:
            settings.progress(population.beta)
        if population.beta == 1.0:
            break
    return _result(settings, population, log, adaptive)


def _hurried(settings: _Settings) -> _Settings:
    """Larger steps in temperature and fewer moves as the budget of the pass runs out."""
    haste = 0.0 if settings.pace is None else min(1.0, max(0.0, 2.0 * settings.pace() - 1.0))
    if haste == 0.0:
        return settings
    return replace(
        settings,
        conditional_ess=settings.conditional_ess * (1.0 - haste) ** 2 or 1e-300,
        max_moves=max(2, round(settings.max_moves * (1.0 - haste))),
        final_moves=max(2, round(settings.final_moves * (1.0 - haste))),
    )


def _start(settings: _Settings, log: _Log) -> _Population:
    n, dtype = settings.n, settings.dtype
    path, transport, device = settings.path, settings.coordinates, settings.generator.device
    x = path.reference.sample(n, generator=settings.generator).to(device=device, dtype=dtype)
    z, lost = x, torch.zeros(n, dtype=torch.bool, device=device)
    if transport is not None:
        with torch.no_grad():
            z = transport.inverse(x)
            back, log_det = transport.forward(z)
            tolerance = 1e-4 * (x.abs() + spread(path.space, x).to(x))
            lost = ~((back - x).abs() <= tolerance).all(-1) | ~log_det.isfinite()
            # A draw that the map cannot bring back has weight zero; it waits at a point that is a number.
            z = torch.where(lost.unsqueeze(-1), torch.zeros_like(z), z)
            x = transport.forward(z)[0]
    points = path.evaluate(z, x)
    log.evaluations += n
    lost = lost | is_broken(State(x, points.log_target, points.score_target)) | ~points.log_reference.isfinite()
    log.lost += int(lost.sum())
    log_weight = torch.zeros(n, dtype=torch.float64, device=device).masked_fill(lost, -math.inf)
    if bool((lost | points.log_target.isneginf()).all()):
        raise ValueError(f"Expected a finite target density at some of the {n} reference draws; got none.")
    return _Population(points, log_weight, torch.arange(n, device=device), 0.0)


def _reweight(settings: _Settings, population: _Population, beta: float | None, log: _Log) -> _Population:
    points, log_weight = population.points, population.log_weight
    slope = points.log_target - points.log_reference
    # A particle of weight zero keeps it, whatever its densities are.
    slope = torch.where(log_weight.isneginf() | slope.isnan(), torch.full_like(slope, -math.inf), slope)
    if beta is None:
        beta = next_beta(log_weight, slope, population.beta, settings.conditional_ess)
    log.betas.append(beta)
    return population._replace(log_weight=log_weight + (beta - population.beta) * slope, beta=beta)


def _resample(settings: _Settings, population: _Population, log: _Log, *, decided: bool | None) -> _Population:
    blocks = population.log_weight.reshape(settings.num_islands, -1)
    size = blocks.shape[1]
    log_total = torch.logsumexp(blocks, -1, keepdim=True)
    alive = log_total.isfinite()
    if decided is None:
        log_ess = 2.0 * log_total - torch.logsumexp(2.0 * blocks, -1, keepdim=True)
        ess = torch.where(alive, log_ess.exp(), torch.zeros_like(log_ess)).mean()
        decided = bool(ess < settings.resample_below * size)
    log.resampled.append(decided)
    if not decided:
        return population
    # An island that died keeps its particles and its weight zero.
    safe = torch.where(alive, blocks, torch.zeros_like(blocks))
    index = systematic_resample(safe, generator=settings.generator)
    offset = size * torch.arange(settings.num_islands, device=index.device).unsqueeze(-1)
    index = (index + offset).reshape(-1)
    log_weight = (log_total - math.log(size)).expand_as(blocks).reshape(-1)
    return _Population(population.points.take(index), log_weight, population.ancestors[index], population.beta)


def _move(settings: _Settings, population: _Population, frozen: Schedule | None, k: int, log: _Log) -> _Population:
    kernel, generator, space = settings.kernel, settings.generator, settings.path.space
    density = settings.path.density(population.beta, coordinates=settings.coordinates)
    points, log_weight = population.points, population.log_weight
    state = kernel.refresh(density.state(points), generator=generator)
    start, total = points.z, 0.0
    scale = spread(space, start, log_weight=log_weight) if frozen is None else frozen.scales[k]
    tuner = RobbinsMonro(kernel.target_acceptance)
    if frozen is None:
        tuned = tuner.init(_first_step_size(settings, state, density, scale, log))
    else:
        tuned = tuner.init(frozen.step_sizes[k])
    limit, reach, moves = _move_limit(settings, population.beta, frozen, k), 0.0, 0
    weight = torch.softmax(log_weight, 0)
    while moves < limit:
        params = KernelParams(scale.new_tensor(tuner.step_size(tuned)), scale)
        before = state
        state, info = kernel.step(state, density, params, generator)
        points = density.points(state, points)
        moves += 1
        log.refused += int((info.nonfinite & before.log_prob.isfinite()).sum())
        acceptance = float((weight * info.acceptance).sum())
        total += acceptance
        if not kernel.exact:
            gain = state.log_prob.double() - before.log_prob.double() + info.log_ratio
            log_weight = torch.where(log_weight.isneginf(), log_weight, log_weight + gain)
        if frozen is not None:
            continue
        if kernel.exact:
            tuned = tuner.update(tuned, acceptance)
        if settings.num_moves is None:
            previous, reach = reach, worst_reach(space, points.z, start, scale, weight)
            fewest = settings.final_moves if population.beta == 1.0 else 2
            if moves >= fewest and reach < (1.0 + settings.growth) * previous:
                break
            if moves >= 2 and settings.pace is not None and settings.pace() >= 1.0:
                break
    log.evaluations += density.evaluations
    log.acceptance.append(total / max(moves, 1))
    log.step_sizes.append(tuner.step_size(tuned))
    log.scales.append(scale)
    log.num_moves.append(moves)
    return population._replace(points=points, log_weight=log_weight)


def _move_limit(settings: _Settings, beta: float, frozen: Schedule | None, k: int) -> int:
    if frozen is not None:
        return frozen.num_moves[k]
    if settings.num_moves is not None:
        return settings.num_moves
    return max(settings.max_moves, settings.final_moves) if beta == 1.0 else settings.max_moves


def _first_step_size(settings: _Settings, state: State, density: TemperedDensity, scale: Tensor, log: _Log) -> float:
    """The step size that the previous temperature ended with, or a first one by doubling."""
    if log.step_sizes:
        return log.step_sizes[-1]
    if settings.step_size is not None:
        return settings.step_size
    params = KernelParams(scale.new_tensor(0.5 * settings.path.space.dof**-0.25), scale)
    alive = state.log_prob.isfinite()
    state = state.take(alive)
    step_size, _ = reasonable_step_size(settings.kernel, state, density, params, generator=settings.generator)
    density.last = None
    return step_size


def _result(settings: _Settings, population: _Population, log: _Log, adaptive: SMCResult | None) -> SMCResult:
    points, log_weight, islands = population.points, population.log_weight, settings.num_islands
    nonfinite = log.lost + log.refused
    if adaptive is not None:
        log.evaluations += adaptive.evaluations
        nonfinite += adaptive.nonfinite
    size = log_weight.shape[0] // islands
    blocks = log_weight.reshape(islands, -1)
    dead = blocks.isneginf().all(-1, keepdim=True)
    weight = torch.softmax(torch.where(dead, torch.zeros_like(blocks), blocks), -1).reshape(-1)
    family = torch.zeros_like(weight).index_add_(0, population.ancestors, weight).reshape(islands, size)
    effective = torch.where(dead.squeeze(-1), torch.zeros_like(family[:, 0]), 1.0 / family.square().sum(-1))
    particles = Particles(
        points.x, log_weight, replicates=islands, has_normalizer=population.beta == 1.0, nonfinite=log.lost
    )
    return SMCResult(
        particles=particles,
        schedule=log.schedule(),
        z=points.z,
        log_target=points.log_target,
        finished=population.beta == 1.0,
        beta=population.beta,
        acceptance=tuple(log.acceptance),
        ancestors=population.ancestors,
        effective_ancestors=effective,
        evaluations=log.evaluations,
        nonfinite=nonfinite,
        adaptive=adaptive,
    )
