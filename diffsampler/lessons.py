r"""Where a training step gets its gradient.

The training loop asks a :class:`Lesson` for the gradient of its objective and moves the parameters. :class:`Paths`
draws whole trajectories from a mixture of sources; :class:`Bridges` draws single steps of closed-form bridges, without
any simulation.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple, final

import torch
from torch import Tensor

from diffsampler.gradient import accumulate_bridge_gradient, accumulate_gradient
from diffsampler.objective import Objective
from diffsampler.process import Process
from diffsampler.sources import Draw, Source
from diffsampler.trajectory import Trajectory, cat

__all__ = ["Bridges", "Lesson", "Paths", "Taught"]

BRIDGE_STEPS = 8
"""Single steps per path of the batch in simulation-free losses."""


class Taught(NamedTuple):
    """What a lesson reports."""

    loss: float
    """The loss, NaN where there was nothing finite to learn from."""
    log_weight: Tensor
    """Finite log weights of on-policy paths, ``(n,)``, for the history; possibly none."""


class Lesson(ABC):
    """Adds the gradient of an objective to the parameters of a process."""

    @abstractmethod
    def check(self, process: Process, objective: Objective) -> None:
        """Refuse combinations that would train something else than asked, with a ValueError."""

    @abstractmethod
    def accumulate(self, objective: Objective, use: Draw, size: int, *, weight: float) -> Taught:
        """Add the gradient of ``weight * objective`` on ``size`` paths to ``.grad``."""

    def made(self, use: Draw) -> None:
        """The step was made: remember what later steps need."""
        return

    def state(self) -> list[dict[str, Any]]:
        """What a resumed run must know."""
        return []

    def restore(self, state: list[dict[str, Any]], device: torch.device) -> None:
        """Return to a :meth:`state`."""
        return

    @abstractmethod
    def config(self) -> list[str]:
        """What identifies the lesson in a checkpoint."""


def check_anchors(process: Process, objective: Objective) -> None:
    """Refuse objectives that need what the process cannot give."""
    name = type(objective).__name__
    if objective.needs_anchors and not process.has_anchors:
        raise ValueError(f"{name} needs a process with anchor densities; {type(process).__name__} has none.")
    if not objective.needs_path_gradient and process.learns_shift:
        raise ValueError(
            f"{name} is a loss at fixed paths, which cannot train the step sizes of {type(process).__name__}; "
            "pass learn_steps=False, or a loss with a path gradient."
        )


@final
class Paths(Lesson):
    """Whole trajectories from a mixture of sources.

    Arguments:
        sources: Sources and their shares of the batch; the first must be able to draw from the start.
    """

    def __init__(self, sources: Sequence[tuple[Source, float]]) -> None:
        if not sources:
            raise ValueError("Expected at least one source of paths.")
        for source, share in sources:
            if not share > 0.0:
                raise ValueError(f"Expected shares of sources > 0; got {share} for {type(source).__name__}.")
        self.sources = [source for source, _ in sources]
        self.shares = [share for _, share in sources]
        self._forward: Trajectory | None = None

    def check(self, process: Process, objective: Objective) -> None:
        name = type(objective).__name__
        check_anchors(process, objective)
        for source in self.sources:
            kind = type(source).__name__
            if objective.on_policy_only and not source.on_policy:
                raise ValueError(f"{name} needs on-policy trajectories; {kind} makes others.")
            if objective.needs_backward_paths and not source.backward:
                raise ValueError(f"{name} needs backward trajectories; {kind} makes others. Pass bank=particles.")
        if not self.sources[0].ready:
            kind = type(self.sources[0]).__name__
            raise ValueError(f"Expected a first source that can draw from the start; {kind} cannot.")

    def draw(self, use: Draw, size: int) -> tuple[Trajectory, Tensor]:
        """A batch of paths, and the number of each one's source, ``(B,)``."""
        total = sum(self.shares)
        pairs = zip(self.sources, self.shares, strict=True)
        counts = [round(size * share / total) if source.ready else 0 for source, share in pairs]
        # Rounding, and the share of sources that cannot draw yet, go to the first.
        counts[0] = size - sum(counts[1:])
        parts = [source.draw(n, use) for source, n in zip(self.sources, counts, strict=True) if n]
        batch = parts[0]
        for part in parts[1:]:
            batch = cat(batch, part)
        device = batch.log_initial.device
        number = torch.arange(len(counts), device=device)
        return batch, torch.repeat_interleave(number, torch.tensor(counts, device=device))

    def accumulate(self, objective: Objective, use: Draw, size: int, *, weight: float) -> Taught:
        trajectory, origin = self.draw(use, size)
        log_weight = trajectory.log_weight.detach()
        finite = log_weight.isfinite()
        kept = trajectory if bool(finite.all()) else trajectory.select(finite)
        loss = math.nan
        if int(finite.sum()) >= 2:
            if objective.needs_path_gradient:
                value = objective(kept)
                (weight * value).backward()
                loss = value.item()
            else:
                loss = accumulate_gradient(use.process, objective, kept, weight=weight)
        self._forward = trajectory.select(finite & _among(origin, [not source.backward for source in self.sources]))
        return Taught(loss, log_weight[finite & _among(origin, [source.on_policy for source in self.sources])])

    def made(self, use: Draw) -> None:
        assert self._forward is not None
        for source in self.sources:
            source.learn(self._forward, use)
        self._forward = None

    def state(self) -> list[dict[str, Any]]:
        return [source.state() for source in self.sources]

    def restore(self, state: list[dict[str, Any]], device: torch.device) -> None:
        for source, stored in zip(self.sources, state, strict=True):
            source.restore(stored, device)

    def config(self) -> list[str]:
        pairs = zip(self.sources, self.shares, strict=True)
        return [f"{share:g} {source.config()}" for source, share in pairs]


def _among(origin: Tensor, chosen: list[bool]) -> Tensor:
    """Which paths come from the chosen sources, boolean ``(B,)``."""
    return torch.tensor(chosen, device=origin.device)[origin]


@final
class Bridges(Lesson):
    """Single steps of closed-form bridges from stored terminal points.

    Arguments:
        bank: Terminal points ``(m, D)``.
    """

    def __init__(self, bank: Tensor) -> None:
        self.bank = bank

    def check(self, process: Process, objective: Objective) -> None:
        if not process.has_bridge:
            name, kind = type(objective).__name__, type(process).__name__
            raise ValueError(f"{name} needs a process with closed-form bridges; {kind} has none.")

    def accumulate(self, objective: Objective, use: Draw, size: int, *, weight: float) -> Taught:
        rows = size * BRIDGE_STEPS
        loss = accumulate_bridge_gradient(
            use.process, objective, use.target, self.bank, rows, generator=use.generator, weight=weight
        )
        return Taught(loss, torch.empty(0, dtype=torch.float64))

    def config(self) -> list[str]:
        return [f"Bridges{tuple(self.bank.shape)}"]
