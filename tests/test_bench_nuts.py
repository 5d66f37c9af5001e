"""The benchmark against NUTS: cells are kept, curves and rows are what they say, its own target is right."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import numpy
import pytest
import torch

from diffsampler import baselines, targets
from diffsampler.testing import check_target

EXPERIMENTS = Path(__file__).parents[1] / "experiments"


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    import bench_nuts

    return bench_nuts


def call(bench, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["bench_nuts.py", *map(str, arguments)])
    bench.main()


def test_two_rows_make_a_table_and_a_figure(bench, monkeypatch, tmp_path, capsys):
    common = ("--only", "gmm9", "--samplers", "SMC", "ensemble score", "--out", tmp_path, "--sizes", 128)
    call(bench, monkeypatch, *common)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.json")}
    assert {path.name for path in before} == {"gmm9-SMC-1.json", "gmm9-ensemble_score-1.json"}
    text = capsys.readouterr().out
    assert "gmm9" in text and "not run on gmm9: ChEES, NUTS" in text
    assert (tmp_path / "figure.png").stat().st_size > 10_000
    cell = json.loads((tmp_path / "gmm9-SMC-1.json").read_text())
    point = cell["curve"][0]
    assert cell["versions"]["torch"] and cell["settings"]["sizes"] == [128] and cell["seed"] == 1
    # Wide of what SMC does with so few particles; a wrong reference would be off by whole standard deviations.
    assert point["mean"] < 1.0 and point["tv"] < 0.5 and point["log_z"] < 1.0 and point["evaluations"] > 10_000
    call(bench, monkeypatch, *common)
    assert {path: path.stat().st_mtime_ns for path in before} == before, "a finished cell was run again"
    with pytest.raises(SystemExit, match="other settings"):
        call(bench, monkeypatch, "--table", "--out", tmp_path)


def test_curves_of_chains(bench):
    answers = bench.Answers([0], torch.zeros(1).double(), torch.ones(1).double(), math.nan, None, None, True)
    x = torch.ones(2, 100, 3).double()
    curve = bench.chain_curve(answers, x, warm=0.25, evaluations=1000, seconds=4.0)
    assert curve[-1] == pytest.approx({"evaluations": 1000.0, "seconds": 4.0, "mean": 1.0, "sd": 1.0})
    assert curve[0]["evaluations"] == pytest.approx(1000 * (0.25 + 0.75 * 4 / 100))
    import bench_report

    assert bench_report.reached(curve, "seconds") == math.inf
    curve[-1]["mean"] = curve[-2]["mean"] = curve[3]["mean"] = 0.01
    assert bench_report.reached(curve, "seconds") == curve[-2]["seconds"], "the last visit counts, not the first"
    assert bench_report.fitting(curve, "seconds", 3.0)["seconds"] <= 3.0
    assert bench_report.fitting(curve, "seconds", 0.5) == {}


def test_effective_size_from_blocks(bench):
    answers = bench.Answers(list(range(50)), torch.zeros(50), torch.ones(50).double(), math.nan, None, None, True)
    means = torch.randn(16, 50, generator=torch.Generator().manual_seed(0)).double() / 10.0
    # Sixteen blocks of a hundred draws; the median of fifty chi-squares with 15 degrees is good to 10 percent.
    assert bench.spread_ess(answers, means) == pytest.approx(1600.0, rel=0.3)


def test_job_of_the_peers(bench, tmp_path):
    model = bench.MODELS["schools_centered"](tmp_path, None)
    settings = bench.Settings(populations=2, particles=3)
    start = model.starts(64, 0)
    bench.write_job(tmp_path / "job.npz", model, settings, ["BlackJAX SMC"], 1, start)
    with numpy.load(tmp_path / "job.npz") as job:
        assert job["particles"].shape == (2, 3, 10) and str(job["family"]) == "schools" and bool(job["centered"])
        assert job["values"] == pytest.approx(model.target.log_prob(start[:8]).numpy())


def test_absorption_is_the_model():
    target = targets.Absorption()
    x = target.prior.sample(6, generator=torch.Generator().manual_seed(0))
    check_target(target, generator=torch.Generator().manual_seed(1))
    ka, ke, volume, noise = (value.unsqueeze(-1) for value in target.constrain(x).values())
    curve = target.dose * ka / (volume * (ka - ke)) * ((-ke * target.times).exp() - (-ka * target.times).exp())
    assert torch.allclose(target.curve(x), curve)
    likelihood = torch.distributions.Normal(curve, noise).log_prob(target.concentrations).sum(-1)
    assert torch.allclose(target.log_prob(x), target.prior.log_prob(x) + likelihood)
    assert torch.allclose(target.curve(target.flip(x)), curve) and torch.allclose(target.flip(target.flip(x)), x)


def test_absorption_between_equal_rates_and_far_out():
    rows = [[0.3, 0.3, -1.0, 0.0], [8.0, -20.0, -1.0, 0.0], [-20.0, 8.0, -1.0, 0.0]]
    x = torch.tensor(rows, dtype=torch.float64)
    target = targets.Absorption()
    log_prob, score = target.log_prob_and_score(x)
    assert log_prob.isfinite().all() and score.isfinite().all()
    # Where the rates are equal the curve is dose k t exp(-k t) / V.
    rate = math.exp(0.3)
    limit = target.dose * rate * target.times * (-rate * target.times).exp() / math.exp(-1.0)
    assert torch.allclose(target.curve(x[0]), limit, rtol=1e-9)
    with pytest.raises(ValueError, match="Expected times that are not negative; got -1"):
        targets.Absorption([-1.0, 2.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="Expected concentrations of shape"):
        targets.Absorption([1.0, 2.0], [1.0])


def test_absorption_answers_agree_with_smc(bench):
    model = bench.MODELS["absorption"](Path(), None)
    answers = model.answers()
    assert model.pyro is not None
    # Fewer particles lose the smaller mode in most islands, and the error bar with it.
    particles = baselines.SMC(model.target, two_pass=False).sample(8192, seed=0)
    value, error, _ = particles.log_normalizer
    share, share_error = particles.expectation(answers.modes(particles.x)[:, 1].double())
    # Student's t with 15 degrees beyond 5: 2e-4.
    assert abs(value - answers.log_z) < 5.0 * error + 0.01
    assert abs(float(share) - float(answers.weights[1])) < 5.0 * float(share_error) and float(share_error) < 0.05
