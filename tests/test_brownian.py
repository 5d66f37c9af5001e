"""The Brownian motion posterior against its definition, another quadrature and its own prior."""

from __future__ import annotations

import numpy
import pytest
import torch
from scipy import stats

from diffsampler.targets import BrownianMotion
from diffsampler.targets.brownian import SEEN

F64 = torch.float64


@pytest.fixture(scope="module")
def target() -> BrownianMotion:
    return BrownianMotion()


def test_density_is_the_models(target):
    x = torch.randn(7, 32, generator=torch.Generator().manual_seed(0), dtype=F64)
    named = {key: value.numpy() for key, value in target.constrain(x).items()}
    s, o, path = named["innovation_scale"], named["observation_scale"], named["path"]
    expected = stats.lognorm.logpdf(s, 2.0) + stats.lognorm.logpdf(o, 2.0)
    expected += -numpy.log1p(numpy.exp(-x[:, 0].numpy())) - numpy.log1p(numpy.exp(-x[:, 1].numpy()))
    before = numpy.concatenate([numpy.zeros((7, 1)), path[:, :-1]], 1)
    expected += stats.norm.logpdf(path, before, s[:, None]).sum(1)
    assert target.prior.log_prob(x).tolist() == pytest.approx(expected.tolist(), rel=1e-12)
    expected += stats.norm.logpdf(target.observed.numpy(), path[:, list(SEEN)], o[:, None]).sum(1)
    assert target.log_prob(x).tolist() == pytest.approx(expected.tolist(), rel=1e-12)
    assert len(SEEN) == 20 and SEEN[9:11] == (9, 20)


def test_evidence_by_a_quadrature_over_both_scales(target):
    """The observed points' Gaussian law with its full covariance, by the trapezoidal rule over both log scales."""
    log_s, log_o = torch.linspace(-7.0, 2.0, 91, dtype=F64), torch.linspace(-13.0, 2.0, 151, dtype=F64)
    a, b = (grid.flatten() for grid in torch.meshgrid(log_s, log_o, indexing="ij"))
    time = torch.tensor(SEEN, dtype=F64) + 1.0
    walk = torch.minimum(time, time.unsqueeze(-1))
    covariance = (2.0 * a).exp()[:, None, None] * walk + (2.0 * b).exp()[:, None, None] * torch.eye(20, dtype=F64)
    law = torch.distributions.MultivariateNormal(torch.zeros(20, dtype=F64), covariance, validate_args=False)
    prior = torch.distributions.Normal(torch.zeros((), dtype=F64), 2.0)
    joint = law.log_prob(target.observed) + prior.log_prob(a) + prior.log_prob(b)
    value = float(torch.logsumexp(joint, 0) + (log_s[1] - log_s[0]).log() + (log_o[1] - log_o[0]).log())
    assert target.log_normalizer == pytest.approx(value, abs=1e-6)
    assert target.log_normalizer == pytest.approx(1.18774910323, abs=1e-10)


def test_draws_have_the_moments_of_the_quadrature(target):
    """Mean and variance of the log ratio of the scales, at 5 standard errors: a false alarm of 1e-6 each."""
    named = target.constrain(target.sample(20_000, generator=torch.Generator().manual_seed(5)))
    ratio = (named["observation_scale"] / named["innovation_scale"]).log()
    points, density = target.line.points, target.line.density
    width = points[1] - points[0]
    mean = float((points * density).sum() * width)
    variance = float(((points - mean).square() * density).sum() * width)
    assert abs(float(ratio.mean()) - mean) < 5.0 * (variance / 20_000) ** 0.5
    squares = (ratio - mean).square()
    assert abs(float(squares.mean()) - variance) < 5.0 * float(squares.std()) / 20_000**0.5
    assert 0.03 - 5.0 * (variance / 20_000) ** 0.5 > 0.0, "a shift of 0.03 is seen"


def test_prior_scales_are_log_normal(target):
    """Kolmogorov-Smirnov at 1e-5 for each; a scale 10 % too wide is seen."""
    x = target.prior.sample(20_000, generator=torch.Generator().manual_seed(2))
    named = target.constrain(x)
    for value in (named["innovation_scale"], named["observation_scale"]):
        assert stats.kstest(value.log().numpy(), stats.norm(0.0, 2.0).cdf).pvalue > 1e-5
        assert stats.kstest(1.1 * value.log().numpy(), stats.norm(0.0, 2.0).cdf).pvalue < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_tiny_scales_do_not_underflow(target, dtype):
    x = torch.zeros(1, 32, dtype=dtype)
    x[0, 0] = -60.0
    log_prob, score = target.log_prob_and_score(x)
    assert bool(log_prob.isfinite().all()) and bool(score.isfinite().all())
    assert bool(target.score(x, create_graph=True).isfinite().all())
