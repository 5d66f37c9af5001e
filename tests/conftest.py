"""What holds for every test: reproducible property tests, figures without a display, no leaked global state."""

from __future__ import annotations

import os
from collections.abc import Iterator

import hypothesis
import pytest
import torch

os.environ.setdefault("MPLBACKEND", "Agg")

# A shared machine makes wall-clock deadlines of single examples meaningless; pytest-timeout guards the whole test.
hypothesis.settings.register_profile("library", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("library")


def _global_state() -> tuple[object, ...]:
    return torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled(), torch.get_default_device()


@pytest.fixture(autouse=True)
def no_global_torch_state() -> Iterator[None]:
    """Fail a test that leaves torch's global settings changed."""
    before = _global_state()
    yield
    assert _global_state() == before, f"the test changed torch's global state from {before} to {_global_state()}"


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)
