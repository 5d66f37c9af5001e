"""The examples of single methods run from beginning to end, in a small setting, and print what they promise."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "experiments" / "methods"
NAMES = sorted(path.stem for path in EXAMPLES.glob("*.py") if path.stem != "show")
STEPS = {"mixflow": 20, "ensemble_score": 10, "foellmer": 8}
LINES = {"mcd": 2, "adjoint": 2, "underdamped": 3, "conditional": 3}


@pytest.fixture
def load(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))

    def by_name(name):
        spec = importlib.util.spec_from_file_location(f"method_{name}", EXAMPLES / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return by_name


def test_there_is_an_example_of_every_kind():
    assert len(NAMES) == 17
    assert all(len((EXAMPLES / f"{name}.py").read_text().splitlines()) <= 60 for name in NAMES)


def test_no_example_hides_a_module_of_the_standard_library():
    """A script's folder comes first on the path: with a ``dis.py`` in it, importing torch would run the example."""
    for folder in ("experiments", "experiments/methods", "experiments/tutorials"):
        names = {path.stem for path in (Path(__file__).parents[1] / folder).glob("*.py")}
        assert not names & set(sys.stdlib_module_names)


@pytest.mark.parametrize("name", NAMES)
def test_example_runs(name, load, capsys):
    load(name).main(steps=STEPS.get(name, 3), draws=200)
    lines = re.findall(r": .*ELBO gap (\S+), .*ESS/N (\S+), (\S+) CPU s", capsys.readouterr().out)
    assert len(lines) == LINES.get(name, 1)
    for gap, share, _ in lines:
        # A lower bound of few weights may exceed log Z by its own error; nothing here can exceed it by much.
        assert float(gap) > -1.0 and 0.0 < float(share) <= 1.0


def test_the_table_of_methods_goes_on_where_it_was(monkeypatch, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.syspath_prepend(str(EXAMPLES.parent))
    import methods_table

    def call(*more):
        arguments = ["--cpu", "1", "--num-samples", "200", "--only", "gmm9", "--out", str(tmp_path), *more]
        monkeypatch.setattr(sys, "argv", ["methods_table.py", *arguments])
        methods_table.main()

    call("--methods", "dis", "--seeds", "1")
    (before,) = tmp_path.glob("*.json")
    row, stamp = json.loads(before.read_text()), before.stat().st_mtime_ns
    assert row["versions"]["diffsampler"] and row["settings"]["cpu"] == 1.0
    call("--methods", "dis", "--table")
    assert before.stat().st_mtime_ns == stamp and (tmp_path / "table.png").stat().st_size > 10_000

    def diverge(*_):
        raise RuntimeError("Training diverged.")

    monkeypatch.setattr(methods_table, "run", diverge)
    call("--methods", "dis", "cmcd", "--seeds", "1")
    assert "gmm9 cmcd: 1 failed" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="other settings"):
        call("--methods", "dis", "--table", "--num-samples", "100")
