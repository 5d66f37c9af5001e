"""Where a run begins and ends: the frame and the noise levels, from a short run of the same kind."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from diffsampler.ensemble.chain import LevelReport, Recipe, reverse_diffusion, roughness
from diffsampler.ensemble.frame import Frame, factor_of, find_moments
from diffsampler.target import Target

__all__ = ["Plan", "make_plan"]

SIGMA_MAX = 2.0
"""Largest noise, in standard deviations of the target."""
FINEST = 0.05
"""Smallest noise, in units of the smallest local scale."""
DESCENT = 0.7
"""Ratio of the pilot's noise levels."""
PILOT_LEVELS = 40
PILOT_PARTICLES = 512
PILOT_POINTS = 2
"""Multiple of a run's evaluations per member: a mode that the pilot loses lies outside of the frame, for good."""
SEARCH_POINTS = 512


class Plan(NamedTuple):
    """What a pilot decides; a run with it is frozen, and so its weights are exact."""

    frame: Frame
    sigma_max: float
    sigma_min: float


def make_plan(target: Target, recipe: Recipe, *, radius: float | None, generator: torch.Generator) -> Plan:
    """Find frame and levels.

    The pilot begins at a Gaussian of standard deviation ``radius`` about the origin, else at the target's prior, else
    at a search that starts from the unit Gaussian. It brings a small ensemble down until density values hardly differ
    within a member's points, and takes the moments of its members.

    Raises:
        ValueError: If the density is finite hardly anywhere, or the search does not settle.
    """
    begin = _begin(target, radius=radius, generator=generator)
    size = min(recipe.num_particles, PILOT_PARTICLES)
    small = replace(recipe, num_particles=size, num_points=PILOT_POINTS * recipe.num_points)
    sigmas = [SIGMA_MAX * DESCENT**k for k in range(PILOT_LEVELS)]

    def fine(report: LevelReport) -> bool:
        return report.roughness < 0.3

    u = reverse_diffusion(target, begin, sigmas, small, replicates=1, generator=generator, stop=fine).u[0]
    u = u[begin.log_prob(target, u).isfinite()]
    if len(u) < 2 * target.dim + 2:
        raise ValueError(f"Expected a finite density at most members of the pilot; got {len(u)}.")
    covariance = u.mT.cov().reshape(target.dim, target.dim)
    frame = Frame(begin.to_original(u.mean(0)), begin.factor @ factor_of(covariance))
    members = torch.linalg.solve_triangular(frame.factor, (begin.to_original(u) - frame.location).mT, upper=False).mT
    scale = _local_scale(target, frame, members, generator)
    return Plan(frame, SIGMA_MAX, min(FINEST * scale, 0.1 * SIGMA_MAX))


def _begin(target: Target, *, radius: float | None, generator: torch.Generator) -> Frame:
    origin = torch.zeros(target.dim, dtype=torch.float64, device=generator.device)
    if radius is not None:
        return Frame(origin, radius * torch.diag(torch.ones_like(origin)))
    if target.prior is not None and target.prior.has_sampler:
        x = target.prior.sample(max(1000, 20 * target.dim), generator=generator).double()
        return Frame(x.mean(0), factor_of(x.mT.cov().reshape(target.dim, target.dim)))
    unit = torch.ones_like(origin)
    found = find_moments(target, num_points=SEARCH_POINTS, generator=generator, location=origin, scale=unit)
    # The search may have settled on part of the mass: the ensemble begins wider.
    return found._replace(factor=2.0 * found.factor)


def _local_scale(target: Target, frame: Frame, u: Tensor, generator: torch.Generator) -> float:
    """Smallest local scale of the density at the members, in the frame: where ``log gamma`` changes by ``D / 2``."""
    sigma = 0.1
    for _ in range(3):
        noise = torch.randn(4, *u.shape, generator=generator, dtype=u.dtype, device=u.device)
        rough = roughness(frame.log_prob(target, u + sigma * noise).mT, target.dim)
        if 0.02 < rough < 0.5:
            return sigma / rough
        sigma = min(1.0, sigma * (0.1 / rough if rough > 0.0 and math.isfinite(rough) else 0.1))
    return 10.0 * sigma
