"""What the command line prints and writes: aligned tables and JSON with versions."""

from __future__ import annotations

import importlib.metadata
import json
import math
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["number", "table", "versions", "write_json"]


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Plain text with aligned columns: numbers to the right, words to the left.

    Arguments:
        header: Column names.
        rows: Cells, each row as long as the header.
    """
    columns = list(zip(header, *rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    right = [bool(rows) and all(_is_number(cell) for cell in column[1:]) for column in columns]
    lines = [
        "  ".join(cell.rjust(w) if r else cell.ljust(w) for cell, w, r in zip(row, widths, right, strict=True)).rstrip()
        for row in (header, ["-" * w for w in widths], *rows)
    ]
    return "\n".join(lines)


def _is_number(cell: str) -> bool:
    return cell in ("-", "") or cell.lstrip("+-.").replace("inf", "0").replace("nan", "0")[:1].isdigit()


def number(value: float | None, form: str = ".3f") -> str:
    """A number for a table; ``-`` where there is none."""
    return "-" if value is None or math.isnan(value) else format(value, form)


def versions() -> dict[str, str]:
    """Versions that a result depends on."""
    import torch

    import diffsampler

    return {
        "diffsampler": diffsampler.__version__,
        "torch": torch.__version__,
        "pyro": importlib.metadata.version("pyro-ppl"),
        "python": platform.python_version(),
    }


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write strict JSON: numbers that JSON does not know become null."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(_plain(content), indent=2, allow_nan=False) + "\n")


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, str | int | bool) or value is None else str(value)
