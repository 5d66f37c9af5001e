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
from diffsampler.networks import ControlModule
from diffsampler.objective import Objective
from diffsampler.process import Process
from diffsampler.rates import Rate
from diffsampler.sources import Draw, Source
from diffsampler.trajectory import Trajectory, cat, detached

__all__ = ["Bridges", "Lesson", "Paths", "RampedClip", "Taught"]

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

    takes_parts: bool = False
    """Whether it can add up the gradient of a batch from parts of at most ``use.micro_batch`` paths."""

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


def check_parts(lesson: Lesson, objective: Objective, *, micro_batch: int | None, pieces: int) -> None:
    """Refuse ways to save memory that would change the gradient, or do nothing."""
    name, kind = type(objective).__name__, type(lesson).__name__
    if pieces > 1 and not objective.needs_path_gradient:
        raise ValueError(f"Expected pieces=1: {name} keeps no graph along paths to be cut; got {pieces}.")
    if micro_batch is None:
        return
    if not lesson.takes_parts:
        raise ValueError(f"Expected micro_batch=None: {kind} draws what it needs at once; got {micro_batch}.")
    if objective.needs_path_gradient and not objective.averages:
        raise ValueError(
            f"Expected micro_batch=None: {name} with a path gradient is no mean over paths, so it needs the graph of "
            f"the whole batch; got {micro_batch}. Use pieces to save memory."
        )


@final
class Paths(Lesson):
    """Whole trajectories from a mixture of sources.

    Arguments:
        sources: Sources and their shares of the batch; the first must be able to draw from the start.
    """

    takes_parts = True

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
                raise ValueError(
                    f"{name} needs on-policy trajectories; {kind} makes others. LogVariance learns from any."
                )
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
        # A source may return fewer paths than asked for: those that are lost.
        drawn = [source for source, n in enumerate(counts) if n]
        sizes = torch.tensor([len(part.log_initial) for part in parts], device=batch.log_initial.device)
        return batch, torch.repeat_interleave(torch.tensor(drawn, device=sizes.device), sizes)

    def accumulate(self, objective: Objective, use: Draw, size: int, *, weight: float) -> Taught:
        """As in :class:`Lesson`; with ``use.micro_batch`` the gradient is still that of the whole batch.

        Losses at fixed paths draw their paths in turn and differentiate rows anyway. Losses with a path gradient add up
        gradients of parts, which is right for means over paths only (:func:`check_parts`).
        """
        sizes = _parts(size, use.micro_batch)
        if objective.needs_path_gradient:
            return self._accumulate_pathwise(objective, use, sizes, weight)
        trajectory, origin = self._draw_parts(use, sizes)
        log_weight = trajectory.log_weight
        finite = log_weight.isfinite()
        kept = trajectory if bool(finite.all()) else trajectory.select(finite)
        loss = math.nan
        if int(finite.sum()) >= 2:
            loss = accumulate_gradient(use.process, objective, kept, weight=weight)
        return self._taught(trajectory, origin, finite, loss)

    def _draw_parts(self, use: Draw, sizes: Sequence[int]) -> tuple[Trajectory, Tensor]:
        parts = [self.draw(use, size) for size in sizes]
        batch, origin = parts[0]
        for part, number in parts[1:]:
            batch, origin = cat(batch, part), torch.cat([origin, number])
        return batch, origin

    def _accumulate_pathwise(self, objective: Objective, use: Draw, sizes: Sequence[int], weight: float) -> Taught:
        modules = (use.process, objective)
        parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
        total: list[Tensor | None] = [None] * len(parameters)
        loss, count, seen = 0.0, 0, []
        for size in sizes:
            trajectory, origin = self.draw(use, size)
            finite = trajectory.log_weight.detach().isfinite()
            kept = trajectory if bool(finite.all()) else trajectory.select(finite)
            if (number := int(finite.sum())) == 0:
                continue
            value = objective(kept)
            slopes = torch.autograd.grad(number * value, parameters, allow_unused=True)
            total = [_plus(known, slope) for known, slope in zip(total, slopes, strict=True)]
            loss += number * value.item()
            count += number
            seen.append((detached(kept), origin[finite]))
        if count < 2:
            return Taught(math.nan, torch.empty(0, dtype=torch.float64))
        for p, known in zip(parameters, total, strict=True):
            p.grad = _plus(p.grad, None if known is None else (weight / count) * known)
        batch, origins = seen[0]
        for part, which in seen[1:]:
            batch, origins = cat(batch, part), torch.cat([origins, which])
        return self._taught(batch, origins, torch.ones_like(origins, dtype=torch.bool), loss / count)

    def _taught(self, trajectory: Trajectory, origin: Tensor, finite: Tensor, loss: float) -> Taught:
        """Remember the forward paths, and report the weights of the on-policy ones."""
        self._forward = trajectory.select(finite & _among(origin, [not source.backward for source in self.sources]))
        chosen = finite & _among(origin, [source.on_policy for source in self.sources])
        return Taught(loss, trajectory.log_weight[chosen])

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


def _plus(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    """The sum of what there is."""
    return second if first is None else first if second is None else first + second


def _parts(size: int, most: int | None) -> list[int]:
    """Sizes of parts of a batch."""
    most = size if most is None else most
    return [min(most, size - start) for start in range(0, size, most)]


def _among(origin: Tensor, chosen: list[bool]) -> Tensor:
    """Which paths come from the chosen sources, boolean ``(B,)``."""
    return torch.tensor(chosen, device=origin.device)[origin]


@final
class Bridges(Lesson):
    """Single steps of closed-form bridges from stored terminal points.

    Arguments:
        bank: Terminal points ``(m, D)``.
    """

    takes_parts = True

    def __init__(self, bank: Tensor) -> None:
        self.bank = bank

    def check(self, process: Process, objective: Objective) -> None:
        if not process.has_bridge:
            name, kind = type(objective).__name__, type(process).__name__
            raise ValueError(f"{name} needs a process with closed-form bridges; {kind} has none.")

    def accumulate(self, objective: Objective, use: Draw, size: int, *, weight: float) -> Taught:
        loss = 0.0
        for part in _parts(size, use.micro_batch):
            share, rows = part / size, part * BRIDGE_STEPS
            loss += share * accumulate_bridge_gradient(
                use.process, objective, use.target, self.bank, rows, generator=use.generator, weight=share * weight
            )
        return Taught(loss, torch.empty(0, dtype=torch.float64))

    def config(self) -> list[str]:
        return [f"Bridges{tuple(self.bank.shape)}"]


@final
class RampedClip(Lesson):
    """Another lesson under a clip of gated features that changes: scores far from the target are wild early on.

    Only while gradients are taken is the clip another one; drawing always uses the process' own.

    Arguments:
        lesson: Where gradients come from.
        rate: Factor of every control's bound; it must end at 1.

    Example:
        ``RampedClip(Paths([(OnPolicy(), 1.0)]), Linear(0.1, until=0.3))``
    """

    def __init__(self, lesson: Lesson, rate: Rate) -> None:
        if abs(rate(1.0) - 1.0) > 1e-9:
            raise ValueError(f"Expected a rate that ends at 1; got {rate!r}, which ends at {rate(1.0):g}.")
        self.lesson = lesson
        self.rate = rate
        self.takes_parts = lesson.takes_parts

    def check(self, process: Process, objective: Objective) -> None:
        self.lesson.check(process, objective)
        if not any(isinstance(module, ControlModule) for module in process.modules()):
            raise ValueError(f"Expected a process with a clipped control; {type(process).__name__} has none.")

    def accumulate(self, objective: Objective, use: Draw, size: int, *, weight: float) -> Taught:
        controls = [module for module in use.process.modules() if isinstance(module, ControlModule)]
        own = [control.bound for control in controls]
        try:
            for control, bound in zip(controls, own, strict=True):
                control.bound = bound * self.rate(use.progress)
            return self.lesson.accumulate(objective, use, size, weight=weight)
        finally:
            for control, bound in zip(controls, own, strict=True):
                control.bound = bound

    def made(self, use: Draw) -> None:
        self.lesson.made(use)

    def state(self) -> list[dict[str, Any]]:
        return self.lesson.state()

    def restore(self, state: list[dict[str, Any]], device: torch.device) -> None:
        self.lesson.restore(state, device)

    def config(self) -> list[str]:
        return [*self.lesson.config(), f"clip {self.rate!r}"]
