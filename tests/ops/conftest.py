"""Tests of the ops build CPU tensors; those of a backend that needs a GPU run on one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext

import pytest

from microtome.testing import interpreted, ops_on


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
