"""Control networks: what they compute, where they start, and that they touch no global state."""

from __future__ import annotations

import math

import pytest
import torch
from cases import F64
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from diffsampler.networks import Control, FourierMLP, clip, linear
from diffsampler.space import Euclidean, MeanFree, Space, Torus

SPACES: list[Space] = [Euclidean(3), MeanFree(3, 2), Torus(2)]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def points(space: Space, *shape: int) -> Tensor:
    return space.project(torch.randn(*shape, space.dim, generator=generator(1), dtype=F64))


def test_construction_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    FourierMLP(2, 2, generator=generator(), point_features=8)
    Control(Euclidean(2), generator=generator(), extra_outputs=2)
    assert torch.equal(before, torch.get_rng_state())


def test_parameters_follow_the_seed():
    nets = [FourierMLP(2, 2, generator=generator(seed), width=8, point_features=4) for seed in (0, 0, 1)]
    states = [net.state_dict() for net in nets]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not torch.equal(states[0]["time_in.weight"], states[2]["time_in.weight"])


def test_layers_start_like_the_library_or_at_zero():
    layer = linear(100, 50, generator=generator())
    assert 0.09 < float(layer.weight.detach().abs().max()) <= 0.1 and layer.weight.dtype == torch.float32
    zero = linear(100, 50, generator=generator(), zero=True)
    assert not zero.weight.any() and not zero.bias.any() and zero.weight.requires_grad


@given(st.floats(-1e3, 1e3), st.floats(0.1, 100.0))
def test_clip_is_smooth_and_bounded(value: float, bound: float):
    clipped = float(clip(torch.tensor(value, dtype=F64), bound))
    assert abs(clipped) <= bound and abs(clipped) <= abs(value) + 1e-12 and clipped * value >= 0.0
    if abs(value) < 0.01 * bound:
        assert math.isclose(clipped, value, rel_tol=1e-4, abs_tol=1e-12)


@pytest.mark.parametrize("space", SPACES, ids=repr)
def test_untrained_control_is_the_gated_feature(space: Space):
    control = Control(space, generator=generator(), gate_init=0.7, bound=4.0, extra_outputs=3, width=8).double()
    x, feature = points(space, 5), 3.0 * points(space, 5)
    value, extra = control(torch.tensor(0.3, dtype=F64), x, feature, 0.5)
    expected = space.project_vector(0.5 * 0.7 * 4.0 * torch.tanh(feature / 4.0))
    assert torch.allclose(value, expected) and extra.shape == (5, 3) and not extra.any()


@pytest.mark.parametrize("space", SPACES, ids=repr)
@pytest.mark.parametrize("feature_input", [True, False])
def test_time_is_embedded_once_per_entry_and_means_the_same(space: Space, feature_input: bool):
    control = Control(space, generator=generator(), feature_input=feature_input, width=8, point_features=4).double()
    with torch.no_grad():
        for p in control.parameters():
            p += 0.1 * torch.randn(p.shape, generator=generator(2), dtype=F64)
    x, feature, t = points(space, 4, 6), points(space, 4, 6), torch.linspace(0.0, 1.0, 4, dtype=F64)
    column = control(t.unsqueeze(-1), x, feature)[0]
    full = control(t.unsqueeze(-1).expand(4, 6), x, feature)[0]
    rows = torch.stack([control(t[i], x[i], feature[i])[0] for i in range(4)])
    assert torch.allclose(column, full, atol=1e-12) and torch.allclose(column, rows, atol=1e-12)
    assert torch.allclose(space.project_vector(column), column, atol=1e-12)
    assert not torch.allclose(column[0], control(t[-1], x[0], feature[0])[0])


def test_network_is_periodic_on_a_torus():
    space = Torus(2)
    control = Control(space, generator=generator(), width=8, point_features=4).double()
    with torch.no_grad():
        control.net.head.weight += torch.randn(2, 8, generator=generator(), dtype=F64)
    x, zero = points(space, 7), torch.zeros(7, 2, dtype=F64)
    t = torch.tensor(0.4, dtype=F64)
    assert torch.allclose(control(t, x, zero)[0], control(t, x + 2.0 * math.pi, zero)[0], atol=1e-10)


def test_mean_free_controls_have_one_gate():
    assert Control(MeanFree(3, 2), generator=generator()).gate.out.out_features == 1
    assert Control(Euclidean(6), generator=generator()).gate.out.out_features == 6


def test_gradients_reach_every_parameter_once_the_head_is_not_zero():
    control = Control(Euclidean(2), generator=generator(), width=8, point_features=4, feature_input=True)
    with torch.no_grad():
        control.net.head.weight += 0.1
    x = points(Euclidean(2), 9).float()
    control(torch.tensor(0.5), x, x)[0].square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in control.parameters())


def test_point_features_are_constants_with_the_stated_scale():
    net = FourierMLP(2, 1, generator=generator(), point_features=4000, feature_scale=3.0)
    assert "wave" in dict(net.named_buffers()) and net.wave.shape == (2, 4000)
    # Frequencies of standard deviation 3 per unit for two inputs; 8000 draws give 0.8%, 5 of them 4%.
    assert abs(float(net.wave.std()) / 3.0 - 1.0) < 0.04
    plain = FourierMLP(2, 1, generator=generator())
    assert plain.wave.shape == (2, 0) and plain.point_in.in_features == 2


def test_tabulated_times_give_the_same_control_and_no_graph():
    control = Control(Euclidean(2), generator=generator(), feature_input=True).double()
    for parameter in control.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=generator())
    x = torch.randn(5, 2, generator=generator(), dtype=torch.float64)
    for k in range(8):
        t = torch.tensor(k / 7).double()
        plain, _ = control(t, x, -x)
        with control.tabulated(7):
            table, _ = control(t, x, -x)
        torch.testing.assert_close(table, plain, rtol=1e-12, atol=1e-12)
    assert control(t, x, -x)[0].requires_grad and control._table is None
