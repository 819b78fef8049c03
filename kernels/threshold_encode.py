"""The pre-activations above their feature's threshold, and the window about it.

`csr_filter` lists every feature whose value could lie above the lower edge of the window (or above
the threshold, where there is no window); rows whose list overflows are set apart and computed whole
(`threshold_whole`). The float32 values decide; counts of both kinds by row give the offsets; each
row then places its entries by their features. Without a capacity the host reads how many there are
before it makes room for them.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, import-untyped"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from microtome.kernels import csr_filter as filters
from microtome.kernels import csr_rows as csr
from microtome.kernels.threshold_whole import Whole, near, store_entries
from torch import Tensor

from microtome._csr import offsets_of
from microtome.errors import ArgumentError

OP = "threshold_encode"
SPARSE = 64  # a list has room for one feature in so many, and for LEAST
LEAST = 256
DENSEST = 8  # where the capacity speaks of more entries, for one feature in so many at most


def capacity_of(f: int, n: int = 1, capacity: int | None = None, per_row: int | None = None) -> int:
    """Candidates a row may keep: per_row, or what f and the capacity for n rows suggest.

    By f lists take 1/32 of what the float32 pre-activations would, and where the caller makes room
    for more entries, up to 1/4.
    """
    wanted = per_row
    if wanted is None:
        mean = 0 if capacity is None else -(-capacity // max(n, 1))
        wanted = max(f // SPARSE, LEAST, min(2 * mean, f // DENSEST))
    return min(64 * -(-wanted // 64), f)


@triton.jit
def _count_kernel(
    count, index, value, theta, many, close, bad, rows, capacity, half,
    WINDOW: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """How many of the listed values lie above their threshold, and how many in the window."""
    row = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    length = tl.minimum(tl.load(count + row, mask=row < rows, other=0), capacity)
    above = tl.zeros((BN,), tl.int32)
    window = tl.zeros((BN,), tl.int32)
    wrong = tl.zeros((BN,), tl.int32)
    for first in range(0, tl.max(length, 0), BC):
        at = (first + tl.arange(0, BC))[None, :]
        mask = at < length[:, None]
        mine = tl.load(value + row[:, None] * capacity + at, mask=mask, other=0.0)
        feature = tl.load(index + row[:, None] * capacity + at, mask=mask, other=0)
        threshold = tl.load(theta + feature, mask=mask, other=0.0)
        above += tl.sum((mask & (mine > threshold)).to(tl.int32), 1)
        if WINDOW:
            window += tl.sum((mask & near(mine, threshold, half)).to(tl.int32), 1)
        finite = tl.abs(mine) < float("inf")
        wrong = tl.maximum(wrong, tl.max((mask & ~finite).to(tl.int32), 1))
    tl.store(many + row, above, mask=row < rows)
    tl.store(close + row, window, mask=row < rows)
    tl.store(bad + row, wrong, mask=row < rows)


@triton.jit
def _write_kernel(
    count, index, value, theta, offsets, values, indices, near_offsets, near_values, near_indices,
    rows, capacity, room, near_room, half,
    WINDOW: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Place each entry of the listed rows by how many of its row have a lower feature."""
    row = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    live = row < rows
    listed = tl.minimum(tl.load(count + row, mask=live, other=0), capacity)[:, None]
    begin = tl.load(offsets + row, mask=live, other=0)[:, None]
    near_begin = tl.load(near_offsets + row, mask=live, other=0)[:, None]
    most = tl.max(tl.max(listed, 1), 0)
    for first in range(0, most, BC):
        at = (first + tl.arange(0, BC))[None, :]
        place = row[:, None] * capacity + at
        mine = tl.load(value + place, mask=at < listed, other=0.0)  # [BN, BC]
        feature = tl.load(index + place, mask=at < listed, other=0)
        threshold = tl.load(theta + feature, mask=at < listed, other=0.0)
        lower = tl.zeros((BN, BC), tl.int32)
        near_lower = tl.zeros((BN, BC), tl.int32)
        for other in range(0, most, BC):
            to = (other + tl.arange(0, BC))[None, :]
            place = row[:, None] * capacity + to
            their = tl.load(value + place, mask=to < listed, other=0.0)
            their_feature = tl.load(index + place, mask=to < listed, other=0)
            edge = tl.load(theta + their_feature, mask=to < listed, other=0.0)
            before = their_feature[:, None, :] < feature[:, :, None]
            theirs = (to < listed) & (their > edge)
            lower += tl.sum((before & theirs[:, None, :]).to(tl.int32), 2)
            if WINDOW:
                theirs = (to < listed) & near(their, edge, half)
                near_lower += tl.sum((before & theirs[:, None, :]).to(tl.int32), 2)
        mask = (at < listed) & (mine > threshold)
        store_entries(values, indices, begin + lower, room, mine, feature, mask)
        if WINDOW:
            mask = (at < listed) & near(mine, threshold, half)
            place = near_begin + near_lower
            store_entries(near_values, near_indices, place, near_room, mine, feature, mask)


def launch(
    x: Tensor, W_enc: Tensor, b_enc: Tensor | None, b_dec: Tensor | None, threshold: Tensor | None,
    bandwidth: float, capacity: int | None, precision: str, kind: str, shadow: Tensor | None,
    stats: Tensor | None, per_row: int | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """`threshold_encode`. Always exact; a "bf16" screen is used, another is ignored.

    On a GPU only the numbers of entries are read back to the host, and with a capacity nothing: for
    NaN, infinity and too many entries a later call raises (_pending.py), while a CUDA graph is
    captured none does. The candidates of such rows are -1.
    """
    n, f = x.shape[0], W_enc.shape[0]
    kept, screen = capacity_of(f, n, capacity, per_row), (kind, shadow, stats)
    return run(kept, x, W_enc, b_enc, b_dec, threshold, bandwidth, capacity, screen)


def run(
    kept: int, x: Tensor, W_enc: Tensor, b_enc: Tensor | None, b_dec: Tensor | None,
    threshold: Tensor | None, bandwidth: float, capacity: int | None,
    screen: tuple[str, Tensor | None, Tensor | None] = ("auto", None, None),
    tma: bool | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """`launch` with lists of `kept` candidates; same answer.

    tma: read tiles through tensor descriptors; None for where the device has the copy engine.
    """
    n = x.shape[0]
    x, W_enc, b_enc, b_dec = csr.contiguous(x, W_enc, b_enc, b_dec)
    if capacity is None and csr.capturing(x):
        msg = (
            f"{OP}: while a CUDA graph is captured the number of entries cannot be read. "
            "Pass capacity=."
        )
        raise ArgumentError(msg)
    if not x.is_cuda or n == 0:  # interpreted: numpy would warn about NaN first
        csr.look_at(OP, x, W_enc, b_enc, b_dec, threshold).submit()
    if n == 0:
        return _nothing(x, bandwidth, capacity)
    theta = (
        torch.zeros(W_enc.shape[0], dtype=torch.float32, device=x.device)
        if threshold is None
        else threshold.float().contiguous()
    )
    half, window = bandwidth / 2, bandwidth > 0
    with torch.cuda.device_of(x):
        rows = csr.Rows(x, W_enc, b_enc, b_dec, kept, slots=0)
        norms = None
        if not rows.everything:
            shadows = filters.screen_of(x, W_enc, b_dec, *screen)
            norms = shadows[3][:, 1]
            shift = filters.shift_of(b_enc, theta, half)
            filters.filter_rows(rows, shadows, theta.new_zeros(1), shift, tma)
            csr.set_overflowed_apart(rows)
        csr.compute(rows)
        many = torch.empty(2, n, dtype=torch.int32, device=x.device)
        _count(rows, theta, half, many)
        whole = None if rows.everything else Whole(rows, theta, half)
        if whole:
            whole.count(many)
        ends = [offsets_of(m) for m in many]
        if capacity is None:  # the one number, or two, that the host waits for
            rooms = torch.stack([end[-1] for end in ends[: 1 + window]]).tolist()
        else:
            rooms = [capacity] * (1 + window)
        rooms = [*rooms, 0][:2]
        out: list[Tensor] = []
        for room, end in zip(rooms, ends, strict=True):
            out += [x.new_zeros(room), many.new_zeros(room), end]
        entries = (out[2], *out[:2], out[5], *out[3:5])
        _write(rows, theta, half, entries, rooms)
        if whole:
            whole.write(entries, rooms)
        if not csr.capturing(x):
            look = csr.look_afterwards(OP, rows, threshold, norms)
            if capacity is not None:
                look.room("entries", ends[0], capacity)
                look.room("entries in the window", ends[1], rooms[1])
            look.submit()
        candidates = csr.certificate(rows)
        if capacity is not None:
            for i, (room, end) in enumerate(zip(rooms, ends, strict=True)):
                candidates = torch.where(end[1:] > room, -1, candidates)
                out[3 * i + 2] = end.clamp(max=room)
    return (*out, candidates)


def _nothing(x: Tensor, bandwidth: float, capacity: int | None) -> tuple[Tensor, ...]:
    """The answer to no rows."""
    out: list[Tensor] = []
    for room in (capacity or 0, capacity or 0 if bandwidth > 0 else 0):
        indices = torch.zeros(room, dtype=torch.int32, device=x.device)
        out += [x.new_zeros(room), indices, indices.new_zeros(1, dtype=torch.int64)]
    return (*out, out[1].new_empty(0))


def _count(rows: csr.Rows, theta: Tensor, half: float, many: Tensor) -> None:
    """Entries of every listed row, and entries of its window, to many [2, n]; 0 of a whole row."""
    lists = rows.lists
    grid, tile = rows.listed()
    _count_kernel[grid](
        lists.count, lists.index, lists.value, theta, many[0], many[1], rows.bad, rows.n,
        rows.capacity, half, WINDOW=half > 0, **tile, enable_fp_fusion=True,
    )  # fmt: skip


def _write(
    rows: csr.Rows, theta: Tensor, half: float, entries: tuple[Tensor, ...], rooms: list[int]
) -> None:
    """Write the entries of every listed row: offsets, values, indices, those of the window."""
    lists = rows.lists
    BN = 1 if theta.is_cuda else 32
    _write_kernel[(triton.cdiv(rows.n, BN),)](
        lists.count, lists.index, lists.value, theta, *entries, rows.n, rows.capacity, *rooms,
        half, WINDOW=half > 0, BN=BN, BC=64, enable_fp_fusion=True,
    )  # fmt: skip
