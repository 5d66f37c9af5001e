r"""Trajectories and the one place where weights are made.

.. math:: \log w = \log \rho(x_K) + \sum_k [\log B_k(x_k | x_{k+1}) - \log F_k(x_{k+1} | x_k)] - \log p_0(x_0)
   \qquad (W)

:math:`E_F[w] = Z` exactly, for any parameters and any number of steps. Log densities are accumulated in float64.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from diffsampler.process import Gaussian, Process
from diffsampler.target import Target

__all__ = ["Trajectory", "cat", "chunks", "ends", "log_kernels", "retrace", "simulate", "simulate_backward", "walk"]

CHUNK_ROWS = 8192
"""(step, particle) rows per batched network call: larger batches stream activations through memory and are slower."""


@dataclass(frozen=True)
class Trajectory:
    """A batch of ``B`` paths of ``K`` steps with everything that weights and losses need."""

    x: Tensor
    """States, shape ``(K + 1, B, S)``; points, ``S = D``, unless the process carries more."""
    score: Tensor | None
    """The target's score at the states, shape ``(K + 1, B, D)``, if the process needs it."""
    log_forward: Tensor
    """``log F_k(x_{k+1} | x_k)``, shape ``(K, B)``, float64."""
    log_backward: Tensor
    """``log B_k(x_k | x_{k+1})``, shape ``(K, B)``, float64."""
    log_initial: Tensor
    """``log p_0(x_0)``, shape ``(B,)``, float64."""
    log_terminal: Tensor
    """``log rho(x_K)``, shape ``(B,)``, float64, with the log density of what the state carries beside the point."""
    log_anchor: Tensor | None
    """Anchor log densities with the end points' own, shape ``(K + 1, B)``, float64, if the process has them."""
    on_policy: bool
    """Whether the paths were drawn from the forward chain itself."""
    log_prob: Tensor | None = None
    """``log rho`` at all states, shape ``(K + 1, B)``, float64, where it was computed at all of them."""

    @property
    def num_steps(self) -> int:
        """Number of transitions ``K``."""
        return self.log_forward.shape[0]

    @property
    def log_weight(self) -> Tensor:
        """Formula (W), shape ``(B,)``, float64."""
        return self.log_terminal + (self.log_backward - self.log_forward).sum(0) - self.log_initial

    def segment_log_weight(self, start: int, stop: int) -> Tensor:
        r"""Log weight of the steps ``start..stop-1``, shape ``(B,)``; consecutive segments sum to :attr:`log_weight`.

        .. math:: \log G = l_{stop} - l_{start} + \sum_{start \le k < stop} [\log B_k - \log F_k]

        with the anchors :math:`l_k` inside (zero where the process has none), :math:`l_0 = \log p_0` and
        :math:`l_K = \log \rho`.
        """
        if not 0 <= start < stop <= self.num_steps:
            raise ValueError(f"Expected 0 <= start < stop <= {self.num_steps}; got {start} and {stop}.")
        ratio = (self.log_backward[start:stop] - self.log_forward[start:stop]).sum(0)
        return self._level(stop) - self._level(start) + ratio

    def _level(self, k: int) -> Tensor:
        if k == 0:
            return self.log_initial
        if k == self.num_steps:
            return self.log_terminal
        return torch.zeros_like(self.log_initial) if self.log_anchor is None else self.log_anchor[k]

    def select(self, index: Tensor) -> Trajectory:
        """The paths that a boolean mask or an index ``(B,)`` picks."""
        return replace(
            self,
            x=self.x[:, index],
            score=None if self.score is None else self.score[:, index],
            log_forward=self.log_forward[:, index],
            log_backward=self.log_backward[:, index],
            log_initial=self.log_initial[index],
            log_terminal=self.log_terminal[index],
            log_anchor=None if self.log_anchor is None else self.log_anchor[:, index],
            log_prob=None if self.log_prob is None else self.log_prob[:, index],
        )


def cat(first: Trajectory, second: Trajectory) -> Trajectory:
    """Join two batches of paths of one process."""

    def join(a: Tensor | None, b: Tensor | None, dim: int) -> Tensor | None:
        return None if a is None or b is None else torch.cat([a, b], dim)

    return Trajectory(
        x=torch.cat([first.x, second.x], 1),
        score=join(first.score, second.score, 1),
        log_forward=torch.cat([first.log_forward, second.log_forward], 1),
        log_backward=torch.cat([first.log_backward, second.log_backward], 1),
        log_initial=torch.cat([first.log_initial, second.log_initial]),
        log_terminal=torch.cat([first.log_terminal, second.log_terminal]),
        log_anchor=join(first.log_anchor, second.log_anchor, 1),
        on_policy=first.on_policy and second.on_policy,
        log_prob=join(first.log_prob, second.log_prob, 1),
    )


def detached(trajectory: Trajectory) -> Trajectory:
    """The same record without a graph."""
    values = {name: value.detach() for name, value in vars(trajectory).items() if isinstance(value, Tensor)}
    return Trajectory(**{**vars(trajectory), **values})


def chunks(num_steps: int, batch: int, rows: int = CHUNK_ROWS) -> list[tuple[slice, slice]]:
    """Cut ``(K, B)`` into blocks of at most ``rows`` (step, particle) pairs: whole steps while they fit."""
    steps = max(1, rows // max(batch, 1))
    return [
        (slice(s, min(s + steps, num_steps)), slice(b, min(b + rows, batch)))
        for s in range(0, num_steps, steps)
        for b in range(0, batch, rows)
    ]


def ends(
    process: Process, x: Tensor, score: Tensor | None, steps: slice, particles: slice, *, first: int = 0
) -> tuple[tuple[Tensor, Tensor | None], tuple[Tensor, Tensor | None]]:
    """States ``(S, b, ...)`` and scores that forward kernels start from, and those that backward kernels start from.

    The latter are shifted back: they differ from the former in the drawn part only, and where the chain has a shift
    their score is the one at the step's start.
    """
    ahead = slice(steps.start + 1, steps.stop + 1)
    k = torch.arange(first + steps.start, first + steps.stop, device=x.device).unsqueeze(-1)
    here = x[steps, particles]
    score_here = None if score is None else score[steps, particles]
    if not process.has_shift:
        return (here, score_here), (x[ahead, particles], None if score is None else score[ahead, particles])
    drawn = process.drawn(process.unshift(k, x[ahead, particles]))
    return (here, score_here), (process.place(here, drawn), score_here)


def log_kernels(
    process: Process,
    x: Tensor,
    score: Tensor | None,
    steps: slice,
    particles: slice,
    *,
    forward: bool = True,
    backward: bool = True,
    first: int = 0,
) -> tuple[Tensor | None, Tensor | None]:
    """Evaluate ``log F_k`` and ``log B_k``, each ``(S, b)``, on a block of (step, particle) pairs in one call.

    States ``x[0]`` are those before step ``first``.
    """
    k = torch.arange(first + steps.start, first + steps.stop, device=x.device).unsqueeze(-1)
    (here, score_here), (there, score_there) = ends(process, x, score, steps, particles, first=first)
    log_f, log_b = None, None
    if forward:
        log_f = process.drawn_space.log_gaussian(process.drawn(there), *process(k, here, score_here))
    if backward:
        log_b = process.drawn_space.log_gaussian(process.drawn(here), *process.backward(k, there, score_there))
    return log_f, log_b


def simulate(
    process: Process,
    target: Target,
    n: int,
    *,
    generator: torch.Generator | None = None,
    path_gradient: bool = False,
    exploration: float = 0.0,
    initial: Tensor | None = None,
) -> Trajectory:
    """Run the forward chain from ``n`` draws of the initial law.

    Arguments:
        process: The chain.
        target: The density at its end.
        n: Number of paths.
        generator: Source of randomness.
        path_gradient: Keep the graph through the states (for pathwise losses); otherwise nothing has a graph.
        exploration: Draw with standard deviations larger by this share. Log densities stay those of the chain itself,
            so the paths serve off-policy losses; their weights say nothing about ``Z``.
        initial: States ``(n, S)`` to start from instead.
    """
    with torch.set_grad_enabled(path_gradient), nullcontext() if path_gradient else process.tabulated():
        x = process.sample_initial(n, generator=generator) if initial is None else initial
        first = observe(process, target, x, path_gradient=path_gradient)
        noises = (step_noise(process, x, generator) for _ in range(process.num_steps))
        steps = range(process.num_steps)
        way = walk(process, target, x, first, steps, noises, factor=1.0 + exploration, path_gradient=path_gradient)
        path, sights = torch.cat([x.unsqueeze(0), way.states]), [first, *way.seen]
        score = _stack([s.score for s in sights])
        log_forward = process.drawn_space.log_gaussian(drawn_along(process, path, steps), *way.kernels)
        log_backward = _log_all(process, path, score, forward=False)[1]
        ratio = log_forward, log_backward
        return record(process, path, score, _levels(sights), ratio, on_policy=exploration == 0.0)


class Walk(NamedTuple):
    """What a stretch of the forward chain leaves behind."""

    states: Tensor
    """States after each of its steps, ``(s, B, S)``."""
    seen: list[Seen]
    """What the target said about them."""
    kernels: Gaussian
    """The kernels that drew them, ``(s, B, ...)``."""


def walk(
    process: Process,
    target: Target,
    x: Tensor,
    seen: Seen,
    steps: range,
    noises: Iterable[Tensor],
    *,
    factor: float = 1.0,
    path_gradient: bool,
) -> Walk:
    """Run forward kernels from states ``x (B, S)`` with given noise ``(B, D)`` a step, inflated by ``factor``."""
    states, sights, means, variances = [], [], [], []
    for k, noise in zip(steps, noises, strict=True):
        index = torch.tensor(k, device=x.device)
        mean, variance = process(index, x, seen.score)
        drawn = process.drawn_space.project(mean + factor * variance.sqrt() * noise)
        x = process.shift(index, process.place(x, drawn))
        last = k == process.num_steps - 1
        seen = observe(process, target, x, path_gradient=path_gradient, terminal=last)
        states.append(x)
        sights.append(seen)
        means.append(mean)
        variances.append(variance.expand(len(x), variance.shape[-1]))
    return Walk(torch.stack(states), sights, Gaussian(torch.stack(means), torch.stack(variances)))


def drawn_along(process: Process, path: Tensor, steps: range) -> Tensor:
    """What the kernels of some steps drew, ``(s, B, D)``, from the states ``(s + 1, B, S)`` around them."""
    k = torch.arange(steps.start, steps.stop, device=path.device).unsqueeze(-1)
    return process.drawn(process.unshift(k, path[1:]))


def step_noise(process: Process, x: Tensor, generator: torch.Generator | None) -> Tensor:
    """Standard noise for one step from states ``x (B, S)``, shape ``(B, D)``."""
    return process.drawn_space.noise((len(x),), like=process.drawn(x), generator=generator)


def _draw(process: Process, kernel: Gaussian, generator: torch.Generator | None) -> Tensor:
    """A draw of a kernel with means ``(B, D)``."""
    space = process.drawn_space
    noise = space.noise(tuple(kernel.mean.shape[:-1]), like=kernel.mean, generator=generator)
    return space.project(kernel.mean + kernel.variance.sqrt() * noise)


def simulate_backward(
    process: Process, target: Target, x: Tensor, *, generator: torch.Generator | None = None
) -> Trajectory:
    """Run the backward chain from terminal points ``x (n, D)``, without a graph.

    With exact samples of the target this gives upper bounds of ``log Z``; with any other points, replayed paths for
    off-policy losses.
    """
    with torch.no_grad():
        seen = [observe(process, target, x, path_gradient=False, terminal=True)]
        x = process.complete(x, seen[-1].score, generator=generator)
        states = [x]
        for k in torch.arange(process.num_steps - 1, -1, -1, device=x.device):
            x = process.unshift(k, x)
            if process.has_shift:
                seen.append(observe(process, target, x, path_gradient=False))
            kernel = process.backward(k, x, seen[-1].score)
            x = process.place(x, _draw(process, kernel, generator))
            if not process.has_shift:
                seen.append(observe(process, target, x, path_gradient=False))
            states.append(x)
        seen.reverse()
        path, score = torch.stack(states[::-1]), _stack([s.score for s in seen])
        return record(process, path, score, _levels(seen), _log_all(process, path, score), on_policy=False)


def retrace(
    process: Process, x: Tensor, score: Tensor | None, log_prob: Tensor | None, *, log_terminal: Tensor | None = None
) -> Trajectory:
    """Paths with log densities of the process as it is now, without a graph and without asking the target again.

    Arguments:
        process: The chain.
        x: States, shape ``(K + 1, B, S)``, drawn by whatever chain.
        score: The target's score there, shape ``(K + 1, B, D)``, if the process needs it.
        log_prob: The target's log density there, shape ``(K + 1, B)``.
        log_terminal: Terminal log density ``(B,)`` where only that was recorded.

    Raises:
        ValueError: If the process needs densities that were not recorded.
    """
    if log_prob is None and (log_terminal is None or process.learns_carried or process.has_anchors):
        raise ValueError(f"Expected the target's densities along the paths of {type(process).__name__}; got None.")
    with torch.no_grad():
        kernels = _log_all(process, x, score)
        end = log_terminal if log_prob is None else None
        return record(process, x, score, log_prob, kernels, on_policy=False, end=end)


class Seen(NamedTuple):
    """What the target said about one state."""

    log_prob: Tensor | None
    score: Tensor | None


def observe(process: Process, target: Target, state: Tensor, *, path_gradient: bool, terminal: bool = False) -> Seen:
    """Density and score at a state, each computed only if somebody needs it."""
    x = process.observed(state)
    if not process.needs_score:
        return Seen(target.log_prob(x).double() if terminal else None, None)
    if not path_gradient:
        log_prob, score = target.log_prob_and_score(x)
        return Seen(log_prob.double(), score.to(x.dtype))
    score = target.score(x, create_graph=not process.detach_score).to(x.dtype)
    needs_density = terminal or process.has_anchors
    return Seen(target.log_prob(x).double() if needs_density else None, score)


def _stack(scores: list[Tensor | None]) -> Tensor | None:
    present = [s for s in scores if s is not None]
    return torch.stack(present) if present else None


def _log_all(process: Process, x: Tensor, score: Tensor | None, *, forward: bool = True) -> tuple[Tensor, Tensor]:
    """Both kernels along whole paths, ``(K, B)`` each, in blocks; without ``forward`` the first is empty."""
    num_steps, batch = x.shape[0] - 1, x.shape[1]
    # Under a path gradient the blocks share one graph; cutting them would only add nodes.
    rows = num_steps * batch if torch.is_grad_enabled() else CHUNK_ROWS
    log_f = x.new_empty((num_steps if forward else 0, batch), dtype=torch.float64)
    log_b = x.new_empty((num_steps, batch), dtype=torch.float64)
    blocks = chunks(num_steps, batch, rows)
    if len(blocks) == 1:
        f, b = log_kernels(process, x, score, *blocks[0], forward=forward)
        return (log_f if f is None else f), b  # type: ignore[return-value]
    for steps, particles in blocks:
        f, b = log_kernels(process, x, score, steps, particles, forward=forward)
        log_b[steps, particles] = b  # type: ignore[assignment]
        if f is not None:
            log_f[steps, particles] = f
    return log_f, log_b


def _levels(seen: list[Seen]) -> Tensor:
    """The target's log densities at all states, ``(K + 1, B)``, or only at the last one, ``(1, B)``."""
    known = [s.log_prob for s in seen if s.log_prob is not None]
    return torch.stack(known if len(known) == len(seen) else known[-1:])


def record(
    process: Process,
    x: Tensor,
    score: Tensor | None,
    levels: Tensor | None,
    kernels: tuple[Tensor, Tensor],
    *,
    on_policy: bool,
    end: Tensor | None = None,
) -> Trajectory:
    """Weights from what was seen; ``end`` is the terminal log density where the levels are not known."""
    complete = None if levels is None or len(levels) < len(x) else levels
    if levels is not None:
        end = process.log_end(x[-1], levels[-1], None if score is None else score[-1])
    assert end is not None
    anchor = None
    if process.has_anchors:
        assert complete is not None
        k = torch.arange(process.num_steps + 1, device=x.device).unsqueeze(-1)
        anchor = process.log_anchor(k, x, complete)
    return Trajectory(
        x=x,
        score=score,
        log_forward=kernels[0],
        log_backward=kernels[1],
        log_initial=process.log_start(x[0], None if complete is None else complete[0]),
        log_terminal=end,
        log_anchor=anchor,
        on_policy=on_policy,
        log_prob=complete,
    )
