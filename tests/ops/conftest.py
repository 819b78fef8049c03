"""Tests of the ops build CPU tensors; those of a backend that needs a GPU run on one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
from torch import Tensor

from microtome.testing import interpreted, ops_on

READS = ("tolist", "item", "__bool__", "__int__", "__float__", "nonzero")


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every way in which the host of this test asks a tensor for its numbers."""
    seen: list[str] = []
    for name in READS:
        usual = getattr(Tensor, name)

        def read(t: Tensor, *a: Any, _usual: Any = usual, _name: str = name, **k: Any) -> Any:
            seen.append(_name)
            return _usual(t, *a, **k)

        monkeypatch.setattr(Tensor, name, read)
    return seen


@pytest.fixture(autouse=True)
def _on_the_device_of_the_backend(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    callspec = getattr(request.node, "callspec", None)
    backend = callspec.params.get("backend") if callspec else None
    if backend == "cuda" and interpreted(backend):
        monkeypatch.setenv("MICROTOME_EMULATE_CUDA", "1")
    on_gpu = backend in ("cuda", "triton") and not interpreted(backend)
    with ops_on("cuda") if on_gpu else nullcontext():
        yield
