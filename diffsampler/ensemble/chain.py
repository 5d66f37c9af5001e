r"""Reverse diffusion of an interacting ensemble, with exact weights.

Levels :math:`\sigma_0 > \dots > \sigma_T > 0`, then zero. The ensemble starts at
:math:`x_0 \sim p_0 = N(0, (1 + \sigma_0^2) I)` and makes Gaussian (or mixture) transitions :math:`F_k` that depend on
all members and on all evaluated points. With the noising kernels
:math:`B_k(x_k | x_{k+1}) = N(x_{k+1}, (\sigma_k^2 - \sigma_{k+1}^2) I)`,

.. math::
   \log w_i = \log\gamma(x_{i,T+1}) + \sum_k [\log B_k(x_{i,k} | x_{i,k+1}) - \log F_k(x_{i,k+1} | x_{i,k}, \cdot)]
              - \log p_0(x_{i,0}) .

:math:`E[w_i] = Z` exactly for every member: let member ``i`` follow :math:`\gamma / Z` and the noising kernels, and
generate everything else, the other members and all evaluated points, forward given its path. That is a normalized law,
and in its ratio to the law of the run everything but the member's own transitions cancels. Members are dependent, so
errors come from independent ensembles.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from diffsampler.ensemble.clouds import CHUNK, Cloud, Estimator, Points
from diffsampler.ensemble.frame import Frame, Moments, minimum_ess, tempered_moments
from diffsampler.ensemble.proposals import Belief, Posterior, Proposal, kalman
from diffsampler.ensemble.transitions import Step, Transition
from diffsampler.target import Target

__all__ = ["Ensemble", "LevelReport", "Recipe", "geometric_levels", "reverse_diffusion", "roughness"]

LOG_2PI = math.log(2.0 * math.pi)
FEW = 5.0
"""An estimate from fewer effective points than this is called poor."""


class LevelReport(NamedTuple):
    """How well the estimates of one level are supported."""

    sigma: float
    median_ess: float
    low_ess: float
    """Five percent quantile."""
    poor: float
    """Share of members whose estimate has an effective sample size below five."""
    roughness: float
    r"""Noise in units of the local scale: ``std(log gamma) / sqrt(D)`` among a member's points, 90 % quantile."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How an ensemble is driven."""

    num_particles: int
    num_points: int
    estimator: Estimator
    proposal: Proposal
    transition: Transition


class Ensemble(NamedTuple):
    """The end of a run, in the frame's coordinates."""

    u: Tensor
    """``(R, M, D)``."""
    log_weight: Tensor
    """``(R, M)``."""
    levels: tuple[LevelReport, ...]


def geometric_levels(sigma_max: float, sigma_min: float, num_levels: int) -> list[float]:
    """``num_levels`` noise levels from the largest to the smallest, in equal ratios."""
    if not 0.0 < sigma_min < sigma_max < math.inf:
        raise ValueError(f"Expected 0 < sigma_min < sigma_max; got {sigma_min} and {sigma_max}.")
    if isinstance(num_levels, bool) or not isinstance(num_levels, int) or num_levels < 2:
        raise ValueError(f"Expected num_levels >= 2; got {num_levels!r}.")
    ratio = (sigma_min / sigma_max) ** (1.0 / (num_levels - 1))
    return [sigma_max * ratio**k for k in range(num_levels)]


def reverse_diffusion(
    target: Target,
    frame: Frame,
    sigmas: list[float],
    recipe: Recipe,
    *,
    replicates: int,
    generator: torch.Generator,
    stop: Callable[[LevelReport], bool] | None = None,
) -> Ensemble:
    """Run independent ensembles side by side from noise to the target.

    Arguments:
        target: The density.
        frame: Coordinates of the run.
        sigmas: Noise levels in the frame, decreasing; the step to zero is added.
        recipe: Estimator, proposal and transition.
        replicates: Number ``R`` of independent ensembles.
        generator: Source of randomness.
        stop: Asked after each level; on True the run ends there, with weights that mean nothing.
    """
    dim, empty = target.dim, torch.empty(0, dtype=torch.float64, device=generator.device)
    shape = (replicates, recipe.num_particles, dim)
    eye = torch.diag(empty.new_ones(dim)).expand(replicates, -1, -1)
    moments = Moments(empty.new_zeros(replicates, dim), eye, empty.new_ones(replicates))
    belief = Belief(moments, None)
    width = math.sqrt(1.0 + sigmas[0] ** 2)
    z = torch.randn(shape, generator=generator, dtype=empty.dtype, device=empty.device)
    x = width * z
    log_weight = 0.5 * (z.square() + LOG_2PI).sum(-1) + dim * math.log(width)
    kept: list[Points] = []
    reports: list[LevelReport] = []
    for sigma, sigma_next in zip(sigmas, [*sigmas[1:], 0.0], strict=True):
        points = _evaluate(target, frame, recipe, x, sigma, belief, generator)
        kept = [*kept, points][-recipe.estimator.keeps :]
        cloud = recipe.estimator.cloud(kept)
        belief = belief._replace(moments=_next_moments(cloud, belief.moments, dim))
        cloud = _tempered(cloud, belief.moments.beta)._replace(spread=_spread(belief.moments, sigma, len(cloud.y)))
        step = _advance(recipe.transition, x, cloud, sigma, sigma_next, generator)
        variance = sigma**2 - sigma_next**2
        log_backward = -0.5 * ((x - step.x).square().sum(-1) / variance + dim * (LOG_2PI + math.log(variance)))
        log_weight = log_weight + log_backward - step.log_forward
        local = Posterior(x, sigma, step.mean, step.variance, step.ess)
        belief = belief._replace(local=local)
        reports.append(_report(sigma, step, points))
        x = step.x
        if stop is not None and stop(reports[-1]):
            break
    return Ensemble(x, log_weight + frame.log_prob(target, x), tuple(reports))


def _evaluate(
    target: Target,
    frame: Frame,
    recipe: Recipe,
    x: Tensor,
    sigma: float,
    belief: Belief,
    generator: torch.Generator,
) -> Points:
    components = recipe.proposal.components(x, sigma, belief)
    y = components.sample(recipe.num_points, generator=generator)
    flat = y.flatten(0, -2)
    if recipe.transition.mean.needs_score:
        log_gamma, score = frame.log_prob_and_score(target, flat)
        return Points(y, log_gamma.reshape(y.shape[:-1]), score.reshape(y.shape), components)
    return Points(y, frame.log_prob(target, flat).reshape(y.shape[:-1]), None, components)


def _advance(
    transition: Transition, x: Tensor, cloud: Cloud, sigma: float, sigma_next: float, generator: torch.Generator
) -> Step:
    """Step of all members, some at a time: random numbers are drawn before, so that chunks change nothing."""
    groups = cloud.y.shape[0]
    members = x.reshape(groups, -1, x.shape[-1])
    noise = torch.randn(members.shape, generator=generator, dtype=x.dtype, device=x.device)
    uniform = torch.rand(members.shape[:-1], generator=generator, dtype=x.dtype, device=x.device)
    size = max(1, CHUNK // cloud.log_ratio.numel())
    parts = [
        transition.step(a, cloud, sigma, sigma_next, noise=b, uniform=c)
        for a, b, c in zip(members.split(size, 1), noise.split(size, 1), uniform.split(size, 1), strict=True)
    ]
    whole = (torch.cat(part, 1) for part in zip(*parts, strict=True))
    return Step(*(value.reshape(*x.shape[:2], *value.shape[2:]) for value in whole))


def _tempered(cloud: Cloud, beta: Tensor) -> Cloud:
    """The cloud under ``gamma^beta q^(1 - beta)``: biased at high noise, where else a single point would lead all."""
    beta = beta.repeat_interleave(cloud.y.shape[0] // beta.shape[0]).unsqueeze(-1)
    log_ratio = torch.where(cloud.log_ratio > -math.inf, beta * cloud.log_ratio, cloud.log_ratio)
    return cloud._replace(log_ratio=log_ratio)


def _spread(moments: Moments, sigma: float, groups: int) -> Tensor:
    """Posterior variances ``(groups, 1, D)`` of a Gaussian with these moments."""
    _, gain, _ = kalman(moments.mean.unsqueeze(1), sigma, moments)
    variance = sigma**2 * gain.diagonal(dim1=-2, dim2=-1)
    return variance.repeat_interleave(groups // len(variance), 0).unsqueeze(1)


def _next_moments(cloud: Cloud, moments: Moments, dim: int) -> Moments:
    """Moments of gamma from this level's points; those of the level before where hardly a point has weight."""
    replicates = moments.mean.shape[0]
    y = cloud.y.reshape(replicates, -1, dim)
    log_ratio = cloud.log_ratio.reshape(replicates, -1)
    found = log_ratio.isfinite().sum(-1) > 2 * dim
    safe = torch.where(found.unsqueeze(-1), log_ratio, torch.zeros_like(log_ratio))
    new = tempered_moments(y, safe, ess=minimum_ess(dim))
    return Moments(
        torch.where(found.unsqueeze(-1), new.mean, moments.mean),
        torch.where(found.reshape(-1, 1, 1), new.covariance, moments.covariance),
        torch.where(found, new.beta, moments.beta),
    )


def roughness(log_gamma: Tensor, dim: int) -> float:
    r"""Change of ``log gamma`` over a small cloud, ``(..., K) -> number``: the 90 % quantile over clouds.

    Draws of width :math:`\sigma` about a typical point of a Gaussian with scale ``s`` have
    :math:`\mathrm{Var} \log\gamma \approx D \sigma^2 / s^2`, so that this is :math:`\sigma / s`.
    """
    variance = (log_gamma.var(-1) / dim).flatten()
    variance = variance[variance.isfinite()]
    return float(torch.quantile(variance, 0.9).sqrt()) if variance.numel() else math.inf


def _report(sigma: float, step: Step, points: Points) -> LevelReport:
    ess = step.ess.flatten()
    return LevelReport(
        sigma,
        float(ess.median()),
        float(torch.quantile(ess, 0.05)),
        float((ess < FEW).double().mean()),
        roughness(points.log_gamma, points.y.shape[-1]),
    )
