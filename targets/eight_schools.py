r"""The eight schools model, written out by hand.

.. math:: \mu \sim N(0, 5^2), \quad \tau \sim \mathrm{HalfCauchy}(5), \quad
          \theta_j \sim N(\mu, \tau^2), \quad y_j \sim N(\theta_j, \sigma_j^2)

Vector: :math:`(\mu, \log\tau, \theta_1, \dots, \theta_8)`, or with :math:`(\theta_j - \mu) / \tau` in place of
:math:`\theta_j` when not centered. Given :math:`\tau` everything is Gaussian, so one quadrature over
:math:`\log\tau` gives the exact evidence and exact posterior draws.
"""

from __future__ import annotations

import math
from typing import final

import torch
from torch import Tensor

from diffsampler.space import Euclidean
from diffsampler.target import Target
from diffsampler.targets import draws
from diffsampler.targets.line import LineDensity

__all__ = ["EightSchools"]

EFFECTS = (28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0)
ERRORS = (15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0)
PRIOR_SCALE = 5.0
SCHOOLS = len(EFFECTS)
LOG_2PI = math.log(2.0 * math.pi)


def _log_half_cauchy(log_tau: Tensor) -> tuple[Tensor, Tensor]:
    """Log density of ``log tau`` (Jacobian included) and its derivative."""
    v = log_tau - math.log(PRIOR_SCALE)
    return math.log(2.0 / math.pi) + v - torch.nn.functional.softplus(2.0 * v), 1.0 - 2.0 * torch.sigmoid(2.0 * v)


def _split(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return x[..., :1], x[..., 1:2], x[..., 2:]


@final
class _SchoolsPrior(Target):
    """Prior of the eight schools model, normalized."""

    def __init__(self, *, centered: bool) -> None:
        super().__init__(Euclidean(2 + SCHOOLS), log_normalizer=0.0, has_sampler=True)
        self.centered = centered

    def log_prob(self, x: Tensor) -> Tensor:
        mu, log_tau, effects = _split(x)
        log_mu = -0.5 * (mu / PRIOR_SCALE).square() - math.log(PRIOR_SCALE)
        log_theta = -0.5 * self._standardized(mu, log_tau, effects).square().sum(-1, keepdim=True)
        if self.centered:
            log_theta = log_theta - SCHOOLS * log_tau
        total = log_mu + _log_half_cauchy(log_tau)[0] + log_theta
        return total.squeeze(-1) - 0.5 * (1 + SCHOOLS) * LOG_2PI

    def log_prob_and_score(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            mu, log_tau, effects = _split(x)
            score_mu = -mu / PRIOR_SCALE**2
            score_tau = _log_half_cauchy(log_tau)[1]
            z = self._standardized(mu, log_tau, effects)
            score_effects = -z
            if self.centered:
                score_effects = -z * torch.exp(-log_tau)
                score_mu = score_mu - score_effects.sum(-1, keepdim=True)
                score_tau = score_tau + z.square().sum(-1, keepdim=True) - SCHOOLS
            return self.log_prob(x), torch.cat([score_mu, score_tau, score_effects], -1)

    def sample(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        z = draws.normal(n, 1 + SCHOOLS, generator=generator)
        u = draws.uniform(n, 1, generator=generator)
        mu, log_tau, effects = PRIOR_SCALE * z[:, :1], (PRIOR_SCALE * torch.tan(0.5 * math.pi * u)).log(), z[:, 1:]
        if self.centered:
            effects = mu + log_tau.exp() * effects
        return torch.cat([mu, log_tau, effects], -1)

    def _standardized(self, mu: Tensor, log_tau: Tensor, effects: Tensor) -> Tensor:
        return (effects - mu) * torch.exp(-log_tau) if self.centered else effects


@final
class EightSchools(Target):
    """Effects of coaching in eight schools: a hierarchical posterior with a funnel, 10 dimensions.

    Reference: Rubin, "Estimation in parallel randomized experiments" (1981, https://doi.org/10.2307/1164617); the
    priors are those of https://github.com/stan-dev/posteriordb.

    Arguments:
        centered: Use the schools' effects themselves as coordinates (the funnel that defeats NUTS) instead of
            standardized ones.
    """

    effects: Tensor
    errors: Tensor
    prior: Target

    def __init__(self, *, centered: bool = True) -> None:
        y = torch.tensor(EFFECTS, dtype=torch.float64)
        sigma = torch.tensor(ERRORS, dtype=torch.float64)
        # Beyond these ends the marginal posterior of log tau has less than 1e-12 of its mass.
        line = LineDensity(lambda t: _log_half_cauchy(t)[0] + _pooled(t, y, sigma)[0], low=-35.0, high=12.0)
        super().__init__(
            Euclidean(2 + SCHOOLS),
            log_normalizer=line.log_normalizer,
            prior=_SchoolsPrior(centered=centered),
            has_sampler=True,
        )
        self.centered = centered
        self.line = line
        self.register_buffer("effects", y)
        self.register_buffer("errors", sigma)

    def log_prob(self, x: Tensor) -> Tensor:
        mu, log_tau, effects = _split(x)
        theta = effects if self.centered else mu + log_tau.exp() * effects
        return self.prior.log_prob(x) + self._log_likelihood(theta)

    def log_prob_and_score(self, x: Tensor) -> tuple[Tensor, Tensor]:
        log_prior, score = self.prior.log_prob_and_score(x)
        with torch.no_grad():
            mu, log_tau, effects = _split(x)
            tau = log_tau.exp()
            theta = effects if self.centered else mu + tau * effects
            pull = (self.effects.to(x) - theta) / self.errors.to(x).square()
            log_prob = log_prior + self._log_likelihood(theta)
            if self.centered:
                return log_prob, score + torch.cat([torch.zeros_like(mu), torch.zeros_like(mu), pull], -1)
            by_scale = pull * tau
            by_tau = (by_scale * effects).sum(-1, keepdim=True)
            return log_prob, score + torch.cat([pull.sum(-1, keepdim=True), by_tau, by_scale], -1)

    def sample(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        log_tau = self.line.sample((n, 1), generator=generator)
        z = draws.normal(n, 1 + SCHOOLS, generator=generator, like=log_tau)
        y, sigma = self.effects.to(z), self.errors.to(z)
        _, center, spread = _pooled(log_tau.squeeze(-1), y, sigma)
        mu = (center + spread * z[:, 0]).unsqueeze(-1)
        tau = log_tau.exp()
        # theta = mu + tau * effect, and given (mu, tau) the posterior of the standardized effect is Gaussian.
        precision = 1.0 + (tau / sigma).square()
        effects = (y - mu) * tau / sigma.square() / precision + z[:, 1:] / precision.sqrt()
        return torch.cat([mu, log_tau, mu + tau * effects if self.centered else effects], -1)

    def constrain(self, x: Tensor) -> dict[str, Tensor]:
        """``mu (n,)``, ``tau (n,)`` and ``theta (n, 8)``."""
        mu, log_tau, effects = _split(x)
        tau = log_tau.exp()
        theta = effects if self.centered else mu + tau * effects
        return {"mu": mu.squeeze(-1), "tau": tau.squeeze(-1), "theta": theta}

    def _log_likelihood(self, theta: Tensor) -> Tensor:
        sigma = self.errors.to(theta)
        z = (self.effects.to(theta) - theta) / sigma
        return -0.5 * z.square().sum(-1) - sigma.log().sum() - 0.5 * SCHOOLS * LOG_2PI


def _pooled(log_tau: Tensor, y: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    r"""Given :math:`\tau`: log density of the data, mean and standard deviation of :math:`\mu | y`; all ``(m,)``."""
    variance = (2.0 * log_tau).exp().unsqueeze(-1) + sigma.square()
    precision = variance.reciprocal().sum(-1) + PRIOR_SCALE**-2
    center = (y / variance).sum(-1) / precision
    square = (y.square() / variance).sum(-1) - center.square() * precision
    log_det = variance.log().sum(-1) + precision.log() + 2.0 * math.log(PRIOR_SCALE)
    return -0.5 * (square + log_det + SCHOOLS * LOG_2PI), center, precision.rsqrt()
