"""`threshold_encode` of rows whose list overflowed: at an SAE's start that may be every row.

Those rows are computed in tiles of rows by features, so that a row of W is read once for ROWS of
them, and twice in all: first to count what each row keeps of a chunk of features, then, its place
being known, to write it. Nothing is kept between the two, so no memory follows from how many rows
there are; and no host needs to know that: a fixed number of programs shares what there is.

A value comes from the sum that `topk_select._dots` makes of listed ones, so its bits do not depend
on where it was computed. That sum has WIDTH running parts, which no tensor core has.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, import-untyped"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from microtome.kernels import csr_rows as csr
from microtome.kernels.dots import _dots
from torch import Tensor

ROWS, FEATURES = 16, 16  # of a tile
CHUNK, CHUNKS = 512, 128  # features that a program counts together, at least; chunks at most
PROGRAMS = 1024
OPTIONS = {"num_warps": 8, "enable_fp_fusion": True}


@triton.jit
def near(value, threshold, half):
    """Which values lie within the window, as float32 tensors say."""
    return tl.abs(value - threshold) < half


@triton.jit
def store_entries(values, indices, at, room, value, feature, mask):
    """Store entries where there is room for them."""
    mask = mask & (at < room)
    tl.store(values + at, value.to(values.dtype.element_ty), mask=mask)
    tl.store(indices + at, feature, mask=mask)


@triton.jit
def _work(turn, failed, failures, BN: tl.constexpr):
    """A turn's chunk, its places [BN] among the whole rows, which of them are any, and their rows.

    Neighbouring turns share a chunk, whose part of W stays in the cache.
    """
    tiles = tl.cdiv(failures, BN)
    slot = turn % tiles * BN + tl.arange(0, BN)
    live = slot < failures
    return turn // tiles, slot, live, tl.load(failed + slot, mask=live, other=0).to(tl.int64)


@triton.jit
def _count_whole_kernel(
    x, b_dec, W, bias, failed, failures, theta, many, close, bad, counts, near_counts, rows, f, d,
    chunk, chunks, half,
    HAS_B_DEC: tl.constexpr, HAS_BIAS: tl.constexpr, BD: tl.constexpr, WINDOW: tl.constexpr,
    BN: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """What each whole row keeps: of each chunk to counts [chunks, rows], by the row's place among
    the whole rows, and added to many [rows]."""
    failing = tl.load(failures)
    for turn in range(tl.program_id(0), tl.cdiv(failing, BN) * chunks, tl.num_programs(0)):
        part, slot, live, row = _work(turn, failed, failing, BN)
        above = tl.zeros((BN,), tl.int32)
        window = tl.zeros((BN,), tl.int32)
        wrong = tl.zeros((BN,), tl.int32)
        for first in range(part * chunk, tl.minimum(part * chunk + chunk, f), BC):
            feature = (first + tl.arange(0, BC))[None, :]
            mask = live[:, None] & (feature < f)
            value = _dots(
                x, b_dec, W, bias, row, feature, feature < f, d, HAS_B_DEC, HAS_BIAS, BN, BC, BD
            )
            threshold = tl.load(theta + feature, mask=feature < f, other=0.0)
            above += tl.sum((mask & (value > threshold)).to(tl.int32), 1)
            if WINDOW:
                window += tl.sum((mask & near(value, threshold, half)).to(tl.int32), 1)
            finite = tl.abs(value) < float("inf")
            wrong = tl.maximum(wrong, tl.max((mask & ~finite).to(tl.int32), 1))
        at = tl.cast(part, tl.int64) * rows + slot
        tl.store(counts + at, above, mask=live)
        tl.atomic_add(many + row, above, mask=live, sem="relaxed")
        if WINDOW:
            tl.store(near_counts + at, window, mask=live)
            tl.atomic_add(close + row, window, mask=live, sem="relaxed")
        tl.store(bad + row, wrong, mask=live & (wrong > 0))  # any program's 1 is the same 1


@triton.jit
def _before(counts, part, slot, live, rows, BN: tl.constexpr, BP: tl.constexpr):
    """[BN] entries of the chunks before `part`."""
    other = tl.arange(0, BP)
    at = other.to(tl.int64)[None, :] * rows + slot[:, None]
    return tl.sum(tl.load(counts + at, mask=live[:, None] & (other < part)[None, :], other=0), 1)


@triton.jit
def _write_whole_kernel(
    x, b_dec, W, bias, failed, failures, theta, counts, near_counts, offsets, values, indices,
    near_offsets, near_values, near_indices, rows, f, d, chunk, chunks, room, near_room, half,
    HAS_B_DEC: tl.constexpr, HAS_BIAS: tl.constexpr, BD: tl.constexpr, WINDOW: tl.constexpr,
    BN: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """Place the entries of each whole row in the order of their features."""
    failing = tl.load(failures)
    for turn in range(tl.program_id(0), tl.cdiv(failing, BN) * chunks, tl.num_programs(0)):
        part, slot, live, row = _work(turn, failed, failing, BN)
        begin = tl.load(offsets + row, mask=live, other=0)
        begin += _before(counts, part, slot, live, rows, BN, BP)
        if WINDOW:
            near_begin = tl.load(near_offsets + row, mask=live, other=0)
            near_begin += _before(near_counts, part, slot, live, rows, BN, BP)
        for first in range(part * chunk, tl.minimum(part * chunk + chunk, f), BC):
            feature = (first + tl.arange(0, BC))[None, :]
            mask = live[:, None] & (feature < f)
            value = _dots(
                x, b_dec, W, bias, row, feature, feature < f, d, HAS_B_DEC, HAS_BIAS, BN, BC, BD
            )
            threshold = tl.load(theta + feature, mask=feature < f, other=0.0)
            all_features = feature + tl.zeros((BN, BC), tl.int32)
            above = mask & (value > threshold)
            at = begin[:, None] + tl.cumsum(above.to(tl.int32), 1) - 1
            store_entries(values, indices, at, room, value, all_features, above)
            begin += tl.sum(above.to(tl.int32), 1)
            if WINDOW:
                close = mask & near(value, threshold, half)
                at = near_begin[:, None] + tl.cumsum(close.to(tl.int32), 1) - 1
                store_entries(near_values, near_indices, at, near_room, value, all_features, close)
                near_begin += tl.sum(close.to(tl.int32), 1)


class Whole:
    """The rows that were set apart, in two passes over W. Made once the lists are filled.

    Args:
        rows: all rows of the call.
        theta: [f] float32, the features' thresholds.
        half: of the window, which there is where it is above 0.
    """

    def __init__(self, rows: csr.Rows, theta: Tensor, half: float) -> None:
        self.rows, self.theta, self.half = rows, theta, half
        interpreted = not theta.is_cuda  # where a program costs milliseconds
        self.tile = {"BN": ROWS, "BC": 128 if interpreted else FEATURES}
        self.chunk = CHUNK * triton.cdiv(triton.cdiv(rows.f, CHUNK), CHUNKS)
        self.chunks = triton.cdiv(rows.f, self.chunk)
        most = triton.cdiv(rows.n, ROWS) * self.chunks
        self.grid = (min(most, 2 if interpreted else PROGRAMS),)
        self.counts = theta.new_empty(2, self.chunks, rows.n, dtype=torch.int32)
        self.inputs = (*rows.weights, rows.lists.failed, rows.lists.failures, theta)
        self.constants = {"WINDOW": half > 0, **self.tile, **rows.has, **OPTIONS}

    def count(self, many: Tensor) -> None:
        """Add the entries, and entries in the window, of whole rows to many [2, n], which is 0."""
        r = self.rows
        _count_whole_kernel[self.grid](
            *self.inputs, many[0], many[1], r.bad, *self.counts, r.n, r.f, r.d, self.chunk,
            self.chunks, self.half, **self.constants,
        )  # fmt: skip

    def write(self, entries: tuple[Tensor, ...], rooms: list[int]) -> None:
        """Write offsets, values, indices, and those of the window, once `count` has been called."""
        r, BP = self.rows, triton.next_power_of_2(self.chunks)
        _write_whole_kernel[self.grid](
            *self.inputs, *self.counts, *entries, r.n, r.f, r.d, self.chunk, self.chunks, *rooms,
            self.half, BP=BP, **self.constants,
        )  # fmt: skip
