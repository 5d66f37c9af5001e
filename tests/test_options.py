"""Options of the front door and their record: what a run chose is passed back and gives the same draws bit for bit."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
import time
from pathlib import Path

import pytest
import torch

import diffsampler as ds
from diffsampler import baselines, options, recipes, runs
from diffsampler.budget import TimeRecord

refine = importlib.import_module("diffsampler.refinement.stages")


def gaussian(x):
    return -0.5 * (x - 1.0).square().sum(-1)


def target(function=gaussian):
    return ds.Target.from_log_prob(function, dim=2)


@pytest.fixture
def small(monkeypatch):
    """Short searches and training: repetition is tested here, not the accuracy of what is repeated."""
    monkeypatch.setattr(refine, "BRIDGE_COUNT", 20)
    monkeypatch.setattr(refine, "POLISH_COUNT", 10)
    search = recipes.multistart
    monkeypatch.setattr(recipes, "multistart", lambda density, **options: search(density, **{**options, **SEARCH}))
    monkeypatch.setattr(runs, "MIN_PARTICLES", 1024)
    for module, name in ((recipes, "REFINED_BATCH"), (runs, "REFINED_BATCH"), (runs, "BATCH_SIZE")):
        monkeypatch.setattr(module, name, 64)


def same(a: ds.Fit, b: ds.Fit) -> bool:
    return torch.equal(a.particles.x, b.particles.x) and torch.equal(a.particles.log_weight, b.particles.log_weight)


def as_json(fit: ds.Fit) -> dict:
    return json.loads(json.dumps(fit.choices))


METHODS = ["auto", "smc", "pis", "dds", "dis", "cmcd"]
SEARCH = {"num_starts": 10, "rounds": 1, "steps": 60}


@pytest.mark.parametrize("method", METHODS)
def test_choices_repeat_a_run(small, method):
    fit = ds.sample(target(), method=method, num_samples=256, seed=3, budget=ds.Budget(steps=10))
    again = ds.sample(target(), choices=as_json(fit))
    assert same(fit, again)
    assert as_json(again) == as_json(fit)
    assert again.findings == fit.findings
    assert again.method == fit.method
    if again.sampler is not None:
        assert torch.equal(again.sampler.sample(20, seed=9).x, fit.sampler.sample(20, seed=9).x)


@pytest.mark.parametrize("method", ["auto", "smc", "dis", "cmcd"])
def test_choices_repeat_a_run_that_time_ended(small, monkeypatch, method):
    """The second run sees a density of another speed: decided anew by time, it would come out differently."""
    pause = 0.0

    def density(x):
        time.sleep(pause)
        return gaussian(x)

    budget = ds.Budget(seconds=1.5)
    fit = ds.sample(target(density), method=method, num_samples=256, budget=budget)
    pause = 0.002 if method != "smc" else 0.02
    again = ds.sample(target(density), choices=as_json(fit))
    assert same(fit, again)
    assert as_json(again) == as_json(fit)
    assert not any("did not repeat" in finding.message for finding in again.findings)
    control = ds.sample(target(density), method=method, num_samples=256, budget=budget)
    assert not same(fit, control), "time decided nothing: the test shows nothing"


def test_choices_survive_saving_and_json(small, tmp_path: Path):
    fit = ds.sample(target(), method="dis", num_samples=64, budget=ds.Budget(steps=3))
    fit.save(tmp_path / "fit")
    loaded = ds.load(tmp_path / "fit").choices
    assert json.dumps(loaded) == json.dumps(fit.choices)
    assert same(fit, ds.sample(target(), choices=loaded))


def test_configured_samplers_are_handed_over_again():
    def density():
        return target()

    first = density()
    fit = ds.sample(first, method=ds.DIS(first, num_steps=4), num_samples=50, budget=ds.Budget(steps=3))
    second = density()
    again = ds.sample(second, method=ds.DIS(second, num_steps=4), choices=as_json(fit))
    assert same(fit, again)
    with pytest.raises(ValueError, match="hand over the sampler again"):
        ds.sample(second, choices=fit.choices)
    with pytest.raises(ValueError, match="Expected method to be left out or 'DIS'"):
        ds.sample(second, method=baselines.HMC(second), choices=fit.choices)
    trained = ds.sample(first, method=fit.sampler, choices=fit.choices)
    assert any("'steps_before'" in finding.message for finding in trained.findings), "the sampler is in another state"


def test_another_target_is_a_finding(small):
    fit = ds.sample(target(), method="smc", num_samples=512)
    other = ds.sample(target(lambda x: gaussian(2.0 * x)), choices=fit.choices)
    assert any("'checksum'" in finding.message for finding in other.findings)
    assert not other.reliable


# Refusals -------------------------------------------------------------------------------------------------------------

CHOICES = {
    "method": "smc",
    "num_samples": 512,
    "seed": 1,
    "device": "cpu",
    "dtype": "float32",
    "budget": {"seconds": None, "evaluations": None, "steps": None},
    "version": ds.__version__,
    "betas": [0.0, 1.0],
    "num_islands": 16,
    "checksum": "0123456789abcdef",
}
TIMED = {**CHOICES, "budget": {"seconds": 2.0, "evaluations": None, "steps": None}}


def without(name):
    return {key: value for key, value in CHOICES.items() if key != name}


REFUSED = {
    "no mapping": (["smc"], {}, TypeError, "Expected choices to be a dict, such as fit.choices; got list"),
    "empty": ({}, {}, ValueError, "Pass fit.choices whole"),
    "incomplete": (without("seed"), {}, ValueError, "got none of seed"),
    "unknown": ({**CHOICES, "colour": 1}, {}, ValueError, "got 'colour' as well"),
    "of another method": ({**CHOICES, "learning_rate": 1.0}, {}, ValueError, "Expected choices of method 'smc'; got"),
    "method": (CHOICES, {"method": "dis"}, ValueError, "Expected method to be left out or 'smc' .*; got 'dis'"),
    "seed": (CHOICES, {"seed": 2}, ValueError, "Expected seed to be left out or 1 as in choices; got 2"),
    "draws": (CHOICES, {"num_samples": 9}, ValueError, "Expected num_samples .* 512 .*; got 9. Draw more from"),
    "dtype": (CHOICES, {"dtype": torch.float64}, ValueError, "Expected dtype to be left out"),
    "device": (CHOICES, {"device": "meta"}, ValueError, "Expected device to be left out or 'cpu'"),
    "budget": (CHOICES, {"budget": ds.Budget(seconds=1.0)}, ValueError, "Expected budget to be left out"),
    "resume": (CHOICES, {"resume": True, "checkpoint": "."}, ValueError, "a resumed run is no repetition"),
    "unknown dtype": ({**CHOICES, "dtype": "half"}, {}, ValueError, "one of float32, float64; got 'half'"),
    "unknown budget": ({**CHOICES, "budget": {"hours": 1}}, {}, ValueError, "with seconds, evaluations, steps"),
    "bad number": ({**CHOICES, "num_samples": 0}, {}, ValueError, "Expected num_samples >= 1; got 0"),
    "unknown method": ({**CHOICES, "method": "magic"}, {}, ValueError, "hand over the sampler again"),
    "no clock": (TIMED, {}, ValueError, "got them without a clock"),
    "clock without seconds": ({**CHOICES, "clock": {}}, {}, ValueError, "got them with a clock"),
    "clock of a resumed run": ({**TIMED, "clock": None}, {}, ValueError, "one that resumed"),
    "clock of something else": ({**TIMED, "clock": {"smc": 3}}, {}, ValueError, r"lists of \[value, count\]"),
    "clock that ends": ({**TIMED, "clock": {"search": [[1e5, 1]]}}, {}, ValueError, r"readings \('smc'\)"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_choices_that_make_no_sense_are_refused(small, case):
    choices, others, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        ds.sample(target(), choices=choices, **others)


def test_options_that_agree_are_no_contradiction(small):
    fit = ds.sample(target(), method="smc", num_samples=512, seed=1, device="cpu")
    assert same(fit, ds.sample(target(), method="smc", num_samples=512, seed=1, device="cpu", choices=fit.choices))


def test_resumed_training_says_that_time_was_lost(tmp_path: Path):
    density = target()
    settings = {"num_samples": 20, "checkpoint": tmp_path, "budget": ds.Budget(seconds=0.5)}
    ds.sample(density, method=ds.DIS(density, num_steps=4), **settings)
    fit = ds.sample(density, method=ds.DIS(density, num_steps=4), resume=True, **settings)
    assert fit.choices["clock"] is None


def test_everything_that_is_decided_is_known(small):
    for method in ("auto", "smc", "dis"):
        fit = ds.sample(target(), method=method, num_samples=64, budget=ds.Budget(steps=2))
        plain = {entry.name for entry in dataclasses.fields(options.Options)} | {"version", "checksum"}
        assert set(fit.choices) - plain <= options.DECIDED[method]


def test_defaults_are_those_of_the_front_door():
    defaults = {name: entry.default for name, entry in inspect.signature(ds.sample).parameters.items()}
    for entry in dataclasses.fields(options.Options):
        if entry.name != "budget":
            assert entry.default == defaults[entry.name]


# The record of the clock ----------------------------------------------------------------------------------------------


def test_readings_are_written_down_and_repeated():
    values = iter([0.0, 0.01, 0.2, 0.26, 0.9])
    live = TimeRecord()
    read, other = live.watch("share", lambda: next(values), levels=10), live.watch("number", lambda: 0.123)
    seen = [read(), read(), other(), read(), read(), read()]
    assert seen == [0.0, 0.0, 0.123, 0.2, 0.2, 0.9]
    assert live.series == {"share": [[0.0, 2], [0.2, 2], [0.9, 1]], "number": [[0.123, 1]]}

    def never() -> float:
        raise AssertionError("the clock was asked in a repetition")

    again = TimeRecord(json.loads(json.dumps(live.series)))
    read, other = again.watch("share", never, levels=10), again.watch("number", never)
    assert [read(), read(), other(), read(), read(), read()] == seen
    assert again.series == live.series
    with pytest.raises(ValueError, match="more of the clock's readings"):
        read()
