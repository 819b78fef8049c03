"""Copy the tokens of patched runs out of a base run and change them by a table, in one pass.

The table is sorted stably by token, so a program applies its tokens' entries in the table's order.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, import-untyped"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from microtome.kernels.segments import tile
from torch import Tensor

WIDEST, SIZE = 256, 1024  # columns and numbers of a tile


@triton.jit
def _patch_rows_kernel(
    base, sources, rows, at, token_row, table, order, offsets, factors, out, n, T, w,
    base_example, base_token, source_row,
    NARROW: tl.constexpr, BT: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    column = (tl.program_id(1) * BW + tl.arange(0, BW))[None, :]
    live = token < T
    row = tl.load(token_row + token, mask=live, other=n)
    known = row < n  # NaN where T turned out to be more tokens than the rows have
    example = tl.load(rows + row * 3, mask=known, other=0).to(tl.int64)
    start = tl.load(rows + row * 3 + 1, mask=known, other=0)
    position = start + token - tl.load(at + row, mask=known, other=0)
    place = example * base_example + position * base_token
    mask = known[:, None] & (column < w)
    value = tl.load(base + place[:, None] + column, mask=mask, other=float("nan"))  # [BT, BW]
    entry = tl.load(offsets + token, mask=live, other=0)
    end = tl.load(offsets + token + 1, mask=live, other=0)
    for _ in range(0, tl.max(end - entry, 0)):
        more = entry < end
        e = tl.load(order + entry, mask=more, other=0)
        lo = tl.load(table + e * 6 + 2, mask=more, other=0)[:, None]
        hi = tl.load(table + e * 6 + 3, mask=more, other=0)[:, None]
        source = tl.load(table + e * 6 + 4, mask=more, other=0).to(tl.int64)[:, None]
        op = tl.load(table + e * 6 + 5, mask=more, other=0)[:, None]
        factor = tl.load(factors + e, mask=more, other=0.0)[:, None]
        inside = (column >= lo) & (column < hi)
        src = tl.load(
            sources + source * source_row + (column - lo if NARROW else column),
            mask=inside & (op < 2), other=0.0,
        )  # fmt: skip
        product = factor * src
        # REPLACE, ADD, ZERO, SCALE = 0, 1, 2, 3
        new = tl.where(op == 0, product, value + product)
        new = tl.where(op == 2, 0.0, tl.where(op == 3, value * factor, new))
        value = tl.where(inside, new, value)
        entry += 1
    tl.store(out + token[:, None] * w + column, value, mask=live[:, None] & (column < w))


def launch(
    base: Tensor, sources: Tensor, rows: Tensor, table: Tensor, factors: Tensor, total: int
) -> Tensor:
    """`patch_rows`: a program per block of tokens and of columns.

    No product is fused into a sum, so the bits are those of every other backend. Nothing is read
    back to the host. Rows and entries lie within their tensors, but `total` need not be the sum.
    """
    w, n = base.shape[2], rows.shape[0]
    out = torch.empty(total, w, dtype=base.dtype, device=base.device)
    if out.numel() == 0:
        return out
    base, sources = columns(base), columns(sources)
    start, count = rows[:, 1].long(), (rows[:, 2] - rows[:, 1]).long()
    ends = count.cumsum(0)
    at = ends - count  # [n], the first token of each row
    numbers = torch.arange(total + 1, device=base.device)
    token_row = torch.searchsorted(ends, numbers[:total], right=True)
    row, position = table[:, 0].long(), table[:, 1]
    token, order = ((at - start)[row] + position).sort(stable=True)  # each [m]
    offsets = torch.searchsorted(token, numbers)
    BT, BW = tile(total, w, not base.is_cuda, WIDEST, SIZE)
    with torch.cuda.device_of(base):
        _patch_rows_kernel[(triton.cdiv(total, BT), triton.cdiv(w, BW))](
            base, sources, rows.int().contiguous(), at, token_row, table.int().contiguous(), order,
            offsets, factors.contiguous(), out, n, total, w, base.stride(0), base.stride(1),
            sources.stride(0), NARROW=sources.shape[1] != w, BT=BT, BW=BW, enable_fp_fusion=False,
        )  # fmt: skip
    return out


def columns(x: Tensor) -> Tensor:
    """x itself where its columns lie side by side, else a copy of which that is so."""
    return x if x.stride(-1) == 1 else x.contiguous()
