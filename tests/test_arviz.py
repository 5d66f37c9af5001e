"""Weighted draws as ArviZ data, and Pareto smoothing against ArviZ's."""

from __future__ import annotations

import math
import subprocess
import sys
import types

import numpy as np
import pytest
import torch

from diffsampler.estimators import effective_sample_size, pareto_smooth
from diffsampler.integrations.arviz import to_arviz


def _weighted(n, *, seed=0):
    """Draws of N(0, 2^2) with weights for the target N(0, 1), and a vector parameter that depends on them."""
    generator = torch.Generator().manual_seed(seed)
    x = 2.0 * torch.randn(n, dtype=torch.float64, generator=generator)
    log_weight = -0.5 * x.square() * (1.0 - 0.25) + math.log(2.0)
    return {"a": x, "b": torch.stack([x, 2.0 * x], -1)}, log_weight


def _attrs(data):
    return data.attrs


def test_resampled_draws_follow_the_weighted_law():
    posterior, log_weight = _weighted(4000)
    data = to_arviz(posterior, log_weight, num_chains=4, attrs={"log_z": 0.01, "pareto_k": None, "ok": True})
    a = np.asarray(data["posterior"]["a"])
    assert a.shape == (4, 1000)
    assert np.asarray(data["posterior"]["b"]).shape == (4, 1000, 2)
    # Systematic resampling adds less than multinomial noise: 1/sqrt(ESS + n) bounds the error; 4.5 sigma, 7e-6.
    error = 4.5 * math.sqrt(1 / effective_sample_size(log_weight) + 1 / 4000)
    assert abs(a.mean()) < error
    assert abs(a.std() - 1.0) < error
    # Negative control: the raw draws do not have the target's spread.
    assert abs(float(posterior["a"].std()) - 1.0) > error
    assert _attrs(data)["log_z"] == 0.01 and "pareto_k" not in _attrs(data) and _attrs(data)["ok"] == 1
    assert _attrs(data)["weighting"] == "resampled"


def test_kept_draws_carry_their_log_weights():
    posterior, log_weight = _weighted(100)
    log_prob = -0.5 * posterior["a"].square()
    data = to_arviz(posterior, log_weight, weights="keep", num_chains=2, log_prob=log_prob)
    stats = data["sample_stats"]
    np.testing.assert_array_equal(np.asarray(stats["log_weight"]).ravel(), log_weight.numpy())
    np.testing.assert_array_equal(np.asarray(data["posterior"]["a"]).ravel(), posterior["a"].numpy())
    np.testing.assert_array_equal(np.asarray(stats["energy"]).ravel(), -log_prob.numpy())
    assert _attrs(data)["weighting"] == "sample_stats.log_weight"


def test_equal_weights_come_back_unchanged_and_in_order():
    posterior, _ = _weighted(400)
    data = to_arviz(posterior, torch.zeros(400, dtype=torch.float64), num_chains=4)
    np.testing.assert_array_equal(np.asarray(data["posterior"]["a"]).ravel(), posterior["a"].numpy())


def test_effective_sample_size_of_arviz_falls_with_that_of_the_weights():
    import arviz

    posterior, log_weight = _weighted(4000, seed=1)
    steep = 6.0 * log_weight
    ess = [float(arviz.ess(to_arviz(posterior, w), var_names=["a"])["a"]) for w in (0.0 * log_weight, steep)]
    # The exact ratio depends on the function; the point is that duplicates are not counted as new draws.
    assert ess[0] > 3000
    assert ess[1] < 2.0 * effective_sample_size(steep) < 3000


def test_lost_particles_are_not_exported():
    posterior, log_weight = _weighted(40)
    posterior["a"][3] = math.nan
    log_weight[3] = -math.inf
    data = to_arviz(posterior, log_weight)
    assert np.isfinite(np.asarray(data["posterior"]["a"])).all()


def test_seed_decides_the_resampling():
    posterior, log_weight = _weighted(400)
    first, again, other = (np.asarray(to_arviz(posterior, log_weight, seed=s)["posterior"]["a"]) for s in (0, 0, 1))
    assert (first == again).all() and (first != other).any()


def test_netcdf_round_trip(tmp_path):
    import arviz

    posterior, log_weight = _weighted(40)
    data = to_arviz(posterior, log_weight, weights="keep", attrs={"log_z": -1.5, "note": [1, 2]})
    data.to_netcdf(str(tmp_path / "a.nc"))
    back = arviz.from_netcdf(str(tmp_path / "a.nc"))
    assert _attrs(back)["log_z"] == -1.5
    np.testing.assert_array_equal(np.asarray(back["posterior"]["b"]), np.asarray(data["posterior"]["b"]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"log_weight": torch.zeros(10, 2)}, r"Expected log_weight of shape \(n,\); got \(10, 2\)"),
        ({"log_weight": torch.zeros(9)}, r"Expected 9 draws of 'a', one for each weight; got shape \(10,\)"),
        ({"log_weight": torch.full((10,), -math.inf)}, "Expected finite log weights; got none in 10 draws"),
        ({"weights": "drop"}, 'Expected weights to be "resample" or "keep"; got \'drop\''),
        ({"weights": "keep", "num_chains": 3}, "Expected num_chains to divide the 10 draws that are kept; got 3"),
        ({"num_chains": 11}, "Expected num_chains between 1 and the 10 draws; got 11"),
    ],
)
def test_bad_input_is_refused(change, message):
    arguments = {"posterior": {"a": torch.zeros(10)}, "log_weight": torch.zeros(10), "num_chains": 2} | change
    with pytest.raises(ValueError, match=message):
        to_arviz(**arguments)


def test_arviz_is_not_imported_with_the_library():
    code = "import sys, diffsampler, diffsampler.integrations.arviz; sys.exit('arviz' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("version", ["0.23.4", "1.3.0"])
def test_both_generations_of_arviz_are_called_in_their_own_way(version, monkeypatch):
    def from_dict(*args, **kwargs):
        return args, kwargs

    module = types.ModuleType("arviz")
    module.__version__, module.from_dict = version, from_dict
    monkeypatch.setitem(sys.modules, "arviz", module)
    posterior, log_weight = _weighted(8)
    args, kwargs = to_arviz(posterior, log_weight, weights="keep", num_chains=2)
    groups, attrs = (args[0], kwargs["attrs"]["/"]) if version == "1.3.0" else (kwargs, kwargs["attrs"])
    assert groups["posterior"]["b"].shape == (2, 4, 2) and groups["sample_stats"]["log_weight"].shape == (2, 4)
    assert attrs["inference_library"] == "diffsampler"


def test_missing_arviz_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "arviz", None)
    with pytest.raises(ImportError, match="Expected arviz to be installed: pip install"):
        to_arviz(*_weighted(8))


@pytest.mark.parametrize("scale", [0.5, 1.0, 2.0, 3.0])
def test_pareto_shape_agrees_with_arviz(scale):
    import arviz

    generator = torch.Generator().manual_seed(3)
    log_weight = scale * torch.randn(4000, generator=generator, dtype=torch.float64)
    smoothed, k = pareto_smooth(log_weight)
    if hasattr(arviz, "psislw"):
        theirs, their_k = arviz.psislw(log_weight.numpy())
    else:
        from arviz_stats.base import array_stats

        theirs, their_k = array_stats.psislw(-log_weight.numpy())
    assert abs(k - float(their_k)) < 0.03
    ours = torch.log_softmax(smoothed, 0).numpy()
    # ArviZ's two implementations differ from each other by as much in the largest weights.
    assert np.abs(np.exp(ours) - np.exp(np.asarray(theirs))).sum() < 0.05


def test_opposite_sign_would_be_noticed():
    # ArviZ 1.x takes the opposite sign of 0.x: the tolerance above must be able to tell them apart.
    generator = torch.Generator().manual_seed(3)
    log_weight = -torch.log(-torch.log(torch.rand(4000, generator=generator, dtype=torch.float64)))
    assert abs(pareto_smooth(log_weight)[1] - pareto_smooth(-log_weight)[1]) > 0.3
