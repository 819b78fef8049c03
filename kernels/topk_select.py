"""From candidate lists to the answer of `topk_encode`: values, the k best, verification, repair."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, import-untyped"
from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from microtome.kernels.dots import _dots, _order, _unorder, _whole_kernel, whole_row
from torch import Tensor

TILE = (1, 32)  # rows and candidates computed together
WIDTH = 128  # columns of x read at a time
BLOCK = 64  # candidates compared with as many others
SPREAD = 4  # programs that share a row's listed features
SCAN = 256  # features of a repaired row looked at together
MOST = 65535  # programs along a launch's second dimension that a GPU takes


class Lists:
    """Candidates of some rows.

    Attributes:
        theta: [rows] float32 thresholds; -inf until predicted.
        count: [rows] int32, features that passed, also those beyond the capacity.
        index: [rows, capacity] int32 and value, float32: the candidates in no particular order.
        failed: [rows] int32, rows to repair, and failures, [1] int32, how many.
    """

    def __init__(self, rows: int, capacity: int, device: torch.device) -> None:
        self.theta = torch.full((rows,), float("-inf"), dtype=torch.float32, device=device)
        self.count = torch.zeros(rows, dtype=torch.int32, device=device)
        self.index = torch.empty(rows, capacity, dtype=torch.int32, device=device)
        self.value = torch.empty(rows, capacity, dtype=torch.float32, device=device)
        self.failed = torch.empty(rows, dtype=torch.int32, device=device)
        self.failures = torch.zeros(1, dtype=torch.int32, device=device)


@triton.jit
def _key(value, index):
    """An integer above -2^62 that orders by value, then by the lower index."""
    return (_order(value).to(tl.int64) << 31) | (2147483647 - index.to(tl.int64))


@triton.jit
def better_than(
    key, value, index, row, listed, most, capacity, BN: tl.constexpr, BC: tl.constexpr
):  # fmt: skip
    """How many of the first `listed` [BN, 1] candidates of each row come before each key [BN, BC].

    most: the largest of `listed`.
    """
    better = tl.zeros((BN, BC), tl.int32)
    for first in range(0, most, BC):
        at = (first + tl.arange(0, BC))[None, :]
        place = row[:, None] * capacity + at
        their = tl.load(value + place, mask=at < listed, other=0.0)
        their_key = _key(their, tl.load(index + place, mask=at < listed, other=0))
        their_key = tl.where(at < listed, their_key, -4611686018427387905)
        better += tl.sum((their_key[:, None, :] > key[:, :, None]).to(tl.int32), 2)
    return better


@triton.jit
def _threshold_kernel(maxima, theta, rows, groups, rank, BN: tl.constexpr, BG: tl.constexpr):
    """theta = the rank-th largest of the row's maxima, found bit by bit from the highest."""
    row = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    column = tl.arange(0, BG)
    mask = (row < rows)[:, None] & (column < groups)[None, :]
    value = tl.load(
        maxima + row[:, None] * groups + column[None, :], mask=mask, other=float("-inf")
    )
    order = _order(value).to(tl.int64) + 2147483648  # [BN, BG], in [0, 2^32)
    found = tl.full((BN,), 0, tl.int64)
    bit = tl.full((BN,), 2147483648, tl.int64)
    for _ in range(32):
        above = tl.sum((order >= (found | bit)[:, None]).to(tl.int32), 1)
        found = tl.where(above >= rank, found | bit, found)
        bit = bit >> 1
    tl.store(theta + row, _unorder((found - 2147483648).to(tl.int32)), mask=row < rows)


@triton.jit
def _value_kernel(
    x, b_dec, W, bias, count, index, value, rows, d, capacity, HAS_B_DEC: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ALL: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """float32 values of the listed features; with ALL, list all features first."""
    row = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    listed = tl.minimum(tl.load(count + row, mask=row < rows, other=0), capacity)
    most = tl.max(listed, 0)
    here = tl.where(row < rows, row, 0)
    for first in range(tl.program_id(1) * BC, most, BC * tl.num_programs(1)):
        at = (first + tl.arange(0, BC))[None, :]
        live = at < listed[:, None]  # [BN, BC]
        place = row[:, None] * capacity + at
        if ALL:
            feature = at + tl.full((BN, BC), 0, tl.int32)
            tl.store(index + place, feature, mask=live)
        else:
            feature = tl.load(index + place, mask=live, other=0)
        result = _dots(x, b_dec, W, bias, here, feature, live, d, HAS_B_DEC, HAS_BIAS, BN, BC, BD)
        tl.store(value + place, result, mask=live)


@triton.jit
def _select_kernel(
    theta, count, index, value, failed, failures, values, indices, candidates, rows, k, f, capacity,
    LISTED: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Place each candidate by how many are better; check that the row lost none. LISTED: failed
    rows.

    A value of -inf means that it was not computed. A row with a value that is NaN or inf, or with a
    threshold that is NaN, gets k NaN, the features 0 to k - 1 and f candidates.
    """
    row = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    live = row < rows
    if LISTED:
        failing = tl.load(failures)
        if tl.program_id(0) * BN >= failing:
            return
        live = row < failing
        row = tl.load(failed + row, mask=live, other=0).to(tl.int64)
    passed = tl.load(count + row, mask=live, other=0)
    listed = tl.where(passed > capacity, 0, passed)[:, None]
    most = tl.max(tl.max(listed, 1), 0)
    threshold = tl.load(theta + row, mask=live, other=0.0)[:, None]
    bad = threshold != threshold  # [BN, 1]
    computed = tl.full((BN,), 0, tl.int32)
    for first in range(0, most, BC):
        at = (first + tl.arange(0, BC))[None, :]
        mask = at < listed
        mine = tl.load(value + row[:, None] * capacity + at, mask=mask, other=float("-inf"))
        wrong = ((mine != mine) | (mine == float("inf"))) & mask
        bad = bad | (tl.max(wrong.to(tl.int32), 1) > 0)[:, None]
        computed += tl.sum((mask & (mine > float("-inf"))).to(tl.int32), 1)
    reached = tl.full((BN,), 0, tl.int32)
    for first in range(0, most, BC):
        at = (first + tl.arange(0, BC))[None, :]
        mask = at < listed
        mine = tl.load(value + row[:, None] * capacity + at, mask=mask, other=0.0)  # [BN, BC]
        feature = tl.load(index + row[:, None] * capacity + at, mask=mask, other=0)
        key = _key(mine, feature)
        better = better_than(key, value, index, row, listed, most, capacity, BN, BC)
        chosen = mask & (better < k) & ~bad
        place = row[:, None] * k + better
        tl.store(values + place, mine.to(values.dtype.element_ty), mask=chosen)
        tl.store(indices + place, feature, mask=chosen)
        reached += tl.sum((chosen & (mine >= threshold)).to(tl.int32), 1)
    for first in range(0, tl.where(tl.max(bad.to(tl.int32)) > 0, k, 0), BC):
        at = (first + tl.arange(0, BC))[None, :]
        mask = (at < k) & bad & live[:, None]
        place = row[:, None] * k + at
        nan = tl.full((BN, BC), float("nan"), tl.float32)
        tl.store(values + place, nan.to(values.dtype.element_ty), mask=mask)
        tl.store(indices + place, at + tl.full((BN, BC), 0, tl.int32), mask=mask)
    wrong = tl.max(bad.to(tl.int32), 1) > 0
    if LISTED:
        tl.store(candidates + row, tl.full((BN,), 0, tl.int32) + f, mask=live)
    else:
        tl.store(candidates + row, tl.where(wrong, f, computed), mask=live)
        fails = live & ((reached < k) | (passed > capacity)) & ~wrong
        at = tl.atomic_add(
            failures + tl.full((BN,), 0, tl.int32), fails.to(tl.int32), mask=fails, sem="relaxed"
        )
        tl.store(failed + at, row.to(tl.int32), mask=fails)


@triton.jit
def _repair_pick_kernel(
    x, b_dec, W, bias, failed, failures, scratch, count, index, value, f, d, k, capacity, slots,
    HAS_B_DEC: tl.constexpr, HAS_BIAS: tl.constexpr, BC: tl.constexpr, BD: tl.constexpr,
    BF: tl.constexpr,
):  # fmt: skip
    """Make the k best of all features the failed row's candidates."""
    for turn in range(tl.program_id(0), tl.load(failures), slots):
        _, mine = whole_row(
            x, b_dec, W, bias, failed, scratch, turn, slots, 0, f, d, HAS_B_DEC, HAS_BIAS, True, BC,
            BD,
        )  # fmt: skip
        row = tl.load(failed + turn).to(tl.int64)
        found = tl.full((), 0, tl.int64)
        for i in range(8):  # the k-th largest, four bits at a time from the highest
            trial = found | (tl.arange(0, 16).to(tl.int64) << (28 - 4 * i))
            above = tl.full((16,), 0, tl.int32)
            for first in range(0, f, BF):
                feature = first + tl.arange(0, BF)
                order = tl.load(mine + feature, mask=feature < f, other=0).to(tl.int64) + 2147483648
                order = tl.where(feature < f, order, -1)
                above += tl.sum((order[None, :] >= trial[:, None]).to(tl.int32), 1)
            digit = tl.sum((above >= k).to(tl.int32), 0) - 1
            found = found | (digit.to(tl.int64) << (28 - 4 * i))
        kth = (found - 2147483648).to(tl.int32)
        above = tl.full((), 0, tl.int32)
        for first in range(0, f, BF):
            feature = first + tl.arange(0, BF)
            order = tl.load(mine + feature, mask=feature < f, other=0)
            above += tl.sum(((order > kth) & (feature < f)).to(tl.int32), 0)
        taken = tl.full((), 0, tl.int32)
        ties = tl.full((), 0, tl.int32)
        for first in range(0, f, BF):
            feature = first + tl.arange(0, BF)
            order = tl.load(mine + feature, mask=feature < f, other=0)
            tie = ((order == kth) & (feature < f)).to(tl.int32)
            lower = ties + tl.cumsum(tie, 0) - tie
            take = ((order > kth) & (feature < f)) | ((tie == 1) & (lower < k - above))
            at = taken + tl.cumsum(take.to(tl.int32), 0) - 1
            tl.store(index + row * capacity + at, feature, mask=take)
            tl.store(value + row * capacity + at, _unorder(order), mask=take)
            taken += tl.sum(take.to(tl.int32), 0)
            ties += tl.sum(tie, 0)
        tl.store(count + row, k)


def threshold(maxima: Tensor, rank: int, theta: Tensor) -> None:
    """Write the rank-th largest of each row's maxima to theta."""
    rows, groups = maxima.shape
    BG = triton.next_power_of_2(groups)
    BN = 1 if maxima.is_cuda else 64
    _threshold_kernel[(triton.cdiv(rows, BN),)](
        maxima, theta, rows, groups, rank, BN=BN, BG=BG, enable_fp_fusion=True
    )


def weights(x: Tensor, W_enc: Tensor, b_enc: Tensor | None, b_dec: Tensor | None) -> list[Tensor]:
    """x, b_dec, W_enc, b_enc as the kernels take them, x in place of what is absent."""
    return [x, x if b_dec is None else b_dec, W_enc, x if b_enc is None else b_enc]


def constants(b_enc: Tensor | None, b_dec: Tensor | None) -> dict[str, bool | int]:
    """Constants of the kernels that compute values."""
    return {
        "HAS_B_DEC": b_dec is not None, "HAS_BIAS": b_enc is not None, "BD": WIDTH,
        "enable_fp_fusion": True,
    }  # fmt: skip


def tile(x: Tensor) -> tuple[int, int]:
    """Rows and candidates of a program. An interpreted one costs milliseconds, so it takes many
    rows; no sum depends on how many."""
    return TILE if x.is_cuda else (32, 32)


def value(
    lists: Lists, x: Tensor, W_enc: Tensor, b_enc: Tensor | None, b_dec: Tensor | None,
    count: Tensor, everything: bool = False,
) -> None:  # fmt: skip
    """Compute the first count [rows] listed features of every row in float32."""
    (rows, d), capacity = x.shape, lists.index.shape[1]
    BN, BC = tile(x)
    blocks = min(triton.cdiv(capacity, BC), MOST if everything else SPREAD)
    _value_kernel[(triton.cdiv(rows, BN), blocks)](
        *weights(x, W_enc, b_enc, b_dec), count, lists.index, lists.value, rows, d, capacity,
        ALL=everything, BN=BN, BC=BC, **constants(b_enc, b_dec),
    )  # fmt: skip


# Lists, k, f, values, indices, candidates, listed.
Choose = Callable[[Lists, int, int, Tensor, Tensor, Tensor, bool], None]


def best(
    lists: Lists, k: int, f: int, values: Tensor, indices: Tensor, candidates: Tensor,
    listed: bool,
) -> None:  # fmt: skip
    """Write the k best of every row and note which rows fell short; or, of rows that were noted and
    repaired, the k best (listed)."""
    rows, capacity = lists.index.shape
    BN, _ = tile(values)
    _select_kernel[(triton.cdiv(rows, BN),)](
        lists.theta, lists.count, lists.index, lists.value, lists.failed, lists.failures,
        values, indices, candidates, rows, k, f, capacity, LISTED=listed, BN=BN, BC=BLOCK,
        enable_fp_fusion=True,
    )  # fmt: skip


def answer(
    lists: Lists, x: Tensor, W_enc: Tensor, b_enc: Tensor | None, b_dec: Tensor | None, k: int,
    slots: int, values: Tensor, indices: Tensor, candidates: Tensor, valued: bool = False,
    choose: Choose | None = None,
) -> None:  # fmt: skip
    """Compute the listed features, write the k best of every row, repair rows whose list fell
    short.

    valued: the lists hold their values already. choose: does what `best` does in its place.
    """
    choose = best if choose is None else choose
    (rows, d), f = x.shape, W_enc.shape[0]
    capacity = lists.index.shape[1]
    everything = capacity == f
    BC = tile(x)[1]
    if everything:
        lists.count.fill_(f)
    if everything or not valued:
        value(lists, x, W_enc, b_enc, b_dec, lists.count, everything)
    answer = (values, indices, candidates)
    choose(lists, k, f, *answer, False)
    if everything:
        return
    BF = BC if x.is_cuda else 512
    slots = min(slots, rows)
    scratch = torch.empty(slots, f, dtype=torch.int32, device=x.device)
    repair = (*weights(x, W_enc, b_enc, b_dec), lists.failed, lists.failures, scratch)
    has = constants(b_enc, b_dec)
    _whole_kernel[(triton.cdiv(f, BF),)](*repair, f, d, slots, ORDERED=True, BC=BF, **has)
    _repair_pick_kernel[(slots,)](
        *repair, lists.count, lists.index, lists.value, f, d, k, capacity, slots,
        BC=BF, BF=SCAN, **has,
    )  # fmt: skip
    choose(lists, k, f, *answer, True)
