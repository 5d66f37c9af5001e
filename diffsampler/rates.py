r"""Rates that change over a training run: of learning, and of clipping gradients.

A :class:`Rate` maps the share of the run that is done, in [0, 1), to a factor. What is done is measured in steps or in
an outside budget, whichever is further along, so that a run that ends early still anneals.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import final

__all__ = ["Constant", "Cosine", "Exponential", "Linear", "Rate", "Warmup"]


class Rate(ABC):
    """A factor over the course of a run; its ``repr`` identifies it in a checkpoint."""

    @abstractmethod
    def __call__(self, progress: float) -> float:
        """The factor at ``progress`` in [0, 1]."""


@final
@dataclass(frozen=True)
class Constant(Rate):
    """Always 1."""

    def __call__(self, progress: float) -> float:
        return 1.0


@final
@dataclass(frozen=True)
class Cosine(Rate):
    """From 1 to ``final`` along half a cosine.

    Reference: SGDR (Loshchilov, Hutter, 2017), https://arxiv.org/abs/1608.03983.
    """

    final: float = 0.03

    def __post_init__(self) -> None:
        _positive("final", self.final)

    def __call__(self, progress: float) -> float:
        return self.final + (1.0 - self.final) * 0.5 * (1.0 + math.cos(math.pi * progress))


@final
@dataclass(frozen=True)
class Exponential(Rate):
    """From 1 to ``final`` at an even pace in its logarithm."""

    final: float = 0.02

    def __post_init__(self) -> None:
        _positive("final", self.final)

    def __call__(self, progress: float) -> float:
        return self.final**progress


@final
@dataclass(frozen=True)
class Linear(Rate):
    """From ``start`` to ``end`` in a straight line until a share ``until`` of the run is done, then ``end``."""

    start: float
    end: float = 1.0
    until: float = 1.0

    def __post_init__(self) -> None:
        _positive("start", self.start)
        _positive("end", self.end)
        _share("until", self.until)

    def __call__(self, progress: float) -> float:
        return self.start + (self.end - self.start) * min(1.0, progress / self.until)


@final
@dataclass(frozen=True)
class Warmup(Rate):
    """Another rate, reached in a straight line from ``start`` times it while a ``share`` of the run is done."""

    then: Rate
    share: float = 0.05
    start: float = 0.01

    def __post_init__(self) -> None:
        _positive("start", self.start)
        _share("share", self.share)

    def __call__(self, progress: float) -> float:
        return self.then(progress) * (self.start + (1.0 - self.start) * min(1.0, progress / self.share))


def _positive(name: str, value: float) -> None:
    if not 0.0 < value < math.inf:
        raise ValueError(f"Expected {name} > 0; got {value}.")


def _share(name: str, value: float) -> None:
    if not 0.0 < value <= 1.0:
        raise ValueError(f"Expected {name} in (0, 1]; got {value}.")
