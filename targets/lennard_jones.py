r"""Lennard-Jones clusters held together by a harmonic well about their centre of mass."""

from __future__ import annotations

import math
from typing import final

import torch
from torch import Tensor

from diffsampler.space import MeanFree
from diffsampler.target import Target
from diffsampler.targets import checks
from diffsampler.targets.pairs import PairPotential, pair_energy, pair_energy_and_force

__all__ = ["LennardJones", "LennardJonesPotential"]


@final
class LennardJonesPotential(PairPotential):
    r"""Energy of a pair at distance :math:`r`.

    .. math:: v(r) = \epsilon \left[(r_m / r)^{12} - 2 (r_m / r)^6\right], \qquad r^2 = s + \delta^2

    Below ``core`` the potential is continued by its second-order Taylor polynomial in :math:`r`, which keeps value,
    slope and curvature continuous and everything finite.

    Arguments:
        depth: Depth :math:`\epsilon` of the well.
        distance: Distance :math:`r_m` of the minimum.
        softening: Length :math:`\delta`, which keeps coincident particles finite.
        core: Distance of the continuation; None for the exact potential.
    """

    def __init__(self, *, depth: float, distance: float, softening: float, core: float | None = None) -> None:
        self.depth = depth
        self.distance = distance
        self.softening = softening
        self.core = core
        self._taylor = (0.0, 0.0, 0.0)
        if core is not None:
            u = (distance / core) ** 6
            self._taylor = (
                depth * u * (u - 2.0),
                -12.0 * depth * u * (u - 1.0) / core,
                12.0 * depth * u * (13.0 * u - 7.0) / core**2,
            )

    def energy(self, square: Tensor) -> Tensor:
        square = square + self.softening**2
        u = self._u(square)
        value = self.depth * (u * (u - 2.0))
        if self.core is None:
            return value
        zero, one, two = self._taylor
        offset = square.sqrt() - self.core
        return torch.where(offset < 0.0, zero + offset * (one + 0.5 * two * offset), value)

    def energy_and_force(self, square: Tensor) -> tuple[Tensor, Tensor]:
        square = square.add_(self.softening**2)
        u = self._u(square)
        excess = u - 1.0
        # u (u - 2) = (u - 1)^2 - 1 would lose the tail to cancellation.
        value = self.depth * (u * (u - 2.0))
        force = excess.mul_(u).div_(square).mul_(12.0 * self.depth)
        if self.core is None:
            return value, force
        zero, one, two = self._taylor
        r = square.sqrt()
        offset = r - self.core
        inside = offset < 0.0
        value = torch.where(inside, zero + offset * (one + 0.5 * two * offset), value)
        return value, torch.where(inside, -(one + two * offset) / r, force)

    def _u(self, square: Tensor) -> Tensor:
        """``(r_m / r)^6``; far inside the core it is bounded, so that no gradient of the unused branch overflows."""
        if self.core is not None:
            square = square.clamp_min(self.core**2)
        ratio = self.distance**2 / square
        return ratio * ratio * ratio


@final
class LennardJones(Target):
    r"""``n`` particles in three dimensions with Lennard-Jones pairs, in a harmonic well about their centre of mass.

    .. math:: E(x) = c\, \epsilon \sum_{i<j} \left[(r_m / r_{ij})^{12} - 2 (r_m / r_{ij})^6\right]
              + \tfrac{k}{2} \sum_i |x_i - \bar x|^2, \qquad r_{ij}^2 = |x_i - x_j|^2 + \delta^2

    in units of kT. The benchmarks of the literature sum over *ordered* pairs, :math:`c = 2`, so their wells are twice
    as deep as the symbol :math:`\epsilon` says; with :math:`c = 1` the same parameters are a much hotter system. With
    the default parameters the mean energy is -43.0 for 13 particles and -325.5 for 55.

    The normalizing constant is not known. The pair term makes the energy of random configurations astronomically large
    (:math:`r^{-12}`): learned samplers clip its gradient or set ``core``; reference computations use the exact energy.

    Reference: Köhler, Klein and Noé, "Equivariant flows" (2020, https://arxiv.org/abs/2006.02425); as a benchmark of
    samplers after Akhound-Sadegh et al., "Iterated denoising energy matching" (2024,
    https://arxiv.org/abs/2402.06121).

    Arguments:
        n: Number of particles, 13 and 55 in the literature (closed icosahedral shells).
        ordered_pairs: Count every pair twice, as the published benchmarks do.
        depth: Depth :math:`\epsilon`.
        distance: Distance :math:`r_m` of the pair's minimum.
        stiffness: Coefficient :math:`k > 0` of the harmonic well, without which particles evaporate.
        softening: Length :math:`\delta`; at the default the energy changes by a relative 1e-6 and stays finite in
            float64 even where particles coincide.
        core: Distance below which the pair term is continued by its second-order Taylor polynomial; None for none.

    Raises:
        ValueError: If ``n < 2`` or a parameter is not positive.
    """

    def __init__(
        self,
        n: int = 13,
        *,
        ordered_pairs: bool = True,
        depth: float = 1.0,
        distance: float = 1.0,
        stiffness: float = 1.0,
        softening: float = 1e-3,
        core: float | None = None,
    ) -> None:
        checks.integer("n", n, minimum=2)
        for name, value in (("depth", depth), ("distance", distance), ("stiffness", stiffness)):
            checks.positive(name, value, ())
        if not (math.isfinite(softening) and softening >= 0.0):
            raise ValueError(f"Expected softening to be at least 0; got {softening}.")
        if core is not None:
            checks.positive("core", core, ())
        super().__init__(MeanFree(n, 3))
        self.n = n
        self.stiffness = float(stiffness)
        self.potential = LennardJonesPotential(
            depth=float(depth) * (2.0 if ordered_pairs else 1.0),
            distance=float(distance),
            softening=float(softening),
            core=None if core is None else float(core),
        )

    def log_prob(self, x: Tensor) -> Tensor:
        centred = self.space.project(x)
        pairs = pair_energy(centred, self.potential, n=self.n)
        return -pairs - 0.5 * self.stiffness * centred.square().sum(-1)

    def log_prob_and_score(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            centred = self.space.project(x)
            pairs, force = pair_energy_and_force(centred, self.potential, n=self.n)
            log_prob = -pairs - 0.5 * self.stiffness * centred.square().sum(-1)
            return log_prob, force.sub_(centred, alpha=self.stiffness)
