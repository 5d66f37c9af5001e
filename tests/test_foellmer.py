"""The Foellmer sampler: unbiased weights, draws, location and scale, and bad arguments."""

from __future__ import annotations

import math

import pytest
import torch

from diffsampler import targets
from diffsampler.methods.foellmer import Foellmer
from diffsampler.target import Target


def without_score(target: Target) -> Target:
    def refuse(x: torch.Tensor) -> torch.Tensor:
        raise AssertionError("The score was called.")

    return Target.from_log_prob(
        target.log_prob, dim=target.dim, score=refuse, log_normalizer=target.log_normalizer, prior=target.prior
    )


@pytest.mark.parametrize("num_steps", [1, 20])
def test_weights_are_unbiased_with_few_points_and_steps(num_steps):
    target = targets.GaussianMixture([[-1.0, 0.5], [1.5, -0.5]], scales=[0.6, 0.9], weights=[0.3, 0.7])
    sampler = Foellmer(without_score(target), num_steps=num_steps, num_points=4, radius=2.0)
    ratio = sampler.sample(20_000, seed=1).log_weight.exp()
    # 4 standard errors: one false alarm in 16,000 seeds.
    assert abs(ratio.mean() - 1.0) < 4.0 * ratio.std() / math.sqrt(len(ratio))
    assert ratio.std() / math.sqrt(len(ratio)) < 0.02
    # Negative control: the tail of the weights is part of them.
    cut = ratio.clamp_max(torch.quantile(ratio, 0.95))
    assert abs(cut.mean() - 1.0) > 4.0 * cut.std() / math.sqrt(len(cut))


def test_draws_at_another_location_and_scale():
    target = targets.Gaussian([1e4, -3.0], scale=[20.0, 0.01], log_normalizer=3.0)
    sampler = Foellmer(without_score(target), num_steps=20, num_points=32)
    particles = sampler.sample(2000, seed=0)
    mean, error = particles.expectation(particles.x)
    # 5 standard errors in two coordinates: one false alarm in 870,000.
    assert bool(((mean - target.mean).abs() < 5.0 * error).all())
    assert abs(particles.log_normalizer.value - 3.0) < 5.0 * particles.log_normalizer.std_error
    assert particles.ess > 600
    assert sampler.evaluations > 20 * 32 * 2000


def test_one_seed_gives_one_answer():
    target = targets.Gaussian([0.0], scale=1.0)
    first, again = (Foellmer(target, num_steps=5, radius=2.0).sample(50, seed=3) for _ in range(2))
    assert torch.equal(first.x, again.x) and torch.equal(first.log_weight, again.log_weight)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_steps": 0}, "Expected num_steps"),
        ({"num_points": 1}, "Expected num_points"),
        ({"regularization": 1.0}, "Expected regularization"),
        ({"radius": -1.0}, "Expected a positive radius"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        Foellmer(targets.Gaussian([0.0], scale=1.0), **options)
