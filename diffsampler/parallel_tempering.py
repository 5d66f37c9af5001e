r"""Non-reversible parallel tempering.

A *system* holds one replica at each temperature :math:`0 = \beta_0 < \dots < \beta_K = 1` of the geometric path

.. math:: \log \gamma_\beta(x) = (1 - \beta) \log p_0(x) + \beta \log \rho(x).

One scan moves every replica by a Markov kernel at its own temperature (replicas at :math:`\beta = 0` are drawn anew
from the reference), then proposes to exchange the temperatures of neighbours, the pairs :math:`(k, k+1)` with even
:math:`k` in even scans and with odd :math:`k` in odd ones, with probability

.. math:: \min\bigl(1, e^{(\beta_{k+1} - \beta_k)(d_k - d_{k+1})}\bigr), \qquad d = \log\rho(x) - \log p_0(x).

The deterministic alternation makes a replica travel with momentum: the rate of round trips tends to
:math:`1 / (2 + 2 \sum_k r_k / (1 - r_k))` with the rejection rates :math:`r_k`, instead of falling with the number of
temperatures. The ladder that maximizes it has equal rejection rates; their sum is the communication barrier
:math:`\Lambda`, and about :math:`2\Lambda + 1` temperatures are best.

The normalizer follows from the stepping stones of each system,

.. math:: \log\hat Z_s = \sum_k \log\frac{1}{T} \sum_t e^{(\beta_{k+1} - \beta_k) d_{k,t}},

which is consistent in the number of scans, not unbiased: the scans of a system are dependent. Systems are independent
of each other, which gives the error bar. It fails where no replica finds a mode at any temperature on its way from the
reference: round trips are then frequent, rejections small, and the answer wrong. A barrier much larger than half the
number of temperatures shows as few round trips.

References:
    Non-reversible parallel tempering: a scalable highly parallel MCMC scheme (Syed, Bouchard-Côté, Deligiannidis &
    Doucet, 2022), https://arxiv.org/abs/1905.02939
    Improving marginal likelihood estimation for Bayesian phylogenetic model selection (Xie, Lewis, Fan, Kuo & Chen,
    2011), https://doi.org/10.1093/sysbio/syq085 (stepping stones)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from diffsampler.kernel import Kernel, KernelParams
from diffsampler.kernels.adaptation import PooledVariance, VarianceState
from diffsampler.smc import smc
from diffsampler.tempering import Points, Schedule, TemperedPath

__all__ = ["Ladder", "TemperingRun", "parallel_tempering", "pilot_ladder", "respace", "swap_probability"]


class Ladder(NamedTuple):
    """Temperatures and kernel parameters of all levels, float64."""

    betas: Tensor
    """``(L,)``, from 0 to 1."""
    step_sizes: Tensor
    """``(L,)``; the first is not used."""
    scales: Tensor
    """``(L, D)`` or ``(L, 1)``."""


@dataclass(frozen=True)
class TemperingRun:
    """What :func:`parallel_tempering` returns, for ``S`` systems, ``T`` recorded scans and ``L`` temperatures.

    Arguments:
        x: States at temperature 1, ``(S, T, D)``.
        slopes: ``log target - log reference`` at every level, ``(S, T, L)``, float64.
        ladder: The frozen ladder.
        rejection: Mean rejection probability of each swap, ``(L - 1,)``.
        acceptance: Mean acceptance probability of the kernel at each level, ``(L,)``; NaN at the reference.
        round_trips: Replicas that came from the reference to the target since they last were there, ``(S,)``.
        evaluations: Points at which the target was evaluated, tuning included.
        nonfinite: Proposals refused for non-finite values while recording.
    """

    x: Tensor
    slopes: Tensor
    ladder: Ladder
    rejection: Tensor
    acceptance: Tensor
    round_trips: Tensor
    evaluations: int
    nonfinite: int

    @property
    def barrier(self) -> float:
        """Communication barrier, the sum of the rejection rates; about twice as many temperatures are best."""
        return float(self.rejection.sum())

    @property
    def expected_round_trip_rate(self) -> float:
        """Round trips per scan and system that ideal kernels would make at these rejection rates."""
        odds = self.rejection / (1.0 - self.rejection).clamp_min(1e-300)
        return 1.0 / (2.0 + 2.0 * float(odds.sum()))

    @property
    def log_normalizers(self) -> Tensor:
        """Stepping-stone estimate of ``log Z`` from each system, ``(S,)``, float64."""
        steps = self.slopes[..., :-1] * self.ladder.betas.diff()
        steps = torch.where(steps.isnan(), torch.full_like(steps, -math.inf), steps)
        return (torch.logsumexp(steps, 1) - math.log(steps.shape[1])).sum(-1)


@dataclass(frozen=True)
class _Run:
    """What does not change from scan to scan."""

    path: TemperedPath
    kernel: Kernel
    num_systems: int
    num_moves: int
    dtype: torch.dtype
    generator: torch.Generator


class _Replicas(NamedTuple):
    """All replicas of all systems; ``level (S, L)`` says which temperature each has."""

    points: Points
    level: Tensor


class _Scan(NamedTuple):
    """What one scan tells, level by level."""

    x: Tensor
    """States in the order of levels, ``(S, L, D)``."""
    slope: Tensor
    """``(S, L)``."""
    acceptance: Tensor
    """``(L,)``."""
    rejection: Tensor
    """``(L - 1,)``."""
    nonfinite: int


class _Tuning(NamedTuple):
    """Running sums of a tuning round."""

    rejection: Tensor
    mean: Tensor
    square: Tensor
    size: int


def parallel_tempering(
    path: TemperedPath,
    ladder: Ladder,
    *,
    kernel: Kernel,
    num_scans: int,
    generator: torch.Generator,
    num_systems: int = 16,
    tuning_rounds: int = 7,
    num_moves: int = 1,
    dtype: torch.dtype = torch.float64,
) -> TemperingRun:
    """Tune the ladder in rounds of 2, 4, 8, ... scans, freeze it, and record.

    Arguments:
        path: Reference and target.
        ladder: Where to start, such as :func:`pilot_ladder` gives.
        kernel: An exact kernel.
        num_scans: Scans to record.
        generator: Source of randomness; its device is where the replicas live.
        num_systems: Independent systems ``S``; all ``S * L`` replicas are moved in one batch.
        tuning_rounds: Rounds of tuning, at the end of each of which temperatures are spaced anew; 0 for none, which
            also leaves out all burn-in.
        num_moves: Kernel steps between swaps.
        dtype: Dtype of the replicas.

    Raises:
        ValueError: If arguments do not fit, or the target is finite at none of the reference draws.
    """
    _check(ladder, kernel, num_scans=num_scans, num_systems=num_systems, num_moves=num_moves, rounds=tuning_rounds)
    run = _Run(path, kernel, num_systems, num_moves, dtype, generator)
    replicas = _start(run, ladder)
    evaluations = len(replicas.points.x)
    for k in range(tuning_rounds):
        replicas, ladder, spent = _tune(run, replicas, ladder, num_scans=2 ** (k + 1))
        evaluations += spent
    heading = torch.zeros_like(replicas.level, dtype=torch.bool)
    trips = torch.zeros(num_systems, dtype=torch.long, device=heading.device)
    scans = []
    for t in range(num_scans):
        replicas, scan, spent = _scan(run, replicas, ladder, parity=t % 2)
        evaluations += spent
        scans.append(scan._replace(x=scan.x[:, -1]))
        heading = heading | (replicas.level == 0)
        arrived = heading & (replicas.level == len(ladder.betas) - 1)
        trips = trips + arrived.sum(-1)
        heading = heading & ~arrived
    return TemperingRun(
        x=torch.stack([scan.x for scan in scans], 1),
        slopes=torch.stack([scan.slope for scan in scans], 1),
        ladder=ladder,
        rejection=torch.stack([scan.rejection for scan in scans]).mean(0),
        acceptance=torch.stack([scan.acceptance for scan in scans]).mean(0),
        round_trips=trips,
        evaluations=evaluations,
        nonfinite=sum(scan.nonfinite for scan in scans),
    )


def pilot_ladder(
    path: TemperedPath,
    *,
    kernel: Kernel,
    generator: torch.Generator,
    num_levels: int | None = None,
    particles: int = 512,
    conditional_ess: float = 0.5,
    dtype: torch.dtype = torch.float64,
) -> Ladder:
    """A first ladder from the temperatures, step sizes and metrics of a short adaptive SMC run.

    Steps of equal conditional ESS have nearly equal rejection rates: one half leaves 44 % where ``d`` is Gaussian,
    close to the best. Only numbers are taken from the run; its particles are thrown away.

    Raises:
        ValueError: If the run does not reach temperature 1, which an improper target brings about.
    """
    result = smc(
        path,
        n=particles,
        generator=generator,
        num_islands=1,
        kernel=kernel,
        conditional_ess=conditional_ess,
        resample_below=1.0,
        max_moves=6,
        dtype=dtype,
    )
    if not result.finished:
        raise ValueError(f"Expected a proper target; a pilot run got stuck at temperature {result.beta}.")
    ladder = _from_schedule(result.schedule)
    if num_levels is None:
        return ladder
    if num_levels < 2:
        raise ValueError(f"Expected num_levels to be at least 2; got {num_levels}.")
    place = torch.linspace(0.0, len(ladder.betas) - 1.0, num_levels, dtype=torch.float64, device=ladder.betas.device)
    return _at(ladder, place)


def respace(betas: Tensor, rejection: Tensor) -> Tensor:
    """Places in the old ladder, as fractional levels ``(L,)``, at which all rejection rates would be equal.

    The rejection collected up to a temperature is interpolated linearly and cut into equal parts.

    Arguments:
        betas: Temperatures ``(L,)``; only their number matters.
        rejection: Rejection rate of each swap, ``(L - 1,)``.
    """
    # A floor keeps the places apart where swaps never fail.
    collected = torch.nn.functional.pad((rejection + 1e-3).cumsum(0), (1, 0))
    last = len(betas) - 1
    wanted = collected[-1] * torch.arange(last + 1, device=betas.device) / last
    left = torch.searchsorted(collected, wanted, right=True).sub(1).clamp(0, last - 1)
    fraction = (wanted - collected[left]) / (collected[left + 1] - collected[left])
    return (left + fraction).clamp(0.0, float(last))


def swap_probability(slope: Tensor, betas: Tensor) -> Tensor:
    """Acceptance probability of exchanging neighbours, ``(..., L - 1)``, from ``d (..., L)`` in the order of levels."""
    log_accept = betas.diff() * (slope[..., :-1] - slope[..., 1:])
    # Where neither has a target density, or a value is not a number, nobody moves.
    return torch.where(log_accept.isnan(), torch.zeros_like(log_accept), log_accept.clamp_max(0.0).exp())


def _check(ladder: Ladder, kernel: Kernel, *, num_scans: int, num_systems: int, num_moves: int, rounds: int) -> None:
    betas = ladder.betas
    rises = betas.ndim == 1 and len(betas) > 1 and bool((betas.diff() > 0).all())
    if not rises or float(betas[0]) != 0.0 or float(betas[-1]) != 1.0:
        raise ValueError(f"Expected betas to increase from 0 to 1; got {betas.tolist()}.")
    if not kernel.exact:
        raise ValueError(f"Expected an exact kernel; got {type(kernel).__name__}.")
    for name, value in (("num_scans", num_scans), ("num_systems", num_systems), ("num_moves", num_moves)):
        if value < 1:
            raise ValueError(f"Expected {name} to be a positive integer; got {value}.")
    if rounds < 0:
        raise ValueError(f"Expected tuning_rounds not to be negative; got {rounds}.")


def _start(run: _Run, ladder: Ladder) -> _Replicas:
    """Every replica starts at a draw of the reference; draws without a finite density give way to others."""
    shape = (run.num_systems, len(ladder.betas))
    x = _reference_draws(run, shape[0] * shape[1])
    points = run.path.evaluate(x, x)
    good = points.log_target.isfinite() & points.score_target.isfinite().all(-1)
    index = torch.arange(len(x), device=x.device)
    found = index[good]
    if not len(found):
        raise ValueError(f"Expected a finite target density at some of the {len(x)} reference draws; got none.")
    stand_in = torch.randint(len(found), (len(x),), generator=run.generator, device=x.device)
    points = points.take(torch.where(good, index, found[stand_in]))
    return _Replicas(points, torch.arange(shape[1], device=x.device).expand(shape).contiguous())


def _reference_draws(run: _Run, n: int) -> Tensor:
    x = run.path.reference.sample(n, generator=run.generator)
    return x.to(device=run.generator.device, dtype=run.dtype)


def _scan(run: _Run, replicas: _Replicas, ladder: Ladder, *, parity: int) -> tuple[_Replicas, _Scan, int]:
    points, acceptance, nonfinite, spent = _explore(run, replicas, ladder)
    level, betas = replicas.level, ladder.betas
    systems, count = level.shape
    place = level.argsort(-1)
    slope = (points.log_target - points.log_reference).reshape(systems, count).gather(1, place)
    probability = swap_probability(slope, betas)
    uniform = torch.rand(probability.shape, generator=run.generator, dtype=betas.dtype, device=betas.device)
    step = torch.arange(count - 1, device=betas.device)
    swapped = (uniform < probability) & (step % 2 == parity)
    up, down = torch.nn.functional.pad(swapped, (0, 1)), torch.nn.functional.pad(swapped, (1, 0))
    index = torch.arange(count, device=betas.device) + up.long() - down.long()
    x = points.x.reshape(systems, count, -1)
    x = x.gather(1, place.unsqueeze(-1).expand_as(x))
    scan = _Scan(x, slope, acceptance, 1.0 - probability.mean(0), nonfinite)
    return _Replicas(points, place.gather(1, index).argsort(-1)), scan, spent


def _explore(run: _Run, replicas: _Replicas, ladder: Ladder) -> tuple[Points, Tensor, int, int]:
    """Move all replicas at their own temperatures in one batch; the hottest ones are drawn anew."""
    level = replicas.level.reshape(-1)
    moving, resting = (level > 0).nonzero().squeeze(-1), (level == 0).nonzero().squeeze(-1)
    level = level[moving]
    density = run.path.density(ladder.betas[level])
    params = KernelParams(ladder.step_sizes[level], ladder.scales[level])
    points = replicas.points.take(moving)
    state = run.kernel.refresh(density.state(points), generator=run.generator)
    acceptance = torch.zeros_like(ladder.betas)
    nonfinite = 0
    for _ in range(run.num_moves):
        state, info = run.kernel.step(state, density, params, run.generator)
        points = density.points(state, points)
        acceptance = acceptance.index_add(0, level, info.acceptance.to(acceptance))
        nonfinite += int(info.nonfinite.sum())
    acceptance = acceptance / (run.num_systems * run.num_moves)
    acceptance[0] = math.nan
    x = _reference_draws(run, run.num_systems)
    fresh = run.path.evaluate(x, x)
    back = torch.cat([moving, resting]).argsort()
    points = Points(*(torch.cat(pair)[back] for pair in zip(points, fresh, strict=True)))
    return points, acceptance, nonfinite, density.evaluations + len(x)


def _tune(run: _Run, replicas: _Replicas, ladder: Ladder, *, num_scans: int) -> tuple[_Replicas, Ladder, int]:
    """One round: step sizes follow the acceptance of each level, then temperatures and metrics are renewed."""
    moments = torch.zeros_like(replicas.points.x[: len(ladder.betas)], dtype=torch.float64)
    sums, spent = _Tuning(torch.zeros_like(ladder.betas[1:]), moments, moments, 0), 0
    for t in range(num_scans):
        replicas, scan, cost = _scan(run, replicas, ladder, parity=t % 2)
        spent += cost
        # Robbins and Monro, each level for itself and afresh in each round: its temperature has moved.
        error = scan.acceptance - run.kernel.target_acceptance
        error[0] = 0.0
        ladder = ladder._replace(step_sizes=ladder.step_sizes * (2.0 * (t + 1) ** -0.6 * error).exp())
        sums = _merge(sums, scan)
    if sums.size >= 32:
        pool = PooledVariance(run.path.space)
        each = [pool.scale(VarianceState(sums.size, *pair)) for pair in zip(sums.mean, sums.square, strict=True)]
        ladder = _rescale(ladder, torch.stack(each))
    return replicas, _at(ladder, respace(ladder.betas, sums.rejection / num_scans)), spent


def _merge(sums: _Tuning, scan: _Scan) -> _Tuning:
    """Add a scan to rejection rates and to the variance of each level (Chan, Golub & LeVeque, 1979)."""
    x = scan.x.double()
    size, mean = x.shape[0], x.mean(0)
    total = sums.size + size
    delta = mean - sums.mean
    square = sums.square + (x - mean).square().sum(0) + delta.square() * (sums.size * size / total)
    return _Tuning(sums.rejection + scan.rejection, sums.mean + delta * (size / total), square, total)


def _rescale(ladder: Ladder, scales: Tensor) -> Ladder:
    """New metrics, with step sizes that keep the moves as long as they were on the geometric mean."""
    ratio = (ladder.scales.log().mean(-1) - scales.log().mean(-1)).exp()
    return Ladder(ladder.betas, ladder.step_sizes * ratio, scales)


def _at(ladder: Ladder, place: Tensor) -> Ladder:
    """The ladder at fractional levels ``place``: temperatures linearly, the others in their logarithms."""
    left = place.floor().long().clamp(0, len(ladder.betas) - 2)
    fraction = place - left
    betas = torch.lerp(ladder.betas[left], ladder.betas[left + 1], fraction)
    betas[0], betas[-1] = 0.0, 1.0
    log_steps, log_scales = ladder.step_sizes.log(), ladder.scales.log()
    log_steps = torch.lerp(log_steps[left], log_steps[left + 1], fraction)
    log_scales = torch.lerp(log_scales[left], log_scales[left + 1], fraction.unsqueeze(-1))
    return Ladder(betas, log_steps.exp(), log_scales.exp())


def _from_schedule(schedule: Schedule) -> Ladder:
    scales = torch.stack([schedule.scales[0], *schedule.scales]).double()
    betas = scales.new_tensor([0.0, *schedule.betas])
    return Ladder(betas, scales.new_tensor([schedule.step_sizes[0], *schedule.step_sizes]), scales)
