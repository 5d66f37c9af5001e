r"""Sums of a pair potential over all pairs of particles, the common work of every particle energy.

.. math:: V(x) = \sum_{i<j} v(|x_i - x_j|^2), \qquad
          -\nabla_i V = \sum_{j \ne i} f(|x_i - x_j|^2)\, (x_i - x_j), \qquad f(s) = -2\, v'(s)

Potentials are functions of the *squared* distance, so that those in even powers never take a root. Pairs are
enumerated by cyclic shifts: particle :math:`i` meets :math:`i + k \bmod n` for :math:`k = 1, \dots, \lfloor (n-1)/2
\rfloor`, and for even :math:`n` the first half of the particles meets the other half. With coordinates stored as
``(d, n, batch)`` a shift is a view: nothing is gathered, each pair is visited once, and the innermost axis is long.
Blocks of shifts and of the batch are chosen so that intermediate results stay in cache, which is where the time goes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = ["PairPotential", "pair_energy", "pair_energy_and_force"]

CPU_BLOCK = 1 << 17
"""Pairs times batch per block on a CPU: the fastest of six sizes on a core with 1 MB of second-level cache."""
DEVICE_BLOCK = 1 << 25
"""The same on an accelerator, where only memory limits it."""
CPU_BATCH = 1024


class PairPotential(ABC):
    """A potential between two particles as a function of their squared distance ``s``."""

    @abstractmethod
    def energy(self, square: Tensor) -> Tensor:
        """``v(s)``, the shape of ``s``, differentiable."""

    @abstractmethod
    def energy_and_force(self, square: Tensor) -> tuple[Tensor, Tensor]:
        """``v(s)`` and ``f(s) = -2 v'(s)``, both in the shape of ``s``; the argument may be overwritten."""


def pair_energy(x: Tensor, potential: PairPotential, *, n: int, box: float | None = None) -> Tensor:
    """Sum over all pairs, ``(..., n * d) -> (...)``, differentiable any number of times.

    Arguments:
        x: Positions, particle after particle.
        potential: Energy of a pair.
        n: Number of particles.
        box: Side of a cubic periodic box, in which the nearest image of a pair counts; None for open space.
    """
    parts = [_energy(points, potential, box) for points in _batches(x, n)]
    return torch.cat(parts).reshape(x.shape[:-1])


def pair_energy_and_force(
    x: Tensor, potential: PairPotential, *, n: int, box: float | None = None
) -> tuple[Tensor, Tensor]:
    """Sum over all pairs ``(...)`` and minus its gradient ``(..., n * d)``, both without a graph."""
    with torch.no_grad():
        parts = [_energy_and_force(points, potential, box) for points in _batches(x, n)]
        energy = torch.cat([part[0] for part in parts]).reshape(x.shape[:-1])
        force = torch.cat([part[1].permute(2, 1, 0).flatten(1) for part in parts])
        return energy, force.reshape(x.shape)


def _batches(x: Tensor, n: int) -> Iterator[Tensor]:
    """Blocks of the batch as contiguous ``(d, n, batch)``; at least one, possibly empty."""
    flat = x.reshape(-1, n, x.shape[-1] // n)
    size = CPU_BATCH if x.device.type == "cpu" else max(len(flat), 1)
    for part in flat.split(size):
        yield part.permute(2, 1, 0).contiguous()


def _shifts(points: Tensor) -> Iterator[tuple[Tensor, list[int]]]:
    """Differences ``x_i - x_{i+k}`` of shape ``(d, shifts, m, batch)`` with their shifts ``k``; ``m`` is n or n/2."""
    d, n, batch = points.shape
    partners = torch.cat([points, points[:, : n // 2]], 1)
    # Windows of length n over the extended list: window k holds the partners at shift k.
    windows = partners.unfold(1, n, 1).permute(0, 1, 3, 2)
    block = CPU_BLOCK if points.device.type == "cpu" else DEVICE_BLOCK
    rows = max(1, block // max(n * batch, 1))
    last = (n - 1) // 2
    for first in range(1, last + 1, rows):
        stop = min(first + rows, last + 1)
        yield points.unsqueeze(1) - windows[:, first:stop], list(range(first, stop))
    if n % 2 == 0:
        half = n // 2
        yield (points[:, :half] - points[:, half:]).unsqueeze(1), [half]


def _energy(points: Tensor, potential: PairPotential, box: float | None) -> Tensor:
    total = points.new_zeros(points.shape[-1])
    for delta, _ in _shifts(points):
        if box is not None:
            delta = delta - box * torch.round(delta / box)
        total = total + potential.energy(delta.square().sum(0)).sum((0, 1))
    return total


def _energy_and_force(points: Tensor, potential: PairPotential, box: float | None) -> tuple[Tensor, Tensor]:
    total, force = points.new_zeros(points.shape[-1]), torch.zeros_like(points)
    n = points.shape[1]
    for delta, shifts in _shifts(points):
        if box is not None:
            delta = delta.sub_(box * torch.round(delta / box))
        square = delta[0] * delta[0]
        for component in delta[1:]:
            square.addcmul_(component, component)
        energy, strength = potential.energy_and_force(square)
        total += energy.sum((0, 1))
        delta *= strength
        m = delta.shape[2]
        force[:, :m] += delta.sum(1)
        for row, shift in enumerate(shifts):
            head = min(m, n - shift)
            force[:, shift : shift + head] -= delta[:, row, :head]
            if head < m:
                force[:, : m - head] -= delta[:, row, head:]
    return total, force
