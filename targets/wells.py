"""Many wells: products of one-dimensional double wells, whose constants and samplers are exact by quadrature."""

from __future__ import annotations

import math
from typing import final

import torch
from torch import Tensor

from diffsampler.space import Euclidean
from diffsampler.target import Target
from diffsampler.targets import checks, draws
from diffsampler.targets.line import LineDensity

__all__ = ["DoubleWells", "ManyWell"]

HALF_LOG_2PI = 0.5 * math.log(2.0 * math.pi)
LABELLED_WELLS = 10


@final
class ManyWell(Target):
    r"""Independent pairs of a tilted double well and a Gaussian.

    .. math:: \log \rho(x) = \sum_{j=1}^{D/2} \left(-a_j^4 + 6 a_j^2 + \tfrac12 a_j - \tfrac12 b_j^2\right),
              \qquad (a_1, b_1, \dots) = Q^T x

    with :math:`Q` the identity or a random rotation, which hides the product structure. Every pair has a left and a
    right well; up to ten pairs, mode labels number the :math:`2^{D/2}` combinations (bit ``j`` set: ``a_j > 0``).

    Reference: Noé et al., "Boltzmann generators" (2019, https://arxiv.org/abs/1812.01729); 32 dimensions after Midgley
    et al., "Flow annealed importance sampling bootstrap" (2023, https://arxiv.org/abs/2208.01893).

    Arguments:
        dim: Dimension ``D``, even.
        rotation_seed: Seed of a random rotation ``Q``; None for no rotation.
    """

    rotation: Tensor | None

    def __init__(self, dim: int = 32, *, rotation_seed: int | None = None) -> None:
        checks.integer("dim", dim, minimum=2)
        if dim % 2:
            raise ValueError(f"Expected dim to be even (wells come in pairs of coordinates); got {dim}.")
        line = LineDensity(lambda a: -(a**4) + 6.0 * a**2 + 0.5 * a, low=-5.0, high=5.0)
        pairs = dim // 2
        super().__init__(
            Euclidean(dim),
            log_normalizer=pairs * (line.log_normalizer + HALF_LOG_2PI),
            num_modes=2**pairs if pairs <= LABELLED_WELLS else None,
            has_sampler=True,
        )
        self.line = line
        self.right_mass = line.mass(0.0, 5.0)
        self.register_buffer("rotation", None if rotation_seed is None else _rotation(dim, rotation_seed))

    def log_prob(self, x: Tensor) -> Tensor:
        a, b = self._pairs(x)
        square = a.square()
        return (square * (6.0 - square) + 0.5 * a - 0.5 * b.square()).sum(-1)

    def log_prob_and_score(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            a, b = self._pairs(x)
            square = a.square()
            log_prob = (square * (6.0 - square) + 0.5 * a - 0.5 * b.square()).sum(-1)
            score = torch.stack([a * (12.0 - 4.0 * square) + 0.5, -b], -1).flatten(-2)
            return log_prob, score if self.rotation is None else score @ self.rotation.to(x).mT

    def sample(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        a = self.line.sample((n, self.dim // 2), generator=generator)
        b = draws.normal(n, self.dim // 2, generator=generator, like=a)
        y = torch.stack([a, b], -1).flatten(-2)
        return y if self.rotation is None else y @ self.rotation.to(y).mT

    def mode_labels(self, x: Tensor) -> Tensor:
        if self.num_modes is None:
            return super().mode_labels(x)
        return _binary(self._pairs(x)[0] > 0)

    def mode_weights(self) -> Tensor:
        if self.num_modes is None:
            return super().mode_weights()
        return _binary_weights(self.line.points.new_tensor([1.0 - self.right_mass, self.right_mass]), self.dim // 2)

    def right_well_mass(self, x: Tensor, weight: Tensor | None = None) -> Tensor:
        """Share of each pair's right well, shape ``(D/2,)``, float64; the exact value is ``right_mass`` (0.844307096).

        Arguments:
            x: Points, shape ``(n, D)``.
            weight: Non-negative weights, shape ``(n,)``; equal by default.
        """
        right = (self._pairs(x)[0] > 0).double()
        if weight is None:
            return right.mean(0)
        if weight.shape != x.shape[:-1]:
            raise ValueError(f"Expected weight of shape {tuple(x.shape[:-1])}; got {tuple(weight.shape)}.")
        share = weight.double() / weight.double().sum()
        return share @ right

    def _pairs(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = x if self.rotation is None else x @ self.rotation.to(x)
        return y[..., 0::2], y[..., 1::2]


@final
class DoubleWells(Target):
    r"""Symmetric double wells in the first coordinates, standard Gaussians (not normalized) in the others.

    .. math:: \log \rho(x) = -\sum_{i \le m} (x_i^2 - \delta)^2 - \tfrac12 \sum_{i > m} x_i^2

    The :math:`2^m` modes are equally likely; up to ten wells, label bit ``i`` is set where ``x_i > 0``.

    Reference: Wu, Köhler and Noé, "Stochastic normalizing flows" (2020, https://arxiv.org/abs/2002.06707); the named
    versions after https://github.com/juliusberner/sde_sampler.

    Arguments:
        dim: Dimension ``D``.
        wells: Number ``m`` of double wells, at most ``D``.
        separation: Separation :math:`\delta > 0`; wells lie at :math:`\pm \sqrt{\delta}`, behind a barrier of
            :math:`\delta^2` kT.
    """

    def __init__(self, dim: int, *, wells: int, separation: float) -> None:
        checks.integer("dim", dim)
        checks.integer("wells", wells)
        if wells > dim:
            raise ValueError(f"Expected wells to be at most dim={dim}; got {wells}.")
        delta = checks.positive("separation", separation, ()).item()
        reach = math.sqrt(delta + 6.0)
        line = LineDensity(lambda t: -((t.square() - delta).square()), low=-reach, high=reach)
        super().__init__(
            Euclidean(dim),
            log_normalizer=wells * line.log_normalizer + (dim - wells) * HALF_LOG_2PI,
            num_modes=2**wells if wells <= LABELLED_WELLS else None,
            has_sampler=True,
        )
        self.line = line
        self.wells = wells
        self.separation = delta

    @classmethod
    def mw54(cls) -> DoubleWells:
        """Five wells with separation 4 in five dimensions: 32 modes behind barriers of 16 kT."""
        return cls(5, wells=5, separation=4.0)

    @classmethod
    def mw52(cls) -> DoubleWells:
        """Five wells with separation 2 and 45 Gaussian coordinates: 32 modes in 50 dimensions."""
        return cls(50, wells=5, separation=2.0)

    def log_prob(self, x: Tensor) -> Tensor:
        w, g = x[..., : self.wells], x[..., self.wells :]
        return -(w.square() - self.separation).square().sum(-1) - 0.5 * g.square().sum(-1)

    def log_prob_and_score(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            w, g = x[..., : self.wells], x[..., self.wells :]
            excess = w.square() - self.separation
            log_prob = -excess.square().sum(-1) - 0.5 * g.square().sum(-1)
            return log_prob, torch.cat([-4.0 * w * excess, -g], -1)

    def sample(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        w = self.line.sample((n, self.wells), generator=generator)
        g = draws.normal(n, self.dim - self.wells, generator=generator, like=w)
        return torch.cat([w, g], -1)

    def mode_labels(self, x: Tensor) -> Tensor:
        if self.num_modes is None:
            return super().mode_labels(x)
        return _binary(x[..., : self.wells] > 0)

    def mode_weights(self) -> Tensor:
        if self.num_modes is None:
            return super().mode_weights()
        return _binary_weights(self.line.points.new_tensor([0.5, 0.5]), self.wells)


def _rotation(dim: int, seed: int) -> Tensor:
    """A rotation drawn uniformly from the orthogonal matrices of determinant one."""
    generator = torch.Generator().manual_seed(seed)
    q, r = torch.linalg.qr(torch.randn(dim, dim, generator=generator, dtype=torch.float64))
    q = q * r.diagonal().sign()
    if torch.linalg.det(q) < 0:
        q[:, 0] = -q[:, 0]
    return q


def _binary(bits: Tensor) -> Tensor:
    """Number whose binary digits are ``bits (..., m)``, first bit least significant."""
    return (bits * 2 ** torch.arange(bits.shape[-1], device=bits.device)).sum(-1)


def _binary_weights(single: Tensor, count: int) -> Tensor:
    """Probabilities of all combinations of ``count`` independent bits with ``single = (P(0), P(1))``."""
    labels = torch.arange(2**count, device=single.device)
    bits = (labels.unsqueeze(-1) >> torch.arange(count, device=single.device)) & 1
    return single[bits].prod(-1)
