r"""Four particles in the plane whose pairs feel a double well: a particle system with an exact truth.

With the first particle as the origin the energy of the other three is a cycle, :math:`\sum_i u(|p_i|) +
\sum_{i<j} u(|p_i - p_j|)`, so the integral over relative positions is the trace of a cube:

.. math:: Z_{rel} = \operatorname{tr} T^3, \qquad
          T(p, p') = e^{-u(|p|)/2}\, e^{-u(|p - p'|)}\, e^{-u(|p'|)/2}

:math:`T` commutes with rotations, so in polar coordinates it splits into one small matrix per angular momentum, all of
them from one Fourier transform. The trapezoidal rule converges faster than any power of the grid's width. The integral
over mean-free positions is :math:`Z = Z_{rel} / n^{d/2}`.
"""

from __future__ import annotations

import math
from typing import NamedTuple, final

import torch
from torch import Tensor

from diffsampler.space import MeanFree
from diffsampler.target import Target
from diffsampler.targets import checks, draws
from diffsampler.targets.line import LineDensity
from diffsampler.targets.pairs import PairPotential, pair_energy, pair_energy_and_force

__all__ = ["DoubleWell4", "DoubleWellPotential", "PairLaw", "exact_pair_law"]

CENTRE, QUARTIC, QUADRATIC = 4.0, 0.9, 4.0
LOWEST = -(QUADRATIC**2) / (4.0 * QUARTIC)
"""Energy of a pair at the bottom of either well."""
SOFTENING = 1e-12
"""Added to squared distances: the direction of a pair that coincides is undefined, its force is then zero."""
REACH = (0.4, 7.6)
"""Distances at which a pair's Boltzmann factor falls below 1e-40 of its largest."""
CANDIDATES_PER_DRAW = 512
CANDIDATES = 1 << 18
"""Candidates of one round at most."""


class PairLaw(NamedTuple):
    """Exact law of the distance between two particles."""

    distance: Tensor
    """Equally spaced distances, shape ``(m,)``."""
    density: Tensor
    """Probability density at these distances, shape ``(m,)``; sums to one over the spacing."""
    log_normalizer: float


@final
class DoubleWellPotential(PairPotential):
    r"""Energy of a pair at distance :math:`r`: :math:`u(r) = 0.9 (r - 4)^4 - 4 (r - 4)^2`."""

    def energy(self, square: Tensor) -> Tensor:
        w = ((square + SOFTENING).sqrt() - CENTRE).square()
        return w * (QUARTIC * w - QUADRATIC)

    def energy_and_force(self, square: Tensor) -> tuple[Tensor, Tensor]:
        r = square.add_(SOFTENING).sqrt_()
        t = r - CENTRE
        w = t * t
        return w * (QUARTIC * w - QUADRATIC), t.mul_(2.0 * QUADRATIC - 4.0 * QUARTIC * w).div_(r)


@final
class DoubleWell4(Target):
    r"""Four particles in the plane with a double well between every pair.

    .. math:: E(x) = \sum_{i<j} \left[0.9\,(r_{ij} - 4)^4 - 4\,(r_{ij} - 4)^2\right], \qquad r_{ij} = |x_i - x_j|

    in units of kT, on mean-free positions. A pair prefers 2.5 and 5.5; six pairs of four points cannot have all they
    want. The constant is exact (29.667232, see the module's docstring), so is the law of the pair distances
    (:func:`exact_pair_law`), and so is the sampler: distances to the first particle are drawn from a pair's own law,
    directions uniformly, and the three remaining pairs accept or reject. The reference files in circulation for this
    system are not in equilibrium (mean distance 3.97, exactly 4.045): 2,000 exact samples are 0.46 away from one of
    them after alignment, and 0.23 from 2,000 others.

    Cost: about one draw per 500 candidates, that is 1e4 draws per second on a core.

    Reference: Köhler, Klein and Noé, "Equivariant flows: exact likelihood generative learning for symmetric densities"
    (2020, https://arxiv.org/abs/2006.02425).
    """

    def __init__(self) -> None:
        super().__init__(MeanFree(4, 2), log_normalizer=exact_pair_law().log_normalizer, has_sampler=True)
        self.potential = DoubleWellPotential()
        self.radial = LineDensity(lambda r: r.log() - _u(r), low=REACH[0], high=REACH[1], cells=20_000)

    def log_prob(self, x: Tensor) -> Tensor:
        return -pair_energy(x, self.potential, n=4)

    def log_prob_and_score(self, x: Tensor) -> tuple[Tensor, Tensor]:
        energy, force = pair_energy_and_force(x, self.potential, n=4)
        return -energy, force

    def sample(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        parts: list[Tensor] = []
        missing = n
        while missing > 0:
            parts.append(self._accepted(min(CANDIDATES_PER_DRAW * missing, CANDIDATES), generator)[:missing])
            missing -= len(parts[-1])
        like = self.radial.points
        shape = torch.cat(parts) if parts else torch.zeros(0, 4, dtype=torch.complex128, device=like.device)
        turn = 2.0 * math.pi * draws.uniform(n, 1, generator=generator, like=like)
        turned = shape * torch.polar(torch.ones_like(turn), turn)
        return self.space.project(torch.view_as_real(turned).flatten(-2))

    def _accepted(self, candidates: int, generator: torch.Generator | None) -> Tensor:
        """Some configurations up to rotation, complex ``(m, 4)``, by rejection in two stages.

        The third particle is refused by its pair with the second one, the fourth by its two remaining pairs. Every
        accepted triple has exactly one candidate for the fourth: trying again would favour triples with little room.
        """
        second = self.radial.sample((candidates,), generator=generator)
        third = self._around_origin(candidates, generator)
        keep = _accept(_u((third - second).abs()) - LOWEST, generator)
        second, third = second[keep].to(third.dtype), third[keep]
        fourth = self._around_origin(len(third), generator)
        excess = _u((fourth - second).abs()) + _u((fourth - third).abs()) - 2.0 * LOWEST
        keep = _accept(excess, generator)
        origin = torch.zeros_like(second)
        return torch.stack([origin, second, third, fourth], -1)[keep]

    def _around_origin(self, m: int, generator: torch.Generator | None) -> Tensor:
        radius = self.radial.sample((m,), generator=generator)
        angle = 2.0 * math.pi * draws.uniform(m, generator=generator, like=self.radial.points)
        return torch.polar(radius, angle)


def exact_pair_law(*, spacing: float = 0.1, directions: int = 256) -> PairLaw:
    r"""Normalizing constant of :class:`DoubleWell4` and the law of its pair distances, by quadrature.

    .. math:: p(r) \propto r \sum_m (T_m^3)(r, r)

    with :math:`T_m` the block of angular momentum :math:`m`. A grid twice as fine changes the constant by less than
    1e-13; it takes 30 milliseconds.

    Arguments:
        spacing: Width of the radial grid.
        directions: Number of equally spaced angles, even.
    """
    checks.positive("spacing", spacing, ())
    checks.integer("directions", directions, minimum=2)
    if directions % 2:
        raise ValueError(f"Expected directions to be even; got {directions}.")
    count = round((REACH[1] - REACH[0]) / spacing)
    r = torch.linspace(REACH[0], REACH[1], count + 1, dtype=torch.float64)
    width = (REACH[1] - REACH[0]) / count
    angle = torch.arange(directions // 2 + 1, dtype=torch.float64) * (2.0 * math.pi / directions)
    product = 2.0 * r.unsqueeze(-1) * r
    square = r.square().unsqueeze(-1) + r.square() - angle.cos()[:, None, None] * product
    # Energies are counted from the bottom of a well, six pairs in all, so that nothing overflows.
    pairs = (LOWEST - _u(square.clamp_min(0.0).sqrt())).exp()
    root = (0.5 * (LOWEST - _u(r) + r.log() + math.log(width * 2.0 * math.pi / directions))).exp()
    # The kernel is even in the angle, so its spectrum is real and even: half of it is enough.
    spectrum = torch.fft.hfft(pairs.to(torch.complex128), n=directions, dim=0)[: directions // 2 + 1]
    multiplicity = torch.full((directions // 2 + 1, 1), 2.0, dtype=torch.float64)
    multiplicity[0] = multiplicity[-1] = 1.0
    blocks = root[:, None] * spectrum * root
    diagonal = (multiplicity * ((blocks @ blocks) * blocks).sum(-1)).sum(0)
    total = diagonal.sum().item()
    log_relative = math.log(total) - 6.0 * LOWEST
    return PairLaw(r, diagonal / (total * width), log_relative - math.log(4.0))


def _u(r: Tensor) -> Tensor:
    w = (r - CENTRE).square()
    return w * (QUARTIC * w - QUADRATIC)


def _accept(excess: Tensor, generator: torch.Generator | None) -> Tensor:
    """True with probability ``exp(-excess)``."""
    return draws.uniform(len(excess), generator=generator, like=excess) < (-excess).exp()
