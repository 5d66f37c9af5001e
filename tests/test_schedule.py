"""Noise schedules: accumulated totals, limits, and the shapes that processes rely on."""

from __future__ import annotations

import math

import pytest
import torch
from cases import F64
from hypothesis import given
from hypothesis import strategies as st

from diffsampler import targets
from diffsampler.methods.dds import DDS
from diffsampler.methods.dis import DIS
from diffsampler.schedule import (
    NoiseSchedule,
    chosen_schedule,
    cosine_preserving,
    variance_exploding,
    variance_preserving,
)

SCHEDULES = {
    "preserving": variance_preserving,
    "cosine": cosine_preserving,
    "exploding": variance_exploding,
}


@given(st.sampled_from(list(SCHEDULES)), st.integers(1, 200))
def test_totals_accumulate_from_the_data(name: str, num_steps: int):
    schedule = SCHEDULES[name](num_steps)
    a, v, total_a, total_v = schedule
    assert a.shape == v.shape == (num_steps,) and total_a.shape == total_v.shape == (num_steps + 1,)
    assert all(t.dtype == F64 for t in schedule)
    assert total_a[-1] == 1.0 and total_v[-1] == 0.0
    assert torch.allclose(total_a[:-1], a * total_a[1:])
    assert torch.allclose(total_v[:-1], a.square() * total_v[1:] + v)
    # Every kernel is a density, and noise only grows towards the start.
    assert bool((v > 0.0).all()) and bool((a > 0.0).all()) and bool((a <= 1.0).all())
    assert bool((total_v.diff() < 0.0).all())


@pytest.mark.parametrize("name", ["preserving", "cosine"])
@pytest.mark.parametrize("num_steps", [1, 7, 100])
def test_preserving_schedules_keep_the_unit_gaussian(name: str, num_steps: int):
    a, v, total_a, total_v = SCHEDULES[name](num_steps)
    assert torch.allclose(a.square() + v, torch.ones(num_steps, dtype=F64))
    assert torch.allclose(total_a.square() + total_v, torch.ones(num_steps + 1, dtype=F64))


@pytest.mark.parametrize("num_steps", [1, 5, 64])
def test_total_contraction_does_not_depend_on_the_number_of_steps(num_steps: int):
    # The midpoint rule integrates a linear rate exactly: total rate (10 + 0.1) / 2.
    assert float(variance_preserving(num_steps).total_contraction[0].log()) == pytest.approx(-0.25 * 10.1)
    assert float(cosine_preserving(num_steps, total=3.0).total_contraction[0].log()) == pytest.approx(-1.5)


def test_rates_fall_towards_the_data():
    for schedule in (variance_preserving(20), cosine_preserving(20), variance_exploding(20)):
        assert bool((schedule.variance[:-1].diff() < 0.0).all())


def test_exploding_levels():
    schedule = variance_exploding(5, noise_min=0.01, noise_max=100.0)
    levels = schedule.total_variance[:-1].sqrt()
    assert torch.allclose(levels, torch.tensor([100.0, 10.0, 1.0, 0.1, 0.01], dtype=F64))
    assert bool((schedule.contraction == 1.0).all()) and bool((schedule.total_contraction == 1.0).all())
    assert float(variance_exploding(1, noise_max=2.0).total_variance[0]) == pytest.approx(4.0)


def test_noising_reaches_its_totals():
    """Run the chain from a fixed point; mean and variance at the start within 4.5 standard errors (7e-6 each)."""
    n, generator = 20000, torch.Generator().manual_seed(0)
    for schedule in (variance_preserving(6), cosine_preserving(6), variance_exploding(6)):
        x = torch.full((n,), 0.7, dtype=F64)
        for a, v in zip(schedule.contraction.flip(0), schedule.variance.flip(0), strict=True):
            x = a * x + v.sqrt() * torch.randn(n, generator=generator, dtype=F64)
        mean, variance = 0.7 * float(schedule.total_contraction[0]), float(schedule.total_variance[0])
        assert abs(float(x.mean()) - mean) < 4.5 * math.sqrt(variance / n)
        assert abs(float(x.var()) / variance - 1.0) < 4.5 * math.sqrt(2.0 / n)


@pytest.mark.parametrize("name", SCHEDULES)
def test_no_steps_are_refused(name: str):
    with pytest.raises(ValueError, match="Expected num_steps >= 1; got 0"):
        SCHEDULES[name](0)


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (2.0, 1.0), (1.0, 1.0), (-1.0, 1.0)])
def test_bad_noise_levels_are_refused(low: float, high: float):
    with pytest.raises(ValueError, match="Expected 0 < noise_min < noise_max"):
        variance_exploding(3, noise_min=low, noise_max=high)


def test_schedules_are_plain_records():
    assert NoiseSchedule._fields == ("contraction", "variance", "total_contraction", "total_variance")


def test_number_of_steps_and_schedule_must_agree():
    assert len(chosen_schedule(None, None, cosine_preserving).variance) == 64
    assert len(chosen_schedule(None, 7, cosine_preserving).variance) == 7
    given_one = variance_preserving(5)
    assert chosen_schedule(given_one, None, cosine_preserving) is given_one
    assert chosen_schedule(given_one, 5, cosine_preserving) is given_one
    target = targets.Gaussian([0.0], scale=1.0)
    for build in (DIS, DDS):
        assert build(target, schedule=given_one, width=8).process.num_steps == 5
        with pytest.raises(ValueError, match="Expected num_steps=5, the length of the schedule, or none; got 64"):
            build(target, num_steps=64, schedule=given_one)
