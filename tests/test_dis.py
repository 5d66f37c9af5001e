"""DIS: exact weights for any parameters on every space, exact reversal of its own Gaussian, learning from scratch."""

from __future__ import annotations

import pytest
import torch

from diffsampler import DIS, targets
from diffsampler.estimators import effective_sample_size, importance_log_normalizer
from diffsampler.recipes import learned_sampler
from diffsampler.schedule import variance_exploding, variance_preserving
from diffsampler.space import MeanFree, Torus
from diffsampler.target import Target


def mean_free():
    space = MeanFree(3, 2)
    return Target.from_log_prob(lambda x: -0.5 * x.square().sum(-1), space=space), 0.5 * space.dof * 1.8378770664093453


def torus():
    return Target.from_log_prob(lambda x: x.cos().sum(-1), space=Torus(2)), 2.0 * float(
        torch.special.i0(torch.ones(()).double()).log() + 1.8378770664093453
    )


def euclidean():
    target = targets.Gaussian([0.2, -0.1], covariance=torch.diag(torch.tensor([0.5, 1.5])))
    return target, target.log_normalizer


SPACES = {"euclidean": euclidean, "mean-free": mean_free, "torus": torus}


@pytest.mark.parametrize("name", list(SPACES))
def test_weights_are_exact_for_any_parameters(name):
    """|error| < 5 standard errors: false alarms 6e-7 per case, 3 cases."""
    target, truth = SPACES[name]()
    sampler = DIS(target, num_steps=8, schedule=variance_exploding(8, noise_min=0.3), width=16, point_features=8)
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in sampler.process.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=g)
    estimate = importance_log_normalizer(sampler.sample(20000, seed=1).log_weight)
    assert estimate.std_error < 0.1
    assert abs(estimate.value - truth) < 5.0 * estimate.std_error
    # Negative control: the same weights with the kernels' log densities one step short are far off.
    wrong = importance_log_normalizer(sampler.sample(20000, seed=1).log_weight + 0.2)
    assert abs(wrong.value - truth) > 5.0 * wrong.std_error


@pytest.mark.parametrize("schedule", [variance_exploding(8), variance_preserving(8)], ids=["exploding", "preserving"])
def test_reversal_of_its_own_gaussian_is_exact_before_training(schedule):
    target = targets.Gaussian([0.0, 0.0], covariance=4.0 * torch.eye(2))
    log_weight = DIS(target, schedule=schedule, scale=2.0).sample(200).log_weight
    assert torch.allclose(log_weight, torch.full_like(log_weight, target.log_normalizer), atol=1e-4)


@pytest.mark.slow
def test_nine_modes_from_scratch():
    """In a minute, without particles: |log Z error| < .05 and four fifths of the draws effective."""
    target = targets.GaussianMixture.grid(9)
    generator = torch.Generator().manual_seed(0)
    sampler, choices = learned_sampler("dis", target, generator=generator, dtype=torch.float32)
    sampler.inner.fit(steps=2000, batch_size=256, learning_rate=choices["learning_rate"])
    log_weight = sampler.sample(8000, seed=1).log_weight
    assert abs(importance_log_normalizer(log_weight).value - target.log_normalizer) < 0.05
    assert effective_sample_size(log_weight) > 0.8 * 8000
