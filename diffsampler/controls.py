r"""Parametrisations of a control beyond a plain network: gradients of potentials, and scores to gate.

A learned chain steers by :math:`u = \mathrm{NN}(t, x) + w\, g(t)\, c \tanh(h / c)`. Two parts can be exchanged, as
objects handed to a process:

* the network (``control=``): :class:`PotentialControl` puts :math:`\nabla_x \phi_\theta(t, x)` in its place. The
  optimal control of a chain with fixed backward kernels is such a gradient; a network without that form must learn it.
  It costs two passes instead of one, and has no curl to waste capacity on.
* the feature ``h`` (``feature=``): a :class:`ScoreFeature` mixes the target's and the prior's score over time. What a
  process does without one is to gate their difference (:class:`ResidualScore`) with a weight of its own.

References:
    Path Integral Sampler (Zhang, Chen, 2022), https://arxiv.org/abs/2111.15141 (the target's score)
    An optimal control perspective on diffusion-based generative modeling (Berner, Richter, Ullrich, 2024),
    https://arxiv.org/abs/2211.01364 (interpolated scores)
    Improved sampling via learned diffusions (Richter, Berner, 2024), https://arxiv.org/abs/2307.01198 (potentials)
    Controlled Monte Carlo diffusions (Vargas et al., 2024), https://arxiv.org/abs/2307.01050 (annealed scores)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn import functional

from diffsampler.networks import Control, ControlModule, FourierMLP, Gate, clip
from diffsampler.space import Space

__all__ = [
    "AnnealedScore",
    "LerpedScore",
    "NoScore",
    "PotentialControl",
    "ResidualScore",
    "ScoreFeature",
    "TargetScore",
    "chosen_control",
    "gated",
]


@final
class PotentialControl(ControlModule):
    r"""The gradient of a scalar network plus a gated feature, :math:`\nabla_x \phi(t, x) + w\, g(t)\, c \tanh(h / c)`.

    Arguments:
        space: Where the points live; the network sees ``space.features(x)``.
        generator: Source of the initial parameters.
        gate_init: Value of every gate before training.
        scalar_gate: Whether all coordinates share one gate.
        bound: The clip ``c`` of the feature, per coordinate.
        extra_inputs: Inputs of the network beside the point (a context); the feature is none.
        extra_outputs: Outputs beyond the control itself (for learned variances), of the same network.
        width: Width of the hidden layers.
        depth: Number of hidden layers after the input layer.
        point_features: Number of random Fourier features of the point.
    """

    def __init__(
        self,
        space: Space,
        *,
        generator: torch.Generator,
        gate_init: float = 1.0,
        scalar_gate: bool = False,
        bound: float = 10.0,
        extra_inputs: int = 0,
        extra_outputs: int = 0,
        width: int = 64,
        depth: int = 2,
        point_features: int = 0,
    ) -> None:
        super().__init__(space, bound=bound, extra_inputs=extra_inputs, extra_outputs=extra_outputs)
        self.net = FourierMLP(
            space.num_features + extra_inputs,
            1 + extra_outputs,
            generator=generator,
            width=width,
            depth=depth,
            point_features=point_features,
        )
        self.gate = Gate(space, generator=generator, init=gate_init, scalar=scalar_gate)

    def potential(self, t: Tensor, x: Tensor, *, beside: Tensor | None = None) -> Tensor:
        """The scalar ``phi``, shape ``(...)``, at times ``t (...)`` and points ``x (..., D)``."""
        return self._out(t, x, beside)[..., 0]

    def _out(self, t: Tensor, x: Tensor, beside: Tensor | None) -> Tensor:
        features = self.space.features(x)
        return self.net(t, features if beside is None else torch.cat([features, beside], -1))

    def forward(
        self,
        t: Tensor,
        x: Tensor,
        feature: Tensor,
        weight: Tensor | float = 1.0,
        *,
        beside: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        graph = torch.is_grad_enabled()
        with torch.enable_grad():
            point = x if x.requires_grad else x.detach().requires_grad_()
            out = self._out(t, point, beside)
            (slope,) = torch.autograd.grad(out[..., 0].sum(), point, create_graph=graph)
        extra = out[..., 1:] if graph else out[..., 1:].detach()
        control = slope + (weight * self.gate(t)) * clip(feature, self.bound)
        return self.space.project_vector(control), extra


def chosen_control(
    given: ControlModule | None, space: Space, *, extra_inputs: int = 0, extra_outputs: int = 0, **options: Any
) -> ControlModule:
    """The given control, or a :class:`~diffsampler.networks.Control` with these options.

    Raises:
        ValueError: If the given one does not fit the process.
    """
    if given is None:
        return Control(space, extra_inputs=extra_inputs, extra_outputs=extra_outputs, **options)
    if given.space != space:
        raise ValueError(f"Expected a control on {space}; got one on {given.space}.")
    for name, wanted in (("extra_inputs", extra_inputs), ("extra_outputs", extra_outputs)):
        if getattr(given, name) != wanted:
            raise ValueError(f"Expected a control with {name}={wanted}; got {getattr(given, name)}.")
    return given


class ScoreFeature(nn.Module, ABC):
    """What a control gates, from the target's and the prior's score, each in units of the prior's scale."""

    needs_score: bool = True
    """Whether the target's score is used at all."""

    @abstractmethod
    def forward(self, t: Tensor, score: Tensor, prior_score: Tensor) -> Tensor:
        """The feature ``(..., D)`` at times ``t (..., 1)``."""


@final
class ResidualScore(ScoreFeature):
    """The target's score less the prior's: zero where there is nothing to do."""

    def forward(self, t: Tensor, score: Tensor, prior_score: Tensor) -> Tensor:
        return score - prior_score


@final
class TargetScore(ScoreFeature):
    """The target's score."""

    def forward(self, t: Tensor, score: Tensor, prior_score: Tensor) -> Tensor:
        return score


@final
class LerpedScore(ScoreFeature):
    """The prior's score at the start, the target's at the end, and a straight line between."""

    def forward(self, t: Tensor, score: Tensor, prior_score: Tensor) -> Tensor:
        return torch.lerp(prior_score, score, t.to(score).expand_as(score))


@final
class AnnealedScore(ScoreFeature):
    r"""The score of :math:`\rho^{\beta(t)} p_0^{1 - \beta(t)}` with a learned, rising :math:`\beta`, at first ``t``.

    Arguments:
        knots: Pieces of the piecewise linear ``beta``.
    """

    def __init__(self, knots: int = 16) -> None:
        super().__init__()
        if knots < 1:
            raise ValueError(f"Expected knots >= 1; got {knots}.")
        self.increments = nn.Parameter(torch.zeros(knots))

    def beta(self, t: Tensor) -> Tensor:
        """Inverse temperatures at times ``t (...)``."""
        level = functional.pad(torch.softmax(self.increments, 0).cumsum(0), (1, 0))
        place = t * len(self.increments)
        k = place.detach().floor().long().clamp(0, len(self.increments) - 1)
        return level[k] + (place - k) * (level[k + 1] - level[k])

    def forward(self, t: Tensor, score: Tensor, prior_score: Tensor) -> Tensor:
        beta = self.beta(t)
        return beta * score + (1.0 - beta) * prior_score


@final
class NoScore(ScoreFeature):
    """Nothing: the network must find the target from the loss alone, and no gradient of it is computed."""

    needs_score = False

    def forward(self, t: Tensor, score: Tensor, prior_score: Tensor) -> Tensor:
        return torch.zeros_like(prior_score)


def gated(
    feature: ScoreFeature | None, t: Tensor, score: Tensor | None, prior_score: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor | float]:
    """What a control gates, and its weight: the weighted difference of scores where no feature was chosen.

    Arguments:
        feature: The choice, if there is one.
        t: Times, shape ``(...)``.
        score: The target's score ``(..., D)``.
        prior_score: The prior's score ``(..., D)``.
        weight: The weight that belongs to the difference.
    """
    if feature is None:
        assert score is not None
        return score - prior_score, weight
    return feature(t.unsqueeze(-1), prior_score if score is None else score, prior_score), 1.0


def needs_score(feature: ScoreFeature | None) -> bool:
    """Whether a process with this feature asks for the target's score."""
    return feature is None or feature.needs_score
