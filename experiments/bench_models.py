"""Targets of the benchmark against NUTS: the density, its exact answers, and the same data for the peers."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from diffsampler import targets
from diffsampler.baselines.smc import GaussianReference
from diffsampler.target import Target

EXACT_DRAWS = 400_000
FETCH = """
import sys, numpy
from sklearn.datasets import load_breast_cancer
bunch = load_breast_cancer()
numpy.savez(sys.argv[1], x=bunch.data, y=bunch.target)
"""


class Answers(NamedTuple):
    """What is known of a target."""

    coordinates: list[int]
    """Coordinates whose moments are compared."""
    mean: Tensor
    sd: Tensor
    log_z: float
    modes: Callable[[Tensor], Tensor] | None
    """Indicators ``(n, m)`` of the modes, or of one event per column where modes are too many to number."""
    weights: Tensor | None
    partition: bool = True
    """Whether the columns are the modes of one partition."""


@dataclass(frozen=True)
class Model:
    """A row of the benchmark.

    Arguments:
        target: The density.
        answers: Computes what is known of it.
        family: Which density of the peers it is, with ``data``.
        scale: Standard deviation of a Gaussian reference to temper from; None for the target's prior.
        start: Standard deviation of the Gaussian that chains start from; None for the reference. Priors with heavy
            tails put a chain where BlackJAX's ChEES never gets away from, which its users would not do to it.
        dense: Whether samplers that can learn a dense metric should.
        pyro: The same as a Pyro model with its data.
        on_pyro: Whether the library's chains, too, run on the Pyro model.
        gradient_free: Whether it is small enough for the ensemble score method.
    """

    target: Target
    answers: Callable[[], Answers]
    family: str
    data: dict[str, Any]
    scale: float | None = None
    start: float | None = None
    dense: bool = False
    pyro: tuple[Callable[..., None], tuple[Any, ...]] | None = None
    on_pyro: bool = False
    gradient_free: bool = False

    @property
    def reference(self) -> Target:
        """What is tempered from."""
        if self.scale is not None:
            return GaussianReference(self.target.space, scale=self.scale)
        assert self.target.prior is not None
        return self.target.prior

    def starts(self, count: int, seed: int) -> Tensor:
        """Where chains start, ``(count, D)``."""
        law = self.reference if self.start is None else GaussianReference(self.target.space, scale=self.start)
        return law.sample(count, generator=torch.Generator().manual_seed(seed)).double()


def from_draws(target: Target, coordinates: list[int] | None = None) -> Answers:
    """Moments of exact draws, whose errors are below .002 standard deviations."""
    x = target.sample(EXACT_DRAWS, generator=torch.Generator().manual_seed(0)).double()
    chosen = list(range(target.dim)) if coordinates is None else coordinates
    log_z = math.nan if target.log_normalizer is None else target.log_normalizer
    modes, weights = None, None
    if target.num_modes is not None:
        count = target.num_modes
        modes, weights = (lambda x: torch.nn.functional.one_hot(target.mode_labels(x), count)), target.mode_weights()
    return Answers(chosen, x[:, chosen].mean(0), x[:, chosen].std(0), log_z, modes, weights)


def well_answers(target: targets.ManyWell) -> Answers:
    """Sixteen pairs have too many modes to count: the right well of each pair instead."""
    weights = torch.full((target.dim // 2,), target.right_mass, dtype=torch.float64)
    return from_draws(target)._replace(modes=lambda x: x[:, 0::2] > 0, weights=weights, partition=False)


def weighted_answers(x: Tensor, log_weight: Tensor) -> Answers:
    """Moments and evidence by importance sampling."""
    weight = torch.softmax(log_weight, 0)
    if float(1.0 / weight.square().sum()) < 20_000:
        raise RuntimeError("Expected an importance sample worth 20,000 draws; the reference is not exact enough.")
    mean = weight @ x
    sd = (weight @ (x - mean).square()).sqrt()
    log_z = float(torch.logsumexp(log_weight, 0)) - math.log(len(x))
    return Answers(list(range(x.shape[1])), mean, sd, log_z, None, None)


def mode_of(target: Target, start: Tensor) -> tuple[Tensor, Tensor]:
    """A mode near ``start`` and the Cholesky factor of its inverse Hessian."""
    x = start.clone().double().requires_grad_()
    search = torch.optim.LBFGS([x], max_iter=500, line_search_fn="strong_wolfe", tolerance_grad=1e-9)

    def loss() -> Tensor:
        search.zero_grad()
        value = -target.log_prob(x.unsqueeze(0)).sum()
        value.backward()
        return value

    search.step(loss)
    point = x.detach()
    hessian = torch.autograd.functional.hessian(lambda x: -target.log_prob(x.unsqueeze(0)).sum(), point)
    return point, torch.linalg.cholesky(torch.linalg.inv(hessian))


def student_draws(mean: Tensor, factor: Tensor, count: int, df: float) -> tuple[Tensor, Tensor]:
    """Draws of a Student-t law and their log densities."""
    generator = torch.Generator().manual_seed(0)
    dim = len(mean)
    z = torch.randn(count, dim, generator=generator, dtype=torch.float64)
    degrees = int(df)
    chi = torch.randn(count, degrees, generator=generator, dtype=torch.float64).square().sum(-1)
    u = z * (df / chi).sqrt().unsqueeze(-1)
    constant = math.lgamma(0.5 * (df + dim)) - math.lgamma(0.5 * df) - 0.5 * dim * math.log(math.pi * df)
    log_density = constant - 0.5 * (df + dim) * torch.log1p(u.square().sum(-1) / df)
    return mean + u @ factor.mT, log_density - factor.diagonal().log().sum()


def importance_answers(target: Target, *, count: int = 100_000, df: float = 20.0) -> Answers:
    """Of a unimodal target, from a Student-t law at the mode and again from one with the moments of the first."""
    mean, factor = mode_of(target, torch.zeros(target.dim))
    for draws in (count // 4, count):
        x, log_density = student_draws(mean, factor, draws, df)
        log_weight = torch.cat([target.log_prob(part) for part in x.split(4096)]) - log_density
        weight = torch.softmax(log_weight, 0)
        mean = weight @ x
        factor = torch.linalg.cholesky((weight.unsqueeze(-1) * (x - mean)).mT @ (x - mean))
    return weighted_answers(x, log_weight)


def absorption_answers(target: targets.Absorption) -> Answers:
    """One mode by importance sampling, the other by the exact symmetry of the likelihood."""
    mean, factor = mode_of(target, torch.tensor([0.5, -2.5, -1.0, -0.5]))
    x, log_density = student_draws(mean, factor, EXACT_DRAWS, 8.0)
    own = target.log_prob(x) - log_density
    other = target.log_prob(target.flip(x)) - log_density
    # Draws beyond the ridge belong to the other mode, which would be counted twice.
    beyond = x[:, 1] > x[:, 0]
    both = torch.cat([own, other]).masked_fill(beyond.repeat(2), -torch.inf)
    answers = weighted_answers(torch.cat([x, target.flip(x)]), both)
    share = float(torch.softmax(both, 0)[len(x) :].sum())
    return answers._replace(
        log_z=answers.log_z + math.log(2.0),
        modes=lambda x: torch.nn.functional.one_hot((x[:, 1] > x[:, 0]).long(), 2),
        weights=torch.tensor([1.0 - share, share], dtype=torch.float64),
    )


def rotated_gaussian() -> Model:
    """Fifty dimensions, standard deviations .1 to 10 along random axes: condition number 10,000."""
    generator = torch.Generator().manual_seed(4)
    axes = torch.linalg.qr(torch.randn(50, 50, generator=generator, dtype=torch.float64))[0]
    sd = torch.logspace(-1.0, 1.0, 50, dtype=torch.float64)
    target = targets.Gaussian(torch.zeros(50), covariance=axes @ (sd.square().unsqueeze(-1) * axes.mT))
    whitening = (axes / sd).numpy()
    return Model(target, lambda: from_draws(target), "gaussian", {"whitening": whitening}, scale=12.0, dense=True)


def schools(*, centered: bool) -> Model:
    from diffsampler.integrations import examples

    target = targets.EightSchools(centered=centered)
    data = {"effects": np.array(examples.EFFECTS), "errors": np.array(examples.ERRORS), "centered": centered}
    model = examples.eight_schools_centered if centered else examples.eight_schools_noncentered
    arguments = (torch.tensor(examples.EFFECTS), torch.tensor(examples.ERRORS))
    pyro = (model, arguments)
    return Model(
        target, lambda: from_draws(target), "schools", data, start=1.0, pyro=pyro, on_pyro=True, gradient_free=True
    )


def logistic_model(design: Tensor, labels: Tensor) -> None:
    import pyro
    import pyro.distributions as dist

    w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([design.shape[1]]).to_event(1))
    pyro.sample("y", dist.Bernoulli(logits=design @ w).to_event(1), obs=labels)


def breast_cancer(cache: Path, python: str | None) -> Model:
    """Diagnosis of 569 tumours from 30 features (Street, Wolberg & Mangasarian, 1993), as scikit-learn bundles it."""
    path = cache / "breast_cancer.npz"
    if not path.exists():
        interpreter = sys.executable if find_spec("sklearn") else python
        if interpreter is None:
            raise ModuleNotFoundError("scikit-learn, which has the breast cancer data, is not installed")
        cache.mkdir(parents=True, exist_ok=True)
        subprocess.run([interpreter, "-c", FETCH, str(path)], check=True)
    with np.load(path) as file:
        target = targets.LogisticRegression(torch.tensor(file["x"]), torch.tensor(file["y"]))
    data = {"design": target.design.numpy(), "signs": target.signs.numpy()}
    data |= {"reference_mean": 0.0, "reference_scale": 1.0}
    pyro = (logistic_model, (target.design.float(), (0.5 * (target.signs + 1.0)).float()))
    return Model(target, lambda: importance_answers(target), "logistic", data, start=1.0, pyro=pyro)


def funnel() -> Model:
    target = targets.Funnel()
    # Only the neck: the other coordinates have tails that no average of draws settles in.
    return Model(target, lambda: from_draws(target, [0]), "funnel", {}, scale=3.0, start=1.0, gradient_free=True)


def mixture(target: targets.GaussianMixture, scale: float) -> Model:
    data = {"means": target.means.numpy(), "scale": target.factors.numpy()[:1, :1]}
    return Model(target, lambda: from_draws(target), "mixture", data, scale=scale, gradient_free=True)


def many_well() -> Model:
    target = targets.ManyWell()
    return Model(target, lambda: well_answers(target), "many_well", {}, scale=2.0)


def label_switching() -> Model:
    target = targets.LabelSwitching()
    data = {"observed": target.data.numpy(), "noise": target.noise, "tau": target.tau}
    data |= {"reference_mean": 0.0, "reference_scale": target.tau}
    return Model(target, lambda: from_draws(target), "label_switching", data, gradient_free=True)


def absorption_model(times: Tensor, concentrations: Tensor, curve: Callable[[Tensor], Tensor]) -> None:
    import pyro
    import pyro.distributions as dist

    from diffsampler.targets import absorption as module

    law = dist.Normal(torch.tensor(module.PRIOR_MEAN), torch.tensor(module.PRIOR_SCALE)).to_event(1)
    x = pyro.sample("x", law)
    pyro.sample("y", dist.Normal(curve(x), x[..., 3:].exp()).to_event(1), obs=concentrations)


def absorption() -> Model:
    from diffsampler.targets import absorption as module

    target = targets.Absorption()
    data = {"times": target.times.numpy(), "observed": target.concentrations.numpy(), "dose": target.dose}
    data |= {"prior_mean": np.array(module.PRIOR_MEAN), "prior_scale": np.array(module.PRIOR_SCALE)}
    data |= {"reference_mean": data["prior_mean"], "reference_scale": data["prior_scale"]}
    pyro = (absorption_model, (target.times, target.concentrations, target.curve))
    return Model(target, lambda: absorption_answers(target), "absorption", data, pyro=pyro, gradient_free=True)


MODELS: dict[str, Callable[[Path, str | None], Model]] = {
    "gauss50": lambda *_: rotated_gaussian(),
    "breast_cancer": breast_cancer,
    "schools_noncentered": lambda *_: schools(centered=False),
    "schools_centered": lambda *_: schools(centered=True),
    "funnel10": lambda *_: funnel(),
    "gmm9": lambda *_: mixture(targets.GaussianMixture.grid(), 5.0),
    "gmm40": lambda *_: mixture(targets.GaussianMixture.forty(), 30.0),
    "manywell32": lambda *_: many_well(),
    "label_switching": lambda *_: label_switching(),
    "absorption": lambda *_: absorption(),
}
"""Builders; called with a folder for data and an interpreter that may have scikit-learn."""
