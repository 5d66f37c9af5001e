"""The tutorials run from beginning to end, in a small setting, and draw what they promise."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

TUTORIALS = Path(__file__).parents[1] / "experiments" / "tutorials"
SAID = {
    "wrong_nuts": "mean frequency of each chain of NUTS",
    "evidence": "log Bayes factor",
    "funnel": "P(tau < 1) by ds.sample",
    "own_density": "refused: Expected log_prob to return shape (16,); got (16, 2)",
    "diagnostics": "Chains disagree",
}


def load(name):
    spec = importlib.util.spec_from_file_location(f"tutorial_{name}", TUTORIALS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_tutorial_is_run():
    assert {path.stem for path in TUTORIALS.glob("*.py")} == set(SAID)


@pytest.mark.parametrize("name", SAID)
def test_tutorial_runs(name, tmp_path, capsys):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    load(name).main(tmp_path, quick=True)
    pyplot.close("all")
    assert SAID[name] in capsys.readouterr().out
    assert (tmp_path / f"{name}.png").stat().st_size > 30_000
