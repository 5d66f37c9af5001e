r"""The Foellmer process, with its drift estimated from values of the density.

In a frame where the target resembles :math:`\phi = N(0, I)`, let :math:`f = \gamma / \phi`. The diffusion

.. math::
   dX = b(X, t)\, dt + dW, \quad X_0 = 0, \qquad
   b(x, t) = \nabla\log E f(x + \sqrt{1 - t}\, Z)
   = \frac{E[Z f(x + \sqrt{1 - t}\, Z)]}{\sqrt{1 - t}\, E f(x + \sqrt{1 - t}\, Z)}

has :math:`X_1 \sim \gamma / Z`. The expectations are means over ``num_points`` mirrored normal draws per particle and
step, in log space; :math:`f` is replaced by :math:`(1 - \varepsilon) f / \hat Z + \varepsilon`, whose constant part
pulls nowhere and bounds the drift where few draws meet the target. The Euler steps
:math:`F_k = N(x_k + h b_k, h I)` have the exact path weights

.. math:: \log w = \log f(x_K) + \sum_k [\log N(x_{k+1}; x_k, h I) - \log F_k(x_{k+1} | x_k)],

the backward chain being the Brownian bridge from zero. Given the points of a step, :math:`b_k` is a number, so that
:math:`E[w] = Z` whatever its error; particles are independent.

For few dimensions, and targets that one Gaussian covers well: with several modes far apart, or above five dimensions,
hardly a draw meets the target early on. :class:`~diffsampler.methods.ensemble_score.EnsembleScore` shares points and is
the better one; this is its plain relative. Cost: ``num_steps * num_points`` evaluations per draw, and the pilot.

References:
    Schroedinger-Foellmer sampler (Huang, Jiao, Kang, Liao, Liu & Liu, 2021), https://arxiv.org/abs/2106.10880
    Path Integral Sampler (Zhang & Chen, 2022), https://arxiv.org/abs/2111.15141 (the weights)
"""

from __future__ import annotations

import math
from typing import final

import torch
from torch import Tensor

from diffsampler.ensemble.chain import Recipe
from diffsampler.ensemble.clouds import Pooled
from diffsampler.ensemble.frame import Frame
from diffsampler.ensemble.pilot import make_plan
from diffsampler.ensemble.proposals import Kalman
from diffsampler.ensemble.transitions import PlugIn
from diffsampler.particles import Particles
from diffsampler.sampler import Sampler
from diffsampler.space import Euclidean
from diffsampler.target import CountedTarget, Target

__all__ = ["Foellmer"]

POINTS_PER_CHUNK = 1_000_000
WIDER = 1.2
"""The Gaussian is wider than the target by this factor, so that f is bounded for Gaussian tails."""


@final
class Foellmer(Sampler):
    """Euler steps of the Foellmer process with a Monte Carlo drift; only ``log_prob`` of the target is called.

    Arguments:
        target: The density, on a Euclidean space.
        num_steps: Number of steps.
        num_points: Density evaluations per particle and step.
        regularization: Share of the constant in ``f``, in [0, 1).
        radius: As in :class:`~diffsampler.methods.ensemble_score.EnsembleScore`.

    Raises:
        ValueError: If an option is out of range or the space is not Euclidean.
    """

    def __init__(
        self,
        target: Target,
        *,
        num_steps: int = 50,
        num_points: int = 64,
        regularization: float = 1e-3,
        radius: float | None = None,
    ) -> None:
        if not isinstance(target.space, Euclidean):
            raise ValueError(f"Expected a target on a Euclidean space; got {target.space}.")
        for name, value, least in (("num_steps", num_steps, 1), ("num_points", num_points, 2)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"Expected {name} to be an integer of at least {least}; got {value!r}.")
        if not 0.0 <= regularization < 1.0:
            raise ValueError(f"Expected regularization in [0, 1); got {regularization}.")
        if radius is not None and not 0.0 < radius < math.inf:
            raise ValueError(f"Expected a positive radius; got {radius}.")
        self.target = target
        self.num_steps = num_steps
        self.num_points = num_points
        self.regularization = regularization
        self.radius = radius
        self._counted = CountedTarget(target)

    @property
    def evaluations(self) -> int:
        """Points at which the density was computed so far, pilots included."""
        return self._counted.evaluations

    def sample(self, n: int, *, seed: int = 0) -> Particles:
        """Draw ``n`` independent weighted particles.

        Raises:
            ValueError: If ``n`` is not positive, or the density is finite hardly anywhere.
        """
        if isinstance(n, bool) or not isinstance(n, int) or n < 1:
            raise ValueError(f"Expected n >= 1; got {n!r}.")
        device = next(iter(self.target.buffers()), torch.empty(0)).device
        generator = torch.Generator(device).manual_seed(seed)
        recipe = Recipe(num_particles=256, num_points=4, estimator=Pooled(), proposal=Kalman(), transition=PlugIn())
        frame = make_plan(self._counted, recipe, radius=self.radius, generator=generator).frame
        frame = frame._replace(factor=WIDER * frame.factor)
        level = self._log_mean(frame, generator)
        x = torch.zeros(n, self.target.dim, dtype=torch.float64, device=device)
        log_weight = torch.zeros(n, dtype=torch.float64, device=device)
        step = 1.0 / self.num_steps
        for k in range(self.num_steps):
            shift = step * self._drift(frame, x, 1.0 - k * step, level, generator)
            noise = math.sqrt(step) * torch.randn(x.shape, generator=generator, dtype=x.dtype, device=device)
            x = x + shift + noise
            # N(x'; x, h) over N(x'; x + shift, h), in difference form.
            log_weight = log_weight - (shift * (0.5 * shift + noise)).sum(-1) / step
        return Particles(frame.to_original(x), log_weight + self._log_f(frame, x))

    def _log_f(self, frame: Frame, u: Tensor) -> Tensor:
        gaussian = 0.5 * u.square().sum(-1) + 0.5 * u.shape[-1] * math.log(2.0 * math.pi)
        return frame.log_prob(self._counted, u) + gaussian

    def _log_mean(self, frame: Frame, generator: torch.Generator) -> float:
        """Log of the mean of ``f`` under the Gaussian, importance sampling's estimate of the normalizer."""
        z = torch.randn(1000, self.target.dim, generator=generator, dtype=torch.float64, device=generator.device)
        value = float(torch.logsumexp(self._log_f(frame, z), 0)) - math.log(1000.0)
        if not math.isfinite(value):
            raise ValueError("Expected a finite density at some draws of the frame's Gaussian; got none.")
        return value

    def _drift(self, frame: Frame, x: Tensor, left: float, level: float, generator: torch.Generator) -> Tensor:
        """Drift ``(n, D)`` at time ``1 - left``, some particles at a time; random numbers are drawn in one order."""
        size = max(1, POINTS_PER_CHUNK // (self.num_points * x.shape[-1]))
        return torch.cat([self._drift_of(frame, part, left, level, generator) for part in x.split(size)])

    def _drift_of(self, frame: Frame, x: Tensor, left: float, level: float, generator: torch.Generator) -> Tensor:
        half = (self.num_points + 1) // 2
        z = torch.randn(len(x), half, x.shape[-1], generator=generator, dtype=x.dtype, device=x.device)
        z = torch.cat([z, -z], 1)[:, : self.num_points]
        log_f = self._log_f(frame, x.unsqueeze(1) + math.sqrt(left) * z) - level
        constant = math.log(self.regularization) if self.regularization > 0.0 else -math.inf
        # The constant's own pull is E[Z] = 0: it only adds to the denominator.
        log_sum = torch.logsumexp(log_f, 1) - math.log(self.num_points) + math.log1p(-self.regularization)
        log_total = torch.logaddexp(log_sum, torch.full_like(log_sum, constant))
        alive = log_sum > -math.inf
        share = torch.where(alive, (log_sum - log_total).exp(), torch.zeros_like(log_sum)).unsqueeze(-1)
        weight = torch.softmax(torch.where(alive.unsqueeze(1), log_f, torch.zeros_like(log_f)), 1)
        return share * (weight.unsqueeze(1) @ z).squeeze(1) / math.sqrt(left)
