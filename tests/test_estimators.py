"""Estimators: closed forms, coverage, and what happens at the edges. Seeds are fixed; false-alarm rates are stated."""

from __future__ import annotations

import math

import pytest
import torch
from cases import F64, deviation
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from diffsampler.estimators import (
    Estimate,
    effective_sample_size,
    elbo,
    eubo,
    expectation,
    forward_effective_sample_size,
    importance_log_normalizer,
    log_mean_exp,
    pareto_smooth,
    replicate_log_normalizer,
    systematic_resample,
)

finite_weights = st.lists(st.floats(-50.0, 50.0), min_size=1, max_size=30)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def uniform(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


# Normalizing constants


def test_log_mean_exp_survives_large_weights():
    assert log_mean_exp(torch.tensor([1e4, 1e4 + math.log(3.0)])) == pytest.approx(1e4 + math.log(2.0), abs=1e-3)
    assert log_mean_exp(torch.tensor([-math.inf, 0.0])) == pytest.approx(-math.log(2.0))


@given(finite_weights, st.floats(-1e3, 1e3))
def test_a_constant_shifts_the_normalizer_and_nothing_else(values: list[float], shift: float):
    log_weight = torch.tensor(values, dtype=F64)
    plain, moved = importance_log_normalizer(log_weight), importance_log_normalizer(log_weight + shift)
    assert moved.value == pytest.approx(plain.value + shift, abs=1e-9)
    if len(values) > 1:
        assert moved.std_error == pytest.approx(plain.std_error, rel=1e-6, abs=1e-9)
    assert effective_sample_size(log_weight + shift) == pytest.approx(effective_sample_size(log_weight), rel=1e-6)


def test_importance_intervals_cover():
    # Lognormal weights of log variance 0.5: mean weight 1. Two standard errors cover 95.4%; the count of 2000 intervals
    # has a standard deviation of 0.5%, and the skew of 400 weights costs up to one more percent.
    log_weight = math.sqrt(0.5) * normal(2000, 400) - 0.25
    estimates = [importance_log_normalizer(row) for row in log_weight]
    covered = sum(abs(e.value) < 2.0 * e.std_error for e in estimates) / len(estimates)
    assert 0.93 < covered < 0.97
    halved = sum(abs(e.value) < e.std_error for e in estimates) / len(estimates)
    assert halved < 0.75, "negative control: half the interval covers far less"
    assert estimates[0].kind == "importance"


def test_replicates_cover_where_single_weights_do_not():
    # Blocks of identical weights: what resampling does to an extreme.
    log_block = 0.5 * normal(500, 40, seed=1) - 0.125
    by_block = [replicate_log_normalizer(row) for row in log_block]
    by_weight = [importance_log_normalizer(row.repeat_interleave(100)) for row in log_block]
    assert sum(abs(e.value) < 2.0 * e.std_error for e in by_block) / 500 > 0.9
    assert sum(abs(e.value) < 2.0 * e.std_error for e in by_weight) / 500 < 0.4
    assert by_block[0].kind == "replicates"
    assert by_block[0].value == pytest.approx(by_weight[0].value, abs=1e-12)


def test_bounds_of_a_gaussian_pair():
    # log w = log N(x; 0, 1) - log N(x; 0, s^2) with s = 1.5, from both sides.
    s, z = 1.5, normal(20000)

    def log_weight(x: Tensor) -> Tensor:
        return -0.5 * x.square() + 0.5 * (x / s).square() + math.log(s)

    lower, upper = elbo(log_weight(s * z)), eubo(log_weight(z))
    assert lower.kind == "lower bound" and upper.kind == "upper bound"
    # 4 standard errors, false alarm 6e-5 each.
    assert abs(lower.value - (0.5 * (1.0 - s**2) + math.log(s))) < 4.0 * lower.std_error
    assert abs(upper.value - (0.5 / s**2 - 0.5 + math.log(s))) < 4.0 * upper.std_error
    assert lower.value < 0.0 < upper.value
    assert lower.std_error == pytest.approx(float(log_weight(s * z).std()) / math.sqrt(20000))


def test_estimates_print():
    assert str(Estimate(1.23456, 0.00123, "importance")) == "1.2346 +- 0.0012"


# Effective sample sizes


@given(finite_weights)
def test_effective_sample_size_is_between_one_and_n(values: list[float]):
    ess = effective_sample_size(torch.tensor(values, dtype=F64))
    assert 1.0 - 1e-9 <= ess <= len(values) + 1e-9


def test_effective_sample_size_closed_forms():
    assert effective_sample_size(torch.full((7,), -3.0)) == pytest.approx(7.0)
    assert effective_sample_size(torch.tensor([0.0, -math.inf, 0.0, -math.inf])) == pytest.approx(2.0)
    assert effective_sample_size(torch.tensor([math.log(3.0), 0.0])) == pytest.approx(1.6)
    assert effective_sample_size(torch.tensor([1e5, 0.0])) == pytest.approx(1.0)


def test_forward_effective_sample_size_of_a_gaussian_pair():
    # 1 / E_pi[pi / q] for pi = N(0, 1), q = N(0, s^2): s E[exp(-(1 - 1/s^2) x^2 / 2)] = s / sqrt(2 - 1/s^2).
    s, x = 1.5, normal(20000, seed=3)
    log_weight = -0.5 * x.square() + 0.5 * (x / s).square() + math.log(s) + 0.9
    expected = math.sqrt(2.0 - 1.0 / s**2) / s
    weight = (log_weight - 0.9).exp()
    error = float(weight.std() / weight.mean()) / math.sqrt(20000)
    # 4 standard errors, false alarm 6e-5.
    assert abs(forward_effective_sample_size(log_weight, 0.9) / expected - 1.0) < 4.0 * error
    # A mode that the sampler misses shows as weights without bound.
    assert forward_effective_sample_size(torch.cat([log_weight, log_weight[:2000] + 20.0]), 0.9) < 1e-6
    assert forward_effective_sample_size(torch.full((5,), 2.0), 2.0) == pytest.approx(1.0)


# Expectations


def test_expectation_closed_form():
    values = torch.tensor([1.0, 2.0, 4.0])
    weight = torch.tensor([0.5, 0.25, 0.25], dtype=F64)
    mean, error = expectation(values, weight.log() + 7.0)
    assert mean.item() == pytest.approx(2.0) and mean.dtype == error.dtype == F64
    assert error.item() == pytest.approx(math.sqrt(0.25 * 1.0 + 0.0 + 0.0625 * 4.0))


def test_expectation_of_events_and_equal_weights():
    values = normal(400, 2, 3)
    mean, error = expectation(values, torch.zeros(400))
    assert mean.shape == error.shape == (2, 3)
    assert torch.allclose(mean, values.mean(0)) and torch.allclose(error, values.std(0, correction=0) / 20.0)


def test_expectation_errors_have_the_right_size():
    # 1000 replicates of self-normalized importance sampling; the root mean square z of 1 has error 1/sqrt(2000) = 2%.
    x, s = 1.5 * normal(1000, 500, seed=4), 1.5
    log_weight = -0.5 * x.square() + 0.5 * (x / s).square()
    results = [expectation(row, weight) for row, weight in zip(x, log_weight, strict=True)]
    z = torch.stack([mean / error for mean, error in results])
    assert 0.92 < float(z.square().mean().sqrt()) < 1.08


def test_impossible_points_do_not_count():
    values = torch.tensor([1.0, 100.0, 3.0])
    mean, error = expectation(values, torch.tensor([0.0, -math.inf, 0.0]))
    assert mean.item() == pytest.approx(2.0) and error.item() == pytest.approx(math.sqrt(0.5))


# Pareto tails


def pareto_draws(k: float, n: int, seed: int) -> Tensor:
    """Generalized Pareto variables with shape ``k`` and scale 1 by inversion."""
    u = uniform(n, seed=seed)
    return torch.expm1(-k * torch.log1p(-u)) / k if k else -torch.log1p(-u)


@pytest.mark.parametrize("k", [-0.3, 0.0, 0.3, 0.7, 1.2])
def test_pareto_shape_is_found(k: float):
    # Excesses over any threshold keep the shape. The fit to m = 600 of n = 40000 weights has a standard deviation of
    # about (1 + k) / sqrt(m); averaged over 8 sets, 4 of them plus 0.02 for the fit's weak prior: false alarm 6e-5.
    found = [pareto_smooth(pareto_draws(k, 40000, seed).log())[1] for seed in range(8)]
    assert abs(sum(found) / 8 - k) < 4.0 * (1.0 + abs(k)) / math.sqrt(600 * 8) + 0.02


def test_pareto_smoothing_agrees_with_arviz():
    arviz = pytest.importorskip("arviz")
    if not hasattr(arviz, "psislw"):
        pytest.skip("ArviZ 1.x, which is compared in test_arviz.py")
    log_weight = pareto_draws(0.6, 5000, 3).log()
    smoothed, k = pareto_smooth(log_weight)
    theirs, their_k = arviz.psislw(log_weight.numpy().copy())
    theirs = torch.as_tensor(theirs) + torch.logsumexp(smoothed, 0)
    # ArviZ shrinks k towards 0.5 a little more.
    assert abs(k - float(their_k)) < 0.03
    order = log_weight.argsort()
    assert float((smoothed - theirs)[order[:-3]].abs().max()) < 0.05


def test_smoothing_keeps_order_bulk_and_scale():
    log_weight = 2.0 * normal(3000) + 50.0
    smoothed, k = pareto_smooth(log_weight)
    assert smoothed.dtype == F64 and 0.2 < k < 1.0
    assert torch.equal(smoothed.argsort()[-50:], log_weight.argsort()[-50:])
    bulk = log_weight.argsort()[: 3000 - int(3.0 * math.sqrt(3000))]
    assert torch.allclose(smoothed[bulk], log_weight[bulk], atol=1e-9)
    assert float(smoothed.max()) <= float(log_weight.max()) + 1e-9


@pytest.mark.parametrize("n", [1, 2, 24])
def test_too_few_weights_have_no_tail(n: int):
    log_weight = normal(n)
    smoothed, k = pareto_smooth(log_weight)
    assert k == math.inf and torch.equal(smoothed, log_weight)


def test_equal_weights_have_no_tail():
    smoothed, k = pareto_smooth(torch.full((100,), 3.0))
    assert k == -math.inf and torch.equal(smoothed, torch.full((100,), 3.0, dtype=F64))


def test_smoothing_survives_impossible_points():
    log_weight = normal(1000).clone()
    log_weight[::2] = -math.inf
    smoothed, k = pareto_smooth(log_weight)
    assert math.isfinite(k) and not bool(smoothed.isnan().any())
    assert bool((smoothed[::2] == -math.inf).all())


def test_smoothing_gives_no_weight_to_impossible_points():
    log_weight = torch.full((1000,), -math.inf, dtype=F64)
    log_weight[:40] = normal(40)
    smoothed, _ = pareto_smooth(log_weight)
    assert bool((smoothed[40:] == -math.inf).all())


# Resampling


@given(st.lists(st.floats(-5.0, 5.0), min_size=1, max_size=20), st.integers(1, 50), st.integers(0, 1000))
def test_systematic_counts_are_within_one(values: list[float], n: int, seed: int):
    log_weight = torch.tensor(values, dtype=F64)
    index = systematic_resample(log_weight, n, generator=torch.Generator().manual_seed(seed))
    counts = torch.bincount(index, minlength=len(values)).double()
    assert index.shape == (n,)
    assert float((counts - n * torch.softmax(log_weight, 0)).abs().max()) < 1.0 + 1e-9


def test_systematic_counts_are_unbiased():
    log_weight = normal(5)
    rows = log_weight.expand(4000, 5)
    index = systematic_resample(rows, 3, generator=torch.Generator().manual_seed(0))
    counts = torch.nn.functional.one_hot(index, 5).sum(1).double()
    # Five shares at 4.5 standard errors: false alarm 3e-5. Rows draw their own uniform numbers.
    for i, weight in enumerate(torch.softmax(log_weight, 0).tolist()):
        assert abs(deviation(counts[:, i], 3.0 * weight)) < 4.5


def test_impossible_points_are_never_drawn():
    log_weight = torch.tensor([-math.inf, 0.0, -math.inf, -1.0, -math.inf])
    index = systematic_resample(log_weight.expand(500, 5), 64, generator=torch.Generator().manual_seed(0))
    assert set(index.unique().tolist()) == {1, 3}


def test_resampling_defaults_and_seeds():
    log_weight = normal(6)
    first, again, other = (
        systematic_resample(log_weight, generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 5)
    )
    assert first.shape == (6,) and torch.equal(first, again)
    assert torch.equal(systematic_resample(torch.zeros(6), generator=torch.Generator()), torch.arange(6))
    assert other.dtype == torch.int64


# Edges


def test_single_weights():
    one = torch.tensor([0.3], dtype=F64)
    estimate = importance_log_normalizer(one)
    assert estimate.value == pytest.approx(0.3) and estimate.std_error == math.inf
    assert elbo(one).std_error == math.inf and effective_sample_size(one) == pytest.approx(1.0)
    mean, error = expectation(torch.tensor([2.0]), one)
    assert mean.item() == 2.0 and error.item() == 0.0
    assert systematic_resample(one, 4, generator=torch.Generator()).tolist() == [0, 0, 0, 0]


def test_equal_weights_are_certain():
    equal = torch.full((10,), 1.5)
    assert importance_log_normalizer(equal) == pytest.approx((1.5, 0.0, "importance"))
    assert elbo(equal).std_error == 0.0


def test_impossible_weights_keep_their_share():
    half = torch.tensor([0.0, -math.inf] * 50)
    estimate = importance_log_normalizer(half)
    assert estimate.value == pytest.approx(-math.log(2.0))
    assert estimate.std_error == pytest.approx(1.0 / math.sqrt(99.0))
    assert elbo(half).value == -math.inf


def test_nothing_possible_is_not_a_number_with_an_error():
    nothing = torch.full((4,), -math.inf)
    estimate = importance_log_normalizer(nothing)
    assert estimate.value == -math.inf and not estimate.std_error < math.inf


def test_single_precision_is_accumulated_in_double():
    # 2^24 + 1 is not a float32: sums of many weights would stand still.
    log_weight = torch.zeros(3, dtype=torch.float32) + 1e-4
    assert log_mean_exp(log_weight) == pytest.approx(1e-4, rel=1e-6)
    big = torch.full((1000,), 1.0e4, dtype=torch.float32)
    big[0] += 0.25
    assert log_mean_exp(big) - 1e4 == pytest.approx(math.log1p((math.exp(0.25) - 1.0) / 1000.0), rel=1e-5)


@pytest.mark.parametrize("n", [40, 2000])
@pytest.mark.parametrize("spread", [1e3, 1e5, 1e14])
def test_weights_of_which_one_outdoes_all_have_no_finite_tail(n, spread):
    """They are different, though all but one are zero beside the largest: the worst verdict, not the best."""
    log_weight = -spread * torch.rand(n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    smoothed, k = pareto_smooth(log_weight)
    assert k > 0.7 and smoothed.isfinite().all()
