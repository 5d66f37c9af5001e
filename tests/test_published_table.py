"""The published tables' cases, tried out with a hundredth of their training."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")
EXPERIMENTS = Path(__file__).parents[1] / "experiments"


@pytest.fixture
def cases(monkeypatch):
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    import published_cases

    return published_cases


@pytest.fixture
def call(cases, monkeypatch, tmp_path, capsys):
    import published_table

    def run(*more):
        arguments = ["--share", "0.01", "--draws", "200", "--out", str(tmp_path), *more]
        monkeypatch.setattr(sys, "argv", ["published_table.py", *arguments])
        published_table.main()
        return capsys.readouterr().out

    return run


def test_table_goes_on_where_it_was(call, tmp_path):
    names = ("mw54-dis", "brownian-cmcd64", "brownian-cmcd128", "gmm25-best")
    call("--seeds", "1", "--only", *names)
    rows = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    assert set(rows) == {f"{name}-0" for name in names}
    coarse, fine = rows["brownian-cmcd64-0"], rows["brownian-cmcd128-0"]
    # The finer chain goes on from the coarser one, whose training is counted once more.
    assert fine["notes"]["steps"][:2] == coarse["notes"]["steps"] and fine["cpu"] > coarse["cpu"]
    assert rows["gmm25-best-0"]["recipe"]["recipe"] == "Best" and rows["mw54-dis-0"]["versions"]["diffsampler"]
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.json")}
    text = call("--table")
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.json")} == stamps
    assert (tmp_path / "table.png").stat().st_size > 10_000 and "short: " in text and "TV of exact draws" in text
    with pytest.raises(SystemExit, match="other settings"):
        call("--table", "--draws", "100")


def test_verdict_is_about_means_over_seeds(cases, monkeypatch):
    import published_table

    def row(gap, error):
        return {
            "exact": 0.0,
            "elbo": -gap,
            "log_normalizer": [error, 0.1],
            "ess_fraction": 0.9,
            "measures": {"TV": gap},
        }

    case = cases.Case(cases.targets.ManyWell, cases.Best(), cases.Wanted(0.2, 0.1, 0.5, {"TV": (0.0, 0.18)}))
    assert published_table.shortfalls(case, [row(0.1, 0.05), row(0.2, -0.05)]) == []
    # Errors of both signs do not cancel.
    assert published_table.shortfalls(case, [row(0.1, 0.3), row(0.1, -0.3)]) == ["error"]
    assert published_table.shortfalls(case, [row(0.1, 0.0), row(0.4, 0.0)]) == ["gap", "TV"]


def test_missing_data_are_named(cases, monkeypatch, tmp_path):
    monkeypatch.setattr(cases, "DATA", tmp_path)
    with pytest.raises(SystemExit, match="heron.csv is missing"):
        cases.posterior("heron", 0.0)()
