"""The result record."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from cases import F64
from torch import Tensor

from diffsampler import estimators
from diffsampler.particles import Particles, disagreement


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def test_what_follows_from_independent_weights():
    x, log_weight = normal(200, 3), normal(200, seed=1)
    particles = Particles(x, log_weight)
    assert len(particles) == 200
    assert particles.log_normalizer == estimators.importance_log_normalizer(log_weight)
    assert particles.elbo == estimators.elbo(log_weight).value
    assert particles.ess == estimators.effective_sample_size(log_weight)
    assert particles.pareto_k == estimators.pareto_smooth(log_weight)[1]
    mean, error = particles.expectation(x)
    expected = estimators.expectation(x, log_weight)
    assert torch.equal(mean, expected[0]) and torch.equal(error, expected[1])


def test_blocks_are_the_unit_where_particles_interact():
    log_weight = normal(60, seed=2)
    particles = Particles(normal(60, 2), log_weight, replicates=6)
    blocks = torch.logsumexp(log_weight.reshape(6, 10), -1) - math.log(10.0)
    assert torch.allclose(particles.log_replicates, blocks)
    assert particles.log_normalizer.kind == "replicates"
    assert particles.log_normalizer == estimators.replicate_log_normalizer(blocks)
    assert particles.elbo == pytest.approx(float(blocks.mean()))
    assert particles.log_normalizer.value == pytest.approx(estimators.log_mean_exp(log_weight))


def test_block_errors_see_dependence():
    """Blocks of one repeated point: the error is that of the distinct points, ten times that of counting all."""
    points, log_points = normal(40, 2, seed=3), 0.3 * normal(40, seed=4)
    x, log_weight = points.repeat_interleave(100, 0), log_points.repeat_interleave(100)
    mean, error = Particles(x, log_weight, replicates=40).expectation(x)
    alone, alone_error = Particles(points, log_points).expectation(points)
    assert torch.allclose(mean, alone)
    assert torch.allclose(error, alone_error * math.sqrt(40 / 39))
    assert torch.allclose(Particles(x, log_weight).expectation(x)[1] * 10.0, alone_error)


def test_block_errors_have_the_right_size():
    # 400 sets of 20 independent blocks of 5 correlated points: the root mean square z is 1 up to 4% and the t-like
    # excess of 20 blocks (5%).
    shared = normal(400, 20, 1, seed=5)
    x = shared + 0.3 * normal(400, 20, 5, seed=6)
    log_weight = 0.5 * normal(400, 20, 5, seed=7)
    z = []
    for values, weights in zip(x, log_weight, strict=True):
        mean, error = Particles(values.reshape(-1, 1), weights.flatten(), replicates=20).expectation(
            values.reshape(-1, 1)
        )
        z.append(float(mean / error))
    assert 0.9 < math.sqrt(sum(v * v for v in z) / len(z)) < 1.2


def test_chains_have_no_normalizer():
    particles = Particles(normal(10, 2), torch.zeros(10, dtype=F64), has_normalizer=False, effective=4.5)
    assert math.isnan(particles.log_normalizer.value) and particles.log_normalizer.kind == "unavailable"
    assert math.isnan(particles.elbo) and particles.ess == 4.5


def test_resampling_follows_the_weights():
    x = torch.arange(4.0).unsqueeze(-1)
    log_weight = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=F64).log()
    drawn = Particles(x, log_weight).resample(1000, generator=torch.Generator().manual_seed(0))
    assert drawn.shape == (1000, 1)
    counts = torch.bincount(drawn.flatten().long()).double()
    assert float((counts - torch.tensor([100.0, 200.0, 300.0, 400.0])).abs().max()) <= 1.0
    # In random order: the first half is as good as the second. Each half holds 50 +- 5 of the rarest.
    assert 25 < int((drawn[:500] == 0.0).sum()) < 75
    again = Particles(x, log_weight).resample(1000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(drawn, again)


def test_resampling_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    Particles(normal(5, 1), normal(5)).resample(5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("x", "log_weight", "options", "error", "message"),
    [
        (normal(5), normal(5), {}, ValueError, r"Expected x of shape \(n, D\) .* got \(5,\) and \(5,\)"),
        (normal(5, 2), normal(4), {}, ValueError, r"got \(5, 2\) and \(4,\)"),
        (normal(5, 2), normal(5, 1), {}, ValueError, r"got \(5, 2\) and \(5, 1\)"),
        (normal(5, 2), normal(5).float(), {}, TypeError, "Expected log_weight in float64; got torch.float32"),
        (normal(5, 2), normal(5), {"replicates": 2}, ValueError, "Expected replicates to divide 5 particles; got 2"),
        (normal(5, 2), normal(5), {"replicates": 0}, ValueError, "Expected replicates to divide 5 particles; got 0"),
    ],
)
def test_bad_records_are_refused(x: Tensor, log_weight: Tensor, options: dict, error: type, message: str):
    with pytest.raises(error, match=message):
        Particles(x, log_weight, **options)


def test_records_are_frozen():
    particles = Particles(normal(3, 1), normal(3))
    with pytest.raises(dataclasses.FrozenInstanceError):
        particles.nonfinite = 3


def test_impossible_particles_do_not_count():
    log_weight = torch.tensor([0.0, -math.inf, 0.0, -math.inf], dtype=F64)
    particles = Particles(torch.tensor([[1.0], [50.0], [3.0], [70.0]]), log_weight)
    assert particles.ess == pytest.approx(2.0)
    assert particles.log_normalizer.value == pytest.approx(-math.log(2.0))
    assert particles.expectation(particles.x)[0].item() == pytest.approx(2.0)
    assert float(particles.resample(9, generator=torch.Generator()).max()) == 3.0


def test_disagreement_sees_a_lost_tail_that_moments_hide():
    # Six statistics in two coordinates: a normal score above 4.5 is a false alarm of 1e-4 per comparison.
    generator = torch.Generator().manual_seed(0)
    draws = [torch.randn(4000, 2, generator=generator, dtype=torch.float64) for _ in range(2)]
    first, second = (Particles(x, torch.zeros(len(x), dtype=torch.float64)) for x in draws)
    assert disagreement(first, second) < 4.5
    kept = draws[0][draws[0][:, 0] > -2.2]
    cut = Particles(kept, torch.zeros(len(kept), dtype=torch.float64))
    assert disagreement(cut, second) > 4.5
