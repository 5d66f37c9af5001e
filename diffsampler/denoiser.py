r"""Exact denoisers of Gaussian mixtures.

For :math:`y = z + s\,\xi` with :math:`z` from a mixture of Gaussians, everything that a reverse diffusion asks for is
closed form: with :math:`r_c(y)` the posterior share of component :math:`c` and :math:`m_c(y), v_c` the posterior mean
and variance inside it,

.. math::
   E[z | y] = \sum_c r_c m_c, \qquad
   \mathrm{Var}[z | y] = \sum_c r_c\,(v_c + m_c^2) - E[z | y]^2 .

A chain that is built on them samples the mixture before any training; a network only has to learn the difference to
the target.

References:
    An empirical Bayes approach to statistics (Robbins, 1956); Tweedie's formula and selection bias (Efron, 2011),
    https://doi.org/10.1198/jasa.2011.tm11181
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import NamedTuple, final

import torch
from torch import Tensor, nn

LOG_2PI = math.log(2.0 * math.pi)

__all__ = ["Denoised", "Denoiser", "MixtureDenoiser", "ProductDenoiser", "UnitDenoiser"]


class Denoised(NamedTuple):
    """What a fitted law says about a noisy point."""

    mean: Tensor
    """``E[z | y]``, shape ``(..., D)``."""
    variance: Tensor
    """``Var[z | y]`` per coordinate, shape ``(..., D)``, positive."""
    score: Tensor
    """Score of the fitted law itself (without noise) at ``y``, shape ``(..., D)``."""
    share: Tensor
    """Posterior shares ``r_c``: ``(..., C)`` for joint components, ``(..., D, C)`` for components per coordinate."""


class Denoiser(nn.Module, ABC):
    """Posterior moments of a fitted law under Gaussian noise.

    Arguments:
        dim: Dimension ``D``.
        components: Number ``C`` of components.
        joint: Whether components are shared by all coordinates.
    """

    def __init__(self, dim: int, components: int, *, joint: bool) -> None:
        super().__init__()
        self.dim = dim
        self.components = components
        self.joint = joint

    @abstractmethod
    def forward(self, y: Tensor, noise: Tensor) -> Denoised:
        """Moments at points ``y (..., D)`` under noise variances ``noise (..., 1)``."""

    @abstractmethod
    def log_prob(self, y: Tensor, noise: Tensor) -> Tensor:
        """Normalised log density of noisy points ``y (..., D)``, shape ``(...)``; noise variances ``(..., 1)``."""

    @abstractmethod
    def sample(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        """Draw from the fitted law, shape ``(n, D)``."""


@final
class UnitDenoiser(Denoiser):
    """Denoiser of the standard Gaussian; its one component has share 1."""

    unit: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__(dim, 1, joint=True)
        self.register_buffer("unit", torch.ones(dim))

    def forward(self, y: Tensor, noise: Tensor) -> Denoised:
        keep = 1.0 / (1.0 + noise)
        return Denoised(keep * y, (noise * keep).expand_as(y), -y, torch.ones_like(y[..., :1]))

    def log_prob(self, y: Tensor, noise: Tensor) -> Tensor:
        spread = 1.0 + noise
        return -0.5 * (y.square() / spread + spread.log() + LOG_2PI).sum(-1)

    def sample(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        return torch.randn(n, self.dim, generator=generator, dtype=self.unit.dtype, device=self.unit.device)


@final
class ProductDenoiser(Denoiser):
    r"""Denoiser of a product of one-dimensional mixtures, :math:`\prod_j \sum_c w_{jc} N(\mu_{jc}, \sigma_{jc}^2)`.

    Arguments:
        mean: Centres, shape ``(D, C)``.
        scale: Standard deviations, shape ``(D, C)``.
        log_weight: Log weights, shape ``(D, C)``, normalised per coordinate here.
    """

    mean: Tensor
    variance: Tensor
    log_weight: Tensor

    def __init__(self, mean: Tensor, scale: Tensor, log_weight: Tensor) -> None:
        if mean.ndim != 2 or not mean.shape == scale.shape == log_weight.shape:
            raise ValueError(
                "Expected mean, scale and log_weight of one shape (D, C); "
                f"got {tuple(mean.shape)}, {tuple(scale.shape)} and {tuple(log_weight.shape)}."
            )
        super().__init__(mean.shape[0], mean.shape[1], joint=False)
        self.register_buffer("mean", mean)
        self.register_buffer("variance", scale.square())
        self.register_buffer("log_weight", torch.log_softmax(log_weight, -1))

    def _share(self, delta: Tensor, precision: Tensor) -> Tensor:
        return torch.softmax(self.log_weight + 0.5 * (precision.log() - precision * delta.square()), -1)

    def forward(self, y: Tensor, noise: Tensor) -> Denoised:
        delta = y.unsqueeze(-1) - self.mean
        noise = noise.unsqueeze(-1)
        precision = 1.0 / (self.variance + noise)
        share = self._share(delta, precision)
        within = noise * self.variance * precision
        # Relative to y, so that nearly equal numbers are never subtracted at small noise.
        pull = -noise * precision * delta
        move = (share * pull).sum(-1)
        inside = (share * within).sum(-1)
        variance = inside + (share * (pull - move.unsqueeze(-1)).square()).sum(-1)
        own = 1.0 / self.variance
        score = -(self._share(delta, own) * own * delta).sum(-1)
        return Denoised(y + move, variance, score, share)

    def log_prob(self, y: Tensor, noise: Tensor) -> Tensor:
        spread = self.variance + noise.unsqueeze(-1)
        log_normal = -0.5 * ((y.unsqueeze(-1) - self.mean).square() / spread + spread.log() + LOG_2PI)
        return torch.logsumexp(self.log_weight + log_normal, -1).sum(-1)

    def sample(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        pick = torch.multinomial(self.log_weight.exp(), n, replacement=True, generator=generator)
        noise = torch.randn(self.dim, n, generator=generator, dtype=self.mean.dtype, device=self.mean.device)
        return (self.mean.gather(1, pick) + self.variance.gather(1, pick).sqrt() * noise).mT.contiguous()


@final
class MixtureDenoiser(Denoiser):
    r"""Denoiser of a mixture of full-covariance Gaussians, :math:`\sum_c w_c N(\mu_c, \Sigma_c)`.

    Arguments:
        mean: Centres, shape ``(C, D)``.
        tril: Lower Cholesky factors, shape ``(C, D, D)``.
        log_weight: Log weights, shape ``(C,)``, normalised here.
    """

    mean: Tensor
    axes: Tensor
    axes_square: Tensor
    variance: Tensor
    log_weight: Tensor

    def __init__(self, mean: Tensor, tril: Tensor, log_weight: Tensor) -> None:
        components, dim = mean.shape
        if tril.shape != (components, dim, dim) or log_weight.shape != (components,):
            raise ValueError(
                f"Expected mean (C, D), tril (C, D, D) and log_weight (C,); "
                f"got {tuple(mean.shape)}, {tuple(tril.shape)} and {tuple(log_weight.shape)}."
            )
        super().__init__(dim, components, joint=True)
        variance, axes = torch.linalg.eigh(tril @ tril.mT)
        self.register_buffer("mean", torch.einsum("cd,cde->ce", mean, axes))
        # Columns are the axes of all components side by side: one product turns a batch into all of them.
        self.register_buffer("axes", axes.permute(1, 0, 2).reshape(dim, components * dim).contiguous())
        self.register_buffer("axes_square", axes.square().permute(0, 2, 1).reshape(components * dim, dim).contiguous())
        self.register_buffer("variance", variance.clamp_min(1e-12))
        self.register_buffer("log_weight", torch.log_softmax(log_weight, 0))

    def _share(self, square: Tensor, precision: Tensor) -> Tensor:
        log_normal = 0.5 * (precision.log() - square * precision).sum(-1)
        return torch.softmax(self.log_weight + log_normal, -1)

    def _back(self, v: Tensor) -> Tensor:
        """Sum over components of vectors ``(..., C, D)`` given in their own axes."""
        return v.flatten(-2) @ self.axes.mT

    def forward(self, y: Tensor, noise: Tensor) -> Denoised:
        delta = (y @ self.axes).unflatten(-1, (self.components, self.dim)) - self.mean
        square = delta.square()
        noise = noise.unsqueeze(-1)
        precision = 1.0 / (self.variance + noise)
        share = self._share(square, precision)
        pull = -noise * precision * delta
        move = self._back(share.unsqueeze(-1) * pull)
        within = share.unsqueeze(-1) * (noise * self.variance * precision)
        inside = within.flatten(-2) @ self.axes_square
        # Second moments of the components' own pulls need them in the common coordinates.
        common = torch.einsum("...cd,cde->...ce", pull, self._axes_back)
        variance = inside + (share.unsqueeze(-1) * (common - move.unsqueeze(-2)).square()).sum(-2)
        own = 1.0 / self.variance
        score = self._back(-self._share(square, own).unsqueeze(-1) * own * delta)
        return Denoised(y + move, variance, score, share)

    @property
    def _axes_back(self) -> Tensor:
        return self.axes.unflatten(-1, (self.components, self.dim)).permute(1, 2, 0)

    def log_prob(self, y: Tensor, noise: Tensor) -> Tensor:
        delta = (y @ self.axes).unflatten(-1, (self.components, self.dim)) - self.mean
        spread = self.variance + noise.unsqueeze(-1)
        log_normal = -0.5 * (delta.square() / spread + spread.log() + LOG_2PI).sum(-1)
        return torch.logsumexp(self.log_weight + log_normal, -1)

    def sample(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        pick = torch.multinomial(self.log_weight.exp(), n, replacement=True, generator=generator)
        noise = torch.randn(n, self.dim, generator=generator, dtype=self.mean.dtype, device=self.mean.device)
        inner = self.mean[pick] + self.variance[pick].sqrt() * noise
        return (self._axes_back[pick].mT @ inner.unsqueeze(-1)).squeeze(-1)
