r"""Transitions from one noise level to the next, with their log densities.

In the variance-exploding chain :math:`x_\sigma = y + \sigma z`, with :math:`r = \sigma'^2 / \sigma^2`, the reverse
kernel given the end point is :math:`p(x' | x, y) = N(r x + (1 - r) y,\; \sigma'^2 (1 - r) I)`.

* :class:`PlugIn` puts the estimated posterior mean for ``y``, and may add the estimated posterior variance,
  :math:`(1 - r)^2 \mathrm{diag}\,\mathrm{Var}[y | x]`, to that of the kernel.
* :class:`PosteriorDraw` puts a draw from the weighted cloud for ``y``; its density is the mixture over the cloud. As
  the cloud grows it is the exact reverse kernel for any step.

The last step goes to zero noise, where both add :math:`(c \sigma)^2` so that there is a density.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import NamedTuple, final

import torch
from torch import Tensor

from diffsampler.ensemble.clouds import Cloud
from diffsampler.ensemble.proposals import square_distance

__all__ = ["Mean", "PlugIn", "PosteriorDraw", "ScoreBlend", "Step", "Transition", "Tweedie", "posterior_weights"]

LOG_2PI = math.log(2.0 * math.pi)
PRIOR_POINTS = 10.0
"""Number of points that the Gaussian's variance counts for against a member's own."""


class Step(NamedTuple):
    """A step of members ``(B, m)``."""

    x: Tensor
    """``(B, m, D)``."""
    log_forward: Tensor
    """Log density of the step, ``(B, m)``."""
    ess: Tensor
    """Effective number of points behind each member's estimate, ``(B, m)``; zero where all weights vanish."""
    mean: Tensor
    """Estimated posterior mean, ``(B, m, D)``."""
    variance: Tensor
    """Estimated diagonal of the posterior covariance, ``(B, m, D)``; zero for a single effective point."""


def posterior_weights(x: Tensor, cloud: Cloud, sigma: float) -> tuple[Tensor, Tensor]:
    r"""Self-normalized weights ``(B, m, P)`` of the cloud for members ``(B, m, D)``, and which rows are not all zero.

    Rows without any weight are uniform, and flagged False.
    """
    logit = cloud.log_ratio.unsqueeze(-2) - square_distance(x, cloud.y) / (2.0 * sigma**2)
    top = logit.amax(-1, keepdim=True)
    alive = top > -math.inf
    logit = torch.where(alive, logit - top, torch.zeros_like(logit))
    return torch.softmax(logit, -1), alive.squeeze(-1)


class Mean(ABC):
    """Estimates the posterior mean from the weights."""

    needs_score: bool = False

    @abstractmethod
    def __call__(self, x: Tensor, weight: Tensor, cloud: Cloud, sigma: float) -> Tensor:
        """Posterior mean of members ``x (B, m, D)`` from weights ``(B, m, P)``, shape ``(B, m, D)``."""


@final
class Tweedie(Mean):
    r""":math:`\sum_k W_k y_k`, from density values alone."""

    def __call__(self, x: Tensor, weight: Tensor, cloud: Cloud, sigma: float) -> Tensor:
        return weight @ cloud.y


@final
class ScoreBlend(Mean):
    r"""The blend :math:`\sum_k W_k [c\, y_k + (1 - c)(x + \sigma^2 s(y_k))]` with the least variance, per coordinate.

    Both ends are the posterior mean (denoising and target score identities), so any ``c`` serves. The best one is
    :math:`c = -\mathrm{Cov}(a - b, b) / \mathrm{Var}(a - b)` for the two integrands ``a, b``, under the same weights;
    for a Gaussian of variance ``v`` it is :math:`\sigma^2 / (\sigma^2 + v)`, and the estimate is exact.

    Reference:
        Target score matching (De Bortoli, Hutchinson, Wirnsberger & Doucet, 2024), https://arxiv.org/abs/2402.08667
    """

    needs_score = True

    def __call__(self, x: Tensor, weight: Tensor, cloud: Cloud, sigma: float) -> Tensor:
        assert cloud.score is not None
        y, s = cloud.y, sigma**2 * cloud.score
        columns = torch.cat([y, s, y.square(), s.square(), y * s], -1)
        mean_y, mean_s, yy, ss, ys = (weight @ columns).chunk(5, -1)
        var_y, var_s, cov = yy - mean_y.square(), ss - mean_s.square(), ys - mean_y * mean_s
        spread = (var_y + var_s - 2.0 * cov).clamp_min(1e-300)
        c = ((var_s - cov) / spread).clamp(0.0, 1.0)
        return c * mean_y + (1.0 - c) * (x + mean_s)


class Transition(ABC):
    """One step of all members, given their cloud.

    Arguments:
        mean: How the posterior mean is estimated.
    """

    mean: Mean

    @abstractmethod
    def step(self, x: Tensor, cloud: Cloud, sigma: float, sigma_next: float, *, noise: Tensor, uniform: Tensor) -> Step:
        """Move members ``x (B, m, D)``, with standard normal ``noise (B, m, D)`` and ``uniform (B, m)`` draws."""


@final
class PlugIn(Transition):
    """The posterior mean in the place of the end point.

    Arguments:
        mean: Tweedie by default.
        matched: Add the posterior variance, without which the step is exact only for many levels.
        last: Standard deviation of the last step, in units of the last noise level.
    """

    def __init__(self, *, mean: Mean | None = None, matched: bool = True, last: float = 1.0) -> None:
        self.mean = Tweedie() if mean is None else mean
        self.matched = matched
        self.last = _positive("last", last)

    def step(self, x: Tensor, cloud: Cloud, sigma: float, sigma_next: float, *, noise: Tensor, uniform: Tensor) -> Step:
        weight, alive = posterior_weights(x, cloud, sigma)
        ess, mean, second = _moments(weight, alive, cloud)
        centre = torch.where(alive.unsqueeze(-1), self.mean(x, weight, cloud, sigma), x)
        keep = (sigma_next / sigma) ** 2
        variance = torch.full_like(x[..., :1], sigma_next**2 * (1.0 - keep))
        if sigma_next == 0.0:
            variance = torch.full_like(variance, (self.last * sigma) ** 2)
        elif self.matched:
            # What a handful of points says about a variance is held against a Gaussian's.
            count = ess.unsqueeze(-1)
            prior = second.new_full((), sigma_next**2) if cloud.spread is None else cloud.spread
            posterior = (count * second + PRIOR_POINTS * prior) / (count + PRIOR_POINTS)
            variance = variance + (1.0 - keep) ** 2 * posterior
        variance = variance.expand_as(x)
        x_next = keep * x + (1.0 - keep) * centre + variance.sqrt() * noise
        log_forward = -0.5 * (noise.square() + variance.log() + LOG_2PI).sum(-1)
        return Step(x_next, log_forward, ess, centre, second)


@final
class PosteriorDraw(Transition):
    """A draw from the cloud in the place of the end point.

    Arguments:
        last: Standard deviation of the last step, in units of the last noise level.
    """

    def __init__(self, *, last: float = 0.6) -> None:
        self.mean = Tweedie()
        self.last = _positive("last", last)

    def step(self, x: Tensor, cloud: Cloud, sigma: float, sigma_next: float, *, noise: Tensor, uniform: Tensor) -> Step:
        weight, alive = posterior_weights(x, cloud, sigma)
        ess, mean, second = _moments(weight, alive, cloud)
        keep = (sigma_next / sigma) ** 2
        variance = sigma_next**2 * (1.0 - keep) if sigma_next > 0.0 else (self.last * sigma) ** 2
        cumulative = weight.cumsum(-1)
        index = torch.searchsorted(cumulative, (uniform * cumulative[..., -1]).unsqueeze(-1), right=True)
        index = index.clamp_max(weight.shape[-1] - 1).expand(*x.shape)
        drawn = torch.gather(cloud.y, 1, index)
        x_next = keep * x + (1.0 - keep) * drawn + math.sqrt(variance) * noise
        # In the coordinates of the cloud: |x' - r x - (1 - r) y|^2 = (1 - r)^2 |(x' - r x) / (1 - r) - y|^2.
        square = (1.0 - keep) ** 2 * square_distance((x_next - keep * x) / (1.0 - keep), cloud.y)
        log_forward = torch.logsumexp(weight.log() - square / (2.0 * variance), -1)
        log_forward = log_forward - 0.5 * x.shape[-1] * (LOG_2PI + math.log(variance))
        return Step(x_next, log_forward, ess, torch.where(alive.unsqueeze(-1), mean, x), second)


def _moments(weight: Tensor, alive: Tensor, cloud: Cloud) -> tuple[Tensor, Tensor, Tensor]:
    """Effective sample size ``(B, m)``, mean and variances ``(B, m, D)`` of the weighted cloud."""
    ess = 1.0 / weight.square().sum(-1)
    mean, square = (weight @ torch.cat([cloud.y, cloud.y.square()], -1)).chunk(2, -1)
    return torch.where(alive, ess, torch.zeros_like(ess)), mean, (square - mean.square()).clamp_min(0.0)


def _positive(name: str, value: float) -> float:
    if not 0.0 < value < math.inf:
        raise ValueError(f"Expected {name} to be positive; got {value}.")
    return value
