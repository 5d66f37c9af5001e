r"""Fifteen posteriors of posteriordb as Pyro models: the same parameters, priors and likelihoods as the Stan programs.

A parameter without a prior in Stan is flat on its support (``ImproperUniform``, a flat law says nothing about the
evidence); ``sigma ~ normal(0, 2)`` with a lower bound of zero is half-normal. Constants that Stan drops are kept here.
A recursion :math:`s_t = r_t + a s_{t-1}` is evaluated in :math:`\log_2 T` doublings instead of :math:`T` steps.

References:
    posteriordb: Testing, Benchmarking and Developing Bayesian Inference Algorithms (Magnusson et al., 2024),
    https://arxiv.org/abs/2407.04967, programs at https://github.com/stan-dev/posteriordb
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from posteriordb_data import TYPED_IN, Reference, read_data
from pyro.distributions import constraints
from torch import Tensor

from diffsampler.integrations.examples import eight_schools_noncentered
from diffsampler.integrations.pyro import PyroTarget

__all__ = ["POSTERIORS", "Posterior", "build", "latents_of", "parameters", "stein"]


class PositiveNormal(dist.TorchDistribution):
    r"""The normal law given that it is positive, :math:`p(x) = N(x; \mu, \sigma^2) / \Phi(\mu / \sigma)`."""

    arg_constraints = {"loc": constraints.real, "scale": constraints.positive}
    support = constraints.positive
    has_rsample = True

    def __init__(self, loc: Tensor, scale: Tensor, *, validate_args: bool | None = None) -> None:
        self.loc, self.scale = torch.broadcast_tensors(loc, scale)
        super().__init__(self.loc.shape, validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> PositiveNormal:
        return PositiveNormal(self.loc.expand(batch_shape), self.scale.expand(batch_shape), validate_args=False)

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        uniform = torch.rand(self._extended_shape(sample_shape), dtype=self.loc.dtype, device=self.loc.device)
        below = torch.special.ndtr(-self.loc / self.scale)
        return self.loc + self.scale * torch.special.ndtri(below + uniform * (1.0 - below))

    def log_prob(self, value: Tensor) -> Tensor:
        z = (value - self.loc) / self.scale
        return (
            -0.5 * z.square()
            - self.scale.log()
            - 0.5 * math.log(2.0 * math.pi)
            - torch.special.log_ndtr(self.loc / self.scale)
        )


def flat(name: str, support: Any = constraints.real, *, size: int | None = None) -> Tensor:
    """A parameter without a prior."""
    event = () if size is None else (size,)
    return pyro.sample(name, dist.ImproperUniform(support, (), event))


def vector(name: str, law: Any, size: int) -> Tensor:
    return pyro.sample(name, law.expand([size]).to_event(1))


def observe(name: str, law: Any, value: Tensor) -> None:
    pyro.sample(name, law.to_event(1), obs=value)


def recursion(rows: Tensor, factor: Tensor) -> Tensor:
    r"""Solve :math:`s_t = r_t + a s_{t-1}` with :math:`s_0 = r_0`, for the last axis of ``rows``.

    The inverse of :math:`1 - aS`, with :math:`S` the shift, is :math:`\prod_k (1 + a^{2^k} S^{2^k})`.
    """
    shift = 1
    while shift < rows.shape[-1]:
        rows = rows + factor**shift * torch.nn.functional.pad(rows[..., :-shift], (shift, 0))
        shift *= 2
    return rows


def regression(y: Tensor, x: Tensor, sigma_prior: Any) -> None:
    """Normal regression with flat coefficients."""
    beta = flat("beta", size=x.shape[-1])
    sigma = flat("sigma", constraints.positive) if sigma_prior is None else pyro.sample("sigma", sigma_prior)
    observe("y", dist.Normal(x @ beta, sigma), y)


def blr(y: Tensor, x: Tensor) -> None:
    beta = vector("beta", dist.Normal(0.0, 10.0), x.shape[-1])
    sigma = pyro.sample("sigma", dist.HalfNormal(10.0))
    observe("y", dist.Normal(x @ beta, sigma), y)


def kilpisjarvi(y: Tensor, x: Tensor, alpha_prior: Any, beta_prior: Any) -> None:
    alpha = pyro.sample("alpha", alpha_prior)
    beta = pyro.sample("beta", beta_prior)
    sigma = flat("sigma", constraints.positive)
    observe("y", dist.Normal(alpha + beta * x, sigma), y)


def autoregression(y: Tensor, order: int) -> None:
    alpha = pyro.sample("alpha", dist.Normal(0.0, 10.0))
    beta = vector("beta", dist.Normal(0.0, 10.0), order)
    sigma = pyro.sample("sigma", dist.HalfCauchy(2.5))
    past = torch.stack([y[order - k : len(y) - k] for k in range(1, order + 1)], -1)
    observe("y", dist.Normal(alpha + past @ beta, sigma), y[order:])


def arma(y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
    phi = pyro.sample("phi", dist.Normal(0.0, 2.0))
    theta = pyro.sample("theta", dist.Normal(0.0, 2.0))
    sigma = pyro.sample("sigma", dist.HalfCauchy(2.5))
    # Before the first observation the series is at mu and the error zero.
    residual = torch.cat([(y[0] - mu - phi * mu).unsqueeze(-1), y[1:] - mu - phi * y[:-1]], -1)
    error = recursion(residual, -theta)
    pyro.factor("y", dist.Normal(0.0, sigma).log_prob(error).sum(-1))


def garch(y: Tensor, sigma1: Tensor) -> None:
    mu = flat("mu")
    alpha0 = flat("alpha0", constraints.positive)
    alpha1 = flat("alpha1", constraints.unit_interval)
    beta1 = flat("beta1", constraints.interval(torch.zeros_like(alpha1), 1.0 - alpha1))
    shock = alpha0 + alpha1 * (y[:-1] - mu).square()
    variance = recursion(torch.cat([sigma1.square().expand(1), shock], -1), beta1)
    observe("y", dist.Normal(mu, variance.sqrt()), y)


def squared_exponential(x: Tensor, alpha: Tensor, rho: Tensor, noise: Tensor) -> Tensor:
    """Cholesky factor of the covariance with variance ``noise`` added."""
    distance = (x[:, None] - x) / rho
    covariance = alpha.square() * torch.exp(-0.5 * distance.square()) + noise * torch.eye(len(x), dtype=x.dtype)
    return torch.linalg.cholesky(covariance)


def gp_regression(y: Tensor, x: Tensor) -> None:
    rho = pyro.sample("rho", dist.Gamma(25.0, 4.0))
    alpha = pyro.sample("alpha", dist.HalfNormal(2.0))
    # The Stan program adds sigma, not its square, to the diagonal.
    sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
    tril = squared_exponential(x, alpha, rho, sigma)
    pyro.sample("y", dist.MultivariateNormal(torch.zeros_like(x), scale_tril=tril), obs=y)


def gp_poisson(k: Tensor, x: Tensor) -> None:
    rho = pyro.sample("rho", dist.Gamma(25.0, 4.0))
    alpha = pyro.sample("alpha", dist.HalfNormal(2.0))
    f_tilde = vector("f_tilde", dist.Normal(0.0, 1.0), len(x))
    tril = squared_exponential(x, alpha, rho, x.new_tensor(1e-10))
    f = pyro.deterministic("f", tril @ f_tilde, event_dim=1)
    observe("k", dist.Poisson(f.exp()), k)


def populations(theta: Tensor, start: Tensor, years: int, *, steps: int = 5) -> Tensor:
    r"""Log populations of the Lotka-Volterra system at years 1, 2, ..., shape ``(years, 2)``.

    In logs the system reads :math:`\dot p = \alpha - \beta e^q, \dot q = -\gamma + \delta e^p`. Runge-Kutta steps of
    order 4: the log posterior is right to 0.003 at every one of the reference draws.
    """
    rate = torch.stack([theta[0], -theta[2]])
    coupling = torch.stack([-theta[1], theta[3]])

    def slope(state: Tensor) -> Tensor:
        return rate + coupling * state.flip(-1).exp()

    state, found, h = start.log(), [], 1.0 / steps
    for _ in range(years):
        for _ in range(steps):
            k1 = slope(state)
            k2 = slope(state + 0.5 * h * k1)
            k3 = slope(state + 0.5 * h * k2)
            k4 = slope(state + h * k3)
            # Rates far out in the prior leave the range of numbers; there the data are impossible anyway.
            state = (state + h / 6.0 * (k1 + 2.0 * k2 + 2.0 * k3 + k4)).clamp(-50.0, 12.0)
        found.append(state)
    return torch.stack(found)


def lotka_volterra(y_init: Tensor, y: Tensor) -> None:
    loc, scale = y.new_tensor([1.0, 0.05, 1.0, 0.05]), y.new_tensor([0.5, 0.05, 0.5, 0.05])
    theta = pyro.sample("theta", PositiveNormal(loc, scale).to_event(1))
    z_init = vector("z_init", dist.LogNormal(math.log(10.0), 1.0), 2)
    sigma = vector("sigma", dist.LogNormal(-1.0, 1.0), 2)
    observe("y_init", dist.LogNormal(z_init.log(), sigma), y_init)
    pyro.sample("y", dist.LogNormal(populations(theta, z_init, len(y)), sigma).to_event(2), obs=y)


def two_normals(y: Tensor) -> None:
    mu = flat("mu", constraints.ordered_vector, size=2)
    sigma = vector("sigma", dist.HalfNormal(2.0), 2)
    theta = pyro.sample("theta", dist.Beta(5.0, 5.0))
    pyro.factor("mu_prior", dist.Normal(0.0, 2.0).log_prob(mu).sum(-1))
    weight = dist.Categorical(torch.stack([theta, 1.0 - theta], -1))
    observe("y", dist.MixtureSameFamily(weight, dist.Normal(mu, sigma)).expand([len(y)]), y)


Data = dict[str, Any]


def tensor(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def columns(data: Data, *names: str) -> Tensor:
    """A constant and the named columns, shape ``(n, 1 + len(names))``."""
    found = [tensor(data[name]) for name in names]
    return torch.stack([torch.ones_like(found[0]), *found], -1)


def _earnings(data: Data) -> PyroTarget:
    x = columns(data, "height", "male")
    x = torch.cat([x, (x[:, 1] * x[:, 2]).unsqueeze(-1)], -1)
    return PyroTarget(regression, tensor(data["earn"]).log(), x, None)


def _kid_interaction(data: Data) -> PyroTarget:
    x = columns(data, "mom_hs", "mom_iq")
    x = torch.cat([x, (x[:, 1] * x[:, 2]).unsqueeze(-1)], -1)
    return PyroTarget(regression, tensor(data["kid_score"]), x, dist.HalfCauchy(2.5))


def _kid(data: Data) -> PyroTarget:
    return PyroTarget(regression, tensor(data["kid_score"]), columns(data, "mom_hs", "mom_iq"), dist.HalfCauchy(2.5))


def _mesquite(data: Data) -> PyroTarget:
    x = columns(data, "diam1", "diam2", "canopy_height", "total_height", "density", "group")
    x = torch.cat([x[:, :1], x[:, 1:6].log(), x[:, 6:]], -1)
    return PyroTarget(regression, tensor(data["weight"]).log(), x, None)


def _nes(data: Data) -> PyroTarget:
    age = tensor(data["age_discrete"])
    groups = {f"age{level}": (age == level).double().tolist() for level in (2, 3, 4)}
    x = columns({**data, **groups}, "real_ideo", "race_adj", *groups, "educ1", "gender", "income")
    return PyroTarget(regression, tensor(data["partyid7"]), x, None)


def _kilpisjarvi(data: Data) -> PyroTarget:
    alpha = dist.Normal(data["pmualpha"], data["psalpha"])
    beta = dist.Normal(float(data["pmubeta"]), data["psbeta"])
    return PyroTarget(kilpisjarvi, tensor(data["y"]), tensor(data["x"]), alpha, beta)


class Posterior(NamedTuple):
    """A posterior of posteriordb."""

    data: str
    kind: str
    build: Callable[[Data], PyroTarget]


POSTERIORS: dict[str, Posterior] = {
    "earnings-logearn_interaction": Posterior("earnings", "regression", _earnings),
    "kidiq-kidscore_interaction": Posterior("kidiq", "regression", _kid_interaction),
    "kidiq-kidscore_momhsiq": Posterior("kidiq", "regression", _kid),
    "mesquite-logmesquite": Posterior("mesquite", "regression", _mesquite),
    "nes1972-nes": Posterior("nes1972", "regression", _nes),
    "sblrc-blr": Posterior("sblrc", "regression", lambda d: PyroTarget(blr, tensor(d["y"]), tensor(d["X"]))),
    "kilpisjarvi_mod-kilpisjarvi": Posterior("kilpisjarvi_mod", "regression", _kilpisjarvi),
    "eight_schools-eight_schools_noncentered": Posterior(
        "eight_schools",
        "hierarchical",
        lambda d: PyroTarget(eight_schools_noncentered, tensor(d["y"]), tensor(d["sigma"])),
    ),
    "arK-arK": Posterior("arK", "time series", lambda d: PyroTarget(autoregression, tensor(d["y"]), 5)),
    "arma-arma11": Posterior("arma", "time series", lambda d: PyroTarget(arma, tensor(d["y"]))),
    "garch-garch11": Posterior(
        "garch", "time series", lambda d: PyroTarget(garch, tensor(d["y"]), tensor(d["sigma1"]))
    ),
    "gp_pois_regr-gp_regr": Posterior(
        "gp_pois_regr", "Gaussian process", lambda d: PyroTarget(gp_regression, tensor(d["y"]), tensor(d["x"]))
    ),
    "gp_pois_regr-gp_pois_regr": Posterior(
        "gp_pois_regr", "Gaussian process", lambda d: PyroTarget(gp_poisson, tensor(d["k"]), tensor(d["x"]))
    ),
    "hudson_lynx_hare-lotka_volterra": Posterior(
        "hudson_lynx_hare", "ODE", lambda d: PyroTarget(lotka_volterra, tensor(d["y_init"]), tensor(d["y"]))
    ),
    "low_dim_gauss_mix-low_dim_gauss_mix": Posterior(
        "low_dim_gauss_mix", "mixture", lambda d: PyroTarget(two_normals, tensor(d["y"]))
    ),
}
WITHOUT_FILES = tuple(name for name, posterior in POSTERIORS.items() if posterior.data in TYPED_IN)
"""Posteriors that need no folder of data."""


def build(name: str, folder: Path | None = None) -> PyroTarget:
    """A posterior as a target; its data are read from a folder unless they are typed in."""
    posterior = POSTERIORS[name]
    return posterior.build(read_data(posterior.data, folder))


def parameters(target: PyroTarget, x: Tensor, names: list[str]) -> Tensor:
    """Values of Stan's scalar parameters at unconstrained points ``(n, D)``, shape ``(n, len(names))``, float64."""
    values = target.constrain(x.double(), deterministic=True)
    return torch.stack([_entry(values, name) for name in names], -1)


def _entry(values: dict[str, Tensor], name: str) -> Tensor:
    site, _, index = name.partition("[")
    value = values[site]
    return value[:, int(index[:-1]) - 1] if index else value


def latents_of(name: str, reference: Reference) -> dict[str, Tensor] | None:
    """Reference draws as values of the model's latent sites; None where they do not determine them precisely."""
    draws = torch.from_numpy(reference.draws)
    sites: dict[str, list[Tensor]] = {}
    for column, full in zip(draws.mT, reference.names, strict=True):
        sites.setdefault(full.partition("[")[0], []).append(column)
    values = {
        site: torch.stack(found, -1) if any(full.startswith(f"{site}[") for full in reference.names) else found[0]
        for site, found in sites.items()
    }
    if name == "eight_schools-eight_schools_noncentered":
        theta = values.pop("theta")
        values["z"] = (theta - values["mu"].unsqueeze(-1)) / values["tau"].unsqueeze(-1)
    if name == "gp_pois_regr-gp_pois_regr":
        if not reference.exact:
            # The covariance is too ill-conditioned for draws in single precision.
            return None
        x = tensor(TYPED_IN["gp_pois_regr"]["x"])
        alpha, rho = (values[site][:, None, None] for site in ("alpha", "rho"))
        tril = squared_exponential(x, alpha, rho, x.new_tensor(1e-10))
        f = values.pop("f").unsqueeze(-1)
        values["f_tilde"] = torch.linalg.solve_triangular(tril, f, upper=False).squeeze(-1)
    return values


def stein(target: PyroTarget, values: dict[str, Tensor]) -> float:
    r"""Largest z-score of Stein's identities under reference draws: is this the density that they were drawn from?

    .. math:: E[\nabla \log p(x)] = 0, \qquad E[\tilde x_i \partial_i \log p(x)] = -1, \qquad \tilde x = x - E[x]
    """
    x = target.unconstrain(values)
    _, score = target.log_prob_and_score(x)
    centred = x - x.mean(0)
    terms = torch.cat([score, centred * score + 1.0], -1)
    return float((terms.mean(0) / (terms.std(0) / math.sqrt(len(x)))).abs().max())
