"""The label-switching posterior: its sum over allocations against quadrature, and its symmetric modes."""

from __future__ import annotations

import math

import pytest
import torch

from diffsampler.targets import LabelSwitching


def test_normalizer_by_quadrature():
    target = LabelSwitching([-1.0, 0.5, 2.0], components=2, scale=0.8, prior_scale=2.0)
    line = torch.linspace(-14.0, 14.0, 1401, dtype=torch.float64)
    grid = torch.cartesian_prod(line, line)
    log_z = torch.logsumexp(target.log_prob(grid), 0) + 2.0 * math.log(28.0 / 1400)
    assert abs(float(log_z) - target.log_normalizer) < 1e-6


def test_modes_are_the_orders():
    target = LabelSwitching([-3.0, 0.0, 3.0], components=3)
    orders = torch.tensor([[-3.0, 0.0, 3.0], [-3.0, 3.0, 0.0], [0.0, -3.0, 3.0], [3.0, 0.0, -3.0]])
    labels = target.mode_labels(orders).tolist()
    assert labels[0] == 0
    assert labels[3] == 5
    assert len(set(labels)) == 4
    assert torch.allclose(target.log_prob(orders), target.log_prob(orders)[:1].expand(4))
    assert target.mode_weights().tolist() == pytest.approx([1 / 6] * 6)


def test_too_many_allocations_are_refused():
    with pytest.raises(ValueError, match="allocations"):
        LabelSwitching(torch.randn(30, generator=torch.Generator().manual_seed(0)), components=4)
