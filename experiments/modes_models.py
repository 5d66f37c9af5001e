r"""Multimodal posteriors as Pyro models, each with the exact weights of its modes.

* Mixtures of two and three normals for the galaxy velocities: the labels of the components are exchangeable, so that
  all :math:`K!` orders of the means have the same weight.
* Period of a variable star observed at night only, two months of one season: one-day aliases explain the data about as
  well. Given the frequency the model is linear in its two amplitudes, which are integrated out exactly; the
  frequency by quadrature.
* Location with two groups of discordant measurements and heavy-tailed errors, by quadrature.
* Two blocks of three tests that measure one ability each: the sign of the ability is not identified, four modes.
* Moving average of order one: :math:`(\theta, \sigma)` and :math:`(1 / \theta, |\theta| \sigma)` have the same
  likelihood, so that the priors alone decide; by quadrature.
* Positions of four sensors from noisy distances, some of them to anchors: reflections fit nearly as well. The reference
  is a long run of tempered SMC.

All data but the galaxies are simulated with fixed seeds.

References:
    Nonparametric belief propagation for self-localization of sensor networks (Ihler et al., 2005),
    https://doi.org/10.1109/JSAC.2005.843548
    Bayesian spectral analysis and parameter estimation (Bretthorst, 1988), https://doi.org/10.1007/978-1-4684-9399-3
    Dealing with label switching in mixture models (Stephens, 2000), https://doi.org/10.1111/1467-9868.00265
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from diffsampler.integrations.examples import galaxies, labelling
from diffsampler.integrations.pyro import PyroTarget

__all__ = ["MULTIMODAL", "Multimodal", "shares"]

Values = dict[str, Tensor]


class Multimodal(NamedTuple):
    """A posterior with modes."""

    build: Callable[[], PyroTarget]
    label: Callable[[Values], Tensor]
    """Mode of each draw: named values ``(n, *event)`` to integers ``(n,)``."""
    truth: Callable[[], Tensor] | None
    """Exact weights of the modes, or None where a long run is the reference."""
    modes: int


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def uniform(*shape: int, seed: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def shares(labels: Tensor, weight: Tensor, modes: int) -> Tensor:
    """Weight of each mode; whatever has no label (-1) counts for none."""
    weight = weight.double() / weight.double().sum()
    return torch.zeros(modes + 1, dtype=torch.float64).index_add(0, labels.remainder(modes + 1), weight)[:modes]


# Variable star.
LOWEST, HIGHEST, AMPLITUDE, NOISE = 0.1, 2.1, 2.0, 1.0
FREQUENCY = 0.74


def nights() -> tuple[Tensor, Tensor]:
    """Times in days, within three hours about midnight, and magnitudes."""
    night = (60.0 * uniform(11, seed=2)).floor().sort().values
    time = night + 0.125 * (uniform(11, seed=3) - 0.5)
    phase = 2.0 * math.pi * FREQUENCY * time
    return time, 1.6 * phase.cos() + 0.5 * phase.sin() + NOISE * normal(11, seed=4)


def star(time: Tensor, y: Tensor) -> None:
    frequency = pyro.sample("frequency", dist.Uniform(LOWEST, HIGHEST))
    a = pyro.sample("a", dist.Normal(0.0, AMPLITUDE))
    b = pyro.sample("b", dist.Normal(0.0, AMPLITUDE))
    phase = 2.0 * math.pi * frequency * time
    pyro.sample("y", dist.Normal(a * phase.cos() + b * phase.sin(), NOISE).to_event(1), obs=y)


def star_label(values: Values) -> Tensor:
    """A mode is a quarter of a cycle per day wide, from 0.125 on; the aliases of one frequency differ by one."""
    return ((values["frequency"] - 0.1) / 0.25).floor().long().clamp(0, 7)


def star_truth() -> Tensor:
    time, y = nights()
    frequency = torch.linspace(LOWEST, HIGHEST, 200_001, dtype=torch.float64)
    phase = 2.0 * math.pi * frequency[:, None] * time
    basis = torch.stack([phase.cos(), phase.sin()], -1)
    # Evidence of the two amplitudes: y ~ N(0, s^2 I + A^2 B B'), by the matrix determinant lemma.
    inner = torch.eye(2).double() * NOISE**2 / AMPLITUDE**2 + basis.mT @ basis
    projected = (basis.mT @ y).unsqueeze(-1)
    fit = (projected.mT @ torch.linalg.solve(inner, projected)).squeeze((-1, -2))
    log_density = 0.5 * fit / NOISE**2 - 0.5 * torch.linalg.slogdet(inner).logabsdet
    return shares(star_label({"frequency": frequency}), torch.softmax(log_density, 0), 8)


# Discordant measurements.
GROUPS = torch.cat([0.3 + 0.25 * normal(5, seed=5), 14.0 + 0.25 * normal(5, seed=6)])


def discordant(y: Tensor) -> None:
    location = pyro.sample("location", dist.Normal(0.0, 20.0))
    scale = pyro.sample("scale", dist.LogNormal(-1.0, 0.5))
    pyro.sample("y", dist.StudentT(2.0, location, scale).expand(y.shape).to_event(1), obs=y)


def discordant_label(values: Values) -> Tensor:
    return (values["location"] > 7.0).long()


def discordant_truth() -> Tensor:
    location = torch.linspace(-10.0, 25.0, 3501, dtype=torch.float64)
    log_scale = torch.linspace(-4.5, 3.0, 601, dtype=torch.float64)
    grid, scales = torch.meshgrid(location, log_scale, indexing="ij")
    log_density = dist.Normal(0.0, 20.0).log_prob(grid) + dist.Normal(-1.0, 0.5).log_prob(scales)
    for value in GROUPS:
        log_density = log_density + dist.StudentT(2.0, grid, scales.exp()).log_prob(value)
    weight = torch.softmax(log_density.flatten(), 0)
    return shares(discordant_label({"location": grid.flatten()}), weight, 2)


# Tests of two abilities.
LOADINGS = torch.tensor([0.9, 0.8, 0.7]).double()


def scores() -> Tensor:
    """Sixty people and six tests."""
    ability, noise = normal(60, 2, seed=7), normal(60, 6, seed=8)
    signal = torch.cat([ability[:, :1] * LOADINGS, ability[:, 1:] * LOADINGS], -1)
    return signal + 0.6 * noise


def abilities(y: Tensor) -> None:
    first = pyro.sample("first", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
    second = pyro.sample("second", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
    noise = pyro.sample("noise", dist.LogNormal(-0.5, 0.5).expand([6]).to_event(1))
    zero = torch.zeros_like(first)
    loadings = torch.stack([torch.cat([first, zero], -1), torch.cat([zero, second], -1)], -1)
    law = dist.MultivariateNormal(torch.zeros_like(noise), loadings @ loadings.mT + torch.diag_embed(noise.square()))
    with pyro.plate("person", len(y)):
        pyro.sample("y", law, obs=y)


def abilities_label(values: Values) -> Tensor:
    return (values["first"].sum(-1) > 0).long() + 2 * (values["second"].sum(-1) > 0).long()


# Moving average.
def series() -> Tensor:
    shock = normal(31, seed=9)
    return shock[1:] + 0.5 * shock[:-1]


def moving_average_log_likelihood(y: Tensor, theta: Tensor, sigma: Tensor) -> Tensor:
    """The tridiagonal covariance of the sum of neighbours, factored along the series; ``(...)`` to ``(...)``."""
    outer, inner = 1.0 + theta.square(), theta
    variance, mean = outer, torch.zeros_like(theta)
    total = torch.zeros_like(theta)
    for value in y:
        scale = sigma * variance.sqrt()
        residual = value - mean
        total = total - 0.5 * (residual / scale).square() - scale.log() - 0.5 * math.log(2.0 * math.pi)
        mean = inner / variance * residual
        variance = outer - inner.square() / variance
    return total


def moving_average(y: Tensor) -> None:
    theta = pyro.sample("theta", dist.Normal(0.0, 2.0))
    sigma = pyro.sample("sigma", dist.LogNormal(0.0, 1.0))
    pyro.factor("y", moving_average_log_likelihood(y, theta, sigma))


def moving_average_label(values: Values) -> Tensor:
    return (values["theta"].abs() > 1.0).long()


def moving_average_truth() -> Tensor:
    theta = torch.linspace(-9.0, 9.0, 2401, dtype=torch.float64)
    log_sigma = torch.linspace(-3.0, 2.0, 501, dtype=torch.float64)
    grid, scales = torch.meshgrid(theta, log_sigma, indexing="ij")
    log_density = moving_average_log_likelihood(series(), grid, scales.exp())
    log_density = log_density + dist.Normal(0.0, 2.0).log_prob(grid) + dist.Normal(0.0, 1.0).log_prob(scales)
    weight = torch.softmax(log_density.flatten(), 0)
    return shares(moving_average_label({"theta": grid.flatten()}), weight, 2)


# Sensors in the unit square.
ANCHORS = torch.tensor([[0.50, 0.30], [0.30, 0.70], [0.75, 0.72]]).double()
PLACES = torch.tensor([[0.57, 0.91], [0.10, 0.37], [0.26, 0.14], [0.85, 0.04]]).double()
REACH, RANGING = 0.4, 0.02


def distances(x: Tensor) -> Tensor:
    """Distances of all pairs with at least one unknown sensor: ``(..., 4, 2)`` to ``(..., 18)``."""
    first, second = torch.triu_indices(4, 4, offset=1)
    among = x[..., first, :] - x[..., second, :]
    known = (x.unsqueeze(-2) - ANCHORS).flatten(-3, -2)
    return torch.cat([among, known], -2).square().sum(-1).clamp_min(1e-12).sqrt()


def network() -> tuple[Tensor, Tensor]:
    """Which pairs hear each other, and their noisy distances."""
    true = distances(PLACES)
    heard = uniform(len(true), seed=24) < torch.exp(-0.5 * (true / REACH).square())
    return heard.double(), true + RANGING * normal(len(true), seed=25)


def sensors(heard: Tensor, measured: Tensor) -> None:
    place = pyro.sample("place", dist.Uniform(0.0, 1.0).expand([4, 2]).to_event(2))
    distance = distances(place)
    chance = -0.5 * (distance / REACH).square()
    silence = torch.log(-torch.expm1(chance.clamp_max(-1e-9)))
    ranging = dist.Normal(distance, RANGING).log_prob(measured)
    pyro.factor("y", (heard * (chance + ranging) + (1.0 - heard) * silence).sum(-1))


def sensors_label(values: Values) -> Tensor:
    """The first and the third sensor may each be mirrored at the line between those that hear it."""
    place = values["place"]
    return (place[:, 0, 1] < 0.7).long() + 2 * (place[:, 2, 1] > 0.4).long()


MULTIMODAL: dict[str, Multimodal] = {
    "galaxies, 2 components": Multimodal(
        lambda: galaxies(num_components=2), lambda v: labelling(v["mean"]), lambda: torch.full((2,), 0.5).double(), 2
    ),
    "galaxies, 3 components": Multimodal(
        galaxies, lambda v: labelling(v["mean"]), lambda: torch.full((6,), 1.0 / 6.0).double(), 6
    ),
    "variable star": Multimodal(lambda: PyroTarget(star, *nights()), star_label, star_truth, 8),
    "discordant data": Multimodal(lambda: PyroTarget(discordant, GROUPS), discordant_label, discordant_truth, 2),
    "two abilities": Multimodal(
        lambda: PyroTarget(abilities, scores()), abilities_label, lambda: torch.full((4,), 0.25).double(), 4
    ),
    "moving average": Multimodal(
        lambda: PyroTarget(moving_average, series()), moving_average_label, moving_average_truth, 2
    ),
    "sensor network": Multimodal(lambda: PyroTarget(sensors, *network()), sensors_label, None, 4),
}
