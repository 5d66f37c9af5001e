"""Bad models and bad runs: each gets the error or the finding that names what is wrong; shapes and scales by chance.

Bad densities and bad calls have their own tables in ``test_bad_input``; the last test here counts all of them.
"""

from __future__ import annotations

import math
import re

import pyro
import pyro.distributions as dist
import pytest
import test_bad_input
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import diffsampler as ds
from diffsampler import baselines, targets
from diffsampler.checks import check_target
from diffsampler.pilot import run_pilot

DATA = torch.tensor([1.0, 2.0, 0.5])


def gaussian(x):
    return -0.5 * x.square().sum(-1)


def fixed():
    pyro.sample("y", dist.Normal(0.0, 1.0).expand([3]).to_event(1), obs=DATA)


def countless():
    count = pyro.sample("count", dist.Poisson(3.0))
    pyro.sample("x", dist.Normal(count, 1.0))


def waiting():
    trials = pyro.sample("trials", dist.Geometric(0.5))
    pyro.sample("x", dist.Normal(trials, 1.0))


def minibatch():
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 3, subsample_size=2) as index:
        pyro.sample("y", dist.Normal(mean, 1.0), obs=DATA[index])


def growing():
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    if x > 0:
        pyro.sample("z", dist.Normal(0.0, 1.0))


def noisy():
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(mean + torch.randn(()), 1.0).expand([3]).to_event(1), obs=DATA)


def masked():
    with pyro.plate("item", 3):
        pyro.sample("x", dist.Normal(0.0, 1.0).mask(torch.tensor([True, True, False])))


def point():
    pyro.sample("x", dist.Delta(torch.tensor(1.0)))
    pyro.sample("y", dist.Normal(0.0, 1.0))


def flat():
    pyro.sample("x", dist.ImproperUniform(dist.constraints.real, (), (2,)))


def located(y):
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(mean, 1.0).expand([3]).to_event(1), obs=y)


def observing(law, value):
    def model():
        pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.sample("y", law(), obs=torch.as_tensor(value))

    return model


def short():
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    pyro.sample("y", dist.Normal(mean, 1.0).to_event(1), obs=DATA)


def failing():
    pyro.sample("x", dist.Normal(0.0, 1.0))
    raise KeyError("no such column")


def empty():
    with pyro.plate("item", 0):
        pyro.sample("x", dist.Normal(0.0, 1.0))


def linear(features, y):
    beta = pyro.sample("beta", dist.ImproperUniform(dist.constraints.real, (), (features.shape[-1],)))
    pyro.sample("y", dist.Normal(features @ beta, 1.0).to_event(1), obs=y)


def logistic(features, y):
    beta = pyro.sample("beta", dist.ImproperUniform(dist.constraints.real, (), (features.shape[-1],)))
    pyro.sample("y", dist.Bernoulli(logits=features @ beta).to_event(1), obs=y)


def twice():
    """Both sites have one name, by mistake."""
    pyro.sample("mean", dist.Normal(0.0, 1.0))
    mean = pyro.sample("mean", dist.Normal(5.0, 1.0))
    pyro.sample("y", dist.Normal(mean, 1.0).expand([3]).to_event(1), obs=DATA)


def numbered():
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    for i in pyro.plate("data", 3):
        pyro.sample("y", dist.Normal(mean, 1.0), obs=DATA[i])


def detached():
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    scale = pyro.sample("scale", dist.HalfNormal(1.0))
    pyro.sample("y", dist.Normal(mean, 0.5 + scale.detach()).expand([3]).to_event(1), obs=DATA)


def item():
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(mean.item(), 1.0).expand([3]).to_event(1), obs=DATA)


COLLINEAR = torch.tensor([[1.0, 2.0], [2.0, 4.0], [3.0, 6.0], [-1.0, -2.0]])
SEPARATED = torch.tensor([[-2.0], [-1.0], [1.0], [2.0]])


def built(model, *args, **kwargs):
    return lambda: ds.pyro.PyroTarget(model, *args, **kwargs)


def sampled(model, *args):
    return lambda: ds.sample(ds.pyro.PyroTarget(model, *args), method="smc", num_samples=64)


MODELS = {
    "no latent site": (built(fixed), ValueError, r"with latent sites; got none\. Is every site observed\?"),
    "latent count": (built(countless), ValueError, r"finitely many values; got 'count', which cannot be summed out"),
    "latent waiting time": (built(waiting), ValueError, r"finitely many values; got 'trials'"),
    "minibatch": (built(minibatch), ValueError, r"'data' with subsample_size=2 of 3: .* Drop subsample_size"),
    "sites that come and go": (built(growing), ValueError, r"same latent sites and shapes in every run"),
    "random outside of sites": (built(noisy), ValueError, r"same log density at the same point; got two values"),
    "masked latent entries": (built(masked), ValueError, r"it ignores 1 of latent site 'x', so it cannot be norm"),
    "point mass": (built(point), ValueError, r"got Delta at 'x'\. Use pyro\.deterministic or obs="),
    "flat and without data": (built(flat), ValueError, r"it ignores 2 of latent site 'x'"),
    "data outside of the support": (
        built(observing(lambda: dist.Uniform(0.0, 1.0), 5.0)),
        ValueError,
        r"within the support \(Interval\(lower_bound=0\.0, upper_bound=1\.0\)\)",
    ),
    "negative data": (
        built(observing(lambda: dist.LogNormal(0.0, 1.0), -5.0)),
        ValueError,
        r"within the support \(GreaterThan",
    ),
    "NaN in the data": (built(located, DATA * torch.nan), ValueError, r"within the support \(Real\(\)\)"),
    "infinite data": (
        built(located, DATA * torch.inf),
        ValueError,
        r"finite log density at draws from the prior; .* log likelihood -inf at \{'mean'",
    ),
    "data of another shape": (built(short), ValueError, r"not broadcastable .*\(\[3\]\) vs torch\.Size\(\[2\]\)"),
    "data in a list": (built(located, [1.0, 2.0, 0.5]), ValueError, r"value argument to log_prob must be a Tensor"),
    "data in numpy": (built(located, DATA.numpy()), ValueError, r"value argument to log_prob must be a Tensor"),
    "negative scale": (built(observing(lambda: dist.Normal(0.0, -1.0), 0.0)), ValueError, r"parameter scale .* -1\.0"),
    "zero scale": (built(observing(lambda: dist.Normal(0.0, 0.0), 0.0)), ValueError, r"parameter scale .* GreaterThan"),
    "no covariance": (
        built(observing(lambda: dist.MultivariateNormal(torch.zeros(2), 1.0 - torch.eye(2)), torch.zeros(2))),
        ValueError,
        r"covariance_matrix .* PositiveDefinite",
    ),
    "empty plate": (built(empty), ZeroDivisionError, r"size cannot be zero"),
    "an error of its own": (built(failing), KeyError, r"no such column"),
    "missing argument": (built(located), TypeError, r"missing 1 required positional argument: 'y'"),
    "argument too many": (built(flat, 3), TypeError, r"takes 0 positional arguments but 1 was given"),
    "collinear features": (
        sampled(linear, COLLINEAR, DATA.new_tensor([1.0, 2.0, 2.5, -1.0])),
        ValueError,
        r"improper: along the direction \[-?0\.8944, -?0\.4472\]",
    ),
    "separated classes": (
        sampled(logistic, SEPARATED, torch.tensor([0.0, 0.0, 1.0, 1.0])),
        ValueError,
        r"improper: along the direction \[1\] .* Give flat directions a proper prior",
    ),
    "value taken out of the graph": (
        built(item),
        ValueError,
        r"gradient of the log density to follow latent site 'mean'; .* instead of \.item\(\)",
    ),
    "value detached": (built(detached), ValueError, r"gradient of the log density to follow latent site 'scale'"),
    "two latent sites of one name": (built(twice), ValueError, r"a name of its own; got two named 'mean'"),
    "one name for all data of a loop": (built(numbered), ValueError, r"got two named 'y'\. .*y_\{i\}"),
}


@pytest.mark.filterwarnings("ignore:.*Python loop over points")
@pytest.mark.parametrize("name", MODELS)
def test_model_is_refused(name):
    call, kind, message = MODELS[name]
    with pytest.raises(kind, match=message):
        call()


def run(build, method="auto", *, num_samples=512, **budget):
    return lambda: ds.sample(build(), method=method, num_samples=num_samples, budget=ds.Budget(**budget))


def chains(build, num_samples):
    def call():
        sampler = build()
        return ds.sample(sampler.target, method=sampler, num_samples=num_samples)

    return call


def density(function, dim=2, **options):
    return lambda: ds.Target.from_log_prob(function, dim=dim, **options)


def apart():
    """Eight starts, each near to another of nine modes."""
    corners = torch.tensor([[-5.0, -5.0], [5.0, 5.0], [-5.0, 5.0], [5.0, -5.0]], dtype=torch.float64)
    return baselines.HMC(targets.GaussianMixture.grid(9), num_chains=8, warmup=50, init=corners.repeat(2, 1))


def raising(x):
    if bool((x.abs() > 5.0).any()):
        raise ValueError("outside of the table")
    return gaussian(x)


RUNS = {
    "hardly any budget": (run(targets.GaussianMixture.forty, evaluations=10_000), "one pass only"),
    "hardly trained": (run(lambda: targets.ManyWell(dim=8), "pis", steps=2), r"Pareto k-hat is .* \(limit 0\.7\)"),
    "hardly trained, few that count": (run(targets.Funnel, "dis", steps=2), r"effective sample size is \d+ of 512"),
    "few particles": (run(lambda: targets.ManyWell(dim=64), "smc"), r"Replicate|ancestors|shift the particles|settled"),
    "hardly trained, tails lost": (
        run(lambda: targets.StudentT(20), "dds", num_samples=4000, steps=3),
        r"trained for 3 gradient steps only",
    ),
    "few particles, right at a glance": (
        run(lambda: targets.ManyWell(dim=32), "smc"),
        r"Islands disagree on log Z: standard deviation 0\.\d+",
    ),
    "few families": (run(lambda: targets.ManyWell(dim=32), "smc"), r"Only \d\.\d reference draws per island"),
    "chains apart": (chains(apart, 800), r"R-hat is .* \(limit 1\.05\)"),
    "chains too short": (
        chains(lambda: baselines.MALA(targets.Gaussian.ill_scaled(), num_chains=8, warmup=10), 80),
        r"R-hat|effective sample size",
    ),
    "edge of a support": (
        run(density(lambda x: gaussian(x).masked_fill(x[..., 0] < 0.0, -torch.inf)), "smc"),
        r"log_prob is -inf at \d+ of 16",
    ),
    "budget too small for its draws": (
        run(targets.Banana, "dis", num_samples=4000, steps=2, evaluations=4000),
        r"paid for \d+ of 4000 draws",
    ),
    "a density that fails far out": (run(density(raising), evaluations=60_000), r"raised errors at \d+ points"),
}


def spike(y):
    """One datum, flat mean and scale: the posterior has no finite mass, at no scale."""
    mean = pyro.sample("mean", dist.ImproperUniform(dist.constraints.real, (), ()))
    scale = pyro.sample("scale", dist.ImproperUniform(dist.constraints.positive, (), ()))
    pyro.sample("y", dist.Normal(mean, scale), obs=y)


@pytest.mark.parametrize("name", RUNS)
def test_run_is_flagged(name):
    call, message = RUNS[name]
    fit = call()
    said = [*(finding.message for finding in fit.findings), *fit.notes]
    assert any(re.search(message, text) for text in said), said


@pytest.mark.slow
def test_a_posterior_without_finite_mass_is_flagged():
    fit = ds.sample(ds.pyro.PyroTarget(spike, torch.tensor(1.0)), method="smc", num_samples=512)
    assert any("have not settled" in finding.message for finding in fit.findings), fit.findings


def test_at_least_forty_things_are_refused_or_flagged():
    tables = (MODELS, RUNS, test_bad_input.DENSITIES, test_bad_input.CALLS)
    names = [name for entries in tables for name in entries]
    assert len(names) >= 100 and len(set(names)) == len(names)


# Fuzz: shapes that a density returns, scales that it has, and shapes of models.


@settings(max_examples=60, deadline=None)
@given(dim=st.integers(1, 24), shape=st.sampled_from(["n", "1n", "n1", "nd", "dn", "d", "", "1", "n+1", "nn", "n-1"]))
def test_only_one_shape_is_accepted(dim, shape):
    def log_prob(x):
        n, d = x.shape
        value = gaussian(x)
        if shape == "n":
            return value
        sizes = {"1n": (1, n), "n1": (n, 1), "nd": (n, d), "dn": (d, n), "d": (d,), "": (), "1": (1,), "nn": (n, n)}
        sizes |= {"n+1": (n + 1,), "n-1": (n - 1,)}
        return value.sum() + x.new_zeros(sizes[shape])

    target = ds.Target.from_log_prob(log_prob, dim=dim)
    if shape == "n":
        check_target(target)
    else:
        with pytest.raises(ValueError, match=r"Expected log_prob to return shape|one point|batch"):
            check_target(target)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    dim=st.integers(1, 200),
    scale=st.floats(-3.0, 4.0),
    place=st.floats(-5.0, 5.0),
    offset=st.floats(-1e6, 1e6),
    double=st.booleans(),
)
def test_sound_densities_of_any_size_and_scale_pass(dim, scale, place, offset, double):
    def log_prob(x):
        y = x.double() if double else x
        return offset + gaussian((y - 10.0**place) / 10.0**scale)

    assert check_target(ds.Target.from_log_prob(log_prob, dim=dim)) == []


@settings(max_examples=25, deadline=None)
@given(
    outer=st.integers(1, 4),
    inner=st.integers(1, 3),
    event=st.integers(0, 3),
    batch=st.sampled_from([(), (1,), (5,), (2, 3)]),
    seed=st.integers(0, 2**31 - 1),
)
def test_models_of_any_shape(outer, inner, event, batch, seed):
    data = torch.randn(inner, outer, max(event, 1), generator=torch.Generator().manual_seed(seed))

    def model(y):
        law = dist.Normal(0.0, 2.0) if event == 0 else dist.Normal(0.0, 2.0).expand([event]).to_event(1)
        with pyro.plate("outer", outer, dim=-1), pyro.plate("inner", inner, dim=-2):
            x = pyro.sample("x", law)
            values = y[..., 0] if event == 0 else y
            noise = dist.Normal(x, 1.0)
            pyro.sample("y", noise if event == 0 else noise.to_event(1), obs=values)

    target = ds.pyro.PyroTarget(model, data)
    size = outer * inner * max(event, 1)
    assert target.dim == size and target.vectorized
    x = torch.randn(*batch, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    shape = (inner, outer) if event == 0 else (inner, outer, event)
    assert target.log_prob(x).shape == batch
    assert target.constrain(x)["x"].shape == batch + shape
    latent = x.reshape(*batch, -1)
    y = data.double().flatten() if event else data[..., 0].double().flatten()
    exact = dist.Normal(0.0, 2.0).log_prob(latent).sum(-1) + dist.Normal(latent, 1.0).log_prob(y).sum(-1)
    assert torch.allclose(target.log_prob(x), exact, rtol=1e-6)


@settings(max_examples=6, deadline=None)
@given(dim=st.integers(1, 6), scale=st.floats(-3.0, 4.0), place=st.floats(-3.0, 3.0), seed=st.integers(0, 1000))
def test_the_pilot_finds_any_gaussian(dim, scale, place, seed):
    deviation = 10.0 ** (scale + torch.linspace(-0.5, 0.5, dim, dtype=torch.float64))
    centre = 10.0**place * torch.ones(dim, dtype=torch.float64)
    target = ds.Target.from_log_prob(lambda x: gaussian((x - centre) / deviation), dim=dim)
    result = run_pilot(target, generator=torch.Generator().manual_seed(seed), num_particles=1024)
    exact = 0.5 * dim * math.log(2.0 * math.pi) + float(deviation.log().sum())
    log_z = result.particles.log_normalizer
    # Six standard errors of 16 islands: false alarm below 1e-4 each.
    assert abs(log_z.value - exact) < 6.0 * log_z.std_error + 1e-3
