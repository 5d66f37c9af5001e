"""Pyro models as targets, against Pyro's own potential, closed forms and quadrature."""

from __future__ import annotations

import contextlib
import itertools
import math
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.mcmc.util import initialize_model

from diffsampler.baselines.pyro_nuts import PyroNUTS
from diffsampler.integrations import examples as posteriors
from diffsampler.integrations.pyro import PyroTarget, nuts, sample_prior
from diffsampler.integrations.pyro_laws import law_log_prob

SIGMA = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])
EFFECT = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
X = torch.linspace(-1.0, 1.0, 40).reshape(20, 2)
LABEL = (X.sum(-1) > 0.1).to(torch.get_default_dtype())


def eight_schools(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("school", 8):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, SIGMA), obs=y)


def logistic(x, y):
    b = pyro.sample("b", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    pyro.sample("y", dist.Bernoulli(logits=x @ b).to_event(1), obs=y)


def indexing(y):
    th = pyro.sample("th", dist.Normal(0.0, 3.0).expand([2]).to_event(1))
    pyro.sample("y", dist.Normal(th[0] ** 2, 0.5), obs=y)


def mixture(y):
    w = pyro.sample("w", dist.Dirichlet(torch.ones(3)))
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0).expand([3]).to_event(1))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.MixtureSameFamily(dist.Categorical(w), dist.Normal(mu, 1.0)), obs=y)


def correlated(y):
    chol = pyro.sample("chol", dist.LKJCholesky(3, 2.0))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0).expand([3]).to_event(1))
    with pyro.plate("data", len(y)):
        law = dist.MultivariateNormal(y.new_zeros(3), scale_tril=scale[..., None] * chol)
        pyro.sample("y", law, obs=y)


def branching(y):
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    scale = 1.0 if a > 0 else 2.0
    pyro.sample("y", dist.Normal(a, scale), obs=y)


def supports():
    pyro.sample("positive", dist.Gamma(2.0, 3.0))
    pyro.sample("unit", dist.Beta(2.0, 3.0))
    pyro.sample("interval", dist.Uniform(-2.0, 5.0).expand([2]).to_event(1))
    pyro.sample("simplex", dist.Dirichlet(torch.tensor([1.0, 2.0, 3.0, 4.0])))
    base = dist.Normal(0.0, 1.0).expand([3]).to_event(1)
    pyro.sample("ordered", dist.TransformedDistribution(base, dist.transforms.OrderedTransform()))
    pyro.sample("correlation", dist.LKJCholesky(3, 1.5))
    pyro.sample("vector", dist.MultivariateNormal(torch.zeros(2), torch.tensor([[2.0, 0.5], [0.5, 1.0]])))
    with pyro.plate("rows", 2):
        pyro.sample("bounded", dist.HalfNormal(2.0).expand([2, 3]).to_event(1))


def conjugate(y, scale=2.0):
    theta = pyro.sample("theta", dist.Normal(0.0, scale))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(theta, 1.0), obs=y)


def chained():
    """A support and a scale that depend on another site."""
    a = pyro.sample("a", dist.Gamma(3.0, 1.0))
    pyro.sample("b", dist.Uniform(0.0, a))
    pyro.sample("c", dist.Normal(0.0, a))


def conjugate_log_evidence(y, scale=2.0):
    covariance = torch.eye(len(y)) + scale**2
    return float(torch.distributions.MultivariateNormal(torch.zeros(len(y)), covariance).log_prob(y))


@contextlib.contextmanager
def double_precision():
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def points(n, dim, *, scale=0.7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(n, dim, dtype=torch.float64, generator=generator)


def quietly(model, *args):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*Python loop over points.*", UserWarning)
        return PyroTarget(model, *args)


MODELS = [
    (eight_schools, (EFFECT,)),
    (logistic, (X, LABEL)),
    (indexing, (torch.tensor(4.0),)),
    (mixture, (torch.tensor([-3.0, -2.5, 0.1, 4.0, 4.2]),)),
    (correlated, (torch.linspace(-1.0, 2.0, 12).reshape(4, 3).sin(),)),
    (branching, (torch.tensor(0.3),)),
    (supports, ()),
]


@pytest.mark.parametrize(("model", "args"), MODELS, ids=[model.__name__ for model, _ in MODELS])
def test_density_and_score_equal_the_potential_of_pyro(model, args):
    target = quietly(model, *args)
    x = points(5, target.dim)
    log_prob, score = target.log_prob_and_score(x)
    with double_precision(), torch.random.fork_rng():
        wide = [a.double() if a.is_floating_point() else a for a in args]
        _, potential, _, _ = initialize_model(model, wide)
        for i in range(len(x)):
            u = {name: value.clone().requires_grad_() for name, value in target.unflatten(x[i]).items()}
            expected = -potential(u)
            gradient = torch.autograd.grad(expected, [u[name] for name in target.names])
            torch.testing.assert_close(log_prob[i], expected.detach(), rtol=1e-5, atol=1e-5)
            flat = torch.cat([part.reshape(-1) for part in gradient])
            torch.testing.assert_close(score[i], flat, rtol=1e-5, atol=1e-5)
    assert target.vectorized == (model is not branching)


@pytest.mark.parametrize(("model", "args"), MODELS, ids=[model.__name__ for model, _ in MODELS])
def test_batch_shapes_dtypes_and_single_points_agree(model, args):
    target = quietly(model, *args)
    x = points(6, target.dim)
    log_prob = target.log_prob(x)
    assert log_prob.dtype == torch.float64 and log_prob.shape == (6,)
    torch.testing.assert_close(target.log_prob(x.reshape(2, 3, -1)), log_prob.reshape(2, 3))
    torch.testing.assert_close(target.log_prob(x[0]), log_prob[0])
    single = target.log_prob(x.float())
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), log_prob, rtol=1e-4, atol=1e-4)


def test_supports_round_trip_and_keep_their_constraints():
    target = PyroTarget(supports)
    assert target.names == [
        "positive",
        "unit",
        "interval",
        "simplex",
        "ordered",
        "correlation",
        "vector",
        "bounded",
    ]
    x = points(7, target.dim, scale=1.5)
    values = target.constrain(x)
    torch.testing.assert_close(target.unconstrain(values), x)
    torch.testing.assert_close(target.flatten(target.unflatten(x)), x, rtol=0, atol=0)
    assert sorted((s.start, s.stop) for s in target.site_slices.values())[-1][1] == target.dim
    assert (values["positive"] > 0).all() and values["unit"].shape == (7,)
    assert ((values["interval"] > -2) & (values["interval"] < 5)).all() and values["interval"].shape == (7, 2)
    torch.testing.assert_close(values["simplex"].sum(-1), torch.ones(7, dtype=torch.float64))
    assert (values["ordered"].diff(dim=-1) > 0).all()
    correlation = values["correlation"] @ values["correlation"].mT
    torch.testing.assert_close(torch.diagonal(correlation, dim1=-2, dim2=-1), torch.ones(7, 3, dtype=torch.float64))
    assert values["bounded"].shape == (7, 2, 3)
    assert target.constrain(x.reshape(7, 1, -1))["bounded"].shape == (7, 1, 2, 3)
    with pytest.raises(ValueError, match="Expected values of all sites"):
        target.flatten({"unit": x[:, 0]})


@pytest.mark.parametrize("model", [chained, lambda: pyro.sample("w", dist.Dirichlet(torch.tensor([2.0, 1.0, 3.0])))])
def test_prior_draws_follow_the_prior_density(model):
    prior = PyroTarget(model).prior
    n = 20_000
    x = prior.sample(n, generator=torch.Generator().manual_seed(1))
    # A Gaussian q inside p: E_p[q / p] = 1 exactly. Normal approximation, 4.5 standard errors: false alarm 7e-6.
    q = torch.distributions.MultivariateNormal(x.median(0).values, torch.diag(0.3 * x.std(0)) ** 2)
    ratio = (q.log_prob(x) - prior.log_prob(x)).exp()
    error = 4.5 * float(ratio.std()) / math.sqrt(n)
    assert abs(float(ratio.mean()) - 1.0) < error < 0.3
    # Negative control: a density with a wrong factor in one coordinate fails.
    assert abs(float((ratio * (-x[:, 0].abs()).exp()).mean()) - 1.0) > error


def test_prior_draws_keep_the_dependence_between_sites():
    x = sample_prior(chained, num_samples=4000, seed=3)
    assert ((x["b"] > 0) & (x["b"] < x["a"])).all()
    # E[c^2] = E[a^2] = 12 and var(c^2) < 3 E[a^4] = 3 * 360: 4.5 standard errors, false alarm about 7e-6.
    assert abs(float(x["c"].square().mean()) - 12.0) < 4.5 * math.sqrt(3 * 360 / 4000)
    # Given a, b / a is uniform: its correlation with a vanishes, that of b does not.
    ratio = torch.corrcoef(torch.stack([x["b"] / x["a"], x["a"], x["b"]]))
    assert abs(float(ratio[0, 1])) < 4.5 / math.sqrt(4000) < float(ratio[1, 2])


def test_prior_is_drawn_as_a_batch_where_vmap_draws_anew_and_in_a_loop_elsewhere():
    def heavy():
        scale = pyro.sample("scale", dist.HalfCauchy(1.0))
        pyro.sample("beta", dist.StudentT(3.0, 0.0, scale))

    for model, args in (
        (chained, ()),
        (eight_schools, (EFFECT,)),
        (heavy, ()),
        (correlated, (EFFECT[:6].reshape(2, 3),)),
    ):
        x = PyroTarget(model, *args).prior.sample(50, generator=torch.Generator().manual_seed(0))
        assert x.shape[0] == 50 and x.dtype == torch.float64
        assert all(len(column.unique()) == 50 for column in x.T)


def test_seed_decides_the_prior_draws_and_the_global_generator_is_untouched():
    prior = PyroTarget(eight_schools, EFFECT).prior
    state = torch.random.get_rng_state()
    first, again, other = (prior.sample(5, generator=torch.Generator().manual_seed(s)) for s in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(state, torch.random.get_rng_state())


def test_evidence_of_the_conjugate_model_is_exact():
    y = torch.tensor([1.0, 2.5, 0.3])
    target = PyroTarget(conjugate, y)
    x = torch.linspace(-12.0, 12.0, 20_001, dtype=torch.float64).unsqueeze(-1)
    step = math.log(24.0 / 20_000)
    assert float(target.log_prob(x).logsumexp(0)) + step == pytest.approx(conjugate_log_evidence(y), abs=1e-6)
    assert float(target.prior.log_prob(x).logsumexp(0)) + step == pytest.approx(0.0, abs=1e-6)
    torch.testing.assert_close(target.log_prob(x), target.prior.log_prob(x) + target.log_likelihood(x))
    expected = dist.Normal(x, 1.0).log_prob(y.double()).sum(-1)
    torch.testing.assert_close(target.log_likelihood(x), expected)
    assert target.prior.log_normalizer == 0.0 and target.log_normalizer is None


def test_support_that_depends_on_another_site_is_normalized():
    def model():
        a = pyro.sample("a", dist.Uniform(1.0, 3.0))
        pyro.sample("b", dist.Uniform(0.0, a))

    line = torch.linspace(-14.0, 14.0, 701, dtype=torch.float64)
    total = PyroTarget(model).prior.log_prob(torch.cartesian_prod(line, line)).logsumexp(0) + 2 * math.log(28 / 700)
    assert float(total) == pytest.approx(0.0, abs=1e-4)


def test_masks_scales_factors_parameters_and_deterministic_sites():
    def model(y):
        scale = pyro.param("known_scale", lambda: torch.tensor(1.5), constraint=dist.constraints.positive)
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        pyro.deterministic("twice", 2.0 * a)
        pyro.factor("tilt", -0.1 * a**2)
        with poutine.scale(scale=3.0), poutine.mask(mask=torch.tensor([True, False])):
            pyro.sample("y", dist.Normal(a, scale), obs=y)
        for i in pyro.plate("loop", 2):
            pyro.sample(f"z_{i}", dist.Normal(a, 1.0), obs=y[i])

    y = torch.tensor([0.7, -0.4])
    pyro.clear_param_store()
    try:
        target = PyroTarget(model, y)
        x = points(4, 1)
        expected = -0.1 * x[:, 0] ** 2 + 3.0 * dist.Normal(x[:, 0], 1.5).log_prob(y[0].double())
        expected = expected + dist.Normal(x, 1.0).log_prob(y.double()).sum(-1)
        torch.testing.assert_close(target.log_likelihood(x), expected)
        assert not target.log_prob(x).requires_grad
        values = target.constrain(x, deterministic=True)
        torch.testing.assert_close(values["twice"], 2.0 * x[:, 0])
        assert set(target.constrain(x)) == {"a"}
    finally:
        pyro.clear_param_store()


def test_likelihood_with_data_in_a_closure_is_promoted():
    module = torch.nn.Linear(2, 1)

    def model():
        b = pyro.sample("b", dist.MultivariateNormal(torch.zeros(2, dtype=torch.float32), torch.eye(2)))
        pyro.sample("y", dist.Normal(X @ b + module(b), 1.0).to_event(1), obs=LABEL)

    target = PyroTarget(model)
    x = points(3, 2)
    with torch.no_grad():
        mean = x @ X.double().T + (x @ module.weight.double().T + module.bias.double())
    expected = dist.Normal(mean, 1.0).log_prob(LABEL.double()).sum(-1)
    torch.testing.assert_close(target.log_likelihood(x), expected)
    assert target.vectorized and module.weight.dtype == torch.float32
    assert target.prior.sample(3).shape == (3, 2)


def test_arguments_of_the_model_never_collide_with_our_own():
    def model(y, *, model, self, dim, seed=None):
        pyro.sample("y", dist.Normal(pyro.sample("a", dist.Normal(model, self)), dim), obs=y)

    target = PyroTarget(model, torch.tensor(0.2), model=0.0, self=1.0, dim=2.0)
    assert target.dim == 1


@pytest.mark.parametrize("setting", [True, False])
def test_settings_of_the_user_survive(setting):
    def fails(y):
        pyro.sample("k", dist.Poisson(2.0))

    switch = torch.distributions.Distribution
    before = switch._validate_args
    state = torch.random.get_rng_state()
    pyro.enable_validation(setting)
    switch.set_default_validate_args(not setting)
    try:
        target = PyroTarget(eight_schools, EFFECT)
        target.log_prob_and_score(points(3, 10))
        target.prior.sample(3, generator=torch.Generator().manual_seed(0))
        with pytest.raises(ValueError, match="finitely many"):
            PyroTarget(fails, EFFECT)
        assert switch._validate_args is (not setting)
        assert pyro.infer.util.is_validation_enabled() is setting
        assert pyro.distributions.is_validation_enabled() is setting
        assert torch.get_default_dtype() == torch.float32
        assert torch.equal(state, torch.random.get_rng_state())
    finally:
        pyro.enable_validation(True)
        switch.set_default_validate_args(before)


def test_branching_model_runs_in_a_loop_after_one_warning_that_says_where():
    with pytest.warns(
        UserWarning, match=r"Python loop over points.*branches on a sampled value at .*test_pyro.py:"
    ) as record:
        target = PyroTarget(branching, torch.tensor(0.3))
    assert len(record) == 1 and record[0].filename == __file__
    x = torch.tensor([[-1.0], [1.0]], dtype=torch.float64)
    expected = dist.Normal(x, torch.tensor([[2.0], [1.0]])).log_prob(torch.tensor(0.3)).sum(-1)
    torch.testing.assert_close(target.log_likelihood(x), expected, rtol=1e-6, atol=1e-6)
    assert target.prior.sample(4, generator=torch.Generator().manual_seed(0)).shape == (4, 1)
    torch.testing.assert_close(target.unconstrain(target.constrain(x)), x)


def test_model_that_reads_a_number_out_of_a_tensor_runs_in_a_loop():
    def model():
        a = pyro.sample("a", dist.HalfNormal(1.0))
        pyro.sample("b", dist.Normal(a, 2.0 if a.item() > 1.0 else 1.0))

    with pytest.warns(UserWarning, match=r"takes .item\(\) of a sampled value"):
        assert PyroTarget(model).log_prob(points(3, 2)).shape == (3,)


@pytest.mark.parametrize("cut", [lambda a: a.item(), lambda a: a.detach(), lambda a: torch.as_tensor(a.tolist())])
@pytest.mark.filterwarnings("ignore:.*Python loop over points")
def test_model_that_cuts_its_gradient_is_refused_by_the_site_at_fault(cut):
    def model():
        pyro.sample("whole", dist.Normal(0.0, 1.0))
        a = pyro.sample("cut", dist.HalfNormal(1.0))
        pyro.sample("b", dist.Normal(cut(a), 1.0))

    with pytest.raises(ValueError, match=r"gradient of the log density to follow latent site 'cut'; .* torch\.where"):
        PyroTarget(model)


def test_multinomial_counts_are_a_batch():
    counts = torch.tensor([[3.0, 0.0, 2.0], [1.0, 4.0, 0.0]])

    def model():
        shares = pyro.sample("shares", dist.Dirichlet(torch.ones(3)))
        with pyro.plate("table", 2):
            pyro.sample("counts", dist.Multinomial(5, probs=shares, validate_args=False), obs=counts)

    target = PyroTarget(model)
    assert target.vectorized
    x = points(7, 2)
    shares = target.constrain(x)["shares"]
    expected = torch.stack(
        [torch.distributions.Multinomial(5, probs=s).log_prob(counts.double()).sum() for s in shares]
    )
    torch.testing.assert_close(target.log_likelihood(x), expected)
    certain = dist.Multinomial(5, logits=torch.tensor([0.0, -math.inf]), validate_args=False)
    assert float(law_log_prob(certain, torch.tensor([5.0, 0.0]))) == 0.0
    assert float(law_log_prob(certain, torch.tensor([4.0, 1.0]))) == -math.inf


def test_other_failures_of_vmap_are_quoted():
    def model():
        b = pyro.sample("b", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        mean = torch.zeros(2)
        mean[0] = b[1]
        pyro.sample("y", dist.Normal(mean, 1.0).to_event(1), obs=torch.zeros(2))

    with pytest.warns(UserWarning, match="torch.func.vmap raised RuntimeError: vmap: inplace .* at .*test_pyro.py:"):
        target = PyroTarget(model)
    torch.testing.assert_close(
        target.log_likelihood(points(3, 2)), -0.5 * points(3, 2)[:, 1] ** 2 - math.log(2 * math.pi)
    )


def test_batch_that_disagrees_with_the_loop_is_not_used(monkeypatch):
    original = torch.func.vmap

    def wrong(function, **options):
        mapped = original(function, **options)
        return lambda rows: torch.utils._pytree.tree_map(lambda t: t + 35.0, mapped(rows))

    monkeypatch.setattr(torch.func, "vmap", wrong)
    with pytest.warns(UserWarning, match="batched and single log densities differ by 70"):
        assert not PyroTarget(indexing, torch.tensor(4.0)).vectorized


def test_point_with_a_singular_covariance_is_lost_alone():
    def model(y):
        rho = pyro.sample("rho", dist.Normal(0.0, 1.0))
        off = torch.stack([torch.stack([torch.ones(()), rho]), torch.stack([rho, torch.ones(())])])
        pyro.sample("y", dist.MultivariateNormal(torch.zeros(2), covariance_matrix=off), obs=y)

    target = PyroTarget(model, torch.tensor([0.5, -0.2]))
    log_prob, score = target.log_prob_and_score(torch.tensor([[0.2], [3.0], [-0.5], [0.9]], dtype=torch.float64))
    assert log_prob.isfinite().tolist() == [True, False, True, True]
    assert score[:, 0].isfinite().tolist() == [True, False, True, True]


def test_improper_masked_and_scaled_priors_are_not_offered():
    def improper():
        pyro.sample("a", dist.ImproperUniform(dist.constraints.positive, (), (2,)))
        pyro.sample("y", dist.Normal(0.0, 1.0), obs=torch.tensor(0.1))

    def masked():
        with poutine.mask(mask=False):
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(a, 1.0), obs=torch.tensor(0.1))

    def scaled():
        with poutine.scale(scale=0.5):
            pyro.sample("a", dist.Normal(0.0, 1.0))

    for model in (improper, masked, scaled):
        target = PyroTarget(model)
        assert target.prior is None and target.log_prob(points(2, target.dim)).isfinite().all()
    with pytest.raises(ValueError, match="Expected a proper prior"):
        sample_prior(masked, num_samples=2)


def test_model_is_left_after_its_last_latent_site_without_traces_in_pyro():
    from pyro.poutine import runtime

    def model(y):
        with pyro.plate("outer", 2):
            for i in pyro.plate("inner", 3):
                pyro.sample(f"z_{i}", dist.Normal(0.0, 1.0))
        assert y is not None, "the likelihood"

    target = PyroTarget(model, 1.0)
    # The prior alone needs no likelihood: neither draws nor constrained values run the rest of the model.
    target._model.args = (None,)
    assert target.prior.sample(4, generator=torch.Generator().manual_seed(0)).shape == (4, 6)
    assert target.constrain(points(4, 6))["z_1"].shape == (4, 2)
    assert target.prior.log_prob(points(4, 6)).shape == (4,)
    with pytest.raises(AssertionError, match="the likelihood"):
        target.log_prob(points(4, 6))
    assert runtime._PYRO_STACK == [] and runtime._DIM_ALLOCATOR._stack == []


def test_density_can_be_traced_to_a_graph():
    from torch.fx.experimental.proxy_tensor import make_fx

    target = PyroTarget(eight_schools, EFFECT)
    graph = make_fx(lambda x: target.log_prob_and_score(x))(points(4, 10))
    x = points(4, 10, seed=5)
    for ours, theirs in zip(target.log_prob_and_score(x), graph(x), strict=True):
        torch.testing.assert_close(theirs, ours)


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_density_equals_the_eager_one(backend):
    target = PyroTarget(correlated, torch.linspace(-1.0, 2.0, 12).reshape(4, 3).sin())
    density = target.compiled(4, backend=backend)
    assert density.failure is None
    assert torch.distributions.Distribution._validate_args
    for x in (points(4, 6, seed=5), points(3, 6), points(4, 6).float()):
        for ours, theirs in zip(target.log_prob_and_score(x), density(x), strict=True):
            torch.testing.assert_close(theirs, ours)
    with pytest.raises(ValueError, match="Expected batch_size to be a positive integer; got 0"):
        target.compiled(0)


def test_what_cannot_be_compiled_is_evaluated_eagerly():
    x = points(4, 1)
    for target, backend in ((quietly(branching, torch.tensor(0.3)), "eager"), (PyroTarget(conjugate, EFFECT), "none")):
        density = target.compiled(4, backend=backend)
        assert density.failure
        for ours, theirs in zip(target.log_prob_and_score(x), density(x), strict=True):
            torch.testing.assert_close(theirs, ours, rtol=0, atol=0)


def _discrete(y=None):
    pyro.sample("k", dist.Poisson(2.0))
    pyro.sample("z", dist.Categorical(torch.ones(3)))
    pyro.sample("a", dist.Normal(0.0, 1.0))


def _observed_only():
    pyro.sample("y", dist.Normal(0.0, 1.0), obs=torch.tensor(0.1))


def _changing_shape():
    n = 2 + int(torch.rand(()) * 8)
    pyro.sample("a", dist.Normal(0.0, 1.0).expand([n]).to_event(1))


def _changing_sites():
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    if a > 0:
        pyro.sample("b", dist.Normal(0.0, 1.0))


def _infinite():
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    pyro.factor("impossible", a - math.inf)


def _minibatch():
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 8, subsample_size=3) as index:
        pyro.sample("y", dist.Normal(a, 1.0), obs=EFFECT[index])


def _random():
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    pyro.factor("noise", a * torch.randn(()))


def _point_mass():
    pyro.sample("a", dist.Delta(torch.tensor(1.0)))


def _negative_scale():
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(a, -1.0), obs=torch.tensor(0.1))


def _outside_support():
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Poisson(a.exp()), obs=torch.tensor(-1.0))


def _imputes_known_data():
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 8):
        pyro.sample("y", dist.Normal(a, 1.0), obs=EFFECT, obs_mask=EFFECT > 0.0)


def _transformed_angle():
    half = dist.transforms.AffineTransform(0.0, 0.5)
    pyro.sample("angle", dist.TransformedDistribution(dist.VonMises(0.0, 1.0), half))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (_discrete, "Expected discrete latent sites with finitely many values; got 'k', which cannot be summed out"),
        (_observed_only, "Expected a model with latent sites; got none"),
        (_changing_shape, "Expected the same latent sites and shapes in every run"),
        (_changing_sites, "Expected the same latent sites and shapes in every run"),
        (_infinite, "Expected a finite log density at draws from the prior; got none in 6 draws"),
        (_minibatch, "got plate 'data' with subsample_size=3 of 8"),
        (_random, "Expected the same log density at the same point; got two values"),
        (_point_mass, "Expected continuous latent sites; got Delta at 'a'"),
        (_negative_scale, "Expected parameter scale .* to satisfy the constraint GreaterThan"),
        (_outside_support, "Expected value argument .* to be within the support"),
        (_imputes_known_data, "ignores 6 of latent site 'y_unobserved', so it cannot be normalized"),
        (_transformed_angle, "got a transformed angle at latent site 'angle'"),
    ],
)
def test_models_that_cannot_be_sampled_are_refused(model, message):
    with pytest.raises(ValueError, match=message):
        PyroTarget(model)


def test_bad_calls_are_refused():
    with pytest.raises(TypeError, match="Expected a Pyro model, a callable; got int"):
        PyroTarget(3)
    target = PyroTarget(conjugate, EFFECT)
    with pytest.raises(ValueError, match=r"Expected x with trailing shape \(1,\); got \(5, 3\)"):
        target.log_prob(torch.zeros(5, 3))
    with pytest.raises(TypeError, match="Expected a PyroTarget, whose model NUTS runs; got PyroPrior"):
        PyroNUTS(target.prior)
    with pytest.raises(ValueError, match="Expected num_chains >= 1 and warmup_steps >= 0; got 0 and 500"):
        PyroNUTS(target, num_chains=0)


def test_nuts_gives_the_posterior_in_the_coordinates_of_the_target():
    y = torch.tensor([1.0, 2.5, 0.3])
    state = torch.random.get_rng_state()
    sampler = PyroNUTS(PyroTarget(conjugate, y), num_chains=2, warmup_steps=60)
    particles = sampler.sample(241, seed=1)
    assert torch.equal(state, torch.random.get_rng_state())
    assert len(particles) == 242 and particles.replicates == 2 and particles.nonfinite == 0
    assert not particles.has_normalizer and not particles.log_weight.any()
    assert 20 < particles.ess <= 242
    # Posterior N(y_sum / (n + 1/4), 1 / (n + 1/4)); 4.5 standard errors with the reported ESS, false alarm 7e-6.
    precision = 3.25
    error = 4.5 / math.sqrt(precision * particles.ess)
    assert abs(float(particles.x.mean()) - float(y.sum()) / precision) < error


def test_nuts_keeps_sites_chains_and_divergences():
    def model(y):
        scale = pyro.sample("scale", dist.HalfNormal(1.0))
        with pyro.plate("data", 2):
            pyro.sample("a", dist.Normal(y, scale + 0.1))

    chains = nuts(model, (torch.zeros(2),), num_samples=6, warmup_steps=6, num_chains=2, seed=0)
    assert chains.samples["scale"].shape == (2, 6) and chains.samples["a"].shape == (2, 6, 2)
    assert len(chains.divergences) == 2 and not torch.equal(chains.samples["a"][0], chains.samples["a"][1])
    again = nuts(model, (torch.zeros(2),), num_samples=6, warmup_steps=6, num_chains=2, seed=0)
    assert torch.equal(chains.samples["a"], again.samples["a"])


def test_galaxy_mixture_is_symmetric_under_relabelling():
    assert len(posteriors.GALAXIES) == 82 and list(posteriors.GALAXIES) == sorted(posteriors.GALAXIES)
    target = posteriors.galaxies()
    x = points(50, target.dim)
    values = target.constrain(x)
    labels = set()
    for order in itertools.permutations(range(3)):
        swapped = {name: value[:, list(order)] for name, value in values.items()}
        torch.testing.assert_close(target.log_likelihood(target.unconstrain(swapped)), target.log_likelihood(x))
        # The prior is symmetric as a law, not as a density over the stick-breaking coordinates of the weights.
        labels.add(int(posteriors.labelling(swapped["mean"])[0]))
    assert labels == set(range(6))
    # Near the posterior mode, the likelihood must lie above the published log evidence of -226.8.
    near = {
        "weight": torch.tensor([[0.09, 0.86, 0.05]]),
        "mean": torch.tensor([[9.7, 21.4, 33.0]]),
        "variance": torch.tensor([[2.0, 4.8, 2.0]]),
    }
    assert -215.0 < float(target.log_likelihood(target.unconstrain(near))) < -195.0


def test_both_forms_of_eight_schools_are_one_posterior():
    centered, free = posteriors.eight_schools(), posteriors.eight_schools(centered=False)
    x = points(20, 10)
    values = free.constrain(x, deterministic=True)
    moved = centered.unconstrain({name: values[name] for name in centered.names})
    torch.testing.assert_close(centered.log_likelihood(moved), free.log_likelihood(x))
    # Change of variables theta = mu + tau z.
    jacobian = 8.0 * values["tau"].log()
    torch.testing.assert_close(centered.log_prob(moved) + jacobian, free.log_prob(x))


@pytest.mark.slow
def test_galaxy_evidence_is_the_published_one():
    from diffsampler.baselines import SMC

    target = posteriors.galaxies()
    particles = SMC(target, num_islands=16).sample(1600, seed=1)
    # Four reported errors of an estimate from 16 islands (t with 15 degrees of freedom): false alarm 1e-3.
    estimate = particles.log_normalizer
    assert abs(estimate.value - posteriors.GALAXY_LOG_EVIDENCE) < 4.0 * estimate.std_error + 0.02
    assert estimate.std_error < 0.25
    # Negative control: one labelling alone would miss log 6 = 1.79.
    assert 4.0 * estimate.std_error + 0.02 < math.log(6.0)


@pytest.mark.slow
@pytest.mark.parametrize("centered", [True, False])
def test_eight_schools_agree_with_the_reference_draws(centered):
    from diffsampler.baselines import SMC

    target = posteriors.eight_schools(centered=centered)
    particles = SMC(target).sample(4000, seed=0)
    values = target.constrain(particles.x)
    # posteriordb, 10,000 reference draws: mu 4.41 (3.31), tau 3.61 (3.20).
    for name, mean, sd in (("mu", 4.41, 3.31), ("tau", 3.61, 3.20)):
        estimate, _ = particles.expectation(values[name])
        second, _ = particles.expectation(values[name] ** 2)
        assert abs(float(estimate) - mean) < 0.15 * sd
        assert 0.85 < math.sqrt(float(second - estimate**2)) / sd < 1.15
