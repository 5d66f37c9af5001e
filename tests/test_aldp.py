"""The experiment on alanine dipeptide: learned methods are built, trained and drawn from on the right space."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from diffsampler import targets

EXPERIMENTS = Path(__file__).parents[1] / "experiments"


@pytest.fixture(scope="module")
def internal():
    return targets.AlanineDipeptideInternal()


@pytest.mark.parametrize("method", ["adjoint_sampling", "asbs", "wt_asbs"])
def test_learned_methods_draw_angles(method, internal, monkeypatch):
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    import aldp

    sizes = replace(aldp.SETTINGS["cpu"], steps=4, width=8)
    sampler = aldp.METHODS[method](internal, sizes)
    sampler.fit(steps=2, batch_size=16)
    particles = sampler.sample(5)
    assert particles.x.shape == (5, 60) and particles.log_weight.isfinite().all()
    assert particles.x[:, 53:].abs().max() <= torch.pi + 1e-6
    assert aldp.energy(internal, aldp.internal(internal, particles)).shape == (5, 1)


def test_the_published_sampler_draws_positions(internal, monkeypatch):
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    import aldp

    cartesian = targets.AlanineDipeptide(internal.model)
    monkeypatch.setattr(aldp.targets, "AlanineDipeptide", lambda model, compiled=False: cartesian)
    sizes = replace(aldp.SETTINGS["published"], steps=3, width=8, training=28)
    sampler = aldp.METHODS["wt_asbs_cartesian"](internal, sizes)
    sampler.fit(steps=6, batch_size=4)
    assert sampler.sample(3).log_weight.isfinite().all()
    # The same molecule, its mirror image included, in both coordinates.
    x = cartesian.reference + 0.01 * torch.randn(4, 66, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = cartesian.space.project(torch.cat([x, -x]))
    moved = aldp.internal(internal, aldp.Particles(x, torch.zeros(8, dtype=torch.float64)))
    torch.testing.assert_close(aldp.energy(internal, moved)[:, 0], cartesian.energy(x), rtol=1e-8, atol=0.0)
    torch.testing.assert_close(internal.torsion_angles(moved.x), cartesian.torsion_angles(x))


def test_shares_and_differences_of_sets(monkeypatch):
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    import aldp

    from diffsampler.particles import Particles

    particles = Particles(torch.zeros(4, 1), torch.zeros(4, dtype=torch.float64))
    share, difference, _ = aldp.difference(particles, torch.tensor([True, False, False, False]))
    assert share == pytest.approx(0.25) and difference == pytest.approx(1.0986, abs=1e-4)
    assert aldp.difference(particles, torch.zeros(4, dtype=torch.bool))[1] == float("inf")
