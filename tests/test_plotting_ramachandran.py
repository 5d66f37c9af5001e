"""Ramachandran plots: what they draw carries the weights, and empty cells stay empty."""

from __future__ import annotations

import math
from io import BytesIO

import numpy
import pytest
import torch

from diffsampler.plotting_ramachandran import free_energy_surface, ramachandran


def draw(figure) -> None:
    figure.savefig(BytesIO(), format="png", dpi=30)


def test_surface_counts_weights_in_a_periodic_grid():
    angles = torch.tensor([[-3.0, -3.0], [-3.0 + 2 * math.pi, -3.0 - 2 * math.pi], [1.0, 2.0], [1.0, 2.1]]).double()
    log_weight = torch.tensor([0.0, math.log(3.0), math.log(2.0), -math.inf]).double()
    surface = free_energy_surface(angles, log_weight, bins=4)
    assert surface[0, 0] == 0.0 and surface.isfinite().sum() == 2
    assert surface[2, 3].item() == pytest.approx(math.log(2.0))
    equal = free_energy_surface(angles.reshape(2, 2, 2), bins=4)
    assert equal[2, 3].item() == 0.0
    # Weights have no scale, and pi itself belongs to the first cell.
    torch.testing.assert_close(free_energy_surface(angles, log_weight + 700.0, bins=4), surface)
    assert free_energy_surface(torch.tensor([[math.pi, math.pi]], dtype=torch.float64), bins=4)[0, 0] == 0.0


def test_weights_turn_one_law_into_another():
    """Draws of von Mises angles, weighted to be uniform, have a flat surface; unweighted they do not."""
    noise = numpy.random.default_rng(0)
    angles = torch.from_numpy(noise.vonmises(0.0, 1.0, size=(200_000, 2)))
    flat = free_energy_surface(angles, -angles.cos().sum(-1), bins=6)
    # 5,000 effective draws per cell: 0.014 kT each, five standard errors (false alarm 2e-5 over 36 cells).
    assert (flat - flat.mean()).abs().max() < 0.15
    assert free_energy_surface(angles, bins=6).max() > 2.0


def test_figure_has_a_panel_for_each_surface_and_one_for_profiles(generator):
    angles = 0.5 * torch.randn(500, 2, generator=generator, dtype=torch.float64)
    surfaces = {"sampler": free_energy_surface(angles, angles[:, 0]), "reference": free_energy_surface(angles, bins=18)}
    figure = ramachandran(surfaces, title="alanine dipeptide")
    draw(figure)
    assert [ax.get_title() for ax in figure.axes[:2]] == ["sampler", "reference"]
    shown = figure.axes[1].images[0].get_array()
    assert shown.shape == (18, 18)
    # What no draw reached is not drawn.
    missing = numpy.ma.getmaskarray(shown) | numpy.isnan(numpy.ma.getdata(shown))
    assert missing.sum() == (~surfaces["reference"].isfinite()).sum() > 0
    lines = figure.axes[2].get_lines()
    assert [line.get_label() for line in lines] == ["sampler", "reference"]
    # Weights exp(phi) move the sampler's minimum to the right of the reference's.
    lowest = [line.get_xdata()[numpy.nanargmin(line.get_ydata())] for line in lines]
    assert lowest[0] >= lowest[1]


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"Expected angles of shape \(..., 2\) of at least one draw; got \(0, 2\)"):
        free_energy_surface(torch.zeros(0, 2))
    with pytest.raises(ValueError, match=r"Expected log_weight of shape \(5,\); got \(4,\)"):
        free_energy_surface(torch.zeros(5, 2), torch.zeros(4))
    with pytest.raises(ValueError, match="Expected log weights below infinity"):
        free_energy_surface(torch.zeros(1, 2), torch.tensor([math.nan]))
    with pytest.raises(ValueError, match="Expected at least one surface; got none"):
        ramachandran({})
    with pytest.raises(ValueError, match=r"Expected a surface of shape \(bins, bins\) for a; got \(3, 4\)"):
        ramachandran({"a": torch.zeros(3, 4)})
    with pytest.raises(ValueError, match="Expected a surface with finite values for a"):
        ramachandran({"a": torch.full((3, 3), math.inf)})
