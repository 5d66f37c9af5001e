"""A density that raises an error far out, as one that is minus infinity there."""

from __future__ import annotations

from collections.abc import Callable
from typing import final

import torch
from torch import Tensor

from diffsampler.target import ForwardingTarget, Target

__all__ = ["Guarded"]


@final
class Guarded(ForwardingTarget):
    """A target whose errors at single points count as ``log_prob = -inf`` there.

    Densities written with ``torch.distributions`` raise where a scale underflows. A batch that raises ``ValueError``
    or ``RuntimeError`` is halved until the points at fault are found; where no piece works, the error is the user's.

    Arguments:
        target: The density.
    """

    def __init__(self, target: Target) -> None:
        super().__init__(target)
        self.refused = 0
        """Number of points at which the target raised an error."""
        self.worked = False
        """Whether the target has answered anywhere."""

    def log_prob(self, x: Tensor) -> Tensor:
        return self._evaluated(lambda points: (self.target.log_prob(points),), x)[0]

    def log_prob_and_score(self, x: Tensor) -> tuple[Tensor, Tensor]:
        log_prob, score = self._evaluated(self.target.log_prob_and_score, x)[:2]
        return log_prob, score

    def _evaluated(self, function: Callable[[Tensor], tuple[Tensor, ...]], x: Tensor) -> tuple[Tensor, ...]:
        """The function's results, with ``-inf`` and zero score where it raises."""
        try:
            result = function(x)
        except (ValueError, RuntimeError):
            rows = _by_halves(function, x.reshape(-1, self.dim))
            known = next((row for row in rows if row is not None), None)
            if known is None and not self.worked:
                raise
            self.refused += sum(row is None for row in rows)
            result = _filled(rows, known, x)
        self.worked = True
        return result


def _by_halves(function: Callable[[Tensor], tuple[Tensor, ...]], x: Tensor) -> list[tuple[Tensor, ...] | None]:
    """Results of each point of ``x (n, D)`` whose batch raised, None for the points that raise by themselves."""
    rows: list[tuple[Tensor, ...] | None] = []
    if x.shape[0] == 1:
        return [None]
    for half in x.chunk(2):
        try:
            values = function(half)
        except (ValueError, RuntimeError):
            rows.extend(_by_halves(function, half))
        else:
            rows.extend(zip(*(v.unbind(0) for v in values), strict=True))
    return rows


def _filled(rows: list[tuple[Tensor, ...] | None], known: tuple[Tensor, ...] | None, x: Tensor) -> tuple[Tensor, ...]:
    """Rows joined, with minus infinity for a log density and zero for its gradient where there are none."""
    like = (x.new_zeros(()), torch.zeros_like(x.reshape(-1, x.shape[-1])[0])) if known is None else known
    blank = tuple(torch.full_like(v, -torch.inf if i == 0 else 0.0) for i, v in enumerate(like))
    columns = [torch.stack([blank[i] if row is None else row[i] for row in rows]) for i in range(len(like))]
    return tuple(column.reshape(*x.shape[:-1], *column.shape[1:]) for column in columns)
