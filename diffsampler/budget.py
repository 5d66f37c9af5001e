"""What a run may spend, and what it has spent."""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import final

import torch

from diffsampler.progress import Progress
from diffsampler.target import CountedTarget

__all__ = ["Budget", "Task", "TimeRecord", "TrainingMeter"]

LEVELS = 1000
"""Steps in which a share of a budget is read: fine enough to keep it, coarse enough to be written down."""


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


Series = list[list[float]]
"""Pairs of a value and how many times in a row it was read."""


@final
class TimeRecord:
    """What a run learned from the clock, so that another one can be told the same and ends up the same.

    Everything else in a run follows from its seed. Where a decision depends on time, the number that it is taken on
    is read through :meth:`watch`: a live run writes it down, a repetition gets what was written instead.

    Arguments:
        series: What another run wrote down, to be repeated; None for a live run.
    """

    def __init__(self, series: Mapping[str, Series] | None = None) -> None:
        self.series: dict[str, Series] = {}
        """Values by name, in the order in which they were read."""
        self._left: dict[str, Iterator[float]] | None = None
        if series is not None:
            self._left = {
                name: itertools.chain.from_iterable(itertools.repeat(value, int(count)) for value, count in pairs)
                for name, pairs in series.items()
            }

    def watch(self, name: str, source: Callable[[], float], *, levels: int | None = None) -> Callable[[], float]:
        """Readings of ``source``, which is not asked in a repetition.

        Arguments:
            name: Of the series.
            source: What depends on time.
            levels: Round down to multiples of ``1 / levels``, which keeps long series short.
        """

        def read() -> float:
            value = self._repeated(name) if self._left is not None else _rounded(source(), levels)
            pairs = self.series.setdefault(name, [])
            if pairs and pairs[-1][0] == value:
                pairs[-1][1] += 1
            else:
                pairs.append([value, 1])
            return value

        return read

    def _repeated(self, name: str) -> float:
        assert self._left is not None
        value = next(self._left.get(name, iter(())), None)
        if value is None:
            raise ValueError(
                f"Expected choices of this very run; it asks for more of the clock's readings ({name!r}) than were "
                "recorded. The target, the machine or the version is another one."
            )
        return value


def _rounded(value: float, levels: int | None) -> float:
    return float(value) if levels is None else math.floor(levels * value) / levels


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
        record: What was learned from the clock.
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
    record: TimeRecord

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

    def watch(self, name: str, source: Callable[[], float], *, levels: int | None = LEVELS) -> Callable[[], float]:
        """Readings of ``source``, recorded if time can end the run; evaluations repeat themselves."""
        return source if self.budget.seconds is None else self.record.watch(name, source, levels=levels)

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
        # The first interval holds the setting up and the first step the warming up; the median forgets both, and other
        # interruptions. Where steps are so slow that there is no time for it, the fastest one has to do.
        cost = 0.0
        if len(self.costs) > 3:
            cost = statistics.median_low(self.costs)
        elif len(self.costs) > 1 and now - self.start > 0.3:
            cost = min(self.costs)
        left = 0.98 - self.steps_to_draw * cost - self.start
        return (now - self.start) / left if left > 0.0 else 1.0
