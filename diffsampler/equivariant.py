r"""Networks on points that respect their symmetries.

:class:`EquivariantGraphNetwork` maps times and ``n`` points in ``d`` dimensions to one vector per point, for all pairs
at once and whole batches. Rotating, reflecting or permuting the points does the same to the vectors; translating them
changes nothing; the vectors sum to zero to rounding, so that the centre of mass stays where it is. With hidden features
:math:`h_i`, time :math:`\tau` and squared distances :math:`d_{ij}^2 = |x_i - x_j|^2`, each layer does

.. math::
   e_{ij} &= a_{ij}\, \mathrm{silu}(A h_i + B h_j + C \rho(d^0_{ij}) + c \log(1 + d_{ij}^2)), \\
   x_i &\leftarrow x_i + \tfrac{1}{n-1} \textstyle\sum_j (w \cdot e_{ij})\,(x_i - x_j) / (1 + d_{ij}), \\
   h_i &\leftarrow h_i + W_2\, \mathrm{silu}(W_1 [h_i, \textstyle\sum_j e_{ij}] + T \tau),

where :math:`\rho` are radial functions of the first distances :math:`d^0` and :math:`a_{ij} = 1`, or a gate between 0
and 1 ("attention"). The answer is how far the points have moved. Nothing but additions and one activation is as large
as ``(B, n, n, width)``: weights of pairs are split over their ends, and the second matrix of a message is applied after
the sum. ``w`` starts at zero, and with it the answer.

Points all in one place give zero vectors: the symmetry must be broken by noise. Atoms that are not interchangeable get
``types``, pairs that are bonded get ``bonds``; then only permutations that keep both are symmetries. Reflections always
are, so mirror images of a molecule cannot be told apart.

:class:`PeriodicMLP` is a network on angles.

References:
    E(n) equivariant graph neural networks (Satorras, Hoogeboom, Welling, 2021), https://arxiv.org/abs/2102.09844
    SchNet (Schuett et al., 2017), https://arxiv.org/abs/1706.08566 (radial functions)
"""

from __future__ import annotations

import math
from typing import final

import torch
from torch import Tensor, nn
from torch.nn import functional

from diffsampler.networks import FourierMLP, linear

__all__ = ["EquivariantGraphNetwork", "PeriodicMLP"]

TINY = 1e-12
"""Added to squared distances: their roots have slopes at zero, where all points of a point mass are."""


@final
class _Layer(nn.Module):
    """One round of messages."""

    def __init__(self, width: int, radial: int, *, attention: bool, generator: torch.Generator) -> None:
        super().__init__()
        self.ends = linear(width, 2 * width, generator=generator)
        self.pair = linear(radial + 1, width, generator=generator)
        self.gate = linear(width, 1, generator=generator) if attention else None
        self.move = linear(width, 1, generator=generator, zero=True)
        self.mix = linear(2 * width, width, generator=generator)
        self.time = linear(width, width, generator=generator)
        self.out = linear(width, width, generator=generator)

    def forward(
        self, x: Tensor, h: Tensor, pairs: Tensor, bonded: Tensor | None, time: Tensor
    ) -> tuple[Tensor, Tensor]:
        """``x (B, n, d)``, ``h (B, n, width)``, radial functions ``(B, n, n, R)``, times ``(B, 1, width)``."""
        n = x.shape[-2]
        square = _square_distances(x)
        first, second = self.ends(h).chunk(2, -1)
        # One matrix product for all that is known of a pair; its ends are added by broadcasting.
        edge = self.pair(torch.cat([pairs, torch.log1p(square).unsqueeze(-1)], -1))
        edge = edge + first.unsqueeze(-2) + second.unsqueeze(-3)
        if bonded is not None:
            edge = edge + bonded
        edge = functional.silu(edge)
        if self.gate is not None:
            edge = edge * torch.sigmoid(self.gate(edge))
        weight = self.move(edge).squeeze(-1) / (1.0 + (square + TINY).sqrt())
        # sum_j w_ij (x_i - x_j) without the tensor of weighted differences.
        x = x + (weight.sum(-1, keepdim=True) * x - weight @ x) / (n - 1)
        message = edge.sum(-2) / math.sqrt(n)
        h = h + self.out(functional.silu(self.mix(torch.cat([h, message], -1)) + self.time(time)))
        return x, h


def _square_distances(x: Tensor) -> Tensor:
    """Squared distances ``(B, n, n)`` of points ``(B, n, d)``, by differences: no digits are lost."""
    return (x.unsqueeze(-2) - x.unsqueeze(-3)).square().sum(-1)


@final
class EquivariantGraphNetwork(nn.Module):
    """Vectors on particles that rotate, reflect and permute with them.

    Arguments:
        n: Number of points.
        d: Dimension of their space.
        generator: Source of the initial parameters.
        width: Width of all hidden features.
        depth: Number of layers.
        radial: Number of radial functions.
        reach: Largest distance that they resolve, in units of ``scale``.
        scale: Unit of length of the points; vectors come out without units.
        attention: Whether messages are gated.
        types: Kind of every point, integers ``(n,)``; by default all are alike.
        bonds: Kind of every pair, symmetric integers ``(n, n)``, 0 for no bond; by default none is special.
        frequencies: Number of time frequencies.

    Raises:
        ValueError: If a size is out of range, or types or bonds do not fit the points.
    """

    omega: Tensor
    centre: Tensor
    types: Tensor
    bonds: Tensor

    def __init__(
        self,
        n: int,
        d: int,
        *,
        generator: torch.Generator,
        width: int = 64,
        depth: int = 4,
        radial: int = 16,
        reach: float = 6.0,
        scale: float = 1.0,
        attention: bool = False,
        types: Tensor | None = None,
        bonds: Tensor | None = None,
        frequencies: int = 32,
    ) -> None:
        super().__init__()
        if n < 2 or d < 1:
            raise ValueError(f"Expected at least two points in at least one dimension; got n={n} and d={d}.")
        if depth < 1 or radial < 2 or not reach > 0.0 or not scale > 0.0:
            raise ValueError("Expected depth >= 1, radial >= 2, reach > 0 and scale > 0.")
        self.n, self.d, self.scale = n, d, scale
        self.register_buffer("omega", torch.logspace(0.0, 2.0, frequencies))
        self.register_buffer("centre", torch.linspace(0.0, reach, radial))
        self.register_buffer("types", _whole("types", types, (n,)))
        self.register_buffer("bonds", _whole("bonds", bonds, (n, n)))
        self.time_in = linear(2 * frequencies + 1, width, generator=generator)
        self.time_out = linear(width, width, generator=generator)
        self.kind = None if types is None else _table(int(self.types.max()) + 1, width, generator)
        self.bond = None if bonds is None else _table(int(self.bonds.max()) + 1, width, generator)
        self.layers = nn.ModuleList(
            _Layer(width, radial, attention=attention, generator=generator) for _ in range(depth)
        )

    def embed(self, t: Tensor) -> Tensor:
        """Embedding of times ``t (...)``, shape ``(..., width)``."""
        angle = t.unsqueeze(-1) * self.omega
        return self.time_out(functional.silu(self.time_in(torch.cat([t.unsqueeze(-1), angle.sin(), angle.cos()], -1))))

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        """Evaluate at times ``t (...)`` and points ``x (..., n d)``; axes of ``t`` of length one are embedded once."""
        return self.at(self.embed(t), x)

    def at(self, time: Tensor, x: Tensor) -> Tensor:
        """Evaluate at embedded times ``(..., width)``."""
        if x.shape[-1] != self.n * self.d:
            raise ValueError(
                f"Expected {self.n} points in {self.d} dimensions, (..., {self.n * self.d}); got {x.shape}."
            )
        batch = x.shape[:-1]
        time = time.expand(*batch, time.shape[-1]).reshape(-1, 1, time.shape[-1])
        start = x.reshape(-1, self.n, self.d) / self.scale
        start = start - start.mean(-2, keepdim=True)
        distance = (_square_distances(start) + TINY).sqrt().unsqueeze(-1)
        spacing = self.centre[1] - self.centre[0]
        pairs = torch.exp(-0.5 * ((distance - self.centre) / spacing).square())
        h = time.expand(-1, self.n, -1)
        if self.kind is not None:
            h = h + self.kind[self.types]
        bonded = None if self.bond is None else self.bond[self.bonds]
        y = start
        for layer in self.layers:
            y, h = layer(y, h, pairs, bonded, time)
        moved = y - start
        return (moved - moved.mean(-2, keepdim=True)).reshape(x.shape)


def _table(rows: int, width: int, generator: torch.Generator) -> nn.Parameter:
    return nn.Parameter(0.5 * torch.randn(rows, width, generator=generator))


def _whole(name: str, value: Tensor | None, shape: tuple[int, ...]) -> Tensor:
    if value is None:
        return torch.zeros(shape, dtype=torch.long)
    if value.shape != shape or value.is_floating_point() or value.is_complex() or bool((value < 0).any()):
        raise ValueError(f"Expected {name} of shape {shape}, integers from 0; got {tuple(value.shape)}, {value.dtype}.")
    if value.ndim == 2 and not torch.equal(value, value.T):
        raise ValueError(f"Expected symmetric {name}: a bond has no direction.")
    return value.long().clone()


@final
class PeriodicMLP(nn.Module):
    r"""An MLP on angles: it sees :math:`\sin m\theta, \cos m\theta` for :math:`m = 1 \dots M`, so its period is exact.

    Real coordinates may come before the angles and are seen as they are.

    Arguments:
        angles: Number of angles.
        line: Number of real coordinates.
        generator: Source of the initial parameters.
        harmonics: Number of harmonics ``M``; torsion potentials have up to six.
        width: Width of the hidden layers.
        depth: Number of hidden layers.
    """

    order: Tensor

    def __init__(
        self,
        angles: int,
        *,
        generator: torch.Generator,
        line: int = 0,
        harmonics: int = 3,
        width: int = 64,
        depth: int = 2,
    ) -> None:
        super().__init__()
        if angles < 1 or harmonics < 1 or line < 0:
            raise ValueError(
                f"Expected angles >= 1, harmonics >= 1 and line >= 0; got {angles}, {harmonics} and {line}."
            )
        self.register_buffer("order", torch.arange(1, harmonics + 1))
        self.line = line
        self.net = FourierMLP(
            line + 2 * harmonics * angles, line + angles, generator=generator, width=width, depth=depth
        )

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        """Evaluate at times ``t (...)`` and points ``x (..., line + m)``, angles wrapped or not."""
        turn = (x[..., self.line :].unsqueeze(-1) * self.order).flatten(-2)
        return self.net(t, torch.cat([x[..., : self.line], turn.sin(), turn.cos()], -1))
