r"""Distances between configurations of like particles, whatever their frame and labels.

For mean-free configurations :math:`x, y` of shape ``(n, d)``, a fixed permutation :math:`P` of the particles and the
best orthogonal matrix,

.. math:: \min_{R \in O(d)} |x - P y R|^2 = |x|^2 + |y|^2 - 2 \left\| x^T P y \right\|_*

with the nuclear norm (sum of singular values) of a ``(d, d)`` matrix (Kabsch). What is left is the search over
permutations: by enumeration for a handful of particles, by alternation beyond.
"""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from typing import final

import numpy
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

__all__ = ["Alignment", "AlternatingAlignment", "ExactAlignment"]

ENUMERABLE = 7
BLOCK = 1 << 21
"""Numbers per intermediate array."""


class Alignment(ABC):
    """Squared distances between configurations of ``n`` like particles in ``d`` dimensions, up to frame and labels."""

    def __init__(self, *, n: int, d: int) -> None:
        if n < 2 or d < 1:
            raise ValueError(f"Expected at least 2 particles in at least 1 dimension; got n={n} and d={d}.")
        self.n = n
        self.d = d

    def squared_distances(self, x: Tensor, y: Tensor) -> Tensor:
        """All pairs, ``(N, n * d)`` and ``(M, n * d)`` to ``(N, M)``, float64 and at least zero."""
        length = self.n * self.d
        for name, value in (("x", x), ("y", y)):
            if value.ndim != 2 or value.shape[-1] != length:
                raise ValueError(f"Expected {name} of shape (N, {length}); got {tuple(value.shape)}.")
        a, b = self._centred(x), self._centred(y)
        square = a.square().sum((1, 2)).unsqueeze(-1) + b.square().sum((1, 2))
        return (square - 2.0 * self._overlap(a, b)).clamp_min(0.0)

    @abstractmethod
    def _overlap(self, x: Tensor, y: Tensor) -> Tensor:
        """Largest inner product found of each ``x (N, n, d)`` and each moved ``y (M, n, d)``, shape ``(N, M)``."""

    def _centred(self, x: Tensor) -> Tensor:
        points = x.detach().double().reshape(-1, self.n, self.d)
        return points - points.mean(1, keepdim=True)


@final
class ExactAlignment(Alignment):
    """The best motion and permutation, by enumeration of all permutations with the best rotation for each.

    Cost: ``n!`` small matrices per pair of configurations; 2,000 against 2,000 sets of four particles in the plane take
    three seconds. At most seven particles.
    """

    def __init__(self, *, n: int, d: int) -> None:
        super().__init__(n=n, d=d)
        if n > ENUMERABLE:
            raise ValueError(f"Expected at most {ENUMERABLE} particles for enumeration; got {n}.")

    def _overlap(self, x: Tensor, y: Tensor) -> Tensor:
        rows = max(1, BLOCK // (self.d**2 * max(len(y), 1)))
        orders = [list(order) for order in itertools.permutations(range(self.n))]
        return torch.cat([self._best(part, y, orders) for part in x.split(rows)])

    def _best(self, x: Tensor, y: Tensor, orders: list[list[int]]) -> Tensor:
        best = x.new_full((len(x), len(y)), -math.inf)
        for order in orders:
            # (d, d, N, M): the pairs stay on the long axes.
            cross = torch.einsum("nia,mib->abnm", x, y[:, order])
            best = torch.maximum(best, _nuclear_norm(cross))
        return best


@final
class AlternatingAlignment(Alignment):
    r"""A good motion and permutation, by alternating the best permutation for a motion and the best motion for it.

    Starting from the given frame, each round solves an assignment (Hungarian algorithm) and then a Kabsch problem; the
    overlap never decreases. The result is an *upper bound* of the true distance. One round from the given frame is the
    approximation behind the published figures; further starts from random frames tighten it. It is not free of the
    frame: two sets of 2,000 exact samples of 13 Lennard-Jones particles are 1.57 apart in random frames, and 1.45 if
    both are cut from one published file, whose chains kept the frame that they started in.

    Cost: one assignment per pair of configurations, start and round: 10 microseconds for 13 particles and 100 for 55,
    so 2,000 against 2,000 configurations take one minute and seven.

    Reference: Klein, Krämer and Noé, "Equivariant flow matching" (2023, https://arxiv.org/abs/2306.15030).

    Arguments:
        n: Number of particles.
        d: Dimensions.
        rounds: Rounds per start.
        starts: Frames to start from: the given one and random ones.
        seed: Seed of the random frames, the same for all pairs.
    """

    def __init__(self, *, n: int, d: int, rounds: int = 1, starts: int = 1, seed: int = 0) -> None:
        super().__init__(n=n, d=d)
        if rounds < 1 or starts < 1:
            raise ValueError(f"Expected at least one round and one start; got {rounds} and {starts}.")
        self.rounds = rounds
        self.starts = starts
        self.seed = seed

    def _overlap(self, x: Tensor, y: Tensor) -> Tensor:
        rows = max(1, BLOCK // (self.n**2 * max(len(y), 1)))
        return torch.cat([self._pairs(part, y) for part in x.split(rows)])

    def _pairs(self, x: Tensor, y: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        best = x.new_full((len(x), len(y)), -math.inf)
        for start in range(self.starts):
            frame, triangle = torch.linalg.qr(torch.randn(self.d, self.d, generator=generator, dtype=torch.float64))
            # Without the signs every frame would have the same handedness.
            frame = frame * triangle.diagonal().sign()
            turned = y @ frame.to(y) if start else y
            moved = turned.expand(len(x), *y.shape)
            for step in range(self.rounds):
                order = _assign(torch.einsum("kia,kmja->kmij", x, moved))
                ordered = torch.gather(moved, 2, order.unsqueeze(-1).expand_as(moved))
                cross = torch.einsum("kia,kmib->kmab", x, ordered)
                if step + 1 == self.rounds:
                    best = torch.maximum(best, _nuclear_norm(cross.permute(2, 3, 0, 1)))
                else:
                    left, _, right = torch.linalg.svd(cross)
                    moved = ordered @ (left @ right).mT
        return best


def _assign(overlap: Tensor) -> Tensor:
    """Best partner of each row, ``(..., n, n) -> (..., n)``."""
    matrices = overlap.flatten(0, -3).cpu().numpy()
    orders = numpy.empty(matrices.shape[:2], dtype=numpy.int64)
    for k, matrix in enumerate(matrices):
        orders[k] = linear_sum_assignment(matrix, maximize=True)[1]
    return torch.from_numpy(orders).to(overlap.device).reshape(overlap.shape[:-1])


def _nuclear_norm(matrices: Tensor) -> Tensor:
    """Sum of the singular values, ``(d, d, ...) -> (...)``."""
    if matrices.shape[0] == 1:
        return matrices[0, 0].abs()
    if matrices.shape[0] == 2:
        (a, b), (c, d) = matrices[0], matrices[1]
        # The two complex parts of a plane map: whichever of rotation and reflection fits better.
        return torch.maximum(torch.hypot(a + d, b - c), torch.hypot(a - d, b + c))
    return torch.linalg.svdvals(matrices.movedim((0, 1), (-2, -1))).sum(-1)
