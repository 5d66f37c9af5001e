r"""Where the paths of a training batch come from.

Detached losses accept paths from any law whose support covers both chains. A :class:`Source` makes a share of every
batch: fresh paths of the chain itself, exploratory ones, or backward paths from stored points. Whatever the source,
log densities are those of the current chain, so gradients are exact and weights never see a training aid.

References:
    Trajectory balance: improved credit assignment in GFlowNets (Malkin et al., 2022), https://arxiv.org/abs/2201.13259
    Improved off-policy training of diffusion samplers (Sendera et al., 2024), https://arxiv.org/abs/2402.05098
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, NamedTuple, final

import torch
from torch import Tensor

from diffsampler.pathwise import simulate_pathwise
from diffsampler.process import Process
from diffsampler.target import Target
from diffsampler.trajectory import Trajectory, simulate, simulate_backward

__all__ = ["Draw", "Exploratory", "OnPolicy", "Source", "Stored"]


class Draw(NamedTuple):
    """What a source may use."""

    process: Process
    target: Target
    generator: torch.Generator
    progress: float
    """Share of the training that is done, in [0, 1)."""
    path_gradient: bool = False
    """Whether the states must carry a graph; only sources of on-policy paths can."""
    freeze: bool = False
    """Whether such a graph has forward densities at frozen parameters (:mod:`diffsampler.pathwise`)."""
    pieces: int = 1
    """Pieces of the chain whose graphs are built one after another."""
    micro_batch: int | None = None
    """Largest number of paths that are drawn at once; None draws whole batches."""


class Source(ABC):
    """A source of paths; it may remember what it has seen, and that is part of a checkpoint."""

    on_policy: bool = False
    """Whether its paths follow the current forward chain."""
    backward: bool = False
    """Whether its paths come from the backward chain."""

    @property
    def ready(self) -> bool:
        """Whether it can draw yet; until then its share goes to the first source of the batch."""
        return True

    @abstractmethod
    def draw(self, n: int, use: Draw) -> Trajectory:
        """Draw ``n`` paths with log densities of the current process."""

    def learn(self, trajectory: Trajectory, use: Draw) -> None:
        """See the forward paths of a step that was made, whichever source drew them."""
        return

    def state(self) -> dict[str, Any]:
        """What a resumed run must know, tensors and plain values."""
        return {}

    def restore(self, state: dict[str, Any], device: torch.device) -> None:
        """Return to a :meth:`state`, on a device."""
        return

    def config(self) -> str:
        """What identifies the source in a checkpoint."""
        return type(self).__name__


@final
class OnPolicy(Source):
    """Fresh paths of the forward chain."""

    on_policy = True

    def draw(self, n: int, use: Draw) -> Trajectory:
        if not use.path_gradient:
            return simulate(use.process, use.target, n, generator=use.generator)
        return simulate_pathwise(
            use.process, use.target, n, generator=use.generator, pieces=use.pieces, freeze=use.freeze
        )


@final
class Exploratory(Source):
    """Forward paths with larger noise, which reach modes that the chain does not know yet.

    Arguments:
        inflation: Share by which standard deviations are larger at the start.
        until: Progress of the training at which the share has fallen linearly to zero.
    """

    def __init__(self, *, inflation: float = 0.3, until: float = 0.5) -> None:
        if not inflation > 0.0 or not 0.0 < until <= 1.0:
            raise ValueError(f"Expected inflation > 0 and until in (0, 1]; got {inflation} and {until}.")
        self.inflation = inflation
        self.until = until

    def draw(self, n: int, use: Draw) -> Trajectory:
        share = self.inflation * max(0.0, 1.0 - use.progress / self.until)
        return simulate(use.process, use.target, n, generator=use.generator, exploration=share)

    def config(self) -> str:
        return f"Exploratory({self.inflation}, {self.until})"


@final
class Stored(Source):
    """Backward paths from fixed terminal points: target samples, or the particles of a pilot.

    Arguments:
        points: Terminal points, shape ``(m, D)``, drawn with equal chances.
    """

    backward = True

    def __init__(self, points: Tensor) -> None:
        if points.ndim != 2 or points.shape[0] < 1:
            raise ValueError(f"Expected points of shape (m, D); got {tuple(points.shape)}.")
        self.points = points

    def draw(self, n: int, use: Draw) -> Trajectory:
        index = torch.randint(self.points.shape[0], (n,), generator=use.generator, device=self.points.device)
        return simulate_backward(use.process, use.target, self.points[index], generator=use.generator)

    def config(self) -> str:
        return f"Stored{tuple(self.points.shape)}"
