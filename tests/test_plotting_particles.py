"""Figures of particles: what they draw carries the weights, and what they leave out is said."""

from __future__ import annotations

import math
from io import BytesIO

import pytest
import torch

from diffsampler import plotting_particles as plots
from diffsampler import targets
from diffsampler.targets.double_well_particles import exact_pair_law


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(figure) -> None:
    """Render in full: layout and drawing problems appear only then."""
    figure.savefig(BytesIO(), format="png", dpi=30)


def labels(figure) -> list[str]:
    return [text.get_text() for text in figure.axes[0].get_legend().get_texts()]


def histogram(patch) -> tuple[float, float]:
    """Mass and mean of the density that a histogram shows."""
    vertices = patch.get_path().vertices
    x, height = vertices[:, 0], vertices[:, 1]
    mass = height[:-1] * abs(x[1:] - x[:-1]) * (x[1:] > x[:-1])
    return float(mass.sum()), float((mass * (x[1:] + x[:-1]) / 2).sum() / mass.sum())


def test_energies_show_the_weighted_law_over_the_reference():
    # Weights exp(x) turn N(0, 1) into N(1, 1): a figure that forgets them is off by one.
    x = torch.randn(20_000, generator=seeded(), dtype=torch.float64)
    figure = plots.energies({"long run": (x + 1.0, None), "weighted": (x, x), "plain": (x, None)}, reference="long run")
    draw(figure)
    shown = {label: histogram(patch) for label, patch in zip(labels(figure), figure.axes[0].patches, strict=True)}
    assert shown["weighted"][1] == pytest.approx(1.0, abs=0.1)
    assert shown["long run"][1] == pytest.approx(1.0, abs=0.05)
    assert shown["weighted"][0] == pytest.approx(1.0, abs=0.01)
    # The range is that of the reference, and mass beyond it is stated and not rescaled away.
    strayed = plots.energies({"long run": (x, None), "cold": (x - 3.0, None)}, reference="long run")
    assert "cold (" in labels(strayed)[1] and "% outside)" in labels(strayed)[1]
    assert histogram(strayed.axes[0].patches[1])[0] == pytest.approx(0.66, abs=0.05)
    with_lost = torch.cat([x, x.new_tensor([math.inf, math.nan])])
    draw(plots.energies({"lost two": (with_lost, None)}))


def test_pair_distances_lie_under_the_exact_curve():
    target, law = targets.DoubleWell4(), exact_pair_law()
    x = target.sample(3000, generator=seeded())
    exact = plots.Curve(law.distance, law.density)
    figure = plots.pair_distances({"exact draws": (x, None), "again": (x, torch.zeros(3000))}, n=4, exact=exact)
    draw(figure)
    assert labels(figure) == ["exact draws", "again", "exact"]
    mass, mean = histogram(figure.axes[0].patches[0])
    assert mass == pytest.approx(1.0, abs=0.01) and mean == pytest.approx(4.045, abs=0.05)
    assert histogram(figure.axes[0].patches[1]) == pytest.approx((mass, mean), abs=1e-9)


def test_radial_distributions_of_boxes_and_clusters():
    fluid = targets.LennardJonesFluid(8)
    x = fluid.positions(torch.rand(200, fluid.dim, generator=seeded(), dtype=torch.float64) * 6.28).flatten(1)
    boxed = plots.radial_distributions({"ideal": (x, None)}, n=8, box=fluid.box)
    draw(boxed)
    g = boxed.axes[0].lines[0].get_ydata()
    assert g[50:].mean() == pytest.approx(1.0, abs=0.1)
    assert boxed.axes[0].get_xlim()[1] == pytest.approx(0.5 * fluid.box)
    cluster = torch.randn(100, 15, generator=seeded(), dtype=torch.float64)
    weight = torch.randn(100, generator=seeded(1))
    figure = plots.radial_distributions({"a": (cluster, None), "b": (2.0 * cluster, weight)}, n=5, reference="a")
    draw(figure)
    assert labels(figure) == ["a", "b"] and "number density" in figure.axes[0].get_ylabel()


BAD = [
    (lambda: plots.energies({}), "Expected at least one sampler's results; got none"),
    (
        lambda: plots.energies({"a": (torch.zeros(3), None)}, reference="b"),
        "Expected reference to be one of a; got 'b'",
    ),
    (
        lambda: plots.energies({"a": (torch.zeros(3, 2), None)}),
        r"Expected values of shape \(N,\) .* got \(3, 2\) and None",
    ),
    (lambda: plots.energies({"a": (torch.zeros(3), torch.zeros(2))}), r"for 'a'; got \(3,\) and \(2,\)"),
    (
        lambda: plots.energies({"a": (torch.full((3,), math.nan), None)}),
        "at least one finite value .* for 'a'; got none",
    ),
]


@pytest.mark.parametrize(("call", "message"), BAD, ids=[message[:40] for _, message in BAD])
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
