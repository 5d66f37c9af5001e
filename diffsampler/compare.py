r"""Comparison of models by their evidences, with the uncertainty of the estimates carried through.

With the evidence :math:`Z_m = \int p(y \mid \theta, m)\, p(\theta \mid m)\, d\theta` of each model and prior
probabilities :math:`\pi_m`,

.. math:: \log B_{ab} = \log Z_a - \log Z_b, \qquad p_m = \frac{\pi_m Z_m}{\sum_j \pi_j Z_j}.

The errors :math:`\sigma_m` of the independent estimates of :math:`\log Z_m` give, by the delta method,

.. math:: \mathrm{sd}(\log B_{ab})^2 = \sigma_a^2 + \sigma_b^2, \qquad
          \mathrm{sd}(p_m)^2 = p_m^2 \Big[ (1 - p_m)^2 \sigma_m^2 + \sum_{j \ne m} p_j^2 \sigma_j^2 \Big].

Where errors are not small this is too crude for a probability, so intervals come from simulated evidences, with
Student's law for estimates that rest on a few replicates.

All models must be of the same data and with normalized priors: a flat prior has no scale, and neither has its evidence.
Evidences depend on the width of the priors however many data there are, which no error bar shows.

References:
    Bayes Factors (Kass and Raftery, 1995), https://doi.org/10.1080/01621459.1995.10476572
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, final

import torch
from torch import Tensor

from diffsampler.estimators import Estimate
from diffsampler.result import Finding, Fit

__all__ = ["Comparison", "ComparedModel", "compare"]

NUM_DRAWS = 20_000
"""Simulated evidences behind an interval."""
MAX_WIDTH = 0.1
"""Widest 95 % interval of a posterior probability that still decides something."""


class ComparedModel(NamedTuple):
    """One line of a comparison."""

    log_evidence: Estimate
    """log Z."""
    log_bayes_factor: Estimate
    """log Z less that of the model with the largest one, so zero or negative."""
    prior: float
    """Prior probability."""
    probability: Estimate
    """Posterior probability; its error by the delta method."""
    interval: tuple[float, float]
    """95 % interval of the posterior probability, from the errors of all evidences."""


@final
@dataclass(frozen=True, eq=False)
class Comparison:
    """Models in order of their evidence; ``print(comparison)`` shows a table.

    Arguments:
        models: Each model's line, the largest evidence first.
        findings: Why the comparison must not be trusted; empty when all is well.
    """

    models: dict[str, ComparedModel]
    findings: list[Finding]

    @property
    def best(self) -> str:
        """The model with the largest posterior probability."""
        return max(self.models, key=lambda name: self.models[name].probability.value)

    @property
    def probabilities(self) -> dict[str, float]:
        """Posterior probabilities of the models; they sum to one."""
        return {name: model.probability.value for name, model in self.models.items()}

    @property
    def reliable(self) -> bool:
        """Whether no finding warns against using the comparison."""
        return not any(finding.level in ("warning", "error") for finding in self.findings)

    def log_bayes_factor(self, a: str, b: str) -> Estimate:
        r""":math:`\log B_{ab}`, positive where the data speak for ``a``.

        Raises:
            ValueError: If there is no such model.
        """
        for name in (a, b):
            if name not in self.models:
                raise ValueError(f"Expected one of the models {sorted(self.models)}; got {name!r}.")
        if a == b:
            return Estimate(0.0, 0.0, "log Bayes factor")
        return _difference(self.models[a].log_evidence, self.models[b].log_evidence)

    def __str__(self) -> str:
        width = max([5, *map(len, self.models)])
        head = (
            f"{'model':<{width}} {'log evidence':>20} {'log Bayes factor':>20} {'prior':>6} {'probability':>11}  95 %"
        )
        lines = [head]
        for name, model in self.models.items():
            z, b, (low, high) = model.log_evidence, model.log_bayes_factor, model.interval
            lines.append(
                f"{name:<{width}} {f'{z.value:.3f} +- {z.std_error:.3f}':>20} "
                f"{f'{b.value:.3f} +- {b.std_error:.3f}':>20} {model.prior:>6.3f} "
                f"{model.probability.value:>11.4f}  {low:.4f} to {high:.4f}"
            )
        return "\n".join([*lines, *map(str, self.findings)])


def compare(fits: Mapping[str, Fit], *, prior: Mapping[str, float] | None = None) -> Comparison:
    """Compare models of the same data by their evidences.

    Costs nothing: everything is in the fits. It cannot tell whether the fits are of the same data, or whether a model's
    prior is normalized; without that the numbers mean nothing.

    Arguments:
        fits: What :func:`diffsampler.sample` returned for each model, by name.
        prior: Prior probability of each model up to a common factor; equal if left out.

    Returns:
        Evidences, Bayes factors, posterior probabilities, all with errors, and findings.

    Raises:
        TypeError: If something other than fits is handed over.
        ValueError: If there are fewer than two fits, one of them estimates no evidence, or ``prior`` does not give
            every model a positive number.

    Example:
        >>> import torch, diffsampler as ds
        >>> def fit(scale):
        ...     log_prob = lambda x: -0.5 * (x / scale).square().sum(-1) - (x - 1.0).square().sum(-1)
        ...     return ds.sample(ds.Target.from_log_prob(log_prob, dim=1), method="smc", num_samples=512)
        >>> comparison = ds.compare({"narrow": fit(0.5), "wide": fit(5.0)})
        >>> comparison.best, round(sum(comparison.probabilities.values()), 6)
        ('wide', 1.0)
    """
    _check(fits)
    weights = _prior(fits, prior)
    order = sorted(fits, key=lambda name: -fits[name].log_normalizer.value)
    evidence = [fits[name].log_normalizer for name in order]
    log_prior = torch.tensor([weights[name] for name in order], dtype=torch.float64).log()
    value = torch.tensor([z.value for z in evidence], dtype=torch.float64)
    error = torch.tensor([z.std_error for z in evidence], dtype=torch.float64)
    probability = torch.softmax(log_prior + value, -1)
    spread = probability * _delta(probability, error)
    low, high = _intervals(log_prior + value, error, [fits[name].particles.replicates for name in order])
    models = {
        name: ComparedModel(
            z,
            _difference(z, evidence[0]) if name != order[0] else Estimate(0.0, 0.0, "log Bayes factor"),
            weights[name],
            Estimate(float(probability[i]), float(spread[i]), "posterior probability"),
            (float(low[i]), float(high[i])),
        )
        for i, (name, z) in enumerate(zip(order, evidence, strict=True))
    }
    return Comparison(models, _doubts(fits, models))


def _difference(a: Estimate, b: Estimate) -> Estimate:
    return Estimate(a.value - b.value, math.hypot(a.std_error, b.std_error), "log Bayes factor")


def _check(fits: Mapping[str, Fit]) -> None:
    if not isinstance(fits, Mapping):
        raise TypeError(f"Expected a dict of fits by name, {{'a': fit_a, 'b': fit_b}}; got {type(fits).__name__}.")
    if len(fits) < 2:
        raise ValueError(f"Expected at least two fits; got {len(fits)}.")
    for name, fit in fits.items():
        if not isinstance(fit, Fit):
            hint = "what ds.sample(target) returns"
            raise TypeError(f"Expected {name!r} to be a Fit, {hint}; got {type(fit).__name__}.")
        if not math.isfinite(fit.log_normalizer.value):
            raise ValueError(
                f"Expected {name!r} to have an evidence; got one by {fit.method!r}, which estimates none. "
                "Use method='auto' or 'smc'."
            )


def _prior(fits: Mapping[str, Fit], prior: Mapping[str, float] | None) -> dict[str, float]:
    if prior is None:
        return dict.fromkeys(fits, 1.0 / len(fits))
    if not isinstance(prior, Mapping):
        raise TypeError(f"Expected a dict of prior probabilities by name; got {type(prior).__name__}.")
    if set(prior) != set(fits):
        raise ValueError(f"Expected prior probabilities of {sorted(fits)}; got those of {sorted(prior)}.")
    if not all(0.0 < weight < math.inf for weight in prior.values()):
        raise ValueError(f"Expected positive prior probabilities; got {dict(prior)}.")
    total = math.fsum(prior.values())
    return {name: float(prior[name]) / total for name in fits}


def _delta(probability: Tensor, error: Tensor) -> Tensor:
    """Standard error of the log probabilities, shape ``(m,)``."""
    variance = error.square()
    others = (probability.square() * variance).sum() - probability.square() * variance
    return ((1.0 - probability).square() * variance + others).sqrt()


def _intervals(log_weight: Tensor, error: Tensor, replicates: list[int]) -> tuple[Tensor, Tensor]:
    """Quantiles of the probabilities over simulated evidences, each of shape ``(m,)``."""
    if not bool(error.isfinite().all()):
        return torch.zeros_like(error), torch.ones_like(error)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(NUM_DRAWS, len(error), generator=generator, dtype=torch.float64)
    for column, count in enumerate(replicates):
        if count > 1:
            # A mean over few replicates is as uncertain as Student's law says.
            squares = torch.randn(NUM_DRAWS, count - 1, generator=generator, dtype=torch.float64).square()
            noise[:, column] /= squares.mean(-1).sqrt()
    probability = torch.softmax(log_weight + error * noise, -1)
    levels = torch.tensor([0.025, 0.975], dtype=torch.float64)
    low, high = torch.quantile(probability, levels, dim=0)
    return low, high


def _doubts(fits: Mapping[str, Fit], models: dict[str, ComparedModel]) -> list[Finding]:
    findings = []
    for name in models:
        grave = [finding for finding in fits[name].findings if finding.level in ("warning", "error")]
        if grave:
            message = f"The fit of {name!r} is not reliable: {grave[0].message}"
            findings.append(Finding("warning", message, "Its evidence may be wrong by more than its error."))
    name = max(models, key=lambda name: models[name].interval[1] - models[name].interval[0])
    low, high = models[name].interval
    if not high - low <= MAX_WIDTH:
        largest = max(models, key=lambda name: models[name].log_evidence.std_error)
        error = models[largest].log_evidence.std_error
        message = (
            f"Errors are too large to decide: the probability of {name!r} is between {low:.2f} and {high:.2f}; "
            f"the largest error of a log evidence is {error:.2g}, of {largest!r}."
        )
        findings.append(Finding("warning", message, "Draw more particles; four times as many halve the errors."))
    return findings
