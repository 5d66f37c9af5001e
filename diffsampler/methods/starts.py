r"""Laws at which controlled reference chains start: a point, a Gaussian, springs, uniform angles.

Each is a centred Gaussian that is diagonal in some orthogonal basis, or its limits: variance zero is a point, infinite
variance on a circle is the uniform law there. The reference keeps that form, so that all its marginals are known.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import final

import torch
from torch import Tensor, nn

from diffsampler.space import EuclideanTorus, MeanFree, Space, Torus

__all__ = ["GaussianStart", "HarmonicStart", "PointStart", "Start", "UniformStart"]


class Start(nn.Module, ABC):
    r"""A centred Gaussian start law :math:`\mu`, or a point: diagonal in some orthogonal basis.

    Arguments:
        space: Where it lives.
        variances: Variances along the basis, ``(M,)``; one for all coordinates, one for each factor of a product, or as
            many as the basis has. Infinite ones are uniform angles.
    """

    variances: Tensor

    def __init__(self, space: Space, variances: Tensor) -> None:
        super().__init__()
        self.space = space
        self.register_buffer("variances", variances)

    @abstractmethod
    def apply_spectrum(self, x: Tensor, factors: Tensor) -> Tensor:
        """Multiply points ``x (..., D)`` by factors ``(..., M)`` in the basis."""

    @abstractmethod
    def sample(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        """Draw points ``(n, D)``, on the device of the law."""

    @abstractmethod
    def log_prob(self, x: Tensor) -> Tensor:
        """Log density at ``x (..., D)``, shape ``(...)``, float64; zero for a point."""


@final
class PointStart(Start):
    """All particles begin at the origin."""

    def __init__(self, space: Space) -> None:
        super().__init__(space, torch.zeros(1, dtype=torch.float64))

    def apply_spectrum(self, x: Tensor, factors: Tensor) -> Tensor:
        return factors * x

    def sample(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        return self.variances.new_zeros(n, self.space.dim)

    def log_prob(self, x: Tensor) -> Tensor:
        return x.new_zeros(x.shape[:-1], dtype=torch.float64)


@final
class GaussianStart(Start):
    """An isotropic Gaussian, mean-free where the space is.

    Arguments:
        space: Euclidean or mean-free space.
        scale: Standard deviation.
    """

    def __init__(self, space: Space, *, scale: float = 1.0) -> None:
        _check_start(space, scale)
        super().__init__(space, torch.tensor([scale**2], dtype=torch.float64))

    def apply_spectrum(self, x: Tensor, factors: Tensor) -> Tensor:
        return factors * x

    def sample(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        return self.variances.sqrt() * self.space.noise((n,), like=self.variances, generator=generator)

    def log_prob(self, x: Tensor) -> Tensor:
        return self.space.log_gaussian(x, torch.zeros_like(x), self.variances.to(x.dtype))


@final
class HarmonicStart(Start):
    r"""Particles joined by springs, :math:`\mu \propto \exp(-\frac{1}{2 s^2} \sum_{bonds} |x_i - x_j|^2)`, mean-free.

    The covariance is :math:`s^2 L^+`, where ``L`` is the graph Laplacian. It has one zero eigenvalue, the centre of
    mass, exactly if the bonds connect all particles. (The published matrix for fully connected particles, 1 on the
    diagonal and -1/2 elsewhere, is not of this kind: it is negative along the centre of mass from four particles on;
    without that direction it is an isotropic law of variance 2/3, a :class:`GaussianStart`.)

    Arguments:
        space: Mean-free space.
        bonds: Pairs of bonded particles, integers ``(m, 2)``.
        scale: The length ``s`` of a bond per degree of freedom.
    """

    basis: Tensor

    def __init__(self, space: Space, bonds: Tensor, *, scale: float = 1.0) -> None:
        _check_start(space, scale)
        if not isinstance(space, MeanFree):
            raise ValueError(f"Expected mean-free particles for springs between them; got {space}.")
        value, basis = torch.linalg.eigh(_laplacian(space.n, bonds))
        if not value[1] > 1e-9:
            raise ValueError("Expected bonds that connect all particles; got separate groups.")
        # The centre of mass, eigenvalue zero, does not exist on the space.
        variances = torch.cat([value.new_zeros(1), scale**2 / value[1:]])
        super().__init__(space, variances)
        self.register_buffer("basis", basis)
        self.n, self.d = space.n, space.d

    def apply_spectrum(self, x: Tensor, factors: Tensor) -> Tensor:
        basis = self.basis.to(x.dtype)
        modes = basis.T @ x.unflatten(-1, (self.n, self.d))
        return (basis @ (factors.unsqueeze(-1) * modes)).flatten(-2)

    def sample(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        noise = self.space.noise((n,), like=self.variances, generator=generator)
        return self.apply_spectrum(noise, self.variances.sqrt())

    def log_prob(self, x: Tensor) -> Tensor:
        modes = (self.basis.T @ x.to(self.basis.dtype).unflatten(-1, (self.n, self.d)))[..., 1:, :].double()
        variance = self.variances[1:].double()
        square = (modes.square().sum(-1) / variance).sum(-1)
        return -0.5 * (square + self.d * (2.0 * math.pi * variance).log().sum())


@final
class UniformStart(Start):
    """Uniform angles; coordinates on a line, where the space has some, are Gaussian.

    A Brownian motion leaves it as it is, so that the reference has no corrector on the circles, and a chain of much
    noise forgets where it began.

    Arguments:
        space: A torus, or a product with one.
        scale: Standard deviation of the coordinates on the line.
    """

    def __init__(self, space: Space, *, scale: float = 1.0) -> None:
        if not isinstance(space, Torus | EuclideanTorus):
            raise ValueError(f"Expected angles for a uniform start; got {space}.")
        if not scale > 0.0:
            raise ValueError(f"Expected scale > 0; got {scale}.")
        self.line = 0 if isinstance(space, Torus) else space.n
        super().__init__(space, torch.tensor([scale**2] * (self.line > 0) + [math.inf], dtype=torch.float64))
        self.scale = scale

    def apply_spectrum(self, x: Tensor, factors: Tensor) -> Tensor:
        return factors * x

    def sample(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        like = self.variances
        line = torch.randn(n, self.line, generator=generator, dtype=like.dtype, device=like.device)
        turn = torch.rand(n, self.space.dim - self.line, generator=generator, dtype=like.dtype, device=like.device)
        return torch.cat([self.scale * line, (2.0 * turn - 1.0) * math.pi], -1)

    def log_prob(self, x: Tensor) -> Tensor:
        z = x[..., : self.line].double() / self.scale
        volume = (self.space.dim - self.line) * math.log(2.0 * math.pi)
        return -0.5 * z.square().sum(-1) - self.line * (math.log(self.scale) + 0.5 * math.log(2.0 * math.pi)) - volume


def _check_start(space: Space, scale: float) -> None:
    if isinstance(space, Torus | EuclideanTorus):
        raise ValueError("Expected a Euclidean or mean-free space; on a torus use the point start or the uniform one.")
    if not scale > 0.0:
        raise ValueError(f"Expected scale > 0; got {scale}.")


def _laplacian(n: int, bonds: Tensor) -> Tensor:
    if bonds.ndim != 2 or bonds.shape[1] != 2 or bonds.is_floating_point():
        raise ValueError(f"Expected bonds of shape (m, 2), integers; got {tuple(bonds.shape)}, {bonds.dtype}.")
    if len(bonds) and not 0 <= int(bonds.min()) <= int(bonds.max()) < n:
        raise ValueError(
            f"Expected bonds between particles 0 to {n - 1}; got {int(bonds.min())} to {int(bonds.max())}."
        )
    laplacian = torch.zeros(n, n, dtype=torch.float64)
    for i, j in bonds.tolist():
        if i == j:
            raise ValueError(f"Expected bonds between two particles; got {i} with itself.")
        laplacian[i, i] += 1.0
        laplacian[j, j] += 1.0
        laplacian[i, j] -= 1.0
        laplacian[j, i] -= 1.0
    return laplacian
