"""x * softmax(x) over rows, and its gradient: a row stays in registers while it fits them."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, import-untyped"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

WIDEST = 16384  # columns of a tile; wider rows take several turns
SIZE = 2048  # elements of a tile of several rows


@triton.jit
def _softmax_of(x, row, live, d, BR: tl.constexpr, BD: tl.constexpr):
    """The largest entry of rows [BR] and the sum of exp(x - it), kept by column until the end."""
    best = tl.full((BR, BD), float("-inf"), tl.float32)
    total = tl.zeros((BR, BD), tl.float32)
    for start in range(0, d, BD):
        column = start + tl.arange(0, BD)
        mask = live[:, None] & (column < d)[None, :]
        v = tl.load(x + row[:, None] * d + column[None, :], mask=mask, other=float("-inf"))
        v = v.to(tl.float32)
        higher = tl.maximum(best, v)
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp(best - shift) + tl.exp(v - shift)
        # A NaN that the maximum passes over must still reach the sum.
        total = tl.where(v != v, v, total)
        best = higher
    most = tl.max(best, 1)
    shift = tl.where(most == float("-inf"), 0.0, most)
    return most, tl.sum(total * tl.exp(best - shift[:, None]), 1)


@triton.jit
def _solu_kernel(x, out, rows, d, BR: tl.constexpr, BD: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    live = row < rows
    most, total = _softmax_of(x, row, live, d, BR, BD)
    for start in range(0, d, BD):
        column = start + tl.arange(0, BD)
        mask = live[:, None] & (column < d)[None, :]
        at = row[:, None] * d + column[None, :]
        v = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
        share = tl.exp(v - most[:, None]) / total[:, None]
        tl.store(out + at, (v * share).to(out.dtype.element_ty), mask=mask)


@triton.jit
def _solu_grad_x_kernel(grad_out, x, out, rows, d, BR: tl.constexpr, BD: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    live = row < rows
    most, total = _softmax_of(x, row, live, d, BR, BD)
    along = tl.zeros((BR, BD), tl.float32)
    for start in range(0, d, BD):
        column = start + tl.arange(0, BD)
        mask = live[:, None] & (column < d)[None, :]
        at = row[:, None] * d + column[None, :]
        v = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
        g = tl.load(grad_out + at, mask=mask, other=0.0).to(tl.float32)
        share = tl.exp(v - most[:, None]) / total[:, None]
        along += tl.where(mask, g * v * share, 0.0)
    inner = tl.sum(along, 1)[:, None]
    for start in range(0, d, BD):
        column = start + tl.arange(0, BD)
        mask = live[:, None] & (column < d)[None, :]
        at = row[:, None] * d + column[None, :]
        v = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
        g = tl.load(grad_out + at, mask=mask, other=0.0).to(tl.float32)
        share = tl.exp(v - most[:, None]) / total[:, None]
        tl.store(out + at, (share * (g + g * v - inner)).to(out.dtype.element_ty), mask=mask)


def geometry(rows: int, d: int, interpreted: bool) -> tuple[int, int, int]:
    """Rows and columns of a tile, and warps: 16 to 32 elements a thread."""
    BD = min(triton.next_power_of_2(max(d, 16)), WIDEST)
    BR = min(triton.next_power_of_2(max(rows, 1)), max((1 << 17 if interpreted else SIZE) // BD, 1))
    return BR, BD, min(max(BR * BD // 512, 1), 16)


def _run(kernel, tensors: tuple[Tensor, ...]) -> Tensor:
    x = tensors[-1]
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    d = x.shape[-1]
    rows = x.numel() // d
    BR, BD, warps = geometry(rows, d, not x.is_cuda)
    with torch.cuda.device_of(x):
        kernel[(triton.cdiv(rows, BR),)](
            *(t.contiguous() for t in tensors), out, rows, d, BR=BR, BD=BD, num_warps=warps,
            enable_fp_fusion=True,
        )  # fmt: skip
    return out


def launch(x: Tensor) -> Tensor:
    """`solu`: a program per block of rows; what it reads a second time lies in L1 or L2."""
    return _run(_solu_kernel, (x,))


def launch_grad_x(grad_out: Tensor, x: Tensor) -> Tensor:
    """`solu_grad_x`, likewise."""
    return _run(_solu_grad_x_kernel, (grad_out, x))
