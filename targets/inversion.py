r"""Travel times in a borehole: an inverse problem in one dimension, for methods without gradients.

A vertical seismic profile. ``D`` layers of equal thickness make up :data:`DEPTH` metres. A source at the surface fires,
and receivers down the hole record the first arrival. With :math:`v_0` the reference velocity and :math:`\theta_j` the
log velocity of layer ``j`` relative to it, the travel time in milliseconds to a receiver at depth :math:`z_i` is

.. math:: t_i(\theta) = \frac{1000}{v_0} \sum_j h_{ij} e^{-\theta_j},

where :math:`h_{ij}` is the length in metres of the vertical ray in the layer, and :math:`v_0` is in m/s. A priori
:math:`\theta \sim N(0, \tau^2 e^{-|z_j - z_k| / \ell})`; picks have independent Gaussian errors.

:class:`TravelTimeInversion` is this posterior, mildly nonlinear; :class:`LinearInversion` any linear Gaussian one, with
exact moments and evidence, and :meth:`LinearInversion.travel_time` the first order
:math:`e^{-\theta} \approx 1 - \theta` of the above.

Reference:
    Inverse Problem Theory and Methods for Model Parameter Estimation (Tarantola, 2005),
    https://doi.org/10.1137/1.9780898717921
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

from diffsampler.space import Euclidean
from diffsampler.target import Target
from diffsampler.targets import checks, draws
from diffsampler.targets.gaussian import Gaussian

__all__ = ["DEPTH", "LinearInversion", "TravelTimeInversion", "ray_lengths"]

LOG_2PI = math.log(2.0 * math.pi)
DEPTH = 1000.0
"""Depth of the hole, m."""
VELOCITY = 2500.0
"""Reference velocity, m/s."""
SPREAD = 0.2
"""Prior standard deviation of a log velocity."""
CORRELATION = 200.0
"""Prior correlation length, m."""
NOISE = 2.0
"""Standard deviation of a pick, ms."""


def ray_lengths(layers: int, receivers: int) -> Tensor:
    """Metres of the vertical ray to each receiver in each layer, ``(receivers, layers)``, float64.

    Receivers sit at equal distances, the last at the bottom.
    """
    top = DEPTH / layers * torch.arange(layers, dtype=torch.float64)
    depth = DEPTH / receivers * torch.arange(1, receivers + 1, dtype=torch.float64)
    return (depth.unsqueeze(-1) - top).clamp(0.0, DEPTH / layers)


def _prior_covariance(layers: int) -> Tensor:
    depth = DEPTH / layers * torch.arange(layers, dtype=torch.float64)
    return SPREAD**2 * torch.exp(-(depth - depth.unsqueeze(-1)).abs() / CORRELATION)


def _observe(times: Tensor, *, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return times + NOISE * draws.normal(len(times), generator=generator)


def _truth(layers: int, *, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed + 1)
    return torch.linalg.cholesky(_prior_covariance(layers)) @ draws.normal(layers, generator=generator)


@final
class LinearInversion(Target):
    r"""The posterior of a linear Gaussian inverse problem, with exact sampler and evidence.

    .. math:: \log\rho(x) = \log N(x; 0, C) + \log N(y; G x + b, s^2 I), \qquad \log Z = \log N(y; b, G C G^T + s^2 I).

    Arguments:
        operator: ``G``, shape ``(N, D)``.
        data: ``y - b``, shape ``(N,)``.
        noise_scale: ``s``.
        prior_covariance: ``C``, shape ``(D, D)``.

    Raises:
        ValueError: If shapes disagree or a covariance is not positive definite.
    """

    operator: Tensor
    data: Tensor
    mean: Tensor
    factor: Tensor
    prior: Target

    def __init__(
        self,
        operator: Tensor | Sequence[Sequence[float]],
        data: Tensor | Sequence[float],
        *,
        noise_scale: float,
        prior_covariance: Tensor | Sequence[Sequence[float]],
    ) -> None:
        matrix = checks.array("operator", operator, (None, None))
        count, dim = matrix.shape
        values = checks.array("data", data, (count,))
        noise = checks.positive("noise_scale", noise_scale, ()).item()
        covariance = checks.array("prior_covariance", prior_covariance, (dim, dim))
        prior = Gaussian(covariance.new_zeros(dim), covariance=covariance)
        marginal = torch.linalg.cholesky(matrix @ covariance @ matrix.mT + noise**2 * torch.eye(count).to(matrix))
        white = torch.linalg.solve_triangular(marginal, values.unsqueeze(-1), upper=False)
        log_evidence = -0.5 * float(white.square().sum()) - float(marginal.diagonal().log().sum())
        super().__init__(
            Euclidean(dim), log_normalizer=log_evidence - 0.5 * count * LOG_2PI, prior=prior, has_sampler=True
        )
        self.noise_scale = noise
        gain = torch.cholesky_solve(matrix @ covariance, marginal)
        posterior = covariance - (matrix @ covariance).mT @ gain
        self.register_buffer("operator", matrix)
        self.register_buffer("data", values)
        self.register_buffer("mean", gain.mT @ values)
        self.register_buffer("factor", checks.cholesky("posterior", 0.5 * (posterior + posterior.mT)))

    @classmethod
    def travel_time(cls, dim: int = 5, *, receivers: int = 10, seed: int = 0) -> LinearInversion:
        r"""Travel times to first order in the log velocities, :math:`t = \frac{1000}{v_0} h (1 - \theta)`."""
        checks.integer("dim", dim)
        lengths = ray_lengths(dim, checks.integer("receivers", receivers)) * (1000.0 / VELOCITY)
        data = _observe(-lengths @ _truth(dim, seed=seed), seed=seed)
        return cls(-lengths, data, noise_scale=NOISE, prior_covariance=_prior_covariance(dim))

    def forward_model(self, x: Tensor) -> Tensor:
        """``G x``, shape ``(..., D) -> (..., N)``."""
        return x @ self.operator.to(x).mT

    def log_prob(self, x: Tensor) -> Tensor:
        return self.prior.log_prob(x) + _log_likelihood(self.forward_model(x) - self.data.to(x), self.noise_scale)

    def log_prob_and_score(self, x: Tensor) -> tuple[Tensor, Tensor]:
        log_prior, score_prior = self.prior.log_prob_and_score(x)
        with torch.no_grad():
            residual = self.forward_model(x) - self.data.to(x)
            score = score_prior - residual @ self.operator.to(x) / self.noise_scale**2
            return log_prior + _log_likelihood(residual, self.noise_scale), score

    def sample(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        z = draws.normal(n, self.dim, generator=generator, like=self.mean)
        return self.mean.to(z) + z @ self.factor.to(z).mT


@final
class TravelTimeInversion(Target):
    r"""The posterior of log velocities given first arrivals; its normalizer is the evidence, which is not known.

    .. math:: \log\rho(\theta) = \log N(\theta; 0, C) + \sum_i \log N(t_i; t_i(\theta), s^2)

    Data are simulated from a draw of the prior. Every layer contributes up to 40 % of its travel time to the
    nonlinearity at two prior standard deviations; the posterior is unimodal.

    Arguments:
        dim: Number of layers ``D``.
        receivers: Number of arrivals.
        seed: Seed of true velocities and noise.
    """

    lengths: Tensor
    times: Tensor
    truth: Tensor
    prior: Target

    def __init__(self, dim: int = 5, *, receivers: int = 10, seed: int = 0) -> None:
        checks.integer("dim", dim)
        checks.integer("receivers", receivers)
        covariance = _prior_covariance(dim)
        super().__init__(Euclidean(dim), prior=Gaussian(covariance.new_zeros(dim), covariance=covariance))
        truth = _truth(dim, seed=seed)
        lengths = ray_lengths(dim, receivers) * (1000.0 / VELOCITY)
        self.register_buffer("lengths", lengths)
        self.register_buffer("truth", truth)
        self.register_buffer("times", _observe(lengths @ (-truth).exp(), seed=seed))

    def forward_model(self, x: Tensor) -> Tensor:
        """Travel times in milliseconds, ``(..., D) -> (..., receivers)``."""
        return (-x).exp() @ self.lengths.to(x).mT

    def log_prob(self, x: Tensor) -> Tensor:
        return self.prior.log_prob(x) + _log_likelihood(self.forward_model(x) - self.times.to(x), NOISE)

    def log_prob_and_score(self, x: Tensor) -> tuple[Tensor, Tensor]:
        log_prior, score_prior = self.prior.log_prob_and_score(x)
        with torch.no_grad():
            slowness = (-x).exp()
            residual = slowness @ self.lengths.to(x).mT - self.times.to(x)
            score = score_prior + (residual @ self.lengths.to(x)) * slowness / NOISE**2
            return log_prior + _log_likelihood(residual, NOISE), score

    def constrain(self, x: Tensor) -> dict[str, Tensor]:
        """``velocity (n, D)`` in m/s."""
        return {"velocity": VELOCITY * x.exp()}


def _log_likelihood(residual: Tensor, noise_scale: float) -> Tensor:
    count = residual.shape[-1]
    return -0.5 * (residual / noise_scale).square().sum(-1) - count * (math.log(noise_scale) + 0.5 * LOG_2PI)
