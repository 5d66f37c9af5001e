"""Tables of the experiments: finished runs are kept, settings are not mixed, errors and coverage are what they say."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from diffsampler import targets

EXPERIMENTS = Path(__file__).parents[1] / "experiments"


@pytest.fixture
def auto_table(monkeypatch):
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    import auto_table

    return auto_table


def call(auto_table, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["auto_table.py", *map(str, arguments)])
    auto_table.main()


def test_tables_go_on_where_they_were(auto_table, monkeypatch, tmp_path: Path, capsys):
    pytest.importorskip("matplotlib")
    only = ("--only", "flat", "cone", "--out", tmp_path)
    call(auto_table, monkeypatch, *only, "--seeds", 1)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.json")}
    assert {path.name for path in before} == {"flat-0.json", "cone-0.json"}
    assert "flat" in (tmp_path / "table.txt").read_text()
    assert (tmp_path / "table.png").stat().st_size > 10_000
    call(auto_table, monkeypatch, *only, "--seeds", 2)
    assert {path: path.stat().st_mtime_ns for path in before} == before, "a finished run was made again"
    assert len(list(tmp_path.glob("*.json"))) == 4
    assert "2/2" in capsys.readouterr().out, "not all runs on improper densities were caught"
    row = json.loads((tmp_path / "flat-0.json").read_text())
    assert row["versions"]["diffsampler"] and row["settings"]["num_samples"] == 4000 and "improper" in row["refused"]
    with pytest.raises(SystemExit, match="other settings"):
        call(auto_table, monkeypatch, *only, "--seeds", 1, "--num-samples", 100)


def make_row(*, value=1.0, std_error=0.1, replicates=1, findings=()):
    return {
        "refused": None,
        "exact": 0.8,
        "log_normalizer": [value, std_error, "importance"],
        "replicates": replicates,
        "findings": list(findings),
        "method": "auto (learned)",
        "measures": {"TV": value, "neck sd ratio": 0.9 if value > 1.0 else 1.05},
        "cpu": 2.0,
        "evaluations": 3_000_000,
    }


def test_rows_are_summarised(auto_table):
    assert auto_table.score(make_row()) == pytest.approx(2.0)
    assert not auto_table.covered(make_row())
    assert auto_table.covered(make_row(replicates=16)), "the interval of 16 islands is Student's"
    rows = [make_row(), make_row(value=1.1, findings=["WARNING: x"])]
    line = dict(zip((*auto_table.HEADER, "flagged"), auto_table.summary("case", rows), strict=True))
    assert line["abs error"] == "0.2500" and line["worst"] == "0.3000" and line["flagged"] == "1/2"
    assert line["checks, worst"] == "TV 1.1, neck sd ratio 0.9"


def test_all_registered_targets_are_in_the_table(auto_table):
    assert set(targets.REGISTRY) <= set(auto_table.CASES)
