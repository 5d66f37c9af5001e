"""The posterior of a mixture's means: as many equal modes as there are orders of the components."""

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

__all__ = ["LabelSwitching"]

LOG_2PI = math.log(2.0 * math.pi)
MOST_ALLOCATIONS = 2_000_000
DATA = (-6.3, -5.6, -2.4, -1.5, 1.7, 2.6, 2.0, 5.5, 6.4)


@final
class LabelSwitching(Target):
    r"""Posterior of the unknown means of a mixture of Gaussians with equal weights and known scale.

    .. math:: \log\rho(\mu) = \sum_i \log \frac1K \sum_k N(y_i; \mu_k, s^2) + \sum_k \log N(\mu_k; 0, \tau^2)

    The density is symmetric under exchange of the means, so that its :math:`K!` orders are exactly equally likely; mode
    labels number the orders. Multiplied out it is a mixture of Gaussians over the :math:`K^n` allocations of the data,
    which gives the normalizer and exact draws for a few data points. ``prior`` is the Gaussian prior.

    Arguments:
        data: Observations :math:`y`, shape ``(n,)``; by default nine numbers in four clusters.
        components: Number ``K`` of means, the dimension.
        scale: Standard deviation :math:`s` of a component.
        prior_scale: Standard deviation :math:`\tau` of the prior.

    Raises:
        ValueError: If there are more than two million allocations, or a number is out of range.
    """

    data: Tensor
    log_shares: Tensor

    def __init__(
        self,
        data: Tensor | Sequence[float] = DATA,
        *,
        components: int = 4,
        scale: float = 1.0,
        prior_scale: float = 6.0,
    ) -> None:
        observed = checks.array("data", data, (None,))
        checks.integer("components", components, minimum=2)
        count = components ** len(observed)
        if count > MOST_ALLOCATIONS:
            raise ValueError(f"Expected at most {MOST_ALLOCATIONS} allocations, components ** len(data); got {count}.")
        noise, tau = (checks.positive(n, v, ()).item() for n, v in (("scale", scale), ("prior_scale", prior_scale)))
        log_shares = _log_shares(observed, components, noise, tau)
        law = Gaussian(torch.zeros(components), scale=tau)
        super().__init__(
            Euclidean(components),
            log_normalizer=float(torch.logsumexp(log_shares, 0)),
            prior=law,
            num_modes=math.factorial(components),
            has_sampler=True,
        )
        self.noise, self.tau, self.law = noise, tau, law
        self.register_buffer("data", observed)
        self.register_buffer("log_shares", log_shares)

    def log_prob(self, x: Tensor) -> Tensor:
        return self.law.log_prob(x) + torch.logsumexp(self._log_components(x), -1).sum(-1)

    def log_prob_and_score(self, x: Tensor) -> tuple[Tensor, Tensor]:
        log_prior, score_prior = self.law.log_prob_and_score(x)
        with torch.no_grad():
            parts = self._log_components(x)
            share = torch.softmax(parts, -1)
            delta = self.data.to(x).unsqueeze(-1) - x.unsqueeze(-2)
            score = (share * delta).sum(-2) / self.noise**2
            return log_prior + torch.logsumexp(parts, -1).sum(-1), score_prior + score

    def sample(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        u = draws.uniform(n, generator=generator, like=self.data)
        cumulative = torch.softmax(self.log_shares.to(u), 0).cumsum(0)
        # The last edge is left out, so rounding in the sum cannot lead past the last allocation.
        code = torch.searchsorted(cumulative[:-1], u, right=True)
        size, total, _ = _statistics(self.data.to(u), _digits(code, self.dim, len(self.data)), self.dim)
        variance = 1.0 / (1.0 / self.tau**2 + size / self.noise**2)
        z = draws.normal(n, self.dim, generator=generator, like=u)
        return variance * total / self.noise**2 + variance.sqrt() * z

    def mode_labels(self, x: Tensor) -> Tensor:
        order = x.argsort(-1)
        later = order.unsqueeze(-2) < order.unsqueeze(-1)
        # Lehmer code: how many later entries are smaller.
        smaller = torch.triu(later, diagonal=1).sum(-1)
        place = [math.factorial(self.dim - 1 - k) for k in range(self.dim)]
        return (smaller * torch.tensor(place, device=x.device)).sum(-1)

    def mode_weights(self) -> Tensor:
        modes = math.factorial(self.dim)
        return self.data.new_full((modes,), 1.0 / modes)

    def _log_components(self, x: Tensor) -> Tensor:
        """Log of ``N(y_i; mu_k, s^2) / K``, shape ``(..., n, K)``."""
        z = (self.data.to(x).unsqueeze(-1) - x.unsqueeze(-2)) / self.noise
        return -0.5 * z.square() - math.log(self.noise * self.dim) - 0.5 * LOG_2PI


def _digits(code: Tensor, base: int, length: int) -> Tensor:
    """Component of each data point, ``(m, length)``, from the number of an allocation."""
    powers = base ** torch.arange(length, device=code.device)
    return (code.unsqueeze(-1) // powers) % base


def _statistics(data: Tensor, allocation: Tensor, components: int) -> tuple[Tensor, Tensor, Tensor]:
    """Number, sum and sum of squares of the data of each component, each ``(m, K)``."""
    member = torch.nn.functional.one_hot(allocation, components).to(data)
    values = data.unsqueeze(-1)
    return member.sum(1), (member * values).sum(1), (member * values.square()).sum(1)


def _log_shares(data: Tensor, components: int, noise: float, tau: float) -> Tensor:
    """Log of the part of the normalizer that belongs to each allocation, ``(K ** n,)``."""
    n = len(data)
    parts = []
    for code in torch.arange(components**n, device=data.device).split(65_536):
        size, total, square = _statistics(data, _digits(code, components, n), components)
        variance = 1.0 / (1.0 / tau**2 + size / noise**2)
        exponent = 0.5 * variance * (total / noise**2).square() - 0.5 * square / noise**2
        parts.append((0.5 * (variance / tau**2).log() + exponent).sum(-1))
    return torch.cat(parts) - n * (math.log(components * noise) + 0.5 * LOG_2PI)
