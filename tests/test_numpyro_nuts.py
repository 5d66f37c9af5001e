"""NumPyro's NUTS as a peer: options and densities are checked, and draws are the target's where it is installed."""

from __future__ import annotations

import pytest
import torch

from diffsampler import baselines, targets
from diffsampler.target import Target


def gaussian() -> Target:
    return targets.Gaussian(torch.tensor([1.0, -2.0]), scale=torch.tensor([0.5, 2.0]))


def test_bad_options_are_refused():
    with pytest.raises(ValueError, match="num_chains >= 1"):
        baselines.NumPyroNUTS(gaussian(), lambda x: x, num_chains=0)
    with pytest.raises(ValueError, match="positive start_scale"):
        baselines.NumPyroNUTS(gaussian(), lambda x: x, start_scale=0.0)
    with pytest.raises(ValueError, match="Euclidean"):
        baselines.NumPyroNUTS(targets.DoubleWell4(), lambda x: x)


def test_draws_are_those_of_the_target():
    pytest.importorskip("numpyro")
    import jax.numpy as jnp

    def log_density(x):
        return -0.5 * (((x - jnp.array([1.0, -2.0])) / jnp.array([0.5, 2.0])) ** 2).sum()

    sampler = baselines.NumPyroNUTS(gaussian(), log_density, warmup_steps=300)
    particles = sampler.sample(4000, seed=1)
    assert particles.replicates == 4 and len(particles) == 4000 and not particles.has_normalizer
    mean, sd = particles.x.mean(0), particles.x.std(0)
    scale = torch.tensor([0.5, 2.0], dtype=torch.float64)
    # Five standard errors at the effective size: false alarm below 1e-5.
    error = 5.0 / particles.ess**0.5
    assert ((mean - torch.tensor([1.0, -2.0])).abs() / scale < error).all()
    assert ((sd / scale - 1.0).abs() < error).all()
    assert torch.equal(particles.x, sampler.sample(4000, seed=1).x)


def test_another_density_is_refused():
    pytest.importorskip("numpyro")
    sampler = baselines.NumPyroNUTS(gaussian(), lambda x: -0.5 * (x**2).sum())
    with pytest.raises(ValueError, match="up to a constant"):
        sampler.sample(100)
