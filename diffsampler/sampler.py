"""Anything that turns a target into particles."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from diffsampler import estimators
from diffsampler.estimators import Estimate
from diffsampler.lessons import Lesson, Paths
from diffsampler.objective import LogVariance, Objective
from diffsampler.particles import Particles
from diffsampler.process import Process
from diffsampler.rates import Constant, Cosine, Rate
from diffsampler.sources import Source
from diffsampler.target import CountedTarget, Target
from diffsampler.training import Recipe, fit
from diffsampler.trajectory import simulate, simulate_backward

__all__ = ["DiffusionSampler", "Sampler"]

STATES_PER_BATCH = 4_000_000
"""Numbers that one batch of simulated paths may hold; larger requests are drawn in several batches."""

SKIPPED_SHARE = 0.01
"""Share of training steps without a finite gradient from which on they are a finding."""


class Sampler(ABC):
    """Draws weighted particles from ``target``."""

    target: Target

    @property
    def evaluations(self) -> int:
        """Points at which the target's density or gradient was computed so far, 0 where it is not counted."""
        return 0

    @property
    def findings(self) -> list[tuple[str, str, str]]:
        """Level, message and remedy of what the last call of :meth:`sample` noticed beyond what its weights say."""
        return []

    @abstractmethod
    def sample(self, n: int, *, seed: int = 0) -> Particles:
        """Draw ``n`` weighted particles (samplers that work in blocks round up)."""


class DiffusionSampler(Sampler):
    """A learned diffusion: a process, the loss that trains it, and exact weights.

    Arguments:
        target: The density to sample.
        process: Forward and backward chains.
        objective: The loss, log-variance by default.
        lesson: Where training gets its gradients unless it is told otherwise, fresh paths by default.

    Attributes:
        history: Training history, a list of dicts.
        evaluations: Points at which the target's density or gradient was computed so far.
    """

    def __init__(
        self, target: Target, process: Process, objective: Objective | None = None, *, lesson: Lesson | None = None
    ) -> None:
        if process.space != target.space:
            raise ValueError(f"Expected a process on {target.space}; got one on {process.space}.")
        self.target = target
        self.process = process
        self.objective = LogVariance() if objective is None else objective
        self.lesson = lesson
        self.history: list[dict[str, float]] = []
        self._counted = CountedTarget(target)

    @property
    def evaluations(self) -> int:
        """Points at which the target's density or gradient was computed so far, training included."""
        return self._counted.evaluations

    @property
    def findings(self) -> list[tuple[str, str, str]]:
        """Whether training had to skip steps, which teaches nothing about where they would have gone."""
        last = self.history[-1] if self.history else {}
        skipped, steps = int(last.get("skipped", 0)), int(last.get("step", 0))
        if skipped <= SKIPPED_SHARE * steps:
            return []
        message = f"{skipped} of {steps} training steps had no finite gradient and were skipped."
        return [("warning", message, "Use a smaller learning_rate, or a scale that fits the target.")]

    @property
    def device(self) -> torch.device:
        """Device of the process."""
        return next(self.process.parameters()).device

    def to(self, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> DiffusionSampler:
        """Move process, loss and target in place; the target keeps its own float64 constants."""
        self.process.to(device=device, dtype=dtype)
        self.objective.to(device=device)
        self.target.to(device=device)
        return self

    def fit(
        self,
        *,
        steps: int = 2000,
        batch_size: int = 512,
        learning_rate: float = 2e-3,
        seed: int = 0,
        bank: Tensor | None = None,
        bank_share: float = 0.5,
        sources: Sequence[tuple[Source, float]] | None = None,
        lesson: Lesson | None = None,
        clip_norm: float = 1.0,
        ema_decay: float = 0.998,
        rate: Rate | None = None,
        clip_rate: Rate | None = None,
        pieces: int = 1,
        micro_batch: int | None = None,
        spent: Callable[[], float] = lambda: 0.0,
        checkpoint: str | Path | None = None,
        checkpoint_every: int = 200,
        resume: bool = False,
        callback: Callable[[dict[str, float]], None] | None = None,
    ) -> DiffusionSampler:
        """Train, and return the sampler itself.

        Arguments:
            steps: Number of gradient steps.
            batch_size: Trajectories per step.
            learning_rate: Learning rate, multiplied by ``rate``.
            seed: Seed of all randomness in training.
            bank: Points ``(m, D)`` near the target (a pilot's particles), replayed backward as additional paths.
            bank_share: Share of the batch that comes from the bank.
            sources: Sources of paths with their shares (:mod:`diffsampler.sources`), instead of fresh paths and a bank.
            lesson: Any other way to get gradients (:mod:`diffsampler.lessons`).
            clip_norm: Largest norm of a gradient.
            ema_decay: Decay of the parameter average that is used for sampling; 0 takes the last parameters.
            rate: How the learning rate changes (:mod:`diffsampler.rates`), a cosine decay by default.
            clip_rate: How ``clip_norm`` changes, not at all by default.
            pieces: Pieces of the chain whose graphs losses with a path gradient build one after another: the same
                gradient in the memory of one piece, for half the time more (:mod:`diffsampler.pathwise`).
            micro_batch: Largest number of paths drawn at once; gradients are those of the whole batch.
            spent: Share of an outside budget that is used up; training ends when it reaches 1.
            checkpoint: Folder of an atomic checkpoint.
            checkpoint_every: Steps between checkpoints.
            resume: Continue from the folder's checkpoint if there is one, bit for bit on the same device.
            callback: Called with every history entry.

        Raises:
            ValueError: If an option is out of range, the loss needs what is not given, or the checkpoint is foreign.
            RuntimeError: If training diverges.
        """
        recipe = Recipe(
            steps=steps,
            batch_size=batch_size,
            learning_rate=learning_rate,
            seed=seed,
            clip_norm=clip_norm,
            ema_decay=ema_decay,
            bank_share=bank_share,
            rate=Cosine() if rate is None else rate,
            clip_rate=Constant() if clip_rate is None else clip_rate,
            pieces=pieces,
            micro_batch=micro_batch,
        )
        if sum(given is not None for given in (bank, sources, lesson)) > 1:
            raise ValueError("Expected at most one of bank, sources and lesson.")
        if bank is None and sources is None and lesson is None:
            lesson = self.lesson
        if bank is not None:
            bank = bank.to(next(self.process.parameters()))
        self.history = fit(
            self.process,
            self._counted,
            self.objective,
            recipe,
            bank=bank,
            lesson=lesson if sources is None else Paths(sources),
            spent=spent,
            checkpoint=checkpoint,
            checkpoint_every=checkpoint_every,
            resume=resume,
            identity=None if checkpoint is None else self._identity(),
            callback=callback,
        )
        return self

    def _identity(self) -> dict[str, object]:
        """What a checkpoint must agree with: the density itself too, by its values at a few points."""
        generator = torch.Generator(self.device).manual_seed(0)
        x = self.target.space.noise((3,), like=next(self.process.parameters()), generator=generator)
        with torch.no_grad():
            values = self.target.log_prob(self.target.space.project(x))
        return {
            "sampler": type(self).__name__,
            "target": type(self.target).__name__,
            "dim": self.target.dim,
            "log_prob": [f"{value:.4g}" for value in values.tolist()],
        }

    def sample(self, n: int, *, seed: int = 0) -> Particles:
        """Draw ``n`` independent weighted particles; those lost to non-finite values are counted, not repaired."""
        if n < 1:
            raise ValueError(f"Expected n >= 1; got {n}.")
        generator = torch.Generator(self.device).manual_seed(seed)
        points, weights = [], []
        for size in self._batches(n):
            trajectory = simulate(self.process, self._counted, size, generator=generator)
            points.append(self.process.point(trajectory.x[-1]))
            weights.append(trajectory.log_weight)
        x, log_weight = torch.cat(points), torch.cat(weights)
        keep = x.isfinite().all(-1) & ~log_weight.isnan() & (log_weight < math.inf)
        lost = n - int(keep.sum())
        if lost == n:
            raise RuntimeError("All particles are non-finite. Train with a smaller learning_rate, or check the target.")
        # A lost particle is one with weight zero: the mean over all n draws stays unbiased.
        shift = math.log((n - lost) / n)
        return Particles(x[keep], log_weight[keep] + shift, nonfinite=lost)

    def backward_weights(self, x: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Log weights ``(n,)``, float64, of backward paths from given terminal points ``x (n, D)``."""
        like = next(self.process.parameters())
        pieces = x.split(self._batches(x.shape[0]))
        return torch.cat(
            [
                simulate_backward(self.process, self._counted, piece.to(like), generator=generator).log_weight
                for piece in pieces
            ]
        )

    def backward_log_weight(self, n: int, *, seed: int = 0) -> Tensor:
        """Log weights ``(n,)`` of backward paths from exact samples of the target.

        Raises:
            NotImplementedError: If the target has no exact sampler.
        """
        generator = torch.Generator(self.device).manual_seed(seed)
        return torch.cat(
            [
                self.backward_weights(self.target.sample(size, generator=generator), generator=generator)
                for size in self._batches(n)
            ]
        )

    def eubo(self, n: int, *, seed: int = 0) -> Estimate:
        """Upper bound of ``log Z`` from ``n`` exact samples of the target."""
        return estimators.eubo(self.backward_log_weight(n, seed=seed))

    def _batches(self, n: int) -> list[int]:
        size = max(1, STATES_PER_BATCH // ((self.process.num_steps + 1) * self.target.dim))
        return [min(size, n - start) for start in range(0, n, size)]
