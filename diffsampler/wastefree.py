r"""Waste-free tempered SMC: every state of every Markov chain becomes a particle.

At each temperature of the geometric path an island of :math:`N = M P` particles is reweighted, :math:`M` ancestors
are resampled, each starts a chain of :math:`P - 1` kernel steps, and all :math:`M P` visited states, ancestors
included, are the new particles with equal weights. The estimate of the normalizer is the product of the mean weights

.. math:: \hat Z = \prod_k \frac{1}{N} \sum_{m, p} G_k(x_{m,p}), \qquad
    G_k = (\rho / p_0)^{\beta_{k+1} - \beta_k},

with :math:`E[\hat Z] = Z` for frozen temperatures and kernels, whatever the length of the chains: the state that is
kept beside an ancestor has the right weighted law because kernels leave their temperature invariant. Against plain
SMC, where only the last state of each chain is kept, the same evaluations carry :math:`P - 1` times as many particles,
and long chains replace the resampling that makes mode weights drift.

Chains of one temperature are independent given their ancestors, so that the spread of their mean weights gives an
estimate of the variance from one island,

.. math:: \widehat{\mathrm{Var}}(\log\hat Z) = \sum_k \frac{1}{M} \mathrm{Var}_m \Bigl(
    \frac{1}{P} \sum_p G_k(x_{m,p}) / \bar G_k \Bigr),

which assumes chains long enough to forget their ancestors: it is too small where chains stay in the mode that they
start in. The spread of independent islands has no such assumption and is the error bar of the particles.

Reference:
    Waste-free sequential Monte Carlo (Dau & Chopin, 2022), https://arxiv.org/abs/2011.02328
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from diffsampler.estimators import systematic_resample
from diffsampler.kernel import Kernel, KernelParams, State
from diffsampler.kernels.adaptation import RobbinsMonro, reasonable_step_size, spread
from diffsampler.kernels.metropolis import is_broken
from diffsampler.particles import Particles
from diffsampler.tempering import Points, Schedule, TemperedDensity, TemperedPath, next_beta

__all__ = ["WasteFreeRun", "waste_free_smc"]


@dataclass(frozen=True)
class WasteFreeRun:
    """What :func:`waste_free_smc` returns.

    Arguments:
        particles: Particles with one weight for each island, its estimate of ``Z``; islands are the replicates.
        schedule: What was chosen; hand it back to repeat the pass frozen.
        finished: Whether temperature 1 was reached.
        chain_variance: Estimate of the variance of ``log Z`` of each island from its own chains, ``(num_islands,)``.
        acceptance: Mean acceptance probability at each temperature.
        evaluations: Points at which the target was evaluated, over both passes.
        nonfinite: Reference draws lost to non-finite values plus proposals refused for them, over both passes.
    """

    particles: Particles
    schedule: Schedule
    finished: bool
    chain_variance: Tensor
    acceptance: tuple[float, ...]
    evaluations: int
    nonfinite: int


@dataclass(frozen=True)
class _Settings:
    path: TemperedPath
    kernel: Kernel
    num_islands: int
    num_chains: int
    chain_length: int
    conditional_ess: float
    max_temperatures: int
    dtype: torch.dtype
    generator: torch.Generator


@dataclass
class _Log:
    """What a pass writes down as it goes."""

    betas: list[float] = field(default_factory=list)
    step_sizes: list[float] = field(default_factory=list)
    scales: list[Tensor] = field(default_factory=list)
    acceptance: list[float] = field(default_factory=list)
    evaluations: int = 0
    nonfinite: int = 0


def waste_free_smc(
    path: TemperedPath,
    *,
    kernel: Kernel,
    num_chains: int,
    chain_length: int,
    generator: torch.Generator,
    num_islands: int = 16,
    schedule: Schedule | None = None,
    two_pass: bool = False,
    conditional_ess: float = 0.7,
    max_temperatures: int = 1000,
    dtype: torch.dtype = torch.float64,
) -> WasteFreeRun:
    """Move ``num_islands * num_chains * chain_length`` particles from the reference to the target.

    Arguments:
        path: Reference and target.
        kernel: An exact kernel.
        num_chains: Ancestors ``M`` of each island at each temperature.
        chain_length: States ``P`` of each chain, its ancestor included.
        generator: Source of randomness; its device is where the particles live.
        num_islands: Equal contiguous blocks that are resampled each by itself.
        schedule: Repeat this schedule with everything frozen, so that ``E[mean weight] = Z`` exactly.
        two_pass: Run an adaptive pass, then a frozen one with fresh randomness, and return the latter.
        conditional_ess: Fraction in (0, 1) that sets the next temperature, pooled over islands.
        max_temperatures: Give up after so many.
        dtype: Dtype of the particles.

    Raises:
        ValueError: If arguments do not fit, or the target is finite at none of the reference draws.
    """
    if not kernel.exact:
        raise ValueError(f"Expected an exact kernel; got {type(kernel).__name__}.")
    for name, value, least in (("num_islands", num_islands, 1), ("num_chains", num_chains, 2)):
        if value < least:
            raise ValueError(f"Expected {name} to be at least {least}; got {value}.")
    if chain_length < 2:
        raise ValueError(f"Expected chain_length to be at least 2; got {chain_length}.")
    if not 0.0 < conditional_ess < 1.0:
        raise ValueError(f"Expected conditional_ess in (0, 1); got {conditional_ess}.")
    if schedule is not None and (two_pass or not schedule.betas or schedule.betas[-1] != 1.0):
        raise ValueError("Expected a schedule that ends at temperature 1, and not two_pass=True with it.")
    settings = _Settings(
        path, kernel, num_islands, num_chains, chain_length, conditional_ess, max_temperatures, dtype, generator
    )
    first = _run(settings, schedule, spent=0, lost=0)
    if not (two_pass and first.finished):
        return first
    return _run(settings, first.schedule, spent=first.evaluations, lost=first.nonfinite)


def _run(settings: _Settings, frozen: Schedule | None, *, spent: int, lost: int) -> WasteFreeRun:
    log = _Log(evaluations=spent, nonfinite=lost)
    points, alive = _start(settings, log)
    log_z = torch.zeros(settings.num_islands, dtype=torch.float64, device=alive.device)
    variance, beta = torch.zeros_like(log_z), 0.0
    for k in range(settings.max_temperatures if frozen is None else len(frozen)):
        slope = points.log_target - points.log_reference
        slope = torch.where(alive & ~slope.isnan(), slope, torch.full_like(slope, -math.inf))
        if frozen is None:
            size = len(slope) // settings.num_islands
            reached = next_beta(log_z.repeat_interleave(size), slope, beta, settings.conditional_ess)
        else:
            reached = frozen.betas[k]
        log.betas.append(reached)
        blocks = ((reached - beta) * slope).reshape(settings.num_islands, -1)
        mean = torch.logsumexp(blocks, -1) - math.log(blocks.shape[1])
        # The reference draws of the first temperature are chains of length one.
        variance = variance + _chain_variance(blocks, mean, 1 if k == 0 else settings.chain_length)
        log_z, beta = log_z + mean, reached
        points = _move(settings, points.take(_resample(settings, blocks)), beta, frozen, k, log)
        alive = log_z.isfinite().repeat_interleave(blocks.shape[1])
        if beta == 1.0:
            break
    return _result(settings, points, log_z, variance, beta, log)


def _start(settings: _Settings, log: _Log) -> tuple[Points, Tensor]:
    n = settings.num_islands * settings.num_chains * settings.chain_length
    x = settings.path.reference.sample(n, generator=settings.generator)
    x = x.to(device=settings.generator.device, dtype=settings.dtype)
    points = settings.path.evaluate(x, x)
    lost = is_broken(State(x, points.log_target, points.score_target)) | ~points.log_reference.isfinite()
    log.evaluations += n
    log.nonfinite += int(lost.sum())
    if bool((lost | points.log_target.isneginf()).all()):
        raise ValueError(f"Expected a finite target density at some of the {n} reference draws; got none.")
    return points, ~lost


def _chain_variance(log_weight: Tensor, mean: Tensor, length: int) -> Tensor:
    """Squared standard error of the log mean weight, from the means of chains ``(islands, chains, length)``."""
    ratio = (log_weight - mean.unsqueeze(-1)).exp()
    chains = ratio.reshape(len(mean), -1, length).mean(-1)
    return chains.var(-1) / chains.shape[-1]


def _resample(settings: _Settings, log_weight: Tensor) -> Tensor:
    """Indices of the ancestors of all islands; one that died keeps particles, and its weight zero."""
    dead = log_weight.isneginf().all(-1, keepdim=True)
    safe = torch.where(dead, torch.zeros_like(log_weight), log_weight)
    index = systematic_resample(safe, settings.num_chains, generator=settings.generator)
    islands = torch.arange(settings.num_islands, device=index.device)
    return (index + log_weight.shape[1] * islands.unsqueeze(-1)).reshape(-1)


def _move(settings: _Settings, points: Points, beta: float, frozen: Schedule | None, k: int, log: _Log) -> Points:
    """Run the chains and gather all their states, island by island and chain by chain."""
    kernel, generator = settings.kernel, settings.generator
    density = settings.path.density(beta)
    state = kernel.refresh(density.state(points), generator=generator)
    scale = spread(settings.path.space, points.x) if frozen is None else frozen.scales[k]
    tuner = RobbinsMonro(kernel.target_acceptance)
    if frozen is None:
        tuned = tuner.init(log.step_sizes[-1] if log.step_sizes else _first(settings, state, density, scale))
    else:
        tuned = tuner.init(frozen.step_sizes[k])
    visited, total = [points], 0.0
    for _ in range(settings.chain_length - 1):
        params = KernelParams(scale.new_tensor(tuner.step_size(tuned)), scale)
        before = state
        state, info = kernel.step(state, density, params, generator)
        points = density.points(state, points)
        visited.append(points)
        acceptance = float(info.acceptance.mean())
        total += acceptance
        log.nonfinite += int((info.nonfinite & before.log_prob.isfinite()).sum())
        if frozen is None:
            tuned = tuner.update(tuned, acceptance)
    log.evaluations += density.evaluations
    log.acceptance.append(total / (settings.chain_length - 1))
    log.step_sizes.append(tuner.step_size(tuned))
    log.scales.append(scale)
    return Points(*(torch.stack(values, 1).flatten(0, 1) for values in zip(*visited, strict=True)))


def _first(settings: _Settings, state: State, density: TemperedDensity, scale: Tensor) -> float:
    params = KernelParams(scale.new_tensor(0.5 * settings.path.space.dof**-0.25), scale)
    state = state.take(state.log_prob.isfinite())
    step_size, _ = reasonable_step_size(settings.kernel, state, density, params, generator=settings.generator)
    density.last = None
    return step_size


def _result(
    settings: _Settings, points: Points, log_z: Tensor, variance: Tensor, beta: float, log: _Log
) -> WasteFreeRun:
    count = len(log.betas)
    particles = Particles(
        points.x,
        log_z.repeat_interleave(len(points.x) // settings.num_islands),
        replicates=settings.num_islands,
        has_normalizer=beta == 1.0,
    )
    moves = (settings.chain_length - 1,) * count
    schedule = Schedule(tuple(log.betas), tuple(log.step_sizes), tuple(log.scales), moves, (True,) * count)
    return WasteFreeRun(
        particles, schedule, beta == 1.0, variance, tuple(log.acceptance), log.evaluations, log.nonfinite
    )
