"""Float64 random numbers on the generator's device, so that a sampler serves a generator on any device."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["normal", "uniform"]


def normal(*shape: int, generator: torch.Generator | None, like: Tensor | None = None) -> Tensor:
    """Standard normal draws; without a generator on the device of ``like``."""
    return torch.randn(*shape, generator=generator, dtype=torch.float64, device=_device(generator, like))


def uniform(*shape: int, generator: torch.Generator | None, like: Tensor | None = None) -> Tensor:
    """Draws from [0, 1); without a generator on the device of ``like``."""
    return torch.rand(*shape, generator=generator, dtype=torch.float64, device=_device(generator, like))


def _device(generator: torch.Generator | None, like: Tensor | None) -> torch.device | None:
    if generator is not None:
        return generator.device
    return None if like is None else like.device
