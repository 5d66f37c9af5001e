r"""Internal coordinates of a molecule as a vector of real numbers of unit scale, and their prior.

A molecule's lengths, angles and dihedrals live on half-lines, intervals and circles. The chart maps all of
:math:`\mathbb{R}^D` onto them one to one (but for sets of measure zero), smoothly, so that the density in ``z`` has
no walls, no cuts, and exactly the configuration integral of the molecule:

* lengths :math:`b = b_0 e^{\sigma z / b_0}`;
* angles :math:`\tan(\theta/2) = \tan(\theta_0/2)\, e^{\sigma z / \sin\theta_0}`, over :math:`(0, \pi)`;
* offsets :math:`\delta = \delta_0 + 2 \arctan(\sigma z / 2)`, over the circle without one point;
* the offset that decides the handedness of a stereocentre like an angle, over the half circle of the reference's hand:
  the mirror image is no part of the space;
* rotors as two numbers :math:`(u, v) = r (\cos\phi, \sin\phi)` whose radius has the chi law with 16 degrees of freedom
  and is independent of everything else: the density is exactly periodic in :math:`\phi`, with no seam, and the
  auxiliary radius integrates to one. Its law vanishes at the origin, where the angle is undefined.

Centres and scales of the stiff coordinates are those of a harmonic expansion at one minimum, with the rotors fixed. The
prior says that stiff coordinates are standard normal and rotors uniform: nothing in it knows which rotamers exist.
"""

from __future__ import annotations

import math
from typing import final

import torch
from torch import Tensor, nn

from diffsampler.space import Euclidean
from diffsampler.target import Target
from diffsampler.targets import draws
from diffsampler.targets.zmatrix import Internal, ZMatrix, wrap

__all__ = ["InternalChart", "InternalPrior"]

CHI = 16
"""Degrees of freedom of a rotor's radius, whose mean is 3.9 and standard deviation 0.7."""
LOG_CHI = (0.5 * CHI - 1.0) * math.log(2.0) + math.lgamma(0.5 * CHI)
LOG_2PI = math.log(2.0 * math.pi)


@final
class InternalChart(nn.Module):
    """The map from ``z (D, B)`` to internal coordinates, with the measure of both.

    The vector holds bonds, angles, offsets, the first and then the second numbers of all rotors.

    Arguments:
        tree: The tree of the molecule.
        centers: Reference coordinates, a batch of one.
        scales: Their standard deviations, likewise; those of rotors are not used.
        handed: Which dihedrals decide a handedness and stay on their half circle, ``(n - 3,)``, boolean.
    """

    bond_center: Tensor
    handed: Tensor
    place: Tensor

    def __init__(self, tree: ZMatrix, centers: Internal, scales: Internal, handed: Tensor) -> None:
        super().__init__()
        stiff = ~tree.rotor
        self.sizes = (len(centers.bonds), len(centers.angles), int(stiff.sum()), int(tree.rotor.sum()))
        self.dim = sum(self.sizes[:3]) + 2 * self.sizes[3]
        offset, spread, hand = centers.dihedrals[stiff], scales.dihedrals[stiff], handed[stiff].unsqueeze(1)
        self.register_buffer("bond_center", centers.bonds)
        self.register_buffer("bond_rate", scales.bonds / centers.bonds)
        self.register_buffer("angle_start", (0.5 * centers.angles).tan())
        self.register_buffer("angle_rate", scales.angles / centers.angles.sin())
        self.register_buffer("offset_center", offset)
        self.register_buffer("offset_scale", spread)
        self.register_buffer("handed", hand)
        # Ones where they are not used: both branches of a choice must stay finite.
        ones = torch.ones_like(offset)
        self.register_buffer("hand_start", torch.where(hand, (0.5 * offset.abs()).tan(), ones))
        self.register_buffer("hand_rate", torch.where(hand, spread / offset.sin().abs(), ones))
        self.register_buffer("place", torch.cat([stiff.nonzero(), tree.rotor.nonzero()]).squeeze(1).argsort())

    def forward(self, z: Tensor) -> tuple[Internal, Tensor]:
        """Coordinates, and the log density of their measure and of the radii with respect to ``dz``, ``(B,)``."""
        b, a, o, u, v = self._split(z)
        c = self._constants(z)
        bonds = c["bond_center"] * (c["bond_rate"] * b).exp()
        half = c["angle_start"] * (c["angle_rate"] * a).exp()
        angles = 2.0 * half.atan()
        log_sine = math.log(2.0) + half.log() - half.square().log1p()
        free = 0.5 * c["offset_scale"] * o
        half = c["hand_start"] * (c["hand_rate"] * o).exp()
        hand = self.handed
        offsets = torch.where(
            hand, c["offset_center"].sign() * 2.0 * half.atan(), c["offset_center"] + 2.0 * free.atan()
        )
        bend = torch.where(
            hand,
            math.log(2.0) + half.log() - half.square().log1p() + c["hand_rate"].log(),
            c["offset_scale"].log() - free.square().log1p(),
        )
        square = u.square() + v.square()
        radial = (0.5 * CHI - 1.0) * square.log() - 0.5 * square - LOG_CHI
        log_det = (3.0 * bonds.log() + c["bond_rate"].log()).sum(0)
        log_det = log_det + (2.0 * log_sine + c["angle_rate"].log()).sum(0) + bend.sum(0) + radial.sum(0)
        dihedrals = torch.cat([offsets, torch.atan2(v, u)]).index_select(0, self.place)
        return Internal(bonds, angles, dihedrals), log_det

    def pull_back(self, z: Tensor, internal: Internal, gradient: Internal) -> Tensor:
        """Gradient ``(D, B)`` of ``f(internal) + log_det`` from the derivatives of ``f``."""
        _, _, o, u, v = self._split(z)
        c = self._constants(z)
        bonds = c["bond_rate"] * (gradient.bonds * internal.bonds + 3.0)
        sine, cosine = internal.angles.sin(), internal.angles.cos()
        angles = c["angle_rate"] * (gradient.angles * sine + 2.0 * cosine)
        order = self.place.argsort()
        dihedral, slope = internal.dihedrals.index_select(0, order), gradient.dihedrals.index_select(0, order)
        count = self.sizes[2]
        free = 0.5 * c["offset_scale"] * o
        by_hand = c["hand_rate"] * (slope[:count] * dihedral[:count].sin() + dihedral[:count].cos())
        by_free = c["offset_scale"] * (slope[:count] - free) / (1.0 + free.square())
        offsets = torch.where(self.handed, by_hand, by_free)
        square = u.square() + v.square()
        turn, pull = slope[count:] / square, (CHI - 2.0) / square - 1.0
        return torch.cat([bonds, angles, offsets, pull * u - turn * v, pull * v + turn * u])

    def inverse(self, internal: Internal, *, radius: float = math.sqrt(CHI - 2.0)) -> Tensor:
        """``z (D, B)`` of coordinates, with the rotors' radii all at ``radius``, by default their mode in the plane."""
        c = self._constants(internal.bonds)
        order = self.place.argsort()
        dihedral = internal.dihedrals.index_select(0, order)
        offsets, rotors = dihedral.split([self.sizes[2], self.sizes[3]])
        free = 2.0 * (0.5 * wrap(offsets - c["offset_center"])).tan() / c["offset_scale"]
        hand = ((0.5 * offsets.abs()).tan() / c["hand_start"]).log() / c["hand_rate"]
        parts = [
            (internal.bonds / c["bond_center"]).log() / c["bond_rate"],
            ((0.5 * internal.angles).tan() / c["angle_start"]).log() / c["angle_rate"],
            torch.where(self.handed, hand, free),
            radius * rotors.cos(),
            radius * rotors.sin(),
        ]
        return torch.cat(parts)

    def _split(self, z: Tensor) -> tuple[Tensor, ...]:
        return z.split([*self.sizes, self.sizes[3]])

    def _constants(self, like: Tensor) -> dict[str, Tensor]:
        return {name: value.to(like) for name, value in self.named_buffers() if value.is_floating_point()}


@final
class InternalPrior(Target):
    """Standard normal stiff coordinates and uniform rotors, normalized.

    Arguments:
        stiff: Number of stiff coordinates, the first of the vector.
        rotors: Number of rotors.
    """

    def __init__(self, stiff: int, rotors: int) -> None:
        super().__init__(Euclidean(stiff + 2 * rotors), log_normalizer=0.0, has_sampler=True)
        self.stiff = stiff
        self.rotors = rotors

    def log_prob(self, x: Tensor) -> Tensor:
        normal, square = self._parts(x)
        radial = (0.5 * CHI - 1.0) * square.log() - 0.5 * square - LOG_CHI - LOG_2PI
        return radial.sum(-1) - 0.5 * normal.square().sum(-1) - 0.5 * self.stiff * LOG_2PI

    def log_prob_and_score(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            pull = ((CHI - 2.0) / self._parts(x)[1] - 1.0).repeat(*[1] * (x.ndim - 1), 2)
            score = torch.cat([-x[..., : self.stiff], pull * x[..., self.stiff :]], -1)
            return self.log_prob(x), score

    def sample(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        normal = draws.normal(n, self.stiff, generator=generator)
        noise = draws.normal(n, self.rotors, CHI, generator=generator, like=normal)
        # Length and direction of a normal vector are independent.
        direction = noise[..., :2] / noise[..., :2].norm(dim=-1, keepdim=True)
        plane = direction * noise.norm(dim=-1, keepdim=True)
        return torch.cat([normal, plane[..., 0], plane[..., 1]], -1)

    def _parts(self, x: Tensor) -> tuple[Tensor, Tensor]:
        u, v = x[..., self.stiff : self.stiff + self.rotors], x[..., self.stiff + self.rotors :]
        return x[..., : self.stiff], u.square() + v.square()
