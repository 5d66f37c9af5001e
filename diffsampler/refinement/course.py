"""How long a refinement may train, and whom it tells."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import final

__all__ = ["Course"]


def _nothing_spent() -> float:
    return 0.0


def _silent(entry: dict[str, float]) -> None:
    """Take note of nothing."""


def _unannounced(stage: str, steps: int | None) -> None:
    """Take note of nothing."""


@final
@dataclass(frozen=True)
class Course:
    """How long a refinement may train, and whom it tells; by default as long as its stages choose, and nobody.

    Arguments:
        steps: Gradient steps in all; None leaves the choice to the stages.
        limited: Whether ``spent`` ever reaches 1; stages without a number of steps then train by it.
        spent: Share of the budget that is used up.
        callback: Called with every entry of the training history.
        start: Called with the name of a stage and its number of steps.
    """

    steps: int | None = None
    limited: bool = False
    spent: Callable[[], float] = _nothing_spent
    callback: Callable[[dict[str, float]], None] = _silent
    start: Callable[[str, int | None], None] = _unannounced

    def until(self, share: float) -> Callable[[], float]:
        """Share used up of what lies between now and ``share`` of the budget."""
        first = self.spent()
        return lambda: (self.spent() - first) / max(share - first, 1e-9)
