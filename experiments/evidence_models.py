"""Pyro models of dimension 1 to 20 whose evidence is known in closed form or by quadrature.

Conjugate: a binomial rate, a Poisson rate, a mean with unknown variance, category shares, linear regressions with known
and with unknown noise. By quadrature: a logistic regression with two weights, a hierarchical model and eight schools,
whose group effects and common mean are integrated out exactly. Data are simulated with fixed seeds or typed in.

References:
    Bayesian Data Analysis (Gelman et al., 2013), chapters 2, 3 and 14, http://www.stat.columbia.edu/~gelman/book/
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from diffsampler.integrations.examples import EFFECTS, ERRORS, eight_schools
from diffsampler.integrations.pyro import PyroTarget

__all__ = ["KNOWN", "Known"]


class Known(NamedTuple):
    """A model with its evidence."""

    build: Callable[[], PyroTarget]
    evidence: Callable[[], float]
    dim: int
    how: str


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def log_beta(a: float, b: float) -> float:
    return math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)


def gaussian_log_density(y: Tensor, covariance: Tensor) -> float:
    return float(torch.distributions.MultivariateNormal(torch.zeros_like(y), covariance).log_prob(y))


def tosses(heads: Tensor, trials: Tensor) -> None:
    rate = pyro.sample("rate", dist.Beta(2.0, 3.0))
    pyro.sample("heads", dist.Binomial(trials, rate).to_event(1), obs=heads)


HEADS, TRIALS = torch.tensor([3.0, 5.0, 2.0]).double(), torch.tensor([10.0, 12.0, 9.0]).double()


def tosses_evidence() -> float:
    hits, n = float(HEADS.sum()), float(TRIALS.sum())
    ways = (TRIALS + 1).lgamma() - (HEADS + 1).lgamma() - (TRIALS - HEADS + 1).lgamma()
    return float(ways.sum()) + log_beta(2.0 + hits, 3.0 + n - hits) - log_beta(2.0, 3.0)


def counts(y: Tensor) -> None:
    rate = pyro.sample("rate", dist.Gamma(0.5, 0.1))
    pyro.sample("y", dist.Poisson(rate).expand(y.shape).to_event(1), obs=y)


COUNTS = torch.tensor([2.0, 3.0, 1.0, 4.0, 2.0, 0.0, 3.0, 2.0]).double()


def counts_evidence() -> float:
    total, n = float(COUNTS.sum()), len(COUNTS)
    scale = 0.5 * math.log(0.1) - (0.5 + total) * math.log(0.1 + n)
    return scale + math.lgamma(0.5 + total) - math.lgamma(0.5) - float((COUNTS + 1).lgamma().sum())


def linear_unknown_noise(x: Tensor, y: Tensor) -> None:
    variance = pyro.sample("variance", dist.InverseGamma(3.0, 4.0))
    deviation = variance.sqrt().unsqueeze(-1)
    beta = pyro.sample("beta", dist.Normal(0.0, 2.0 * deviation).expand([x.shape[-1]]).to_event(1))
    pyro.sample("y", dist.Normal(x @ beta, deviation).to_event(1), obs=y)


def unknown_noise_data(dim: int) -> tuple[Tensor, Tensor]:
    """Intercept and ``dim - 2`` features; one parameter is the variance."""
    x = torch.cat([torch.ones(25, 1).double(), normal(25, dim - 2, seed=dim)], -1)
    return x, x @ normal(dim - 1, seed=100 + dim) + 1.3 * normal(25, seed=200 + dim)


def unknown_noise_evidence(dim: int) -> float:
    """A multivariate Student law with 6 degrees of freedom."""
    x, y = unknown_noise_data(dim)
    shape = (torch.eye(len(y)).double() + 4.0 * x @ x.mT) * 4.0 / 3.0
    tril = torch.linalg.cholesky(shape)
    return float(pyro.distributions.MultivariateStudentT(torch.tensor(6.0), torch.zeros_like(y), tril).log_prob(y))


def linear(x: Tensor, y: Tensor) -> None:
    beta = pyro.sample("beta", dist.Normal(0.0, 3.0).expand([x.shape[-1]]).to_event(1))
    pyro.sample("y", dist.Normal(x @ beta, 1.0).to_event(1), obs=y)


def linear_data(dim: int) -> tuple[Tensor, Tensor]:
    """Features that share a common part, so that weights are correlated."""
    x = normal(2 * dim, dim, seed=dim) + 2.0 * normal(2 * dim, 1, seed=100 + dim)
    return x, x @ normal(dim, seed=200 + dim) + normal(2 * dim, seed=300 + dim)


def linear_evidence(dim: int) -> float:
    x, y = linear_data(dim)
    return gaussian_log_density(y, 9.0 * x @ x.mT + torch.eye(len(y)).double())


def categories(y: Tensor) -> None:
    share = pyro.sample("share", dist.Dirichlet(torch.ones(len(y), dtype=y.dtype)))
    # Multinomial itself cannot be batched by torch.func.vmap.
    ways = (y.sum() + 1).lgamma() - (y + 1).lgamma().sum()
    pyro.factor("y", ways + (y * share.log()).sum(-1))


CATEGORIES = torch.tensor([12.0, 3.0, 0.0, 7.0, 1.0, 5.0]).double()


def categories_evidence() -> float:
    """Every table of counts is as probable as every other."""
    n, k = int(CATEGORIES.sum()), len(CATEGORIES)
    return -math.log(math.comb(n + k - 1, k - 1))


def logistic(x: Tensor, y: Tensor) -> None:
    beta = pyro.sample("beta", dist.Normal(0.0, 2.5).expand([2]).to_event(1))
    pyro.sample("y", dist.Bernoulli(logits=x @ beta).to_event(1), obs=y)


def logistic_data() -> tuple[Tensor, Tensor]:
    x = torch.cat([torch.ones(30, 1).double(), normal(30, 1, seed=1)], -1)
    return x, (x @ torch.tensor([0.5, 1.5]).double() + normal(30, seed=2) > 0.0).double()


def logistic_evidence() -> float:
    x, y = logistic_data()
    line = torch.linspace(-10.0, 14.0, 1201, dtype=torch.float64)
    grid = torch.cartesian_prod(line, line)
    log_density = dist.Normal(0.0, 2.5).log_prob(grid).sum(-1)
    for row, label in zip(x, y, strict=True):
        log_density = log_density + torch.nn.functional.logsigmoid((2.0 * label - 1.0) * (grid @ row))
    return float(torch.logsumexp(log_density, 0)) + 2.0 * math.log(24.0 / 1200)


def groups(y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    tau = pyro.sample("tau", dist.HalfNormal(1.0))
    with pyro.plate("group", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, 0.5), obs=y)


GROUPS = torch.tensor([0.5, -0.3, 1.2]).double()


def scale_quadrature(y: Tensor, noise: Tensor, mean_scale: float, log_prior: Callable[[Tensor], Tensor]) -> float:
    """Group effects and their mean integrated out, the scale over a fine grid of its logarithm."""
    log_tau = torch.linspace(-14.0, 9.0, 20_001, dtype=torch.float64)
    tau = log_tau.exp()
    ones = torch.ones(len(y), len(y)).double()
    covariance = torch.diag_embed(noise.square() + tau.square()[:, None]) + mean_scale**2 * ones
    law = torch.distributions.MultivariateNormal(torch.zeros_like(y), covariance)
    return float(torch.logsumexp(law.log_prob(y) + log_prior(tau) + log_tau, 0)) + math.log(23.0 / 20_000)


def groups_evidence() -> float:
    return scale_quadrature(GROUPS, torch.full((3,), 0.5).double(), 2.0, dist.HalfNormal(1.0).log_prob)


def schools_evidence() -> float:
    effects, errors = torch.tensor(EFFECTS).double(), torch.tensor(ERRORS).double()
    return scale_quadrature(effects, errors, 5.0, dist.HalfCauchy(5.0).log_prob)


def _linear(dim: int) -> Known:
    return Known(lambda: PyroTarget(linear, *linear_data(dim)), lambda: linear_evidence(dim), dim, "conjugate")


def _unknown_noise(dim: int) -> Known:
    return Known(
        lambda: PyroTarget(linear_unknown_noise, *unknown_noise_data(dim)),
        lambda: unknown_noise_evidence(dim),
        dim,
        "conjugate",
    )


KNOWN: dict[str, Known] = {
    "binomial": Known(lambda: PyroTarget(tosses, HEADS, TRIALS), tosses_evidence, 1, "conjugate"),
    "poisson": Known(lambda: PyroTarget(counts, COUNTS), counts_evidence, 1, "conjugate"),
    "logistic": Known(lambda: PyroTarget(logistic, *logistic_data()), logistic_evidence, 2, "quadrature"),
    "regression3": _unknown_noise(3),
    "multinomial": Known(lambda: PyroTarget(categories, CATEGORIES), categories_evidence, 5, "conjugate"),
    "hierarchical": Known(lambda: PyroTarget(groups, GROUPS), groups_evidence, 5, "quadrature"),
    "regression8": _unknown_noise(8),
    "schools": Known(eight_schools, schools_evidence, 10, "quadrature"),
    "linear10": _linear(10),
    "linear20": _linear(20),
}
