"""float32 pre-activations, each from a sum that does not depend on what is computed beside it.

Of some features of some rows, or of all features of rows whose list fell short, into a scratch.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, import-untyped"
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _order(value):
    """float32 as an int32 of the same order; -0.0 counts as 0.0."""
    bits = tl.where(value == 0.0, 0.0, value).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _unorder(order):
    """The float32 that `_order` made an integer of."""
    return tl.where(order < 0, order ^ 0x7FFFFFFF, order).to(tl.float32, bitcast=True)


@triton.jit
def _dots(x, b_dec, W, bias, row, feature, live, d, HAS_B_DEC: tl.constexpr, HAS_BIAS: tl.constexpr,
          BN: tl.constexpr, BC: tl.constexpr, BD: tl.constexpr):  # fmt: skip
    """float32 pre-activations [BN, BC] of rows [BN]; a sum does not depend on its neighbours."""
    acc = tl.zeros((BN, BC, BD), tl.float32)
    x_row = x + row[:, None] * d
    w_row = W + feature.to(tl.int64)[:, :, None] * d
    for start in range(0, d, BD):
        i = start + tl.arange(0, BD)
        c = tl.load(x_row + i[None, :], mask=(i < d)[None, :], other=0.0).to(tl.float32)  # [BN, BD]
        if HAS_B_DEC:
            c -= tl.load(b_dec + i, mask=i < d, other=0.0).to(tl.float32)[None, :]
        w = tl.load(
            w_row + i[None, None, :], mask=live[:, :, None] & (i < d)[None, None, :], other=0.0
        )
        acc += c[:, None, :] * w.to(tl.float32)
    value = tl.sum(acc, 2)
    if HAS_BIAS:
        value += tl.load(bias + feature, mask=live, other=0.0).to(tl.float32)
    return value


@triton.jit
def whole_values(
    x, b_dec, W, bias, row, scratch, feature, f, d,
    HAS_B_DEC: tl.constexpr, HAS_BIAS: tl.constexpr, ORDERED: tl.constexpr, BC: tl.constexpr,
    BD: tl.constexpr,
):  # fmt: skip
    """Pre-activations of features [1, BC] of one row [1] to scratch [f]; ORDERED: as integers."""
    result = _dots(x, b_dec, W, bias, row, feature, feature < f, d, HAS_B_DEC, HAS_BIAS, 1, BC, BD)
    tl.store(scratch + feature, _order(result) if ORDERED else result, mask=feature < f)


@triton.jit
def whole_row(
    x, b_dec, W, bias, failed, scratch, turn, slots, beyond, f, d,
    HAS_B_DEC: tl.constexpr, HAS_BIAS: tl.constexpr, ORDERED: tl.constexpr, BC: tl.constexpr,
    BD: tl.constexpr,
):  # fmt: skip
    """A failed row's number [1], and its values at `scratch`: beyond the first `slots` rows, which
    `_whole_kernel` has computed, they are computed now, into the program's own room, which is
    `beyond` rows after those (0: what it looked at before may be overwritten)."""
    row = tl.load(failed + turn + tl.arange(0, 1)).to(tl.int64)
    scratch += (tl.program_id(0).to(tl.int64) + tl.where(turn >= slots, beyond, 0)) * f
    if turn >= slots:
        tl.debug_barrier()
        for first in range(0, f, BC):
            whole_values(
                x, b_dec, W, bias, row, scratch, (first + tl.arange(0, BC))[None, :], f, d,
                HAS_B_DEC, HAS_BIAS, ORDERED, BC, BD,
            )  # fmt: skip
        tl.debug_barrier()
    return row, scratch


@triton.jit
def _whole_kernel(
    x, b_dec, W, bias, failed, failures, scratch, f, d, slots,
    HAS_B_DEC: tl.constexpr, HAS_BIAS: tl.constexpr, ORDERED: tl.constexpr, BC: tl.constexpr,
    BD: tl.constexpr,
):  # fmt: skip
    """All values of the first `slots` failed rows to scratch [slots, f]; a program per block of
    features."""
    feature = (tl.program_id(0) * BC + tl.arange(0, BC))[None, :]
    for slot in range(0, tl.minimum(tl.load(failures), slots)):
        row = tl.load(failed + slot + tl.arange(0, 1)).to(tl.int64)
        whole_values(
            x, b_dec, W, bias, row, scratch + tl.cast(slot, tl.int64) * f, feature, f, d,
            HAS_B_DEC, HAS_BIAS, ORDERED, BC, BD,
        )  # fmt: skip
