r"""Where particles live.

A :class:`Space` draws standard Gaussian noise, brings points back onto itself, and evaluates Gaussian log densities
with respect to its own Lebesgue measure, so that every transition density of the library has the right number of
degrees of freedom:

* ``Euclidean(dim)``: :math:`\mathbb{R}^D`.
* ``MeanFree(n, d)``: ``n`` points in ``d`` dimensions whose centre of mass is zero, a hyperplane of
  :math:`\mathbb{R}^{nd}` with :math:`(n-1)d` degrees of freedom.
* ``Torus(m)``: ``m`` angles in :math:`[-\pi, \pi)`; a "Gaussian" there is the wrapped normal law.
* ``EuclideanTorus(n, m)``: ``n`` real numbers and then ``m`` angles.

Log densities are accumulated in float64 whatever the dtype of the particles.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import final

import torch
from torch import Tensor

__all__ = ["Euclidean", "EuclideanTorus", "MeanFree", "Space", "Torus"]

LOG_2PI = math.log(2.0 * math.pi)


class Space(ABC):
    """A space of particles, vectors of ``dim`` numbers with ``dof`` degrees of freedom."""

    def __init__(self, dim: int, dof: int, num_features: int) -> None:
        if dim < 1 or dof < 1:
            raise ValueError(f"Expected a space with at least one degree of freedom; got dim={dim}, dof={dof}.")
        self.dim = dim
        self.dof = dof
        self.num_features = num_features

    @abstractmethod
    def project(self, x: Tensor) -> Tensor:
        """Bring points ``(..., D)`` onto the space (remove the centre of mass, wrap angles)."""

    @abstractmethod
    def project_vector(self, v: Tensor) -> Tensor:
        """Bring tangent vectors ``(..., D)`` (noise, scores, velocities) onto the tangent space."""

    @abstractmethod
    def log_gaussian(self, x: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
        """Log density at ``x`` of a Gaussian, shape ``(...)``, float64.

        Arguments:
            x: Points, shape ``(..., D)``.
            mean: Mean, shape ``(..., D)``.
            variance: Variances, shape ``(..., 1)`` or ``(..., D)``. Entries that are exactly zero stand for a point
                mass and contribute nothing (the same point mass appears in both directions and cancels).
        """

    @abstractmethod
    def features(self, x: Tensor) -> Tensor:
        """What a network should see of ``x``: shape ``(..., num_features)``, periodic where the space is."""

    def scaled(self, x: Tensor, scale: Tensor | float) -> Tensor:
        """``x (..., D)`` in units of a scale, for networks; angles have their own, in any other they would jump."""
        return x / scale

    @final
    def noise(self, shape: tuple[int, ...], *, like: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Draw standard Gaussian noise, shape ``(*shape, D)``, with the dtype and device of ``like``."""
        z = torch.randn(*shape, self.dim, generator=generator, dtype=like.dtype, device=like.device)
        return self.project_vector(z)

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and self.__dict__ == other.__dict__

    def __hash__(self) -> int:
        return hash((type(self), *sorted(self.__dict__.items())))

    def __repr__(self) -> str:
        return f"{type(self).__name__}(dim={self.dim}, dof={self.dof})"


@final
class Euclidean(Space):
    r""":math:`\mathbb{R}^D` with Lebesgue measure."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, dim, dim)

    def project(self, x: Tensor) -> Tensor:
        return x

    def project_vector(self, v: Tensor) -> Tensor:
        return v

    def features(self, x: Tensor) -> Tensor:
        return x

    def log_gaussian(self, x: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
        return _log_normal(x - mean, variance, self.dim)


@final
class MeanFree(Space):
    r"""``n`` points in ``d`` dimensions with zero centre of mass.

    The measure is Lebesgue measure on the hyperplane :math:`\sum_i x_i = 0`, so an isotropic Gaussian with variance
    :math:`v` has the normalizer :math:`(2 \pi v)^{(n-1)d/2}`. Variances must be isotropic, shape ``(..., 1)``: any
    other would leave the hyperplane.
    """

    def __init__(self, n: int, d: int) -> None:
        super().__init__(n * d, (n - 1) * d, n * d)
        self.n = n
        self.d = d

    def project(self, x: Tensor) -> Tensor:
        points = x.unflatten(-1, (self.n, self.d))
        return (points - points.mean(-2, keepdim=True)).flatten(-2)

    def project_vector(self, v: Tensor) -> Tensor:
        return self.project(v)

    def features(self, x: Tensor) -> Tensor:
        return x

    def log_gaussian(self, x: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
        if variance.shape[-1] != 1:
            raise ValueError(
                f"Expected an isotropic variance of shape (..., 1) on MeanFree; got {tuple(variance.shape)}."
            )
        return _log_normal(self.project_vector(x - mean), variance, self.dof)


@final
class Torus(Space):
    r"""``m`` angles in :math:`[-\pi, \pi)` with Lebesgue measure.

    The Gaussian is the wrapped normal :math:`\sum_j N(x + 2 \pi j; \mu, v)`, summed over the 11 nearest images; above
    a standard deviation of 6 it equals the uniform law to 3e-8 and is evaluated as such.
    """

    images = 5
    uniform_above = 6.0

    def __init__(self, m: int) -> None:
        super().__init__(m, m, 2 * m)

    def project(self, x: Tensor) -> Tensor:
        return torch.remainder(x + math.pi, 2.0 * math.pi) - math.pi

    def project_vector(self, v: Tensor) -> Tensor:
        return v

    def features(self, x: Tensor) -> Tensor:
        return torch.cat([x.sin(), x.cos()], -1)

    def scaled(self, x: Tensor, scale: Tensor | float) -> Tensor:
        return x

    def log_gaussian(self, x: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
        delta = self.project(x - mean).double()
        variance = variance.double().expand_as(delta)
        wide = variance > self.uniform_above**2
        safe = torch.where(wide | (variance == 0), torch.ones_like(variance), variance)
        turns = 2.0 * math.pi * torch.arange(-self.images, self.images + 1, dtype=delta.dtype, device=delta.device)
        square = (delta.unsqueeze(-1) + turns).square() / safe.unsqueeze(-1)
        wrapped = torch.logsumexp(-0.5 * square, -1) - 0.5 * (LOG_2PI + safe.log())
        log_prob = torch.where(wide, torch.full_like(wrapped, -LOG_2PI), wrapped)
        return torch.where(variance == 0, torch.zeros_like(log_prob), log_prob).sum(-1)


@final
class EuclideanTorus(Space):
    r""":math:`\mathbb{R}^n \times [-\pi, \pi)^m` with Lebesgue measure: lengths and angles of a molecule, say.

    Arguments:
        n: Number of real coordinates, which come first.
        m: Number of angles.
    """

    def __init__(self, n: int, m: int) -> None:
        if n < 1 or m < 1:
            raise ValueError(f"Expected real coordinates and angles; got n={n} and m={m}.")
        super().__init__(n + m, n + m, n + 2 * m)
        self.n = n
        self.m = m

    def project(self, x: Tensor) -> Tensor:
        return torch.cat([x[..., : self.n], Torus(self.m).project(x[..., self.n :])], -1)

    def project_vector(self, v: Tensor) -> Tensor:
        return v

    def features(self, x: Tensor) -> Tensor:
        return torch.cat([x[..., : self.n], Torus(self.m).features(x[..., self.n :])], -1)

    def scaled(self, x: Tensor, scale: Tensor | float) -> Tensor:
        return torch.cat([x[..., : self.n] / scale, x[..., self.n :]], -1)

    def log_gaussian(self, x: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
        variance = variance.expand(*variance.shape[:-1], self.dim)
        line, circle = variance[..., : self.n], variance[..., self.n :]
        log_line = Euclidean(self.n).log_gaussian(x[..., : self.n], mean[..., : self.n], line)
        return log_line + Torus(self.m).log_gaussian(x[..., self.n :], mean[..., self.n :], circle)


def _log_normal(delta: Tensor, variance: Tensor, dof: int) -> Tensor:
    """Gaussian log density of a difference ``(..., D)``; zero variances are point masses and count nothing.

    One point's terms are summed in its own dtype (float64 there costs twenty times as much at D = 32 and gains nothing
    that the difference still holds); sums over steps and particles are float64.
    """
    point = variance == 0
    # Replaced before the logarithm: its infinite slope at zero would turn gradients of learned variances into NaN.
    safe = torch.where(point, torch.ones_like(variance), variance)
    log_norm = torch.where(point, torch.zeros_like(variance), LOG_2PI + safe.log())
    variance = torch.where(point, torch.full_like(variance, math.inf), safe)
    if variance.shape[-1] == 1:
        # One isotropic variance stands for all degrees of freedom, a diagonal one for a single degree each.
        square = delta.square().sum(-1) / variance.squeeze(-1)
        return -0.5 * (square.double() + dof * log_norm.squeeze(-1).double())
    return -0.5 * ((delta.square() / variance).sum(-1).double() + log_norm.sum(-1).double())
