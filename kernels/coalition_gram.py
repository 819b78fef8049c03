"""Normal equations from the bits of coalitions: outer products summed in float64 in registers.

Tensor cores are left alone: not every Triton multiplies float64 on them. The coalitions are cut
into parts by K and p alone, each part summed in order, and the parts then in order, so neither the
number of explicands nor the device changes a bit.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, import-untyped"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

SHORTEST = 128  # coalitions of a part: fewer would cost more to fold than to sum
PROGRAMS = 256  # parts times tiles to aim at, for one explicand
OUTPUTS = 16  # of a tile
OPTIONS = {"num_warps": 1, "enable_fp_fusion": True}
WORKSPACE = 64 * 2**20  # bytes of sums of parts


@triton.jit
def _bits(coalitions, k, w, tile):
    """[32] whether z[k] is 1 from 32 tile on: the bits of players from 32 tile - 1 on."""
    word = (tile * 32 - 1) >> 6
    low = tl.load(coalitions + k * w + word, mask=word >= 0, other=-1)  # all ones: z[k, 0]
    high = tl.load(coalitions + k * w + word + 1, mask=word + 1 < w, other=0)
    window = tl.where(tile % 2 == 0, ((low >> 63) & 1) | (high << 1), low >> 31)
    return (window.to(tl.int32) >> tl.arange(0, 32)) & 1 != 0


@triton.jit
def _parts_kernel(
    coalitions, weights, values, partial, K, w, P, C, parts, each, weight_row,
    GRAM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """partial[i, part] = sum over a part's k of weights[k] z[k] z[k]^T, or of z[k] values[i, k]^T
    weights[k]."""
    across = tl.cdiv(C, BC)
    tiles = tl.cdiv(P, 32) * across
    tile, rest = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    part, i = rest % parts, (rest // parts).to(tl.int64)
    down, right = tile // across, tile % across
    row, column = down * 32 + tl.arange(0, 32), right * BC + tl.arange(0, BC)
    first = part.to(tl.int64) * each
    last = tl.minimum(first + each, K)
    if GRAM:  # which is symmetric: tiles above the diagonal are not read
        last = tl.where(down >= right, last, first)
    acc = tl.zeros((32, BC), tl.float64)
    for k in tl.range(first, last, loop_unroll_factor=4):
        weight = tl.load(weights + i * weight_row + k)
        here = _bits(coalitions, k, w, down)
        if GRAM:
            there = _bits(coalitions, k, w, right)
            acc += tl.where(here, weight, 0.0)[:, None] * tl.where(there, 1.0, 0.0)[None, :]
        else:
            value = tl.load(values + (i * K + k) * C + column, mask=column < C, other=0.0)
            acc += tl.where(here[:, None], (weight * value)[None, :], 0.0)
    at = ((i * parts + part) * P + row[:, None]) * C + column[None, :]
    tl.store(partial + at, acc, mask=(row < P)[:, None] & (column < C)[None, :])


@triton.jit
def _fold_kernel(
    partial, out, total, P, C, parts, GRAM: tl.constexpr, BE: tl.constexpr
):  # fmt: skip
    entry = tl.program_id(0).to(tl.int64) * BE + tl.arange(0, BE)
    i, row, column = entry // C // P, entry // C % P, entry % C
    if GRAM:
        row, column = tl.maximum(row, column), tl.minimum(row, column)
    acc = tl.zeros((BE,), tl.float64)
    for part in tl.range(0, parts, loop_unroll_factor=8):
        at = ((i * parts + part) * P + row) * C + column
        acc += tl.load(partial + at, mask=entry < total, other=0.0)
    tl.store(out + entry, acc, mask=entry < total)


def geometry(K: int, p: int) -> tuple[int, int]:
    """Parts, and coalitions of a part."""
    tiles = triton.cdiv(p + 1, 32)
    parts = max(min(PROGRAMS // (tiles * (tiles + 1) // 2), triton.cdiv(K, SHORTEST)), 1)
    each = max(triton.cdiv(K, parts), 1)
    return max(triton.cdiv(K, each), 1), each


def launch(coalitions: Tensor, weights: Tensor, values: Tensor, p: int) -> tuple[Tensor, Tensor]:
    """`coalition_gram`: a program per explicand, part of the coalitions and tile of the answer."""
    g, (e, _, o) = weights.shape[0], values.shape
    gram = torch.empty(g, p + 1, p + 1, dtype=torch.float64, device=values.device)
    moments = torch.empty(e, p + 1, o, dtype=torch.float64, device=values.device)
    inputs = (coalitions.contiguous(), weights.contiguous(), values.contiguous())
    with torch.cuda.device_of(values):
        _sum(gram, *inputs, is_gram=True)
        _sum(moments, *inputs, is_gram=False)
    return gram, moments


def _sum(
    out: Tensor, coalitions: Tensor, weights: Tensor, values: Tensor, *, is_gram: bool
) -> None:
    """Fill `gram`, which has no use for values, or `moments`, a block of explicands at a time."""
    if out.numel() == 0:
        return
    (count, P, C), (K, w) = out.shape, coalitions.shape
    parts, each = geometry(K, P - 1)
    BC = 32 if is_gram else min(triton.next_power_of_2(C), OUTPUTS)
    block = min(max(WORKSPACE // (8 * parts * P * C), 1), count)
    partial = torch.empty(block, parts, P, C, dtype=torch.float64, device=out.device)
    row = 0 if weights.shape[0] == 1 else K
    for first in range(0, count, block):
        some = min(block, count - first)
        programs = some * parts * triton.cdiv(P, 32) * triton.cdiv(C, BC)
        _parts_kernel[(programs,)](
            coalitions, weights[first if row else 0 :], values[0 if is_gram else first :], partial,
            K, w, P, C, parts, each, row, GRAM=is_gram, BC=BC, **OPTIONS,
        )  # fmt: skip
        total = some * P * C
        BE = 256 if out.is_cuda else 1 << 14
        _fold_kernel[(triton.cdiv(total, BE),)](
            partial,
            out[first:],
            total,
            P,
            C,
            parts,
            GRAM=is_gram,
            BE=BE,
            enable_fp_fusion=False,
        )
