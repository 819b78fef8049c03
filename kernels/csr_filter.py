"""Filter for rows of any length: list every feature whose float32 value may reach a threshold.

One threshold serves all rows and features: that of a batch, or 0 where each feature's own is folded
into the bias (`shift_of`). So one number a row and tile of features says which scores stay, as in
`topk_encode`, and nothing else is computed for each score.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, import-untyped"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from microtome.kernels import topk_encode as encode
from microtome.kernels import topk_narrow as narrow
from microtome.kernels.bf16 import shadow_rows
from microtome.kernels.csr_rows import Rows
from microtome.kernels.lists import append_scores
from microtome.kernels.topk_encode import _scores, _tile
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

# bf16 rows and statistics of x less b_dec, and of W_enc.
Screen = tuple[Tensor, Tensor, Tensor, Tensor]
LISTED = 256  # candidates of a list looked at together


def shift_of(b_enc: Tensor | None, theta: Tensor, half: float) -> Tensor:
    """[f] float32 to add to scores, so that the bound below 0 is one for all features.

    A feature is wanted where value > theta or |fl(value - theta)| < h, value = fl(sum + b), h the
    float32 of `half`. Rounding is monotone and -h is a float32, so in both cases value >= theta -
    h. With u = 2^-24, |value - (sum + b)| <= u |value|, hence sum + b >= value - u |value|, which
    grows with value: sum + b >= theta - h - u |theta - h|, or
        sum + b - theta + h + u (|theta| + h) >= 0.
    The score's sum s has s >= sum - E, E as in `topk_encode._filter_kernel`. Let the shift be at
    least b - theta + h + u (|theta| + h): then s + shift >= -E, and score = fl(s + shift), one
    float32 addition, is at or above every float32 that is at or below -E. Below, the shift is
    computed in float64; its rounding to float32 loses at most u (|b| + |theta| + h) of it, and that
    of h another u half: 4 u (|b| + |theta| + half) covers all, and the last term the rounding of
    numbers below 2^-126.
    """
    b = torch.zeros_like(theta) if b_enc is None else b_enc
    b, t = b.double(), theta.double()
    return (b - t + half + (b.abs() + t.abs() + half) * 2.0**-22 + 2.0**-146).float()


@triton.jit
def _start_kernel(threshold, x_stats, largest, theta, count, rows, BN: tl.constexpr):
    """Each row's threshold, and no entries; a row whose scores may overflow float32 has a threshold
    of +inf, which lists nothing, and a count of -1."""
    row = tl.program_id(0) * BN + tl.arange(0, BN)
    live = row < rows
    _, _, norm = narrow._spread(x_stats, row, rows, 0.0)
    reach = norm * (tl.load(largest) + tl.load(largest + 1))
    calm = reach < 42535295865117307932921825928971026432.0  # 2^125; not so where a norm is NaN
    tl.store(theta + row, tl.where(calm, tl.load(threshold), float("inf")), mask=live)
    tl.store(count + row, tl.where(calm, 0, -1), mask=live)


@triton.jit
def _filter_kernel(
    x, x_stats, W, tops, bias, theta, count, index, value, rows, f, d, x_stride, w_stride, tiles,
    capacity, group_rows, unit,
    HAS_BIAS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
    UPCAST: tl.constexpr, TMA: tl.constexpr, LEAF: tl.constexpr,
):  # fmt: skip
    """Append every feature that may reach its row's theta; the bound is that of `topk_encode`."""
    row_tile, tile = _tile(rows, tiles, BM, group_rows)
    row = row_tile * BM + tl.arange(0, BM)
    score = _scores(
        x, x, W, W, bias, row_tile * BM, tile * BN, rows, f, d, x_stride, w_stride, HAS_BIAS, BM,
        BN, BD, UPCAST, TMA, False,
    )  # fmt: skip
    lowest = narrow.lowest_score(
        theta, x_stats, tl.load(tops + tile * 2), tl.load(tops + tile * 2 + 1), row, rows, unit
    )
    append_scores(score, lowest, row, tile * BN, f, count, index, value, capacity, BM, BN, LEAF)


@triton.jit
def _own_kernel(
    theta, x_stats, w_stats, count, index, value, rows, capacity, unit, BN: tl.constexpr,
    BC: tl.constexpr,
):  # fmt: skip
    """Drop from the lists what a feature's own norms rule out and its tile's largest let through.

    A list that overflowed is left as it is.
    """
    row = tl.program_id(0) * BN + tl.arange(0, BN)
    passed = tl.load(count + row, mask=row < rows, other=0)
    listed = tl.where(passed > capacity, 0, passed)[:, None]
    line = row.to(tl.int64)[:, None] * capacity
    threshold = tl.load(theta + row, mask=row < rows, other=0.0)
    floor = (threshold - tl.abs(threshold) * 1e-6)[:, None]
    of_w, of_lost, _ = narrow._spread(x_stats, row, rows, unit)
    stay = tl.zeros((BN,), tl.int32)
    for first in range(0, tl.max(tl.max(listed, 1), 0), BC):
        at = (first + tl.arange(0, BC))[None, :]
        live = at < listed
        score = tl.load(value + line + at, mask=live, other=0.0)
        feature = tl.load(index + line + at, mask=live, other=0)
        w_norm = tl.load(w_stats + feature.to(tl.int64) * 4 + 1, mask=live, other=0.0)
        w_lost = tl.load(w_stats + feature.to(tl.int64) * 4 + 2, mask=live, other=0.0)
        error = (of_w[:, None] * w_norm + of_lost[:, None] * w_lost) * 1.0001
        kept = (live & ~(score < floor - error)).to(tl.int32)
        place = stay[:, None] + tl.cumsum(kept, 1) - kept  # never beyond `at`
        tl.debug_barrier()  # all of this block has been read
        tl.store(index + line + place, feature, mask=kept == 1)
        stay += tl.sum(kept, 1)
    tl.store(count + row, stay, mask=(row < rows) & (passed > 0) & (passed <= capacity))


def screen_of(
    x: Tensor, W_enc: Tensor, b_dec: Tensor | None, kind: str, shadow: Tensor | None,
    stats: Tensor | None,
) -> Screen:  # fmt: skip
    """bf16 shadows and statistics: of x minus b_dec, and of W_enc, given or made in one pass."""
    mine = shadow_rows(x, b_dec)
    if kind == "bf16" and shadow is not None and stats is not None:
        return (*mine, shadow.view(torch.bfloat16), stats)
    return (*mine, *shadow_rows(W_enc, None))


def rows_of_a_tile(n: int) -> int:
    """Rows of a tile of bf16 products."""
    BM: int = min(max(triton.next_power_of_2(max(n, 1)), 16), 128)
    return BM


def inputs_of(
    x: Tensor, W: Tensor, d: int, tma: bool | None, BM: int, BN: int
) -> tuple[object, object, dict[str, int | bool]]:
    """bf16 x and W, of d columns, as a kernel of products takes them, and its constants.

    tma: read tiles through tensor descriptors; None for where the device has the copy engine.
    """
    BD = 64
    tma = encode.described(x, W) if tma is None else tma
    constants = {"BM": BM, "BN": BN, "BD": BD, "UPCAST": not x.is_cuda, "TMA": tma}
    if not tma:
        return x, W, constants
    described = [
        TensorDescriptor(t, [t.shape[0], d], [t.stride(0), 1], [size, BD])
        for t, size in ((x, BM), (W, BN))
    ]
    return described[0], described[1], constants


def resident_rows(d: int, BM: int, row_tiles: int) -> int:
    """Tiles of rows that stay in the L2 cache while W streams past."""
    return min(max(encode.RESIDENT // (2 * d * BM), 1), row_tiles) if d else row_tiles


def filter_rows(
    rows: Rows, screen: Screen, threshold: Tensor, bias: Tensor | None, tma: bool | None = None
) -> None:
    """Fill the lists with the features whose score plus bias [f] may reach threshold [1]."""
    x_shadow, x_stats, w_shadow, w_stats = screen
    n, f, d, lists = rows.n, rows.f, rows.d, rows.lists
    BM, BN = rows_of_a_tile(n), encode.features_of_a_tile(rows.weights[0])
    tops, largest = narrow.tops(w_stats, BN)
    unit = d * 2.0**-24
    _start_kernel[(triton.cdiv(n, 128),)](
        threshold, x_stats, largest, lists.theta, lists.count, n, BN=128, enable_fp_fusion=True
    )
    a, b, constants = inputs_of(x_shadow, w_shadow, d, tma, BM, BN)
    row_tiles, tiles = triton.cdiv(n, BM), triton.cdiv(f, BN)
    _filter_kernel[(row_tiles * tiles,)](
        a, x_stats, b, tops, w_stats if bias is None else bias, lists.theta, lists.count,
        lists.index, lists.value, n, f, d, x_shadow.stride(0), w_shadow.stride(0), tiles,
        rows.capacity, resident_rows(d, BM, row_tiles), unit,
        HAS_BIAS=bias is not None, LEAF=encode.leaf(BM, BN, x_shadow), **constants,
        **encode.OPTIONS,
    )  # fmt: skip
    RN = 1 if x_shadow.is_cuda else 32
    _own_kernel[(triton.cdiv(n, RN),)](
        lists.theta, x_stats, w_stats, lists.count, lists.index, lists.value, n, rows.capacity,
        unit, BN=RN, BC=LISTED, enable_fp_fusion=True,
    )  # fmt: skip
