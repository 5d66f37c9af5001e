r"""How heavy the tails of a density are, so that a reference can be heavier.

Draws cannot tell: those of a lighter reference end before the tail does. The slope far out can. Where

.. math:: \frac{\mathrm{d}\log\rho}{\mathrm{d}\log t} \to -(\nu + 1) \text{ along an axis}, \qquad
          \to -(\nu + D) \text{ along any ray},

the density is bounded by a product of Student-t laws, or by an elliptical one, with :math:`\nu` degrees of freedom.
Without such a bound importance weights have no finite variance, and no sign of that in a sample of any usual size.

References:
    Safe and effective importance sampling (Owen & Zhou, 2000), https://doi.org/10.1080/01621459.2000.10473909
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from diffsampler.pilot.improper import ray_slopes
from diffsampler.pilot.search import MeanFieldFits
from diffsampler.target import Target

__all__ = ["Tails", "probe_degrees"]

WIDE_DF = 3.0
"""Degrees of freedom of the references that are always there."""


@dataclass(frozen=True)
class Tails:
    """Degrees of freedom of Student-t laws that fall as slowly as a density; infinity where every such law is slower.

    Arguments:
        axis: Of the heaviest coordinate, the others fixed.
        radial: In random directions.
    """

    axis: float = math.inf
    radial: float = math.inf

    def product_df(self, dim: int) -> float | None:
        """Degrees of freedom of a product that covers, or None where elliptical references bound the weights."""
        # An elliptical law with df degrees falls like t^-(df + D) along an axis, too.
        return None if self.axis + 1.0 >= WIDE_DF + dim else float(math.floor(min(5.0, max(1.0, self.axis))))

    def elliptical_df(self) -> float:
        """Degrees of freedom of an elliptical law that covers, at most those of the usual references."""
        return float(math.floor(min(WIDE_DF, max(1.0, self.radial))))


def probe_degrees(target: Target, fits: MeanFieldFits) -> Tails:
    """Tails of a proper density from its slopes far out, ``16 (D + 8)`` evaluations.

    Arguments:
        target: The density.
        fits: Variational fits; rays start within one standard deviation of them, at points that are always the same.
    """
    dim, generator = target.dim, torch.Generator().manual_seed(0)
    mean, spread = fits.pooled()
    unit = fits.scale.median(0).values
    base = mean + unit * torch.randn((4, dim), generator=generator, dtype=mean.dtype)
    random = torch.randn((8, dim), generator=generator, dtype=mean.dtype)
    random = random / random.norm(dim=-1, keepdim=True)
    rays = torch.cat([torch.eye(dim, dtype=mean.dtype), random]) * spread
    slope = ray_slopes(target, base, rays, power=WIDE_DF + dim).median(0).values
    # The slopes are limits that were cut short: 2.98 is 3.
    axis = -float(slope[:dim].max()) - 1.0 + 0.05
    radial = -float(slope[dim:].median()) - dim + 0.05
    return Tails(axis, radial)
