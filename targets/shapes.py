"""Curved densities in two dimensions: rings and a banana."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

from diffsampler.space import Euclidean
from diffsampler.target import Target
from diffsampler.targets import checks, draws
from diffsampler.targets.line import LineDensity

__all__ = ["Banana", "Rings"]

LOG_2PI = math.log(2.0 * math.pi)


@final
class Rings(Target):
    r"""Concentric rings in the plane; modes are the rings.

    .. math:: \log \rho(x) = -\kappa \min_k (|x| - c_k)^2

    Reference: Zhang and Chen, "Path integral sampler" (2022, https://arxiv.org/abs/2111.15141).

    Arguments:
        radii: Increasing radii :math:`c_k`.
        stiffness: The constant :math:`\kappa`; a ring's half width is :math:`(2 \kappa)^{-1/2}`.

    Raises:
        ValueError: If the radii are not positive and increasing.
    """

    radii: Tensor

    def __init__(self, radii: Tensor | Sequence[float] = (1.0, 3.0, 5.0), *, stiffness: float = 100.0) -> None:
        centers = checks.positive("radii", radii, (None,))
        if (centers.diff() <= 0).any():
            raise ValueError(f"Expected radii to increase; got {centers.tolist()}.")
        kappa = checks.positive("stiffness", stiffness, ()).item()
        reach = centers[-1].item() + 8.0 / math.sqrt(kappa)

        def radial(r: Tensor) -> Tensor:
            return r.log() - kappa * (r.unsqueeze(-1) - centers).square().amin(-1)

        line = LineDensity(radial, low=0.0, high=reach)
        super().__init__(
            Euclidean(2), log_normalizer=line.log_normalizer + LOG_2PI, num_modes=centers.numel(), has_sampler=True
        )
        self.line = line
        self.stiffness = kappa
        self.register_buffer("radii", centers)

    def log_prob(self, x: Tensor) -> Tensor:
        radius = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return -self.stiffness * (radius - self.radii.to(x)).square().amin(-1)

    def log_prob_and_score(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            radius = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
            offset = radius - self.radii.to(x)
            nearest = offset.gather(-1, offset.abs().argmin(-1, keepdim=True))
            # The gradient of |x| at the origin is taken to be zero, as autograd does.
            unit = torch.where(radius > 0, x / radius, torch.zeros_like(x))
            return -self.stiffness * nearest.square().squeeze(-1), -2.0 * self.stiffness * nearest * unit

    def sample(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        radius = self.line.sample((n, 1), generator=generator)
        z = draws.normal(n, 2, generator=generator, like=radius)
        return radius * z / torch.linalg.vector_norm(z, dim=-1, keepdim=True)

    def mode_labels(self, x: Tensor) -> Tensor:
        radius = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return (radius - self.radii.to(x)).abs().argmin(-1)

    def mode_weights(self) -> Tensor:
        """Share of each ring, bounded by the circles half way between neighbours; shape ``(num_modes,)``."""
        middle = (0.5 * (self.radii[1:] + self.radii[:-1])).tolist()
        edges = [0.0, *middle, self.line.points[-1].item()]
        masses = [self.line.mass(low, high) for low, high in zip(edges[:-1], edges[1:], strict=True)]
        return self.line.points.new_tensor(masses)


@final
class Banana(Target):
    r"""A bent Gaussian in two dimensions, normalized.

    .. math:: x_0 \sim N(0, s^2), \qquad x_1 | x_0 \sim N(b (x_0^2 - s^2), 1)

    Reference: Haario, Saksman and Tamminen, "Adaptive proposal distribution for random walk Metropolis algorithm"
    (1999, https://doi.org/10.1007/s001800050022).

    Arguments:
        scale: Standard deviation ``s`` of the first coordinate.
        curvature: Curvature ``b``; 0 gives a Gaussian.
    """

    def __init__(self, *, scale: float = 10.0, curvature: float = 0.03) -> None:
        width = checks.positive("scale", scale, ()).item()
        bend = checks.array("curvature", curvature, ()).item()
        super().__init__(Euclidean(2), log_normalizer=0.0, has_sampler=True)
        self.scale = width
        self.curvature = bend

    def log_prob(self, x: Tensor) -> Tensor:
        return self._parts(x)[0]

    def log_prob_and_score(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            log_prob, rest = self._parts(x)
            first = x[..., 0]
            return log_prob, torch.stack([2.0 * self.curvature * first * rest - first / self.scale**2, -rest], -1)

    def sample(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        z = draws.normal(n, 2, generator=generator)
        first = self.scale * z[:, 0]
        return torch.stack([first, z[:, 1] + self._bend(first)], -1)

    def _bend(self, first: Tensor) -> Tensor:
        return self.curvature * (first.square() - self.scale**2)

    def _parts(self, x: Tensor) -> tuple[Tensor, Tensor]:
        first = x[..., 0]
        rest = x[..., 1] - self._bend(first)
        constant = LOG_2PI + math.log(self.scale)
        return -0.5 * ((first / self.scale).square() + rest.square()) - constant, rest
