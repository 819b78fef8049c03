"""The n*k largest pre-activations of a batch: predict one threshold, filter, select exactly.

1. Predict: the rank-th largest bf16 score over a sample of the features of all rows. It need not be
   a bound.
2. Filter: `csr_filter` lists every feature whose value could reach it; those are computed in
   float32.
3. Verify: if at least n*k computed values reach the threshold, the n*k-th largest of all does too,
   so every member is listed. If not, every row is set apart and computed whole; rows whose list
   overflowed are in any case.
4. Select: the n*k-th largest key, eight bits at a time from the highest, by histograms over listed
   and whole rows. Of the entries equal to it, the first by row and feature are taken.
5. Write: the lengths of the rows give their offsets; each row orders its own entries.

Every size follows from n*k, so nothing is read back to the host.
Integer atomics only, on counts; no answer depends on their order.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, import-untyped"
from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from microtome.kernels import csr_filter as filters
from microtome.kernels import csr_rows as csr
from microtome.kernels import topk_encode as encode
from microtome.kernels.csr_rows import set_apart
from microtome.kernels.dots import whole_row
from microtome.kernels.radix import Radix, digits, order_of
from microtome.kernels.topk_encode import _scores, _tile
from microtome.kernels.topk_select import _key, better_than
from torch import Tensor

from microtome._csr import offsets_of

OP = "batch_topk_encode"
SAMPLE = 16  # every 16th feature is sampled
MAXIMA = 4096  # at most this many sampled maxima a row


@dataclass(frozen=True)
class Plan:
    """How one call is cut up.

    Attributes:
        capacity: candidates a row may keep; f means that nothing is screened.
        stride: every stride-th feature is sampled.
        group: sampled features behind one stored maximum.
        groups: stored maxima a row.
        rank: the threshold is the rank-th largest of all stored maxima.
        slots: whole rows whose values are kept.
    """

    capacity: int
    stride: int
    group: int
    groups: int
    rank: int
    slots: int


def plan(n: int, f: int, k: int) -> Plan:
    """Sizes for n rows, f features, n*k entries.

    The rank aims at a quarter more than n*k values at or above the threshold, and four standard
    deviations of how many of those the sample holds. A list has room for eight times the mean row.
    """
    stride = max(SAMPLE, triton.cdiv(f, SAMPLE * MAXIMA))
    mean = 1.25 * n * k / stride
    rank = math.ceil(mean + 4 * math.sqrt(mean))
    capacity = min(64 * triton.cdiv(8 * k + 128, 64), f)
    sampled = triton.cdiv(f, stride)
    # Few share a maximum, so that a group rarely hides a second feature above the threshold.
    group = 8
    while group > 1 and sampled < 16 * group * triton.cdiv(k, stride):
        group //= 2
    groups = triton.cdiv(sampled, 128) * (128 // group)
    return Plan(capacity, stride, group, groups, rank, csr.slots_of(n, f))


@triton.jit
def _sample_kernel(
    x, W, bias, maxima, rows, f, d, x_stride, w_stride, tiles, groups, group_rows,
    HAS_BIAS: tl.constexpr, GROUP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BD: tl.constexpr, UPCAST: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """maxima [rows, groups]: the largest score of each GROUP of W's f rows, which are a sample."""
    row_tile, tile = _tile(rows, tiles, BM, group_rows)
    score = _scores(
        x, x, W, W, bias, row_tile * BM, tile * BN, rows, f, d, x_stride, w_stride, HAS_BIAS, BM,
        BN, BD, UPCAST, TMA, False,
    )  # fmt: skip
    best = tl.max(tl.reshape(score, (BM, BN // GROUP, GROUP)), 2)  # [BM, BN / GROUP]
    row = row_tile * BM + tl.arange(0, BM)
    column = tile * (BN // GROUP) + tl.arange(0, BN // GROUP)
    place = row.to(tl.int64)[:, None] * groups + column[None, :]
    tl.store(maxima + place, best, mask=(row < rows)[:, None] & (column < groups)[None, :])


@triton.jit
def _reach_kernel(
    count, value, theta, reached, rows, capacity, BN: tl.constexpr, BC: tl.constexpr
):  # fmt: skip
    """Count the listed values that reach the threshold; what overflowed lists hold counts too."""
    row = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    listed = tl.minimum(tl.load(count + row, mask=row < rows, other=0), capacity)[:, None]
    threshold = tl.load(theta)
    many = tl.zeros((BN,), tl.int32)
    for first in range(0, tl.max(tl.max(listed, 1), 0), BC):
        at = (first + tl.arange(0, BC))[None, :]
        mine = tl.load(value + row[:, None] * capacity + at, mask=at < listed, other=0.0)
        many += tl.sum(((at < listed) & (mine >= threshold)).to(tl.int32), 1)
    tl.atomic_add(reached, tl.sum(many, 0).to(tl.int64), sem="relaxed")


@triton.jit
def _give_up_kernel(
    reached, count, passed, failed, failures, rows, f, wanted, BN: tl.constexpr
):  # fmt: skip
    """Make every row whole if too few values reached the threshold: it was above the n*k-th."""
    if tl.load(reached) >= wanted:
        return
    row = tl.program_id(0) * BN + tl.arange(0, BN)
    which = (row < rows) & (tl.load(passed + row, mask=row < rows, other=f) < f)
    tl.store(passed + row, tl.zeros((BN,), tl.int32) + f, mask=which)
    set_apart(row, which, count, failed, failures, BN)


@triton.jit
def _tally(values, start, length, kth, BN: tl.constexpr, BC: tl.constexpr):
    """How many of the rows' values [BN] lie above the n*k-th, and how many are equal to it."""
    above = tl.zeros((BN,), tl.int32)
    ties = tl.zeros((BN,), tl.int32)
    wrong = tl.zeros((BN,), tl.int32)
    for first in range(0, tl.max(length, 0), BC):
        at = (first + tl.arange(0, BC))[None, :]
        mask = at < length[:, None]
        value = tl.load(values + start[:, None] + at, mask=mask, other=0.0)
        order = order_of(value)
        above += tl.sum((mask & (order > kth)).to(tl.int32), 1)
        ties += tl.sum((mask & (order == kth)).to(tl.int32), 1)
        finite = tl.abs(value) < float("inf")
        wrong = tl.maximum(wrong, tl.max((mask & ~finite).to(tl.int32), 1))
    return above, ties, wrong


@triton.jit
def _count_kernel(
    x, b_dec, W, bias, failed, failures, scratch, count, value, kth, above, ties, bad,
    rows, f, d, capacity, slots,
    HAS_B_DEC: tl.constexpr, HAS_BIAS: tl.constexpr, BD: tl.constexpr, WHOLE: tl.constexpr,
    BN: tl.constexpr, BC: tl.constexpr, BF: tl.constexpr,
):  # fmt: skip
    border = tl.load(kth)
    if WHOLE:
        for turn in range(tl.program_id(0), tl.load(failures), slots):
            row, mine = whole_row(
                x, b_dec, W, bias, failed, scratch, turn, slots, slots, f, d, HAS_B_DEC, HAS_BIAS,
                False, BF, BD,
            )  # fmt: skip
            length = tl.zeros((BN,), tl.int32) + f
            more, equal, wrong = _tally(mine, row * 0, length, border, BN, BC)
            tl.store(above + row, more)
            tl.store(ties + row, equal)
            tl.store(bad + row, wrong)
    else:
        row = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
        length = tl.minimum(tl.load(count + row, mask=row < rows, other=0), capacity)
        more, equal, wrong = _tally(value, row * capacity, length, border, BN, BC)
        tl.store(above + row, more, mask=row < rows)
        tl.store(ties + row, equal, mask=row < rows)
        tl.store(bad + row, wrong, mask=row < rows)


@triton.jit
def _write_kernel(
    count, index, value, taken, offsets, values, indices, rows, capacity,
    BN: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Place each entry of the listed rows by how many of its row are better."""
    row = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    live = row < rows
    listed = tl.minimum(tl.load(count + row, mask=live, other=0), capacity)[:, None]
    wanted = tl.load(taken + row, mask=live, other=0)[:, None]
    begin = tl.load(offsets + row, mask=live, other=0)[:, None]
    listed = tl.where(wanted > 0, listed, 0)
    most = tl.max(tl.max(listed, 1), 0)
    for first in range(0, most, BC):
        at = (first + tl.arange(0, BC))[None, :]
        place = row[:, None] * capacity + at
        mine = tl.load(value + place, mask=at < listed, other=0.0)  # [BN, BC]
        feature = tl.load(index + place, mask=at < listed, other=0)
        key = _key(mine, feature)
        better = better_than(key, value, index, row, listed, most, capacity, BN, BC)
        chosen = (at < listed) & (better < wanted)
        tl.store(values + begin + better, mine.to(values.dtype.element_ty), mask=chosen)
        tl.store(indices + begin + better, feature, mask=chosen)


@triton.jit
def _write_whole_kernel(
    x, b_dec, W, bias, failed, failures, scratch, kth, above, taken, offsets, kept, kept_index,
    values, indices, f, d, slots,
    HAS_B_DEC: tl.constexpr, HAS_BIAS: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr,
    BC: tl.constexpr, BF: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """Gather each whole row's entries in order of their features, then place them by value."""
    border = tl.load(kth)
    for turn in range(tl.program_id(0), tl.load(failures), slots):
        _, mine = whole_row(
            x, b_dec, W, bias, failed, scratch, turn, slots, slots, f, d, HAS_B_DEC, HAS_BIAS,
            False, BF, BD,
        )  # fmt: skip
        row = tl.load(failed + turn).to(tl.int64)
        wanted = tl.load(taken + row).to(tl.int32)
        quota = wanted - tl.load(above + row)  # of the entries at the border
        begin = tl.load(offsets + row)
        found = wanted * 0
        ties = wanted * 0
        for first in range(0, tl.where(wanted > 0, f, 0), BC):
            feature = first + tl.arange(0, BC)
            value = tl.load(mine + feature, mask=feature < f, other=0.0)
            order = order_of(value)
            tie = ((order == border) & (feature < f)).to(tl.int32)
            lower = ties + tl.cumsum(tie, 0) - tie
            take = ((order > border) & (feature < f)) | ((tie == 1) & (lower < quota))
            at = begin + found + tl.cumsum(take.to(tl.int32), 0) - 1
            tl.store(kept + at, value, mask=take)
            tl.store(kept_index + at, feature, mask=take)
            found += tl.sum(take.to(tl.int32), 0)
            ties += tl.sum(tie, 0)
        tl.debug_barrier()
        for first in range(0, wanted, BE):
            at = first + tl.arange(0, BE)
            value = tl.load(kept + begin + at, mask=at < wanted, other=0.0)
            feature = tl.load(kept_index + begin + at, mask=at < wanted, other=0)
            key = _key(value, feature)
            better = tl.zeros((BE,), tl.int32)
            for other in range(0, wanted, BE):
                to = other + tl.arange(0, BE)
                their = tl.load(kept + begin + to, mask=to < wanted, other=0.0)
                their_key = _key(their, tl.load(kept_index + begin + to, mask=to < wanted, other=0))
                their_key = tl.where(to < wanted, their_key, -4611686018427387905)
                better += tl.sum((their_key[None, :] > key[:, None]).to(tl.int32), 1)
            place = begin + better
            tl.store(values + place, value.to(values.dtype.element_ty), mask=at < wanted)
            tl.store(indices + place, feature, mask=at < wanted)


def launch(
    x: Tensor, W_enc: Tensor, b_enc: Tensor | None, b_dec: Tensor | None, k: int,
    precision: str, kind: str, shadow: Tensor | None, stats: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """`batch_topk_encode`. Always exact; a "bf16" screen is used, another is ignored.

    On a GPU nothing is read back to the host: for NaN and infinity a later call raises
    (_pending.py), while a CUDA graph is captured none does. NaN count as the largest values then,
    and the candidates of their rows are -1.
    """
    p = plan(x.shape[0], W_enc.shape[0], k)
    return run(p, x, W_enc, b_enc, b_dec, k, kind, shadow, stats)


def run(
    p: Plan, x: Tensor, W_enc: Tensor, b_enc: Tensor | None, b_dec: Tensor | None, k: int,
    kind: str = "auto", shadow: Tensor | None = None, stats: Tensor | None = None,
    tma: bool | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """`launch` cut up as `p` says; the answer is the same for every plan.

    tma: read tiles through tensor descriptors; None for where the device has the copy engine.
    """
    n = x.shape[0]
    x, W_enc, b_enc, b_dec = csr.contiguous(x, W_enc, b_enc, b_dec)
    if not x.is_cuda or n == 0:  # interpreted: numpy would warn about NaN first
        csr.look_at(OP, x, W_enc, b_enc, b_dec).submit()
    values = x.new_empty(n * k)
    indices = torch.empty(n * k, dtype=torch.int32, device=x.device)
    if n == 0:
        empty = torch.zeros(1, dtype=torch.int64, device=x.device)
        return values, indices, empty, indices.new_empty(0)
    with torch.cuda.device_of(x):
        rows = csr.Rows(x, W_enc, b_enc, b_dec, p.capacity, p.slots)
        screen = None
        if not rows.everything:
            screen = filters.screen_of(x, W_enc, b_dec, kind, shadow, stats)
            theta = _predict(p, rows, screen, tma)
            filters.filter_rows(rows, screen, theta, b_enc, tma)
        csr.compute(rows)
        if not rows.everything:
            _verify(rows, theta, n * k)
            csr.compute_whole(rows)
        offsets = _select(rows, n * k, values, indices)
        if not csr.capturing(x):
            norms = None if screen is None else screen[3][:, 1]
            csr.look_afterwards(OP, rows, norms=norms).submit()
        return values, indices, offsets, csr.certificate(rows)


def _predict(p: Plan, rows: csr.Rows, screen: filters.Screen, tma: bool | None) -> Tensor:
    """The threshold, [1] float32."""
    x_shadow, w_shadow = screen[0], screen[2][:: p.stride]
    bias = None if rows.biases[0] is None else rows.biases[0][:: p.stride].contiguous()
    maxima = torch.empty(rows.n, p.groups, dtype=torch.float32, device=x_shadow.device)
    BM, BN = filters.rows_of_a_tile(rows.n), 128
    a, b, constants = filters.inputs_of(x_shadow, w_shadow, rows.d, tma, BM, BN)
    row_tiles, tiles = triton.cdiv(rows.n, BM), triton.cdiv(p.groups * p.group, BN)
    _sample_kernel[(row_tiles * tiles,)](
        a, b, maxima if bias is None else bias, maxima, rows.n, w_shadow.shape[0], rows.d,
        x_shadow.stride(0), w_shadow.stride(0), tiles, p.groups,
        filters.resident_rows(rows.d, BM, row_tiles),
        HAS_BIAS=bias is not None, GROUP=p.group, **constants, **encode.OPTIONS,
    )  # fmt: skip
    radix = Radix(min(p.rank, maxima.numel()), maxima.device)
    count = torch.full((rows.n,), p.groups, dtype=torch.int32, device=maxima.device)
    digits(radix, rows, count, maxima, whole=False)
    # Not -inf, so that the bound below it is a number.
    theta: Tensor = radix.value.clamp_(min=-1e38)
    return theta


def _verify(rows: csr.Rows, theta: Tensor, wanted: int) -> None:
    """Set apart the rows whose list overflowed, or all rows where the threshold was too high."""
    lists = rows.lists
    reached = torch.zeros(1, dtype=torch.int64, device=theta.device)
    grid, tile = rows.listed()
    _reach_kernel[grid](
        lists.count, lists.value, theta, reached, rows.n, rows.capacity, **tile,
        enable_fp_fusion=True,
    )  # fmt: skip
    csr.set_overflowed_apart(rows)
    BN = 128
    _give_up_kernel[(triton.cdiv(rows.n, BN),)](
        reached, lists.count, rows.passed, lists.failed, lists.failures, rows.n, rows.f, wanted,
        BN=BN, enable_fp_fusion=True,
    )  # fmt: skip


def _select(rows: csr.Rows, wanted: int, values: Tensor, indices: Tensor) -> Tensor:
    """Write the `wanted` largest of all rows; the offsets."""
    lists, whole = rows.lists, not rows.everything
    radix = Radix(wanted, values.device)
    digits(radix, rows, lists.count, lists.value, whole)
    above = torch.zeros(rows.n, dtype=torch.int32, device=values.device)
    ties = torch.zeros_like(above)
    work = (*rows.weights, lists.failed, lists.failures, rows.scratch)
    counted = (lists.count, lists.value, radix.found, above, ties, rows.bad)
    BF = csr.block(rows)
    for apart in (False, True)[: 1 + whole]:
        grid, tile = rows.whole() if apart else rows.listed()
        _count_kernel[grid](
            *work, *counted, rows.n, rows.f, rows.d, rows.capacity, rows.slots,
            WHOLE=apart, BF=BF, **tile, **rows.has, enable_fp_fusion=True,
        )  # fmt: skip
    before = ties.cumsum(0) - ties
    quota = torch.minimum((radix.rest - before).clamp_(min=0), ties)
    taken = above + quota
    offsets = offsets_of(taken)
    BN = 1 if values.is_cuda else 32
    _write_kernel[(triton.cdiv(rows.n, BN),)](
        lists.count, lists.index, lists.value, taken, offsets, values, indices, rows.n,
        rows.capacity, BN=BN, BC=64, enable_fp_fusion=True,
    )  # fmt: skip
    if whole:
        kept = torch.empty(wanted, dtype=torch.float32, device=values.device)
        grid, tile = rows.whole()
        _write_whole_kernel[grid](
            *work, radix.found, above, taken, offsets, kept, torch.empty_like(indices),
            values, indices, rows.f, rows.d, rows.slots,
            BF=BF, BE=64, **tile, **rows.has, enable_fp_fusion=True,
        )  # fmt: skip
    return offsets
