"""Comparison of models: conjugate answers for nested and rival models, errors carried through, and refusals."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

import diffsampler as ds
from diffsampler.particles import Particles

COUNTS = torch.tensor([2.0, 3.0, 1.0, 4.0, 2.0, 0.0, 3.0, 2.0, 5.0, 2.0])
GENERATOR = torch.Generator().manual_seed(3)
FEATURES = torch.randn(12, 2, generator=GENERATOR, dtype=torch.float64)
RESPONSE = FEATURES @ torch.tensor([1.0, 0.3]).double() + torch.randn(12, generator=GENERATOR, dtype=torch.float64)


def regression(x, y):
    beta = pyro.sample("beta", dist.Normal(0.0, 2.0).expand([x.shape[-1]]).to_event(1))
    pyro.sample("y", dist.Normal(x @ beta, 1.0).to_event(1), obs=y)


def poisson(y):
    rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
    pyro.sample("y", dist.Poisson(rate).expand(y.shape).to_event(1), obs=y)


def geometric(y):
    chance = pyro.sample("chance", dist.Beta(1.0, 2.0))
    pyro.sample("y", dist.Geometric(chance).expand(y.shape).to_event(1), obs=y)


def exact_regression(x, y):
    covariance = 4.0 * x @ x.mT + torch.eye(len(y)).double()
    return float(torch.distributions.MultivariateNormal(torch.zeros(len(y)).double(), covariance).log_prob(y))


def exact_poisson(y):
    total, n = float(y.sum()), len(y)
    return math.lgamma(2.0 + total) - math.lgamma(2.0) - (2.0 + total) * math.log1p(n) - float((y + 1).lgamma().sum())


def exact_geometric(y):
    def log_beta(a, b):
        return math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)

    return log_beta(1.0 + len(y), 2.0 + float(y.sum())) - log_beta(1.0, 2.0)


def run(model, *args, seed=0):
    return ds.sample(ds.pyro.PyroTarget(model, *args), method="smc", num_samples=2048, seed=seed)


def made(*log_z, findings=(), has_normalizer=True, method="smc"):
    """A fit whose replicates have these values of log Z."""
    values = torch.tensor(log_z, dtype=torch.float64)
    x = torch.zeros(len(values), 1, dtype=torch.float64)
    particles = Particles(x, values, replicates=len(values), has_normalizer=has_normalizer)
    return ds.Fit(particles, {"x": x[:, 0]}, list(findings), 10, 1.0, method)


def scattered(log_z, error, *, replicates=16):
    """A fit with a given evidence and error."""
    z = torch.linspace(-1.0, 1.0, replicates).double()
    z = 1.0 + error * math.sqrt(replicates) * z / z.std()
    return made(*(log_z + z.log()).tolist())


@pytest.fixture(scope="module")
def nested():
    return {"both": run(regression, FEATURES, RESPONSE), "first": run(regression, FEATURES[:, :1], RESPONSE)}


def test_nested_models_get_the_conjugate_answer(nested):
    comparison = ds.compare(nested)
    exact = {"both": exact_regression(FEATURES, RESPONSE), "first": exact_regression(FEATURES[:, :1], RESPONSE)}
    # Two estimates, each within 4 of its standard errors: false alarm about 1e-3 (Student's law with 15 degrees).
    for name, model in comparison.models.items():
        assert abs(model.log_evidence.value - exact[name]) < 4.0 * model.log_evidence.std_error + 1e-3
        assert model.log_evidence.std_error < 0.1
    factor = comparison.log_bayes_factor("both", "first")
    assert abs(factor.value - (exact["both"] - exact["first"])) < 4.0 * factor.std_error
    truth = 1.0 / (1.0 + math.exp(exact["first"] - exact["both"]))
    low, high = comparison.models["both"].interval
    assert 0.02 < truth < 0.98, "a question that is not decided by the data alone"
    assert low - 0.02 < truth < high + 0.02 and abs(comparison.probabilities["both"] - truth) < 0.05
    # Negative control: swapped evidences are outside.
    assert not low - 0.02 < 1.0 - truth < high + 0.02


def test_rival_models_get_the_conjugate_answer():
    comparison = ds.compare({"geometric": run(geometric, COUNTS), "poisson": run(poisson, COUNTS)})
    exact = exact_poisson(COUNTS) - exact_geometric(COUNTS)
    factor = comparison.log_bayes_factor("poisson", "geometric")
    assert comparison.best == "poisson" and list(comparison.models) == ["poisson", "geometric"]
    assert abs(factor.value - exact) < 4.0 * factor.std_error
    assert comparison.log_bayes_factor("geometric", "poisson").value == -factor.value
    assert comparison.log_bayes_factor("poisson", "poisson") == (0.0, 0.0, "log Bayes factor")
    assert comparison.reliable, comparison.findings


def test_a_poor_model_of_three_does_not_disturb_the_others(nested):
    comparison = ds.compare({**nested, "second": run(regression, FEATURES[:, 1:], RESPONSE)})
    pair = ds.compare(nested)
    assert comparison.probabilities["second"] < 0.05
    assert sum(comparison.probabilities.values()) == pytest.approx(1.0)
    odds = [c.probabilities["both"] / c.probabilities["first"] for c in (comparison, pair)]
    assert odds[0] == pytest.approx(odds[1])


def test_prior_probabilities_enter():
    fits = {"a": scattered(0.0, 0.01), "b": scattered(0.0, 0.01)}
    even = ds.compare(fits)
    assert even.probabilities == pytest.approx({"a": 0.5, "b": 0.5}, abs=1e-3)
    odd = ds.compare(fits, prior={"a": 3.0, "b": 1.0})
    assert odd.probabilities == pytest.approx({"a": 0.75, "b": 0.25}, abs=1e-3)
    assert odd.models["a"].prior == 0.75


def test_errors_are_carried_through():
    comparison = ds.compare({"a": scattered(0.0, 0.05), "b": scattered(-1.0, 0.02), "c": scattered(-2.0, 0.04)})
    mean = torch.tensor([model.log_evidence.value for model in comparison.models.values()], dtype=torch.float64)
    error = torch.tensor([model.log_evidence.std_error for model in comparison.models.values()], dtype=torch.float64)
    assert error.tolist() == pytest.approx([0.05, 0.02, 0.04], rel=0.01)
    noise = torch.randn(200_000, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    simulated = torch.softmax(mean + error * noise, -1).std(0)
    stated = [model.probability.std_error for model in comparison.models.values()]
    assert stated == pytest.approx(simulated.tolist(), rel=0.03)
    assert comparison.log_bayes_factor("a", "b").std_error == pytest.approx(math.hypot(0.05, 0.02), rel=0.01)


def test_intervals_cover():
    # 200 repetitions of two runs with 8 replicates each; 95 % are off by 0.06 with a probability below 1e-3.
    generator = torch.Generator().manual_seed(1)
    truth, hits, narrow = 1.0 / (1.0 + math.exp(-0.5)), 0, 0
    for _ in range(200):
        a, b = 0.15 * torch.randn(2, 8, generator=generator, dtype=torch.float64)
        model = ds.compare({"a": made(*(0.5 + a).tolist()), "b": made(*b.tolist())}).models["a"]
        hits += model.interval[0] <= truth <= model.interval[1]
        narrow += abs(model.probability.value - truth) <= 0.5 * model.probability.std_error
    assert hits / 200 > 0.89, hits
    assert narrow / 200 < 0.6, "an interval of half a standard error must not cover"


def test_errors_that_decide_nothing_are_flagged():
    close = ds.compare({"a": scattered(0.0, 0.1), "b": scattered(-0.3, 0.1)})
    assert [finding.level for finding in close.findings] == ["warning"] and not close.reliable
    assert "Errors are too large to decide: the probability of" in close.findings[0].message
    # The same errors decide where the evidences are far apart, and small ones decide between close evidences.
    assert ds.compare({"a": scattered(0.0, 0.1), "b": scattered(-9.0, 0.1)}).reliable
    assert ds.compare({"a": scattered(0.0, 0.01), "b": scattered(-0.3, 0.01)}).reliable
    alone = made(0.0)
    assert "between 0.00 and 1.00" in str(ds.compare({"a": alone, "b": scattered(0.0, 0.1)}))


def test_findings_of_fits_are_passed_on():
    doubt = ds.Finding("warning", "Pareto k-hat is 0.90.", "")
    comparison = ds.compare({"a": made(0.0, 0.0, 0.01, findings=[doubt]), "b": scattered(-9.0, 0.01)})
    assert comparison.findings[0].message == "The fit of 'a' is not reliable: Pareto k-hat is 0.90."


def test_the_table_shows_everything():
    text = str(ds.compare({"linear": scattered(-10.0, 0.01), "quadratic": scattered(-12.0, 0.02)}))
    head, first, second = text.splitlines()
    assert head.split()[:3] == ["model", "log", "evidence"]
    assert first.split()[0] == "linear" and "-10.000 +- 0.010" in first and "0.8808" in first
    assert "-2.000 +- 0.022" in second and "0.1192" in second


@pytest.mark.parametrize(
    ("fits", "options", "error", "message"),
    [
        ([made(0.0)], {}, TypeError, r"dict of fits by name, .*; got list"),
        ({"a": made(0.0)}, {}, ValueError, r"at least two fits; got 1"),
        ({"a": made(0.0), "b": -3.0}, {}, TypeError, r"'b' to be a Fit, what ds\.sample\(target\) returns; got float"),
        (
            {"a": made(0.0), "b": made(0.0, has_normalizer=False, method="NUTS")},
            {},
            ValueError,
            r"'b' to have an evidence; got one by 'NUTS', which estimates none\. Use method='auto'",
        ),
        ({"a": made(0.0), "b": made(0.0)}, {"prior": {"a": 1.0}}, ValueError, r"of \['a', 'b'\]; got those of \['a'\]"),
        ({"a": made(0.0), "b": made(0.0)}, {"prior": {"a": 1.0, "b": 0.0}}, ValueError, r"positive prior prob"),
        ({"a": made(0.0), "b": made(0.0)}, {"prior": [0.5, 0.5]}, TypeError, r"by name; got list"),
    ],
)
def test_what_cannot_be_compared_is_refused(fits, options, error, message):
    with pytest.raises(error, match=message):
        ds.compare(fits, **options)


def test_unknown_names_are_refused():
    comparison = ds.compare({"a": scattered(0.0, 0.01), "b": scattered(-1.0, 0.01)})
    with pytest.raises(ValueError, match=r"one of the models \['a', 'b'\]; got 'c'"):
        comparison.log_bayes_factor("a", "c")
