"""The command line: what it prints, what it writes, what it refuses."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import diffsampler as ds
from diffsampler import _demo, _report, targets
from diffsampler.__main__ import main
from diffsampler.particles import Particles
from diffsampler.result import Finding, Fit, load

METHODS = {
    "auto": SimpleNamespace(name="auto", paper="this library", year=None, needs="a gradient"),
    "cmcd": SimpleNamespace(name="cmcd", paper="Vargas et al.", year=2024, needs="a gradient, training"),
    "smc": SimpleNamespace(name="smc", paper="Del Moral et al.", year=2006, needs="a gradient"),
}


def exact_fit(target, *, method="smc", num_samples=500, seed=0, history=(), **_) -> Fit:
    """A fit of exact draws with noisy weights of the right mean, as a sampler would give."""
    generator = torch.Generator().manual_seed(seed)
    n = num_samples
    # PyroTarget has no exact sampler; prior draws have the right shape, which is all that tables need.
    x = (target if target.has_sampler else target.prior).sample(n, generator=generator).double()
    noise = 0.3 * torch.randn(n, generator=generator, dtype=torch.float64) - 0.045
    return Fit(
        particles=Particles(x, (-3.0 if target.log_normalizer is None else target.log_normalizer) + noise),
        posterior=target.constrain(x),
        findings=[Finding("warning", "A warning for the test.", "None needed.")],
        evaluations=12_345,
        seconds=0.5,
        method=str(method),
        history=list(history),
        true_log_normalizer=target.log_normalizer,
    )


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """Replace sampling by exact draws and record how it was called."""
    seen: list[dict] = []

    def sample(target, **settings):
        seen.append(settings)
        training = [{"step": float(i), "loss": 1.0 / i} for i in range(1, 5)]
        history = training if settings.get("method") == "cmcd" else []
        return exact_fit(target, history=history, **settings)

    def budget(**limits):
        return limits

    monkeypatch.setattr(ds, "sample", sample, raising=False)
    monkeypatch.setattr(ds, "Budget", budget, raising=False)
    monkeypatch.setattr(ds, "inference", SimpleNamespace(METHODS=METHODS), raising=False)
    return seen


def test_sample_writes_fit_figures_and_summary(calls, tmp_path: Path, capsys: pytest.CaptureFixture):
    out = tmp_path / "deep" / "out"
    command = ["sample", "--target", "gmm9", "--method", "cmcd", "--seed", "3", "--num-samples", "200"]
    assert main([*command, "--seconds", "5", "--dtype", "float32", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "log Z" in printed
    assert "A warning for the test." in printed
    assert calls == [
        {
            "method": "cmcd",
            "num_samples": 200,
            "seed": 3,
            "progress": False,
            "budget": {"seconds": 5.0, "evaluations": None, "steps": None},
            "dtype": torch.float32,
        }
    ]
    assert {path.name for path in out.iterdir()} == {"fit", "pair.png", "weights.png", "training.png", "summary.json"}
    summary = json.loads((out / "summary.json").read_text())
    assert summary["versions"]["torch"] == torch.__version__
    assert summary["versions"]["diffsampler"] == ds.__version__
    assert summary["settings"]["seed"] == 3
    assert summary["settings"]["seconds"] == 5.0
    assert summary["settings"]["dtype"] == "torch.float32"
    assert summary["log_normalizer"]["exact"] == 0.0
    assert summary["findings"][0]["level"] == "warning"
    assert load(out / "fit").particles.x.shape == (200, 2)


def test_sample_defaults_leave_choices_to_the_library(calls, tmp_path: Path):
    assert main(["sample", "--target", "funnel", "--out", str(tmp_path)]) == 0
    assert calls == [{"method": "auto", "num_samples": 4000, "seed": 0, "progress": False}]
    assert not (tmp_path / "training.png").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target", "funel"], "Expected the name of a target; got 'funel'. Did you mean 'funnel'?"),
        (["--target", "manywell23"], "Did you mean 'manywell32'?"),
        (["--target", "zzz"], "Known: gaussian, "),
        (["--target", "funnel", "--method", "cmdc"], "Expected the name of a method; got 'cmdc'. Did you mean 'cmcd'?"),
    ],
)
def test_unknown_names_suggest_the_nearest(calls, capsys: pytest.CaptureFixture, arguments, message):
    assert main(["sample", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert calls == []


@pytest.mark.parametrize("option", [["--seconds", "0"], ["--steps", "-3"], ["--num-samples", "0"]])
def test_budgets_must_be_positive(calls, capsys: pytest.CaptureFixture, option):
    with pytest.raises(SystemExit):
        main(["sample", "--target", "funnel", *option])
    assert "Expected a positive number" in capsys.readouterr().err


def test_refusals_of_the_library_are_messages(monkeypatch: pytest.MonkeyPatch, calls, capsys: pytest.CaptureFixture):
    def refuse(target, **_):
        raise ValueError("Expected a finite density; got NaN.")

    monkeypatch.setattr(ds, "sample", refuse)
    assert main(["sample", "--target", "funnel"]) == 2
    assert capsys.readouterr().err == "diffsampler: Expected a finite density; got NaN.\n"


def test_targets_lists_every_target_with_its_constants(capsys: pytest.CaptureFixture):
    assert main(["targets"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[2:]] == list(targets.REGISTRY)
    (row,) = (line.split() for line in lines if line.startswith("manywell32"))
    assert row[1:3] == ["32", "164.695675"]


def test_methods_lists_paper_and_year(calls, capsys: pytest.CaptureFixture):
    assert main(["methods"]) == 0
    printed = capsys.readouterr().out
    assert "Vargas et al." in printed
    assert "2024" in printed


def test_no_command_is_an_error(capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit):
        main([])
    assert "sample,targets,methods,demo" in capsys.readouterr().err


def test_table_aligns_numbers_right_and_words_left():
    printed = _report.table(("name", "value"), [("a", "1.5"), ("bbb", "-"), ("cc", "-12.25")])
    assert printed.splitlines() == ["name   value", "----  ------", "a        1.5", "bbb        -", "cc    -12.25"]


def test_json_is_strict(tmp_path: Path):
    _report.write_json(tmp_path / "a" / "x.json", {"nan": math.nan, "inf": -math.inf, "list": (1, 2.5, None)})
    assert json.loads((tmp_path / "a" / "x.json").read_text()) == {"nan": None, "inf": None, "list": [1, 2.5, None]}


def test_demo_runs_every_cell_and_writes_table_and_figures(calls, monkeypatch, tmp_path: Path, capsys):
    monkeypatch.setattr(_demo.baselines, "PyroNUTS", lambda target, **_: "nuts", raising=False)
    cells = [_demo.Cell(cell.problem, cell.method, 1.0, num_samples=200) for cell in _demo.CELLS]
    assert _demo.run(tmp_path, seed=0, cells=cells) == 0
    printed = capsys.readouterr().out
    for cell in cells:
        assert any(line.startswith(cell.problem.name) and f" {cell.method} " in line for line in printed.splitlines())
    assert "galaxies, K = 3: posterior mean (sd)" in printed
    assert "log tau" in printed
    results = json.loads((tmp_path / "results.json").read_text())
    assert len(results["results"]) == len(cells)
    assert results["versions"]["torch"] == torch.__version__
    forty = next(r for r in results["results"] if r["problem"] == "40-mode mixture")
    assert forty["num_modes"] == 40
    assert abs(forty["error"]) < 0.2
    figures = {path.name for path in tmp_path.glob("*.png")}
    assert {"log_normalizer.png", "eight_schools.png", "galaxies_k3.png", "40-mode_mixture_auto.png"} <= figures


def test_demo_reports_a_failing_cell_and_goes_on(monkeypatch, tmp_path: Path, capsys):
    def sample(target, *, method, **settings):
        if method == "cmcd":
            raise RuntimeError("the network exploded")
        return exact_fit(target, method=method, num_samples=settings["num_samples"])

    monkeypatch.setattr(ds, "sample", sample, raising=False)
    monkeypatch.setattr(ds, "Budget", lambda **_: None, raising=False)
    cells = [_demo.Cell(_demo.BENCHMARKS[1], method, 1.0, num_samples=100) for method in ("cmcd", "smc")]
    assert _demo.run(tmp_path, cells=cells) == 1
    printed = capsys.readouterr().out
    assert "funnel-10 by cmcd: failed: RuntimeError: the network exploded" in printed
    results = json.loads((tmp_path / "results.json").read_text())["results"]
    assert results[0]["failure"] and results[1]["failure"] is None


def test_demo_states_no_numbers_for_particles_that_do_not_represent_the_target(monkeypatch, tmp_path: Path, capsys):
    def sample(target, *, method, **settings):
        fit = exact_fit(target, method=method, num_samples=settings["num_samples"])
        return dataclasses.replace(fit, findings=[Finding("error", "The budget ended at temperature 0.", "Raise it.")])

    monkeypatch.setattr(ds, "sample", sample, raising=False)
    assert _demo.run(tmp_path, cells=[_demo.Cell(_demo.BENCHMARKS[0], "smc", 1.0, num_samples=100)]) == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("40-mode mixture  smc"))
    log_z, std_error, error, ess, num_particles, *_, verdict = row.removeprefix("40-mode mixture  smc").split()
    assert (log_z, std_error, error, ess, num_particles, verdict) == ("-", "-", "-", "-", "100", "error")


def test_sample_runs_for_real(tmp_path: Path, capsys):
    command = ["sample", "--target", "gaussian", "--method", "smc", "--num-samples", "500", "--out", str(tmp_path)]
    assert main(command) == 0
    assert "log Z" in capsys.readouterr().out
    summary = json.loads((tmp_path / "summary.json").read_text())
    estimate = summary["log_normalizer"]
    # Six standard errors and a floor: a false alarm once in 10^8 seeds, and the seed is fixed.
    assert abs(estimate["value"] - estimate["exact"]) < 6 * estimate["std_error"] + 0.05
    # Negative control: the same bound refuses an answer that is off by one.
    assert 6 * estimate["std_error"] + 0.05 < 1.0


def test_demo_counts_modes_and_their_weights():
    # Draws of one label only: one of six modes, total variation 5/6.
    draws = {"mean": torch.tensor([[10.0, 20.0, 30.0]]).repeat(50, 1) + torch.rand(50, 3, generator=torch.Generator())}
    fit = Fit(Particles(torch.zeros(50, 8), torch.zeros(50, dtype=torch.float64)), draws, [], 0, 0.0, "test")
    result = _demo.Result("galaxies", "test", 0.0)
    _demo._count_modes(result, _demo.GALAXIES, SimpleNamespace(num_modes=None), fit)
    assert (result.modes_found, result.num_modes) == (1, 6)
    assert result.mode_total_variation == pytest.approx(5 / 6)


def test_demo_budget_stays_at_four_minutes():
    # What has no budget takes two minutes; SMC takes a third of its budget.
    assert sum(120.0 if cell.seconds is None else cell.seconds for cell in _demo.CELLS) <= 255
