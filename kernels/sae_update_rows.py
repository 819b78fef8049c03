"""Rows of `sae_update` in registers, in one tile or two: gradients, sums, and what is stored.

A second tile begins where the first ends, at column BD, and is BT wide, 0 if there is none.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, import-untyped"
from __future__ import annotations

import triton
import triton.language as tl
from microtome.kernels.bf16 import round_to_bf16
from microtome.kernels.sae_update_states import columns
from microtome.kernels.segments import add_entries, add_partials, add_wide_entries


@triton.jit
def gradient(
    partial, weight, source, table, aux, begin, end, extra, put, n, d,
    TABLES: tl.constexpr, EXTRA: tl.constexpr, FLIGHT: tl.constexpr, CHUNK: tl.constexpr,
    BL: tl.constexpr, BD: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """The sum of each latent's entries, [BL, BD] and [BL, BT], and of its row of `extra`."""
    column = tl.arange(0, BD)
    acc = tl.zeros((BL, BD), tl.float32)
    acc, rest = add_partials(acc, partial, begin, end, column, d, CHUNK)
    tail, beyond = acc, column
    if BT > 0:
        beyond = BD + tl.arange(0, BT)
        tail = tl.zeros((BL, BT), tl.float32)
        tail, rest = add_partials(tail, partial, begin, end, beyond, d, CHUNK)
    TOGETHER: tl.constexpr = BD <= 4096
    acc, tail = add_wide_entries(acc, tail, weight, source, table, aux, rest, end, column, beyond,
                                 n, d, TABLES, FLIGHT, BT > 0 and TOGETHER)  # fmt: skip
    if BT > 0 and not TOGETHER:
        tail = add_entries(tail, weight, source, table, aux, rest, end, beyond, n, d, TABLES,
                           FLIGHT)  # fmt: skip
    if EXTRA:
        acc += extra_rows(extra, put, d, 0, BD)
        if BT > 0:
            tail += extra_rows(extra, put, d, BD, BT)
    return acc, tail


@triton.jit
def rows_at(at, row, live, d, width, START: tl.constexpr, BD: tl.constexpr):
    """Pointers to rows [BL] of `width` numbers, and the mask of the first d, from column START."""
    column = columns(START, BD)
    return at + row[:, None] * width + column[None, :], live[:, None] & (column < d)[None, :]


@triton.jit
def extra_rows(extra, put, d, START: tl.constexpr, BD: tl.constexpr):
    """Rows `put` [BL] of the extra gradients from column START, zero where put is -1."""
    at, mask = rows_at(extra, put.to(tl.int64), put >= 0, d, d, START, BD)
    return tl.load(at, mask=mask, other=0.0)


@triton.jit
def start(centre, program, d, HELD: tl.constexpr, START: tl.constexpr, BD: tl.constexpr):
    """Zero a program's row of centre where it is the sum."""
    if not HELD:
        column = columns(START, BD)[None, :]
        tl.store(centre + program * d + column, tl.zeros((1, BD), tl.float32), mask=column < d)


@triton.jit
def plus(
    total, more, centre, program, d, HELD: tl.constexpr, START: tl.constexpr, BD: tl.constexpr
):
    """total + more; where it is not HELD in registers, as wide rows are not, in centre's row."""
    if HELD:
        total += more
    else:  # not after a return: Triton compiles what follows one, and `more` has another shape
        column = columns(START, BD)[None, :]
        at = centre + program * d + column
        # A thread may read what another has stored: where d is no multiple of 16, the loads and the
        # stores differ in layout.
        tl.debug_barrier()
        tl.store(at, tl.load(at, mask=column < d, other=0.0) + more, mask=column < d)
    return total


@triton.jit
def dot(a, b, tail_a, tail_b, BT: tl.constexpr):
    """Products of rows [BL] over both tiles; with two tiles there is one row."""
    if BT > 0:
        # By way of a scalar, which suits the layout of either tile: [1] would not, and a tile
        # would go through shared memory.
        return tl.zeros((1,), tl.float32) + (tl.sum(a * b) + tl.sum(tail_a * tail_b))
    return tl.sum(a * b, 1)


@triton.jit
def copied(copy, p, row, live, d, START: tl.constexpr, BD: tl.constexpr):
    """Store rows [BL, BD] as bf16. NaN stays NaN: the copy stands for the row."""
    bits, _ = round_to_bf16(p)
    at, mask = rows_at(copy, row, live, d, d, START, BD)
    tl.store(at, tl.where(p == p, bits, 0x7FC0).to(tl.int16), mask=mask)


@triton.jit
def shadowed(shadow, p, row, live, mask, d, shadow_stride, START: tl.constexpr, BD: tl.constexpr):
    """Store rows [BL, BD] as bf16; the rows, zero where masked, and what rounding lost of them."""
    p = tl.where(mask, p, 0.0)
    bits, rounded = round_to_bf16(p)
    at, mask = rows_at(shadow, row, live, d, shadow_stride, START, BD)
    tl.store(at, bits, mask=mask)
    return p, p - rounded
