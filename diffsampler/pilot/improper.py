r"""Signs that a density has no finite integral.

Two tests, neither of which can prove that a density is proper: scales of variational fits that run away, and the
slope of :math:`\log\rho` along rays, :math:`\mathrm{d}\log\rho / \mathrm{d}\log t`. A ray must fall faster than
:math:`t^{-1}`, and the average direction faster than :math:`t^{-D}`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from diffsampler.pilot.search import MeanFieldFits
from diffsampler.target import Target

__all__ = ["TailReport", "probe_tails", "ray_directions", "ray_slopes"]

RUNAWAY = 25.0
NEAR, FAR = 1e4, 1e6
# 1/(1+|t|) has slope -0.99998 between the two distances; a Student-t law with 0.05 degrees of freedom has -1.05.
TOLERANCE = 0.01


@dataclass(frozen=True)
class TailReport:
    """What the tests of properness saw.

    Arguments:
        runaway: Indices of coordinates whose fitted scale grew without bound.
        flat: Directions ``(m, D)``, in the original coordinates, along which the density falls too slowly.
        shell: Whether the density falls too slowly in most random directions for its dimension.
    """

    runaway: tuple[int, ...]
    flat: Tensor
    shell: bool

    @property
    def improper(self) -> bool:
        """Whether any test failed."""
        return bool(self.runaway) or self.flat.shape[0] > 0 or self.shell

    def describe(self) -> str:
        """One sentence for a finding."""
        parts = []
        if self.runaway:
            parts.append(f"the scale of coordinates {list(self.runaway[:8])} grows without bound")
        if self.flat.shape[0]:
            ray = [round(v, 3) for v in (self.flat[0] / self.flat[0].abs().max()).tolist()[:8]]
            parts.append(f"the density falls too slowly along the direction {ray}")
        if self.shell:
            parts.append("the density falls more slowly than |x|^-dim in most directions")
        return "; ".join(parts)


def ray_directions(target: Target, fits: MeanFieldFits, *, generator: torch.Generator | None = None) -> Tensor:
    r"""Directions worth a look, shape ``(m, D)``, in units of the pooled scale.

    The axes; the eigenvectors of the scores' second moment :math:`E[g g^\top]`, whose smallest one is a flat
    direction wherever it points; and the principal axes of the fitted means, which line up along a ridge.
    """
    mean, spread = fits.pooled()
    draw = torch.randn((max(256, 4 * target.dim), target.dim), generator=generator, dtype=mean.dtype)
    local = fits.scale.log().median(0).values.exp()
    score = target.log_prob_and_score(mean + local * draw)[1].to(mean.dtype) * local
    score = score[torch.isfinite(score).all(-1)]
    directions = [torch.eye(target.dim, dtype=mean.dtype)]
    if score.shape[0] >= 2:
        # Directions, not sizes: a few huge scores would otherwise hide the flat subspace in rounding.
        unit = score / score.norm(dim=-1, keepdim=True).clamp_min(1e-300)
        vectors = torch.linalg.eigh(unit.mT @ unit)[1]
        directions.append(vectors.mT * (local / spread))
    centred = (fits.location - mean) / spread
    if centred.shape[0] >= 2 and float(centred.abs().max()) > 1e-9:
        directions.append(torch.linalg.svd(centred, full_matrices=False)[2])
    rays = torch.cat(directions)
    return rays / rays.norm(dim=-1, keepdim=True)


def ray_slopes(target: Target, base: Tensor, rays: Tensor, *, power: float) -> Tensor:
    r"""Slopes ``d log_prob / d log t`` far out, from points ``base (n, D)`` along ``+-rays (m, D)``: ``(n, m, 2)``.

    A slope counts only where the level has not dropped below that of a tail ``t^-power`` before (else it is ``-inf``):
    a curved density that climbs out of an absurd depth is not heavy-tailed.
    """
    signed = torch.stack([rays, -rays], 1)
    with torch.no_grad():
        level = target.log_prob(base).double()[:, None, None]
        near = target.log_prob(base[:, None, None] + NEAR * signed).double()
        far = target.log_prob(base[:, None, None] + FAR * signed).double()
    slope = (far - near) / math.log(FAR / NEAR)
    shallow = near > level - 1.5 * power * math.log(NEAR) - 20.0
    slope = torch.where(torch.isfinite(slope) & shallow, slope, -math.inf)
    return torch.where(far == math.inf, math.inf, slope)


def _slow(target: Target, base: Tensor, rays: Tensor, power: float) -> Tensor:
    """Fraction of points from which ``log_prob`` falls no faster than ``t^-power`` along ``+-rays``, ``(rays, 2)``."""
    return (ray_slopes(target, base, rays, power=power) > -power - TOLERANCE).double().mean(0)


def probe_tails(
    target: Target, fits: MeanFieldFits, *, points: int = 16, generator: torch.Generator | None = None
) -> TailReport:
    """Test whether the integral can be finite, from variational fits (``fits.good()``)."""
    log_scale = fits.scale.log()
    unit = fits.scale.median(0).values.log()
    runaway = tuple(torch.nonzero(log_scale.median(0).values > RUNAWAY).flatten().tolist())
    mean, spread = fits.pooled()
    if runaway:
        return TailReport(runaway, mean.new_zeros(0, target.dim), shell=False)
    base = mean + unit.exp() * torch.randn((points, target.dim), generator=generator, dtype=mean.dtype)
    # Every evaluation is in x; rays are in units of the pooled scale, which is what "far" means here.
    rays = ray_directions(target, fits, generator=generator)
    flat = (_slow(target, base, rays * spread, 1.0) > 0.5).any(-1)
    random = torch.randn((8, target.dim), generator=generator, dtype=mean.dtype)
    random = random / random.norm(dim=-1, keepdim=True)
    shell = bool(_slow(target, base, random * spread, float(target.dim)).mean() > 0.5)
    return TailReport((), (rays * spread)[flat], shell=shell and target.dim > 1)
