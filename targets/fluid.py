r"""Lennard-Jones particles in a periodic box, with their positions as angles on a torus."""

from __future__ import annotations

import math
from typing import final

import torch
from torch import Tensor

from diffsampler.space import Torus
from diffsampler.target import Target
from diffsampler.targets import checks
from diffsampler.targets.lennard_jones import LennardJonesPotential
from diffsampler.targets.pairs import PairPotential, pair_energy, pair_energy_and_force

__all__ = ["LennardJonesFluid", "TruncatedPotential"]


@final
class TruncatedPotential(PairPotential):
    r"""A Lennard-Jones pair cut off at :math:`r_c` such that energy and force end there continuously.

    .. math:: v_c(r) = v(r) - v(r_c) - (r - r_c)\, v'(r_c) \quad (r < r_c), \qquad 0 \quad (r \ge r_c)

    Arguments:
        potential: The pair potential without the cut.
        cutoff: :math:`r_c`.
    """

    def __init__(self, potential: LennardJonesPotential, *, cutoff: float) -> None:
        self.potential = potential
        self.cutoff = cutoff
        value, force = potential.energy_and_force(torch.tensor(cutoff**2, dtype=torch.float64))
        self.value = value.item()
        # Softened as every distance is, so that the cut leaves no step.
        self.edge = math.hypot(cutoff, potential.softening)
        self.slope = -force.item() * self.edge

    def energy(self, square: Tensor) -> Tensor:
        r = (square + self.potential.softening**2).sqrt()
        value = self.potential.energy(square) - self.value - (r - self.edge) * self.slope
        return torch.where(square < self.cutoff**2, value, torch.zeros_like(value))

    def energy_and_force(self, square: Tensor) -> tuple[Tensor, Tensor]:
        inside = square < self.cutoff**2
        r = (square + self.potential.softening**2).sqrt()
        value, force = self.potential.energy_and_force(square)
        value = value - self.value - (r - self.edge) * self.slope
        zero = torch.zeros_like(value)
        return torch.where(inside, value, zero), torch.where(inside, force + self.slope / r, zero)


@final
class LennardJonesFluid(Target):
    r"""``n`` Lennard-Jones particles in a periodic box of side :math:`L`, at a number density :math:`n / L^d`.

    .. math:: E(x) = \sum_{i<j} v_c(r_{ij}), \qquad v(r) = \epsilon \left[(r_m / r)^{12} - 2 (r_m / r)^6\right], \qquad
              r_{ij} = \min_{a \in \mathbb{Z}^d} |s_i - s_j - L a|

    in units of kT, with positions :math:`s = L x / 2 \pi` as angles :math:`x` on a torus, and the pair potential cut
    off continuously with its force (:class:`TruncatedPotential`). The normalizing constant counts angles:
    :math:`Z = (2 \pi / L)^{nd} \int e^{-E} ds`; at vanishing density it is :math:`(2 \pi)^{nd}`.

    Reference: Allen and Tildesley, "Computer Simulation of Liquids" (2017,
    https://doi.org/10.1093/oso/9780198803195.001.0001); as a target of learned samplers: Wirnsberger et al.,
    "Normalizing flows for atomic solids" (2022, https://arxiv.org/abs/2111.08696).

    Arguments:
        n: Number of particles.
        d: Dimensions of the box.
        density: Particles per volume, in units of :math:`r_m^{-d}`; a dense liquid has about 0.9 in two dimensions.
        depth: Depth :math:`\epsilon` of the well, the inverse temperature.
        cutoff: :math:`r_c` in units of :math:`r_m`; by default 2.5, or half the box where that is less.
        softening: Length that keeps coincident particles finite.

    Raises:
        ValueError: If an argument is not positive, or the cutoff exceeds half the box, where nearest images are not
            enough.
    """

    def __init__(
        self,
        n: int = 16,
        *,
        d: int = 2,
        density: float = 0.7,
        depth: float = 1.0,
        cutoff: float | None = None,
        softening: float = 1e-3,
    ) -> None:
        checks.integer("n", n, minimum=2)
        checks.integer("d", d)
        for name, value in (("density", density), ("depth", depth), ("softening", softening)):
            checks.positive(name, value, ())
        box = (n / density) ** (1.0 / d)
        cutoff = min(2.5, 0.5 * box) if cutoff is None else checks.positive("cutoff", cutoff, ()).item()
        if cutoff > 0.5 * box * (1.0 + 1e-12):
            raise ValueError(f"Expected cutoff to be at most half the box, {0.5 * box:.4g}; got {cutoff}.")
        super().__init__(Torus(n * d))
        self.n = n
        self.d = d
        self.box = box
        pair = LennardJonesPotential(depth=float(depth), distance=1.0, softening=float(softening))
        self.potential = TruncatedPotential(pair, cutoff=cutoff)

    def positions(self, x: Tensor) -> Tensor:
        """Positions in the box, ``(..., n * d) -> (..., n, d)``, each coordinate in [-L/2, L/2)."""
        return (self.space.project(x) * (self.box / (2.0 * math.pi))).unflatten(-1, (self.n, self.d))

    def log_prob(self, x: Tensor) -> Tensor:
        return -pair_energy(self.positions(x).flatten(-2), self.potential, n=self.n, box=self.box)

    def log_prob_and_score(self, x: Tensor) -> tuple[Tensor, Tensor]:
        positions = self.positions(x).flatten(-2)
        energy, force = pair_energy_and_force(positions, self.potential, n=self.n, box=self.box)
        return -energy, force * (self.box / (2.0 * math.pi))
