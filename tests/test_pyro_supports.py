"""Every continuous support of Pyro: bijections, Jacobians, normalization, and its own log densities."""

from __future__ import annotations

import contextlib
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pyro import poutine
from pyro.infer.reparam import LatentStableReparam, LocScaleReparam
from torch.distributions import constraints

from diffsampler.integrations.pyro import PyroTarget
from diffsampler.integrations.pyro_laws import draw_law
from diffsampler.integrations.pyro_predict import observed_data
from diffsampler.integrations.pyro_supports import MATRICES, SphereTransform, TriangularTransform, bijection

T = torch.tensor


def _mixture(component):
    return dist.MixtureSameFamily(dist.Categorical(torch.tensor([0.3, 0.7])), component)


# Law of one latent site, as users write it. Every continuous support occurs, most of them more than once.
LAWS = {
    "AffineBeta": lambda: dist.AffineBeta(2.0, 3.0, loc=-1.0, scale=4.0),
    "AsymmetricLaplace": lambda: dist.AsymmetricLaplace(0.0, 1.0, 0.7),
    "Beta": lambda: dist.Beta(2.0, 3.0),
    "Cauchy": lambda: dist.Cauchy(0.0, 1.0),
    "Chi2": lambda: dist.Chi2(T(3.0)),
    "ContinuousBernoulli": lambda: dist.ContinuousBernoulli(0.3),
    "Dirichlet": lambda: dist.Dirichlet(T([1.5, 2.0, 3.0])),
    "Exponential": lambda: dist.Exponential(2.0),
    "FisherSnedecor": lambda: dist.FisherSnedecor(4.0, 6.0),
    "FoldedDistribution": lambda: dist.FoldedDistribution(dist.Normal(1.0, 1.0)),
    "Gamma": lambda: dist.Gamma(2.0, 3.0),
    "GeneralizedPareto": lambda: dist.GeneralizedPareto(1.0, 2.0, 0.3),
    "Gumbel": lambda: dist.Gumbel(0.0, 1.0),
    "HalfCauchy": lambda: dist.HalfCauchy(1.0),
    "HalfNormal": lambda: dist.HalfNormal(1.0),
    "InverseGamma": lambda: dist.InverseGamma(3.0, 2.0),
    "Kumaraswamy": lambda: dist.Kumaraswamy(2.0, 3.0),
    "LKJ": lambda: dist.LKJ(3, 2.0),
    "LKJCholesky": lambda: dist.LKJCholesky(3, 2.0),
    "Laplace": lambda: dist.Laplace(0.0, 1.0),
    "LogNormal": lambda: dist.LogNormal(0.0, 0.7),
    "Logistic": lambda: dist.Logistic(0.0, 1.0),
    "LogisticNormal": lambda: dist.LogisticNormal(torch.zeros(2), torch.ones(2)),
    "LowRankMVN": lambda: dist.LowRankMultivariateNormal(torch.zeros(3), torch.ones(3, 1), torch.ones(3)),
    "MixtureOfHalfLines": lambda: _mixture(dist.Gamma(T([2.0, 5.0]), T([1.0, 1.0]))),
    "MixtureOfIntervals": lambda: _mixture(dist.Beta(T([2.0, 5.0]), T([3.0, 1.5]))),
    "MixtureOfVectors": lambda: _mixture(dist.MultivariateNormal(T([[-1.0, 0.0], [1.0, 1.0]]), torch.eye(2))),
    "MVN": lambda: dist.MultivariateNormal(torch.zeros(2), T([[2.0, 0.5], [0.5, 1.0]])),
    "MultivariateStudentT": lambda: dist.MultivariateStudentT(5.0, torch.zeros(2), torch.eye(2)),
    "Ordered": lambda: dist.TransformedDistribution(
        dist.Normal(0.0, 1.0).expand([3]).to_event(1), dist.transforms.OrderedTransform()
    ),
    "Pareto": lambda: dist.Pareto(0.5, 3.0),
    "ProjectedNormal": lambda: dist.ProjectedNormal(T([1.0, -0.5, 0.3])),
    "ProjectedNormalCircle": lambda: dist.ProjectedNormal(T([1.0, -0.5])),
    "ProjectedNormal4": lambda: dist.ProjectedNormal(T([1.0, -0.5, 0.3, 0.2])),
    "RelaxedBernoulli": lambda: dist.RelaxedBernoulli(T(0.8), probs=T(0.3)),
    "RelaxedOneHot": lambda: dist.RelaxedOneHotCategorical(T(0.9), probs=T([0.2, 0.3, 0.5])),
    "SineBivariateVonMises": lambda: dist.SineBivariateVonMises(0.3, -0.2, 2.0, 3.0, correlation=0.5),
    "SkewLogistic": lambda: dist.SkewLogistic(0.0, 1.0, 1.5),
    "SoftAsymmetricLaplace": lambda: dist.SoftAsymmetricLaplace(0.0, 1.0),
    "SoftLaplace": lambda: dist.SoftLaplace(0.0, 1.0),
    "StudentT": lambda: dist.StudentT(4.0, 0.0, 1.0),
    "Uniform": lambda: dist.Uniform(-2.0, 5.0),
    "VonMises": lambda: dist.VonMises(T(1.0), T(2.0)),
    "VonMises3D": lambda: dist.VonMises3D(T([1.0, 2.0, -0.5])),
    "Weibull": lambda: dist.Weibull(1.0, 2.0),
    "Wishart": lambda: dist.Wishart(T(5.0), T([[1.0, 0.3], [0.3, 0.5]])),
    "Plates": lambda: dist.Gamma(3.0, 3.0).expand([2]).to_event(1),
    "PositiveOrdered": lambda: dist.TransformedDistribution(
        dist.Normal(0.0, 1.0).expand([3]).to_event(1), PositiveOrdered()
    ),
}


class PositiveOrdered(torch.distributions.Transform):
    """Cumulated exponentials."""

    domain = constraints.real_vector
    codomain = dist.constraints.positive_ordered_vector
    bijective = True

    def _call(self, x):
        return x.exp().cumsum(-1)

    def _inverse(self, y):
        return torch.cat([y[..., :1], y.diff(dim=-1)], -1).log()

    def log_abs_det_jacobian(self, x, y):
        return x.sum(-1)


def site(law):
    return pyro.sample("x", law())


def target_of(name):
    return PyroTarget(site, LAWS[name])


@pytest.fixture(autouse=True)
def _double():
    # Laws are made outside of the bridge here, which promotes what it sees.
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


# Laws without a sampler, or with one that does not follow the density.
UNDRAWN = ("SineBivariateVonMises", "VonMises3D")


@pytest.mark.parametrize("name", LAWS)
def test_density_of_a_latent_site_is_pyro_s_with_the_jacobian(name):
    target = target_of(name)
    x = 0.7 * torch.randn(20, target.dim, generator=torch.Generator().manual_seed(0))
    values = target.constrain(x)["x"]
    assert target.vectorized
    torch.testing.assert_close(target.unconstrain({"x": values}), x)
    law = LAWS[name]()
    transform = bijection("x", law)
    u = target.unflatten(x)["x"]
    trace = poutine.trace(poutine.condition(lambda: pyro.sample("x", law), {"x": values[0]})).get_trace()
    # The whole of Pyro's trace for one point, its law for the others.
    expected = torch.stack([law.log_prob(v).sum() for v in values])
    torch.testing.assert_close(trace.log_prob_sum(), expected[0])
    jacobian = torch.stack(
        [transform.log_abs_det_jacobian(row, value).sum() for row, value in zip(u, values, strict=True)]
    )
    torch.testing.assert_close(target.log_prob(x), expected + jacobian, rtol=1e-6, atol=1e-6)
    assert (target.prior is None) == (name in UNDRAWN)


@pytest.mark.parametrize("name", [name for name in LAWS if name not in UNDRAWN])
def test_prior_draws_of_a_latent_site_follow_its_density(name):
    prior, n = target_of(name).prior, 4000
    x = prior.sample(n, generator=torch.Generator().manual_seed(1))
    assert x.shape == (n, prior.dim) and x.isfinite().all()
    # A Gaussian q inside p: E_p[q / p] = 1 exactly. Normal approximation, 4.5 standard errors: 7e-6 each, 4e-4 in all.
    centre = x.median(0).values
    q = torch.distributions.Normal(centre, 0.6 * (x - centre).abs().median(0).values)
    ratio = (q.log_prob(x).sum(-1) - prior.log_prob(x)).exp()
    error = 4.5 * float(ratio.std()) / math.sqrt(n)
    assert abs(float(ratio.mean()) - 1.0) < error < 0.5


def test_draws_of_torch_s_lkj_would_not_have_passed():
    """Negative control, and the reason for a sampler of our own."""
    law = dist.LKJCholesky(3, 2.0)
    target, n = target_of("LKJCholesky"), 40_000
    q = torch.distributions.Normal(torch.zeros(3), 0.3)

    def means(values):
        x = bijection("x", law).inv(values)
        ratio = (q.log_prob(x).sum(-1) - target.prior.log_prob(x)).exp()
        return float(ratio.mean()), 4.5 * float(ratio.std()) / math.sqrt(n)

    with torch.random.fork_rng():
        torch.manual_seed(0)
        ours, theirs = means(draw_law(law, (n,))), means(law.sample((n,)))
    # 4.5 standard errors: false alarm 7e-6.
    assert abs(ours[0] - 1.0) < ours[1] < 0.05
    assert abs(theirs[0] - 1.0) > 2.0 * theirs[1]


GRID = torch.linspace(-16.0, 16.0, 401, dtype=torch.float64)


@pytest.mark.parametrize(
    "name", ["VonMises", "VonMises3D", "ProjectedNormal", "ProjectedNormalCircle", "SineBivariateVonMises"]
)
def test_directional_laws_integrate_to_one(name):
    target = target_of(name)
    line = GRID if target.dim == 2 else torch.linspace(-40.0, 40.0, 8001, dtype=torch.float64)
    x = torch.cartesian_prod(*[line] * target.dim).reshape(-1, target.dim)
    total = target.log_prob(x).logsumexp(0) + target.dim * float((line[1] - line[0]).log())
    assert float(total) == pytest.approx(0.0, abs=2e-3)


OWN = [(support, make(), 6) for support, make in MATRICES.items() if "Square" not in repr(support)]
OWN += [(dist.constraints.sphere, SphereTransform(), n) for n in (1, 2, 3)]


@pytest.mark.parametrize(("support", "transform", "entries"), OWN, ids=[f"{s}-{n}" for s, _, n in OWN])
def test_own_bijections_are_what_they_say(support, transform, entries):
    if support is dist.constraints.unit_lower_cholesky:
        entries = 3
    x = torch.randn(5, entries, generator=torch.Generator().manual_seed(0))
    y = transform(x)
    assert bool(support.check(y).all())
    assert transform.forward_shape(x.shape) == y.shape and transform.inverse_shape(y.shape) == x.shape
    torch.testing.assert_close(transform.inv(y), x)
    torch.testing.assert_close(torch.func.vmap(transform)(x), y)
    jacobian = torch.func.vmap(torch.func.jacrev(transform))(x)
    if support is dist.constraints.sphere:
        # The surface element, from the Gram determinant.
        expected = 0.5 * torch.logdet(jacobian.mT @ jacobian)
    else:
        rows, columns = torch.tril_indices(3, 3, 0 if entries == 6 else -1)
        expected = torch.linalg.slogdet(jacobian[:, rows, columns])[1]
    torch.testing.assert_close(transform.log_abs_det_jacobian(x, y), expected)


def test_sphere_is_smooth_at_its_pole_and_far_from_it():
    transform = SphereTransform()
    for x in (torch.zeros(2, 3), torch.full((2, 3), 1e-5), torch.tensor([[3e1, 0.0, -4e1]])):
        x = x.clone().requires_grad_()
        y = transform(x)
        (gradient,) = torch.autograd.grad(y.sum() + transform.log_abs_det_jacobian(x, y).sum(), x)
        assert y.isfinite().all() and gradient.isfinite().all()
    torch.testing.assert_close(transform.inv(transform(torch.zeros(1, 3))), torch.zeros(1, 3))
    assert TriangularTransform(None) == TriangularTransform(None) != SphereTransform()


ELEMENTWISE = {
    "Normal": lambda shape: dist.Normal(torch.zeros(shape), 1.0),
    "HalfCauchy": lambda shape: dist.HalfCauchy(torch.ones(shape)),
    "Beta": lambda shape: dist.Beta(2.0 * torch.ones(shape), torch.ones(shape)),
    "Uniform": lambda shape: dist.Uniform(-torch.ones(shape), 2.0),
    "VonMises": lambda shape: dist.VonMises(torch.zeros(shape), torch.ones(shape)),
    "Dirichlet": lambda shape: dist.Dirichlet(torch.ones((*shape, 3))),
    "LKJ": lambda shape: dist.LKJCholesky(3, torch.ones(shape)),
    "Sphere": lambda shape: dist.ProjectedNormal(torch.ones((*shape, 3))),
    "Wishart": lambda shape: dist.Wishart(5.0 * torch.ones(shape), torch.eye(2).expand((*shape, 2, 2))),
    "MVN": lambda shape: dist.MultivariateNormal(torch.zeros((*shape, 2)), torch.eye(2)),
}


# Fixed examples: no false alarm. Everything is compared with Pyro's own trace of the same model.
@given(
    first=st.sampled_from(sorted(ELEMENTWISE)),
    second=st.sampled_from(sorted(ELEMENTWISE)),
    plates=st.lists(st.integers(1, 3), max_size=2),
    event=st.lists(st.integers(1, 3), max_size=1),
    scale=st.sampled_from([1.0, 0.5]),
    batch=st.lists(st.integers(1, 2), max_size=2),
)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_any_supports_in_any_plates_agree_with_pyro(first, second, plates, event, scale, batch):
    def model():
        pyro.sample("first", ELEMENTWISE[first](tuple(event)).to_event(len(event)))
        with contextlib.ExitStack() as stack:
            for i, size in enumerate(plates):
                stack.enter_context(pyro.plate(f"plate_{i}", size, dim=-1 - i))
            with poutine.scale(scale=scale):
                value = pyro.sample("second", ELEMENTWISE[second](()))
        pyro.factor("tilt", -0.1 * value.square().sum())

    target = PyroTarget(model)
    x = 0.5 * torch.randn((*batch, target.dim), generator=torch.Generator().manual_seed(0))
    log_prob = target.log_prob(x)
    assert log_prob.shape == tuple(batch) and target.vectorized
    assert target.prior is None if scale != 1.0 else target.prior.sample(2).shape == (2, target.dim)
    values = target.constrain(x)
    flat = {name: value.reshape((-1, *value.shape[len(batch) :])) for name, value in values.items()}
    torch.testing.assert_close(target.unconstrain(flat), x.reshape(-1, target.dim))
    u = target.unflatten(x.reshape(-1, target.dim))
    for i, ours in enumerate(log_prob.reshape(-1)):
        given_values = {name: value[i] for name, value in flat.items()}
        trace = poutine.trace(poutine.condition(model, given_values)).get_trace()
        jacobian = sum(
            bijection(name, trace.nodes[name]["fn"]).log_abs_det_jacobian(u[name][i], value).sum()
            for name, value in given_values.items()
        )
        torch.testing.assert_close(ours, trace.log_prob_sum() + jacobian, rtol=1e-6, atol=1e-6)


def hierarchy(y, group):
    """Varying intercepts and slopes with an LKJ prior, in nested plates."""
    num_groups = int(group.max()) + 1
    scale = pyro.sample("scale", dist.HalfCauchy(torch.ones(2)).to_event(1))
    factor = pyro.sample("factor", dist.LKJCholesky(2, 2.0))
    centre = pyro.sample("centre", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    with pyro.plate("groups", num_groups):
        b = pyro.sample("b", dist.MultivariateNormal(centre, scale_tril=scale.unsqueeze(-1) * factor))
    with pyro.plate("cases", y.shape[-1], dim=-1), pyro.plate("repeats", y.shape[0], dim=-2):
        pyro.sample("y", dist.Normal(b[group, 0] + b[group, 1] * y[0], 1.0), obs=y)


def centred(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfNormal(5.0))
    with pyro.plate("group", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, 1.0), obs=y)


Y = torch.tensor([0.3, -1.0, 2.0, 0.5], dtype=torch.float64)


def log_prob_of_pyro(model, args, target, x):
    """Pyro's log density of its own trace at one point, with the Jacobian."""
    values = {name: value[0] for name, value in target.constrain(x).items()}
    trace = poutine.trace(poutine.condition(model, values)).get_trace(*args)
    u = target.unflatten(x[0])
    laws = {name: trace.nodes[name]["fn"] for name in target.names}
    jacobian = sum(bijection(n, law).log_abs_det_jacobian(u[n], values[n]).sum() for n, law in laws.items())
    return trace.log_prob_sum() + jacobian


def test_hierarchical_model_with_an_lkj_prior():
    args = (torch.stack([Y, Y.flip(0), Y + 1.0]), torch.tensor([0, 1, 0, 1]))
    target = PyroTarget(hierarchy, *args)
    x = 0.5 * torch.randn(1, target.dim, generator=torch.Generator().manual_seed(0))
    assert target.vectorized and target.dim == 2 + 1 + 2 + 4
    torch.testing.assert_close(target.log_prob(x)[0], log_prob_of_pyro(hierarchy, args, target, x))
    draws = target.prior.sample(500, generator=torch.Generator().manual_seed(0))
    assert target.prior.log_prob(draws).isfinite().all()


def test_reparametrized_model_is_the_one_written_that_way():
    def free(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = pyro.sample("tau", dist.HalfNormal(5.0))
        with pyro.plate("group", len(y)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(mu + tau * z, 1.0), obs=y)

    reparametrized = poutine.reparam(centred, config={"theta": LocScaleReparam(0.0)})
    ours, theirs = PyroTarget(reparametrized, Y), PyroTarget(free, Y)
    assert ours.names == ["mu", "tau", "theta_decentered"]
    x = 0.5 * torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    for a, b in zip(ours.log_prob_and_score(x), theirs.log_prob_and_score(x), strict=True):
        torch.testing.assert_close(a, b)
    values = ours.constrain(x, deterministic=True)
    moved = values["mu"].unsqueeze(-1) + values["tau"].unsqueeze(-1) * values["theta_decentered"]
    torch.testing.assert_close(values["theta"], moved)
    assert set(observed_data(ours)) == {"y"}


def test_stable_laws_become_densities_by_reparametrization():
    def model():
        pyro.sample("x", dist.Stable(1.5, 0.0, 1.0, 0.0))

    # Pyro's own code branches on data here; the loop is right.
    with pytest.warns(UserWarning, match="Python loop over points"):
        target = PyroTarget(poutine.reparam(model, config={"x": LatentStableReparam()}))
    assert target.dim == 2 and target.prior is not None
    draws = target.prior.sample(100, generator=torch.Generator().manual_seed(0))
    assert target.constrain(draws)["x_uniform"].abs().max() < math.pi / 2


def test_conditioned_model_has_the_likelihood_of_what_it_is_conditioned_on():
    open_ended = poutine.condition(lambda: centred(Y), data={"tau": torch.tensor(2.0), "mu": torch.tensor(1.0)})
    target = PyroTarget(open_ended)
    assert target.names == ["theta"]
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    fixed = dist.Normal(0.0, 5.0).log_prob(torch.tensor(1.0)) + dist.HalfNormal(5.0).log_prob(torch.tensor(2.0))
    torch.testing.assert_close(target.prior.log_prob(x), dist.Normal(1.0, 2.0).log_prob(x).sum(-1))
    torch.testing.assert_close(target.log_likelihood(x), fixed + dist.Normal(x, 1.0).log_prob(Y).sum(-1))


def test_improper_supports_of_matrices_have_densities():
    def model():
        m = pyro.sample("m", dist.ImproperUniform(constraints.positive_definite, (), (2, 2)))
        pyro.factor("data", -m.diagonal(dim1=-2, dim2=-1).sum(-1))
        f = pyro.sample("f", dist.ImproperUniform(constraints.lower_cholesky, (), (2, 2)))
        pyro.factor("more", -f.square().sum())

    target = PyroTarget(model)
    assert target.prior is None and target.dim == 6
    values = target.constrain(torch.randn(3, 6, generator=torch.Generator().manual_seed(0)))
    assert bool(constraints.positive_definite.check(values["m"]).all())
    assert bool(constraints.lower_cholesky.check(values["f"]).all())
