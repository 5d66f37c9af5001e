"""Networks on points: symmetries as properties of random configurations, and what would break them."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffsampler.equivariant import EquivariantGraphNetwork, PeriodicMLP

F64 = torch.float64
SIZES = st.tuples(st.integers(2, 6), st.integers(1, 3))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def network(n: int, d: int, *, seed: int = 0, std: float = 0.3, **options) -> EquivariantGraphNetwork:
    """A small network in float64 with every parameter moved away from its initial value."""
    net = EquivariantGraphNetwork(n, d, generator=generator(seed), width=8, depth=2, radial=4, **options).double()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += std * torch.randn(parameter.shape, generator=generator(seed + 1), dtype=F64)
    return net


def points(n: int, d: int, *, seed: int = 0, batch: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    g = generator(seed)
    return torch.rand(batch, generator=g, dtype=F64), torch.randn(batch, n * d, generator=g, dtype=F64)


def evaluate(net: EquivariantGraphNetwork, t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Vectors as ``(batch, n, d)``."""
    with torch.no_grad():
        return net(t, x).unflatten(-1, (net.n, net.d))


def rotation(d: int, *, seed: int, determinant: float) -> torch.Tensor:
    q = torch.linalg.qr(torch.randn(d, d, generator=generator(seed), dtype=F64))[0]
    flip = torch.ones(d, dtype=F64)
    flip[0] = determinant * torch.linalg.det(q).sign()
    return q * flip


@settings(max_examples=15, deadline=None, derandomize=True)
@given(size=SIZES, seed=st.integers(0, 1000), attention=st.booleans(), determinant=st.sampled_from([1.0, -1.0]))
def test_rotations_and_reflections_turn_the_vectors(size, seed, attention, determinant):
    n, d = size
    net, (t, x) = network(n, d, seed=seed, attention=attention), points(n, d, seed=seed)
    q = rotation(d, seed=seed, determinant=determinant)
    turned = (x.unflatten(-1, (n, d)) @ q).flatten(-2)
    vectors = evaluate(net, t, x)
    assert vectors.abs().max() > 1e-3
    torch.testing.assert_close(evaluate(net, t, turned), vectors @ q, atol=1e-10, rtol=1e-9)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(size=SIZES, seed=st.integers(0, 1000), attention=st.booleans())
def test_permutations_permute_the_vectors(size, seed, attention):
    n, d = size
    net, (t, x) = network(n, d, seed=seed, attention=attention), points(n, d, seed=seed)
    order = torch.randperm(n, generator=generator(seed))
    permuted = x.unflatten(-1, (n, d))[:, order].flatten(-2)
    torch.testing.assert_close(evaluate(net, t, permuted), evaluate(net, t, x)[:, order], atol=1e-10, rtol=1e-9)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(size=SIZES, seed=st.integers(0, 1000), shift=st.floats(-50.0, 50.0))
def test_translations_change_nothing_and_vectors_sum_to_zero(size, seed, shift):
    n, d = size
    net, (t, x) = network(n, d, seed=seed), points(n, d, seed=seed)
    vectors = evaluate(net, t, x)
    torch.testing.assert_close(evaluate(net, t, x + shift), vectors, atol=1e-9, rtol=1e-8)
    assert vectors.sum(-2).abs().max() < 1e-12 * max(1.0, vectors.abs().max().item())


def test_vectors_sum_to_zero_in_single_precision():
    net = network(13, 3).float()
    t, x = points(13, 3, batch=50)
    vectors = evaluate(net, t.float(), 3.0 * x.float())
    assert vectors.sum(-2).abs().max() < 1e-5 * vectors.abs().max()


def test_types_and_bonds_leave_only_their_own_permutations():
    n, d = 4, 3
    types = torch.tensor([0, 1, 0, 2])
    bonds = torch.zeros(n, n, dtype=torch.long)
    bonds[0, 1] = bonds[1, 0] = bonds[1, 2] = bonds[2, 1] = 1
    bonds[1, 3] = bonds[3, 1] = 2
    t, x = points(n, d)

    def swapped(net: EquivariantGraphNetwork, order: list[int]) -> float:
        permuted = x.unflatten(-1, (n, d))[:, order].flatten(-2)
        return (evaluate(net, t, permuted) - evaluate(net, t, x)[:, order]).abs().max().item()

    for options in ({"types": types}, {"bonds": bonds}, {"types": types, "bonds": bonds}):
        net = network(n, d, **options)
        assert swapped(net, [2, 1, 0, 3]) < 1e-10, "atoms 0 and 2 are alike"
        assert swapped(net, [3, 1, 2, 0]) > 1e-4, "atoms 0 and 3 are not"
        q = rotation(d, seed=1, determinant=-1.0)
        turned = (x.unflatten(-1, (n, d)) @ q).flatten(-2)
        torch.testing.assert_close(evaluate(net, t, turned), evaluate(net, t, x) @ q, atol=1e-10, rtol=1e-9)


def test_batches_and_broadcast_times_agree():
    net = network(4, 2)
    t, x = points(4, 2, batch=5)
    with torch.no_grad():
        whole = net(t, x)
        torch.testing.assert_close(torch.stack([net(a, b) for a, b in zip(t, x, strict=True)]), whole)
        block = net(t[:2].unsqueeze(-1), x.expand(2, 5, -1))
        torch.testing.assert_close(block, torch.stack([net(t[0].expand(5), x), net(t[1].expand(5), x)]))


def test_points_in_one_place_have_finite_gradients():
    net = network(4, 2)
    x = torch.zeros(2, 8, dtype=F64, requires_grad=True)
    value = net(torch.zeros(2, dtype=F64), x)
    assert not value.any()
    value.square().sum().backward()
    assert x.grad is not None and bool(x.grad.isfinite().all())
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in net.parameters())


def test_the_network_starts_at_zero_and_learns_from_there():
    net = EquivariantGraphNetwork(4, 2, generator=generator(), width=8, depth=2).double()
    t, x = points(4, 2)
    value = net(t, x)
    assert not value.any()
    (value * torch.randn(value.shape, generator=generator(), dtype=F64)).sum().backward()
    assert any(p.grad is not None and bool(p.grad.any()) for p in net.parameters())


def test_construction_is_repeatable_and_keeps_the_global_state():
    state = torch.get_rng_state()
    first, again = (EquivariantGraphNetwork(5, 3, generator=generator(3), attention=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"types": torch.zeros(3, dtype=torch.long)}, "Expected types of shape"),
        ({"types": torch.zeros(4)}, "integers from 0"),
        ({"bonds": torch.triu(torch.ones(4, 4)).long()}, "a bond has no direction"),
        ({"depth": 0}, "depth >= 1"),
        ({"scale": 0.0}, "scale > 0"),
    ],
)
def test_what_does_not_fit_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        EquivariantGraphNetwork(4, 2, generator=generator(), **options)


def test_wrong_points_are_refused():
    with pytest.raises(ValueError, match="Expected 4 points in 2 dimensions"):
        network(4, 2)(torch.zeros(()), torch.zeros(3, 9, dtype=F64))


@settings(max_examples=15, deadline=None, derandomize=True)
@given(angles=st.integers(1, 5), seed=st.integers(0, 1000), turns=st.integers(-3, 3))
def test_networks_on_angles_have_their_period(angles, seed, turns):
    net = PeriodicMLP(angles, generator=generator(seed), width=8).double()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator(seed), dtype=F64)
    t, x = points(angles, 1, seed=seed)
    whole = torch.zeros(angles, dtype=F64)
    whole[seed % angles] = 2.0 * math.pi * turns
    torch.testing.assert_close(net(t, x + whole), net(t, x), atol=1e-9, rtol=1e-9)
    assert (net(t, x + 0.5 * math.pi) - net(t, x)).abs().max() > 1e-4
