"""bf16 shadows of float rows, the norms that bound what the rounding lost, and their products."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, import-untyped"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def round_to_bf16(value):
    """float32 to the bits of the nearest bf16, ties to even, and that bf16 as float32."""
    bits = value.to(tl.int32, bitcast=True)
    rounded = bits + 0x7FFF + ((bits >> 16) & 1)
    return (rounded >> 16).to(tl.int16), (rounded & -65536).to(tl.float32, bitcast=True)


@triton.jit
def rounded(value, UPCAST: tl.constexpr):
    """float32 to the nearest bf16, ties to even, for a product.

    The interpreter multiplies the raw bits of bf16 and cuts where it should round: with UPCAST the
    answer is a float32 of the same value.
    """
    return round_to_bf16(value)[1] if UPCAST else value.to(tl.bfloat16)


@triton.jit
def multiply(a, b, acc, UPCAST: tl.constexpr):
    """acc + a b^T in float32.

    Hopper adds products of e4m3 with some 14 bits; they are moved to float32 after every 128
    columns, which is what such a tile must have.
    """
    if UPCAST:
        acc = tl.dot(a.to(tl.float32), tl.trans(b.to(tl.float32)), acc)
    elif a.dtype == tl.float8e4nv:
        acc = tl.dot(a, tl.trans(b), acc, max_num_imprecise_acc=128)
    else:
        acc = tl.dot(a, tl.trans(b), acc)
    return acc


@triton.jit
def products(
    x, W, row, feature, rows, f, d, x_stride, w_stride,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """[BM, BN] products of bf16 or e4m3 rows, accumulated in float32."""
    acc = tl.zeros((BM, BN), tl.float32)
    x_row = x + row.to(tl.int64)[:, None] * x_stride
    w_row = W + feature.to(tl.int64)[:, None] * w_stride
    for start in range(0, d, BD):
        i = (start + tl.arange(0, BD))[None, :]
        a = tl.load(x_row + i, mask=(row < rows)[:, None] & (i < d), other=0.0)
        b = tl.load(w_row + i, mask=(feature < f)[:, None] & (i < d), other=0.0)
        acc = multiply(a, b, acc, UPCAST)
    return acc


@triton.jit
def described_products(
    x, W, row, feature, d, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """`products` of the tiles at row `row` of x and `feature` of W, two tensor descriptors.

    The copy engine fills tiles up with zeros beyond the rows and columns that there are.
    """
    acc = tl.zeros((BM, BN), tl.float32)
    for start in range(0, d, BD):
        a, b = x.load([row, start]), W.load([feature, start])
        acc = multiply(a, b, acc, UPCAST)
    return acc


@triton.jit
def norm_above(squares, d):
    """A bound from above on the norm whose float32 sum of d squares is `squares`.

    The sum is low by a factor of at most 1 - (d + 2) 2^-24, and each square that underflowed by at
    most 2^-126.
    """
    return tl.sqrt(squares) * (1.0001 + d * 1.2e-7) + tl.sqrt(d * 1.0) * 1.1e-19


@triton.jit
def _shadow_kernel(
    source, subtract, shadow, stats, rows, d, stride,
    HAS_SUBTRACT: tl.constexpr, STORE: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    live = (row < rows)[:, None]
    squares = tl.zeros((BR, BD), tl.float32)
    lost_squares = tl.zeros((BR, BD), tl.float32)
    for start in range(0, d, BD):
        i = (start + tl.arange(0, BD))[None, :]
        mask = live & (i < d)
        value = tl.load(source + row[:, None] * d + i, mask=mask, other=0.0).to(tl.float32)
        if HAS_SUBTRACT:
            value -= tl.load(subtract + i, mask=i < d, other=0.0).to(tl.float32)
            value = tl.where(mask, value, 0.0)
        bits, rounded = round_to_bf16(value)
        lost = value - rounded
        squares += value * value
        lost_squares += lost * lost
        if STORE:
            tl.store(shadow + row[:, None] * stride + i, bits, mask=mask)
    norm = norm_above(tl.sum(squares, 1), d)
    lost_norm = norm_above(tl.sum(lost_squares, 1), d)
    tl.store(stats + row * 4, tl.full((BR,), 1.0, tl.float32), mask=row < rows)
    tl.store(stats + row * 4 + 1, norm, mask=row < rows)
    tl.store(stats + row * 4 + 2, lost_norm, mask=row < rows)
    tl.store(stats + row * 4 + 3, tl.zeros((BR,), tl.float32), mask=row < rows)


def shadow_rows(source: Tensor, subtract: Tensor | None) -> tuple[Tensor, Tensor]:
    """Round the rows of a matrix to bf16.

    Args:
        source: [m, d] contiguous.
        subtract: [d] taken from every row first, in float32, or None.

    Returns:
        bf16 [m, d], `source` itself where it is bf16 and nothing is subtracted (rows 16-byte
        aligned otherwise); stats [m, 4] float32 a row: 1, its norm, the norm of what rounding lost,
        0. Norms are rounded up.
    """
    m, d = source.shape
    store = source.dtype != torch.bfloat16 or subtract is not None
    stride = -(-d // 8) * 8
    shadow = (
        torch.empty(m, stride, dtype=torch.int16, device=source.device)
        if store
        else source.view(torch.int16)
    )
    stats = torch.empty(m, 4, dtype=torch.float32, device=source.device)
    BD = min(triton.next_power_of_2(max(d, 16)), 512)
    BR = 4 if source.is_cuda else 128
    _shadow_kernel[(triton.cdiv(m, BR),)](
        source, source if subtract is None else subtract, shadow, stats, m, d, shadow.stride(0),
        HAS_SUBTRACT=subtract is not None, STORE=store, BR=BR, BD=BD, enable_fp_fusion=True,
    )  # fmt: skip
    return shadow.view(torch.bfloat16), stats
