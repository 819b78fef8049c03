"""The k largest pre-activations: sample, filter in bf16, narrow, answer in float32, verify, repair.

1. Sample: bf16 tensor-core tiles of every stride-th tile of features are kept in memory. The
   rank-th largest score there gives each row a threshold. It need not be a bound.
2. Filter: the other tiles, never stored, append to the row's list every feature whose score could
   reach the threshold, given the bound of `_filter_kernel` on the score's error. The sample is
   filtered from memory: no product is computed twice.
3. Narrow: of the list, only features that may still be among the k best stay (`topk_narrow`).
4. Answer: those are computed in float32 and the k best kept, value descending, index ascending.
5. Verify: no feature was lost if the list did not overflow and its k-th best value is at or above
   the threshold, because every feature with a value at or above it was on the list.
6. Repair: rows that fail are computed whole in float32. The launches are the same whatever the
   data; without such rows they return at once.

A feature's value comes from the same float32 sum on every path, so it depends neither on the
threshold nor on the order in which programs append. Where x and W are bf16 and there is no b_dec
the score itself is that sum, but for rows computed whole.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, import-untyped"
from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from microtome.kernels import fp8
from microtome.kernels import topk_narrow as narrow
from microtome.kernels import topk_select as select
from microtome.kernels.bf16 import described_products, products, shadow_rows
from microtome.kernels.lists import append_scores
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from microtome._look import Look

WORKSPACE = 64 * 2**20  # bytes of sampled scores and lists, and again of repaired rows
SAMPLE = 16  # every 16th tile of features is sampled, or fewer
MAXIMA = 8192  # about as many sampled features a row at most
RESIDENT = 16 * 2**20  # bytes of x's shadow that stay in the L2 cache while W streams past


# Plan, x, b_dec, shadow and statistics of W_enc, b_enc, lists.
Fill = Callable[["Plan", Tensor, Tensor | None, Tensor, Tensor, Tensor | None, select.Lists], None]


@dataclass(frozen=True)
class Plan:
    """How one call is cut up.

    Attributes:
        rows: rows of x worked on at once.
        capacity: candidates a row may keep; f means that every feature is one and nothing is
            screened.
        stride: every stride-th tile of features is sampled.
        group: sampled features behind one maximum.
        groups: maxima a row that the threshold is chosen from, at most.
        rank: the threshold is the rank-th largest of them.
        slots: rows repaired at once; more are repaired one after another.
        BM, BN, BD: rows, features and columns of a tile of products.
        sigmas: 0: the screen is bf16, and its bound proved. Else it is e4m3, and its bound so many
            standard deviations of a model (docs/exactness.md).
        repair: with sigmas: a row whose error is seen to be more standard deviations is computed
            whole.
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
    sigmas: float = 0.0
    repair: float = 0.0


def plan(n: int, f: int, k: int, BN: int = 128, sigmas: float = 0.0, repair: float = 0.0) -> Plan:
    """Sizes for n rows, f features, k active, tiles of BN features; sigmas, repair as in Plan.

    The sample's rank aims at 2 k features at or above the threshold, plus four standard deviations
    of how many of those the sample holds: a row that fails costs more than a long list. So does a
    list that overflows; the capacity is three times what the threshold lets through on average, and
    eight standard deviations. Simulated on anisotropic rows with massive columns and families of
    neighbouring features, f = 65536, k = 64: 390 listed on average, 950 at most, no row failed.
    Rows are worked on in blocks of equal size.
    """
    tiles = triton.cdiv(f, BN)
    stride = max(SAMPLE, triton.cdiv(f, MAXIMA))
    width = triton.cdiv(tiles, stride) * BN  # sampled features
    portion = max(f / min(width, f), 1.0) if f else 1.0
    mean = 2 * k / portion
    rank = math.ceil(mean + 4 * math.sqrt(mean)) + 1
    wanted = rank * portion * (3 + 8 / math.sqrt(rank)) * (1.25 if sigmas else 1)
    capacity = min(64 * math.ceil(wanted / 64), f)
    group = 16
    while group > 1 and width // group < 4 * rank:
        group //= 2
    BM = min(max(triton.next_power_of_2(max(n, 1)), 16), 128)
    entry = 12 if sigmas else 8  # bytes
    most = max(WORKSPACE // (entry * capacity + 4 * width) // BM, 1)  # tiles in the workspace
    blocks = triton.cdiv(max(n, 1), most * BM)
    rows = triton.cdiv(triton.cdiv(max(n, 1), blocks), BM) * BM
    slots = max(1, min(WORKSPACE // (4 * max(f, 1)), n, rows))
    BD = 128 if sigmas else 64
    groups = width // group
    return Plan(rows, capacity, stride, group, groups, rank, slots, BM, BN, BD, sigmas, repair)


@triton.jit
def _tile(rows, tiles, BM: tl.constexpr, GROUP_ROWS):
    """The program's tile of rows and of features.

    Neighbouring programs share a tile of features and walk down GROUP_ROWS tiles of rows, whose
    shadow stays in the L2 cache: W comes from memory once for each such group.
    """
    row_tiles = tl.cdiv(rows, BM)
    first = tl.program_id(0) // (GROUP_ROWS * tiles) * GROUP_ROWS
    here = tl.minimum(row_tiles - first, GROUP_ROWS)
    place = tl.program_id(0) % (GROUP_ROWS * tiles)
    return first + place % here, place // here


@triton.jit
def _scores(
    x, x_stats, W, w_stats, b_enc, row, feature, rows, f, d, x_stride, w_stride,
    HAS_BIAS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
    UPCAST: tl.constexpr, TMA: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    """[BM, BN] scores of the tiles at `row` and `feature`; -inf from feature f on.

    FP8: rows have scales, whose products neither overflow nor vanish: none is below 2^-60.
    """
    column = feature + tl.arange(0, BN)
    line = row + tl.arange(0, BM)
    if TMA:
        score = described_products(x, W, row, feature, d, BM, BN, BD, UPCAST)
    else:
        score = products(x, W, line, column, rows, f, d, x_stride, w_stride, BM, BN, BD, UPCAST)
    if HAS_BIAS:
        bias = tl.load(b_enc + column, mask=column < f, other=float("-inf")).to(tl.float32)
    else:
        bias = tl.where(column < f, 0.0, float("-inf"))
    if FP8:
        x_scale = tl.load(x_stats + line * 4, mask=line < rows, other=1.0)
        w_scale = tl.load(w_stats + column.to(tl.int64) * 4, mask=column < f, other=1.0)
        score *= x_scale[:, None] * w_scale[None, :]
    return score + bias[None, :]


@triton.jit
def _sample_kernel(
    x, x_stats, W, w_stats, b_enc, sample, rows, f, d, x_stride, w_stride, width, stride,
    group_rows, HAS_BIAS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
    UPCAST: tl.constexpr, TMA: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    """sample [rows, width]: the scores of tiles 0, stride, 2 stride, ... of features."""
    row_tile, tile = _tile(rows, width // BN, BM, group_rows)
    feature = tile * stride * BN
    score = _scores(
        x, x_stats, W, w_stats, b_enc, row_tile * BM, feature, rows, f, d, x_stride, w_stride,
        HAS_BIAS, BM, BN, BD, UPCAST, TMA, FP8,
    )  # fmt: skip
    row = row_tile * BM + tl.arange(0, BM)
    place = row.to(tl.int64)[:, None] * width + (tile * BN + tl.arange(0, BN))[None, :]
    tl.store(sample + place, score, mask=(row < rows)[:, None])


@triton.jit
def _filter_kernel(
    x, x_stats, W, w_stats, tops, b_enc, theta, count, index, value, rows, f, d, x_stride, w_stride,
    tiles, stride, capacity, group_rows, unit,
    HAS_BIAS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
    UPCAST: tl.constexpr, TMA: tl.constexpr, FP8: tl.constexpr, LEAF: tl.constexpr,
):  # fmt: skip
    """Append every feature whose float32 value may reach the row's threshold, of tiles not sampled.

    c, w: float32 row and feature; cb, wb: their bf16 shadows; u = 2^-24. The products of bf16 are
    exact in float32. A tensor core adds them with truncation: each addend loses at most one unit in
    the last of 24 bits of the block's largest, and blocks are at least four wide, so the sum s that
    it finds has |s - cb.wb| <= 4 d u |cb||wb|. Then
        cb.wb - c.w = -(c - cb).w - cb.(w - wb),   |sum - c.w| <= 2 d u |c||w|
    for the float32 sum behind the value, and with N = |c| + |c - cb| >= |c|, |cb|:
        |s - sum| <= E = |w| (|c - cb| + 6 d u N) + |w - wb| N (1 + 4 d u).

    With the bias b, value = (sum + b)(1 + e), |e| <= u, and score = fl(s + b), one float32
    addition. If value >= theta, then sum + b >= theta - 2 u |theta|, so s + b >= theta - 2 u
    |theta| - E. Rounding is monotone: any float32 L at or below the right hand side has score >= L.
    So one number L a row and tile, with the largest |w| and |w - wb| of the tile in E, and a
    margin for the rounding of this very expression, drops no feature with value >= theta. What the
    tile's largest norms let through beyond a feature's own is dropped by `topk_narrow`.

    FP8: the same with e4m3 shadows, the scores scaled, and for E so many standard deviations of a
    model of the errors, which proves nothing: `topk_narrow._observed_kernel` looks how it did.

    No score is NaN and none overflows: `topk_narrow.threshold_kernel` sets theta to +inf (keep
    none; the row fails) where N |w| or N |w - wb| reaches 2^125, and to NaN where a norm is NaN.
    """
    row_tile, tile = _tile(rows, tiles, BM, group_rows)
    tile = tile + tile // (stride - 1) + 1  # leaves out the sampled ones
    row = row_tile * BM + tl.arange(0, BM)
    score = _scores(
        x, x_stats, W, w_stats, b_enc, row_tile * BM, tile * BN, rows, f, d, x_stride, w_stride,
        HAS_BIAS, BM, BN, BD, UPCAST, TMA, FP8,
    )  # fmt: skip
    lowest = narrow.lowest_score(
        theta, x_stats, tl.load(tops + tile * 2), tl.load(tops + tile * 2 + 1), row, rows, unit, FP8
    )
    append_scores(score, lowest, row, tile * BN, f, count, index, value, capacity, BM, BN, LEAF)


def launch(
    x: Tensor, W_enc: Tensor, b_enc: Tensor | None, b_dec: Tensor | None, k: int,
    precision: str, kind: str, shadow: Tensor | None, stats: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`topk_encode`. Always exact; a "bf16" screen is used, another is ignored.

    A row that holds NaN or infinity, or whose values overflow, is answered with NaN, the features 0
    to k - 1 and f candidates. On a GPU nothing waits for the check of NaN and infinity in the
    inputs: a later call raises (_pending.py); while a CUDA graph is captured none is made.
    """
    given = (shadow, stats) if kind == "bf16" and shadow is not None and stats is not None else None
    BN = features_of_a_tile(x)
    return run(plan(x.shape[0], W_enc.shape[0], k, BN), x, W_enc, b_enc, b_dec, k, given)


def features_of_a_tile(x: Tensor) -> int:
    """256 where wgmma multiplies many long rows, so that fewer bytes pass from the L2 cache to a
    multiprocessor (48 for 64 a clock); 128 elsewhere, where two programs share a multiprocessor and
    hide each other's filter."""
    if not x.is_cuda or torch.cuda.get_device_capability(x.device)[0] != 9:
        return 128
    return 256 if x.shape[0] >= 128 and x.shape[1] >= 1024 else 128


def run(
    p: Plan, x: Tensor, W_enc: Tensor, b_enc: Tensor | None, b_dec: Tensor | None, k: int,
    screen: tuple[Tensor, Tensor] | None = None, tma: bool | None = None,
    fill: Fill | None = None, choose: select.Choose | None = None,
    observed: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`launch` cut up as `p` says; the answer is the same for every plan.

    tma: read tiles through tensor descriptors; None for where the device has the copy engine.
    fill, choose: fill the lists of some rows, without scores, and choose the best of them, in place
    of the kernels here.
    observed: [n] float32, with p.sigmas: the largest error seen, in standard deviations.
    """
    n, f = x.shape[0], W_enc.shape[0]
    values, indices = x.new_empty(n, k), torch.empty(n, k, dtype=torch.int32, device=x.device)
    candidates = torch.empty(n, dtype=torch.int32, device=x.device)
    x, W_enc = x.contiguous(), W_enc.contiguous()
    b_enc = None if b_enc is None else b_enc.contiguous()
    b_dec = None if b_dec is None else b_dec.contiguous()
    if not x.is_cuda:  # interpreted: numpy would warn about NaN first
        _look(x, W_enc, b_enc, b_dec, None)
    with torch.cuda.device_of(x):
        shadow = screen_of(p, W_enc, screen) if p.capacity < f and n else None
        tops = None if shadow is None else narrow.tops(shadow[1], p.BN)
        for first in range(0, n, p.rows):
            rows = slice(first, min(first + p.rows, n))
            lists = select.Lists(rows.stop - first, p.capacity, x.device)
            if shadow is not None and fill is not None:
                fill(p, x[rows], b_dec, *shadow, b_enc, lists)
            elif shadow is not None and tops is not None:
                x_stats = _screen(p, x[rows], b_dec, *shadow, tops, b_enc, lists, tma)
                narrow.values(
                    lists, x[rows], x_stats, W_enc, shadow[1], b_enc, b_dec, k, p.sigmas, p.repair,
                    None if observed is None else observed[rows],
                )  # fmt: skip
            select.answer(
                lists, x[rows], W_enc, b_enc, b_dec, k, p.slots, values[rows], indices[rows],
                candidates[rows], valued=shadow is not None and fill is None,
                choose=choose,
            )  # fmt: skip
    if x.is_cuda:
        _look(x, W_enc, b_enc, b_dec, None if shadow is None else shadow[1][:, 1])
    return values, indices, candidates


def screen_of(
    p: Plan, W_enc: Tensor, screen: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor]:
    """Low-precision rows of W_enc and their statistics: those given, or made from W_enc."""
    if screen is None:
        return shadows(p, W_enc, None)
    return screen[0].view(torch.float8_e4m3fn if p.sigmas else torch.bfloat16), screen[1]


def shadows(p: Plan, source: Tensor, subtract: Tensor | None) -> tuple[Tensor, Tensor]:
    """Rows less `subtract` in the precision of the plan, and their statistics."""
    if p.sigmas:
        codes, stats = fp8.rows(source, subtract)
        return codes.view(torch.float8_e4m3fn), stats
    made: tuple[Tensor, Tensor] = shadow_rows(source, subtract)
    return made


def _screen(
    p: Plan, x: Tensor, b_dec: Tensor | None, w_shadow: Tensor, w_stats: Tensor,
    tops: tuple[Tensor, Tensor],
    b_enc: Tensor | None, lists: select.Lists, tma: bool | None,
) -> Tensor:  # fmt: skip
    """Sample and filter: fill the lists of these rows; return their statistics."""
    (rows, d), f = x.shape, w_stats.shape[0]
    x_shadow, x_stats = shadows(p, x, b_dec)
    columns = x_shadow.shape[1] if p.sigmas else d  # of the shadow
    tiles, sampled = triton.cdiv(f, p.BN), triton.cdiv(triton.cdiv(f, p.BN), p.stride)
    sample = torch.empty(rows, sampled * p.BN, dtype=torch.float32, device=x.device)
    row_tiles = triton.cdiv(rows, p.BM)
    group_rows = (
        min(max(RESIDENT // (x_shadow.element_size() * columns * p.BM), 1), row_tiles)
        if d
        else row_tiles
    )
    tma = described(x_shadow, w_shadow) if tma is None else tma
    a, b = x_shadow, w_shadow
    if tma:
        a = TensorDescriptor(a, [rows, columns], [a.stride(0), 1], [p.BM, p.BD])
        b = TensorDescriptor(b, [f, columns], [b.stride(0), 1], [p.BN, p.BD])
    bias = w_stats if b_enc is None else b_enc
    sizes = (rows, f, columns, x_shadow.stride(0), w_shadow.stride(0))
    common = {
        "HAS_BIAS": b_enc is not None, "BM": p.BM, "BN": p.BN, "BD": p.BD,
        "UPCAST": not x.is_cuda, "TMA": tma, "FP8": p.sigmas > 0, **OPTIONS,
    }  # fmt: skip
    _sample_kernel[(row_tiles * sampled,)](
        a,
        x_stats,
        b,
        w_stats,
        bias,
        sample,
        *sizes,
        sample.shape[1],
        p.stride,
        group_rows,
        **common,
    )
    narrow.sampled(p, sample, x_stats, tops, lists, f, d)
    if tiles > sampled:
        _filter_kernel[(row_tiles * (tiles - sampled),)](
            a, x_stats, b, w_stats, tops[0], bias, lists.theta, lists.count, lists.index,
            lists.value, *sizes, tiles - sampled, p.stride, p.capacity, group_rows,
            narrow.unit(p.sigmas, d),
            LEAF=leaf(p.BM, p.BN, x), **common,
        )  # fmt: skip
    return x_stats


def described(x: Tensor, W: Tensor) -> bool:
    """Whether the copy engine can read both: from sm_90 on, rows of a multiple of 16 bytes."""
    if not x.is_cuda or torch.cuda.get_device_capability(x.device)[0] < 9:
        return False
    return all(
        # one row is contiguous whatever its stride, also 0, which no descriptor has
        t.stride(0) * t.element_size() % 16 == 0
        and t.stride(0) >= t.shape[1] > 0
        and t.data_ptr() % 16 == 0
        for t in (x, W)
    )


def leaf(BM: int, BN: int, x: Tensor) -> int:
    """LEAF of `append_scores` for this device; 0 for tiles and devices whose layout is another."""
    if not x.is_cuda or BM < 128 or BN < 128:
        return 0
    return LEAVES.get(torch.cuda.get_device_capability(x.device)[0], 0)


OPTIONS = {"num_warps": 8, "num_stages": 3, "enable_fp_fusion": True}
LEAVES = {8: 32, 9: 8}  # mma.sync: four of the eight warps along the columns; wgmma: one


def _look(
    x: Tensor, W_enc: Tensor, b_enc: Tensor | None, b_dec: Tensor | None, norms: Tensor | None
) -> None:
    look = Look("topk_encode", x.device)
    look.finite("x", x)
    look.finite("W_enc", W_enc, norms)
    look.finite("b_enc", b_enc)
    look.finite("b_dec", None if b_dec is None else b_dec[None])
    look.submit()
