"""`sparse_decode` of codes with any number of entries a row: segments by row, gradients by latent.

A row is a segment of entries whose sources are decoder rows; a latent is one whose sources are rows
of the gradient. Both are summed in chunks that the offsets alone decide, so a row or a latent with
thousands of entries holds up no program, and no sum depends on another. No atomics.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, import-untyped"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from microtome.kernels.segments import (
    CHUNK,
    Segments,
    add_entries,
    add_partials,
    partial_sums,
    sort_by_latent,
    tile,
)
from torch import Tensor

from microtome._csr import rows_of

WIDEST = 1024  # columns of a gathered tile
SIZE = 1024  # elements of a tile


@triton.jit
def _sum_kernel(
    weight, source, offsets, partial, table, bias, out, m, n, d,
    HAS_BIAS: tl.constexpr, CHUNK: tl.constexpr, BL: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """out[s] = bias + sum of weight[e] table[source[e]] over the entries of the m segments."""
    segment = tl.program_id(0).to(tl.int64) * BL + tl.arange(0, BL)
    column = tl.program_id(1) * BD + tl.arange(0, BD)
    live = segment < m
    begin = tl.load(offsets + segment, mask=live, other=0)
    end = tl.load(offsets + segment + 1, mask=live, other=0)
    acc = tl.zeros((BL, BD), tl.float32)
    acc, begin = add_partials(acc, partial, begin, end, column, d, CHUNK)
    acc = add_entries(acc, weight, source, table, table, begin, end, column, n, d)
    if HAS_BIAS:
        acc += tl.load(bias + column, mask=column < d, other=0.0).to(tl.float32)[None, :]
    mask = live[:, None] & (column < d)[None, :]
    tl.store(out + segment[:, None] * d + column[None, :], acc.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _dot_kernel(
    grad_out, rows, indices, offsets, W_dec, out, entries, n, d,
    BE: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """out[e] = <grad_out[rows[e]], W_dec[indices[e]]>; 0 from the last offset on."""
    entry = tl.program_id(0).to(tl.int64) * BE + tl.arange(0, BE)
    live = (entry < entries) & (entry < tl.load(offsets + n))
    row = tl.load(rows + entry, mask=live, other=0).to(tl.int64)
    feature = tl.load(indices + entry, mask=live, other=0).to(tl.int64)
    acc = tl.zeros((BE, BD), tl.float32)
    for start in range(0, d, BD):
        column = (start + tl.arange(0, BD))[None, :]
        mask = live[:, None] & (column < d)
        g = tl.load(grad_out + row[:, None] * d + column, mask=mask, other=0.0).to(tl.float32)
        w = tl.load(W_dec + feature[:, None] * d + column, mask=mask, other=0.0).to(tl.float32)
        acc += g * w
    tl.store(out + entry, tl.sum(acc, 1).to(out.dtype.element_ty), mask=entry < entries)


def _sums(
    segments: Segments, weight: Tensor, source: Tensor, table: Tensor, bias: Tensor | None,
    out: Tensor,
) -> Tensor:  # fmt: skip
    """Sum weight times rows of `table` over each segment into `out`."""
    (m, d), n = out.shape, table.shape[0]
    table, source = table.contiguous(), source.contiguous()
    BL, BD = tile(m, d, not out.is_cuda, WIDEST, SIZE)
    with torch.cuda.device_of(out):
        partial = partial_sums(segments, weight, source, table, table)
        _sum_kernel[(triton.cdiv(m, BL), triton.cdiv(d, BD))](
            weight, source, segments.offsets, partial, table,
            table if bias is None else bias.contiguous(), out, m, n, d,
            HAS_BIAS=bias is not None, CHUNK=CHUNK, BL=BL, BD=BD, enable_fp_fusion=True,
        )  # fmt: skip
    return out


def launch(
    values: Tensor, indices: Tensor, offsets: Tensor, W_dec: Tensor, b_dec: Tensor | None
) -> Tensor:
    """`sparse_decode_csr`: a program per block of rows and of columns, long rows in chunks."""
    n, d = offsets.numel() - 1, W_dec.shape[1]
    out = torch.empty(n, d, dtype=values.dtype, device=values.device)
    if out.numel() == 0:
        return out
    rows = rows_of(offsets, values.numel())
    # The op does not read offsets back from a GPU to check them.
    bounds = offsets.long().clamp(0, values.numel())
    segments = Segments(rows, rows.int(), bounds)
    return _sums(segments, values.contiguous().float(), indices.int(), W_dec, b_dec, out)


def launch_grad_values(grad_out: Tensor, indices: Tensor, offsets: Tensor, W_dec: Tensor) -> Tensor:
    """`sparse_decode_csr_grad_values`: a program per block of entries."""
    m, (n, d) = indices.numel(), grad_out.shape
    out = torch.empty(m, dtype=grad_out.dtype, device=grad_out.device)
    if m == 0:
        return out
    BE, BD = tile(m, d, not grad_out.is_cuda, WIDEST)
    with torch.cuda.device_of(grad_out):
        _dot_kernel[(triton.cdiv(m, BE),)](
            grad_out.contiguous(), rows_of(offsets, m).int(), indices.int().contiguous(),
            offsets.long().contiguous(), W_dec.contiguous(), out, m, n, d,
            BE=BE, BD=BD, enable_fp_fusion=True,
        )  # fmt: skip
    return out


def launch_grad_W_dec(
    values: Tensor, indices: Tensor, offsets: Tensor, grad_out: Tensor, f: int
) -> Tensor:
    """`sparse_decode_csr_grad_W_dec`: entries sorted by latent, unused ones behind all of them."""
    m, d = values.numel(), grad_out.shape[1]
    out = torch.empty(f, d, dtype=values.dtype, device=values.device)
    if out.numel() == 0:
        return out
    unused = torch.arange(m, device=values.device) >= offsets[-1]
    segments = sort_by_latent(torch.where(unused, f, indices.int()), f)
    source = rows_of(offsets, m)[segments.order].int()
    weight = values.contiguous()[segments.order].float()
    return _sums(segments, weight, source, grad_out, None, out)
