r"""Control networks.

:class:`FourierMLP` maps (time, point) to vectors: random Fourier features of time, and optionally of the point, feed a
small residual-free MLP whose last layer starts at zero. :class:`Control` adds a gated, clipped feature, usually the
target's score:

.. math:: u(t, x) = \mathrm{NN}(t, x) + g(t)\, c \tanh(h / c)

Initialization draws from an explicit generator; the global random state is neither read nor moved.

References:
    Path Integral Sampler (Zhang, Chen, 2022), https://arxiv.org/abs/2111.15141 (network and score gate)
    Fourier Features Let Networks Learn High Frequency Functions (Tancik et al., 2020), https://arxiv.org/abs/2006.10739
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import final

import torch
from torch import Tensor, nn
from torch.nn import functional

from diffsampler.space import EuclideanTorus, Space, Torus

__all__ = ["Control", "ControlModule", "CoordinateSeries", "FourierMLP", "Gate", "clip", "linear"]


def clip(x: Tensor, bound: float) -> Tensor:
    """Smooth elementwise clip to ``(-bound, bound)``, the identity near zero."""
    return bound * torch.tanh(x / bound)


def linear(n_in: int, n_out: int, *, generator: torch.Generator, zero: bool = False) -> nn.Linear:
    """A linear layer in float32, initialized from ``generator`` (or at zero)."""
    layer = nn.utils.skip_init(nn.Linear, n_in, n_out)
    bound = 0.0 if zero else 1.0 / math.sqrt(n_in)
    for parameter in (layer.weight, layer.bias):
        nn.init.uniform_(parameter, -bound, bound, generator=generator)
    return layer


@final
class FourierMLP(nn.Module):
    """An MLP on points with Fourier features of time.

    Arguments:
        dim_in: Length of the input vectors.
        dim_out: Length of the output vectors.
        generator: Source of the initial parameters.
        width: Width of the hidden layers.
        depth: Number of hidden layers after the input layer.
        frequencies: Number of time frequencies, between 0.1 and 100 radians.
        point_features: Number of random Fourier features of the point (0: none); they let a small net resolve
            many modes.
        feature_scale: Standard deviation of the frequencies of those features per unit of the input.
    """

    omega: Tensor
    wave: Tensor

    def __init__(
        self,
        dim_in: int,
        dim_out: int,
        *,
        generator: torch.Generator,
        width: int = 64,
        depth: int = 2,
        frequencies: int = 64,
        point_features: int = 0,
        feature_scale: float = 1.5,
    ) -> None:
        super().__init__()
        self.register_buffer("omega", torch.linspace(0.1, 100.0, frequencies))
        self.phase = nn.Parameter(torch.randn(frequencies, generator=generator))
        wave = feature_scale * math.sqrt(2.0 / dim_in) * torch.randn(dim_in, point_features, generator=generator)
        self.register_buffer("wave", wave)
        self.time_in = linear(2 * frequencies, width, generator=generator)
        self.time_out = linear(width, width, generator=generator)
        self.point_in = linear(dim_in + 2 * point_features, width, generator=generator)
        self.hidden = nn.ModuleList(linear(width, width, generator=generator) for _ in range(depth))
        self.head = linear(width, dim_out, generator=generator, zero=True)

    def embed(self, t: Tensor) -> Tensor:
        """Embedding of times ``t (...)``, shape ``(..., width)``."""
        angle = t.unsqueeze(-1) * self.omega + self.phase
        return self.time_out(functional.silu(self.time_in(torch.cat([angle.sin(), angle.cos()], -1))))

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        """Evaluate at times ``t (...)`` and points ``x (..., D)``; ``t`` may have axes of length one."""
        return self.at(self.embed(t), x)

    def at(self, time: Tensor, x: Tensor) -> Tensor:
        """Evaluate at embedded times ``(..., width)``."""
        if self.wave.shape[1]:
            turn = x @ self.wave
            x = torch.cat([x, turn.sin(), turn.cos()], -1)
        h = functional.silu(self.point_in(x) + time)
        for layer in self.hidden:
            h = functional.silu(layer(h))
        return self.head(h)


@final
class CoordinateSeries(nn.Module):
    r"""A Fourier series in every coordinate, its coefficients functions of time, at first zero.

    .. math:: f_{pi}(t, x) = \sum_{m=1}^M a_{pim}(t) \sin(m \omega x_i) + b_{pim}(t) \cos(m \omega x_i)

    A small network of all coordinates at once learns many separate wells slowly; their sum it need not learn at all.

    Arguments:
        space: Where the points live; its vectors need coordinates of their own.
        generator: Source of the initial parameters.
        width: Length of the embedding of time.
        parts: Number of series ``P`` per coordinate.
        harmonics: Number of harmonics ``M``; the longest wave is eight units, on circles one turn.
    """

    omega: Tensor

    def __init__(self, space: Space, *, generator: torch.Generator, width: int, parts: int, harmonics: int) -> None:
        super().__init__()
        if harmonics < 1:
            raise ValueError(f"Expected harmonics >= 0; got {harmonics}.")
        if space.dof != space.dim:
            raise ValueError(f"Expected harmonics=0: {space} has no coordinates of its own; got {harmonics}.")
        unit = torch.full((space.dim, 1), 0.25 * math.pi)
        if isinstance(space, Torus | EuclideanTorus):
            unit[space.n if isinstance(space, EuclideanTorus) else 0 :] = 1.0
        self.register_buffer("omega", unit * torch.arange(1, harmonics + 1))
        self.shape = (parts, space.dim, 2 * harmonics)
        self.out = linear(width, math.prod(self.shape), generator=generator, zero=True)

    def forward(self, time: Tensor, x: Tensor) -> Tensor:
        """Values ``(..., P, D)`` at embedded times ``(..., width)``, which may have axes of length one."""
        coefficient = self.out(functional.silu(time)).unflatten(-1, self.shape)
        turn = x.unsqueeze(-1) * self.omega
        return torch.einsum("...pdm,...dm->...pd", coefficient, torch.cat([turn.sin(), turn.cos()], -1))


class ControlModule(nn.Module, ABC):
    """What steers a chain.

    Arguments:
        space: Where the points live.
        bound: The clip of the feature, per coordinate; a training aid that never touches the target.
        extra_inputs: Inputs beside the point and the feature (a velocity, a context).
        extra_outputs: Outputs beyond the control itself (for learned variances).
    """

    def __init__(self, space: Space, *, bound: float, extra_inputs: int = 0, extra_outputs: int = 0) -> None:
        super().__init__()
        self.space = space
        self.bound = bound
        self.extra_inputs = extra_inputs
        self.extra_outputs = extra_outputs

    @abstractmethod
    def forward(
        self,
        t: Tensor,
        x: Tensor,
        feature: Tensor,
        weight: Tensor | float = 1.0,
        *,
        beside: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Control ``(..., D)`` and the extra outputs ``(..., extra)`` at times ``t (...)`` and points ``x (..., D)``.

        Arguments:
            t: Times in [0, 1]; axes of length one stand for a whole batch and are embedded once.
            x: Points in units of the prior, shape ``(..., D)``.
            feature: The feature ``h``, shape ``(..., D)``.
            weight: The factor ``w``, broadcastable to ``(..., D)``.
            beside: The extra inputs, shape ``(..., extra_inputs)``.
        """


@final
class Gate(nn.Module):
    r"""A learned factor :math:`g(t)`, one for all coordinates or one for each.

    Arguments:
        space: Where the points live; spaces whose vectors have no coordinates of their own take a scalar gate.
        generator: Source of the initial parameters; they are zero.
        init: Its value before training.
        scalar: Whether all coordinates share it.
    """

    omega: Tensor

    def __init__(self, space: Space, *, generator: torch.Generator, init: float = 1.0, scalar: bool = False) -> None:
        super().__init__()
        self.init = init
        self.register_buffer("omega", torch.arange(1, 9) * (0.5 * math.pi))
        gates = space.dim if space.dof == space.dim and not scalar else 1
        self.out = linear(16, gates, generator=generator, zero=True)

    def forward(self, t: Tensor) -> Tensor:
        """Values ``(..., 1)`` or ``(..., D)`` at times ``t (...)``."""
        angle = t.unsqueeze(-1) * self.omega
        return self.init + self.out(torch.cat([angle.sin(), angle.cos()], -1))


@final
class Control(ControlModule):
    r"""A network plus a gated feature, :math:`u = \mathrm{NN}(t, x) + w\, g(t)\, c \tanh(h / c)`.

    Arguments:
        space: Where the points live; the network sees ``space.features(x)`` and returns tangent vectors.
        generator: Source of the initial parameters.
        gate_init: Value of every gate ``g`` before training.
        scalar_gate: Whether all coordinates share one gate.
        bound: The clip ``c`` of the feature, per coordinate; a training aid that never touches the target.
        feature_input: Whether the network also sees the clipped feature.
        extra_inputs: Inputs of the network beside the point and the feature (a velocity).
        extra_outputs: Outputs beyond the control itself (for learned variances).
        width: Width of the hidden layers.
        depth: Number of hidden layers after the input layer.
        point_features: Number of random Fourier features of the point.
        harmonics: Number of harmonics of a Fourier series in every coordinate, added to the network's outputs that
            belong to coordinates; 0 for none.
    """

    def __init__(
        self,
        space: Space,
        *,
        generator: torch.Generator,
        gate_init: float = 1.0,
        scalar_gate: bool = False,
        bound: float = 10.0,
        feature_input: bool = False,
        extra_inputs: int = 0,
        extra_outputs: int = 0,
        width: int = 64,
        depth: int = 2,
        point_features: int = 0,
        harmonics: int = 0,
    ) -> None:
        super().__init__(space, bound=bound, extra_inputs=extra_inputs, extra_outputs=extra_outputs)
        self.feature_input = feature_input
        self.net = FourierMLP(
            space.num_features + (space.dim if feature_input else 0) + extra_inputs,
            space.dim + extra_outputs,
            generator=generator,
            width=width,
            depth=depth,
            point_features=point_features,
        )
        self.gate = Gate(space, generator=generator, init=gate_init, scalar=scalar_gate)
        self.series: CoordinateSeries | None = None
        if harmonics:
            parts = 1 + extra_outputs // space.dim
            self.series = CoordinateSeries(space, generator=generator, width=width, parts=parts, harmonics=harmonics)
        self._table: tuple[Tensor, Tensor] | None = None

    @contextmanager
    def tabulated(self, num_steps: int) -> Iterator[None]:
        """Inside, times are looked up in the grid ``k / num_steps``, embedded once and without a graph."""
        # Divided before the cast, as the grids of the processes are: both round alike.
        t = (torch.arange(num_steps + 1) / num_steps).to(self.gate.omega)
        with torch.no_grad():
            self._table = self.net.embed(t), self.gate(t)
        try:
            yield
        finally:
            self._table = None

    def _embed(self, t: Tensor) -> tuple[Tensor, Tensor]:
        if self._table is None:
            return self.net.embed(t), self.gate(t)
        time, gate = self._table
        k = (t * (len(time) - 1)).round().long()
        return time[k], gate[k]

    def forward(
        self,
        t: Tensor,
        x: Tensor,
        feature: Tensor,
        weight: Tensor | float = 1.0,
        *,
        beside: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        feature = clip(feature, self.bound)
        inputs = [self.space.features(x)]
        if self.feature_input:
            inputs.append(feature)
        if beside is not None:
            inputs.append(beside)
        time, gate = self._embed(t)
        out = self.net.at(time, torch.cat(inputs, -1) if len(inputs) > 1 else inputs[0])
        if self.series is not None:
            series = self.series(time, x).flatten(-2)
            out = out + functional.pad(series, (0, out.shape[-1] - series.shape[-1]))
        control = out[..., : self.space.dim] + (weight * gate) * feature
        return self.space.project_vector(control), out[..., self.space.dim :]
