"""The experiment on particle systems: every setting can be built, runs go on, missing references are asked for."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from diffsampler.trajectory import simulate

EXPERIMENTS = Path(__file__).parents[1] / "experiments"


@pytest.fixture
def boltzmann(monkeypatch):
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    import boltzmann

    small = {"num_steps": 4, "width": 8, "depth": 1, "steps": 40, "batch_size": 16, "fresh": 16}
    monkeypatch.setattr(boltzmann, "DRAWS", 40)
    for case, kinds in boltzmann.SETTINGS.items():
        for kind, setting in kinds.items():
            monkeypatch.setitem(boltzmann.SETTINGS[case], kind, replace(setting, **small))
    return boltzmann


def call(boltzmann, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["boltzmann.py", *map(str, arguments)])
    boltzmann.main()


@pytest.mark.parametrize("case", ["dw4", "lj13", "lj55"])
@pytest.mark.parametrize("kind", ["cpu", "published"])
def test_every_setting_can_be_built_and_simulated(boltzmann, case, kind):
    setting = boltzmann.SETTINGS[case][kind]
    target = boltzmann.build_target(setting)
    sampler = boltzmann.build(setting, target, 0)
    assert simulate(sampler.process, target, 3).log_weight.shape == (3,)
    assert boltzmann.refined(setting, target, sampler.process).space == target.space


def test_runs_go_on_and_finished_ones_are_printed(boltzmann, monkeypatch, tmp_path, capsys):
    options = ("dw4", "--out", tmp_path, "--seed", 3)
    call(boltzmann, monkeypatch, *options, "--seconds", 0)
    assert "paused" in capsys.readouterr().out
    path = tmp_path / "dw4-cpu-3.json"
    assert not path.exists()
    call(boltzmann, monkeypatch, *options)
    assert "energy W2" in capsys.readouterr().out
    result = json.loads(path.read_text())
    assert set(result["drawn"]) == set(result["floor"]) == set(result["resampled"])
    assert result["exact log normalizer"] == pytest.approx(29.667232, abs=1e-5)
    written = path.stat().st_mtime_ns
    call(boltzmann, monkeypatch, *options)
    assert path.stat().st_mtime_ns == written, "a finished run was made again"
    with pytest.raises(SystemExit, match="other settings"):
        call(boltzmann, monkeypatch, *options, "--steps", 7)


def test_annealed_particles_are_judged_without_training(boltzmann, monkeypatch, tmp_path, capsys):
    setting = replace(boltzmann.SETTINGS["dw4"]["smc"], steps=0, bank=64)
    monkeypatch.setitem(boltzmann.SETTINGS["dw4"], "smc", setting)
    call(boltzmann, monkeypatch, "dw4", "--setting", "smc", "--out", tmp_path)
    assert "energy W2" in capsys.readouterr().out
    result = json.loads((tmp_path / "dw4-smc-1.json").read_text())
    assert result["training energies"] > 64 and abs(result["log normalizer"][0] - 29.667) < 3.0


def test_annealed_particles_train(boltzmann):
    setting = replace(boltzmann.SETTINGS["lj13"]["bank"], bank=32)
    target = boltzmann.build_target(setting)
    bank = target.space.noise((32,), like=torch.zeros(0), generator=torch.Generator().manual_seed(0))
    sampler = boltzmann.build(setting, target, 0, bank=bank).fit(steps=2, batch_size=16)
    assert len(sampler.history) > 0


def test_missing_references_are_named(boltzmann, monkeypatch, tmp_path):
    with pytest.raises(SystemExit, match="Expected one of cpu, smc, published"):
        call(boltzmann, monkeypatch, "dw4", "--setting", "bank", "--out", tmp_path)
    with pytest.raises(SystemExit, match="make_references.py lj13"):
        call(boltzmann, monkeypatch, "lj13", "--out", tmp_path, "--references", tmp_path)
