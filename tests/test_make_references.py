"""References of particle systems: starts, interruption, agreement of the two sides, and what must not pass."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy
import pytest
import torch

from diffsampler import targets

EXPERIMENTS = Path(__file__).parents[1] / "experiments"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    import make_references

    return make_references


@pytest.fixture
def starts(monkeypatch):
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    import reference_starts

    return reference_starts


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize(("n", "shells", "energy"), [(13, 1, -44.326801), (55, 2, -279.248470)])
def test_icosahedra_relax_to_the_known_minima(starts, n, shells, energy):
    """Global minima of free clusters, from the Cambridge cluster database (http://www-wales.ch.cam.ac.uk/CCD.html)."""
    points = starts.icosahedron(shells)
    assert points.shape == (n, 3)
    free = targets.LennardJones(n, ordered_pairs=False, stiffness=1e-12, softening=0.0)
    assert free.energy(starts.quench(free, points.flatten())).item() == pytest.approx(energy, abs=1e-6)


def test_starts_lie_on_both_sides_of_equilibrium(starts):
    target = targets.LennardJones(13)
    cold, hot = starts.ordered(target, 5, seeded()), starts.disordered(target, 200, seeded())
    assert torch.allclose(target.space.project(cold), cold, atol=1e-9)
    torch.testing.assert_close(target.energy(cold), target.energy(cold)[:1].expand(5))
    assert target.log_prob_and_score(cold)[1].abs().max() < 1e-3
    # The mean energy at equilibrium is -43.0 and its standard deviation 7.0.
    assert target.energy(cold).max() < -43.0 - 3 * 7.0 and target.energy(hot).median() > -43.0 + 3 * 7.0
    assert torch.isfinite(target.energy(hot)).all()


def tiny(script):
    return script.Case(4, dimensions=2, chains=8, warmup=20, thin=2, draws=4, blocks=3, discard=1, aligned=20)


def call(script, monkeypatch, out, *arguments):
    monkeypatch.setattr(sys, "argv", ["make_references.py", "dw4", "--out", str(out), *arguments])
    script.main()


def test_references_go_on_where_they_were(script, monkeypatch, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    case = tiny(script)
    whole = script.run_side(case, "ordered", 0, tmp_path / "whole.pt")
    # Cut off after the second block, as a kill would.
    script.run_side(replace(case, blocks=2), "ordered", 0, tmp_path / "cut.pt")
    saved = torch.load(tmp_path / "cut.pt", weights_only=True)
    saved["settings"]["blocks"] = 3
    torch.save(saved, tmp_path / "cut.pt")
    resumed = script.run_side(case, "ordered", 0, tmp_path / "cut.pt")
    assert len(whole["blocks"]) == 3 and whole["evaluations"] == resumed["evaluations"]
    for first, second in zip(whole["blocks"], resumed["blocks"], strict=True):
        assert torch.equal(first, second)
    with pytest.raises(SystemExit, match="other settings"):
        script.run_side(case, "ordered", 1, tmp_path / "cut.pt")


def test_files_of_a_reference(script, monkeypatch, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(script, "CASES", {"dw4": tiny(script)})
    call(script, monkeypatch, tmp_path)
    result = json.loads((tmp_path / "dw4.json").read_text())
    assert result["exact"]["energy"] == pytest.approx(-22.54151, abs=1e-5)
    assert result["exact"]["pair distance"] == pytest.approx(4.04499, abs=1e-5)
    assert result["exact"]["share of short pairs"] == pytest.approx(0.49467, abs=1e-5)
    assert {"energy W2", "pair distance W2", "aligned W2 (exact, 20 against 20)"} <= set(result["floors"])
    assert result["versions"]["diffsampler"] and result["settings"]["chains"] == 8
    assert numpy.load(tmp_path / "draws" / "dw4.npy").shape == (2 * 8 * 8, 8)
    for picture in ("dw4-energy.png", "dw4-pairs.png", "dw4-radial.png"):
        assert (tmp_path / picture).stat().st_size > 5_000
    before = (tmp_path / "dw4.json").stat().st_mtime_ns
    call(script, monkeypatch, tmp_path)
    assert (tmp_path / "dw4.json").stat().st_mtime_ns == before, "a finished reference was made again"
    numpy.save(tmp_path / "other.npy", 1.2 * targets.DoubleWell4().sample(40, generator=seeded()).numpy())
    call(script, monkeypatch, tmp_path, "--compare", f"dw4={tmp_path / 'other.npy'}")
    compared = json.loads((tmp_path / "dw4.json").read_text())["compared"]
    assert compared["count"] == 40 and compared["distances"]["pair distance W2"] > 0.3
    assert "compared set, energy W2" in capsys.readouterr().out


def test_sides_that_have_not_met_are_reported(script):
    """Negative control: blocks from two different laws, and blocks that stay where each chain began."""
    case, target = tiny(script), targets.DoubleWell4()
    x = target.sample(3 * 2 * 64 * 20, generator=seeded()).reshape(2, 3, 64, 20, 8)
    good = {"ordered": list(x[0]), "disordered": list(x[1])}
    assert script.two_sided(case, target, good)["agreed"]
    shifted = {"ordered": list(x[0]), "disordered": list(1.03 * x[1])}
    assert not script.two_sided(case, target, shifted)["agreed"]
    stuck = {"ordered": list(x[0]), "disordered": [block[:, :1].expand(-1, 20, -1) for block in x[1]]}
    assert not script.two_sided(case, target, stuck)["agreed"]


@pytest.mark.slow
def test_normalizer_from_both_directions_is_the_exact_one(script):
    """Four standard errors: false alarm 6e-5. An error of one nat, the negative control, would be seen."""
    case, target = script.Case(4, dimensions=2, paths=512, scale=2.6), targets.DoubleWell4()
    row = script.log_normalizer(case, target, target.sample(512, generator=seeded()), seeded())
    value, error = row["bennett"]
    assert error < 0.1 and value == pytest.approx(29.667232, abs=4 * error)
    assert row["upper_bound"][0] > 29.667232 - 4 * row["upper_bound"][1]
    assert value != pytest.approx(28.667232, abs=4 * error)
