r"""Multimodal posteriors as Pyro models, each with the exact weights of its modes.

* Mixtures of two and three normals for the galaxy velocities: the labels of the components are exchangeable, so that
  all :math:`K!` orders of the means have the same weight.
* Period of a variable star observed at night only, two months of one season: one-day aliases explain the data about as
  well. Given the frequency the model is linear in its two amplitudes, which are integrated out exactly; the
  frequency by quadrature.
* Absorption and elimination of a drug: exchanging the two rates and scaling the volume of distribution gives the same
  curve ("flip-flop kinetics"), so that the priors alone weight the two readings. Theophylline in the first of twelve
  subjects; given rates and noise the curve is linear in the inverse volume, the rest is quadrature.
* Place of a transmitter from its distances to three stations that lie almost on a line: its mirror image fits nearly as
  well. By quadrature.
* Two blocks of three tests that measure one ability each: the sign of the ability is not identified, four modes.
* Positions of four sensors from noisy distances, some of them to anchors: reflections fit nearly as well. Places as in
  Tak, Meng and van Dyk (2018), after Ihler et al. (2005). The reference is a long run of tempered SMC.

All data but galaxies and theophylline are simulated with fixed seeds.

References:
    Pharmacokinetics of theophylline, data of R. A. Upton as published with NONMEM (Boeckmann, Sheiner & Beal, 1994) and
    in R's data set Theoph, https://stat.ethz.ch/R-manual/R-devel/library/datasets/html/Theoph.html
    Flip-flop pharmacokinetics (Yanez et al., 2011), https://doi.org/10.4155/tde.11.19
    A repelling-attracting Metropolis algorithm for multimodality (Tak, Meng & van Dyk, 2018),
    https://doi.org/10.1080/10618600.2017.1415911
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


# Theophylline.
DOSE = 4.02
HOURS = torch.tensor([0.25, 0.57, 1.12, 2.02, 3.82, 5.1, 7.03, 9.05, 12.12, 24.37]).double()
CONCENTRATION = torch.tensor([2.84, 6.57, 10.5, 9.66, 8.58, 8.36, 7.47, 6.89, 5.94, 3.28]).double()
RATE, VOLUME, RESIDUAL = (math.log(0.3), 1.5), (math.log(0.04), 1.2), (-0.5, 0.5)
"""Means and standard deviations of log rates (1/h), log volume (l/kg) and log noise (mg/l)."""


def concentration(time: Tensor, absorbed: Tensor, eliminated: Tensor, volume: Tensor) -> Tensor:
    """One compartment with first-order absorption; symmetric in the rates but for the leading ratio."""
    gap = (absorbed - eliminated).abs()
    slower = torch.exp(-torch.minimum(absorbed, eliminated) * time)
    return DOSE * absorbed / volume * slower * -torch.expm1(-gap * time) / gap


def absorption(time: Tensor, y: Tensor) -> None:
    absorbed = pyro.sample("absorbed", dist.LogNormal(*RATE))
    eliminated = pyro.sample("eliminated", dist.LogNormal(*RATE))
    volume = pyro.sample("volume", dist.LogNormal(*VOLUME))
    noise = pyro.sample("noise", dist.LogNormal(*RESIDUAL))
    pyro.sample("y", dist.Normal(concentration(time, absorbed, eliminated, volume), noise).to_event(1), obs=y)


def absorption_label(values: Values) -> Tensor:
    return (values["absorbed"] < values["eliminated"]).long()


def standard(log_value: Tensor, law: tuple[float, float]) -> Tensor:
    return -0.5 * ((log_value - law[0]) / law[1]).square()


def absorption_truth() -> Tensor:
    line = torch.linspace(-5.0, 3.0, 401, dtype=torch.float64)
    # Shifted by next to nothing: where the rates are equal the curve is a limit.
    first, second = torch.meshgrid(line, line + 1e-9, indexing="ij")
    curve = concentration(HOURS, first.exp().unsqueeze(-1), second.exp().unsqueeze(-1), torch.ones(()).double())
    cross, square, total = curve @ CONCENTRATION, curve.square().sum(-1), CONCENTRATION.square().sum()
    near = total - cross.square() / square
    near = near < 8.0 * near.min()
    first, second, cross, square = (part[near].unsqueeze(-1) for part in (first, second, cross, square))
    # Volumes about the best one for each pair of rates.
    volume = (square / cross).log() + torch.linspace(-1.0, 1.0, 101, dtype=torch.float64)
    error = total - 2.0 * cross * (-volume).exp() + square * (-2.0 * volume).exp()
    prior = standard(first, RATE) + standard(second, RATE) + standard(volume, VOLUME)
    terms = []
    for noise in torch.linspace(-2.5, 1.5, 41, dtype=torch.float64):
        fit = -0.5 * error * (-2.0 * noise).exp() - len(HOURS) * noise + standard(noise, RESIDUAL)
        terms.append(torch.logsumexp(prior + fit, -1))
    weight = torch.softmax(torch.logsumexp(torch.stack(terms), 0), 0)
    return shares(absorption_label({"absorbed": first[:, 0], "eliminated": second[:, 0]}), weight, 2)


# Transmitter.
STATIONS = torch.tensor([[-3.0, 0.2], [0.0, -0.2], [3.0, 0.2]]).double()
TRANSMITTER = torch.tensor([1.0, 2.5]).double()
RANGE_NOISE, RANGE_ERRORS = 0.15, torch.tensor([0.4, -0.8, 0.6]).double()


def ranges(place: Tensor) -> Tensor:
    """Distances to the stations, ``(..., 2)`` to ``(..., 3)``."""
    return (place.unsqueeze(-2) - STATIONS).square().sum(-1).sqrt()


def transmitter(y: Tensor) -> None:
    place = pyro.sample("place", dist.Normal(0.0, 4.0).expand([2]).to_event(1))
    pyro.sample("y", dist.Normal(ranges(place), RANGE_NOISE).to_event(1), obs=y)


def transmitter_label(values: Values) -> Tensor:
    return (values["place"][..., 1] < 0.0).long()


def transmitter_truth() -> Tensor:
    line = torch.linspace(-8.0, 8.0, 1601, dtype=torch.float64)
    grid = torch.cartesian_prod(line, line)
    measured = ranges(TRANSMITTER) + RANGE_NOISE * RANGE_ERRORS
    log_density = -0.5 * (grid / 4.0).square().sum(-1) - 0.5 * ((ranges(grid) - measured) / RANGE_NOISE).square().sum(
        -1
    )
    return shares(transmitter_label({"place": grid}), torch.softmax(log_density, 0), 2)


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
    "theophylline": Multimodal(
        lambda: PyroTarget(absorption, HOURS, CONCENTRATION), absorption_label, absorption_truth, 2
    ),
    "transmitter": Multimodal(
        lambda: PyroTarget(transmitter, ranges(TRANSMITTER) + RANGE_NOISE * RANGE_ERRORS),
        transmitter_label,
        transmitter_truth,
        2,
    ),
    "two abilities": Multimodal(
        lambda: PyroTarget(abilities, scores()), abilities_label, lambda: torch.full((4,), 0.25).double(), 4
    ),
    "sensor network": Multimodal(lambda: PyroTarget(sensors, *network()), sensors_label, None, 4),
}
