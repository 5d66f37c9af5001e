r"""Particles that run a process piece by piece, with resampling and moves between the pieces.

Cut the steps of a process with anchors :math:`\pi_k` at :math:`0 = k_0 < \dots < k_J = K`. Piece ``j`` carries every
particle from :math:`\pi_{k_{j-1}}` towards :math:`\pi_{k_j}` with the incremental weight

.. math::
   \log G_j = \log\pi_{k_j}(x_{k_j}) - \log\pi_{k_{j-1}}(x_{k_{j-1}})
      + \sum_{k_{j-1} \le k < k_j} [\log B_k - \log F_k],

then islands whose weights degenerate are resampled, and a Markov kernel moves all particles within
:math:`\pi_{k_j}`. A piece is itself a process (:class:`Stretch`), so that simulation, losses and gradients are those of
whole chains: the variance of :math:`\log G_j` is the log-variance loss of a stretch.

With :math:`W` the normalized weights *before* piece ``j`` the evidence of an island is
:math:`\log\hat Z = \sum_j \log \sum_i W_{j-1}^i G_j^i`, and :math:`E[\hat Z] = Z` for every threshold, number of
pieces and kernel that leaves its anchor invariant, as long as nothing is tuned on the way. Sums of
:math:`\log \frac1n \sum_i G_j^i` without resampling estimate nothing.

Cost: a move costs the kernel's evaluations and one more, as the next piece asks for the score where it starts.

References:
    Sequential Monte Carlo samplers (Del Moral, Doucet & Jasra, 2006), https://doi.org/10.1111/j.1467-9868.2006.00553.x
    Sequential controlled Langevin diffusions (Chen, Richter, Berner, Blessing, Neumann & Anandkumar, 2025),
    https://arxiv.org/abs/2412.07081
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from diffsampler.estimators import systematic_resample
from diffsampler.kernel import Kernel, KernelParams, State
from diffsampler.kernels.adaptation import RobbinsMonro, RobbinsMonroState, spread
from diffsampler.objective import segment_edges
from diffsampler.process import Gaussian, Process
from diffsampler.target import Target
from diffsampler.trajectory import Trajectory, simulate

__all__ = ["AnchorDensity", "Moves", "Population", "Stretch", "populate", "stretches"]

SCALE_MEMORY = 0.9
"""Share of the old scale that an update of the moves keeps."""


@final
class Stretch(Process):
    """The steps ``start..stop-1`` of a process with anchors, as a process from one anchor to another.

    It shares the parameters of the process. Its first states are given (``simulate(..., initial=...)``) unless it
    starts where the process does.

    Arguments:
        base: The whole process; points only, with anchors.
        start: First step.
        stop: The step after the last one.

    Raises:
        ValueError: If the process has no anchors, carries more than points, or has no such steps.
    """

    def __init__(self, base: Process, start: int, stop: int) -> None:
        name = type(base).__name__
        if not 0 <= start < stop <= base.num_steps:
            raise ValueError(f"Expected 0 <= start < stop <= {base.num_steps}; got {start} and {stop}.")
        if not base.has_anchors:
            raise ValueError(f"Expected a process with anchor densities; {name} has none.")
        generator = torch.Generator(next(base.parameters()).device).manual_seed(0)
        with torch.no_grad():
            state = base.sample_initial(1, generator=generator)
        if base.has_shift or state.shape[-1] != base.space.dim:
            raise ValueError(f"Expected a process whose states are points; those of {name} carry more.")
        super().__init__(
            base.space,
            stop - start,
            needs_score=base.needs_score,
            detach_score=base.detach_score,
            learns_backward=base.learns_backward,
            learns_initial=base.learns_initial if start == 0 else base.learns_anchors,
            has_anchors=True,
            learns_anchors=base.learns_anchors,
            learns_carried=base.learns_anchors if stop < base.num_steps else base.learns_carried,
        )
        self.base = base
        self.start = start
        self.stop = stop

    def sample_initial(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        if self.start > 0:
            raise ValueError(f"Expected initial states for a stretch that starts at step {self.start}; got None.")
        return self.base.sample_initial(n, generator=generator)

    def log_initial(self, x: Tensor) -> Tensor:
        if self.start > 0:
            raise ValueError(f"Expected the target's density for the anchor at step {self.start}; use log_start.")
        return self.base.log_initial(x)

    def forward(self, k: Tensor, x: Tensor, score: Tensor | None) -> Gaussian:
        kernel: Gaussian = self.base.forward(k + self.start, x, score)
        return kernel

    def backward(self, k: Tensor, x: Tensor, score: Tensor | None) -> Gaussian:
        return self.base.backward(k + self.start, x, score)

    def log_start(self, x: Tensor, log_prob: Tensor | None) -> Tensor:
        if self.start == 0:
            return self.base.log_start(x, log_prob)
        assert log_prob is not None
        return self.base.log_anchor(torch.tensor(self.start, device=x.device), x, log_prob)

    def log_end(self, x: Tensor, log_prob: Tensor, score: Tensor | None) -> Tensor:
        if self.stop == self.base.num_steps:
            return self.base.log_end(x, log_prob, score)
        return self.base.log_anchor(torch.tensor(self.stop, device=x.device), x, log_prob)

    def log_anchor(self, k: Tensor, x: Tensor, log_prob: Tensor) -> Tensor:
        return self.base.log_anchor(k + self.start, x, log_prob)

    @contextmanager
    def tabulated(self) -> Iterator[None]:
        # The grid is that of the whole process.
        with self.base.tabulated():
            yield


def stretches(process: Process, segments: int) -> tuple[Stretch, ...]:
    """The process cut into nearly equal pieces, a tuple of ``segments``."""
    edges = segment_edges(process.num_steps, segments)
    return tuple(Stretch(process, a, b) for a, b in zip(edges, edges[1:], strict=False))


@final
class AnchorDensity:
    """Anchor density at a step, with its gradient, as kernels want it.

    Arguments:
        process: A process with anchors.
        k: Step index, ``0..K``.
        target: The density at the end.
    """

    def __init__(self, process: Process, k: int, target: Target) -> None:
        self.process = process
        self.k = k
        self.target = target

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Log density ``(...)``, float64, and gradient ``(..., D)``."""
        state = self.state(x, *self.target.log_prob_and_score(x))
        return state.log_prob, state.score

    def state(self, x: Tensor, log_prob: Tensor, score: Tensor) -> State:
        """The same at points where the target's density ``(...)`` and score ``(..., D)`` are known."""
        with torch.enable_grad():
            x, level = x.detach().requires_grad_(), log_prob.detach().double().requires_grad_()
            anchor = self.process.log_anchor(torch.tensor(self.k, device=x.device), x, level)
            inner, share = torch.autograd.grad(anchor.sum(), (x, level), allow_unused=True)
        gradient = torch.zeros_like(x) if share is None else share.unsqueeze(-1).to(x.dtype) * score.to(x.dtype)
        return State(x.detach(), anchor.detach(), gradient if inner is None else gradient + inner)


@dataclass(frozen=True)
class Moves:
    """How particles move within the anchors between pieces.

    Arguments:
        kernel: A kernel that leaves its density exactly invariant.
        count: Moves at each end.
        steps: Step size at each inner end, as the state of its search; ``J - 1`` of them.
        scales: Diagonal metric at each inner end, ``(D,)`` or ``(1,)`` each.
    """

    kernel: Kernel
    count: int
    steps: tuple[RobbinsMonroState, ...]
    scales: tuple[Tensor, ...]

    def __post_init__(self) -> None:
        if not self.kernel.exact:
            name = type(self.kernel).__name__
            raise ValueError(f"Expected a kernel that leaves its density exactly invariant; got {name}.")
        if self.count < 1:
            raise ValueError(f"Expected at least one move; got {self.count}.")

    @staticmethod
    def init(kernel: Kernel, ends: int, *, scale: Tensor, step_size: float = 0.1, count: int = 1) -> Moves:
        """Untuned moves: one metric ``scale`` and one step size for all ends."""
        state = RobbinsMonro(kernel.target_acceptance).init(step_size)
        return Moves(kernel, count, (state,) * ends, (scale,) * ends)

    def params(self, end: int) -> KernelParams:
        """Frozen parameters of the kernel at an inner end, counted from 0."""
        scale = self.scales[end]
        return KernelParams(scale.new_tensor(math.exp(self.steps[end].log_step)), scale)

    def tuned(self, population: Population) -> Moves:
        """Step sizes and metrics after a look at a population that moved with these; for training only."""
        tuner = RobbinsMonro(self.kernel.target_acceptance)
        steps = tuple(tuner.update(s, a) for s, a in zip(self.steps, population.acceptance, strict=True))
        scales = tuple(
            SCALE_MEMORY * old.to(new) + (1.0 - SCALE_MEMORY) * new
            for old, new in zip(self.scales, population.spreads, strict=True)
        )
        return replace(self, steps=steps, scales=scales)


@dataclass(frozen=True)
class Population:
    """Weighted particles at the end of a process, and what happened on the way.

    Arguments:
        x: Points, shape ``(n, D)``.
        log_weight: Log weights ``(n,)``, float64; the mean weight of an island is its estimate of ``Z``.
        lower_bound: Sum of weighted mean increments of each island ``(num_islands,)``; its mean is at most ``log Z``.
        resampled: Which islands were resampled after which piece, boolean ``(J - 1, num_islands)``.
        acceptance: Mean acceptance of the moves at each inner end.
        spreads: Standard deviations of the weighted population at each inner end, as a metric.
        pieces: The paths of each piece, if they were to be kept.
        nonfinite: Number of particles lost to non-finite values.
    """

    x: Tensor
    log_weight: Tensor
    lower_bound: Tensor
    resampled: Tensor
    acceptance: tuple[float, ...]
    spreads: tuple[Tensor, ...]
    pieces: tuple[Trajectory, ...]
    nonfinite: int


def populate(
    pieces: Sequence[Stretch],
    target: Target,
    n: int,
    *,
    generator: torch.Generator,
    moves: Moves | None = None,
    resample_below: float = 0.3,
    num_islands: int = 1,
    keep: bool = False,
) -> Population:
    """Run ``n`` particles through consecutive pieces of a process, with everything frozen.

    Arguments:
        pieces: The pieces, from the first step to the last.
        target: The density at the end.
        n: Number of particles, a multiple of ``num_islands``.
        generator: Source of randomness.
        moves: Kernel and its parameters at each inner end; None moves nothing.
        resample_below: Resample an island when its ESS falls below this fraction; 0 for never, 1 for always.
        num_islands: Equal contiguous blocks that never see each other.
        keep: Whether to keep the paths of the pieces.

    Raises:
        ValueError: If arguments do not fit.
    """
    _check(pieces, n, moves, resample_below, num_islands)
    device = generator.device
    log_weight = torch.zeros(n, dtype=torch.float64, device=device)
    bound = torch.zeros(num_islands, dtype=torch.float64, device=device)
    x, nonfinite = None, 0
    kept, resampled, acceptance, spreads = [], [], [], []
    for end, piece in enumerate(pieces):
        path = simulate(piece, target, n, generator=generator, initial=x)
        if keep:
            kept.append(path)
        gain = path.log_weight
        dead = log_weight.isneginf()
        lost = gain.isnan() | (gain == math.inf) | ~path.x[-1].isfinite().all(-1)
        nonfinite += int((lost & ~dead).sum())
        gain = gain.masked_fill(lost | dead, -math.inf)
        bound = bound + _weighted_mean(gain, log_weight, num_islands)
        log_weight = log_weight + gain.masked_fill(dead, 0.0)
        x = path.x[-1].masked_fill(lost.unsqueeze(-1), 0.0)
        if end == len(pieces) - 1:
            break
        index, log_weight, chosen = _resample(log_weight, num_islands, resample_below, generator)
        resampled.append(chosen)
        x = x[index]
        spreads.append(spread(piece.space, x, log_weight=_normalized(log_weight)))
        if moves is not None:
            assert path.log_prob is not None and path.score is not None
            density = AnchorDensity(piece.base, piece.stop, target)
            state = density.state(x, path.log_prob[-1][index], path.score[-1][index])
            x, accepted = _move(moves, end, state, density, generator)
            acceptance.append(float((_normalized(log_weight).exp() * accepted).sum()))
    assert x is not None
    history = torch.stack(resampled) if resampled else torch.zeros(0, num_islands, dtype=torch.bool, device=device)
    return Population(x, log_weight, bound, history, tuple(acceptance), tuple(spreads), tuple(kept), nonfinite)


def _check(pieces: Sequence[Stretch], n: int, moves: Moves | None, resample_below: float, num_islands: int) -> None:
    last = 0
    for piece in pieces:
        if piece.start != last or piece.base is not pieces[0].base:
            raise ValueError(f"Expected consecutive pieces of one process; got one from {piece.start} after {last}.")
        last = piece.stop
    if not pieces or last != pieces[0].base.num_steps:
        raise ValueError("Expected pieces that end where the process does.")
    if num_islands < 1 or n < 2 * num_islands or n % num_islands:
        raise ValueError(f"Expected n to be a multiple of num_islands={num_islands}, at least twice it; got {n}.")
    if not 0.0 <= resample_below <= 1.0:
        raise ValueError(f"Expected resample_below in [0, 1]; got {resample_below}.")
    if moves is not None and len(moves.steps) != len(pieces) - 1:
        raise ValueError(f"Expected moves for {len(pieces) - 1} inner ends; got {len(moves.steps)}.")


def _normalized(log_weight: Tensor) -> Tensor:
    """Log weights ``(..., m)`` that sum to one; equal where nothing is alive."""
    dead = log_weight.isneginf().all(-1, keepdim=True)
    return torch.log_softmax(torch.where(dead, torch.zeros_like(log_weight), log_weight), -1)


def _weighted_mean(gain: Tensor, log_weight: Tensor, num_islands: int) -> Tensor:
    """Means ``(num_islands,)`` of increments under the weights before them."""
    weight = _normalized(log_weight.reshape(num_islands, -1)).exp()
    # A particle without weight has no say, whatever it gained.
    return (weight * gain.reshape(num_islands, -1)).masked_fill(weight == 0.0, 0.0).sum(-1)


def _resample(
    log_weight: Tensor, num_islands: int, resample_below: float, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Indices ``(n,)``, log weights ``(n,)``, and which islands were resampled, each by its own weights."""
    blocks = log_weight.reshape(num_islands, -1)
    size = blocks.shape[1]
    log_total = torch.logsumexp(blocks, -1, keepdim=True)
    share = _normalized(blocks)
    ess = 1.0 / share.exp().square().sum(-1)
    # An island that died keeps its particles and its weight zero.
    chosen = (ess < resample_below * size) & log_total.squeeze(-1).isfinite()
    drawn = systematic_resample(share, generator=generator)
    own = torch.arange(size, device=drawn.device).expand_as(drawn)
    index = torch.where(chosen.unsqueeze(-1), drawn, own)
    index = index + size * torch.arange(num_islands, device=drawn.device).unsqueeze(-1)
    blocks = torch.where(chosen.unsqueeze(-1), log_total - math.log(size), blocks)
    return index.reshape(-1), blocks.reshape(-1), chosen


def _move(
    moves: Moves, end: int, state: State, density: AnchorDensity, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Points ``(n, D)`` after the moves and the mean acceptance of each particle ``(n,)``."""
    state = moves.kernel.refresh(state, generator=generator)
    params = moves.params(end)
    accepted = torch.zeros_like(state.log_prob)
    for _ in range(moves.count):
        state, info = moves.kernel.step(state, density, params, generator)
        accepted = accepted + info.acceptance / moves.count
    return state.x, accepted
