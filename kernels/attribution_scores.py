"""(source - base) * grad summed over the columns of each unit, and whether anything differs."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, import-untyped"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from microtome import _native

SIZE = 2048  # elements of a tile
WIDEST = 2048  # columns of a unit in a tile; longer units take several turns


@triton.jit
def _attribution_scores_kernel(
    source, base, grad, scores, changed, cells, units, width, s_stride, b_stride, g_stride,
    BU: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Cells [BU] of (row, unit), neighbours in memory; BC of their columns a turn."""
    cell = tl.program_id(0).to(tl.int64) * BU + tl.arange(0, BU)
    live = cell < cells
    row, first = cell // units, cell % units * width
    total = tl.zeros((BU, BC), tl.float32)
    apart = tl.zeros((BU, BC), tl.int32)
    for start in range(0, width, BC):
        column = start + tl.arange(0, BC)
        mask = live[:, None] & (column < width)[None, :]
        at = first[:, None] + column[None, :]
        s = tl.load(source + row[:, None] * s_stride + at, mask=mask, other=0.0).to(tl.float32)
        b = tl.load(base + row[:, None] * b_stride + at, mask=mask, other=0.0).to(tl.float32)
        g = tl.load(grad + row[:, None] * g_stride + at, mask=mask, other=0.0).to(tl.float32)
        total += tl.where(mask, (s - b) * g, 0.0)
        apart = apart | ((s != b) & mask).to(tl.int32)
    tl.store(scores + cell, tl.sum(total, 1), mask=live)
    tl.store(changed + cell, tl.max(apart, 1) > 0, mask=live)


def tile(cells: int, width: int, interpreted: bool) -> tuple[int, int]:
    """Cells and columns of a tile: 2048 elements, more where a program costs milliseconds."""
    columns = min(triton.next_power_of_2(max(width, 1)), WIDEST)
    room = max((1 << 17 if interpreted else SIZE) // columns, 1)
    return min(triton.next_power_of_2(max(cells, 1)), room), columns


def launch(source: Tensor, base: Tensor, grad: Tensor, units: int) -> tuple[Tensor, Tensor]:
    """`attribution_scores`: a program per block of cells; each tensor is read once.

    The order of a cell's sum depends on its width and, below a tile's worth of cells, on how many
    there are: on a GPU fewer columns then share a thread.
    """
    n, w = source.shape
    scores = torch.empty(n, units, dtype=torch.float32, device=source.device)
    changed = torch.empty(n, units, dtype=torch.bool, device=source.device)
    cells, width = n * units, w // units
    if cells == 0:
        return scores, changed
    source, base, grad = (_native.rows(t) for t in (source, base, grad))
    BU, BC = tile(cells, width, not source.is_cuda)
    with torch.cuda.device_of(source):
        _attribution_scores_kernel[(triton.cdiv(cells, BU),)](
            source, base, grad, scores, changed, cells, units, width,
            source.stride(0), base.stride(0), grad.stride(0), BU=BU, BC=BC, enable_fp_fusion=True,
        )  # fmt: skip
    return scores, changed
