import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffsampler.pilot import run_pilot
from diffsampler.pilot.reference import EllipticalMixture
from diffsampler.target import Target

# x = m + c R z has the same normaliser and mapped moments. Each run may err by 5 standard errors + 0.02 in log Z and by
# 0.15 standard deviations in a mean that 2048 particles estimate: false alarm below 1e-4 per example.


def generator(seed):
    return torch.Generator().manual_seed(seed)


def mixture(dim):
    """Log density, mean and standard deviations of two modes, weights 0.3 and 0.7."""
    centre = torch.zeros(2, dim, dtype=torch.float64)
    centre[0, 0], centre[1, 0] = -4.0, 4.0
    scale = torch.ones(2, dim, dtype=torch.float64)
    scale[0] = 0.7
    weight = torch.tensor([0.3, 0.7], dtype=torch.float64)
    law = EllipticalMixture(centre, scale, weight.log())
    mean = weight @ centre
    cov = torch.diag(weight @ (scale.square() + centre.square()) - mean.square())
    return law.log_prob, mean, cov


def banana(dim):
    """``x_2 = x_1^2 + noise``, further coordinates standard normal."""

    def log_prob(z):
        bend = z[:, 1] - 0.5 * z[:, 0].square()
        rest = z[:, 0].square() + (bend / 0.5).square() + z[:, 2:].square().sum(-1)
        return -0.5 * rest - 0.5 * dim * math.log(2.0 * math.pi) - math.log(0.5)

    mean = torch.zeros(dim, dtype=torch.float64)
    mean[1] = 0.5
    cov = torch.eye(dim, dtype=torch.float64)
    cov[1, 1] = 0.25 + 0.5
    return log_prob, mean, cov


def check(build, dim, shift, scale, seed):
    log_prob, mean, cov = build(dim)
    source = generator(seed)
    rotation = torch.linalg.qr(torch.randn(dim, dim, generator=source, dtype=torch.float64))[0]
    m = shift * torch.randn(dim, generator=source, dtype=torch.float64)
    target = Target.from_log_prob(
        lambda x: log_prob(((x - m) / scale) @ rotation) - dim * math.log(scale) + 1.5, dim=dim, log_normalizer=1.5
    )
    result = run_pilot(target, generator=generator(seed), num_particles=2048)
    assert result.particles is not None, result.findings
    estimate = result.particles.log_normalizer
    assert abs(estimate.value - 1.5) < 5.0 * estimate.std_error + 0.02
    spread = (rotation @ cov @ rotation.mT).diagonal().sqrt()
    error = ((result.location - m) / scale - rotation @ mean) / spread
    assert float(error.abs().max()) < 0.15
    assert not any(level == "error" for level, _, _ in result.findings)


@settings(max_examples=5, deadline=None, derandomize=True)
@given(
    build=st.sampled_from([mixture, banana]),
    dim=st.integers(2, 5),
    shift=st.sampled_from([0.0, 1.0, 100.0]),
    scale=st.sampled_from([0.1, 1.0, 1e3]),
    seed=st.integers(0, 1000),
)
def test_same_answer_in_other_coordinates(build, dim, shift, scale, seed):
    check(build, dim, shift, scale, seed)


@pytest.mark.parametrize(
    ("build", "shift", "scale"),
    [(mixture, 1e4, 1.0), (mixture, 0.0, 1e-3), (mixture, 1e4, 1e-3), (banana, 1e4, 1e-3), (banana, 0.0, 1e-3)],
)
def test_same_answer_far_away_and_at_small_scales(build, shift, scale):
    check(build, 3, shift, scale, 7)
