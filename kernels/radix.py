"""The r-th largest of float32 values in rows of any length, exactly, eight bits at a time."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, import-untyped"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from microtome.kernels.csr_rows import Rows, block
from microtome.kernels.dots import _order, _unorder, whole_row
from torch import Tensor


class Radix:
    """What is known of the r-th largest.

    Attributes:
        found: [1] int64, the highest bits of its order; all 32 after the last pass.
        rest: [1] int64, which of the values with those bits it is, counted from the largest.
        value: [1] float32, it.
        histogram: [256] int64, zero between passes.
    """

    def __init__(self, rank: int, device: torch.device) -> None:
        self.found = torch.zeros(1, dtype=torch.int64, device=device)
        self.rest = torch.full((1,), rank, dtype=torch.int64, device=device)
        self.value = torch.zeros(1, dtype=torch.float32, device=device)
        self.histogram = torch.zeros(256, dtype=torch.int64, device=device)


@triton.jit
def order_of(value):
    """float32 as an int64 of the same order in [0, 2^32); -0.0 counts as 0.0."""
    return _order(value).to(tl.int64) + 2147483648


@triton.jit
def _tally(values, start, length, found, shift, histogram, BN: tl.constexpr, BC: tl.constexpr):
    """Count the digits at `shift` of the rows' values [BN] whose higher digits are those found."""
    bins = tl.zeros((256,), tl.int32)
    for first in range(0, tl.max(length, 0), BC):
        at = (first + tl.arange(0, BC))[None, :]
        mask = at < length[:, None]
        order = order_of(tl.load(values + start[:, None] + at, mask=mask, other=0.0))
        mask = mask & ((order >> 8 >> shift) == (found >> 8 >> shift))
        digit = ((order >> shift) & 255).to(tl.int32)
        bins += tl.histogram(tl.reshape(digit, (BN * BC,)), 256, mask=tl.reshape(mask, (BN * BC,)))
    tl.atomic_add(histogram + tl.arange(0, 256), bins.to(tl.int64), mask=bins > 0, sem="relaxed")


@triton.jit
def _histogram_kernel(
    x, b_dec, W, bias, failed, failures, scratch, count, value, found, histogram,
    rows, f, d, capacity, slots, shift,
    HAS_B_DEC: tl.constexpr, HAS_BIAS: tl.constexpr, BD: tl.constexpr, WHOLE: tl.constexpr,
    BN: tl.constexpr, BC: tl.constexpr, BF: tl.constexpr,
):  # fmt: skip
    known = tl.load(found)
    if WHOLE:
        for turn in range(tl.program_id(0), tl.load(failures), slots):
            row, mine = whole_row(
                x, b_dec, W, bias, failed, scratch, turn, slots, slots, f, d, HAS_B_DEC, HAS_BIAS,
                False, BF, BD,
            )  # fmt: skip
            length = tl.zeros((BN,), tl.int32) + f
            _tally(mine, row * 0, length, known, shift, histogram, BN, BC)
    else:
        row = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
        length = tl.minimum(tl.load(count + row, mask=row < rows, other=0), capacity)
        _tally(value, row * capacity, length, known, shift, histogram, BN, BC)


@triton.jit
def _digit_kernel(found, rest, histogram, value, shift):
    """Take the digit that holds the rest-th largest."""
    digit = tl.arange(0, 256)
    many = tl.load(histogram + digit)
    total = tl.sum(many, 0)
    below = tl.cumsum(many, 0) - many
    wanted = tl.load(rest)
    mine = tl.sum((total - below >= wanted).to(tl.int32), 0) - 1
    at_or_below = tl.sum(tl.where(digit <= mine, many, 0), 0)
    order = tl.load(found) | (mine.to(tl.int64) << shift)
    tl.store(rest, wanted - (total - at_or_below))
    tl.store(found, order)
    tl.store(value, _unorder((order - 2147483648).to(tl.int32)))
    tl.store(histogram + digit, tl.zeros((256,), tl.int64))


def digits(radix: Radix, rows: Rows, count: Tensor, value: Tensor, whole: bool) -> None:
    """Find the r-th largest of the first count [n] of value [n, capacity], and of whole rows."""
    lists = rows.lists
    work = (*rows.weights, lists.failed, lists.failures, rows.scratch, count, value)
    for shift in (24, 16, 8, 0):
        for apart in (False, True)[: 1 + whole]:
            grid, tile = rows.whole() if apart else rows.listed()
            _histogram_kernel[grid](
                *work, radix.found, radix.histogram, rows.n, rows.f, rows.d, value.shape[1],
                rows.slots, shift, WHOLE=apart, BF=block(rows), **tile, **rows.has,
                enable_fp_fusion=True,
            )  # fmt: skip
        _digit_kernel[(1,)](
            radix.found, radix.rest, radix.histogram, radix.value, shift, enable_fp_fusion=True
        )
