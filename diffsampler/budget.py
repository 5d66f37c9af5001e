"""What a run may spend, and what it has spent."""

from __future__ import annotations

import math
import statistics
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import final

import torch

from diffsampler.progress import Progress
from diffsampler.target import CountedTarget

__all__ = ["Budget", "Task", "TrainingMeter"]


@final
@dataclass(frozen=True)
class Budget:
    """What a run may spend; whichever limit is reached first ends it.

    Arguments:
        seconds: Wall-clock time.
        evaluations: Points at which the density or its gradient is computed.
        steps: Gradient steps of training.

    Raises:
        TypeError: If a limit is not a number.
        ValueError: If a limit is not positive, or not whole where it counts something.
    """

    seconds: float | None = None
    evaluations: int | None = None
    steps: int | None = None

    def __post_init__(self) -> None:
        for name in ("seconds", "evaluations", "steps"):
            value = getattr(self, name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"Expected a number as budget of {name}; got {value!r}.")
            if not 0 < value < math.inf:
                raise ValueError(f"Expected a positive budget of {name}; got {value}. Leave it out for no limit.")
            if name != "seconds" and value != int(value):
                raise ValueError(f"Expected a whole number as budget of {name}; got {value}.")


@final
@dataclass
class Task:
    """One call of :func:`diffsampler.sample` on its way.

    Arguments:
        target: The density; counts what is spent on it.
        num_samples: Number of draws at least.
        seed: Seed of everything.
        dtype: Arithmetic of learned processes.
        device: Where to compute.
        budget: What the run may spend.
        progress: Told what is being done.
        checkpoint: Folder for checkpoints, or None.
        resume: Whether to continue from the folder's checkpoint.
        began: Start of the run by the monotonic clock.
        elsewhere: Evaluations that a sampler counts by itself.
    """

    target: CountedTarget
    num_samples: int
    seed: int
    dtype: torch.dtype
    device: torch.device
    budget: Budget
    progress: Progress
    checkpoint: str | Path | None
    resume: bool
    began: float
    elsewhere: Callable[[], int]

    @property
    def seconds(self) -> float:
        """Wall-clock time so far."""
        return time.monotonic() - self.began

    @property
    def evaluations(self) -> int:
        """Points at which the density or its gradient was computed so far."""
        return self.target.evaluations + self.elsewhere()

    @property
    def limited(self) -> bool:
        """Whether something other than a number of steps ends the run."""
        return self.budget.seconds is not None or self.budget.evaluations is not None

    def spent(self) -> float:
        """Share of the budget that is used up, in seconds or evaluations."""
        shares = [0.0]
        if self.budget.seconds is not None:
            shares.append(self.seconds / self.budget.seconds)
        if self.budget.evaluations is not None:
            shares.append(self.evaluations / self.budget.evaluations)
        return max(shares)

    @property
    def generator(self) -> torch.Generator:
        """A new source of randomness from the run's seed."""
        return torch.Generator(self.device).manual_seed(self.seed)


@final
class TrainingMeter:
    """Share used up of what training may spend of a budget; the cost of drawing the answer is kept back.

    A training step simulates ``batch_size`` paths, so that drawing ``n`` of them costs about ``n / batch_size`` steps,
    one at least. Called once per step.
    """

    def __init__(self, task: Task, *, batch_size: int) -> None:
        self.task = task
        self.steps_to_draw = max(1.0, task.num_samples / batch_size)
        self.start = self.last = task.spent()
        self.costs: deque[float] = deque(maxlen=9)

    def __call__(self) -> float:
        now = self.task.spent()
        self.costs.append(now - self.last)
        self.last = now
        # The first interval holds the setting up; the median forgets it, and other interruptions.
        cost = statistics.median_low(self.costs) if len(self.costs) > 1 else 0.0
        left = 0.98 - self.steps_to_draw * cost - self.start
        return (now - self.start) / left if left > 0.0 else 1.0
