"""Files that are either there, whole, or as they were before."""

from __future__ import annotations

import io
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

__all__ = ["save_atomic"]


def save_atomic(path: str | Path, content: Mapping[str, Any]) -> None:
    """``torch.save`` to ``path`` through a temporary file in the same folder, synced and renamed.

    A kill or a full disk at any moment leaves the previous file as it was.

    Raises:
        OSError: If the folder cannot be made or the disk is full.
    """
    # Serialized in memory first: torch's own writer turns a full disk into a RuntimeError about file positions.
    buffer = io.BytesIO()
    torch.save(dict(content), buffer)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(buffer.getbuffer())
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
