"""From sampled scores to thresholds, and from lists of scores to the few values that matter.

A list holds features with their scores. With the bound E on |score - value| of `topk_encode`'s
filter, k features have values at or above T, the k-th largest score - E of the list. So the k-th
best value is at least T, and only a feature with score + E >= T can be among the k best or tie with
the k-th. The features with score - E >= T, at least k, are computed first; the least of their
values, again reached by k features, then takes the place of T for the others. Nothing is assumed
about the order of the list.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, import-untyped"
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from microtome.kernels import topk_select as select
from torch import Tensor

SHORT = 512  # lists up to this length, to twice this length, ... are narrowed alike
WIDEST = 8192  # longer ones are not narrowed
CHUNK = 512  # sampled scores looked at together
SEEN = 128  # values compared with their scores together


@triton.jit
def _tops_kernel(w_stats, tops, f, BN: tl.constexpr):
    """The largest norm and the largest lost norm of each tile of features; NaN if one is."""
    feature = tl.program_id(0) * BN + tl.arange(0, BN)
    at = feature.to(tl.int64) * 4
    for i in tl.static_range(2):
        norm = tl.load(w_stats + at + 1 + i, mask=feature < f, other=0.0)
        nan = tl.max((norm != norm).to(tl.int32), 0)
        most = tl.max(tl.where(norm == norm, norm, 0.0), 0)
        tl.store(tops + tl.program_id(0) * 2 + i, tl.where(nan > 0, float("nan"), most))


@triton.jit
def _hypot(a, b):
    """The root of a^2 + b^2, of two numbers that are not negative, where a square may overflow."""
    most, least = tl.maximum(a, b), tl.minimum(a, b)
    ratio = least / (most + 1e-37)
    return most * tl.sqrt(1.0 + ratio * ratio)


@triton.jit
def _spread(x_stats, row, rows, unit, FP8: tl.constexpr = False):
    """What |w| and |w - wb| are multiplied by in the bound of row [BM], and N.

    FP8: `unit` is sigmas / sqrt(d), and the two parts are standard deviations that `_error` adds as
    squares. 0.01 N stands for the sums of a tensor core of 14 bits (docs/exactness.md).
    """
    norm = tl.load(x_stats + row * 4 + 1, mask=row < rows, other=0.0)
    lost = tl.load(x_stats + row * 4 + 2, mask=row < rows, other=0.0)
    norm += lost
    if FP8:
        of_w, of_lost = unit * _hypot(lost, 0.01 * norm), unit * norm
    else:
        of_w, of_lost = lost + 6.0 * unit * norm, norm * (1.0 + 4.0 * unit)
    return of_w * 1.0001, of_lost * 1.0001, norm


@triton.jit
def _error(of_w, of_lost, w_norm, w_lost, FP8: tl.constexpr):
    """The bound on |score - value| from `_spread`'s parts."""
    error = _hypot(of_w * w_norm, of_lost * w_lost) if FP8 else of_w * w_norm + of_lost * w_lost
    return error * 1.0001


@triton.jit
def lowest_score(theta, x_stats, w_norm, w_lost, row, rows, unit, FP8: tl.constexpr = False):
    """The least score [BM] of a feature whose value reaches theta, for norms of w at most these.

    +inf for a row that has no list: beyond the last, or with theta +inf or NaN.
    """
    threshold = tl.load(theta + row, mask=row < rows, other=float("inf"))
    of_w, of_lost, _ = _spread(x_stats, row, rows, unit, FP8)
    has_list = threshold < float("inf")
    threshold = tl.where(has_list, threshold, 0.0)
    error = _error(of_w, of_lost, w_norm, w_lost, FP8)
    lowest = threshold - tl.abs(threshold) * 1e-6 - error
    return tl.where(has_list, lowest, float("inf"))


@triton.jit
def _kth(key, k, BR: tl.constexpr):
    """The k-th largest int32 of each row [BR, .], its last eleven bits cleared; the least int32 if
    there are fewer."""
    least: tl.constexpr = -2147483648
    above = tl.sum((key >= 0).to(tl.int32), 1)
    found = tl.where(above >= k, 0, least)
    bit = tl.full((BR,), 1 << 30, tl.int32)
    for _ in range(20):
        above = tl.sum((key >= (found | bit)[:, None]).to(tl.int32), 1)
        found = tl.where(above >= k, found | bit, found)
        bit = bit >> 1
    return found


@triton.jit
def _sampled_kernel(
    sample, x_stats, tops, largest, theta, count, index, value, rows, f, width, groups, rank,
    stride, capacity, unit,
    TILE: tl.constexpr, GROUP: tl.constexpr, BR: tl.constexpr, BG: tl.constexpr, BC: tl.constexpr,
    FP8: tl.constexpr,
):  # fmt: skip
    """theta = about the rank-th largest of the row's sample; list the sample's candidates.

    The largest of GROUP samples stands for them, so the threshold comes out a little low where two
    of the best share a group. A row whose scores may overflow gets no list: theta is +inf, or NaN
    where a norm is, and the count is above the capacity.
    """
    row = tl.program_id(0) * BR + tl.arange(0, BR)
    live = row < rows
    line = sample + row.to(tl.int64)[:, None] * width
    column = tl.arange(0, BG)
    best = tl.full((BR, BG), float("-inf"), tl.float32)
    for i in range(GROUP):
        mask = live[:, None] & (column < groups)[None, :]
        at = i * groups + column
        best = tl.maximum(best, tl.load(line + at[None, :], mask=mask, other=float("-inf")))
    found = _kth(select._order(best), rank, BR)
    threshold = tl.where(found == -2147483648, float("-inf"), select._unorder(found))
    threshold = tl.maximum(threshold, -1e38)  # so that L stays above -inf
    of_w, of_lost, norm = _spread(x_stats, row, rows, unit, FP8)
    reach = norm * (tl.load(largest) + tl.load(largest + 1))
    calm = reach < 42535295865117307932921825928971026432.0  # 2^125
    no_list = tl.where(reach == reach, float("inf"), float("nan"))
    tl.store(theta + row, tl.where(calm, threshold, no_list), mask=live)
    floor = threshold - tl.abs(threshold) * 1e-6
    listed = tl.full((BR,), 0, tl.int32)
    for first in range(0, width, BC):
        at = first + tl.arange(0, BC)
        tile = at // TILE * stride
        feature = tile * TILE + at % TILE
        known = (at < width) & (feature < f)
        score = tl.load(line + at[None, :], mask=live[:, None] & known[None, :], other=0.0)
        w_norm = tl.load(tops + tile * 2, mask=known, other=0.0)
        w_lost = tl.load(tops + tile * 2 + 1, mask=known, other=0.0)
        error = _error(of_w[:, None], of_lost[:, None], w_norm[None, :], w_lost[None, :], FP8)
        keep = ~(score < floor[:, None] - error)
        keep = keep & known[None, :] & (live & calm)[:, None]
        kept = keep.to(tl.int32)
        place = listed[:, None] + tl.cumsum(kept, 1) - kept
        fits = keep & (place < capacity)
        place = row.to(tl.int64)[:, None] * capacity + place
        tl.store(index + place, feature[None, :] + tl.zeros((BR, BC), tl.int32), mask=fits)
        tl.store(value + place, score, mask=fits)
        listed += tl.sum(kept, 1)
    tl.store(count + row, tl.where(calm, listed, capacity + 1), mask=live)


@triton.jit
def _narrow_kernel(
    x_stats, w_stats, count, index, value, sure, rows, k, capacity, unit,
    ANSWER: tl.constexpr, BR: tl.constexpr, BELOW: tl.constexpr, BC: tl.constexpr,
    FP8: tl.constexpr,
):  # fmt: skip
    """Shorten the list to those with score - E >= T, then those with score + E >= T.

    sure [rows]: how many come first; 0 for a list that overflowed. The others' values become score
    + E. For lists of BELOW to BC features, so that most rows take the small tile. With ANSWER the
    scores are the values: E is 0.
    """
    row = tl.program_id(0) * BR + tl.arange(0, BR)
    passed = tl.load(count + row, mask=row < rows, other=0)
    listed = tl.where(passed > capacity, 0, passed)
    ours = (row < rows) & (listed >= BELOW) & (listed <= BC)
    if tl.max(ours.to(tl.int32), 0) == 0:
        return
    at = tl.arange(0, BC)[None, :]
    live = (at < listed[:, None]) & ours[:, None]  # [BR, BC]
    line = row.to(tl.int64)[:, None] * capacity
    score = tl.load(value + line + at, mask=live, other=0.0)
    feature = tl.load(index + line + at, mask=live, other=0)
    w_norm = tl.load(w_stats + feature.to(tl.int64) * 4 + 1, mask=live, other=0.0)
    w_lost = tl.load(w_stats + feature.to(tl.int64) * 4 + 2, mask=live, other=0.0)
    of_w, of_lost, _ = _spread(x_stats, row, rows, unit, FP8)
    error = _error(of_w[:, None], of_lost[:, None], w_norm, w_lost, FP8)
    error = tl.zeros((BR, BC), tl.float32) if ANSWER else error + tl.abs(score) * 1e-6
    least = tl.where(live, select._order(score - error), -2147483648)
    kth = _kth(least, k, BR)[:, None]
    first = live & (least >= kth)
    rest = live & (least < kth) & (select._order(score + error) >= kth)
    both = tl.cumsum(first.to(tl.int32) + (rest.to(tl.int32) << 16), 1)
    many = tl.sum(first.to(tl.int32), 1)
    place = tl.where(first, (both & 65535) - 1, many[:, None] + (both >> 16) - 1)
    tl.debug_barrier()  # everything has been read
    tl.store(index + line + place, feature, mask=first | rest)
    tl.store(value + line + place, score + error, mask=first | rest)
    tl.store(sure + row, many, mask=ours)
    short = many + tl.sum(rest.to(tl.int32), 1)
    tl.store(count + row, tl.where(passed > capacity, passed, short), mask=ours)


@triton.jit
def _rest_kernel(
    x, b_dec, W, bias, count, index, value, sure, rows, d, capacity,
    HAS_B_DEC: tl.constexpr, HAS_BIAS: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr,
    BD: tl.constexpr,
):  # fmt: skip
    """float32 values of the rest of a list: those that may reach the least of the sure values; -inf
    for the others."""
    row = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    known = tl.load(sure + row, mask=row < rows, other=0)
    passed = tl.load(count + row, mask=row < rows, other=0)
    listed = tl.where(passed > capacity, 0, passed)
    line = row[:, None] * capacity
    least = tl.full((BN,), float("inf"), tl.float32)
    for first in range(0, tl.max(known, 0), BC):
        at = (first + tl.arange(0, BC))[None, :]
        mask = at < known[:, None]
        least = tl.minimum(
            least, tl.min(tl.load(value + line + at, mask=mask, other=float("inf")), 1)
        )
    most = tl.max(listed - known, 0)
    for first in range(tl.program_id(1) * BC, most, BC * tl.num_programs(1)):
        at = known[:, None] + (first + tl.arange(0, BC))[None, :]
        mask = at < listed[:, None]
        bound = tl.load(value + line + at, mask=mask, other=float("-inf"))
        live = mask & ~(bound < least[:, None])
        feature = tl.load(index + line + at, mask=live, other=0)
        here = tl.where(row < rows, row, 0)
        result = select._dots(
            x, b_dec, W, bias, here, feature, live, d, HAS_B_DEC, HAS_BIAS, BN, BC, BD
        )
        tl.store(value + line + at, tl.where(live, result, float("-inf")), mask=mask)


@triton.jit
def _observed_kernel(
    x_stats, w_stats, count, index, value, bound, observed, rows, capacity, unit, sigmas, repair,
    BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """observed [rows]: the largest |score - value| of a row in standard deviations of the model.

    bound [rows, capacity]: score + E, as `_narrow_kernel` leaves it. What the score and the value
    may owe to float32 is no error of the screen. A row with more than `repair` counts as a list
    that overflowed.
    """
    row = tl.program_id(0) * BR + tl.arange(0, BR)
    passed = tl.load(count + row, mask=row < rows, other=0)
    listed = tl.where(passed > capacity, 0, passed)
    line = row.to(tl.int64)[:, None] * capacity
    of_w, of_lost, _ = _spread(x_stats, row, rows, unit, True)
    worst = tl.zeros((BR,), tl.float32)
    for first in range(0, tl.max(listed, 0), BC):
        at = (first + tl.arange(0, BC))[None, :]
        mask = at < listed[:, None]
        found = tl.load(value + line + at, mask=mask, other=float("-inf"))
        live = mask & (found > float("-inf"))
        found = tl.where(live, found, 0.0)
        feature = tl.load(index + line + at, mask=live, other=0).to(tl.int64)
        w_norm = tl.load(w_stats + feature * 4 + 1, mask=live, other=0.0)
        w_lost = tl.load(w_stats + feature * 4 + 2, mask=live, other=0.0)
        error = _error(of_w[:, None], of_lost[:, None], w_norm, w_lost, True)
        score = tl.load(bound + line + at, mask=live, other=0.0) - error
        rounding = (tl.abs(score) + tl.abs(found)) * 2e-6
        off = tl.maximum(tl.abs(score - found) - rounding, 0.0) / (error + 1e-37) * sigmas
        worst = tl.maximum(worst, tl.max(tl.where(live, off, 0.0), 1))
    tl.store(observed + row, worst, mask=row < rows)
    tl.store(count + row, capacity + 1, mask=(row < rows) & (worst > repair))


def tops(w_stats: Tensor, BN: int) -> tuple[Tensor, Tensor]:
    """[tiles, 2] float32: the largest norm and lost norm of each tile of BN features; [2]: of
    all."""
    f = w_stats.shape[0]
    out = torch.empty(triton.cdiv(f, BN), 2, dtype=torch.float32, device=w_stats.device)
    _tops_kernel[(out.shape[0],)](w_stats, out, f, BN=BN, enable_fp_fusion=True)
    return out, out.amax(0)


def sampled(
    p: Any, sample: Tensor, x_stats: Tensor, tops: tuple[Tensor, Tensor], lists: select.Lists,
    f: int, d: int,
) -> None:  # fmt: skip
    """Thresholds from the sample [rows, width], and what the sample adds to the lists."""
    rows, width = sample.shape
    groups = min(width // p.group, p.groups)
    BR, BC = (1, CHUNK) if sample.is_cuda else (32, 1024)
    BG = triton.next_power_of_2(groups)
    _sampled_kernel[(triton.cdiv(rows, BR),)](
        sample, x_stats, *tops, lists.theta, lists.count, lists.index, lists.value,
        rows, f, width, groups, p.rank, p.stride, p.capacity, unit(p.sigmas, d),
        TILE=p.BN, GROUP=p.group, BR=BR, BG=BG, BC=BC, FP8=p.sigmas > 0,
        # A warp holds 2048 maxima in its registers; of 8192 some would spill.
        **{**THRESHOLD_OPTIONS, "num_warps": max(BG // 2048, 1)},
    )  # fmt: skip


THRESHOLD_OPTIONS = {"num_warps": 1, "enable_fp_fusion": True}


def values(
    lists: select.Lists, x: Tensor, x_stats: Tensor, W_enc: Tensor, w_stats: Tensor,
    b_enc: Tensor | None, b_dec: Tensor | None, k: int, sigmas: float = 0.0,
    repair: float = 0.0, observed: Tensor | None = None,
) -> None:  # fmt: skip
    """Shorten the lists and put float32 values, or -inf, in place of the scores that stay.

    With sigmas, scores are of e4m3: how far they are off, in standard deviations, goes to observed
    [rows], and a row that has more than `repair` fails.

    Where x and W_enc are bf16 and nothing is subtracted from x, a score is a float32 sum of the
    very products that a value is, and is taken for it: gathering W_enc again would only add them in
    another order.
    """
    answer = x.dtype == torch.bfloat16 and b_dec is None and not sigmas
    (rows, d), capacity = x.shape, lists.index.shape[1]
    BC = triton.next_power_of_2(capacity)
    if BC > WIDEST and answer:
        return
    if BC > WIDEST:
        select.value(lists, x, W_enc, b_enc, b_dec, lists.count)
        return
    sure = torch.empty_like(lists.count)
    BR = 1 if x.is_cuda else 32
    shortest, length = 0, min(BC, SHORT)
    while length <= BC:
        _narrow_kernel[(triton.cdiv(rows, BR),)](
            x_stats, w_stats, lists.count, lists.index, lists.value, sure, rows, k, capacity,
            unit(sigmas, d), ANSWER=answer, BR=BR, BELOW=shortest, BC=length, FP8=sigmas > 0,
            num_warps=warps(length), enable_fp_fusion=True,
        )  # fmt: skip
        shortest, length = length + 1, 2 * length
    if answer:
        return
    bound = None if observed is None else lists.value.clone()
    select.value(lists, x, W_enc, b_enc, b_dec, sure)
    BN, BC = select.tile(x)
    _rest_kernel[(triton.cdiv(rows, BN), 2)](
        *select.weights(x, W_enc, b_enc, b_dec), lists.count, lists.index, lists.value, sure, rows,
        d, capacity, BN=BN, BC=BC, **select.constants(b_enc, b_dec),
    )  # fmt: skip
    if bound is not None:
        _observed_kernel[(triton.cdiv(rows, BR),)](
            x_stats, w_stats, lists.count, lists.index, lists.value, bound, observed, rows,
            capacity, unit(sigmas, d), sigmas, repair, BR=BR, BC=SEEN, **THRESHOLD_OPTIONS,
        )  # fmt: skip


def unit(sigmas: float, d: int) -> float:
    """`unit` of the kernels: sigmas / sqrt(d), or for 0, the proved bound of bf16, d 2^-24."""
    return float(sigmas / max(d, 1) ** 0.5 if sigmas else d * 2.0**-24)


def warps(BC: int) -> int:
    """Warps for a list of up to BC: 16 entries a thread."""
    return min(max(BC // 512, 1), 8)
