r"""A molecule's internal coordinates with its rotors as angles: stiff coordinates on a line, dihedrals on a torus.

:class:`~diffsampler.targets.molecule.InternalMolecule` writes each rotor as two numbers with an auxiliary radius
that is independent of all else. Here the radius is integrated out, exactly, by fixing it and dividing by its density:

.. math:: \log\rho(z, \varphi) = \log\rho_{uv}(z, r_0 \cos\varphi, r_0 \sin\varphi) - \sum_j \log \frac{p(r_0)}{r_0} .

The constant, the physical coordinates and the gradients are the same; the space is :math:`\mathbb{R}^n \times T^m`, for
processes that know circles (:mod:`diffsampler.methods.asbs`).
"""

from __future__ import annotations

import math
from typing import final

import torch
from torch import Tensor

from diffsampler.space import EuclideanTorus
from diffsampler.target import Target
from diffsampler.targets.internal_chart import CHI, LOG_CHI
from diffsampler.targets.molecule import InternalMolecule

__all__ = ["CircularMolecule"]

RADIUS = math.sqrt(CHI - 2.0)
"""The mode of a rotor's radius in the plane; any other would do."""
LOG_RADIAL = (CHI - 2.0) * math.log(RADIUS) - 0.5 * RADIUS**2 - LOG_CHI


@final
class CircularPrior(Target):
    """Standard normal stiff coordinates and uniform angles, normalized."""

    def __init__(self, space: EuclideanTorus) -> None:
        super().__init__(space, log_normalizer=0.0, has_sampler=True)
        self.line = space.n
        self.log_constant = -0.5 * space.n * math.log(2.0 * math.pi) - space.m * math.log(2.0 * math.pi)

    def log_prob(self, x: Tensor) -> Tensor:
        return self.log_constant - 0.5 * x[..., : self.line].square().sum(-1)

    def sample(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        normal = torch.randn(n, self.line, generator=generator, dtype=torch.float64)
        turn = torch.rand(n, self.dim - self.line, generator=generator, dtype=torch.float64)
        return torch.cat([normal, (2.0 * turn - 1.0) * math.pi], -1)


@final
class CircularMolecule(Target):
    """Stiff internal coordinates of unit scale and the rotors' dihedrals, with a prior.

    Arguments:
        molecule: The molecule in internal coordinates.
    """

    prior: Target
    space: EuclideanTorus

    def __init__(self, molecule: InternalMolecule) -> None:
        *stiff, rotors = molecule.chart.sizes
        space = EuclideanTorus(sum(stiff), rotors)
        super().__init__(space, prior=CircularPrior(space))
        self.molecule = molecule
        self.line = space.n
        self.log_radial = rotors * LOG_RADIAL

    def planar(self, x: Tensor) -> Tensor:
        """Points with two numbers for each rotor, ``(..., n + m) -> (..., n + 2 m)``."""
        angle = x[..., self.line :]
        return torch.cat([x[..., : self.line], RADIUS * angle.cos(), RADIUS * angle.sin()], -1)

    def circular(self, planar: Tensor) -> Tensor:
        """Points of this space from those of the molecule's; radii are forgotten."""
        u, v = planar[..., self.line :].chunk(2, -1)
        return torch.cat([planar[..., : self.line], torch.atan2(v, u)], -1)

    def log_prob(self, x: Tensor) -> Tensor:
        return self.molecule.log_prob(self.planar(x)) - self.log_radial

    def log_prob_and_score(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.planar(x.detach())
        log_prob, score = self.molecule.log_prob_and_score(y)
        (u, v), (by_u, by_v) = y[..., self.line :].chunk(2, -1), score[..., self.line :].chunk(2, -1)
        return log_prob - self.log_radial, torch.cat([score[..., : self.line], u * by_v - v * by_u], -1)

    def constrain(self, x: Tensor) -> dict[str, Tensor]:
        """``positions (n, atoms, 3)`` in nm, and the named torsions."""
        return self.molecule.constrain(self.planar(x))
