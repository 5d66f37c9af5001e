r"""Training inside a trust region of path measures.

The log-variance loss far from the target follows the few paths of largest weight, and then only those. A trust region
asks for less. With :math:`P_i` the forward chain of the last iterate and :math:`P^*` the backward chain from the
target,

.. math::
   Q = \arg\min_Q KL(Q | P^*) \text{ subject to } KL(Q | P_i) \le \epsilon, \qquad
   \frac{dQ}{dP_i} \propto w_i^\eta, \quad \eta = \frac{1}{1 + \lambda} \in [0, 1],

and as :math:`\frac{d}{d\eta} KL(Q_\eta | P_i) = \eta \mathrm{Var}_{Q_\eta}(\log w_i) \ge 0` bisection on a buffer of
paths of :math:`P_i` finds :math:`\eta`. Inner steps fit the chain to :math:`Q_\eta` on that buffer, without new
simulation, by the loss of the tempered weights

.. math:: \eta\,(\log\rho + \log B_\theta) + (1 - \eta) \log P_i - \log P_\theta.

The first inner step has the direction of the untempered one (its gradient is :math:`\eta` times that of the
log-variance loss, and :math:`\eta^2` times in a learned backward chain). So the trust region acts through the inner fit
alone, which must be good. Unguarded it is not: it fits the noise of its buffer, iterates walk away, and nothing calls
them back. Here

* a buffer is fresh, on-policy and large, and a part of it is never trained on;
* the inner loop ends when the held-out loss has stopped to fall, and the best parameters seen are restored;
* it ends when :math:`KL(P_i | P_\theta)` exceeds a few :math:`\epsilon`, and the step is shortened to that bound;
* an iterate whose lower bound of ``log Z`` is far below the last one's is given up: back to the last iterate, its
  buffer, and half the :math:`\epsilon`.

Measured on five double wells in 20 dimensions (``test_trust_region.py``), from a narrow start and without the target's
gradient: at equal steps and batches the log-variance loss alone ends in a few of the 32 modes, inside trust regions in
nearly all. Small buffers are what fails first: with 2048 paths and 256 per step a third of the modes was lost.

Cost: one simulation of the buffer per region, and per step a minibatch without simulation. A buffer holds states and
scores of all steps. Use it where the target is expensive or plain training collapses; near the target :math:`\eta = 1`
and it is the log-variance loss on a buffer, which is slower than fresh paths.

References:
    Trust region constrained measure transport in path space for stochastic optimal control and inference (Blessing,
    Berner, Richter, Domingo-Enrich, Du, Vahdat & Neumann, 2025), https://arxiv.org/abs/2508.12511
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from torch import Tensor

from diffsampler.gradient import accumulate_gradient
from diffsampler.lessons import Lesson, Taught, check_anchors
from diffsampler.objective import Objective
from diffsampler.process import Process
from diffsampler.sources import Draw
from diffsampler.trajectory import Trajectory, retrace, simulate

__all__ = ["TrustRegion", "divergence", "temper"]

BISECTIONS = 60
FIELDS = ("x", "score", "log_forward", "log_backward", "log_initial", "log_terminal", "log_anchor", "log_prob")
GIVE_UP_ERRORS = 4.0
"""Standard errors by which a lower bound must fall to count as a fall."""
RECOVERY = 1.5
"""Factor by which the share of the bound grows back after each region that was kept."""

Parameters = dict[str, Tensor]


def divergence(log_weight: Tensor, eta: float) -> float:
    r""":math:`KL(Q_\eta | P)` from log weights ``(n,)`` of draws of ``P``; at most ``log n``."""
    share = torch.log_softmax(eta * log_weight.double(), 0)
    return float((share.exp() * (share + math.log(len(log_weight)))).sum())


def temper(log_weight: Tensor, bound: float) -> float:
    r"""The largest :math:`\eta \in [0, 1]` with :math:`KL(Q_\eta | P) \le` ``bound``, by bisection.

    Arguments:
        log_weight: Finite log weights of draws of ``P``, shape ``(n,)``.
        bound: The bound, in (0, log n): more than ``log n`` cannot be seen with ``n`` draws.

    Raises:
        ValueError: If the bound is out of range.
    """
    if not 0.0 < bound < math.log(len(log_weight)):
        raise ValueError(f"Expected bound in (0, {math.log(len(log_weight)):.3g}), log of the draws; got {bound}.")
    if divergence(log_weight, 1.0) <= bound:
        return 1.0
    low, high = 0.0, 1.0
    for _ in range(BISECTIONS):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if divergence(log_weight, middle) <= bound else (low, middle)
    return low


@final
class _Tempered(Objective):
    """A loss of weights, of the weights towards ``Q_eta``; ``log_drawn (B,)`` is ``log P_i`` of the paths."""

    def __init__(self, objective: Objective, eta: float, log_drawn: Tensor) -> None:
        super().__init__()
        self.objective = objective
        self.eta = eta
        self.log_drawn = log_drawn

    def forward(self, trajectory: Trajectory) -> Tensor:
        end = self.eta * trajectory.log_terminal + (1.0 - self.eta) * self.log_drawn
        loss: Tensor = self.objective(
            replace(trajectory, log_terminal=end, log_backward=self.eta * trajectory.log_backward)
        )
        return loss


def _log_path(trajectory: Trajectory) -> Tensor:
    """Log density of paths under the forward chain, ``(B,)``."""
    return trajectory.log_initial + trajectory.log_forward.sum(0)


@dataclass
class _Region:
    """The last iterate, what was drawn from it, and the fit so far."""

    parameters: Parameters
    paths: Trajectory
    eta: float
    steps: int = 0
    best: Parameters | None = None
    best_loss: float = math.inf
    worse: int = 0
    over: bool = False

    @property
    def log_weight(self) -> Tensor:
        return self.paths.log_weight

    def bound_of_evidence(self) -> tuple[float, float]:
        """Mean log weight and its standard error."""
        log_weight = self.log_weight
        return float(log_weight.mean()), float(log_weight.std()) / math.sqrt(len(log_weight))


@final
class TrustRegion(Lesson):
    r"""Gradients of a loss of tempered weights on a buffer of paths of the last iterate.

    Arguments:
        bound: The bound :math:`\epsilon` on :math:`KL(Q | P_i)`.
        buffer: Paths per region.
        inner_steps: Most gradient steps per region.
        held_out: Share of the buffer that is never trained on.
        check_every: Gradient steps between looks at the held-out part.
        patience: Looks without a smaller held-out loss after which the fit ends.
        drift: Largest :math:`KL(P_i | P_\theta)`, in units of the bound.
        tolerance: Fall of the lower bound of ``log Z``, in nats beyond noise, at which an iterate is given up.
    """

    def __init__(
        self,
        *,
        bound: float = 0.5,
        buffer: int = 8192,
        inner_steps: int = 30,
        held_out: float = 0.25,
        check_every: int = 5,
        patience: int = 3,
        drift: float = 3.0,
        tolerance: float = 1.0,
    ) -> None:
        for name, value in (("inner_steps", inner_steps), ("check_every", check_every), ("patience", patience)):
            if value < 1:
                raise ValueError(f"Expected {name} >= 1; got {value}.")
        if buffer < 8:
            raise ValueError(f"Expected buffer >= 8; got {buffer}.")
        if not 0.0 < bound < math.log(buffer):
            raise ValueError(f"Expected bound in (0, log buffer = {math.log(buffer):.3g}); got {bound}.")
        if not 0.0 < held_out <= 0.5:
            raise ValueError(f"Expected held_out in (0, 0.5]; got {held_out}.")
        if not drift > 0.0 or not tolerance >= 0.0:
            raise ValueError(f"Expected drift > 0 and tolerance >= 0; got {drift} and {tolerance}.")
        self.bound = bound
        self.buffer = buffer
        self.inner_steps = inner_steps
        self.held_out = held_out
        self.check_every = check_every
        self.patience = patience
        self.drift = drift
        self.tolerance = tolerance
        self.regions = 0
        """Regions begun, those that were given up and begun again included."""
        self.given_up = 0
        """Iterates that were given up."""
        self.caution = 1.0
        """Share of the bound in use."""
        self._region: _Region | None = None
        self._objective: Objective | None = None

    @property
    def eta(self) -> float:
        """The power of the weights in the present region, NaN before the first."""
        return math.nan if self._region is None else self._region.eta

    def check(self, process: Process, objective: Objective) -> None:
        check_anchors(process, objective)
        name = type(objective).__name__
        if objective.needs_path_gradient or objective.on_policy_only or objective.needs_backward_paths:
            raise ValueError(f"Expected a loss of weights at fixed paths from any source; got {name}.")
        if objective.needs_anchors or next(objective.parameters(), None) is not None:
            raise ValueError(f"Expected a loss of whole paths without constants of its own; got {name}.")

    def accumulate(self, objective: Objective, use: Draw, size: int, *, weight: float) -> Taught:
        region = self._region
        if region is None or region.over:
            region = self._renew(use)
        count = len(region.log_weight) - self._num_held_out(region)
        index = torch.randperm(count, generator=use.generator, device=use.generator.device)[: min(size, count)]
        batch, log_drawn = self._current(region, use.process, index)
        loss = accumulate_gradient(use.process, _Tempered(objective, region.eta, log_drawn), batch, weight=weight)
        self._objective = objective
        return Taught(loss, region.log_weight)

    def made(self, use: Draw) -> None:
        region = self._region
        assert region is not None
        region.steps += 1
        last = region.steps >= self.inner_steps
        if last or region.steps % self.check_every == 0:
            self._look(region, use.process, last=last)

    def _num_held_out(self, region: _Region) -> int:
        return max(2, round(self.held_out * len(region.log_weight)))

    def _current(self, region: _Region, process: Process, index: Tensor) -> tuple[Trajectory, Tensor]:
        """Paths of the buffer with densities of the process as it is, and their log density when drawn."""
        drawn = region.paths.select(index)
        again = retrace(process, drawn.x, drawn.score, drawn.log_prob, log_terminal=drawn.log_terminal)
        return again, _log_path(drawn)

    def _look(self, region: _Region, process: Process, *, last: bool) -> None:
        """Judge the fit on paths that it has not seen; end the region when it is time."""
        total = len(region.log_weight)
        index = torch.arange(total - self._num_held_out(region), total, device=region.log_weight.device)
        unseen, log_drawn = self._current(region, process, index)
        assert self._objective is not None
        with torch.no_grad():
            loss = float(_Tempered(self._objective, region.eta, log_drawn)(unseen))
        gone = float((log_drawn - _log_path(unseen)).mean())
        limit = self.drift * self.bound * self.caution
        if not math.isfinite(loss) or not math.isfinite(gone):
            _load(process, region.parameters if region.best is None else region.best)
            region.over = True
            return
        if gone > limit:
            # To second order the divergence is quadratic in the step.
            _shorten(process, region.parameters, math.sqrt(limit / gone))
            region.over = True
            return
        if loss < region.best_loss:
            region.best, region.best_loss, region.worse = _copy(process), loss, 0
        else:
            region.worse += 1
        if last or region.worse >= self.patience:
            if region.best is not None:
                _load(process, region.best)
            region.over = True

    def _renew(self, use: Draw) -> _Region:
        """Draw a buffer from the present chain, or go back to the last one if the present chain is far worse."""
        self.regions += 1
        paths = simulate(use.process, use.target, self.buffer, generator=use.generator)
        finite = paths.log_weight.isfinite()
        enough = int(finite.sum()) >= max(8, self.buffer // 2)
        fresh = _Region(_copy(use.process), paths.select(finite), 1.0)
        old = self._region
        if old is not None and (not enough or self._far_worse(fresh, old)):
            self.given_up += 1
            self.caution *= 0.5
            _load(use.process, old.parameters)
            fresh = _Region(old.parameters, old.paths, 1.0)
        elif not enough:
            raise RuntimeError("Most first paths are non-finite. Use a scale that fits the target.")
        else:
            self.caution = min(1.0, RECOVERY * self.caution)
        fresh.eta = temper(fresh.log_weight, self.bound * self.caution)
        self._region = fresh
        return fresh

    def _far_worse(self, fresh: _Region, old: _Region) -> bool:
        (now, error), (before, other) = fresh.bound_of_evidence(), old.bound_of_evidence()
        return not now > before - self.tolerance - GIVE_UP_ERRORS * math.hypot(error, other)

    def state(self) -> list[dict[str, Any]]:
        own = {"regions": self.regions, "given_up": self.given_up, "caution": self.caution}
        if self._region is None:
            return [own]
        region = vars(self._region) | {"paths": {name: getattr(self._region.paths, name) for name in FIELDS}}
        return [own, region]

    def restore(self, state: list[dict[str, Any]], device: torch.device) -> None:
        for name, value in state[0].items():
            setattr(self, name, value)
        self._region = None
        if len(state) == 2:
            stored = _to(state[1], device)
            paths = Trajectory(**stored.pop("paths"), on_policy=True)
            self._region = _Region(**stored, paths=paths)

    def config(self) -> list[str]:
        numbers = (self.bound, self.buffer, self.inner_steps, self.held_out, self.check_every, self.patience)
        return ["TrustRegion", *(f"{value:g}" for value in (*numbers, self.drift, self.tolerance))]


def _to(value: Any, device: torch.device) -> Any:
    if isinstance(value, dict):
        return {name: _to(entry, device) for name, entry in value.items()}
    return value.to(device) if isinstance(value, Tensor) else value


def _copy(process: Process) -> Parameters:
    return {name: p.detach().clone() for name, p in process.named_parameters()}


@torch.no_grad()
def _load(process: Process, parameters: Parameters) -> None:
    for name, p in process.named_parameters():
        p.copy_(parameters[name])


@torch.no_grad()
def _shorten(process: Process, start: Parameters, share: float) -> None:
    """Go back to ``share`` of the way from the start."""
    for name, p in process.named_parameters():
        p.copy_(start[name] + share * (p - start[name]))
