r"""Laws that chains start from.

A :class:`Prior` is a normalized density with a reparameterized sampler and a closed-form score. Its parameters, if it
has any, are trained with the chain that starts from it.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import final

import torch
from torch import Tensor, nn

from diffsampler.space import Space, Torus

__all__ = ["GaussianPrior", "MixturePrior", "Prior", "UniformTorusPrior", "default_prior"]


class Prior(nn.Module, ABC):
    """A normalized density on a space.

    Arguments:
        space: Where it lives.
    """

    def __init__(self, space: Space) -> None:
        super().__init__()
        self.space = space

    @property
    def learns(self) -> bool:
        """Whether it has parameters that are trained."""
        return any(p.requires_grad for p in self.parameters())

    @abstractmethod
    def sample(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        """Draw points ``(n, D)`` in the dtype and on the device of the prior; reparameterized."""

    @abstractmethod
    def log_prob(self, x: Tensor) -> Tensor:
        """Log density at ``x (..., D)``, shape ``(...)``, float64."""

    @abstractmethod
    def score(self, x: Tensor) -> Tensor:
        """Gradient of the log density at ``x (..., D)``, differentiable."""


@final
class GaussianPrior(Prior):
    """A Gaussian with diagonal covariance (isotropic for mean-free particles).

    Arguments:
        space: Euclidean or mean-free space.
        mean: Mean, shape ``(D,)``, zero by default.
        scale: Standard deviation.
        learn: Whether mean and scale are trained.
    """

    def __init__(self, space: Space, *, mean: Tensor | None = None, scale: float = 1.0, learn: bool = True) -> None:
        _check(space, scale)
        super().__init__(space)
        if mean is not None and mean.shape != (space.dim,):
            raise ValueError(f"Expected a mean of shape ({space.dim},); got {tuple(mean.shape)}.")
        start = torch.zeros(space.dim) if mean is None else mean.detach().float().clone()
        self.mean = nn.Parameter(start, requires_grad=learn)
        self.log_scale = nn.Parameter(torch.full((_scales(space),), math.log(scale)), requires_grad=learn)

    def sample(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        noise = self.space.noise((n,), like=self.mean, generator=generator)
        return self.space.project(self.mean) + self.log_scale.exp() * noise

    def log_prob(self, x: Tensor) -> Tensor:
        return self.space.log_gaussian(x, self.space.project(self.mean), (2.0 * self.log_scale).exp())

    def score(self, x: Tensor) -> Tensor:
        return (self.space.project(self.mean) - x) * (-2.0 * self.log_scale).exp()


@final
class MixturePrior(Prior):
    r"""A mixture of diagonal Gaussians, :math:`\sum_m p_m N(\mu_m, \mathrm{diag}(s_m^2))`, centred on given points.

    Particles of a short run, or the modes of a search, make good centres: the chain then need not find the modes. The
    shares are fixed, because a draw of a component has no path gradient. A density costs ``M D`` operations per point.

    Reference: Beyond ELBOs: a large-scale evaluation of variational methods for sampling (Blessing et al., 2024),
    https://arxiv.org/abs/2406.07423, and End-to-end learning of Gaussian mixture priors for diffusion sampler (Blessing
    et al., 2025), https://arxiv.org/abs/2503.00524.

    Arguments:
        space: Euclidean or mean-free space.
        means: Centres, shape ``(M, D)``.
        scale: Standard deviation of every component at the start.
        shares: Positive weights of the components, shape ``(M,)``, normalized here; equal by default.
        learn: Whether centres and scales are trained.
    """

    log_shares: Tensor

    def __init__(
        self, space: Space, means: Tensor, *, scale: float = 1.0, shares: Tensor | None = None, learn: bool = True
    ) -> None:
        _check(space, scale)
        super().__init__(space)
        if means.ndim != 2 or means.shape[0] < 1 or means.shape[1] != space.dim:
            raise ValueError(f"Expected means of shape (M, {space.dim}); got {tuple(means.shape)}.")
        count = len(means)
        shares = torch.ones(count) if shares is None else shares.detach()
        if shares.shape != (count,) or not bool((shares > 0.0).all()):
            raise ValueError(f"Expected {count} positive shares; got {shares.tolist()}.")
        self.means = nn.Parameter(means.detach().float().clone(), requires_grad=learn)
        self.log_scale = nn.Parameter(torch.full((count, _scales(space)), math.log(scale)), requires_grad=learn)
        self.register_buffer("log_shares", (shares.double() / shares.double().sum()).log())

    def sample(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        shares = self.log_shares.exp()
        index = torch.multinomial(shares, n, replacement=True, generator=generator)
        noise = self.space.noise((n,), like=self.means, generator=generator)
        return self.space.project(self.means[index]) + self.log_scale[index].exp() * noise

    def _log_components(self, x: Tensor) -> Tensor:
        variance = (2.0 * self.log_scale).exp()
        return self.log_shares + self.space.log_gaussian(x.unsqueeze(-2), self.space.project(self.means), variance)

    def log_prob(self, x: Tensor) -> Tensor:
        return torch.logsumexp(self._log_components(x), -1)

    def score(self, x: Tensor) -> Tensor:
        share = torch.softmax(self._log_components(x), -1).to(x.dtype).unsqueeze(-1)
        precision = (-2.0 * self.log_scale).exp()
        return (share * precision * (self.space.project(self.means) - x.unsqueeze(-2))).sum(-2)


@final
class UniformTorusPrior(Prior):
    """The uniform law of angles.

    Arguments:
        space: A torus.
    """

    origin: Tensor

    def __init__(self, space: Space) -> None:
        if not isinstance(space, Torus):
            raise ValueError(f"Expected a torus: only there is the uniform law normalized; got {space}.")
        super().__init__(space)
        self.register_buffer("origin", torch.zeros(()))

    def sample(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        like = self.origin
        u = torch.rand(n, self.space.dim, generator=generator, dtype=like.dtype, device=like.device)
        return (2.0 * u - 1.0) * math.pi

    def log_prob(self, x: Tensor) -> Tensor:
        return x.new_full(x.shape[:-1], -self.space.dim * math.log(2.0 * math.pi), dtype=torch.float64)

    def score(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


def default_prior(space: Space, scale: float, *, learn: bool = True) -> Prior:
    """Uniform on a torus, elsewhere a Gaussian of the given scale."""
    return UniformTorusPrior(space) if isinstance(space, Torus) else GaussianPrior(space, scale=scale, learn=learn)


def _check(space: Space, scale: float) -> None:
    if isinstance(space, Torus):
        raise ValueError("Expected a Euclidean or mean-free space: a Gaussian on a torus has no simple score.")
    if not 0.0 < scale < math.inf:
        raise ValueError(f"Expected scale > 0; got {scale}.")


def _scales(space: Space) -> int:
    """Mean-free particles have no coordinates of their own: their scale is shared."""
    return space.dim if space.dof == space.dim else 1
