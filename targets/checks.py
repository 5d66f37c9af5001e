"""Checks of constructor arguments, shared by the targets. Every error has the form "Expected ...; got ..."."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["array", "cholesky", "integer", "positive"]


def array(name: str, value: Tensor | Sequence[object] | float, *shapes: tuple[int | None, ...]) -> Tensor:
    """A finite float64 copy of ``value`` whose shape is one of ``shapes`` (None stands for any length)."""
    # The dtype is given at once: a list of Python floats would otherwise pass through float32.
    tensor = torch.as_tensor(value, dtype=torch.float64).detach().clone()
    if not any(_fits(tuple(tensor.shape), shape) for shape in shapes):
        wanted = " or ".join(str(shape).replace("None", "*") for shape in shapes)
        raise ValueError(f"Expected {name} of shape {wanted}; got {tuple(tensor.shape)}.")
    if tensor.numel() == 0:
        raise ValueError(f"Expected {name} to hold at least one number; got shape {tuple(tensor.shape)}.")
    if not torch.isfinite(tensor).all():
        raise ValueError(f"Expected {name} to be finite; got {_first(tensor, ~torch.isfinite(tensor))}.")
    return tensor


def positive(name: str, value: Tensor | Sequence[object] | float, *shapes: tuple[int | None, ...]) -> Tensor:
    """As :func:`array`, and every entry above zero."""
    tensor = array(name, value, *shapes)
    if (tensor <= 0).any():
        raise ValueError(f"Expected {name} to be positive; got {_first(tensor, tensor <= 0)}.")
    return tensor


def integer(name: str, value: int, *, minimum: int = 1) -> int:
    """An integer of at least ``minimum``."""
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise ValueError(f"Expected {name} to be an integer of at least {minimum}; got {value!r}.")
    return value


def cholesky(name: str, matrix: Tensor) -> Tensor:
    """Lower Cholesky factors of symmetric positive definite matrices ``(..., D, D)``."""
    asymmetry = (matrix - matrix.mT).abs().amax((-2, -1))
    if (asymmetry > 1e-8 * matrix.abs().amax((-2, -1))).any():
        raise ValueError(f"Expected {name} to be symmetric; got entries that differ by {asymmetry.max().item():.3g}.")
    factor, info = torch.linalg.cholesky_ex(matrix)
    if (info != 0).any():
        lowest = torch.linalg.eigvalsh(matrix).min().item()
        raise ValueError(f"Expected {name} to be positive definite; got smallest eigenvalue {lowest:.3g}.")
    return factor


def _fits(shape: tuple[int, ...], pattern: tuple[int | None, ...]) -> bool:
    return len(shape) == len(pattern) and all(p is None or p == s for s, p in zip(shape, pattern, strict=True))


def _first(tensor: Tensor, mask: Tensor) -> float:
    return tensor[mask].flatten()[0].item()
