"""The accuracy rule: at most twice plain PyTorch's error against float64, at the same dtype."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

from microtome import _native
from microtome.ops import _registry
from microtome.testing import cuda, triton

_LUCK = 32  # entries


def interpreted(backend: str) -> bool:
    """Whether a GPU backend's kernels run on the CPU: in Triton's interpreter, or emulated."""
    return {"triton": triton.INTERPRETED, "cuda": cuda.EMULATED}.get(backend, False)


def skip_if_interpreted(backend: str, why: str) -> None:
    """Skip the rest of a test in Triton's interpreter; `why` says how it differs from a GPU."""
    if backend == "triton" and interpreted(backend):
        pytest.skip(f"triton's interpreter {why}")


def factor_of(backend: str, exact: Tensor) -> float:
    """The factor of `assert_accurate`: 2, and 4 on a GPU for at most 32 entries.

    Over so few it is luck how far plain PyTorch is off: it may happen to round exactly.
    """
    return 4.0 if backend in ("triton", "cuda") and exact.numel() <= _LUCK else 2.0


def max_error(got: Tensor, exact: Tensor) -> float:
    """Largest absolute difference, in float64; NaN counts as infinite."""
    if exact.numel() == 0:
        return 0.0
    difference = (got.double() - exact.double()).abs().nan_to_num(nan=float("inf"))
    return float(difference.max())


def assert_accurate(
    got: Tensor, plain: Tensor, exact: Tensor, what: str = "output", factor: float = 2.0
) -> None:
    """Assert that `got` is at most `factor` times as far from `exact` as `plain` is.

    Args:
        got: the backend's answer.
        plain: the same by plain PyTorch at got's dtype.
        exact: the same in float64.
        what: name for the message.
        factor: 2 unless a test says why not.
    """
    assert got.shape == exact.shape, (
        f"{what}: shape {list(got.shape)}, expected {list(exact.shape)}"
    )
    assert got.dtype == plain.dtype, f"{what}: dtype {got.dtype}, expected {plain.dtype}"
    # One ulp of the largest entry: plain PyTorch is now and then exact where no rounding was
    # needed.
    floor = torch.finfo(got.dtype).eps * float(exact.abs().max()) if exact.numel() else 0.0
    error, allowed = max_error(got, exact), factor * max_error(plain, exact) + floor
    assert error <= allowed, (
        f"{what}: error {error:.3e} against float64, plain PyTorch allows {allowed:.3e}"
    )


def backends_of(op: _registry.Op) -> list[object]:
    """Pytest parameters: every backend of an op, those absent here skipped with the reason.

    A backend that MICROTOME_REQUIRE names is never skipped: its absence is a failure.
    """
    required = os.environ.get("MICROTOME_REQUIRE", "").split(",")
    parameters: list[object] = []
    for backend in op.backends:
        reason = _registry.unavailable(backend.name)
        if backend.name == "cuda" and cuda.EMULATED:
            reason = None
        by_triton = "triton" in (backend.name, *backend.calls)
        here = not by_triton or triton.RUNS
        if by_triton and not reason:
            reason = _registry.unavailable("triton")
        marks = [pytest.mark.triton, triton.SILENT] if by_triton else []
        if reason and (backend.name not in required or not here):
            marks.append(pytest.mark.skip(reason=f"{backend.name}: {reason}"))
        parameters.append(pytest.param(backend.name, marks=marks, id=backend.name))
    return parameters


def has_level(level: str) -> bool:
    """Whether the extension is there and this processor has an instruction-set level.

    Level amx counts where the extension emulates it.
    """
    return _native.why_absent() is None and _native.module().isa_level(level) == level


def level_parameters(*levels: str) -> list[object]:
    """Pytest parameters: the levels named, or all of them; those absent here are skipped."""
    return [
        pytest.param(
            level,
            marks=[]
            if has_level(level)
            else pytest.mark.skip(reason=f"this processor has no {level}"),
            id=level,
        )
        for level in levels or _native.LEVELS
    ]
