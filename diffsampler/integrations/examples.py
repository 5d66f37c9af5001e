r"""Real posteriors as Pyro models, for the demo, the experiments and the tests.

* Eight schools (Rubin, 1981): effects of coaching in eight schools, with the priors of posteriordb. The centred form is
  a funnel in :math:`(\log\tau, \theta)`; the non-centred one is benign. Same posterior, same evidence.
* Galaxies (Roeder, 1990): velocities of 82 galaxies, in 1000 km/s, as a mixture of :math:`K` normals with unordered
  components. Prior and likelihood do not know the labels, so the posterior is exactly symmetric under their
  :math:`K!` permutations: every mode comes :math:`K!` times with equal weight, and each component's marginal is the
  same. Model and priors are Chib's (1995), whose evidence Neal (1999) showed to be wrong by :math:`\log K!` because
  his Gibbs sampler stayed in one labelling; a sampler that misses modes here repeats that error.

References:
    Estimation in parallel randomized experiments (Rubin, 1981), https://doi.org/10.3102/10769986006004377
    posteriordb (Magnusson et al., 2024), https://arxiv.org/abs/2407.04967
    Density estimation with confidence sets exemplified by superclusters and voids in the galaxies (Roeder, 1990),
    https://doi.org/10.1080/01621459.1990.10474918
    Marginal likelihood from the Gibbs output (Chib, 1995), https://doi.org/10.1080/01621459.1995.10476635
    Erroneous results in "Marginal likelihood from the Gibbs output" (Neal, 1999),
    https://www.cs.toronto.edu/~radford/ftp/chib-letter.pdf
"""

from __future__ import annotations

import itertools
import math

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from diffsampler.integrations.pyro_target import PyroTarget

__all__ = [
    "GALAXIES",
    "GALAXY_LOG_EVIDENCE",
    "eight_schools",
    "eight_schools_centered",
    "eight_schools_noncentered",
    "galaxies",
    "labelling",
    "normal_mixture",
]

EFFECTS = (28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0)
ERRORS = (15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0)

# As analysed throughout the mixture literature: the 78th value, 26960, is 26690 in the original survey.
GALAXIES = tuple(
    int(value)
    for value in """
    9172 9350 9483 9558 9775 10227 10406 16084 16170 18419 18552 18600 18927 19052 19070 19330 19343 19349 19440 19473
    19529 19541 19547 19663 19846 19856 19863 19914 19918 19973 19989 20166 20175 20179 20196 20215 20221 20415 20629
    20795 20821 20846 20875 20986 21137 21492 21701 21814 21921 21960 22185 22209 22242 22249 22314 22374 22495 22746
    22747 22888 22914 23206 23241 23263 23484 23538 23542 23666 23706 23711 24129 24285 24289 24366 24717 24990 25633
    26960 26995 32065 32789 34279
    """.split()
)
GALAXY_LOG_EVIDENCE = -226.80
"""Mean likelihood of 10^8 prior draws, K = 3 with unequal variances (Neal, 1999)."""


def eight_schools_centered(y: Tensor, sigma: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("school", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def eight_schools_noncentered(y: Tensor, sigma: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("school", len(y)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        theta = pyro.deterministic("theta", mu + tau * z, event_dim=0)
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def normal_mixture(y: Tensor, num_components: int) -> None:
    """Mixture of normals with exchangeable components; membership is summed out."""
    weight = pyro.sample("weight", dist.Dirichlet(torch.ones(num_components)))
    with pyro.plate("component", num_components):
        mean = pyro.sample("mean", dist.Normal(20.0, 10.0))
        variance = pyro.sample("variance", dist.InverseGamma(3.0, 20.0))
    components = dist.Normal(mean, variance.sqrt())
    with pyro.plate("galaxy", len(y)):
        pyro.sample("y", dist.MixtureSameFamily(dist.Categorical(weight), components), obs=y)


def eight_schools(*, centered: bool = True) -> PyroTarget:
    """Eight schools as a target of dimension 10."""
    model = eight_schools_centered if centered else eight_schools_noncentered
    return PyroTarget(model, torch.tensor(EFFECTS), torch.tensor(ERRORS))


def galaxies(*, num_components: int = 3) -> PyroTarget:
    """The galaxy mixture as a target of dimension ``3 K - 1``."""
    return PyroTarget(normal_mixture, torch.tensor(GALAXIES) / 1000.0, num_components)


def labelling(mean: Tensor) -> Tensor:
    """Which ordering of the components a draw has: means ``(n, K)`` to an index ``(n,)`` below ``K!``.

    Under the posterior of :func:`galaxies` every ordering has probability ``1 / K!`` exactly.
    """
    num_components = mean.shape[-1]
    orders = list(itertools.permutations(range(num_components)))
    radix = num_components ** torch.arange(num_components, device=mean.device)
    codes = torch.tensor([sum(k * num_components**i for i, k in enumerate(order)) for order in orders])
    lookup = torch.full((num_components**num_components,), -1, device=mean.device)
    lookup[codes.to(mean.device)] = torch.arange(math.factorial(num_components), device=mean.device)
    return lookup[(mean.argsort(-1) * radix).sum(-1)]
