r"""Sequential controlled Langevin diffusions.

A controlled Monte Carlo diffusion (:mod:`diffsampler.methods.cmcd`) cut into pieces. Between the pieces particles are
resampled and moved within the annealed density that the next piece starts from (:mod:`diffsampler.population`), in
training too, so that every piece learns from particles that are near its own anchor however bad the earlier ones are.
The loss is the log-variance of the incremental weights averaged over pieces, at fixed paths,

.. math:: L = \frac1J \sum_j \mathrm{Var}(\log G_j),

half on fresh pieces and half on replayed ones. The memory keeps states with the target's densities and scores there;
weights are always those of the process as it is, on its own grid.

It wants what CMCD wants (a gradient, a prior that covers the target) and the moves' evaluations on top; it shines where
a chain alone would leave modes behind. Whole chains remain available as ``chain``, with weights of independent paths.

References:
    Sequential controlled Langevin diffusions (Chen, Richter, Berner, Blessing, Neumann & Anandkumar, 2025),
    https://arxiv.org/abs/2412.07081
    Prioritized experience replay (Schaul, Quan, Antonoglou & Silver, 2016), https://arxiv.org/abs/1511.05952
"""

from __future__ import annotations

import math
from typing import Any, final

import torch
from torch import Tensor

from diffsampler.gradient import accumulate_gradient
from diffsampler.kernel import Kernel
from diffsampler.kernels.adaptation import RobbinsMonroState, spread
from diffsampler.kernels.hmc import HMC
from diffsampler.lessons import Lesson, Taught
from diffsampler.methods.cmcd import CMCDProcess
from diffsampler.objective import LogVariance, Objective
from diffsampler.particles import Particles
from diffsampler.population import Moves, Population, Stretch, populate, stretches
from diffsampler.process import Process
from diffsampler.replay import Priority, WeightPriority
from diffsampler.sampler import STATES_PER_BATCH, DiffusionSampler, Sampler
from diffsampler.sources import Draw
from diffsampler.target import CountedTarget, Target
from diffsampler.trajectory import Trajectory, cat, retrace

__all__ = ["SCLD", "Pieces", "SegmentMemory"]

TRIAL = 256
"""Draws of the prior that set the first metric of the moves."""


@final
class SegmentMemory:
    """A ring of the paths of one piece: states, the target's scores and densities there, and last known weights.

    Arguments:
        capacity: Number of paths kept.
    """

    def __init__(self, capacity: int) -> None:
        if capacity < 1:
            raise ValueError(f"Expected capacity >= 1; got {capacity}.")
        self.capacity = capacity
        self.size, self.position = 0, 0
        self._fields: dict[str, Tensor] = {}
        self.log_weight = torch.empty(0, dtype=torch.float64)

    def __len__(self) -> int:
        return self.size

    def add(self, path: Trajectory) -> None:
        """Append paths; the oldest leave when the ring is full."""
        assert path.score is not None and path.log_prob is not None
        fields = {"x": path.x, "score": path.score, "log_prob": path.log_prob}
        if not self._fields:
            self._allocate(fields)
        slot = (self.position + torch.arange(path.x.shape[1], device=path.x.device))[-self.capacity :] % self.capacity
        for name, value in fields.items():
            self._fields[name][:, slot] = value[:, -self.capacity :]
        self.log_weight[slot] = path.log_weight[-self.capacity :]
        self.position = (self.position + path.x.shape[1]) % self.capacity
        self.size = min(self.capacity, self.size + path.x.shape[1])

    def _allocate(self, like: dict[str, Tensor]) -> None:
        self._fields = {
            name: value.new_zeros((value.shape[0], self.capacity, *value.shape[2:])) for name, value in like.items()
        }
        self.log_weight = torch.zeros(self.capacity, dtype=torch.float64, device=like["x"].device)

    def replay(self, n: int, priority: Priority, process: Process, generator: torch.Generator) -> Trajectory:
        """Draw ``n`` paths with replacement, with log densities of the process as it is; their priorities follow."""
        known = slice(0, self.size)
        chance = priority.chance(self._fields["log_prob"][-1, known], self.log_weight[known])
        index = torch.multinomial(chance, n, replacement=True, generator=generator)
        x, score, log_prob = (self._fields[name][:, index] for name in ("x", "score", "log_prob"))
        path = retrace(process, x, score, log_prob)
        current = path.log_weight
        self.log_weight[index] = torch.where(current.isfinite(), current, self.log_weight[index])
        return path

    def state(self) -> dict[str, Any]:
        """What a resumed run must know."""
        fields = {name: value[:, : self.size].clone() for name, value in self._fields.items()}
        weights = self.log_weight[: self.size].clone()
        return {"fields": fields, "log_weight": weights, "size": self.size, "position": self.position}

    def restore(self, state: dict[str, Any], device: torch.device) -> None:
        """Return to a :meth:`state`, on a device."""
        self.size, self.position = state["size"], state["position"]
        self._fields = {}
        if self.size:
            fields = {name: value.to(device) for name, value in state["fields"].items()}
            self._allocate(fields)
            for name, value in fields.items():
                self._fields[name][:, : self.size] = value
            self.log_weight[: self.size] = state["log_weight"].to(device)


@final
class Pieces(Lesson):
    """Gradients of a loss of weights on each piece of a process, from populations and from memory.

    Arguments:
        pieces: The pieces of the process.
        moves: Kernel between the pieces, tuned as training goes; None moves nothing.
        resample_below: Resample when the effective sample size falls below this fraction.
        replay_share: Share of the batch that is replayed once the memory holds as many paths.
        capacity: Paths kept of each piece.
        priority: Their chances, by the root of their weight by default.
    """

    def __init__(
        self,
        pieces: tuple[Stretch, ...],
        *,
        moves: Moves | None,
        resample_below: float = 0.3,
        replay_share: float = 0.5,
        capacity: int = 5000,
        priority: Priority | None = None,
    ) -> None:
        if not 0.0 <= replay_share < 1.0:
            raise ValueError(f"Expected replay_share in [0, 1); got {replay_share}.")
        self.pieces = pieces
        self.moves = moves
        self.resample_below = resample_below
        self.replay_share = replay_share
        self.priority = WeightPriority(0.5) if priority is None else priority
        self.memories = [SegmentMemory(capacity) for _ in pieces] if replay_share > 0.0 else []
        self._seen: Population | None = None

    def check(self, process: Process, objective: Objective) -> None:
        name = type(objective).__name__
        if process is not self.pieces[0].base:
            raise ValueError("Expected the process that the pieces belong to; got another one.")
        if objective.needs_path_gradient or objective.needs_backward_paths or objective.on_policy_only:
            raise ValueError(f"Expected a loss of weights at fixed paths from any source; got {name}.")
        if objective.needs_anchors or next(objective.parameters(), None) is not None:
            raise ValueError(f"Expected a loss without constants of its own: each piece has another one; got {name}.")

    def accumulate(self, objective: Objective, use: Draw, size: int, *, weight: float) -> Taught:
        replayed = round(self.replay_share * size)
        if not self.memories or len(self.memories[0]) < replayed:
            replayed = 0
        population = populate(
            self.pieces,
            use.target,
            size - replayed,
            generator=use.generator,
            moves=self.moves,
            resample_below=self.resample_below,
            keep=True,
        )
        losses = []
        for number, (piece, path) in enumerate(zip(self.pieces, population.pieces, strict=True)):
            batch = path
            if replayed:
                batch = cat(path, self.memories[number].replay(replayed, self.priority, piece, use.generator))
            finite = batch.log_weight.isfinite()
            kept = batch if bool(finite.all()) else batch.select(finite)
            if int(finite.sum()) < 2:
                return Taught(math.nan, population.log_weight[:0])
            losses.append(accumulate_gradient(piece, objective, kept, weight=weight / len(self.pieces)))
        self._seen = population
        log_weight = population.log_weight
        return Taught(sum(losses) / len(losses), log_weight[log_weight.isfinite()])

    def made(self, use: Draw) -> None:
        population = self._seen
        assert population is not None
        for memory, path in zip(self.memories, population.pieces, strict=False):
            memory.add(path.select(path.log_weight.isfinite()))
        if self.moves is not None:
            self.moves = self.moves.tuned(population)
        self._seen = None

    def state(self) -> list[dict[str, Any]]:
        moves = [] if self.moves is None else zip(self.moves.steps, self.moves.scales, strict=True)
        ends = [{"log_step": step.log_step, "updates": step.updates, "scale": scale} for step, scale in moves]
        return [*ends, *(memory.state() for memory in self.memories)]

    def restore(self, state: list[dict[str, Any]], device: torch.device) -> None:
        ends = 0
        if self.moves is not None:
            ends = len(self.moves.steps)
            steps = tuple(RobbinsMonroState(s["log_step"], s["updates"]) for s in state[:ends])
            scales = tuple(s["scale"].to(device) for s in state[:ends])
            self.moves = Moves(self.moves.kernel, self.moves.count, steps, scales)
        for memory, stored in zip(self.memories, state[ends:], strict=True):
            memory.restore(stored, device)

    def config(self) -> list[str]:
        cuts = [str(piece.stop) for piece in self.pieces]
        moves = "none" if self.moves is None else f"{self.moves.count} {type(self.moves.kernel).__name__}"
        capacity = self.memories[0].capacity if self.memories else 0
        replay = f"{self.replay_share:g} of {capacity} by {type(self.priority).__name__}"
        return [f"Pieces({' '.join(cuts)})", moves, f"below {self.resample_below:g}", replay]


@final
class SCLD(Sampler):
    """Sequential controlled Langevin diffusion.

    Example:
        ``SCLD(target, num_steps=64, segments=4, scale=10.0).fit(steps=500).sample(4096)``

    Arguments:
        target: The density to sample.
        num_steps: Number of steps ``K``.
        segments: Number of pieces ``J``, at most ``K``.
        objective: A detached loss of weights without parameters, log-variance by default.
        kernel: Exact kernel of the moves between pieces, Hamiltonian Monte Carlo by default.
        num_moves: Moves between two pieces; 0 for resampling only.
        resample_below: Resample when the effective sample size falls below this fraction.
        replay_share: Share of a batch that is replayed.
        capacity: Paths kept of each piece.
        num_islands: Independent populations in :meth:`sample`, whose spread gives the error bar of ``log Z``.
        options: As in :class:`~diffsampler.methods.cmcd.CMCDProcess`.

    Attributes:
        process: The chain.
        lesson: How it is trained; holds the moves as tuned.
        chain: The same chain as a sampler of independent whole paths, without resampling and moves.
    """

    def __init__(
        self,
        target: Target,
        *,
        num_steps: int = 64,
        segments: int = 4,
        objective: Objective | None = None,
        kernel: Kernel | None = None,
        num_moves: int = 1,
        resample_below: float = 0.3,
        replay_share: float = 0.5,
        capacity: int = 5000,
        num_islands: int = 16,
        **options: Any,
    ) -> None:
        if num_islands < 1:
            raise ValueError(f"Expected num_islands >= 1; got {num_islands}.")
        self.target = target
        # Losses at fixed paths cannot train step sizes: see the module of the chain.
        self.process = CMCDProcess(target.space, num_steps, **{"learn_steps": False, **options})
        self.resample_below = resample_below
        self.num_islands = num_islands
        self._counted = CountedTarget(target)
        self.chain = DiffusionSampler(self._counted, self.process, LogVariance() if objective is None else objective)
        pieces = stretches(self.process, segments)
        moves = None
        if num_moves:
            kernel = HMC(target.space, num_steps=5, smallest_step=0.15) if kernel is None else kernel
            with torch.no_grad():
                trial = self.process.sample_initial(TRIAL, generator=torch.Generator().manual_seed(0))
            moves = Moves.init(kernel, segments - 1, scale=spread(target.space, trial), count=num_moves)
        self.lesson = Pieces(
            pieces, moves=moves, resample_below=resample_below, replay_share=replay_share, capacity=capacity
        )

    @property
    def evaluations(self) -> int:
        return self._counted.evaluations

    @property
    def findings(self) -> list[tuple[str, str, str]]:
        return self.chain.findings

    @property
    def history(self) -> list[dict[str, float]]:
        """Training history, a list of dicts; weights there are those of the populations."""
        return self.chain.history

    def to(self, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> SCLD:
        """Move chain, loss and target in place."""
        self.chain.to(device=device, dtype=dtype)
        return self

    def fit(self, *, learning_rate: float = 2e-3, **options: Any) -> SCLD:
        """Train, and return the sampler itself.

        Arguments:
            learning_rate: Initial learning rate of a cosine decay.
            options: As in :meth:`~diffsampler.sampler.DiffusionSampler.fit`, except for sources of paths.
        """
        self.chain.fit(learning_rate=learning_rate, lesson=self.lesson, **options)
        return self

    def sample(self, n: int, *, seed: int = 0) -> Particles:
        """Draw ``n`` weighted particles, rounded up to whole islands; with tuned moves frozen, ``E[w] = Z``."""
        if n < 1:
            raise ValueError(f"Expected n >= 1; got {n}.")
        populations = self.populations(n, seed=seed)
        x = torch.cat([p.x for p in populations])
        log_weight = torch.cat([p.log_weight for p in populations])
        lost = sum(p.nonfinite for p in populations)
        if bool(log_weight.isneginf().all()):
            raise RuntimeError("All particles are non-finite. Train with a smaller learning_rate, or check the target.")
        return Particles(x, log_weight, replicates=self.num_islands, nonfinite=lost)

    def populations(self, n: int, *, seed: int = 0) -> list[Population]:
        """The populations behind :meth:`sample`, in batches of whole islands."""
        generator = torch.Generator(self.chain.device).manual_seed(seed)
        size = max(2, math.ceil(n / self.num_islands))
        longest = 1 + max(piece.num_steps for piece in self.lesson.pieces)
        together = max(1, min(self.num_islands, STATES_PER_BATCH // (size * longest * self.target.dim)))
        starts = range(0, self.num_islands, together)
        return [self._populate(size, min(together, self.num_islands - start), generator) for start in starts]

    def _populate(self, size: int, islands: int, generator: torch.Generator) -> Population:
        return populate(
            self.lesson.pieces,
            self._counted,
            size * islands,
            generator=generator,
            moves=self.lesson.moves,
            resample_below=self.resample_below,
            num_islands=islands,
        )
