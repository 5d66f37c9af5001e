"""Chains along a geometric path, carried over to another number of steps."""

from __future__ import annotations

import pytest
import torch

import diffsampler as ds
from diffsampler import targets
from diffsampler.methods.annealed import initial_path, regrid, regrid_increments
from diffsampler.objective import ReverseKL
from diffsampler.sampler import DiffusionSampler


def trained(kind, **options):
    """A short chain whose control, steps and temperatures are no longer those of the start."""
    target = targets.Gaussian(torch.tensor([0.5, -1.0]), scale=torch.tensor([0.7, 1.4]))
    sampler = kind(target, num_steps=6, scale=1.5, objective=ReverseKL(), **options)
    return sampler.fit(steps=30, batch_size=32, learning_rate=1e-2)


KINDS = pytest.mark.parametrize(
    ("kind", "options"), [(ds.CMCD, {"local_steps": True}), (ds.UCMCD, {}), (ds.UCMCD, {"local_mass": True})]
)


@KINDS
def test_as_many_steps_change_nothing(kind, options):
    sampler = trained(kind, **options)
    again = DiffusionSampler(sampler.target, sampler.process.regridded(6))
    a, b = sampler.sample(200, seed=3), again.sample(200, seed=3)
    assert torch.allclose(a.x, b.x, atol=1e-3) and torch.allclose(a.log_weight, b.log_weight, atol=1e-3)


@KINDS
def test_a_finer_chain_is_unbiased_and_trains_on(kind, options):
    sampler = trained(kind, **options)
    before = {name: p.detach().clone() for name, p in sampler.process.named_parameters()}
    fine = DiffusionSampler(sampler.target, sampler.process.regridded(20), ReverseKL())
    estimate = fine.sample(20_000, seed=4).log_normalizer
    # Four standard errors: a false alarm in 16,000 for a normal estimate.
    assert abs(estimate.value) < 4.0 * estimate.std_error
    old = fine.process.log_step.detach().clone()
    fine.fit(steps=3, batch_size=16)
    assert not torch.equal(old, fine.process.log_step)
    # What it came from has not moved with it.
    assert all(torch.equal(p, before[name]) for name, p in sampler.process.named_parameters())


def test_total_time_and_path_stay():
    sampler = trained(ds.CMCD)
    fine = sampler.process.regridded(48)
    time = sampler.process.log_step.exp().sum(0)
    assert torch.allclose(fine.log_step.exp().sum(0), time, rtol=0.05)
    beta, _ = initial_path(6, 0.3)
    increments = regrid_increments(beta.diff(prepend=beta.new_zeros(1)).log(), 48)
    path = torch.softmax(increments, 0).cumsum(0)
    # Evenly spaced in the logarithm before and after.
    gaps = path.log().diff()
    assert torch.allclose(gaps, gaps.mean().expand_as(gaps), rtol=1e-4) and float(path[-1]) == pytest.approx(1.0)


def test_tables_of_one_entry_are_repeated_and_lines_stay_lines():
    assert torch.equal(regrid(torch.tensor([[2.0]]), 3), torch.full((3, 1), 2.0))
    line = (torch.arange(4.0) + 0.5) / 4.0
    assert torch.allclose(regrid(line, 7), (torch.arange(7.0) + 0.5) / 7.0)
