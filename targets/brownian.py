r"""A Brownian motion with unknown scales, seen through noise at both ends of its time.

.. math:: s, o \sim \mathrm{LogNormal}(0, 2), \quad x_1 \sim N(0, s^2), \quad x_{i+1} \sim N(x_i, s^2), \quad
          y_i \sim N(x_i, o^2)

with 30 times, of which the middle ten are not observed. Vector: :math:`(\theta_s, \theta_o, x_1, \dots, x_{30})` with
:math:`s = \log(1 + e^{\theta_s})` and likewise :math:`o`; the density holds the Jacobian and every constant.

Given the scales everything is Gaussian. With :math:`r = o / s`, eigenvalues :math:`\lambda_j` of the observed walk's
covariance :math:`\min(i, i')` and coordinates :math:`\eta_j` of the data in its eigenvectors,

.. math:: p(y | s, r) = \prod_{j=1}^{20} N\big(\eta_j; 0, s^2 (\lambda_j + r^2)\big),

so that quadratures over :math:`\log s` and :math:`\log r` give the exact log evidence, 1.187749, and exact draws.
(Sequential
Monte Carlo estimates in the literature lie between 0.87 and 1.18.)
"""

from __future__ import annotations

import math
from typing import final

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus

from diffsampler.space import Euclidean
from diffsampler.target import Target
from diffsampler.targets import draws
from diffsampler.targets.line import LineDensity

__all__ = ["BrownianMotion"]

START = (
    0.21592641,
    0.118771404,
    -0.07945447,
    0.037677474,
    -0.27885845,
    -0.1484156,
    -0.3250906,
    -0.22957903,
    -0.44110894,
    -0.09830782,
)
END = (
    -0.8786016,
    -0.83736074,
    -0.7384849,
    -0.8939254,
    -0.7774566,
    -0.70238715,
    -0.87771565,
    -0.51853573,
    -0.6948214,
    -0.6202789,
)
TIMES = 30
SEEN = (*range(len(START)), *range(TIMES - len(END), TIMES))
PRIOR_SCALE = 2.0
LOG_2PI = math.log(2.0 * math.pi)
LOG_TINY = -20.0
"""Below, the softplus function is the exponential up to 1e-9 of itself."""
RATIO_LOW, RATIO_HIGH, RATIO_CELLS = -22.0, 22.0, 8000
LEVEL_LOW, LEVEL_HIGH, LEVEL_CELLS = -1.5, 4.0, 512
"""Interval of ``log s`` about the likelihood's maximum given the ratio; outside, the density is below 1e-30."""
DRAWS_PER_BATCH = 8192


def _log_scale(theta: Tensor) -> Tensor:
    """Logarithm of ``softplus(theta)``, also where that underflows."""
    return torch.where(theta < LOG_TINY, theta, softplus(theta.clamp_min(LOG_TINY)).log())


def _theta(log_scale: Tensor) -> Tensor:
    """Inverse of :func:`_log_scale`."""
    scale = log_scale.exp()
    return scale + torch.log(-torch.expm1(-scale))


def _log_prior_of_scale(theta: Tensor) -> tuple[Tensor, Tensor]:
    """Log density of ``theta`` without constants, its derivative, all elementwise."""
    log_scale, rate = _log_scale(theta), torch.sigmoid(theta)
    log_prob = -0.5 * (log_scale / PRIOR_SCALE).square() - log_scale + logsigmoid(theta)
    slope = -(log_scale / PRIOR_SCALE**2 + 1.0) * _rate_of_log(theta, log_scale) + 1.0 - rate
    return log_prob, slope


def _rate_of_log(theta: Tensor, log_scale: Tensor) -> Tensor:
    """Derivative of :func:`_log_scale`."""
    return (logsigmoid(theta) - log_scale).exp()


@final
class _WalkPrior(Target):
    """Prior of scales and path, normalized."""

    def __init__(self) -> None:
        super().__init__(Euclidean(2 + TIMES), log_normalizer=0.0, has_sampler=True)

    def log_prob(self, x: Tensor) -> Tensor:
        theta, path = x[..., :2], x[..., 2:]
        log_step = _log_scale(theta[..., :1])
        total = _log_prior_of_scale(theta)[0].sum(-1) - TIMES * log_step.squeeze(-1)
        constant = 2.0 * math.log(PRIOR_SCALE) + 0.5 * (2 + TIMES) * LOG_2PI
        return total - 0.5 * self._steps(path, log_step).square().sum(-1) - constant

    def log_prob_and_score(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            theta, path = x[..., :2], x[..., 2:]
            log_step = _log_scale(theta[..., :1])
            z = self._steps(path, log_step)
            score = torch.cat([_log_prior_of_scale(theta)[1], torch.empty_like(path)], -1)
            by_log = z.square().sum(-1, keepdim=True) - TIMES
            score[..., :1] += by_log * _rate_of_log(theta[..., :1], log_step)
            pull = z * (-log_step).exp()
            score[..., 2:] = -pull
            score[..., 2:-1] += pull[..., 1:]
            return self.log_prob(x), score

    def sample(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        z = draws.normal(n, 2 + TIMES, generator=generator)
        log_scale = PRIOR_SCALE * z[:, :2]
        return torch.cat([_theta(log_scale), log_scale[:, :1].exp() * z[:, 2:].cumsum(-1)], -1)

    def _steps(self, path: Tensor, log_step: Tensor) -> Tensor:
        """Standardized increments, the first from zero."""
        before = torch.nn.functional.pad(path[..., :-1], (1, 0))
        return (path - before) * (-log_step).exp()


@final
class BrownianMotion(Target):
    """Posterior of a Brownian motion and its two scales given twenty noisy points of thirty, 32 dimensions.

    Reference: Sountsov, Radul et al., "Inference Gym" (2020, https://pypi.org/project/inference_gym), "Brownian motion,
    missing middle observations, unknown scales"; a benchmark of Vargas et al., "Denoising diffusion samplers" (2023,
    https://arxiv.org/abs/2302.13834). ``prior`` is that of scales and path.
    """

    observed: Tensor
    index: Tensor
    eigenvalues: Tensor
    projections: Tensor
    prior: Target

    def __init__(self) -> None:
        y = torch.tensor([*START, *END], dtype=torch.float64)
        index = torch.tensor(SEEN)
        walk = torch.minimum(index, index.unsqueeze(-1)).double() + 1.0
        eigenvalues, vectors = torch.linalg.eigh(walk)
        projections = (vectors.mT @ y).square()
        line = LineDensity(
            lambda ratio: _log_marginal(ratio, eigenvalues, projections),
            low=RATIO_LOW,
            high=RATIO_HIGH,
            cells=RATIO_CELLS,
        )
        super().__init__(Euclidean(2 + TIMES), log_normalizer=line.log_normalizer, prior=_WalkPrior(), has_sampler=True)
        self.line = line
        self.register_buffer("observed", y)
        self.register_buffer("index", index)
        self.register_buffer("eigenvalues", eigenvalues)
        self.register_buffer("projections", projections)

    def log_prob(self, x: Tensor) -> Tensor:
        log_noise = _log_scale(x[..., 1:2])
        z = self._residuals(x, log_noise)
        count = len(SEEN)
        log_likelihood = -0.5 * z.square().sum(-1) - count * log_noise.squeeze(-1) - 0.5 * count * LOG_2PI
        return self.prior.log_prob(x) + log_likelihood

    def log_prob_and_score(self, x: Tensor) -> tuple[Tensor, Tensor]:
        score = self.prior.log_prob_and_score(x)[1]
        with torch.no_grad():
            log_noise = _log_scale(x[..., 1:2])
            z = self._residuals(x, log_noise)
            by_log = z.square().sum(-1, keepdim=True) - len(SEEN)
            score[..., 1:2] += by_log * _rate_of_log(x[..., 1:2], log_noise)
            score[..., 2 + self.index] += z * (-log_noise).exp()
            return self.log_prob(x), score

    def sample(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        log_ratio = self.line.sample((n, 1), generator=generator)
        u = draws.uniform(n, 1, generator=generator, like=log_ratio)
        z = draws.normal(n, TIMES, generator=generator, like=log_ratio)
        parts = zip(*(t.split(DRAWS_PER_BATCH) for t in (log_ratio, u, z)), strict=True)
        return torch.cat([self._draw(*part) for part in parts])

    def constrain(self, x: Tensor) -> dict[str, Tensor]:
        """``innovation_scale (n,)``, ``observation_scale (n,)`` and ``path (n, 30)``."""
        scale = softplus(x[..., :2])
        return {"innovation_scale": scale[..., 0], "observation_scale": scale[..., 1], "path": x[..., 2:]}

    def _residuals(self, x: Tensor, log_noise: Tensor) -> Tensor:
        return (self.observed.to(x) - x[..., 2 + self.index]) * (-log_noise).exp()

    def _draw(self, log_ratio: Tensor, u: Tensor, z: Tensor) -> Tensor:
        """Scale given the ratio by inversion, then the Gaussian path given both; columns of ``n`` rows."""
        log_step = _level(log_ratio, u, self.eigenvalues.to(u), self.projections.to(u))
        weight = (-2.0 * log_ratio).exp().unsqueeze(-1)
        difference = torch.eye(TIMES, dtype=u.dtype, device=u.device)
        difference[1:, :-1] -= torch.eye(TIMES - 1, dtype=u.dtype, device=u.device)
        seen = u.new_zeros(TIMES)
        seen[self.index] = 1.0
        data = u.new_zeros(TIMES, 1)
        data[self.index, 0] = self.observed.to(u)
        # Precision of the path in units of 1 / s**2.
        factor = torch.linalg.cholesky(difference.mT @ difference + weight * seen.diag())
        mean = torch.cholesky_solve(weight * data, factor).squeeze(-1)
        noise = torch.linalg.solve_triangular(factor.mT, z.unsqueeze(-1), upper=True).squeeze(-1)
        return torch.cat([_theta(log_step), _theta(log_step + log_ratio), mean + log_step.exp() * noise], -1)


def _grid(log_ratio: Tensor, eigenvalues: Tensor, projections: Tensor) -> tuple[Tensor, Tensor]:
    r"""Values of ``log s``, and the log joint density of ``(log s, log r, y)`` there, ``(n, cells + 1)`` each."""
    variance = eigenvalues + (2.0 * log_ratio).exp()
    square, log_det = (projections / variance).sum(-1, keepdim=True), variance.log().sum(-1, keepdim=True)
    count = eigenvalues.numel()
    levels = torch.linspace(LEVEL_LOW, LEVEL_HIGH, LEVEL_CELLS + 1, dtype=torch.float64, device=log_ratio.device)
    log_step = levels + 0.5 * (square / count).log()
    log_likelihood = -count * log_step - 0.5 * (square * (-2.0 * log_step).exp() + log_det + count * LOG_2PI)
    log_noise = log_step + log_ratio
    log_prior = -0.5 * (log_step.square() + log_noise.square()) / PRIOR_SCALE**2
    return log_step, log_likelihood + log_prior - LOG_2PI - 2.0 * math.log(PRIOR_SCALE)


def _log_marginal(log_ratio: Tensor, eigenvalues: Tensor, projections: Tensor) -> Tensor:
    """Log joint density of ``(log r, y)``, ``(m,) -> (m,)``."""
    width = math.log((LEVEL_HIGH - LEVEL_LOW) / LEVEL_CELLS)
    parts = log_ratio.unsqueeze(-1).split(DRAWS_PER_BATCH)
    return torch.cat([torch.logsumexp(_grid(part, eigenvalues, projections)[1], -1) for part in parts]) + width


def _level(log_ratio: Tensor, u: Tensor, eigenvalues: Tensor, projections: Tensor) -> Tensor:
    """Inverse distribution function of ``log s`` given the ratio, density linear in each cell; ``(n, 1)``."""
    log_step, log_joint = _grid(log_ratio, eigenvalues, projections)
    density = torch.softmax(log_joint, -1)
    mass = 0.5 * (density[:, 1:] + density[:, :-1])
    below = torch.nn.functional.pad(mass.cumsum(-1), (1, 0))
    aim = u * below[:, -1:]
    cell = torch.searchsorted(below, aim, right=True).sub(1).clamp(0, LEVEL_CELLS - 1)
    left, right, rest = density.gather(-1, cell), density.gather(-1, cell + 1), aim - below.gather(-1, cell)
    root = (left.square() + 2.0 * rest * (right - left)).clamp_min(0.0).sqrt()
    share = torch.where(rest > 0.0, 2.0 * rest / (left + root), torch.zeros_like(rest)).clamp_max(1.0)
    return log_step.gather(-1, cell) + share * (LEVEL_HIGH - LEVEL_LOW) / LEVEL_CELLS
