"""Shared by the tests of the integrations."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

# shap compiles its helpers when they are first called, which takes longer than all tests of it.
os.environ.setdefault("NUMBA_DISABLE_JIT", "1")


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Many forwards of a tiny model wait for their threads more than they work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
