r"""Adjoint and corrector matching: regressions that train a controlled reference chain from end points alone.

From pairs :math:`(x_0, x_K)` of the current chain and their bridges under the reference, states :math:`x_k` are drawn
anew as often as wanted, so that one gradient of the density serves many regression rows. With the terminal adjoint

.. math:: a = -\mathrm{clip}(\nabla\log\rho(x_K)) + h(x_K)

the control is fitted to its expectation, and the corrector to the score of the reference from the start:

.. math::
   L_u &= E\,\lambda_k\,|u_\theta(t_k, x_k) + \kappa_{k+1,K}\,a|^2, \\
   L_h &= E\,\lambda'_k\,\Big|h_\phi(t_{k+1}, x_{k+1}) -
          \frac{\kappa_{0,k+1} x_0 - x_{k+1}}{\Sigma_{0,k+1}}\Big|^2 .

The fixed point of the first is the optimal control for the corrector that is used; of both, the Schroedinger bridge. No
weight enters the regressions. :math:`\lambda_k = (v_k / \bar v)^p`: ``p = 0`` is published, with ``p = 1`` the loss is
the Kullback-Leibler divergence of paths. The learned variances of the steps are fitted along the way, each to the mean
square of what its mean leaves over, by maximum likelihood.

Clipping acts on regression targets alone. It biases the control (never the weights) where gradients are larger, so the
bound must exceed the gradients at equilibrium.

Cost: ``fresh`` paths and as many gradients of the density every ``every`` steps; else one network evaluation a row.

References:
    Adjoint matching (Domingo-Enrich, Drozdzal, Karrer, Chen, 2025), https://arxiv.org/abs/2409.08861
    Adjoint sampling: highly scalable diffusion samplers via adjoint matching (Havens et al., 2025),
    https://arxiv.org/abs/2504.11713
    Adjoint Schroedinger bridge sampler (Liu et al., 2025), https://arxiv.org/abs/2506.22565
"""

from __future__ import annotations

from typing import Any, NamedTuple, final

import torch
from torch import Tensor

from diffsampler.lessons import Lesson, Taught
from diffsampler.methods.reference_process import LOG_VARIANCE_BOUND, ReferenceProcess
from diffsampler.networks import clip
from diffsampler.objective import Objective
from diffsampler.process import Process
from diffsampler.sources import Draw
from diffsampler.space import MeanFree, Space, Torus
from diffsampler.target import ForwardingTarget, Target
from diffsampler.trajectory import Trajectory, simulate

__all__ = ["EndPoints", "Matching", "PathDivergence", "Stages", "clip_vectors"]


@final
class PathDivergence(Objective):
    """The divergence that matching minimizes, up to ``log Z``: what is monitored, never differentiated."""

    def forward(self, trajectory: Trajectory) -> Tensor:
        return -trajectory.log_weight.detach().mean()


class Stages(NamedTuple):
    """Steps of the control and of the corrector, in turns."""

    control: int
    corrector: int

    def trains(self, step: int) -> tuple[bool, bool]:
        """Whether the control and the corrector are trained at a step."""
        first = step % (self.control + self.corrector) < self.control
        return first, not first


def clip_vectors(space: Space, v: Tensor, bound: float) -> Tensor:
    """Shorten tangent vectors ``(..., D)`` to ``bound``: each particle's own, each angle, or the whole in Euclid's."""
    size = space.d if isinstance(space, MeanFree) else 1 if isinstance(space, Torus) else space.dim
    parts = v.unflatten(-1, (space.dim // size, size))
    norm = parts.norm(dim=-1, keepdim=True)
    return space.project_vector((parts * (bound / norm).clamp(max=1.0)).flatten(-2))


@final
class _ScoreKeeper(ForwardingTarget):
    """Keeps the score of the last points, which costs hardly more than their density alone."""

    def __init__(self, target: Target) -> None:
        super().__init__(target)
        self.kept: Tensor | None = None

    def log_prob(self, x: Tensor) -> Tensor:
        log_prob, self.kept = self.target.log_prob_and_score(x)
        return log_prob


@final
class EndPoints:
    """A ring of pairs of end states with the clipped score at the last.

    Arguments:
        capacity: Number of pairs kept.
    """

    def __init__(self, capacity: int) -> None:
        if capacity < 1:
            raise ValueError(f"Expected capacity >= 1; got {capacity}.")
        self.capacity = capacity
        self.rows = torch.empty(0, 3, 0)

    def __len__(self) -> int:
        return self.rows.shape[0]

    def add(self, first: Tensor, last: Tensor, score: Tensor) -> None:
        """Append pairs ``(n, D)``; the oldest leave when the ring is full."""
        rows = torch.stack([first, last, score], 1)
        kept = rows[:0] if len(self) == 0 else self.rows
        self.rows = torch.cat([kept, rows])[-self.capacity :]

    def pick(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Draw ``n`` pairs with replacement."""
        index = torch.randint(len(self), (n,), generator=generator, device=self.rows.device)
        first, last, score = self.rows[index].unbind(1)
        return first, last, score


@final
class Matching(Lesson):
    """Adjoint matching, and corrector matching where the start law is not a point.

    Arguments:
        fresh: Paths simulated at a time.
        every: Steps between them; at the first step there are some already.
        capacity: End points kept.
        clip: Largest norm of the score of one particle (of one angle, of the whole point in Euclidean space); None for
            no bound.
        power: The exponent ``p`` of the loss weights.
        stages: Control and corrector in turns; None trains both at every step.
    """

    def __init__(
        self,
        *,
        fresh: int = 512,
        every: int = 50,
        capacity: int = 10_000,
        clip: float | None = 100.0,
        power: float = 1.0,
        stages: Stages | None = None,
    ) -> None:
        if fresh < 2 or every < 1:
            raise ValueError(f"Expected fresh >= 2 and every >= 1; got {fresh} and {every}.")
        if clip is not None and not clip > 0.0:
            raise ValueError(f"Expected clip > 0 or None; got {clip}.")
        if stages is not None and min(stages) < 1:
            raise ValueError(f"Expected stages of at least one step; got {tuple(stages)}.")
        self.fresh = fresh
        self.every = every
        self.clip = clip
        self.power = power
        self.stages = stages
        self.ends = EndPoints(capacity)
        self.step = 0
        self.latest: Tensor | None = None
        """End states that the last step drew, ``(n, S)``, None if it drew none."""

    def check(self, process: Process, objective: Objective) -> None:
        if not isinstance(process, ReferenceProcess) or not isinstance(objective, PathDivergence):
            raise ValueError(
                "Expected a ReferenceProcess and PathDivergence for matching; "
                f"got {type(process).__name__} and {type(objective).__name__}."
            )
        if self.stages is not None and not process.learns_backward:
            raise ValueError("Expected stages=None from a point: there is no corrector to train.")

    def accumulate(self, objective: Objective, use: Draw, size: int, *, weight: float) -> Taught:
        process = use.process
        assert isinstance(process, ReferenceProcess)
        log_weight = torch.empty(0, dtype=torch.float64)
        self.latest = None
        if len(self.ends) == 0 or (self.step + 1) % self.every == 0:
            log_weight = self._simulate(process, use)
        loss, both = 0.0, process.learns_backward
        control, corrector = (True, both) if self.stages is None else self.stages.trains(self.step)
        first, last, score = self.ends.pick(size, use.generator)
        k = torch.randint(process.num_steps, (size,), generator=use.generator, device=last.device)
        if control:
            loss += self._match_control(process, k, first, last, score, use.generator, weight)
        if corrector:
            loss += self._match_corrector(process, k, first, last, use.generator, weight)
        return Taught(loss, log_weight)

    def _simulate(self, process: ReferenceProcess, use: Draw) -> Tensor:
        """Draw end points with the chain as it is; returns the finite log weights of the paths."""
        keeper = _ScoreKeeper(use.target)
        path = simulate(process, keeper, self.fresh, generator=use.generator)
        assert keeper.kept is not None
        score = keeper.kept.to(path.x.dtype)
        if self.clip is not None:
            score = clip_vectors(process.space, score, self.clip)
        kept = path.x[-1].isfinite().all(-1) & score.isfinite().all(-1)
        # The winding of an angle is drawn anew, from its law under the reference.
        last = process.complete(process.point(path.x[-1]), None, generator=use.generator)
        self.ends.add(path.x[0][kept], last[kept], score[kept])
        self.latest = path.x[-1][kept]
        return path.log_weight[path.log_weight.isfinite()]

    def _rows(self, process: ReferenceProcess, k: Tensor) -> Tensor:
        """Loss weights ``(n,)``."""
        v = process.variance / process.variance.mean()
        return v[k].squeeze(-1).pow(self.power)

    def _match_control(
        self,
        process: ReferenceProcess,
        k: Tensor,
        first: Tensor,
        last: Tensor,
        score: Tensor,
        generator: torch.Generator,
        weight: float,
    ) -> float:
        with torch.no_grad():
            x = process.between(k, first, last, generator=generator)
            optimum = process.ahead[k + 1] * (score - process.terminal_corrector(last))
        control = process.steer(k, x)
        loss = (self._rows(process, k) * (control - optimum).square().sum(-1)).mean()
        total = loss
        if process.log_variance.requires_grad:
            v, left, ahead = process.variance[k], process.left[k], process.ahead[k + 1]
            with torch.no_grad():
                # The mean of x_{k+1} given both ends, and what is left over around it.
                bridge = ahead / left * (last - process.ahead[k] * x)
                square = v.square() * (bridge - control).square().sum(-1, keepdim=True) / process.space.dof
                square = square + v * process.left[k + 1] / left
            total = total + self._likelihood(process, process.log_variance[k], square / v)
        (weight * total).backward()
        return loss.item()

    def _match_corrector(
        self,
        process: ReferenceProcess,
        k: Tensor,
        first: Tensor,
        last: Tensor,
        generator: torch.Generator,
        weight: float,
    ) -> float:
        after = k + 1
        with torch.no_grad():
            x = process.between(after, first, last, generator=generator)
            optimum = (process.reach[after] * first - x) / process.level[after]
        corrector = process.correct(after, x)
        scale = process.variance[k] / process.contraction[k]
        # The divergence of paths weights errors by the square of the step over the variance of the way back.
        rows = (scale.square() / process.back_variance[k] / process.variance.mean()).squeeze(-1).pow(self.power)
        loss = (rows * (corrector - optimum).square().sum(-1)).mean()
        total = loss
        variance = process.back_log_variance
        if variance is not None and variance.requires_grad:
            with torch.no_grad():
                square = scale.square() * (corrector - optimum).square().sum(-1, keepdim=True) / process.space.dof
                square = square + process.variance[k] * process.level[k] / process.level[after]
            total = total + self._likelihood(process, variance[k], square / process.back_variance[k])
        (weight * total).backward()
        return loss.item()

    def _likelihood(self, process: ReferenceProcess, log_variance: Tensor, ratio: Tensor) -> Tensor:
        """Negative log likelihood of residuals with mean squares ``ratio (n, 1)``, in units of the variance."""
        value = clip(log_variance, LOG_VARIANCE_BOUND)
        return 0.5 * process.space.dof * (value + ratio * (-value).exp()).mean()

    def made(self, use: Draw) -> None:
        self.step += 1

    def state(self) -> list[dict[str, Any]]:
        return [{"rows": self.ends.rows, "step": self.step}]

    def restore(self, state: list[dict[str, Any]], device: torch.device) -> None:
        self.ends.rows, self.step = state[0]["rows"].to(device), state[0]["step"]

    def config(self) -> list[str]:
        stages = "together" if self.stages is None else f"{self.stages.control} and {self.stages.corrector}"
        return [
            f"Matching({self.fresh} every {self.every}, {self.ends.capacity})",
            f"clip {self.clip}, power {self.power:g}, {stages}",
        ]
