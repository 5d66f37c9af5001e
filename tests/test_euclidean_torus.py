"""Lines and circles together: the space, and the methods of the front door that take it or refuse it."""

from __future__ import annotations

import math

import pytest
import torch
from cases import F64, Hinge, deviation

import diffsampler as ds
from diffsampler.target import AffineTarget


def test_the_gaussian_is_normal_on_lines_and_wrapped_on_circles():
    space = ds.EuclideanTorus(2, 1)
    x = torch.tensor([[0.3, -1.0, 3.0]], dtype=F64)
    mean, variance = torch.tensor([[0.0, 0.5, -3.0]], dtype=F64), torch.tensor([[0.7]], dtype=F64)
    line = ds.Euclidean(2).log_gaussian(x[:, :2], mean[:, :2], variance)
    circle = ds.Torus(1).log_gaussian(x[:, 2:], mean[:, 2:], variance)
    torch.testing.assert_close(space.log_gaussian(x, mean, variance), line + circle)
    far = torch.tensor([[7.0, -8.0, 4.0]], dtype=F64)
    torch.testing.assert_close(space.project(far), torch.tensor([[7.0, -8.0, 4.0 - 2.0 * math.pi]], dtype=F64))
    assert space.features(far).shape == (1, 4) == (1, space.num_features)
    assert space == ds.EuclideanTorus(2, 1) != ds.EuclideanTorus(1, 2)
    with pytest.raises(ValueError, match="real coordinates and angles"):
        ds.EuclideanTorus(0, 2)


@pytest.mark.parametrize("method", ["as", "asbs", "dis", "cmcd", "gbs"])
def test_methods_that_take_it_have_exact_weights(method):
    """Five methods of 60 steps, four standard errors: a false alarm in 3,000 runs, with seeds fixed."""
    target = Hinge()
    fit = ds.sample(target, method=method, num_samples=2000, seed=0, budget=ds.Budget(steps=40))
    weight = fit.particles.log_weight - target.log_normalizer
    assert fit.ess > 200 and abs(deviation(weight.exp(), 1.0)) < 4.0


@pytest.mark.parametrize("method", ["pis", "dds", "gfn", "ucmcd"])
def test_others_refuse_it(method):
    with pytest.raises(ValueError, match="Expected a"):
        ds.sample(Hinge(), method=method, num_samples=100, budget=ds.Budget(steps=2))


def test_angles_are_not_scaled():
    one = torch.ones(1, dtype=F64)
    for target in (Hinge(), ds.Target.from_log_prob(lambda x: x.cos().sum(-1), space=ds.Torus(2))):
        origin = torch.zeros(target.dim, dtype=F64)
        assert AffineTarget(target, origin, one).log_volume == 0.0
        with pytest.raises(ValueError, match="Expected scale 1 on"):
            AffineTarget(target, origin, 2.0 * one)


def test_a_period_that_is_none_is_refused():
    target = ds.Target.from_log_prob(lambda x: -0.5 * x.square().sum(-1), space=ds.EuclideanTorus(1, 1))
    with pytest.raises(ValueError, match="Expected log_prob to have period 2 pi"):
        ds.sample(target, method="smc", num_samples=100)
