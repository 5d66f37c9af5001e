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
    planar = targets.CircularMolecule(internal.target).planar(particles.x)
    assert aldp.energy(internal, replace(particles, x=planar)).shape == (5, 1)


def test_shares_and_differences_of_sets(monkeypatch):
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    import aldp

    from diffsampler.particles import Particles

    particles = Particles(torch.zeros(4, 1), torch.zeros(4, dtype=torch.float64))
    share, difference, _ = aldp.difference(particles, torch.tensor([True, False, False, False]))
    assert share == pytest.approx(0.25) and difference == pytest.approx(1.0986, abs=1e-4)
    assert aldp.difference(particles, torch.zeros(4, dtype=torch.bool))[1] == float("inf")
