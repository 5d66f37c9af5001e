"""How a sampler of a published table is trained: on its own path, up a ladder of steps, or by the library's recipe."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from diffsampler.lessons import Lesson
from diffsampler.methods.cmcd import CMCDProcess
from diffsampler.methods.underdamped import UnderdampedProcess
from diffsampler.objective import Objective, ReverseKL
from diffsampler.pilot import run_pilot
from diffsampler.pilot.transport_fit import fit_triangular
from diffsampler.recipes import MappedSampler, refined_sampler, standardize
from diffsampler.refinement import Course
from diffsampler.refinement.frames import Frame, make_frame
from diffsampler.sampler import DiffusionSampler, Sampler
from diffsampler.sources import Source
from diffsampler.target import Target


@dataclass(frozen=True)
class Trained:
    """A method on its own path.

    Arguments:
        kind: Of the sampler.
        options: Of the sampler.
        cpu: CPU seconds of training (the search for coordinates included).
        steps: Gradient steps at most.
        objective: Makes the loss; None for the method's own.
        standard: Whether it runs in coordinates standardized by a mean-field fit, as the published pre-training does.
        sources: Makes the sources of paths and their shares.
        lesson: Makes another way to get gradients.
        batch_size, learning_rate, ema_decay: As in ``fit``.
    """

    kind: Callable[..., Any]
    options: dict[str, Any] = field(default_factory=dict)
    cpu: float = 60.0
    steps: int = 1_000_000
    objective: Callable[[], Objective] | None = None
    standard: bool = False
    sources: Callable[[], list[tuple[Source, float]]] | None = None
    lesson: Callable[[], Lesson] | None = None
    batch_size: int = 256
    learning_rate: float = 2e-3
    ema_decay: float = 0.998

    def train(self, target: Target, seed: int, share: float) -> tuple[Sampler, dict[str, Any]]:
        start = time.process_time()
        inner: Target = target
        if self.standard:
            inner, _ = standardize(target, generator=torch.Generator().manual_seed(seed))
        objective = {} if self.objective is None else {"objective": self.objective()}
        sampler = self.kind(inner, seed=seed, **self.options, **objective)
        more: dict[str, Any] = {}
        if self.sources is not None:
            more["sources"] = self.sources()
        if self.lesson is not None:
            more["lesson"] = self.lesson()
        sampler.fit(
            steps=max(2, round(self.steps * share)),
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            ema_decay=self.ema_decay,
            seed=seed,
            spent=lambda: (time.process_time() - start) / (self.cpu * share),
            **more,
        )
        notes = {"steps": int(sampler.history[-1]["step"]) if sampler.history else 0}
        if self.standard:
            return MappedSampler(target, sampler, inner.to_original), notes  # type: ignore[attr-defined]
        return sampler, notes


@dataclass(frozen=True)
class Ladder:
    """A chain trained with few steps and carried over to more of them, a rung at a time; the last one is drawn from.

    Arguments:
        kind: Of the sampler.
        options: Of the sampler.
        rungs: Number of steps, CPU seconds, batch size and learning rate of each.
        objective: Makes the loss.
        whiten: Whether it runs in the coordinates of a pilot's map, whose cost counts; else in the target's own.
        refit: Whether that map is fitted again to the particles of the pilot's last pass, which know tails and bends
            better than those of the pass before.
    """

    kind: Callable[..., DiffusionSampler]
    options: dict[str, Any]
    rungs: tuple[tuple[int, float, int, float], ...]
    objective: Callable[[], Objective] = ReverseKL
    whiten: bool = False
    refit: bool = False

    def train(self, target: Target, seed: int, share: float) -> tuple[Sampler, dict[str, Any]]:
        sampler, cpu, steps = self.climb(target, seed, share, len(self.rungs))
        if not self.whiten:
            return sampler, {"cpu": cpu, "steps": steps}
        frame, paid = whitened(target, seed, refit=self.refit)
        return MappedSampler(target, sampler, frame.to_original), {"cpu": cpu + paid, "pilot": paid, "steps": steps}

    def climb(self, target: Target, seed: int, share: float, count: int) -> tuple[DiffusionSampler, float, list[int]]:
        """Sampler, CPU seconds and steps of each rung, after ``count`` rungs; cases share what they can."""
        key = (named(target), seed, share, self.kind.__name__, self.objective.__name__, str(self.options))
        key = (*key, self.whiten, self.refit, self.rungs[:count])
        if key in CLIMBED:
            return CLIMBED[key]
        inner = whitened(target, seed, refit=self.refit)[0].standard if self.whiten else target
        lower, spent, before = (None, 0.0, []) if count == 1 else self.climb(target, seed, share, count - 1)
        start = time.process_time()
        num_steps, seconds, batch, rate = self.rungs[count - 1]
        sampler = self.kind(inner, num_steps=num_steps, objective=self.objective(), seed=seed, **self.options)
        if lower is not None and isinstance(lower.process, CMCDProcess | UnderdampedProcess):
            sampler.process = lower.process.regridded(num_steps)
        elif lower is not None:
            with torch.no_grad():
                for mine, theirs in zip(sampler.process.parameters(), lower.process.parameters(), strict=True):
                    mine.copy_(theirs)
        sampler.fit(
            steps=1_000_000,
            batch_size=batch,
            learning_rate=rate,
            seed=seed + count,
            spent=lambda: (time.process_time() - start) / (seconds * share),
        )
        done = int(sampler.history[-1]["step"]) if sampler.history else 0
        CLIMBED[key] = sampler, spent + time.process_time() - start, [*before, done]
        return CLIMBED[key]


def named(target: Target) -> str:
    return f"{type(target).__name__} {target.dim} {target.log_normalizer}"


def whitened(target: Target, seed: int, *, refit: bool) -> tuple[Frame, float]:
    """The coordinates of a pilot's map, standardized, and their CPU seconds."""
    key = (named(target), seed, refit)
    if key not in WHITENED:
        start = time.process_time()
        generator = torch.Generator().manual_seed(seed)
        pilot = run_pilot(target, generator=generator, num_particles=1024, num_islands=16)
        assert pilot.particles is not None and pilot.transport is not None
        count = len(pilot.particles) if refit else 1024
        x = pilot.particles.resample(count, generator=torch.Generator().manual_seed(seed)).double()
        frame = make_frame("map", target, fit_triangular(x) if refit else pilot.transport, x)
        assert frame is not None
        WHITENED[key] = frame, time.process_time() - start
    return WHITENED[key]


WHITENED: dict[tuple[str, int, bool], tuple[Frame, float]] = {}
CLIMBED: dict[tuple[Any, ...], tuple[DiffusionSampler, float, list[int]]] = {}
"""Coordinates that this process has found, and rungs that it has climbed."""


@dataclass(frozen=True)
class Best:
    """The library's own recipe: pilot, then a process refined from its particles.

    Arguments:
        cpu: CPU seconds of both; None leaves their length to them.
        particles: Particles of the pilot's last pass.
    """

    cpu: float | None = None
    particles: int = 4096

    def train(self, target: Target, seed: int, share: float) -> tuple[Sampler, dict[str, Any]]:
        start = time.process_time()
        generator = torch.Generator().manual_seed(seed)
        budget = None if self.cpu is None and share == 1.0 else (self.cpu or 60.0) * share
        count = self.particles if share == 1.0 else 512
        pilot = run_pilot(
            target,
            generator=generator,
            num_particles=count,
            num_islands=16,
            seconds=None if budget is None else 0.5 * budget,
            clock=lambda: time.process_time() - start,
        )
        course = Course()
        if budget is not None:
            course = Course(limited=True, spent=lambda: (time.process_time() - start) / budget)
        sampler, choices = refined_sampler(target, pilot, generator=generator, dtype=torch.float32, course=course)
        kept = ("coordinates", "mixture", "stages", "gap", "learned_steps", "defence_share")
        notes = {key: choices.get(key) for key in kept}
        assert pilot.particles is not None
        return sampler, {**notes, "pilot_log_normalizer": list(pilot.particles.log_normalizer)[:2]}
