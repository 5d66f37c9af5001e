"""The pilot on spaces other than Euclidean space: an isotropic reference, adaptive tempering, and a frozen last pass.

There are no maps or mixtures here: a Gaussian of the right scale on ``MeanFree``, the uniform law on a ``Torus``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import final

import torch
from torch import Tensor

from diffsampler.smc import SMCResult, smc
from diffsampler.space import Space, Torus
from diffsampler.target import Target
from diffsampler.tempering import TemperedPath

__all__ = ["IsotropicGaussian", "UniformTorus", "choose_reference"]

SCALES = (0.1, 0.3, 1.0, 3.0, 10.0)


@final
class IsotropicGaussian(Target):
    """Gaussian with mean zero and one standard deviation on any space, normalised for its degrees of freedom."""

    scale: Tensor

    def __init__(self, space: Space, scale: float) -> None:
        super().__init__(space, log_normalizer=0.0, has_sampler=True)
        self.register_buffer("scale", torch.tensor([scale], dtype=torch.float64))

    def log_prob(self, x: Tensor) -> Tensor:
        return self.space.log_gaussian(x, torch.zeros_like(x), self.scale.square().to(x.device))

    def sample(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        return self.space.project(self.scale * self.space.noise((n,), like=self.scale, generator=generator))


@final
class UniformTorus(Target):
    """Uniform law on a torus."""

    def __init__(self, space: Torus) -> None:
        super().__init__(space, log_normalizer=0.0, has_sampler=True)

    def log_prob(self, x: Tensor) -> Tensor:
        # A sum over no gradient: the density is flat, but must stay differentiable.
        return (0.0 * x.double()).sum(-1) - self.dim * math.log(2.0 * math.pi)

    def log_prob_and_score(self, x: Tensor) -> tuple[Tensor, Tensor]:
        value = torch.full(x.shape[:-1], -self.dim * math.log(2.0 * math.pi), dtype=torch.float64, device=x.device)
        return value, torch.zeros_like(x)

    def sample(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        device = None if generator is None else generator.device
        uniform = torch.rand((n, self.dim), generator=generator, dtype=torch.float64, device=device)
        return 2.0 * math.pi * uniform - math.pi


def choose_reference(
    target: Target, *, generator: torch.Generator, pace: Callable[[float], Callable[[], float]] | None = None
) -> tuple[Target, float]:
    """Reference for a space without maps, and its scale (NaN for the uniform law).

    Short runs from a few scales; the estimate of log Z is highest where the reference covers the target, and among
    those within 0.5 of the best the run with the fewest evaluations wins. The scale is then fitted to its particles.
    """
    space = target.space
    if isinstance(space, Torus):
        return UniformTorus(space), math.nan
    trials: list[SMCResult] = []
    for i, scale in enumerate(SCALES):
        # Together the trials may take a third of a budget.
        spent = None if pace is None else pace(0.35 * (i + 1) / len(SCALES))
        path = TemperedPath(IsotropicGaussian(space, scale), target)
        try:
            trials.append(smc(path, n=256, num_islands=2, generator=generator, pace=spent, max_temperatures=200))
        except ValueError:
            # No draw of this scale has a finite density; another scale may.
            continue
    finished = [t for t in trials if t.finished]
    if not finished:
        raise ValueError("Expected a density that tempering from a Gaussian can reach; no scale from 0.1 to 10 did.")
    best = max(t.particles.log_normalizer.value for t in finished)
    near = [t for t in finished if t.particles.log_normalizer.value > best - 0.5]
    chosen = min(near, key=lambda t: t.evaluations).particles
    weight = torch.softmax(chosen.log_weight, 0)
    # Wider than the target, so that its tails are covered.
    scale = 1.2 * math.sqrt(float((weight * chosen.x.square().sum(-1)).sum()) / space.dof)
    return IsotropicGaussian(space, scale), scale
