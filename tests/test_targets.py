"""Every target through the conformance suite, constants recomputed independently, samplers, and bad arguments."""

from __future__ import annotations

import copy
import math
import pickle

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import integrate, stats

from diffsampler import targets
from diffsampler.space import Euclidean
from diffsampler.target import Target
from diffsampler.targets.line import LineDensity
from diffsampler.testing import check_target

# Kolmogorov-Smirnov tests below: one false alarm in 1e5 per marginal.
KS_ALPHA = 1e-5


def logistic_regression(**options) -> targets.LogisticRegression:
    generator = torch.Generator().manual_seed(7)
    features = torch.randn(40, 3, generator=generator, dtype=torch.float64) * torch.tensor([1.0, 10.0, 0.1]) + 2.0
    labels = torch.rand(40, generator=generator) < torch.sigmoid(features[:, 0] - 2.0)
    return targets.LogisticRegression(features, labels, **options)


VARIANTS = {
    **targets.REGISTRY,
    "gaussian_scaled": lambda: targets.Gaussian([1.0, -2.0], scale=[0.5, 3.0], log_normalizer=7.5),
    "mixture_full_3d": lambda: targets.GaussianMixture(
        [[0.0, 0.0, 0.0], [4.0, 4.0, 4.0]], covariances=[[2.0, 0.5, 0.0], [0.5, 1.0, 0.0], [0.0, 0.0, 0.2]]
    ),
    "mixture_diagonal": lambda: targets.GaussianMixture([[0.0, 0.0], [2.0, 0.0]], scales=[[1.0, 0.2], [0.5, 2.0]]),
    "funnel_easy": lambda: targets.Funnel(dim=3, scale=1.0),
    "manywell_rotated": lambda: targets.ManyWell(dim=6, rotation_seed=3),
    "double_wells_many": lambda: targets.DoubleWells(14, wells=12, separation=1.0),
    "rings_two": lambda: targets.Rings([0.5, 2.0], stiffness=20.0),
    "banana_flat": lambda: targets.Banana(scale=2.0, curvature=-0.1),
    "cauchy": lambda: targets.StudentT(dim=2, df=1.0),
    "eight_schools_noncentered": lambda: targets.EightSchools(centered=False),
    "logistic": logistic_regression,
    "alanine_dipeptide_circular": lambda: targets.CircularMolecule(targets.AlanineDipeptideInternal().target),
    "lennard_jones_core": lambda: targets.LennardJones(8, core=0.9),
    "fluid_in_space": lambda: targets.LennardJonesFluid(9, d=3, density=0.5),
    "phi4_chain": lambda: targets.PhiFour((12,), hopping=0.4),
    "von_mises_product": lambda: targets.VonMisesMixture([[0.0, 1.0, -2.0]], concentrations=[[0.5, 3.0, 50.0]]),
    "logistic_plain": lambda: logistic_regression(standardize=False, intercept=False, prior_scale=2.0),
}


@pytest.fixture(scope="module")
def built() -> dict[str, Target]:
    return {name: build() for name, build in VARIANTS.items()}


@pytest.mark.parametrize("name", VARIANTS)
def test_target_keeps_its_promises(name, built):
    # Five statistical checks at 1e-6 each; none of 2295 runs with other seeds raised a false alarm.
    done = check_target(built[name], generator=torch.Generator().manual_seed(1))
    # Where the Gaussian fit overlaps too little for a bridge, the constant is a quadrature checked below.
    unbridged = {"manywell32", "manywell64", "mw52", "double_wells_many"}
    if built[name].has_sampler and name not in unbridged and isinstance(built[name].space, Euclidean):
        assert "normalizer" in done
    if built[name].num_modes is not None:
        assert "modes" in done


@pytest.mark.parametrize("name", VARIANTS)
def test_targets_copy_pickle_and_move(name, built):
    target = built[name]
    generator, like = torch.Generator().manual_seed(0), torch.empty(0, dtype=torch.float64)
    points = target if target.has_sampler else target.prior
    x = (
        target.space.noise((5,), like=like, generator=generator)
        if points is None
        else points.sample(5, generator=generator)
    )
    for other in (copy.deepcopy(target), pickle.loads(pickle.dumps(target))):
        assert torch.equal(other.log_prob(x), target.log_prob(x))
        assert other.log_normalizer == target.log_normalizer
    missing = copy.deepcopy(target).load_state_dict(target.state_dict())
    assert not missing.missing_keys and not missing.unexpected_keys


@given(shape=st.lists(st.integers(0, 3), max_size=3), name=st.sampled_from(["gmm9", "funnel", "manywell_rotated"]))
def test_batch_shapes(shape, name, built):
    target = built[name]
    n = math.prod(shape)
    x = target.sample(n, generator=torch.Generator().manual_seed(0))
    log_prob, score = target.log_prob_and_score(x.reshape(*shape, target.dim))
    flat, flat_score = target.log_prob_and_score(x)
    assert log_prob.shape == tuple(shape) and score.shape == (*shape, target.dim)
    torch.testing.assert_close(log_prob.reshape(-1), flat, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(score.reshape(-1, target.dim), flat_score, rtol=1e-12, atol=1e-12)


# --- constants, recomputed -----------------------------------------------------------------------------------------


def log_integral(function, low, high, **options):
    value, error = integrate.quad(function, low, high, epsabs=0, epsrel=1e-12, limit=500, **options)
    assert error < 1e-9 * value
    return math.log(value)


def test_many_well_constants(built):
    pair = log_integral(lambda a: math.exp(-(a**4) + 6 * a**2 + 0.5 * a), -6, 6) + 0.5 * math.log(2 * math.pi)
    for name, pairs, published in (("manywell8", 4, 41.173918828), ("manywell32", 16, 164.695675313)):
        assert built[name].log_normalizer == pytest.approx(pairs * pair, abs=1e-9)
        assert built[name].log_normalizer == pytest.approx(published, abs=1e-8)
    assert built["manywell32"].right_mass == pytest.approx(0.844307096, abs=1e-9)
    left = log_integral(lambda a: math.exp(-(a**4) + 6 * a**2 + 0.5 * a), -6, 0) + 0.5 * math.log(2 * math.pi)
    assert built["manywell32"].right_mass == pytest.approx(1.0 - math.exp(left - pair), abs=1e-9)


def test_double_well_constants(built):
    narrow = log_integral(lambda a: math.exp(-((a * a - 2) ** 2)), -5, 5)
    wide = log_integral(lambda a: math.exp(-((a * a - 4) ** 2)), -5, 5)
    assert built["mw54"].log_normalizer == pytest.approx(5 * wide, abs=1e-9)
    assert built["mw54"].log_normalizer == pytest.approx(-0.541055512879, abs=1e-11)
    assert built["mw52"].log_normalizer == pytest.approx(5 * narrow + 45 * 0.5 * math.log(2 * math.pi), abs=1e-9)
    assert built["mw52"].log_normalizer == pytest.approx(42.817242677531, abs=1e-9)


def test_rings_constants(built):
    def radial(r):
        return 2 * math.pi * r * math.exp(-100 * min((r - c) ** 2 for c in (1, 3, 5)))

    total = log_integral(radial, 0, 6, points=[1, 2, 3, 4, 5])
    assert built["rings"].log_normalizer == pytest.approx(total, abs=1e-9)
    assert built["rings"].log_normalizer == pytest.approx(2.30488, abs=5e-6)
    weights = [
        math.exp(log_integral(radial, *ring, points=[sum(ring) / 2]) - total) for ring in ((0, 2), (2, 4), (4, 6))
    ]
    assert built["rings"].mode_weights().tolist() == pytest.approx(weights, abs=1e-8)


@pytest.mark.parametrize(
    ("name", "half_width", "center"),
    [
        ("gmm9", 9.0, 0.0),
        ("gmm25", 14.0, 0.0),
        ("gmm40", 48.0, 0.0),
        ("difficult", 8.0, 0.0),
        ("gaussian_scaled", 24.0, 0.0),
        ("mixture_diagonal", 16.0, 0.0),
        ("banana_flat", 20.0, 0.0),
        ("rings_two", 4.0, 0.0),
        ("funnel2", None, None),
    ],
)
def test_plane_densities_integrate_to_their_constant(name, half_width, center, built):
    if name == "funnel2":
        target, log_jacobian = targets.Funnel(dim=2, scale=1.0), lambda x: 0.5 * x[..., 0]
        u = torch.linspace(-9.0, 9.0, 801, dtype=torch.float64)
        grid = torch.cartesian_prod(u, u)
        x = torch.stack([grid[:, 0], grid[:, 1] * torch.exp(0.5 * grid[:, 0])], -1)
    else:
        target, log_jacobian = built[name], lambda x: torch.zeros_like(x[..., 0])
        u = torch.linspace(center - half_width, center + half_width, 801, dtype=torch.float64)
        x = torch.cartesian_prod(u, u)
    cell = (u[1] - u[0]).log() * 2
    values = torch.cat([target.log_prob(part) + log_jacobian(part) for part in x.split(100_000)])
    # Rings have kinks at the half-way circles, where the trapezoidal rule loses its spectral accuracy.
    tolerance = 1e-4 if name == "rings_two" else 1e-7
    assert (torch.logsumexp(values, 0) + cell).item() == pytest.approx(target.log_normalizer, abs=tolerance)


def test_student_t_is_normalized():
    for dim, df in ((1, 1.0), (2, 3.0), (5, 2.5)):
        target = targets.StudentT(dim, df=df)
        sphere = 2 * math.pi ** (dim / 2) / math.gamma(dim / 2)

        def radial(r, *, target=target, dim=dim, sphere=sphere):
            x = torch.zeros(dim, dtype=torch.float64)
            x[0] = r
            return sphere * r ** (dim - 1) * target.log_prob(x).exp().item()

        assert integrate.quad(radial, 0, math.inf, epsabs=1e-9, limit=200)[0] == pytest.approx(1.0, abs=1e-7)


def test_funnel_matches_its_definition():
    x = numpy.array([[1.3, -0.4, 2.0], [-5.0, 0.1, 0.02]])
    expected = stats.norm.logpdf(x[:, 0], scale=3.0)
    expected = expected + stats.norm.logpdf(x[:, 1:], scale=numpy.exp(0.5 * x[:, :1])).sum(-1)
    assert targets.Funnel(dim=3).log_prob(torch.from_numpy(x)).tolist() == pytest.approx(expected.tolist(), rel=1e-12)


def test_gaussian_and_mixture_match_scipy(generator):
    covariance = torch.tensor([[2.0, 0.6], [0.6, 0.5]], dtype=torch.float64)
    x = torch.randn(20, 2, generator=generator, dtype=torch.float64)
    gaussian = targets.Gaussian([1.0, -1.0], covariance=covariance, log_normalizer=2.0)
    expected = stats.multivariate_normal([1.0, -1.0], covariance.numpy())
    assert gaussian.log_prob(x).tolist() == pytest.approx((expected.logpdf(x) + 2.0).tolist(), rel=1e-12)
    mixture = targets.GaussianMixture([[1.0, -1.0], [0.0, 3.0]], covariances=covariance, weights=[3.0, 1.0])
    other = stats.multivariate_normal([0.0, 3.0], covariance.numpy())
    density = 0.75 * expected.pdf(x) + 0.25 * other.pdf(x)
    assert mixture.log_prob(x).exp().tolist() == pytest.approx(density.tolist(), rel=1e-12)


def test_forty_uses_the_published_means():
    target = targets.GaussianMixture.forty()
    assert target.factors.unique().item() == pytest.approx(1.3132616875182228, abs=1e-12)
    expected = (torch.rand((40, 2), generator=torch.Generator().manual_seed(42)) - 0.5) * 2 * 40
    assert torch.equal(target.means, expected.double())


def test_difficult_is_symmetric_with_six_modes(built):
    x = built["difficult"].sample(100, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(built["difficult"].log_prob(x), built["difficult"].log_prob(x.flip(-1)))
    assert built["difficult"].num_modes == 6


def test_seven_is_as_documented(built):
    target = built["seven"]
    distance = torch.cdist(target.means, target.means)[~torch.eye(7, dtype=torch.bool)]
    spread = (target.factors[:, :1] + target.factors[:, :1].mT)[~torch.eye(7, dtype=torch.bool)]
    assert distance.min() > 20 and distance.max() < 32 and (distance / spread).min() > 7
    assert target.mode_weights().tolist() == pytest.approx([0.35, 0.25, 0.15, 0.10, 0.07, 0.05, 0.03], abs=1e-12)


def test_overlapping_mixture_labels_have_their_own_probabilities(built):
    # Two unit Gaussians with weights 3:1 at distance 2: the boundary lies at 1 + log(3)/2.
    target = targets.GaussianMixture([[0.0], [2.0]], scales=1.0, weights=[3.0, 1.0])
    edge = 1.0 + 0.5 * math.log(3.0)
    first = 0.75 * stats.norm.cdf(edge) + 0.25 * stats.norm.cdf(edge - 2.0)
    assert target.mode_weights()[0].item() == pytest.approx(first, abs=2e-4)
    assert built["gmm40"].mode_weights().sum().item() == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize(("name", "half_width"), [("difficult", 7.0), ("gmm40", 46.0), ("mixture_diagonal", 12.0)])
def test_mode_weights_by_quadrature(name, half_width, built):
    u = torch.linspace(-half_width, half_width, 801, dtype=torch.float64)
    share = built[name].mode_weights() * 0.0
    for x in torch.cartesian_prod(u, u).split(100_000):
        mass = built[name].log_prob(x).exp() * (u[1] - u[0]) ** 2
        share = share.index_add(0, built[name].mode_labels(x), mass)
    # Both rules are limited by the jump at the boundary between two labels.
    torch.testing.assert_close(built[name].mode_weights(), share, rtol=0, atol=5e-4)


def test_line_density_inverts_its_distribution():
    line = LineDensity(lambda t: -0.5 * t.square(), low=-9.0, high=9.0, cells=20_000)
    assert line.log_normalizer == pytest.approx(0.5 * math.log(2 * math.pi), abs=1e-12)
    u = torch.linspace(0.0, 1.0, 1001, dtype=torch.float64)[1:-1]
    torch.testing.assert_close(line.quantile(u), torch.special.ndtri(u), rtol=0, atol=1e-6)
    assert line.mass(-1.0, 2.0) == pytest.approx(stats.norm.cdf(2.0) - stats.norm.cdf(-1.0), abs=1e-7)
    assert line.mass(-math.inf, math.inf) == pytest.approx(1.0, abs=1e-12)
    with pytest.raises(ValueError, match="Expected low < high; got low=1.0 and high=0.0"):
        LineDensity(lambda t: -t.square(), low=1.0, high=0.0)
    with pytest.raises(ValueError, match="Expected the density to vanish at both ends"):
        LineDensity(lambda t: -t.square(), low=-1.0, high=9.0)


# --- posteriors ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("centered", [True, False])
def test_eight_schools_evidence_by_a_plane_quadrature(centered):
    """The schools' effects integrate out one by one; (mu, log tau) by the trapezoidal rule, with scipy's densities."""
    y = numpy.array([28.0, 8, -3, 7, -1, 1, 18, 12])
    sigma = numpy.array([15.0, 10, 16, 11, 9, 11, 10, 18])
    mu, log_tau = numpy.meshgrid(numpy.linspace(-40, 45, 301), numpy.linspace(-30, 10, 801), indexing="ij")
    tau = numpy.exp(log_tau)
    log_joint = stats.norm.logpdf(mu, scale=5) + stats.halfcauchy.logpdf(tau, scale=5) + log_tau
    for effect, error in zip(y, sigma, strict=True):
        log_joint = log_joint + stats.norm.logpdf(effect, mu, numpy.sqrt(tau**2 + error**2))
    cell = (85 / 300) * (40 / 800)
    expected = math.log(numpy.exp(log_joint).sum() * cell)
    target = targets.EightSchools(centered=centered)
    assert target.log_normalizer == pytest.approx(expected, abs=1e-8)
    assert target.log_normalizer == pytest.approx(-31.3113473, abs=1e-7)


def test_eight_schools_density_and_parametrizations(generator):
    centered, plain = targets.EightSchools(), targets.EightSchools(centered=False)
    x = centered.sample(10, generator=generator)
    named = centered.constrain(x)
    mu, tau, theta = (named[k].numpy() for k in ("mu", "tau", "theta"))
    expected = stats.norm.logpdf(mu, scale=5) + stats.halfcauchy.logpdf(tau, scale=5) + numpy.log(tau)
    expected = expected + stats.norm.logpdf(theta, mu[:, None], tau[:, None]).sum(-1)
    expected = expected + stats.norm.logpdf([28, 8, -3, 7, -1, 1, 18, 12], theta, [15, 10, 16, 11, 9, 11, 10, 18]).sum(
        -1
    )
    assert centered.log_prob(x).tolist() == pytest.approx(expected.tolist(), rel=1e-12)
    z = torch.cat([x[:, :2], (x[:, 2:] - x[:, :1]) * torch.exp(-x[:, 1:2])], -1)
    torch.testing.assert_close(plain.log_prob(z), centered.log_prob(x) + 8 * x[:, 1])
    for name, value in plain.constrain(z).items():
        torch.testing.assert_close(value, named[name])


def test_eight_schools_draws_match_the_reference_posterior():
    # Posterior of the centred model as known from long NUTS runs: mu 4.4, sd 3.3; tau 3.6, sd 3.2; theta_1 6.2, sd 5.6.
    # Tolerances are four standard errors of 40,000 draws plus the rounding of these figures.
    draws = targets.EightSchools().constrain(
        targets.EightSchools().sample(40_000, generator=torch.Generator().manual_seed(0))
    )
    assert draws["mu"].mean().item() == pytest.approx(4.4, abs=0.12)
    assert draws["mu"].std().item() == pytest.approx(3.3, abs=0.1)
    assert draws["tau"].mean().item() == pytest.approx(3.6, abs=0.12)
    assert draws["tau"].std().item() == pytest.approx(3.2, abs=0.2)
    assert draws["theta"][:, 0].mean().item() == pytest.approx(6.2, abs=0.2)


def test_logistic_regression_matches_its_definition(generator):
    features = torch.tensor([[1.0, 20.0], [2.0, 10.0], [4.0, 60.0]], dtype=torch.float64)
    target = targets.LogisticRegression(features, [True, False, True], prior_scale=2.0)
    w = torch.randn(6, 3, generator=generator, dtype=torch.float64)
    scaled = (features - features.mean(0)) / features.std(0, correction=0)
    p = torch.sigmoid(w[:, :1] + w[:, 1:] @ scaled.mT).numpy()
    expected = stats.norm.logpdf(w, scale=2.0).sum(-1) + stats.bernoulli.logpmf([1, 0, 1], p).sum(-1)
    assert target.log_prob(w).tolist() == pytest.approx(expected.tolist(), rel=1e-12)
    assert target.constrain(w)["intercept"].shape == (6,)
    assert target.constrain(w)["coefficients"].shape == (6, 2)
    assert set(logistic_regression(intercept=False).constrain(w)) == {"coefficients"}


# --- samplers ------------------------------------------------------------------------------------------------------


def ks_of(values, cdf):
    return stats.kstest(values.numpy(), cdf).pvalue


def well_cdf(log_density, low, high):
    """Distribution function by Simpson's rule on its own grid, independent of the library's tables."""
    t = numpy.linspace(low, high, 20_001)
    table = integrate.cumulative_simpson(numpy.exp(log_density(t)), x=t, initial=0.0)
    return lambda x: numpy.interp(x, t, table / table[-1])


def marginals():
    tilted = well_cdf(lambda a: -(a**4) + 6 * a**2 + 0.5 * a - 8, -4, 4)
    double = well_cdf(lambda a: -((a**2 - 4) ** 2), -3.5, 3.5)
    many, wells = targets.ManyWell(dim=4), targets.DoubleWells.mw54()
    gaussian, student = targets.Gaussian.ill_scaled(), targets.StudentT(dim=3, df=3.0)
    yield many, 0, lambda x: x, tilted
    yield many, 1, lambda x: x, stats.norm.cdf
    yield wells, 3, lambda x: x, double
    yield gaussian, 0, lambda x: x, stats.norm(0.01, 0.001).cdf
    yield gaussian, 7, lambda x: x, stats.norm(1e5, 1e4).cdf
    yield student, 2, lambda x: x, stats.t(3.0).cdf
    yield targets.Funnel(), 0, lambda x: x, stats.norm(0, 3).cdf
    yield targets.Banana(), 0, lambda x: x, stats.norm(0, 10).cdf
    rotated = targets.ManyWell(dim=4, rotation_seed=5)
    yield rotated, 0, lambda x: x @ rotated.rotation, tilted
    schools = targets.EightSchools().prior
    yield schools, 1, lambda x: x, lambda v: stats.halfcauchy.cdf(numpy.exp(v), scale=5)


def test_marginals_of_samplers():
    for target, coordinate, transform, cdf in marginals():
        x = transform(target.sample(20_000, generator=torch.Generator().manual_seed(3)))
        assert ks_of(x[:, coordinate], cdf) > KS_ALPHA, (type(target).__name__, coordinate)


def test_marginal_test_has_power():
    """Negative control: a scale that is wrong by 10 % is seen at the same level."""
    x = 1.1 * targets.Gaussian([0.0], scale=1.0).sample(20_000, generator=torch.Generator().manual_seed(3))
    assert ks_of(x[:, 0], stats.norm.cdf) < KS_ALPHA


def test_right_well_mass(generator):
    target = targets.ManyWell(dim=64, rotation_seed=1)
    x = target.sample(10_000, generator=generator)
    # 32 pairs, five standard errors: false alarm 2e-5.
    error = math.sqrt(target.right_mass * (1 - target.right_mass) / 10_000)
    assert (target.right_well_mass(x) - target.right_mass).abs().max() < 5 * error
    plain = targets.ManyWell(dim=2)
    x = torch.tensor([[1.7, 0.0], [-1.7, 0.0]], dtype=torch.float64)
    assert plain.right_well_mass(x, torch.tensor([3.0, 1.0])).item() == pytest.approx(0.75)
    with pytest.raises(ValueError, match=r"Expected weight of shape \(2,\); got \(3,\)"):
        plain.right_well_mass(x, torch.ones(3))


def test_labels_number_the_wells():
    target = targets.ManyWell(dim=4)
    x = torch.tensor([[-1.7, 0, -1.7, 0], [1.7, 0, -1.7, 0], [-1.7, 0, 1.7, 0], [1.7, 0, 1.7, 0]], dtype=torch.float64)
    assert target.mode_labels(x).tolist() == [0, 1, 2, 3]
    r = target.right_mass
    assert target.mode_weights().tolist() == pytest.approx([(1 - r) ** 2, r * (1 - r), r * (1 - r), r * r])
    with pytest.raises(NotImplementedError, match="declares no modes"):
        targets.ManyWell(dim=32).mode_labels(x)
    with pytest.raises(NotImplementedError, match="declares no modes"):
        targets.ManyWell(dim=32).mode_weights()
    assert targets.Rings().mode_labels(torch.tensor([[1.0, 0.1], [0.0, -3.1], [4.0, 4.0]])).tolist() == [0, 1, 2]


def test_rotation_is_a_rotation():
    q = targets.ManyWell(dim=8, rotation_seed=2).rotation
    torch.testing.assert_close(q @ q.mT, torch.eye(8, dtype=torch.float64))
    assert torch.linalg.det(q).item() == pytest.approx(1.0)


def test_score_of_rings_at_the_origin_is_finite():
    log_prob, score = targets.Rings().log_prob_and_score(torch.zeros(1, 2, dtype=torch.float64))
    assert log_prob.item() == pytest.approx(-100.0) and torch.equal(score, torch.zeros_like(score))


# --- bad arguments -------------------------------------------------------------------------------------------------

BAD = [
    (lambda: targets.Gaussian([0.0, 0.0], scale=-1.0), "Expected scale to be positive; got -1"),
    (lambda: targets.Gaussian([0.0, 0.0], scale=[1.0, 0.0]), "Expected scale to be positive; got 0"),
    (
        lambda: targets.Gaussian([0.0, 0.0], scale=[1.0, 1.0, 1.0]),
        r"Expected scale of shape \(\) or \(2,\); got \(3,\)",
    ),
    (lambda: targets.Gaussian([0.0, 0.0]), "Expected exactly one of scale and covariance"),
    (lambda: targets.Gaussian([0.0, math.nan], scale=1.0), "Expected mean to be finite; got nan"),
    (lambda: targets.Gaussian([], scale=1.0), "Expected mean to hold at least one number"),
    (
        lambda: targets.Gaussian([0.0], covariance=[[1.0, 0.0], [0.0, 1.0]]),
        r"covariance of shape \(1, 1\); got \(2, 2\)",
    ),
    (
        lambda: targets.Gaussian([0.0, 0.0], covariance=[[1.0, 2.0], [2.0, 1.0]]),
        "positive definite; got smallest .* -1",
    ),
    (lambda: targets.Gaussian([0.0, 0.0], covariance=[[1.0, 0.5], [0.0, 1.0]]), "covariance to be symmetric"),
    (lambda: targets.StudentT(3, df=0.0), "Expected df to be positive; got 0"),
    (lambda: targets.GaussianMixture([0.0, 1.0], scales=1.0), r"Expected means of shape \(\*, \*\); got \(2,\)"),
    (lambda: targets.GaussianMixture([[0.0], [1.0]], scales=[1.0, -2.0]), "Expected scales to be positive; got -2"),
    (lambda: targets.GaussianMixture([[0.0], [1.0]]), "Expected exactly one of scales and covariances"),
    (lambda: targets.GaussianMixture([[0.0], [1.0]], scales=1.0, weights=[1.0]), r"Expected weights of shape \(2,\)"),
    (
        lambda: targets.GaussianMixture([[0.0], [1.0]], scales=1.0, weights=[1.0, 0.0]),
        "Expected weights to be positive",
    ),
    (lambda: targets.GaussianMixture.grid(10), "Expected components to be a square number; got 10"),
    (lambda: targets.Funnel(dim=1), "Expected dim to be an integer of at least 2; got 1"),
    (lambda: targets.Funnel(scale=-3.0), "Expected scale to be positive; got -3"),
    (lambda: targets.ManyWell(dim=5), r"Expected dim to be even .*; got 5"),
    (lambda: targets.ManyWell(dim=True), "Expected dim to be an integer of at least 2; got True"),
    (lambda: targets.DoubleWells(3, wells=4, separation=1.0), "Expected wells to be at most dim=3; got 4"),
    (lambda: targets.DoubleWells(3, wells=2, separation=0.0), "Expected separation to be positive; got 0"),
    (lambda: targets.Rings([3.0, 1.0]), r"Expected radii to increase; got \[3.0, 1.0\]"),
    (lambda: targets.Rings(stiffness=-1.0), "Expected stiffness to be positive; got -1"),
    (lambda: targets.Banana(scale=0.0), "Expected scale to be positive; got 0"),
    (lambda: targets.LogisticRegression([[1.0], [2.0]], [0.0, 2.0]), "Expected labels to be 0 or 1; got 2"),
    (lambda: targets.LogisticRegression([[1.0], [2.0]], [0.0]), r"Expected labels of shape \(2,\); got \(1,\)"),
    (lambda: targets.LogisticRegression([[1.0, 3.0], [2.0, 3.0]], [0, 1]), "got constant column 1. Drop it"),
    (
        lambda: targets.LogisticRegression([[1.0], [2.0]], [0, 1], prior_scale=-1.0),
        "Expected prior_scale to be positive",
    ),
]


@pytest.mark.parametrize(("build", "message"), BAD, ids=[message[:40] for _, message in BAD])
def test_bad_arguments_are_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()
