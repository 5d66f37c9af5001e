r"""Kernels that use no gradient: random-walk Metropolis and elliptical slice sampling.

They call the density as all kernels do and ignore its gradient; :func:`without_gradient` makes such a density from a
log density alone, at the cost of one.

References:
    Weak convergence and optimal scaling of random walk Metropolis algorithms (Roberts, Gelman & Gilks, 1997),
    https://doi.org/10.1214/aoap/1034625254
    Elliptical slice sampling (Murray, Adams & MacKay, 2010), https://arxiv.org/abs/1001.0175
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import final

import torch
from torch import Tensor

from diffsampler.kernel import Info, Kernel, KernelParams, LogDensity, State
from diffsampler.kernels.metropolis import metropolis, scaled_columns, select
from diffsampler.space import EuclideanTorus, MeanFree, Space, Torus

__all__ = ["EllipticalSlice", "RandomWalk", "without_gradient"]


def without_gradient(log_prob: Callable[[Tensor], Tensor]) -> LogDensity:
    """A density for gradient-free kernels, ``x (..., D) -> (log_prob (...), zeros (..., D))``."""

    def log_density(x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            return log_prob(x), torch.zeros_like(x)

    return log_density


def _without_value(log_prob: Tensor) -> Tensor:
    """Where a density is not a number or infinite, whatever its gradient, which is not used here."""
    return log_prob.isnan() | log_prob.isposinf()


@final
class RandomWalk(Kernel):
    r"""Random-walk Metropolis, :math:`x' = x + h \sigma \xi`, accepted with probability :math:`\min(1, \rho'/\rho)`.

    Exact. One evaluation a step; the number of steps to an independent point grows as the dimension.
    """

    exact = True
    target_acceptance = 0.234

    def step(
        self, state: State, log_density: LogDensity, params: KernelParams, generator: torch.Generator | None = None
    ) -> tuple[State, Info]:
        step, scale = scaled_columns(self.space, params, state.x)
        noise = self.space.noise(tuple(state.log_prob.shape), like=state.x, generator=generator)
        x = self.space.project(state.x + step * scale * noise)
        lost = ~x.isfinite().all(-1)
        x = torch.where(lost.unsqueeze(-1), state.x, x)
        proposal = State(x, *log_density(x))
        log_accept = proposal.log_prob.double() - state.log_prob.double()
        broken = lost | _without_value(proposal.log_prob)
        state, acceptance, log_ratio = metropolis(state, proposal, log_accept, broken=broken, generator=generator)
        return state, Info(log_ratio, acceptance, 1, broken)


@final
class EllipticalSlice(Kernel):
    r"""Elliptical slice sampling for a density that is a Gaussian :math:`N(m, L L^T)` times a likelihood.

    A point :math:`\nu` of the Gaussian spans an ellipse through the present one,

    .. math:: x(\theta) = m + (x - m) \cos\theta + (\nu - m) \sin\theta,

    and :math:`\theta` is drawn from a bracket that shrinks until :math:`\ell(x(\theta)) > \ell(x) + \log u`, where
    :math:`\ell = \log\rho - \log N(m, L L^T)`. Exact for any density; good where the likelihood is weak. There is no
    step size (``KernelParams`` is ignored: in SMC give ``step_size=1.0``, there is nothing to tune).

    Chains shrink in lock step: a step costs as many evaluations as its slowest chain needs, and ``Info.useful`` says
    how many each one used. A chain that is still outside after ``max_shrinks`` stays where it is, which keeps the law,
    because the way back would have met the same bracket.

    Arguments:
        space: Euclidean, or mean-free with an isotropic Gaussian.
        mean: :math:`m`, shape ``(D,)``; the origin by default.
        scale: Standard deviations, shape ``(D,)`` or ``(1,)``, or the lower triangular :math:`L`, shape ``(D, D)``.
        max_shrinks: Most points to try.

    Raises:
        ValueError: If the Gaussian does not fit the space.
    """

    exact = True
    target_acceptance = 1.0

    def __init__(self, space: Space, *, scale: Tensor, mean: Tensor | None = None, max_shrinks: int = 64) -> None:
        super().__init__(space)
        mean = torch.zeros(space.dim, dtype=torch.float64) if mean is None else mean.double()
        if isinstance(space, Torus | EuclideanTorus):
            raise ValueError(f"Expected a space with a Gaussian law, Euclidean or MeanFree; got {space}.")
        shapes = [(1,)] if isinstance(space, MeanFree) else [(1,), (space.dim,), (space.dim, space.dim)]
        if tuple(scale.shape) not in shapes:
            raise ValueError(f"Expected scale of a shape among {shapes} on {space}; got {tuple(scale.shape)}.")
        diagonal = scale.diagonal() if scale.ndim == 2 else scale
        if not bool((diagonal > 0.0).all()) or (scale.ndim == 2 and not torch.equal(scale, scale.tril())):
            raise ValueError("Expected positive standard deviations, or a lower triangular factor of a covariance.")
        if mean.shape != (space.dim,):
            raise ValueError(f"Expected mean of shape {(space.dim,)}; got {tuple(mean.shape)}.")
        if max_shrinks < 1:
            raise ValueError(f"Expected max_shrinks to be a positive integer; got {max_shrinks}.")
        self.mean = space.project(mean)
        self.scale = scale.double()
        self.max_shrinks = max_shrinks

    def step(
        self, state: State, log_density: LogDensity, params: KernelParams, generator: torch.Generator | None = None
    ) -> tuple[State, Info]:
        batch, like = tuple(state.log_prob.shape), state.log_prob.double()
        old = self._whiten(state.x)
        spoke = self.space.noise(batch, like=state.x, generator=generator)
        log_likelihood = like + 0.5 * old.square().sum(-1, dtype=torch.float64)
        level = log_likelihood + _uniform(like, generator).log()
        angle = 2.0 * math.pi * _uniform(like, generator)
        low, high = angle - 2.0 * math.pi, angle
        done, nonfinite = torch.zeros_like(like, dtype=torch.bool), torch.zeros_like(like, dtype=torch.bool)
        used, current, tries = torch.zeros_like(like), state, 0
        while tries < self.max_shrinks and not (tries > 0 and bool(done.all())):
            turn = angle.unsqueeze(-1).to(state.x)
            white = old * turn.cos() + spoke * turn.sin()
            # Chains that are done are asked about the point they have, so that the last call holds every chain's.
            x = torch.where(done.unsqueeze(-1), current.x, self.space.project(self._colour(white)))
            lost = ~x.isfinite().all(-1)
            x = torch.where(lost.unsqueeze(-1), current.x, x)
            proposal = State(x, *log_density(x))
            bad = lost | _without_value(proposal.log_prob)
            likelihood = proposal.log_prob.double() + 0.5 * white.square().sum(-1, dtype=torch.float64)
            inside = ~done & ~bad & (likelihood > level)
            nonfinite, used, tries = nonfinite | (bad & ~done), used + (~done).double(), tries + 1
            current, done = select(inside, proposal, current), done | inside
            low, high = torch.where(angle < 0.0, angle, low), torch.where(angle < 0.0, high, angle)
            angle = torch.where(done, angle, low + (high - low) * _uniform(like, generator))
        log_ratio = torch.where(done, like - current.log_prob.double(), torch.zeros_like(like))
        return current, Info(log_ratio, done.double(), tries, nonfinite, useful=used)

    def _whiten(self, x: Tensor) -> Tensor:
        delta, scale = x - self.mean.to(x), self.scale.to(x)
        if scale.ndim < 2:
            return delta / scale
        return torch.linalg.solve_triangular(scale, delta.unsqueeze(-1), upper=False).squeeze(-1)

    def _colour(self, white: Tensor) -> Tensor:
        mean, scale = self.mean.to(white), self.scale.to(white)
        return mean + (white * scale if scale.ndim < 2 else white @ scale.mT)


def _uniform(like: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.rand(like.shape, generator=generator, dtype=like.dtype, device=like.device)
