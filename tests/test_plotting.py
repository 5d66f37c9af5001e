"""Figures: what they draw carries the weights, awkward input draws too, and no global state is touched."""

from __future__ import annotations

import math
import subprocess
import sys
from io import BytesIO

import pytest
import torch

from diffsampler import plotting

N = 2000


def posterior(generator: torch.Generator) -> dict[str, torch.Tensor]:
    return {
        "mu": torch.randn(N, generator=generator),
        "theta": torch.randn(N, 2, generator=generator),
        "corr": torch.randn(N, 2, 2, generator=generator),
    }


def draw(figure) -> None:
    """Render in full: layout and drawing problems appear only then."""
    figure.savefig(BytesIO(), format="png", dpi=30)


def titles(figure) -> list[str]:
    return [ax.get_xlabel() for ax in figure.axes if ax.get_xlabel()]


def test_pair_names_every_scalar_and_limits_dimensions(generator):
    draws = posterior(generator)
    figure = plotting.pair(draws, torch.zeros(N), max_dims=4)
    draw(figure)
    assert titles(figure) == ["mu", "theta[0]", "theta[1]", "corr[0,0]"]
    assert any("4 of 7 coordinates" in text.get_text() for ax in figure.axes for text in ax.texts)
    chosen = plotting.pair(draws, torch.zeros(N), names=["corr[1,0]", "theta"], truth={"theta": torch.zeros(2)})
    draw(chosen)
    assert titles(chosen) == ["corr[1,0]", "theta[0]", "theta[1]"]


def histogram_mean(ax) -> float:
    """Mean of the density that a histogram shows."""
    vertices = ax.patches[0].get_path().vertices
    x, height = vertices[:, 0], vertices[:, 1]
    mass = height[:-1] * abs(x[1:] - x[:-1]) * (x[1:] > x[:-1])
    return float((mass * (x[1:] + x[:-1]) / 2).sum() / mass.sum())


def test_pair_and_marginals_show_the_weighted_law(generator):
    # Weights exp(x) turn N(0, 1) into N(1, 1): a figure that forgets them is off by one.
    x = torch.randn(20_000, generator=generator, dtype=torch.float64)
    weighted = plotting.pair({"x": x}, x).axes[0]
    unweighted = plotting.pair({"x": x}, torch.zeros_like(x)).axes[0]
    assert histogram_mean(weighted) == pytest.approx(1.0, abs=0.1)
    assert histogram_mean(unweighted) == pytest.approx(0.0, abs=0.1)
    figure = plotting.marginals({"a": ({"x": x}, x), "b": ({"x": x}, torch.zeros_like(x))}, reference="b", title="t")
    draw(figure)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b"]


def test_pair_survives_lost_and_constant_particles(generator):
    draws = {"x": torch.randn(N, generator=generator), "c": torch.full((N,), 3.0)}
    draws["x"][7] = math.nan
    log_weight = torch.zeros(N)
    log_weight[7] = -math.inf
    draw(plotting.pair(draws, log_weight))


def test_unknown_name_and_empty_input_are_refused(generator):
    draws = posterior(generator)
    with pytest.raises(ValueError, match=r"Expected names among mu, theta, .*; got 'thetta'"):
        plotting.pair(draws, torch.zeros(N), names=["thetta"])
    with pytest.raises(ValueError, match="Expected at least one finite draw"):
        plotting.pair({"x": torch.full((5,), math.nan)}, torch.zeros(5))
    with pytest.raises(ValueError, match="Expected at least one finite log weight"):
        plotting.weights(torch.full((5,), -math.inf))
    with pytest.raises(ValueError, match="Expected at least one row of training history"):
        plotting.training([])
    with pytest.raises(ValueError, match="Expected at least one row to compare"):
        plotting.comparison([])
    with pytest.raises(ValueError, match="Expected at least one sampler"):
        plotting.marginals({})


def test_weights_states_ess_and_lost_particles():
    log_weight = torch.zeros(400)
    log_weight[:100] = -math.inf
    figure = plotting.weights(log_weight, title="half")
    draw(figure)
    text = "\n".join(t.get_text() for ax in figure.axes for t in ax.texts)
    assert "n = 400" in text
    assert "ESS = 300 (75%)" in text
    assert "non-finite: 100" in text


def test_training_shows_what_the_history_holds():
    history = [
        {"step": i, "loss": 1.0 / i, "elbo": -1.0 / i, "evaluations": 512.0 * i, "ess": math.nan, "seconds": 0.1 * i}
        for i in range(1, 30)
    ]
    history[3]["loss"] = math.inf
    figure = plotting.training(history, log_normalizer=0.0)
    draw(figure)
    assert [ax.get_ylabel() for ax in figure.axes if ax.get_ylabel()] == ["loss", "ELBO"]
    assert "evaluations" in titles(figure)
    draw(plotting.training([{"step": 1.0, "loss": 2.0}]))


def test_comparison_shows_absent_results():
    rows = [
        {"target": "a", "method": "auto", "error": -0.02, "std_error": 0.01},
        {"target": "a", "method": "cmcd", "error": 0.0, "std_error": None},
        {"target": "b", "method": "auto", "error": None},
    ]
    figure = plotting.comparison(rows, title="errors")
    draw(figure)
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert texts == ["0.02", "0", "none"]


def test_import_is_lazy_and_pyplot_stays_out():
    code = (
        "import sys, torch\n"
        "from diffsampler import plotting\n"
        "assert 'matplotlib' not in sys.modules\n"
        "plotting.weights(torch.zeros(10))\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
