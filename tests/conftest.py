"""What tests of several folders share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from microtome import _pending
from microtome.testing.paper import PaperGpu


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[PaperGpu]:
    """A GPU of paper: checks of CPU tensors come as late as a device's, when the test says so."""
    monkeypatch.delenv("MICROTOME_SYNC_CHECKS", raising=False)
    paper = PaperGpu()
    monkeypatch.setattr(_pending, "gpu", paper)
    yield paper
    _pending._waiting.clear()
