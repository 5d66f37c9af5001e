"""The funnel."""

from __future__ import annotations

import math
from typing import final

import torch
from torch import Tensor

from diffsampler.space import Euclidean
from diffsampler.target import Target
from diffsampler.targets import checks, draws

__all__ = ["Funnel"]

LOG_2PI = math.log(2.0 * math.pi)


@final
class Funnel(Target):
    r"""Neal's funnel, normalized.

    .. math:: x_0 \sim N(0, s^2), \qquad x_i | x_0 \sim N(0, e^{x_0}), \quad i = 1, \dots, D - 1

    Reference: Neal, "Slice sampling" (2003, https://doi.org/10.1214/aos/1056562461). The scale 3 is that of most
    papers on learned samplers; some use 1 and call it the easy funnel.

    Arguments:
        dim: Dimension ``D``, at least 2.
        scale: Standard deviation ``s`` of the neck coordinate.
    """

    def __init__(self, dim: int = 10, *, scale: float = 3.0) -> None:
        checks.integer("dim", dim, minimum=2)
        width = checks.positive("scale", scale, ()).item()
        super().__init__(Euclidean(dim), log_normalizer=0.0, has_sampler=True)
        self.scale = width
        self.log_constant = -0.5 * dim * LOG_2PI - math.log(width)

    def log_prob(self, x: Tensor) -> Tensor:
        neck = x[..., 0]
        # Scaling before squaring: exp(-neck) alone would overflow twice as early.
        square = (x[..., 1:] * torch.exp(-0.5 * neck).unsqueeze(-1)).square().sum(-1)
        return self.log_constant - 0.5 * ((neck / self.scale).square() + (self.dim - 1) * neck + square)

    def log_prob_and_score(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            neck = x[..., 0]
            inverse = torch.exp(-0.5 * neck).unsqueeze(-1)
            z = x[..., 1:] * inverse
            square = z.square().sum(-1)
            log_prob = self.log_constant - 0.5 * ((neck / self.scale).square() + (self.dim - 1) * neck + square)
            score_neck = -neck / self.scale**2 - 0.5 * (self.dim - 1) + 0.5 * square
            return log_prob, torch.cat([score_neck.unsqueeze(-1), -z * inverse], -1)

    def sample(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        z = draws.normal(n, self.dim, generator=generator)
        neck = self.scale * z[:, :1]
        return torch.cat([neck, torch.exp(0.5 * neck) * z[:, 1:]], -1)
