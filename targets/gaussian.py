"""Gaussian and Student-t densities."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import final

import numpy
import torch
from scipy import special
from torch import Tensor

from diffsampler.space import Euclidean
from diffsampler.target import Target
from diffsampler.targets import checks, draws

__all__ = ["Gaussian", "StudentT"]

LOG_2PI = math.log(2.0 * math.pi)


@final
class Gaussian(Target):
    r"""A Gaussian with diagonal or full covariance, times a known constant.

    .. math:: \log \rho(x) = \log Z + \log N(x; \mu, \Sigma)

    Arguments:
        mean: Mean, shape ``(D,)``.
        scale: Standard deviation, a number or shape ``(D,)``. Exactly one of ``scale`` and ``covariance``.
        covariance: Covariance matrix, shape ``(D, D)``.
        log_normalizer: Log of the constant that multiplies the normalized density.

    Raises:
        ValueError: If shapes disagree, scales are not positive or the covariance is not positive definite.
    """

    mean: Tensor
    factor: Tensor
    whitening: Tensor
    log_scale: Tensor

    def __init__(
        self,
        mean: Tensor | Sequence[float],
        *,
        scale: Tensor | Sequence[float] | float | None = None,
        covariance: Tensor | Sequence[Sequence[float]] | None = None,
        log_normalizer: float = 0.0,
    ) -> None:
        location = checks.array("mean", mean, (None,))
        dim = location.numel()
        if (scale is None) == (covariance is None):
            raise ValueError("Expected exactly one of scale and covariance.")
        super().__init__(Euclidean(dim), log_normalizer=float(log_normalizer), has_sampler=True)
        self.diagonal = covariance is None
        if covariance is None:
            assert scale is not None
            factor = checks.positive("scale", scale, (), (dim,)).expand(dim).clone()
            whitening, log_scale = factor.reciprocal(), factor.log().sum()
        else:
            factor = checks.cholesky("covariance", checks.array("covariance", covariance, (dim, dim)))
            eye = torch.eye(dim, dtype=factor.dtype)
            whitening = torch.linalg.solve_triangular(factor, eye, upper=False)
            log_scale = factor.diagonal().log().sum()
        self.register_buffer("mean", location)
        self.register_buffer("factor", factor)
        self.register_buffer("whitening", whitening)
        self.register_buffer("log_scale", float(log_normalizer) - log_scale - 0.5 * dim * LOG_2PI)

    @classmethod
    def correlated(cls, dim: int = 10, *, correlation: float = 0.5) -> Gaussian:
        r"""Mean one, unit variances and :math:`\Sigma_{ij} = r^{|i-j|}`."""
        index = torch.arange(checks.integer("dim", dim), dtype=torch.float64)
        return cls(torch.ones_like(index), covariance=correlation ** (index - index[:, None]).abs())

    @classmethod
    def ill_scaled(cls, dim: int = 8) -> Gaussian:
        """Independent coordinates with scales from 1e-3 to 1e4 and means ten scales from the origin, up to 1e5."""
        scale = torch.logspace(-3, 4, checks.integer("dim", dim, minimum=2), dtype=torch.float64)
        return cls(10.0 * scale, scale=scale)

    def log_prob(self, x: Tensor) -> Tensor:
        return self.log_scale.to(x) - 0.5 * self._whiten(x).square().sum(-1)

    def log_prob_and_score(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            z = self._whiten(x)
            whitening = self.whitening.to(x)
            score = -z * whitening if self.diagonal else -z @ whitening
            return self.log_scale.to(x) - 0.5 * z.square().sum(-1), score

    def sample(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        z = draws.normal(n, self.dim, generator=generator, like=self.mean)
        factor = self.factor.to(z)
        return self.mean.to(z) + (z * factor if self.diagonal else z @ factor.mT)

    def _whiten(self, x: Tensor) -> Tensor:
        delta = x - self.mean.to(x)
        whitening = self.whitening.to(x)
        return delta * whitening if self.diagonal else delta @ whitening.mT


@final
class StudentT(Target):
    r"""The spherical Student-t density with :math:`\nu` degrees of freedom, normalized. Heavy tails in any direction.

    .. math:: \log \pi(x) = c - \frac{\nu + D}{2} \log\left(1 + \frac{|x|^2}{\nu}\right)

    The variance is infinite for :math:`\nu \le 2`, the mean undefined for :math:`\nu \le 1`.

    Arguments:
        dim: Dimension ``D``.
        df: Degrees of freedom.
    """

    def __init__(self, dim: int = 10, *, df: float = 3.0) -> None:
        checks.integer("dim", dim)
        nu = checks.positive("df", df, ()).item()
        super().__init__(Euclidean(dim), log_normalizer=0.0, has_sampler=True)
        self.df = nu
        self.log_constant = math.lgamma(0.5 * (nu + dim)) - math.lgamma(0.5 * nu) - 0.5 * dim * math.log(math.pi * nu)

    def log_prob(self, x: Tensor) -> Tensor:
        return self.log_constant - 0.5 * (self.df + self.dim) * torch.log1p(x.square().sum(-1) / self.df)

    def log_prob_and_score(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            square = x.square().sum(-1)
            log_prob = self.log_constant - 0.5 * (self.df + self.dim) * torch.log1p(square / self.df)
            return log_prob, -((self.df + self.dim) / (self.df + square)).unsqueeze(-1) * x

    def sample(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        z = draws.normal(n, self.dim, generator=generator)
        u = draws.uniform(n, 1, generator=generator)
        # Chi-square by inversion: torch's own gamma sampler takes no generator in its public form.
        chi_square = 2.0 * special.gammaincinv(0.5 * self.df, u.cpu().numpy())
        return z * torch.from_numpy(numpy.sqrt(self.df / chi_square)).to(z)
