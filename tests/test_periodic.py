"""Kernels on circles see angles, not numbers: a full turn changes nothing."""

import math

import pytest
import torch
from cases import MAKERS, TORUS, torus_process

from diffsampler.space import Euclidean, EuclideanTorus, Torus

TURN = 2.0 * math.pi


def filled(process):
    """Parameters far from their initial values, where controls and corrections are zero."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in process.double().parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return process


@pytest.mark.parametrize("name", [name for name in TORUS if name != "as"])
@pytest.mark.parametrize("scaled", [False, True])
def test_kernels_on_a_torus_have_its_period(name, scaled):
    # Adjoint sampling from a point keeps the turns of a path in its state.
    build = (lambda: MAKERS[name](Torus(2), 5)) if scaled else (lambda: torus_process(name, 5))
    process = filled(build())
    generator = torch.Generator().manual_seed(1)
    size = process.drawn_space.dim if not process.has_shift else 4
    state = 2.0 * torch.randn(7, size, generator=generator, dtype=torch.float64)
    turned = state.clone()
    turned[:, 0] += TURN
    k = torch.tensor(2)
    score = torch.randn(7, 2, generator=generator, dtype=torch.float64)
    for kernel in (process.forward, process.backward):
        here, there = kernel(k, state, score), kernel(k, turned, score)
        moved = (there.mean - here.mean)[:, 0]
        # Means of angles turn with them, means of velocities stay.
        whole = moved - TURN * (moved / TURN).round()
        torch.testing.assert_close(whole, torch.zeros_like(whole), rtol=0.0, atol=1e-4)
        torch.testing.assert_close(there.mean[:, 1:], here.mean[:, 1:], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(*torch.broadcast_tensors(there.variance, here.variance), rtol=1e-4, atol=1e-4)


def test_only_lengths_are_scaled():
    x = torch.tensor([[2.0, 3.0]])
    assert Euclidean(2).scaled(x, 2.0).tolist() == [[1.0, 1.5]]
    assert Torus(2).scaled(x, 2.0).tolist() == [[2.0, 3.0]]
    assert EuclideanTorus(1, 1).scaled(x, 2.0).tolist() == [[1.0, 3.0]]
