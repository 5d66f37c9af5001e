"""Discrete latent sites, summed out: against sums by hand, Pyro's own potential, and its TraceEnum_ELBO."""

from __future__ import annotations

import contextlib
import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pyro import poutine
from pyro.infer import TraceEnum_ELBO, config_enumerate
from pyro.infer.mcmc.util import initialize_model

from diffsampler.integrations.pyro import PyroTarget

Y = torch.tensor([-3.0, -2.5, 0.1, 4.0, 4.2], dtype=torch.float64)
TRANSITION = torch.tensor([[0.8, 0.2], [0.3, 0.7]], dtype=torch.float64)


@pytest.fixture(autouse=True)
def _double():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def mixture(y):
    weight = pyro.sample("weight", dist.Dirichlet(torch.ones(3)))
    with pyro.plate("component", 3):
        mean = pyro.sample("mean", dist.Normal(0.0, 5.0))
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Categorical(weight))
        pyro.deterministic("centre", mean[z])
        pyro.sample("y", dist.Normal(mean[z], 1.0), obs=y)
    pyro.deterministic("spread", mean.max() - mean.min())


def mixture_by_hand(y):
    weight = pyro.sample("weight", dist.Dirichlet(torch.ones(3)))
    with pyro.plate("component", 3):
        mean = pyro.sample("mean", dist.Normal(0.0, 5.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.MixtureSameFamily(dist.Categorical(weight), dist.Normal(mean, 1.0)), obs=y)


def hidden_markov(y):
    with pyro.plate("state", 2):
        mean = pyro.sample("mean", dist.Normal(0.0, 3.0))
    z = 0
    for t in pyro.markov(range(len(y))):
        z = pyro.sample(f"z_{t}", dist.Categorical(TRANSITION[z]))
        pyro.sample(f"y_{t}", dist.Normal(mean[z], 1.0), obs=y[t])


def switch(y):
    """A discrete site that a continuous latent one depends on, so that the prior itself is a mixture."""
    on = pyro.sample("on", dist.Bernoulli(0.3))
    a = pyro.sample("a", dist.Normal(4.0 * on, 0.5))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(a, 1.0 + on), obs=y)


def nested(y):
    """A discrete site for each group, and one for each entry of it."""
    mean = pyro.sample("mean", dist.Normal(0.0, 2.0).expand([2]).to_event(1))
    share = pyro.sample("share", dist.Beta(2.0, 2.0))
    with pyro.plate("group", y.shape[1], dim=-1):
        kind = pyro.sample("kind", dist.Bernoulli(share))
        with pyro.plate("entry", y.shape[0], dim=-2):
            z = pyro.sample("z", dist.Categorical(torch.stack([1.0 + kind, 2.0 - kind], -1)))
            pyro.sample("y", dist.Normal(mean[z.long()] + kind, 1.0), obs=y)


def shared(y):
    """One discrete site for all data, and a loop instead of a plate."""
    k = pyro.sample("k", dist.Categorical(torch.tensor([0.2, 0.5, 0.3])))
    scale = pyro.sample("scale", dist.HalfNormal(2.0))
    for i in pyro.plate("data", len(y)):
        w = pyro.sample(f"w_{i}", dist.Bernoulli(0.5))
        pyro.sample(f"y_{i}", dist.Normal(2.0 * k - w, scale + 0.1), obs=y[i])


MODELS = [
    (mixture, (Y,)),
    (hidden_markov, (Y,)),
    (switch, (Y[:3],)),
    (nested, (Y[:4].reshape(2, 2),)),
    (shared, (Y[:3],)),
]


def points(n, dim, *, scale=0.7, seed=0):
    return scale * torch.randn(n, dim, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("model", "args"), MODELS, ids=[model.__name__ for model, _ in MODELS])
def test_density_and_score_equal_the_potential_of_pyro(model, args):
    target = PyroTarget(model, *args)
    assert target.vectorized and target.prior is not None
    x = points(4, target.dim)
    log_prob, score = target.log_prob_and_score(x)
    with torch.random.fork_rng():
        _, potential, _, _ = initialize_model(config_enumerate(model), args, max_plate_nesting=3)
        for i in range(len(x)):
            u = {name: value.clone().requires_grad_() for name, value in target.unflatten(x[i]).items()}
            expected = -potential(u)
            gradient = torch.autograd.grad(expected, [u[name] for name in target.names])
            torch.testing.assert_close(log_prob[i], expected.detach())
            torch.testing.assert_close(score[i], torch.cat([part.reshape(-1) for part in gradient]))


@pytest.mark.parametrize(("model", "args"), MODELS, ids=[model.__name__ for model, _ in MODELS])
def test_prior_and_likelihood_come_apart(model, args):
    """The prior is the same model without data: normalized, and drawn from as it is."""
    target = PyroTarget(model, *args)
    x = points(3, target.dim)
    torch.testing.assert_close(target.log_prob(x), target.prior.log_prob(x) + target.log_likelihood(x))
    n = 4000
    draws = target.prior.sample(n, generator=torch.Generator().manual_seed(3))
    centre = draws.median(0).values
    q = torch.distributions.Normal(centre, 0.6 * (draws - centre).abs().median(0).values)
    ratio = (q.log_prob(draws).sum(-1) - target.prior.log_prob(draws)).exp()
    # E_p[q / p] = 1; 4.5 standard errors: false alarm 7e-6 each.
    assert abs(float(ratio.mean()) - 1.0) < 4.5 * float(ratio.std()) / math.sqrt(n) < 0.4


def test_sum_over_components_is_the_mixture_written_by_hand():
    ours, theirs = PyroTarget(mixture, Y), PyroTarget(mixture_by_hand, Y)
    x = points(6, ours.dim)
    for a, b in zip(ours.log_prob_and_score(x), theirs.log_prob_and_score(x), strict=True):
        torch.testing.assert_close(a, b)
    values = ours.constrain(x, deterministic=True)
    assert set(values) == {"weight", "mean", "spread"}
    torch.testing.assert_close(values["spread"], values["mean"].amax(-1) - values["mean"].amin(-1))


def test_hidden_paths_are_summed_out():
    target = PyroTarget(hidden_markov, Y)
    mean = torch.tensor([[0.3, -1.0]])
    terms = []
    for path in itertools.product(range(2), repeat=len(Y)):
        previous = (0, *path[:-1])
        log_path = sum(float(TRANSITION[a, b].log()) for a, b in zip(previous, path, strict=True))
        terms.append(log_path + float(dist.Normal(mean[0, list(path)], 1.0).log_prob(Y).sum()))
    expected = torch.tensor(terms).logsumexp(0)
    torch.testing.assert_close(target.log_likelihood(mean)[0], expected)


def test_continuous_site_behind_a_discrete_one_has_a_mixture_for_a_prior():
    target = PyroTarget(switch, Y[:3])
    x = torch.linspace(-2.0, 7.0, 50).unsqueeze(-1)
    law = dist.MixtureSameFamily(dist.Categorical(torch.tensor([0.7, 0.3])), dist.Normal(torch.tensor([0.0, 4.0]), 0.5))
    torch.testing.assert_close(target.prior.log_prob(x), law.log_prob(x[:, 0]))
    draws = target.prior.sample(4000, generator=torch.Generator().manual_seed(0))
    # Share of the upper mode: 4.5 standard errors, false alarm 7e-6.
    share = float((draws > 2.0).double().mean())
    assert abs(share - 0.3) < 4.5 * math.sqrt(0.21 / 4000)


def test_elbo_of_pyro_agrees():
    """With a point mass for a guide TraceEnum_ELBO is the density, apart from Jacobians."""
    target = PyroTarget(mixture, Y)
    x = points(1, target.dim)
    values = {name: value[0] for name, value in target.constrain(x).items()}
    conditioned = config_enumerate(poutine.condition(mixture, values))
    loss = TraceEnum_ELBO(max_plate_nesting=1).loss(conditioned, lambda y: None, Y)
    assert float(target.log_likelihood(x)) + dist_log_prior(values) == pytest.approx(-loss)


def dist_log_prior(values):
    weight = dist.Dirichlet(torch.ones(3)).log_prob(values["weight"])
    return float(weight + dist.Normal(0.0, 5.0).log_prob(values["mean"]).sum())


# Fixed examples: no false alarm.
@given(
    sizes=st.lists(st.integers(1, 3), min_size=1, max_size=2),
    states=st.integers(2, 4),
    outside=st.booleans(),
    masked=st.booleans(),
    one_hot=st.booleans(),
)
@settings(max_examples=25, deadline=None, derandomize=True)
def test_any_plates_agree_with_pyro(sizes, states, outside, masked, one_hot):
    shape = tuple(reversed(sizes))
    data = torch.arange(math.prod(shape), dtype=torch.float64).reshape(shape).sin()

    def model():
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0).expand([states]).to_event(1))
        logits = torch.linspace(0.0, 1.0, states)
        law = dist.OneHotCategorical(logits=logits) if one_hot else dist.Categorical(logits=logits)
        top = pyro.sample("top", dist.Bernoulli(0.4)) if outside else torch.zeros(())
        with contextlib.ExitStack() as stack:
            for i, size in enumerate(sizes):
                stack.enter_context(pyro.plate(f"plate_{i}", size, dim=-1 - i))
            if masked:
                stack.enter_context(poutine.mask(mask=data > 0.0))
            z = pyro.sample("z", law)
            centre = (z * mean).sum(-1) if one_hot else mean[z]
            pyro.sample("y", dist.Normal(centre + top, 1.0), obs=data)

    target = PyroTarget(model)
    assert target.vectorized and (target.prior is None) == masked
    x = points(2, target.dim)
    with torch.random.fork_rng():
        _, potential, _, _ = initialize_model(config_enumerate(model), (), max_plate_nesting=2)
        expected = torch.stack([-potential(target.unflatten(row)) for row in x])
    torch.testing.assert_close(target.log_prob(x), expected)


def _undeclared():
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    z = pyro.sample("z", dist.Categorical(torch.ones(2)).expand([3]))
    pyro.sample("y", dist.Normal(a + z, 1.0), obs=torch.zeros(3))


def _crossed():
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    rows, columns = pyro.plate("rows", 2, dim=-2), pyro.plate("columns", 3, dim=-1)
    with rows:
        x = pyro.sample("x", dist.Bernoulli(0.5))
    with columns:
        y = pyro.sample("y", dist.Bernoulli(0.5))
    with rows, columns:
        pyro.sample("z", dist.Normal(a + x * y, 1.0), obs=torch.zeros(2, 3))


def _support():
    z = pyro.sample("z", dist.Bernoulli(0.5))
    pyro.sample("a", dist.Uniform(0.0, 1.0 + z))


def _only_discrete():
    pyro.sample("z", dist.Bernoulli(0.5))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (_undeclared, "Expected discrete site 'z' to declare its batch of shape"),
        (_crossed, "Expected discrete sites whose plates are nested"),
        (_support, "Expected latent site 'a' to keep the shape"),
        (_only_discrete, "Expected a model with latent sites; got none"),
    ],
)
def test_models_that_cannot_be_summed_are_refused(model, message):
    with pytest.raises(ValueError, match=message):
        PyroTarget(model)


def test_impossible_values_have_gradients():
    def model():
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        z = pyro.sample("z", dist.Categorical(torch.tensor([1.0, 0.0])))
        w = pyro.sample("w", dist.Categorical(torch.eye(2)[z]))
        pyro.sample("y", dist.Normal(a + w, 1.0), obs=torch.zeros(()))

    target = PyroTarget(model)
    log_prob, score = target.log_prob_and_score(points(4, 1))
    assert log_prob.isfinite().all() and score.isfinite().all()
    torch.testing.assert_close(
        target.log_likelihood(points(4, 1)), dist.Normal(points(4, 1)[:, 0], 1.0).log_prob(torch.zeros(()))
    )
