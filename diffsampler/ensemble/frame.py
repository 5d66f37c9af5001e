r"""Coordinates in which a target has mean zero and unit covariance, found from density values alone.

The map is affine, :math:`x = m + L u`, so :math:`\log\gamma(u) = \log\rho(m + L u) + \log|\det L|` has the normalizer
of the target. :func:`find_moments` draws from a Gaussian, weighs the draws by :math:`(\rho / q)^\beta` with
:math:`\beta` as large as an effective sample size allows, takes their mean and covariance, and repeats. It starts wide
and narrows, so that several modes stay covered.

References:
    Population Monte Carlo (Cappe, Guillin, Marin & Robert, 2004), https://doi.org/10.1198/106186004X12803
    The cross-entropy method (Rubinstein & Kroese, 2004), https://doi.org/10.1007/978-1-4757-4321-0
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from diffsampler.target import Target

__all__ = ["Frame", "Moments", "factor_of", "find_moments", "minimum_ess", "tempered_moments"]

MAX_ROUNDS = 150
WIDTH = 1.3
"""Proposals of the search are wider than the moments by this factor."""


class Moments(NamedTuple):
    """Mean ``(..., D)`` and covariance ``(..., D, D)`` of a weighted cloud at temperature ``beta (...)``."""

    mean: Tensor
    covariance: Tensor
    beta: Tensor


class Frame(NamedTuple):
    """The affine map ``x = location + factor u``; ``factor`` is lower triangular."""

    location: Tensor
    factor: Tensor

    def to_original(self, u: Tensor) -> Tensor:
        """``u (..., D)`` to ``x``, float64."""
        return self.location + u @ self.factor.mT

    def log_prob(self, target: Target, u: Tensor) -> Tensor:
        """Log density in the frame, ``(..., D) -> (...)`` float64; NaN and plus infinity become minus infinity."""
        with torch.no_grad():
            value = target.log_prob(self.to_original(u)).double() + self.factor.diagonal().log().sum()
        return torch.where(value < math.inf, value, torch.full_like(value, -math.inf))

    def log_prob_and_score(self, target: Target, u: Tensor) -> tuple[Tensor, Tensor]:
        """As :meth:`log_prob`, with the gradient with respect to ``u``."""
        value, score = target.log_prob_and_score(self.to_original(u))
        value = value.double() + self.factor.diagonal().log().sum()
        bad = ~(value < math.inf) | ~score.isfinite().all(-1)
        score = torch.where(bad.unsqueeze(-1), torch.zeros_like(score), score)
        return torch.where(bad, torch.full_like(value, -math.inf), value), score.double() @ self.factor


def minimum_ess(dim: int) -> float:
    """Effective sample size that a covariance in ``dim`` dimensions needs: ``max(50, 5 dim)``."""
    return max(50.0, 5.0 * dim)


def tempered_moments(y: Tensor, log_ratio: Tensor, *, ess: float) -> Moments:
    r"""Moments under the weights :math:`w^\beta`, with the largest :math:`\beta \le 1` whose ESS is at least ``ess``.

    Arguments:
        y: Points, shape ``(..., P, D)``.
        log_ratio: Log weights, shape ``(..., P)``; at least one of each row is finite.
        ess: Effective sample size, at most that of the finite points.
    """
    low, high = torch.zeros_like(log_ratio[..., :1]), torch.ones_like(log_ratio[..., :1])
    alive = log_ratio.isfinite()
    # Rows are compared at their top, so that a product with a small temperature keeps its digits.
    level = torch.where(alive, log_ratio - log_ratio.amax(-1, keepdim=True), torch.full_like(log_ratio, -math.inf))
    wanted = alive.sum(-1, keepdim=True).clamp_max(ess / 0.999) * 0.999

    def enough(beta: Tensor) -> Tensor:
        w = torch.where(alive, beta * level, level)
        return (2.0 * torch.logsumexp(w, -1, keepdim=True) - torch.logsumexp(2.0 * w, -1, keepdim=True)).exp() >= wanted

    low = torch.where(enough(high), high, low)
    for _ in range(50):
        middle = 0.5 * (low + high)
        good = enough(middle)
        low, high = torch.where(good, middle, low), torch.where(good, high, middle)
    weight = torch.softmax(torch.where(alive, low * level, level), -1)
    mean = (weight.unsqueeze(-2) @ y).squeeze(-2)
    delta = y - mean.unsqueeze(-2)
    covariance = (delta * weight.unsqueeze(-1)).mT @ delta
    return Moments(mean, covariance, low.squeeze(-1))


def factor_of(covariance: Tensor) -> Tensor:
    """Cholesky factor of a covariance, with a ridge relative to each coordinate."""
    scale = covariance.diagonal(dim1=-2, dim2=-1).clamp_min(1e-300).sqrt()
    correlation = covariance / (scale.unsqueeze(-1) * scale.unsqueeze(-2))
    eye = torch.eye(scale.shape[-1], dtype=covariance.dtype, device=covariance.device)
    return scale.unsqueeze(-1) * torch.linalg.cholesky(correlation + 1e-6 * eye)


def find_moments(
    target: Target,
    *,
    num_points: int,
    generator: torch.Generator,
    location: Tensor,
    scale: Tensor,
    tolerance: float = 0.1,
    max_rounds: int = MAX_ROUNDS,
) -> Frame:
    """Frame of a target by repeated tempered importance sampling with Gaussians.

    Arguments:
        target: The density; only ``log_prob`` is called.
        num_points: Points per round.
        generator: Source of randomness.
        location: Where the search begins, shape ``(D,)``.
        scale: Standard deviations that cover the target as seen from there, shape ``(D,)``.
        tolerance: The search has settled when, over two rounds, the mean moved by less than this many standard
            deviations and the scales changed by less than this fraction, both root mean squares over coordinates.
        max_rounds: Give up after so many.

    Raises:
        ValueError: If the density is finite at hardly any point of the first round, or the search does not settle.
    """
    dim, device = target.dim, generator.device
    begin = Frame(location.double(), torch.diag(scale.double()))
    frame = before = begin
    wanted = minimum_ess(dim)
    # Points stay in the coordinates of the beginning, each with log sum_l q_l over the rounds so far.
    points = torch.empty(0, dim, dtype=torch.float64, device=device)
    log_gamma, log_sum = points.new_empty(0), points.new_empty(0)
    rounds: list[Frame] = []
    for count in range(1, max_rounds + 1):
        relative = _relative(begin, frame)
        rounds.append(relative)
        u = WIDTH * torch.randn(num_points, dim, generator=generator, dtype=torch.float64, device=device)
        new = relative.to_original(u)
        log_sum = torch.logaddexp(log_sum, _log_gaussian(relative, points))
        log_new = torch.stack([_log_gaussian(one, new) for one in rounds]).logsumexp(0)
        points, log_sum = torch.cat([points, new]), torch.cat([log_sum, log_new])
        log_gamma = torch.cat([log_gamma, begin.log_prob(target, new)])
        log_ratio = log_gamma - log_sum
        if int(log_ratio.isfinite().sum()) < 2 * dim + 2:
            got = int(log_ratio.isfinite().sum())
            raise ValueError(f"Expected a finite density at most draws of the search; got {got} of {num_points}.")
        moments = tempered_moments(points, log_ratio, ess=wanted)
        frame = Frame(begin.to_original(moments.mean), begin.factor @ factor_of(moments.covariance))
        if count % 2 == 0:
            if _change(before, frame) < tolerance:
                return frame
            before = frame
    raise ValueError(f"Expected the moments of the target to settle within {max_rounds} rounds; they still change.")


def _relative(begin: Frame, frame: Frame) -> Frame:
    """``frame`` as seen in the coordinates of ``begin``, which has a diagonal factor."""
    scale = begin.factor.diagonal()
    return Frame((frame.location - begin.location) / scale, frame.factor / scale.unsqueeze(-1))


def _log_gaussian(frame: Frame, x: Tensor) -> Tensor:
    """Log density of the search's proposal at ``x (n, D)``, up to a constant."""
    z = torch.linalg.solve_triangular(frame.factor, (x - frame.location).mT, upper=False)
    return -0.5 * z.square().sum(0) / WIDTH**2 - frame.factor.diagonal().log().sum()


def _change(before: Frame, after: Frame) -> float:
    """Largest of the moves of the mean, in standard deviations, and of the log scales; root mean squares."""
    ratio = torch.linalg.solve_triangular(before.factor, after.factor, upper=False).diagonal()
    delta = (after.location - before.location).unsqueeze(-1)
    shift = torch.linalg.solve_triangular(before.factor, delta, upper=False)
    return max(float(ratio.log().square().mean().sqrt()), float(shift.square().mean().sqrt()))
