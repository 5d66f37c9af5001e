r"""Invertible maps with tractable Jacobians, and what a sampler keeps of a batch that was partly lost.

A :class:`Flow` maps :math:`x \mapsto y` and says :math:`\log |\det \partial y / \partial x|`. The affine coupling layer
keeps the coordinates that its mask :math:`m` picks and moves the rest by functions of them,

.. math:: y = m x + (1 - m)(x\, e^{s(m x)} + t(m x)), \qquad \log|\det| = \sum_i (1 - m_i)\, s_i(m x),

with :math:`|s| < 2`, so that no layer stretches by more than :math:`e^2` and inverses stay accurate.

References:
    Density estimation using Real NVP (Dinh, Sohl-Dickstein & Bengio, 2017), https://arxiv.org/abs/1605.08803
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor, nn

from diffsampler.networks import clip, linear
from diffsampler.particles import Particles

__all__ = ["Affine", "AffineCoupling", "Composition", "Flow", "couplings", "surviving"]

LARGEST_LOG_SCALE = 2.0


class Flow(nn.Module, ABC):
    """An invertible map of vectors ``(..., S)``."""

    @abstractmethod
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``y (..., S)`` and ``log |det dy/dx| (...)`` in float64."""

    @abstractmethod
    def inverse(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """``x (..., S)`` and ``log |det dx/dy| (...)`` in float64."""


@final
class Affine(Flow):
    r"""A shift and a scale per coordinate, :math:`y = e^{a} x + b`; the identity at first."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(dim))
        self.shift = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x * self.log_scale.exp() + self.shift, self.log_scale.double().sum().expand(x.shape[:-1])

    def inverse(self, y: Tensor) -> tuple[Tensor, Tensor]:
        return (y - self.shift) * (-self.log_scale).exp(), -self.log_scale.double().sum().expand(y.shape[:-1])


@final
class AffineCoupling(Flow):
    """One affine coupling layer; the identity at first.

    Arguments:
        mask: Which coordinates stay, boolean, shape ``(D,)``; at least one moves.
        width: Width of the two hidden layers.
        generator: Source of the initial parameters.
    """

    mask: Tensor

    def __init__(self, mask: Tensor, *, width: int, generator: torch.Generator) -> None:
        super().__init__()
        if mask.ndim != 1 or mask.dtype != torch.bool or bool(mask.all()):
            raise ValueError(f"Expected a boolean mask of shape (D,) with some coordinate to move; got {mask}.")
        dim = mask.shape[0]
        self.register_buffer("mask", mask.clone())
        self.net = nn.Sequential(
            linear(dim, width, generator=generator),
            nn.SiLU(),
            linear(width, width, generator=generator),
            nn.SiLU(),
            linear(width, 2 * dim, generator=generator, zero=True),
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        log_scale, shift = self._parts(x)
        return x * log_scale.exp() + shift, log_scale.sum(-1, dtype=torch.float64)

    def inverse(self, y: Tensor) -> tuple[Tensor, Tensor]:
        log_scale, shift = self._parts(y)
        return (y - shift) * (-log_scale).exp(), -log_scale.sum(-1, dtype=torch.float64)

    def _parts(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Log scale and shift, zero where the mask keeps; both sides of the layer share the kept coordinates."""
        kept = torch.where(self.mask, x, torch.zeros_like(x))
        log_scale, shift = self.net(kept).chunk(2, -1)
        nothing = torch.zeros_like(x)
        log_scale = torch.where(self.mask, nothing, clip(log_scale, LARGEST_LOG_SCALE))
        return log_scale, torch.where(self.mask, nothing, shift)


@final
class Composition(Flow):
    """Flows one after the other."""

    def __init__(self, flows: Sequence[Flow]) -> None:
        super().__init__()
        self.flows = nn.ModuleList(flows)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        total = x.new_zeros(x.shape[:-1], dtype=torch.float64)
        for flow in self.flows:
            x, log_det = flow(x)
            total = total + log_det
        return x, total

    def inverse(self, y: Tensor) -> tuple[Tensor, Tensor]:
        total = y.new_zeros(y.shape[:-1], dtype=torch.float64)
        for flow in reversed(self.flows):
            assert isinstance(flow, Flow)
            y, log_det = flow.inverse(y)
            total = total + log_det
        return y, total


def couplings(dim: int, *, num_layers: int, width: int, generator: torch.Generator) -> Composition:
    """An affine map and ``num_layers`` coupling layers whose masks alternate; the identity at first.

    In one dimension no coordinate can stay, and the affine map is all there is.
    """
    even = torch.arange(dim) % 2 == 0
    masks = [even if k % 2 == 0 else ~even for k in range(num_layers)] if dim > 1 else []
    return Composition([Affine(dim), *(AffineCoupling(m, width=width, generator=generator) for m in masks)])


def surviving(x: Tensor, log_weight: Tensor) -> Particles:
    """Particles from independent blocks, without the blocks in which anything is lost to non-finite values.

    A lost block counts as weight zero: the mean over all blocks is kept.

    Arguments:
        x: Points, shape ``(blocks, m, D)``.
        log_weight: Log weights, shape ``(blocks, m)``, float64; ``-inf`` is a value.

    Raises:
        RuntimeError: If fewer than two blocks are left, or none of a single one.
    """
    blocks, size = log_weight.shape
    keep = x.isfinite().all(-1) & ~log_weight.isnan() & (log_weight < math.inf)
    kept = keep.all(-1)
    count = int(kept.sum())
    if count < min(blocks, 2):
        raise RuntimeError("All particles are non-finite. Use smaller steps, or check the target.")
    log_weight = log_weight[kept] + math.log(count / blocks)
    return Particles(
        x[kept].flatten(0, 1),
        log_weight.flatten(),
        replicates=1 if size == 1 else count,
        nonfinite=(blocks - count) * size,
    )
