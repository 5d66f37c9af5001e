r"""Learned refinement of a pilot: a sampler that draws any number of independent weighted particles cheaply.

1. Coordinates and a mixture in them are chosen by held-out likelihood (:mod:`diffsampler.refinement.frames`).
2. The chain is built on that mixture's exact denoiser, with noise levels that lose the same at every step; before any
   training it samples the mixture.
3. The particles are renewed by the chain's own draws, resampled with weights :math:`w^\eta` (:math:`\eta` so large
   that a quarter of the draws count) and moved by MALA, and the mixture is fitted again.
4. Where the mixture is poor, bridge likelihood (no simulation) teaches the network the difference.
5. The log-variance loss on fresh and replayed paths polishes.

Every stage is kept only if it lowers the symmetric gap :math:`E_B[\log w] - E_F[\log w]`, the sum of the two
Kullback-Leibler divergences between the path measures: training can stop helping but not harm.

References:
    Adaptive importance sampling in general mixture classes (Cappe, Douc, Guillin, Marin, Robert, 2008),
    https://arxiv.org/abs/0710.4242
    Improved sampling via learned diffusions (Richter, Berner, 2024), https://arxiv.org/abs/2307.01198
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple, final

import torch
from torch import Tensor

from diffsampler.denoiser import Denoiser
from diffsampler.estimators import effective_sample_size, importance_log_normalizer, systematic_resample
from diffsampler.kernel import KernelParams
from diffsampler.kernels.adaptation import RobbinsMonro
from diffsampler.kernels.langevin import MALA
from diffsampler.methods.refined import RefinedProcess
from diffsampler.objective import BridgeLikelihood, LogVariance, Objective
from diffsampler.pilot.transport import TransportMap
from diffsampler.refinement.course import Course
from diffsampler.refinement.frames import Frame, candidate_frames, make_frame, rank_frames
from diffsampler.refinement.mixture_fit import PRODUCT_SIZES, choose_denoiser, fit_product_mixture, tuned_levels
from diffsampler.refinement.profiles import profile_draws
from diffsampler.sampler import DiffusionSampler
from diffsampler.target import Target
from diffsampler.trajectory import simulate, simulate_backward

__all__ = ["Quality", "Refinement", "refine", "tempering_exponent"]

NUM_STEPS = 32
LOCAL_SHARE = 0.35
"""Smallest noise level relative to the target's smallest local scale."""
NOISE_MAX = 1.0
"""Largest noise level in units of the target's standard deviation; the chain starts at the smoothed mixture."""
CHECK_PATHS = 2048
RENEWED = 8192
MOVES = 4
SMALL_GAP = 0.02
"""Symmetric gap in nats below which nothing is left to learn."""
NEAR_TIE = 0.1
"""Held-out log likelihoods this close, in nats, do not decide between coordinates."""
LARGE_GAP = 1.0
"""Symmetric gap above which the mixture is poor and simulation-free training comes first."""
BRIDGE_SHARE, BRIDGE_COUNT, BRIDGE_RATE = 0.5, 300, 2e-3
POLISH_COUNT, POLISH_RATE = 80, 2e-3
"""The rate is for two dimensions; it falls with the square root of the dimension, as the gradient's noise grows."""
POLISH_ROUNDS = 3
BATCH = 256
UNLIMITED = 1_000_000


class Quality(NamedTuple):
    """How far the forward and backward path laws are apart."""

    gap: float
    """``E_B[log w] - E_F[log w]``, nats; infinite where it cannot be computed."""
    ess: float
    """Effective sample size of forward draws, a fraction."""


@final
class Refinement:
    """The chain that is being refined, its coordinates and its bank of particles.

    Arguments:
        frame: Coordinates.
        denoiser: Of the mixture fitted in them.
        bank: Equally weighted particles in the frame's coordinates, shape ``(n, D)``, float64.
        generator: Source of all randomness.
        dtype: Arithmetic of the process.
    """

    def __init__(
        self, frame: Frame, denoiser: Denoiser, bank: Tensor, *, generator: torch.Generator, dtype: torch.dtype
    ) -> None:
        self.frame = frame
        self.generator = generator
        self.dtype = dtype
        order = torch.randperm(bank.shape[0], generator=generator, device=bank.device)
        held = max(64, bank.shape[0] // 8)
        # Held-out particles judge every stage; they are renewed with the bank but never trained on.
        self.held, self.bank = bank[order[:held]], bank[order[held:]]
        self.local_scale = _local_scale(frame.standard, self.bank)
        self.sampler = self._build(denoiser)
        self.quality = self.judge(self.sampler)
        self.history: list[dict[str, float]] = []
        self.stages: list[str] = []

    def _seed(self) -> int:
        return int(torch.randint(2**31, (), generator=self.generator, device=self.generator.device))

    def _build(self, denoiser: Denoiser) -> DiffusionSampler:
        low = LOCAL_SHARE * float(self.local_scale.min().clamp(0.01, 1.0))
        # Closed forms of the mixture in single precision are what the chain will use: the schedule sees the same.
        schedule = tuned_levels(
            denoiser.float(), NUM_STEPS, noise_min=low, noise_max=NOISE_MAX, generator=self.generator
        )
        process = RefinedProcess(self.frame.standard.dim, schedule, denoiser, seed=self._seed())
        sampler = DiffusionSampler(self.frame.standard, process)
        return sampler.to(device=self.bank.device, dtype=self.dtype)

    def judge(self, sampler: DiffusionSampler) -> Quality:
        """Symmetric gap and effective sample size on fresh paths and held-out particles."""
        process, target = sampler.process, sampler.target
        forward = simulate(process, target, CHECK_PATHS, generator=self.generator).log_weight
        index = torch.randint(self.held.shape[0], (CHECK_PATHS,), generator=self.generator, device=self.held.device)
        ends = self.held[index].to(self.dtype)
        backward = simulate_backward(process, target, ends, generator=self.generator).log_weight
        # A negative one says that the held-out particles are no draws of the target, and is no merit.
        gap = abs(float(backward.mean() - forward.mean()))
        if not math.isfinite(gap):
            return Quality(math.inf, 0.0)
        return Quality(gap, effective_sample_size(forward) / CHECK_PATHS)

    def renew(self, *, refit: bool) -> None:
        """Renew the bank by the chain's own draws; ``refit`` also fits the mixture again and starts a new chain."""
        particles = self.sampler.sample(RENEWED, seed=self._seed())
        exponent = tempering_exponent(particles.log_weight)
        index = systematic_resample(exponent * particles.log_weight, generator=self.generator)
        points = _move(self.frame.standard, particles.x[index].double(), self.local_scale, self.generator)
        order = torch.randperm(points.shape[0], generator=self.generator, device=points.device)
        points = points[order]
        if exponent < 0.95:
            # Tempered weights leave half of the chain's own error in; older particles do not share it.
            old = torch.cat([self.held, self.bank])
            pick = torch.randint(old.shape[0], (RENEWED // 2,), generator=self.generator, device=old.device)
            points = torch.cat([points, old[pick]])
            points = points[torch.randperm(points.shape[0], generator=self.generator, device=points.device)]
        held = points.shape[0] // 8
        self.held, self.bank = points[:held], points[held:]
        self.quality = self.judge(self.sampler)
        if refit:
            half = self.bank.shape[0] // 2
            denoiser, _ = choose_denoiser(self.bank[:half], self.bank[half:], generator=self.generator)
            new = self._build(denoiser)
            self._keep_better(new, "mixture")

    def _keep_better(self, new: DiffusionSampler, stage: str) -> bool:
        quality = self.judge(new)
        better = quality.gap < self.quality.gap
        if better:
            self.sampler, self.quality = new, quality
        self.stages.append(f"{stage}: gap {quality.gap:.3g}{'' if better else ' (not kept)'}")
        return better

    def train(
        self,
        objective: Objective,
        *,
        steps: int,
        rate: float,
        spent: Callable[[], float],
        callback: Callable[[dict[str, float]], None],
    ) -> bool:
        """Train a stage; the parameters go back to where they were if it did not help."""
        sampler = self.sampler
        before = {name: value.clone() for name, value in sampler.process.state_dict().items()}
        sampler.objective = objective
        sampler.fit(
            steps=steps,
            batch_size=BATCH,
            learning_rate=rate,
            seed=self._seed(),
            bank=self.bank,
            spent=spent,
            callback=callback,
        )
        self.history += sampler.history
        sampler.history = self.history
        better = self._keep_better(sampler, type(objective).__name__)
        if not better:
            sampler.process.load_state_dict(before)
        return better


def tempering_exponent(log_weight: Tensor, *, share: float = 0.25) -> float:
    r"""Largest :math:`\eta \le 1` whose weights :math:`w^\eta` have an effective sample size of ``share`` of all."""
    log_weight = log_weight.double()
    wanted = share * log_weight.shape[0]
    if effective_sample_size(log_weight) >= wanted:
        return 1.0
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = 0.5 * (low + high)
        enough = effective_sample_size(middle * log_weight) >= wanted
        low, high = (middle, high) if enough else (low, middle)
    return low


def _local_scale(target: Target, points: Tensor) -> Tensor:
    """Scale of the density about its particles, by the inverse size of the score, shape ``(D,)``."""
    return 1.0 / target.score(points).double().square().mean(0).sqrt()


def _move(target: Target, x: Tensor, scale: Tensor, generator: torch.Generator) -> Tensor:
    """A few Metropolis-adjusted Langevin moves, which take duplicates apart."""
    kernel = MALA(target.space)
    search = RobbinsMonro(kernel.target_acceptance)
    step = search.init(0.5 * target.dim ** (-1.0 / 3.0))
    state = kernel.init(x, target.log_prob_and_score)
    for _ in range(MOVES):
        params = KernelParams(x.new_tensor(search.step_size(step)), scale)
        state, info = kernel.step(state, target.log_prob_and_score, params, generator)
        step = search.update(step, float(info.acceptance.mean()))
    return state.x


def refine(
    target: Target,
    x: Tensor,
    *,
    transport: TransportMap | None,
    centres: Tensor | None,
    generator: torch.Generator,
    dtype: torch.dtype,
    course: Course,
) -> tuple[Refinement, dict[str, Any]]:
    """Refine a pilot's equally weighted particles ``x (n, D)`` on Euclidean space.

    Arguments:
        target: The density.
        x: Particles, float64.
        transport: The pilot's map, or None.
        centres: Known modes, shape ``(M, D)``, or None.
        generator: Source of randomness.
        dtype: Arithmetic of the process.
        course: How long to train, and whom to tell.
    """
    spent = course.spent
    course.start("choosing coordinates", None)
    work, likelihoods = _first_chain(target, x, transport, centres, generator=generator, dtype=dtype, spent=spent)
    work.stages.append(f"mixture: gap {work.quality.gap:.3g}")
    if spent() < 0.75:
        work = _with_hidden_wells(target, x, work)
    if work.quality.gap > SMALL_GAP and spent() < 0.3:
        course.start("renewing particles", None)
        work.renew(refit=True)
    number = None if course.limited and course.steps is None else course.steps or 0
    if work.quality.gap > LARGE_GAP and spent() < 1.0:
        _teach(work, None if number is None else number // 2 or BRIDGE_COUNT, course)
        number = None if number is None else number - number // 2
    if number is None or number or work.quality.gap > SMALL_GAP:
        _polish(work, None if number is None else number or POLISH_COUNT, course)
    choices = {
        "coordinates": work.frame.name,
        "held_out_log_likelihood": likelihoods,
        "mixture": f"{type(work.sampler.process.denoiser).__name__} of {work.sampler.process.denoiser.components}",  # type: ignore[union-attr]
        "stages": work.stages,
        "gap": work.quality.gap,
        "num_steps": NUM_STEPS,
    }
    return work, choices


def _first_chain(
    target: Target,
    x: Tensor,
    transport: TransportMap | None,
    centres: Tensor | None,
    *,
    generator: torch.Generator,
    dtype: torch.dtype,
    spent: Callable[[], float],
) -> tuple[Refinement, dict[str, float]]:
    """The coordinates whose mixture predicts best; where several nearly tie, the one whose chain does best."""
    frames = candidate_frames(target, transport, x, generator=generator)
    ranked = rank_frames(frames, x, centres, generator=generator, stop=lambda: spent() > 0.15)
    highest = max(entry.value for entry in ranked)
    best: Refinement | None = None
    for entry in ranked:
        if entry.value > highest - NEAR_TIE and (best is None or spent() < 0.3):
            work = Refinement(entry.frame, entry.denoiser, entry.frame.to_frame(x), generator=generator, dtype=dtype)
            # The plainest comes first and stays unless another is better by more than the noise of the gap.
            if best is None or work.quality.gap < 0.8 * best.quality.gap - 0.005:
                best = work
    assert best is not None
    return best, {entry.frame.name: entry.value for entry in ranked}


def _with_hidden_wells(target: Target, x: Tensor, work: Refinement) -> Refinement:
    """A chain with the wells that profiles along the axes show and the particles do not, if there are any.

    Both chains estimate log Z without bias unless they miss mass, and what they miss only lowers the estimate. So a
    significantly larger estimate is the better one.
    """
    if work.frame.standard.dim == 1:
        return work
    z = profile_draws(work.frame.standard, work.bank[0], RENEWED // 2, generator=work.generator)
    if z is None:
        return work
    frame = make_frame(work.frame.name, target, work.frame.transport, work.frame.to_original(z))
    if frame is None:
        return work
    bank = frame.to_frame(work.frame.to_original(z))
    denoiser = fit_product_mixture(bank, max(PRODUCT_SIZES))
    none = bank.new_zeros(1)
    draws = denoiser.sample(bank.shape[0], generator=work.generator)
    weight = (frame.standard.log_prob(draws) - denoiser.log_prob(draws, none)).double()
    weight = torch.where(weight.isfinite(), weight, -torch.inf)
    if effective_sample_size(weight) < 0.2 * weight.shape[0]:
        return work
    seen, shown = work.sampler.sample(CHECK_PATHS).log_normalizer, importance_log_normalizer(weight)
    if not shown.value > seen.value + 4.0 * math.hypot(shown.std_error, seen.std_error) + 0.05:
        return work
    new = Refinement(frame, denoiser, bank, generator=work.generator, dtype=work.dtype)
    new.stages = [*work.stages, f"wells that no particle visited, log Z + {shown.value - seen.value:.3g}"]
    new.stages.append(f"mixture: gap {new.quality.gap:.3g}")
    return new


def _teach(work: Refinement, steps: int | None, course: Course) -> None:
    """Simulation-free training in two halves, the bank renewed by the chain after each; no number of steps: by time."""
    first = course.spent()
    for share in (0.5 * BRIDGE_SHARE, BRIDGE_SHARE):
        course.start("simulation-free training", steps)
        until = course.until(first + share * (1.0 - first))
        work.train(
            BridgeLikelihood(), steps=steps or UNLIMITED, rate=BRIDGE_RATE, spent=until, callback=course.callback
        )
        work.renew(refit=False)


def _polish(work: Refinement, steps: int | None, course: Course) -> None:
    """Log-variance training: one round of ``steps``, or rounds that fill a budget, slower after one that failed."""
    rate = POLISH_RATE * math.sqrt(2.0 / max(work.frame.standard.dim, 2))
    first = course.spent()
    for number in range(1, 2 if steps else POLISH_ROUNDS + 1):
        if course.spent() >= 1.0:
            break
        course.start("polishing", steps)
        until = course.until(1.0 if steps else first + number / POLISH_ROUNDS * (1.0 - first))
        kept = work.train(LogVariance(), steps=steps or UNLIMITED, rate=rate, spent=until, callback=course.callback)
        rate = rate if kept else rate / 3.0
