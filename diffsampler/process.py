r"""A pair of Markov chains with tractable transitions.

Grid :math:`0 = t_0 < \dots < t_K = 1`, particles :math:`x_0 \to x_K`, where :math:`t = 0` is tractable and
:math:`t = 1` is the target:

* forward: :math:`p_0(x_0) \prod_k F_k(x_{k+1} | x_k)`,
* backward: :math:`\rho(x_K) \prod_k B_k(x_k | x_{k+1})`.

Both kernels are Gaussians on the target's space. They are functions of the step index, the point and the target's score
there, so that a whole trajectory is evaluated in one call and no score is computed twice. Every method of the family
(PIS, DDS, DIS, CMCD, ...) is a choice of these functions.

Usually a state is a point. A chain may carry more: velocities, or a context on which the target depends. Then one step
is

.. math::
   y_{k+1} = S_k(y_k \text{ with } \xi \text{ in place}), \qquad \xi \sim F_k(\cdot | y_k),

where the Gaussian draws one part of the state (:meth:`Process.drawn`) and the shift :math:`S_k`, the same for both
directions and of unit Jacobian, moves the rest; backwards, :math:`\xi \sim B_k(\cdot | S_k^{-1} y_{k+1})`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from diffsampler.networks import Control
from diffsampler.space import Space

__all__ = ["Gaussian", "Process"]


class Gaussian(NamedTuple):
    """A Gaussian transition on a space."""

    mean: Tensor
    """Shape ``(..., D)``."""
    variance: Tensor
    """Shape ``(..., 1)`` or ``(..., D)``; exactly zero stands for a point mass shared by both directions."""


class Process(nn.Module, ABC):
    """Initial law and the forward and backward transitions.

    Indices ``k`` are integer tensors that broadcast against the batch shape of ``x``: a scalar during simulation,
    ``(S, 1)`` against ``(S, B, D)`` when a stretch of a trajectory is evaluated at once. Time is embedded once per
    entry of ``k``, not once per particle.

    Arguments:
        space: Where the particles live.
        num_steps: Number of transitions ``K``.
        needs_score: Whether the transitions use the target's score.
        detach_score: Whether the path gradient treats the score as a constant feature.
        learns_backward: Whether backward kernels have parameters (otherwise their gradient is skipped).
        learns_initial: Whether the initial law has parameters.
        has_anchors: Whether :meth:`log_anchor` is defined (needs ``needs_score``).
        has_bridge: Whether :meth:`sample_bridge` is defined: the backward chain is fixed and linear.
        learns_anchors: Whether anchors have parameters (a flow function, a schedule).
        has_shift: Whether :meth:`shift` moves anything; then backward kernels see the score at the step's start.
        learns_shift: Whether the shift has parameters. The points of a fixed path cannot tell: only losses with a path
            gradient train them.
        learns_carried: Whether :meth:`log_carried` has parameters.
        drawn_space: Where the drawn part lives, ``space`` by default.
    """

    def __init__(
        self,
        space: Space,
        num_steps: int,
        *,
        needs_score: bool = True,
        detach_score: bool = True,
        learns_backward: bool = False,
        learns_initial: bool = False,
        has_anchors: bool = False,
        has_bridge: bool = False,
        learns_anchors: bool = False,
        has_shift: bool = False,
        learns_shift: bool = False,
        learns_carried: bool = False,
        drawn_space: Space | None = None,
    ) -> None:
        super().__init__()
        if num_steps < 1:
            raise ValueError(f"Expected num_steps >= 1; got {num_steps}.")
        self.space = space
        self.num_steps = num_steps
        self.needs_score = needs_score
        self.detach_score = detach_score
        self.learns_backward = learns_backward
        self.learns_initial = learns_initial
        self.has_anchors = has_anchors
        self.has_bridge = has_bridge
        self.learns_anchors = learns_anchors
        self.has_shift = has_shift
        self.learns_shift = learns_shift
        self.learns_carried = learns_carried
        self.drawn_space = space if drawn_space is None else drawn_space

    @abstractmethod
    def sample_initial(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        """Draw initial states ``(n, S)``, in the dtype and on the device of the process; reparameterized."""

    @abstractmethod
    def log_initial(self, x: Tensor) -> Tensor:
        """Log density of the initial law at states ``x (..., S)``, float64; zero for a point mass."""

    @abstractmethod
    def forward(self, k: Tensor, x: Tensor, score: Tensor | None) -> Gaussian:
        """``F_k(. | x_k)`` for ``k`` in ``0..K-1``; ``score`` is the target's score at ``x``."""

    # Points in, points out for most chains; those that carry more override these.

    def observed(self, state: Tensor) -> Tensor:
        """What the target is evaluated at, from states ``(..., S)``."""
        return state

    def point(self, state: Tensor) -> Tensor:
        """The particles' positions ``(..., D)`` in states ``(..., S)``."""
        return state

    def drawn(self, state: Tensor) -> Tensor:
        """The part of states ``(..., S)`` that the kernels draw, ``(..., D)``."""
        return state

    def place(self, state: Tensor, drawn: Tensor) -> Tensor:
        """States with that part replaced."""
        return drawn

    def shift(self, k: Tensor, state: Tensor) -> Tensor:
        """The map :math:`S_k` that ends step ``k``."""
        return state

    def unshift(self, k: Tensor, state: Tensor) -> Tensor:
        """Its inverse."""
        return state

    def complete(self, x: Tensor, score: Tensor | None, *, generator: torch.Generator | None = None) -> Tensor:
        """Terminal states for points ``x`` of the target: what is carried, drawn from its law at the end."""
        return x

    def log_carried(self, state: Tensor, score: Tensor | None) -> Tensor:
        """Log density ``(...)`` of what terminal states carry beside the point, float64; zero for nothing random."""
        return state.new_zeros(state.shape[:-1], dtype=torch.float64)

    # Weights are made from these two: pieces of a chain begin and end at other densities than the chain itself.

    def log_start(self, x: Tensor, log_prob: Tensor | None) -> Tensor:
        """Log density ``(...)`` at which weights start, from first states and the target's log density, float64."""
        return self.log_initial(x)

    def log_end(self, x: Tensor, log_prob: Tensor, score: Tensor | None) -> Tensor:
        """Log density ``(...)`` at which weights end, from last states and the target's log density, float64."""
        return log_prob + self.log_carried(x, score)

    @abstractmethod
    def backward(self, k: Tensor, x: Tensor, score: Tensor | None) -> Gaussian:
        """``B_k(. | x_{k+1})`` for ``k`` in ``0..K-1``; ``x`` and ``score`` belong to step ``k + 1``, shifted back."""

    def log_anchor(self, k: Tensor, x: Tensor, log_prob: Tensor) -> Tensor:
        """Unnormalized log density ``log pi_k`` that segments of trajectories refer to, shape ``(...)``, float64.

        Arguments:
            k: Step index, ``0..K``.
            x: Points, shape ``(..., D)``.
            log_prob: The target's log density there, shape ``(...)``.
        """
        raise NotImplementedError(f"{type(self).__name__} has no anchor densities.")

    def sample_bridge(self, k: Tensor, x: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Draw ``x_k`` given the end point ``x_K = x`` under the backward chain, in one step.

        Arguments:
            k: Step index, ``0..K``, shape ``(...)``.
            x: End points, shape ``(..., D)``.
            generator: Source of randomness.
        """
        raise NotImplementedError(f"{type(self).__name__} has no closed-form bridge.")

    @contextmanager
    def tabulated(self) -> Iterator[None]:
        """Inside, controls embed the whole time grid once instead of each step's time; nothing there has a graph."""
        with ExitStack() as stack:
            for module in self.modules():
                if isinstance(module, Control):
                    stack.enter_context(module.tabulated(self.num_steps))
            yield

    def config(self) -> dict[str, object]:
        """What identifies the process in a checkpoint."""
        shapes = {name: tuple(p.shape) for name, p in self.named_parameters()}
        return {
            "process": type(self).__name__,
            "space": repr(self.space),
            "num_steps": self.num_steps,
            "shapes": shapes,
        }
