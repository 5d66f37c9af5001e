"""The examples of the README run as they are, in order, in one namespace."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import pytest

README = Path(__file__).parents[1] / "README.md"


def blocks(text: str) -> list[str]:
    """Python blocks, each preceded by empty lines so that line numbers are those of the file."""
    found = re.finditer(r"^```python\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    return ["\n" * text.count("\n", 0, match.start(1)) + match.group(1) for match in found]


def test_blocks_are_found():
    assert blocks("a\n```python\nx = 1\n```\n```sh\nmake\n```\n```python\ny = 2\n```\n") == [
        "\n\nx = 1\n",
        "\n" * 8 + "y = 2\n",
    ]


@pytest.mark.skipif(not README.exists(), reason="no README outside the repository")
def test_examples_run(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # The pilot alone meets what the examples assert; training at full length belongs to the benchmarks.
    refine = importlib.import_module("diffsampler.refinement.stages")
    monkeypatch.setattr(refine, "BRIDGE_COUNT", 40)
    monkeypatch.setattr(refine, "POLISH_COUNT", 20)
    examples = blocks(README.read_text())
    assert examples, "the README has no example"
    # What a module would have: torch and Pyro look up the names of functions in it.
    space: dict[str, Any] = {"__name__": "readme"}
    for source in examples:
        exec(compile(source, str(README), "exec"), space)
