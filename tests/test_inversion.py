"""The travel-time inverse problem: ray lengths, exact evidence and moments, units, and bad arguments."""

from __future__ import annotations

import math

import numpy
import pytest
import torch
from scipy import integrate, stats

from diffsampler import targets
from diffsampler.targets import inversion


def test_rays_add_up_to_the_depth_of_the_receiver():
    lengths = inversion.ray_lengths(7, 10)
    depth = torch.arange(1, 11, dtype=torch.float64) * 100.0
    assert torch.allclose(lengths.sum(-1), depth)
    # A receiver sees nothing of the layers below it.
    assert lengths[0, 1:].sum() == 0.0 and (lengths >= 0.0).all()


@pytest.mark.parametrize("dim", [5, 20])
def test_evidence_is_that_of_the_marginal_of_the_data(dim):
    target = targets.LinearInversion.travel_time(dim)
    g, c = target.operator.numpy(), inversion._prior_covariance(dim).numpy()
    marginal = g @ c @ g.T + inversion.NOISE**2 * numpy.eye(len(g))
    exact = stats.multivariate_normal(cov=marginal).logpdf(target.data.numpy())
    assert target.log_normalizer == pytest.approx(exact, abs=1e-8)
    # Bayes' rule at one point: prior times likelihood over evidence is the posterior density.
    x = target.mean + 0.1
    posterior = torch.distributions.MultivariateNormal(target.mean, scale_tril=target.factor)
    assert float(target.log_prob(x)) - exact == pytest.approx(float(posterior.log_prob(x)), abs=1e-7)


def test_evidence_by_quadrature():
    target = targets.LinearInversion([[2.0], [1.0]], [0.7, -0.2], noise_scale=0.5, prior_covariance=[[1.5]])

    def density(x: float) -> float:
        return math.exp(float(target.log_prob(torch.tensor([x], dtype=torch.float64))))

    value, _ = integrate.quad(density, -10.0, 10.0, points=[0.0])
    assert math.log(value) == pytest.approx(target.log_normalizer, abs=1e-8)


@pytest.mark.parametrize("dim", [5, 20])
def test_nonlinear_problem_has_the_linear_one_as_its_limit(dim):
    nonlinear = targets.TravelTimeInversion(dim)
    linear = targets.LinearInversion.travel_time(dim)
    base = nonlinear.forward_model(torch.zeros(dim, dtype=torch.float64))
    assert base[-1].item() == pytest.approx(400.0)  # 1 km at 2.5 km/s
    x = 1e-4 * nonlinear.prior.sample(6, generator=torch.Generator().manual_seed(0))
    error = nonlinear.forward_model(x) - base - linear.forward_model(x)
    assert error.abs().max() < 3e-4 * linear.forward_model(x).abs().max()
    # Mildly nonlinear: at prior draws the two differ by more than the noise, and less than the signal.
    draws = nonlinear.prior.sample(1000, generator=torch.Generator().manual_seed(1))
    gap = (nonlinear.forward_model(draws) - base - linear.forward_model(draws)).square().mean().sqrt()
    signal = linear.forward_model(draws).square().mean().sqrt()
    assert 0.5 * inversion.NOISE < gap < 0.5 * signal, (gap, signal)


def test_parameters_are_velocities():
    velocity = targets.TravelTimeInversion(5).constrain(torch.zeros(3, 5))["velocity"]
    assert velocity.shape == (3, 5) and bool((velocity == 2500.0).all())


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: targets.TravelTimeInversion(0), "Expected dim"),
        (lambda: targets.TravelTimeInversion(5, receivers=0), "Expected receivers"),
        (
            lambda: targets.LinearInversion([[1.0]], [1.0, 2.0], noise_scale=1.0, prior_covariance=[[1.0]]),
            "Expected data",
        ),
        (
            lambda: targets.LinearInversion([[1.0]], [1.0], noise_scale=-1.0, prior_covariance=[[1.0]]),
            "Expected noise_scale",
        ),
        (
            lambda: targets.LinearInversion([[1.0]], [1.0], noise_scale=1.0, prior_covariance=[[-1.0]]),
            "positive definite",
        ),
    ],
)
def test_bad_arguments(build, message):
    with pytest.raises(ValueError, match=message):
        build()
