"""Posterior predictive draws, log likelihoods of observations, ArviZ groups, tempering, and traced densities."""

from __future__ import annotations

import math
import pickle

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Predictive

import diffsampler as ds
from diffsampler import baselines
from diffsampler.integrations.pyro_graphs import WORTH_TRACING, TracedDensity
from diffsampler.integrations.pyro_prior import ModelPrior

Y = torch.tensor([1.0, 2.5, 0.3])
PRECISION = 3.25
MEAN = float(Y.sum()) / PRECISION
LOG_Z = float(torch.distributions.MultivariateNormal(torch.zeros(3), torch.eye(3) + 4.0).log_prob(Y))


def conjugate(y):
    theta = pyro.sample("theta", dist.Normal(0.0, 2.0))
    pyro.deterministic("twice", 2.0 * theta)
    with pyro.plate("data", 3 if y is None else len(y)):
        pyro.sample("y", dist.Normal(theta, 1.0), obs=y)


def regression(x, y=None):
    b = pyro.sample("b", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    pyro.factor("tilt", -0.01 * b.square().sum())
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Poisson((x @ b).exp()), obs=y)


def mixture(y):
    with pyro.plate("component", 2):
        mean = pyro.sample("mean", dist.Normal(0.0, 3.0))
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Categorical(torch.tensor([0.3, 0.7])))
        pyro.sample("y", dist.Normal(mean[z], 1.0), obs=y)


def one_switch(y):
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    z = pyro.sample("z", dist.Bernoulli(0.5))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(a + z, 1.0), obs=y)


def exact_draws(n, seed=0):
    noise = torch.randn(n, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return MEAN + PRECISION**-0.5 * noise


@pytest.fixture(scope="module")
def fit():
    target = ds.pyro.PyroTarget(conjugate, Y)
    return ds.sample(target, method=baselines.SMC(target, num_islands=4), num_samples=4000, seed=0)


def test_replicated_data_follow_the_posterior_predictive(fit):
    n = 4000
    drawn = fit.predict(n, deterministic=True, seed=1)
    assert set(drawn) == {"y", "twice"} and drawn["y"].shape == (n, 3)
    sd = math.sqrt(1.0 + 1.0 / PRECISION)
    # A new observation is N(mean, 1 + 1 / precision); SMC's draws count for at least a quarter. False alarm below 1e-4.
    error = 4.5 / math.sqrt(n / 4)
    assert abs(float(drawn["y"][:, 0].mean()) - MEAN) < error * sd
    assert abs(float(drawn["y"][:, 0].std()) / sd - 1.0) < error
    # Entries of one replicate share the parameter.
    correlation = float(torch.corrcoef(drawn["y"].T)[0, 1])
    assert abs(correlation - (1.0 / PRECISION) / sd**2) < error
    # Negative control: neither the data themselves nor draws of the prior.
    assert float(drawn["y"][:, 0].std()) < 2.0
    assert not torch.equal(drawn["y"], fit.predict(n, seed=2)["y"])
    assert torch.equal(drawn["y"], fit.predict(n, seed=1)["y"])
    assert fit.predict(5, args=(torch.zeros(7),))["y"].shape == (5, 7)
    assert fit.predict(5, args=(None,))["y"].shape == (5, 3)


def test_draws_go_to_predictive_of_pyro(fit):
    assert Predictive(conjugate, posterior_samples=fit.resample(7))(None)["y"].shape == (7, 3)


@pytest.mark.parametrize("model", [regression, mixture])
def test_predictions_agree_with_a_loop_over_pyro(model):
    x = torch.linspace(-1.0, 1.0, 10).reshape(5, 2)
    args = (x, torch.tensor([0.0, 1.0, 2.0, 0.0, 1.0])) if model is regression else (Y,)
    target = ds.pyro.PyroTarget(model, *args)
    n = 1000
    points = 0.5 + 0.3 * torch.randn(n, target.dim, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    values = target.constrain(points)
    ours = ds.pyro.predict(target, values, generator=torch.Generator().manual_seed(1))["y"]
    with torch.random.fork_rng():
        torch.manual_seed(2)
        rows = []
        for i in range(n):
            given = {name: value[i].float() for name, value in values.items()}
            free = poutine.uncondition(poutine.condition(model, given))
            conditioned = poutine.condition(free, given)
            rows.append(poutine.trace(conditioned).get_trace(*args).nodes["y"]["value"])
    theirs = torch.stack(rows).double()
    assert ours.shape == theirs.shape
    # Two independent means of a thousand draws, 4.5 standard errors of their difference, three or five of them: 1e-4.
    error = 4.5 * (ours.var(0) + theirs.var(0)).sqrt() / math.sqrt(n)
    assert bool(((ours.mean(0) - theirs.mean(0)).abs() < error).all())


def test_log_likelihood_of_every_observation():
    x = exact_draws(6)
    target = ds.pyro.PyroTarget(conjugate, Y)
    found = ds.pyro.log_likelihoods(target, x)
    torch.testing.assert_close(found["y"], dist.Normal(x, 1.0).log_prob(Y.double()))
    torch.testing.assert_close(found["y"].sum(-1), target.log_likelihood(x))
    torch.testing.assert_close(ds.pyro.observed_data(target)["y"], Y.double())
    counts = ds.pyro.PyroTarget(regression, torch.ones(2, 2), torch.tensor([1.0, 3.0]))
    # The factor is part of the density, but no observation.
    assert set(ds.pyro.log_likelihoods(counts, torch.zeros(4, 2))) == set(ds.pyro.observed_data(counts)) == {"y"}


def test_discrete_sites_are_summed_out_of_each_observation():
    target = ds.pyro.PyroTarget(mixture, Y)
    x = torch.randn(5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = ds.pyro.log_likelihoods(target, x)["y"]
    law = dist.MixtureSameFamily(
        dist.Categorical(torch.tensor([0.3, 0.7], dtype=torch.float64)), dist.Normal(x.unsqueeze(1), 1.0)
    )
    torch.testing.assert_close(found, law.log_prob(Y.double().expand(5, 3)), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.sum(-1), target.log_likelihood(x))
    # Observations that share one cannot be told apart.
    assert ds.pyro.log_likelihoods(ds.pyro.PyroTarget(one_switch, Y), x[:, :1]) == {}


def groups_of(data):
    """Names of groups of ``InferenceData`` (ArviZ 0.x) and of ``DataTree`` (1.x)."""
    return set(data.groups()) if callable(data.groups) else set(data.children)


def test_arviz_has_the_groups_of_the_data(fit):
    data = fit.to_arviz()
    assert {"posterior", "posterior_predictive", "log_likelihood", "observed_data"} <= groups_of(data)
    chains, draws = data.posterior["theta"].shape
    assert data.posterior_predictive["y"].shape == data.log_likelihood["y"].shape == (chains, draws, 3)
    np.testing.assert_allclose(data.observed_data["y"].values, Y.numpy())
    # Rows of all groups are resampled alike.
    theta = torch.tensor(data.posterior["theta"].values).unsqueeze(-1)
    expected = dist.Normal(theta, 1.0).log_prob(Y.double())
    np.testing.assert_allclose(data.log_likelihood["y"].values, expected.numpy())
    assert "log_likelihood" not in groups_of(fit.to_arviz(data=False))
    assert "log_weight" in fit.to_arviz(weights="keep").sample_stats


def test_loo_takes_them(fit):
    import arviz

    found = arviz.loo(fit.to_arviz())
    assert math.isfinite(float(found.elpd_loo if hasattr(found, "elpd_loo") else found.elpd))


def test_fit_without_its_model_cannot_predict(fit, tmp_path):
    fit.save(tmp_path / "fit")
    loaded = ds.load(tmp_path / "fit")
    with pytest.raises(TypeError, match="Expected a fit of a PyroTarget, which has data; got one of an unknown target"):
        loaded.predict()
    assert "observed_data" not in groups_of(loaded.to_arviz())
    with pytest.raises(ValueError, match="Expected values of all latent sites; got none of 'theta'"):
        ds.pyro.predict(fit.target, {})


def test_annealed_chains_temper_the_likelihood_from_the_model_s_prior():
    target = ds.pyro.PyroTarget(conjugate, Y)
    sampler = ds.AnnealedULA(target, num_steps=16, prior=ModelPrior(target), local_scale=0.3)
    particles = sampler.sample(4000, seed=0)
    estimate = particles.log_normalizer
    assert abs(estimate.value - LOG_Z) < 4.5 * estimate.std_error < 0.2
    # At temperature zero the anchors are the prior.
    x = exact_draws(5)
    k = torch.zeros(5, dtype=torch.long)
    torch.testing.assert_close(sampler.process.log_anchor(k, x, target.log_prob(x)), target.prior.log_prob(x))
    # The control, trained for a few steps through the prior's gradient.
    learned = ds.CMCD(target, num_steps=8, prior=ModelPrior(target)).fit(steps=3, batch_size=16)
    assert math.isfinite(learned.sample(64).elbo)

    def improper():
        a = pyro.sample("a", dist.ImproperUniform(dist.constraints.real, (), ()))
        pyro.sample("y", dist.Normal(a, 1.0), obs=torch.tensor(0.1))

    with pytest.raises(ValueError, match="Expected a proper prior"):
        ModelPrior(ds.pyro.PyroTarget(improper))


def test_smc_and_tempering_start_from_the_prior():
    target = ds.pyro.PyroTarget(mixture, Y)
    line = torch.linspace(-12.0, 12.0, 401, dtype=torch.float64)
    grid = torch.cartesian_prod(line, line)
    log_z = float(target.log_prob(grid).logsumexp(0) + 2.0 * (line[1] - line[0]).log())
    tempering = baselines.ParallelTempering(target, num_systems=8)
    for sampler, n, spare in ((baselines.SMC(target), 1000, 0.02), (tempering, 400, 0.2)):
        estimate = sampler.sample(n, seed=0).log_normalizer
        # Few replicates: errors are themselves uncertain.
        assert abs(estimate.value - log_z) < 6.0 * estimate.std_error + spare


def test_density_seen_often_is_traced_with_the_same_numbers():
    target = ds.pyro.PyroTarget(mixture, Y)
    x = torch.randn(6, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    first = target.log_prob_and_score(x)
    for _ in range(WORTH_TRACING + 1):
        target.log_prob_and_score(x)
    assert target._traced.failure is None and len(target._traced._graphs) == 1
    for a, b in zip(first, target.log_prob_and_score(x), strict=True):
        assert torch.equal(a, b)
    other = x.flip(0)
    for a, b in zip(target.log_prob_and_score(other), ds.Target.log_prob_and_score(target, other), strict=True):
        torch.testing.assert_close(a, b)
    shaped = target.log_prob_and_score(x.reshape(2, 3, 2))
    assert shaped[0].shape == (2, 3) and shaped[1].shape == (2, 3, 2)
    copy = pickle.loads(pickle.dumps(target))
    for a, b in zip(first, copy.log_prob_and_score(x), strict=True):
        assert torch.equal(a, b)


def test_traced_density_follows_parameters():
    def model():
        scale = pyro.param("scale", torch.tensor(1.0, dtype=torch.float64))
        pyro.sample("a", dist.Normal(0.0, scale))

    pyro.clear_param_store()
    try:
        target = ds.pyro.PyroTarget(model)
        x = torch.ones(2, 1, dtype=torch.float64)
        for _ in range(WORTH_TRACING + 2):
            before = target.log_prob_and_score(x)
        with torch.no_grad():
            pyro.param("scale").fill_(2.0)
        after = target.log_prob_and_score(x)
        torch.testing.assert_close(before[1], -x)
        torch.testing.assert_close(after[1], -x / 4.0)
    finally:
        pyro.clear_param_store()


def test_what_cannot_be_traced_is_evaluated():
    def density(x):
        return (x.sum(-1) if float(x[0, 0]) > 0.0 else -x.sum(-1)), x

    traced = TracedDensity(density)
    x = torch.ones(2, 1)
    for _ in range(WORTH_TRACING + 2):
        torch.testing.assert_close(traced(x)[0], torch.ones(2))
    assert traced.failure is not None
    torch.testing.assert_close(traced(-x)[0], torch.ones(2))

    def singular(x):
        matrix = torch.diag_embed(x)
        return torch.linalg.cholesky(matrix).diagonal(dim1=-2, dim2=-1).log().sum(-1), x

    def careful(x):
        return (x.sum(-1) * torch.nan, x) if bool((x <= 0.0).any()) else singular(x)

    traced = TracedDensity(singular)
    for _ in range(WORTH_TRACING + 2):
        traced(x)
    assert traced.failure is None
    traced._density = careful
    assert traced(-x)[0].isnan().all()
