r"""Bijections from :math:`\mathbb{R}^n` onto the support of a latent site.

``torch.distributions.biject_to`` knows most supports. This module adds the others that Pyro's distributions have, and
never registers anything: the registry belongs to the whole process.

* *Circles and tori* (von Mises and its relatives): torch calls the support the real line, on which the density is
  periodic and cannot be normalized. Here an angle lives in :math:`(-\pi, \pi)`.
* *Spheres* (projected normal, von Mises-Fisher): azimuthal coordinates :math:`u \in \mathbb{R}^{n-1}` about the last
  axis, with colatitude :math:`\varphi = 2 \arctan \sinh |u|`, so that densities decay like :math:`e^{-(n-1)|u|}`
  towards the opposite pole.
* *Matrices* (Wishart): a symmetric positive-definite matrix by its Cholesky factor with diagonal :math:`e^{u_i}`, and
  triangular and symmetric matrices by their free entries. Densities are with respect to these entries.
* *Mixtures*: the support of the components.

References:
    Stan Reference Manual, Constraint Transforms, https://mc-stan.org/docs/reference-manual/transforms.html
    Directional Statistics (Mardia & Jupp, 2000), https://doi.org/10.1002/9780470316979
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, final

import torch
from pyro import distributions as dist
from torch import Tensor
from torch.distributions import Transform, biject_to, constraints
from torch.distributions.transforms import ComposeTransform, IndependentTransform, identity_transform

__all__ = ["SphereTransform", "SymmetricTransform", "TriangularTransform", "bijection"]

PERIODIC = (dist.VonMises, torch.distributions.VonMises, dist.SineBivariateVonMises, dist.SineSkewed)
SMALL = 1e-4
"""Radius below which ``sinh(r) / r`` is its series."""


def bijection(name: str, fn: Any) -> Transform:
    """The bijection of latent site ``name`` with law ``fn``, as the law is in this run.

    Raises:
        ValueError: If the law has no density on its support, or the support has no bijection to real vectors.
    """
    for base in _bases(fn):
        if isinstance(base, dist.Delta):
            raise ValueError(
                f"Expected continuous latent sites; got Delta at {name!r}. Use pyro.deterministic or obs= instead."
            )
        if isinstance(base, PERIODIC):
            return _periodic(name, fn)
        if type(base).__name__ == "GeneralizedPareto" and bool((base.concentration >= 0.0).all()):
            # Its support says (loc, inf) as an interval, whose bijection would be infinite.
            tail = biject_to(constraints.greater_than_eq(base.loc))
            return IndependentTransform(tail, fn.event_dim) if fn.event_dim else tail
    try:
        return _bijection(fn.support)
    except NotImplementedError as error:
        raise ValueError(
            f"Expected a support with a bijection to R^n; got {fn.support} at latent site {name!r}."
        ) from error


def _bases(fn: Any) -> Iterator[Any]:
    while fn is not None:
        yield fn
        fn = getattr(fn, "base_dist", None)


def _periodic(name: str, fn: Any) -> Transform:
    for base in _bases(fn):
        if isinstance(base, torch.distributions.TransformedDistribution) and not isinstance(base, PERIODIC):
            raise ValueError(
                f"Expected a support with a bijection to R^n; got a transformed angle at latent site {name!r}. "
                "Sample the angle itself and transform it with pyro.deterministic."
            )
        if isinstance(base, PERIODIC):
            break
    angle = biject_to(constraints.interval(-math.pi, math.pi))
    events = fn.event_dim
    return IndependentTransform(angle, events) if events else angle


def _bijection(support: Any) -> Transform:
    """``biject_to``, continued to supports that it does not know."""
    inner = getattr(support, "base_constraint", None)
    if isinstance(support, constraints.independent) and inner is not None:
        transform, extra = _bijection(inner), support.reinterpreted_batch_ndims
        return IndependentTransform(transform, extra) if extra else transform
    if type(support).__name__ == "MixtureSameFamilyConstraint" and inner is not None:
        return _bijection(inner)
    if support is dist.constraints.sphere:
        return SphereTransform()
    matrix = MATRICES.get(support)
    return biject_to(support) if matrix is None else matrix()


@final
class SphereTransform(Transform):
    r"""Azimuthal coordinates ``(..., n - 1)`` of unit vectors ``(..., n)``.

    .. math:: y = (\sin\varphi\, u / |u|, \cos\varphi), \quad \varphi = 2\arctan\sinh r, \quad r = |u|,

    with the surface element :math:`\frac{d\varphi}{dr} (\sin\varphi / r)^{n-2}
    = \frac{2}{\cosh r} \big(\frac{2 \sinh r}{r \cosh^2 r}\big)^{n-2}`.
    """

    domain = constraints.real_vector
    codomain = dist.constraints.sphere
    bijective = True

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SphereTransform)

    def _call(self, x: Tensor) -> Tensor:
        r, ratio = _radius(x)
        cosh = r.cosh()
        # cos(phi) = (1 - sinh^2) / cosh^2, without the square that overflows.
        return torch.cat([2.0 * ratio / cosh.square() * x, 2.0 / cosh.square() - 1.0], -1)

    def _inverse(self, y: Tensor) -> Tensor:
        perp, pole = y[..., :-1], y[..., -1:]
        length = perp.square().sum(-1, keepdim=True).sqrt()
        tiny = torch.finfo(y.dtype).tiny
        near = length / (1.0 + pole.clamp_min(0.0))
        far = (1.0 - pole.clamp_max(0.0)) / length.clamp_min(tiny)
        r = torch.where(pole > 0.0, near, far).asinh()
        return perp * torch.where(length > 0.0, r / length.clamp_min(tiny), 0.5)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        r, ratio = _radius(x)
        log_cosh = r + torch.log1p(torch.exp(-2.0 * r)) - math.log(2.0)
        angles = x.shape[-1] - 1
        value = math.log(2.0) - log_cosh + angles * (math.log(2.0) + ratio.log() - 2.0 * log_cosh)
        return value.squeeze(-1)

    def forward_shape(self, shape: torch.Size) -> torch.Size:
        return torch.Size((*shape[:-1], shape[-1] + 1))

    def inverse_shape(self, shape: torch.Size) -> torch.Size:
        return torch.Size((*shape[:-1], shape[-1] - 1))


def _radius(x: Tensor) -> tuple[Tensor, Tensor]:
    """``r = |x|`` and ``sinh(r) / r``, each ``(..., 1)``, with gradients at the origin."""
    square = x.square().sum(-1, keepdim=True)
    small = square < SMALL**2
    r = torch.where(small, torch.ones_like(square), square).sqrt()
    ratio = torch.where(small, 1.0 + square / 6.0, r.sinh() / r)
    return torch.where(small, square.clamp_min(torch.finfo(x.dtype).tiny).sqrt().detach(), r), ratio


@final
class TriangularTransform(Transform):
    """A vector of free entries to a lower-triangular matrix ``(..., n, n)``, row by row.

    Arguments:
        diagonal: The map of diagonal entries; None for a diagonal of ones, which is no free entry.
    """

    domain = constraints.real_vector
    bijective = True

    def __init__(self, diagonal: Transform | None) -> None:
        super().__init__()
        self.diagonal = diagonal
        # Of the three triangular supports the widest: the others only bound the diagonal.
        self.codomain = constraints.lower_triangular

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TriangularTransform) and self.diagonal == other.diagonal

    @property
    def _offset(self) -> int:
        return -1 if self.diagonal is None else 0

    def _call(self, x: Tensor) -> Tensor:
        n = _order(x.shape[-1], self._offset)
        rows, columns = torch.tril_indices(n, n, self._offset, device=x.device)
        # A product with zeros and ones: vmap has no indexed writing into a new tensor.
        place = torch.zeros(x.shape[-1], n * n, dtype=x.dtype, device=x.device)
        place[torch.arange(x.shape[-1], device=x.device), rows * n + columns] = 1.0
        matrix = (x @ place).unflatten(-1, (n, n))
        eye = torch.eye(n, dtype=x.dtype, device=x.device)
        if self.diagonal is None:
            return matrix + eye
        return matrix.tril(-1) + self.diagonal(matrix.diagonal(dim1=-2, dim2=-1)).unsqueeze(-1) * eye

    def _inverse(self, y: Tensor) -> Tensor:
        n = y.shape[-1]
        if self.diagonal is not None:
            eye = torch.eye(n, dtype=y.dtype, device=y.device)
            y = y.tril(-1) + self.diagonal.inv(y.diagonal(dim1=-2, dim2=-1)).unsqueeze(-1) * eye
        rows, columns = torch.tril_indices(n, n, self._offset, device=y.device)
        return y[..., rows, columns]

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        if self.diagonal is None:
            return torch.zeros_like(x[..., 0])
        entries = torch.arange(1, y.shape[-1] + 1, device=x.device)
        free = x[..., entries * (entries + 1) // 2 - 1]
        return self.diagonal.log_abs_det_jacobian(free, y.diagonal(dim1=-2, dim2=-1)).sum(-1)

    def forward_shape(self, shape: torch.Size) -> torch.Size:
        n = _order(shape[-1], self._offset)
        return torch.Size((*shape[:-1], n, n))

    def inverse_shape(self, shape: torch.Size) -> torch.Size:
        n = shape[-1]
        return torch.Size((*shape[:-2], n * (n + 1 + 2 * self._offset) // 2))


@final
class SymmetricTransform(Transform):
    r"""A lower-triangular matrix to a symmetric one, by mirroring or as :math:`L L^T`.

    The density of :math:`L L^T` with respect to its lower entries has the factor
    :math:`2^n \prod_i L_{ii}^{n - i + 1}`, :math:`i = 1 \dots n`.
    """

    domain = constraints.lower_triangular
    bijective = True

    def __init__(self, *, product: bool) -> None:
        super().__init__()
        self.product = product
        self.codomain = constraints.positive_definite if product else constraints.symmetric

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SymmetricTransform) and self.product == other.product

    def _call(self, x: Tensor) -> Tensor:
        return x @ x.mT if self.product else x + x.tril(-1).mT

    def _inverse(self, y: Tensor) -> Tensor:
        return torch.linalg.cholesky(y) if self.product else y.tril()

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        n = x.shape[-1]
        if not self.product:
            return torch.zeros_like(x[..., 0, 0])
        powers = torch.arange(n, 0, -1, dtype=x.dtype, device=x.device)
        return n * math.log(2.0) + (powers * x.diagonal(dim1=-2, dim2=-1).log()).sum(-1)


def _order(entries: int, offset: int) -> int:
    """Rows of a matrix with so many free entries."""
    return (math.isqrt(8 * entries + 1) - 1) // 2 - offset


def _exponential() -> Transform:
    return biject_to(constraints.positive)


def _softplus() -> Transform:
    return biject_to(dist.constraints.softplus_positive)


MATRICES = {
    constraints.lower_triangular: lambda: TriangularTransform(identity_transform),
    constraints.lower_cholesky: lambda: TriangularTransform(_exponential()),
    dist.constraints.softplus_lower_cholesky: lambda: TriangularTransform(_softplus()),
    dist.constraints.unit_lower_cholesky: lambda: TriangularTransform(None),
    constraints.symmetric: lambda: ComposeTransform(
        [TriangularTransform(identity_transform), SymmetricTransform(product=False)]
    ),
    constraints.positive_definite: lambda: ComposeTransform(
        [TriangularTransform(_exponential()), SymmetricTransform(product=True)]
    ),
    constraints.square: lambda: IndependentTransform(identity_transform, 2),
}
"""Bijections onto supports of matrices; what is missing from torch's registry."""
