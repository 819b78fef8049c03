"""The k largest pre-activations: predict, filter in bf16, answer in float32, verify, repair.

1. Predict: the rank-th largest score over a sample of the features gives each row a threshold. It
   need not be a bound.
2. Filter: bf16 tensor-core tiles, never stored, append to the row's list every feature whose score
   could reach the threshold, given the bound of `_filter_kernel` on the score's error.
3. Answer: the listed features are computed in float32 and the k best kept, value descending, index
   ascending.
4. Verify: no feature was lost if the list did not overflow and its k-th best value is at or above
   the threshold, because every feature with a value at or above it is on the list.
5. Repair: rows that fail are computed whole in float32. The launches are the same whatever the
   data; without such rows they return at once.

A feature's value comes from the same float32 sum on every path, so it depends neither on the
threshold nor on the order in which programs append.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, import-untyped"
from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from microtome.kernels import topk_select as select
from microtome.kernels.bf16 import products, shadow_rows
from microtome.kernels.lists import append
from torch import Tensor

from microtome._look import Look

WORKSPACE = 64 * 2**20  # bytes of candidate lists, and again of repaired rows
SAMPLE = 16  # every 16th feature is sampled
MAXIMA = 4096  # at most this many sampled maxima a row


@dataclass(frozen=True)
class Plan:
    """How one call is cut up.

    Attributes:
        rows: rows of x worked on at once.
        capacity: candidates a row may keep; f means that every feature is one and nothing is
            screened.
        stride: every stride-th feature is sampled.
        group: sampled features behind one stored maximum.
        groups: stored maxima a row.
        rank: the threshold is the rank-th largest of them.
        slots: rows repaired at once; more are repaired one after another.
        BM, BN, BD: rows, features and columns of a tile of products.
    """

    rows: int
    capacity: int
    stride: int
    group: int
    groups: int
    rank: int
    slots: int
    BM: int
    BN: int = 128
    BD: int = 64


def plan(n: int, f: int, k: int) -> Plan:
    """Sizes for n rows, f features, k active.

    The sample's rank aims at 2 k features at or above the threshold, plus three standard deviations
    of how many of those the sample holds; the capacity leaves four more, and a quarter for what the
    screen's error lets through.
    """
    stride = max(SAMPLE, triton.cdiv(f, SAMPLE * MAXIMA))
    mean = 2 * k / stride
    rank = math.ceil(mean + 3 * math.sqrt(mean))
    wanted = 1.25 * rank * stride * (1 + 4 / math.sqrt(rank))
    capacity = min(64 * math.ceil(wanted / 64), f)
    tiles = triton.cdiv(triton.cdiv(f, stride), 128)
    group = 16
    while group > 1 and tiles * (128 // group) < 4 * rank:
        group //= 2
    groups = tiles * (128 // group)
    BM = min(max(triton.next_power_of_2(max(n, 1)), 16), 128)
    rows = max(WORKSPACE // (8 * capacity + 4 * groups) // BM * BM, BM)
    slots = max(1, min(WORKSPACE // (4 * f), n, rows))
    return Plan(rows, capacity, stride, group, groups, rank, slots, BM)


@triton.jit
def _sample_kernel(
    x, W, b_enc, maxima, rows, f, d, x_stride, w_stride, stride, groups,
    HAS_BIAS: tl.constexpr, GROUP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BD: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    row_tiles = tl.cdiv(rows, BM)
    row = tl.program_id(0) % row_tiles * BM + tl.arange(0, BM)
    block = tl.program_id(0) // row_tiles
    feature = (block * BN + tl.arange(0, BN)).to(tl.int64) * stride
    score = products(x, W, row, feature, rows, f, d, x_stride, w_stride, BM, BN, BD, UPCAST)
    if HAS_BIAS:
        score += tl.load(b_enc + feature, mask=feature < f, other=0.0).to(tl.float32)[None, :]
    score = tl.where((feature < f)[None, :], score, float("-inf"))
    best = tl.max(tl.reshape(score, (BM, BN // GROUP, GROUP)), 2)  # [BM, BN / GROUP]
    column = block * (BN // GROUP) + tl.arange(0, BN // GROUP)
    place = row.to(tl.int64)[:, None] * groups + column[None, :]
    tl.store(maxima + place, best, mask=(row < rows)[:, None] & (column < groups)[None, :])


@triton.jit
def _filter_kernel(
    x, x_stats, W, w_stats, b_enc, theta, count, index, rows, f, d, x_stride, w_stride, capacity,
    unit,
    HAS_BIAS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """Append every feature whose float32 value may reach the row's threshold.

    c, w: float32 row and feature; cb, wb: their bf16 shadows; u = 2^-24. The products of bf16 are
    exact in float32. A tensor core adds them with truncation: each addend loses at most one unit in
    the last of 24 bits of the block's largest, and blocks are at least four wide, so |score -
    cb.wb| <= 4 d u |cb||wb|. Then
        cb.wb - c.w = -(c - cb).w - cb.(w - wb),   |value - c.w| <= 2 d u |c||w|,
    and with N = |c| + |c - cb| >= |c|, |cb|:
        |score - value| <= |w| (|c - cb| + 6 d u N) + |w - wb| N (1 + 4 d u).
    The last factors cover the additions of the bias and the rounding of this very expression.
    """
    row_tiles = tl.cdiv(rows, BM)
    row = tl.program_id(0) % row_tiles * BM + tl.arange(0, BM)
    feature = tl.program_id(0) // row_tiles * BN + tl.arange(0, BN)
    live = row < rows
    score = products(x, W, row, feature, rows, f, d, x_stride, w_stride, BM, BN, BD, UPCAST)
    if HAS_BIAS:
        score += tl.load(b_enc + feature, mask=feature < f, other=0.0).to(tl.float32)[None, :]
    norm = tl.load(x_stats + row * 4 + 1, mask=live, other=0.0)
    lost = tl.load(x_stats + row * 4 + 2, mask=live, other=0.0)
    norm += lost
    of_w = (lost + 6.0 * unit * norm) * 1.0001
    of_lost = norm * (1.0 + 4.0 * unit) * 1.0001
    w_norm = tl.load(w_stats + feature.to(tl.int64) * 4 + 1, mask=feature < f, other=0.0)
    w_lost = tl.load(w_stats + feature.to(tl.int64) * 4 + 2, mask=feature < f, other=0.0)
    highest = score + of_w[:, None] * w_norm[None, :] + of_lost[:, None] * w_lost[None, :]
    highest += tl.abs(score) * 1e-6
    threshold = tl.load(theta + row, mask=live, other=0.0)
    # Not (>=): an overflowed bound is NaN and must keep its feature.
    keep = ~(highest < threshold[:, None]) & live[:, None] & (feature < f)[None, :]
    append(keep, row, live, feature, count, index, capacity, BM, BN)


def launch(
    x: Tensor, W_enc: Tensor, b_enc: Tensor | None, b_dec: Tensor | None, k: int,
    precision: str, kind: str, shadow: Tensor | None, stats: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`topk_encode`. Always exact; a "bf16" screen is used, another is ignored.

    On a GPU nothing waits for the check of NaN and infinity: a later call raises (_pending.py).
    While a CUDA graph is captured none is made, and a row with NaN gets an arbitrary answer.
    """
    given = (shadow, stats) if kind == "bf16" and shadow is not None and stats is not None else None
    return run(plan(x.shape[0], W_enc.shape[0], k), x, W_enc, b_enc, b_dec, k, given)


def run(
    p: Plan, x: Tensor, W_enc: Tensor, b_enc: Tensor | None, b_dec: Tensor | None, k: int,
    screen: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`launch` cut up as `p` says; the answer is the same for every plan."""
    n, f = x.shape[0], W_enc.shape[0]
    values, indices = x.new_empty(n, k), torch.empty(n, k, dtype=torch.int32, device=x.device)
    candidates = torch.empty(n, dtype=torch.int32, device=x.device)
    x, W_enc = x.contiguous(), W_enc.contiguous()
    b_enc = None if b_enc is None else b_enc.contiguous()
    b_dec = None if b_dec is None else b_dec.contiguous()
    if not x.is_cuda:  # interpreted: numpy would warn about NaN first
        _look(x, W_enc, b_enc, b_dec, None)
    with torch.cuda.device_of(x):
        shadow = screen_of(W_enc, screen) if p.capacity < f and n else None
        for first in range(0, n, p.rows):
            rows = slice(first, min(first + p.rows, n))
            lists = select.Lists(rows.stop - first, p.capacity, x.device)
            if shadow is not None:
                _screen(p, x[rows], b_dec, *shadow, b_enc, lists)
            select.answer(
                lists,
                x[rows],
                W_enc,
                b_enc,
                b_dec,
                k,
                p.slots,
                values[rows],
                indices[rows],
                candidates[rows],
            )
    if x.is_cuda:
        _look(x, W_enc, b_enc, b_dec, None if shadow is None else shadow[1][:, 1])
    return values, indices, candidates


def screen_of(W_enc: Tensor, screen: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
    """bf16 rows of W_enc and their statistics: those given, or made in one pass over W_enc."""
    if screen is not None:
        return screen[0].view(torch.bfloat16), screen[1]
    made: tuple[Tensor, Tensor] = shadow_rows(W_enc, None)
    return made


def _screen(
    p: Plan, x: Tensor, b_dec: Tensor | None, w_shadow: Tensor, w_stats: Tensor,
    b_enc: Tensor | None,
    lists: select.Lists,
) -> None:  # fmt: skip
    """Predict and filter: fill the lists of these rows."""
    (rows, d), f = x.shape, w_stats.shape[0]
    x_shadow, x_stats = shadow_rows(x, b_dec)
    bias = w_stats if b_enc is None else b_enc
    maxima = torch.empty(rows, p.groups, dtype=torch.float32, device=x.device)
    row_tiles = triton.cdiv(rows, p.BM)
    common = {
        "HAS_BIAS": b_enc is not None,
        "BM": p.BM,
        "BN": p.BN,
        "BD": p.BD,
        "UPCAST": not x.is_cuda,
    }
    sizes = (rows, f, d, x_shadow.stride(0), w_shadow.stride(0))
    _sample_kernel[(row_tiles * triton.cdiv(p.groups * p.group, p.BN),)](
        x_shadow,
        w_shadow,
        bias,
        maxima,
        *sizes,
        p.stride,
        p.groups,
        GROUP=p.group,
        **common,
        **OPTIONS,
    )
    select.threshold(maxima, p.rank, lists.theta)
    _filter_kernel[(row_tiles * triton.cdiv(f, p.BN),)](
        x_shadow, x_stats, w_shadow, w_stats, bias, lists.theta, lists.count, lists.index,
        *sizes, p.capacity, d * 2.0**-24, **common, **OPTIONS,
    )  # fmt: skip


OPTIONS = {"num_warps": 8, "num_stages": 3, "enable_fp_fusion": True}


def _look(
    x: Tensor, W_enc: Tensor, b_enc: Tensor | None, b_dec: Tensor | None, norms: Tensor | None
) -> None:
    look = Look("topk_encode", x.device)
    look.finite("x", x)
    look.finite("W_enc", W_enc, norms)
    look.finite("b_enc", b_enc)
    look.finite("b_dec", None if b_dec is None else b_dec[None])
    look.submit()
