"""A float32 base plus a bf16 product of what differs from it, on tensor cores.

Few rows take one launch: the difference is formed and rounded as a tile of rows is loaded, and the
packed weights are read as they are. Every block of outputs reads the float32 rows again, eight
bytes an input, which many rows and outputs cannot afford; then the rows are rounded first and the
weights unpacked, and the product reads two bytes an input.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, import-untyped"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from microtome.kernels.bf16 import products, rounded
from microtome.kernels.patch_rows import columns
from torch import Tensor

BN, BD = 128, 64  # outputs and inputs of a tile
OPTIONS = {"num_warps": 8, "num_stages": 3, "enable_fp_fusion": True}
WORKSPACE = 64 * 2**20  # bytes of rounded rows
LAUNCHES = 30e6  # bytes that the L2 cache delivers in the time of two launches, about


@triton.jit
def _fused_products(
    x, x_base, at, packed, row, output, T, i, o, x_stride, base_stride, pairs,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """[BM, BN] products of rounded differences and packed weights, accumulated in float32.

    A packed number holds the weights of inputs 2 q and 2 q + 1: even and odd inputs are two
    products.
    """
    HALF: tl.constexpr = BD // 2
    acc = tl.zeros((BM, BN), tl.float32)
    live, known = (row < T)[:, None], (output < o)[None, :]
    x_row = x + row.to(tl.int64)[:, None] * x_stride
    base_row = x_base + at[:, None] * base_stride
    panel = packed + (output // 32).to(tl.int64) * pairs * 32 + output % 32
    for start in range(0, i, BD):
        c = (start + tl.arange(0, BD))[None, :]
        mask = live & (c < i)
        new = tl.load(x_row + c, mask=mask, other=0.0)
        delta = rounded(new - tl.load(base_row + c, mask=mask, other=0.0), UPCAST)
        even, odd = tl.split(tl.reshape(delta, (BM, HALF, 2)))
        q = (start // 2 + tl.arange(0, HALF))[:, None]
        w = tl.load(panel[None, :] + q * 32, mask=known & (q < pairs), other=0)  # [HALF, BN]
        if UPCAST:
            low = (w << 16).to(tl.float32, bitcast=True)
            high = (w & -65536).to(tl.float32, bitcast=True)
        else:
            low = w.to(tl.int16).to(tl.bfloat16, bitcast=True)
            high = (w >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
        acc = tl.dot(even, low, acc)
        acc = tl.dot(odd, high, acc)
    return acc


@triton.jit
def _delta_linear_kernel(
    x, x_base, y_base, index, packed, add, y, T, i, o, x_stride, base_stride, w_stride,
    y_base_stride, add_stride, PREPARED: tl.constexpr, HAS_ADD: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    row_tiles = tl.cdiv(T, BM)
    row = tl.program_id(0) % row_tiles * BM + tl.arange(0, BM)
    output = tl.program_id(0) // row_tiles * BN + tl.arange(0, BN)
    at = tl.load(index + row, mask=row < T, other=0).to(tl.int64)
    if PREPARED:
        acc = products(x, packed, row, output, T, o, i, x_stride, w_stride, BM, BN, BD, UPCAST)
    else:
        acc = _fused_products(
            x, x_base, at, packed, row, output, T, i, o, x_stride, base_stride, w_stride,
            BM, BN, BD, UPCAST,
        )  # fmt: skip
    mask = (row < T)[:, None] & (output < o)[None, :]
    row = row.to(tl.int64)[:, None]
    output = output[None, :]
    acc = tl.load(y_base + at[:, None] * y_base_stride + output, mask=mask, other=0.0) + acc
    if HAS_ADD:
        acc += tl.load(add + row * add_stride + output, mask=mask, other=0.0)
    tl.store(y + row * o + output, acc, mask=mask)


@triton.jit
def _round_rows_kernel(
    x, x_base, index, out, T, i, x_stride, base_stride, out_stride,
    BM: tl.constexpr, BD: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    c = (tl.program_id(1) * BD + tl.arange(0, BD))[None, :]
    at = tl.load(index + row, mask=row < T, other=0).to(tl.int64)
    mask = (row < T)[:, None] & (c < i)
    new = tl.load(x + row[:, None] * x_stride + c, mask=mask, other=0.0)
    delta = new - tl.load(x_base + at[:, None] * base_stride + c, mask=mask, other=0.0)
    place = out + row[:, None] * out_stride + c
    tl.store(place, rounded(delta, UPCAST).to(out.dtype.element_ty), mask=mask)


@triton.jit
def _unpack_kernel(packed, out, pairs, BQ: tl.constexpr):
    """A panel's pairs [pairs, 32] to rows of outputs [32, pairs]."""
    panel, lane = tl.program_id(0).to(tl.int64), tl.arange(0, 32)
    q = tl.program_id(1) * BQ + tl.arange(0, BQ)
    at = panel * pairs * 32
    w = tl.load(packed + at + q[:, None] * 32 + lane[None, :], mask=q[:, None] < pairs, other=0)
    tl.store(out + at + lane[:, None] * pairs + q[None, :], tl.trans(w), mask=q[None, :] < pairs)


def prepares(T: int, i: int, o: int) -> bool:
    """Whether to round T rows and unpack the weights first, by the bytes that either way reads.

    Fused reads 8 T i bytes for every block of outputs. Prepared reads 2 T i for each, and 10 T i +
    4 o i once, after two more launches. Counted, not measured.
    """
    blocks = -(-o // BN)
    return i * (6 * T * blocks - 10 * T - 4 * o) > LAUNCHES


def launch(
    x: Tensor, x_base: Tensor, y_base: Tensor, index: Tensor, packed: Tensor, o: int,
    add: Tensor | None, prepared: bool | None = None,
) -> Tensor:  # fmt: skip
    """`delta_linear`: a program per block of rows and of outputs."""
    (T, i), pairs = x.shape, packed.shape[1]
    y = torch.empty(T, o, dtype=torch.float32, device=x.device)
    if y.numel() == 0:
        return y
    x, x_base, y_base = columns(x), columns(x_base), columns(y_base)
    added = y_base if add is None else columns(add)
    index, packed = index.contiguous(), packed.contiguous().view(torch.int32)
    upcast = not x.is_cuda
    prepared = prepares(T, i, o) if prepared is None else prepared
    BM = min(max(triton.next_power_of_2(T), 16), 128 if prepared else 64)
    block = max(WORKSPACE // (4 * pairs) // BM * BM, BM) if prepared and pairs else T
    with torch.cuda.device_of(x):
        if prepared:
            weights = torch.empty_like(packed)
            _unpack_kernel[(packed.shape[0], triton.cdiv(pairs, 64))](
                packed, weights, pairs, BQ=64, enable_fp_fusion=True
            )
            packed = weights.view(torch.bfloat16)
            delta = torch.empty(min(block, T), 2 * pairs, dtype=torch.bfloat16, device=x.device)
        for first in range(0, T, block):
            rows = slice(first, min(first + block, T))
            count = rows.stop - first
            source = x[rows]
            if prepared:
                _round_rows_kernel[(triton.cdiv(count, 4), triton.cdiv(i, 512))](
                    source, x_base, index[rows], delta, count, i, x.stride(0), x_base.stride(0),
                    2 * pairs, BM=4, BD=512, UPCAST=upcast, enable_fp_fusion=True,
                )  # fmt: skip
                source = delta
            _delta_linear_kernel[(triton.cdiv(count, BM) * triton.cdiv(o, BN),)](
                source, x_base, y_base, index[rows], packed,
                added if add is None else added[rows], y[rows], count, i, o, source.stride(0),
                x_base.stride(0), 2 * pairs if prepared else pairs, y_base.stride(0),
                added.stride(0),
                PREPARED=prepared, HAS_ADD=add is not None, BM=BM, BN=BN, BD=BD, UPCAST=upcast,
                **OPTIONS,
            )  # fmt: skip
    return y
