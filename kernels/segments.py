"""Sums over the entries of each latent: sorted, long segments split, no float atomics.

Entries are the (row, slot) pairs of a code, sorted stably by latent. A segment longer than CHUNK
has its full chunks summed first, each on its own; the latent's program then adds those partial sums
in order and the remaining entries after them. The chunks depend on the offsets alone, so the order
of every sum is fixed.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, import-untyped"
from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 128  # entries summed in sequence


class Segments(NamedTuple):
    """Entries sorted by latent.

    Attributes:
        order: [m] int64, the entry at each sorted place.
        latents: [m] int32, ascending.
        offsets: [f + 1] int64, where each latent's entries begin; the last is m.
    """

    order: Tensor
    latents: Tensor
    offsets: Tensor


def sort_by_latent(latents: Tensor, f: int) -> Segments:
    """Sort flat latent numbers, keeping entries of one latent in their order."""
    ordered, order = torch.sort(latents.int(), stable=True)
    bounds = torch.arange(f + 1, dtype=torch.int32, device=latents.device)
    return Segments(order, ordered, torch.searchsorted(ordered, bounds))


def slots(entries: int) -> int:
    """Partial sums `entries` entries can need: full chunks are disjoint, each has its own slot."""
    return -(-entries // CHUNK)


def tile(
    rows: int, d: int, interpreted: bool, widest: int = 16384, size: int = 2048
) -> tuple[int, int]:
    """Rows and columns a program works on: `size` elements, many more where every program costs
    milliseconds.

    The columns are at most `widest`. Sums over entries do not depend on the number of rows. On a
    GPU a sum over columns does, where the rows are fewer than a tile's: more threads share them.
    """
    columns = min(triton.next_power_of_2(max(d, 16)), widest)
    room = max((1 << 17 if interpreted else size) // columns, 1)
    return min(triton.next_power_of_2(max(rows, 1)), room), columns


@triton.jit
def _entry(weight, source, entry, end):
    """The weights and rows [BL] of one entry of each segment, and where there is one to add."""
    live = entry < end
    row = tl.load(source + entry, mask=live, other=0).to(tl.int64)
    w = tl.load(weight + entry, mask=live, other=0.0)
    return w, row, live & (w != 0.0)


@triton.jit
def _row(table, aux, row, live, column, n, d, TABLES: tl.constexpr):
    """Rows [BL, BD] as float32."""
    second = row >= n
    place = (row - tl.where(second, n, 0))[:, None] * d + column[None, :]
    inside = live[:, None] & (column < d)[None, :]
    if TABLES == 1:
        return tl.load(table + place, mask=inside, other=0.0).to(tl.float32)
    rows = tl.load(table + place, mask=inside & (row < n)[:, None], other=0.0).to(tl.float32)
    return rows + tl.load(aux + place, mask=inside & second[:, None], other=0.0).to(tl.float32)


@triton.jit
def add_wide_entries(
    acc, tail, weight, source, table, aux, begin, end, column, beyond, n, d,
    TABLES: tl.constexpr, FLIGHT: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """Add weight[e] * row of source[e] for e in [begin, end), in order, to a row's two tiles.

    A source of n or more is the row source - n of `aux`, or where TABLES is 1 of `table` too.
    FLIGHT rows (1, 2 or 4) are asked for before the first is added: one at a time, a program would
    wait for memory most of the time. acc is [BL, BD] of the columns `column`; tail [BL, BT] of
    those `beyond`, if TAIL; begin and end are [BL].
    """
    for i in range(0, tl.max(end - begin, 0), FLIGHT):
        e = begin + i
        w0, row0, live0 = _entry(weight, source, e, end)
        if FLIGHT > 1:
            w1, row1, live1 = _entry(weight, source, e + 1, end)
        if FLIGHT > 2:
            w2, row2, live2 = _entry(weight, source, e + 2, end)
            w3, row3, live3 = _entry(weight, source, e + 3, end)
        rows0 = _row(table, aux, row0, live0, column, n, d, TABLES)
        if FLIGHT > 1:
            rows1 = _row(table, aux, row1, live1, column, n, d, TABLES)
        if FLIGHT > 2:
            rows2 = _row(table, aux, row2, live2, column, n, d, TABLES)
            rows3 = _row(table, aux, row3, live3, column, n, d, TABLES)
        if TAIL:
            tail0 = _row(table, aux, row0, live0, beyond, n, d, TABLES)
            if FLIGHT > 1:
                tail1 = _row(table, aux, row1, live1, beyond, n, d, TABLES)
            if FLIGHT > 2:
                tail2 = _row(table, aux, row2, live2, beyond, n, d, TABLES)
                tail3 = _row(table, aux, row3, live3, beyond, n, d, TABLES)
        acc += w0[:, None] * rows0
        if FLIGHT > 1:
            acc += w1[:, None] * rows1
        if FLIGHT > 2:
            acc += w2[:, None] * rows2
            acc += w3[:, None] * rows3
        if TAIL:
            tail += w0[:, None] * tail0
            if FLIGHT > 1:
                tail += w1[:, None] * tail1
            if FLIGHT > 2:
                tail += w2[:, None] * tail2
                tail += w3[:, None] * tail3
    return acc, tail


@triton.jit
def add_entries(
    acc, weight, source, table, aux, begin, end, column, n, d,
    TABLES: tl.constexpr = 1, FLIGHT: tl.constexpr = 4,
):  # fmt: skip
    """`add_wide_entries` for a row of one tile."""
    return add_wide_entries(
        acc, acc, weight, source, table, aux, begin, end, column, column, n, d, TABLES, FLIGHT,
        False,
    )[0]  # fmt: skip


@triton.jit
def add_partials(acc, partial, begin, end, column, d, CHUNK: tl.constexpr):
    """Add the full chunks of [begin, end). Returns acc and the first entries not yet added."""
    full = tl.where(end - begin > CHUNK, (end - begin) // CHUNK, 0)  # [BL]
    for i in range(0, tl.max(full, 0)):
        slot = (begin + i * CHUNK + CHUNK - 1) // CHUNK
        mask = (i < full)[:, None] & (column < d)[None, :]
        acc += tl.load(partial + slot[:, None] * d + column[None, :], mask=mask, other=0.0)
    return acc, begin + full * CHUNK


@triton.jit
def _chunk_kernel(
    weight, source, latents, offsets, table, aux, partial, entries, n, d, f,
    TABLES: tl.constexpr, CHUNK: tl.constexpr, BL: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    # A chunk [a, a + CHUNK) has slot ceil(a / CHUNK), so it contains the entry slot * CHUNK.
    slot = tl.program_id(0).to(tl.int64) * BL + tl.arange(0, BL)
    entry = slot * CHUNK
    valid = entry < entries
    latent = tl.load(latents + entry, mask=valid, other=0).to(tl.int64)
    valid = valid & (latent >= 0) & (latent < f)  # a GPU's indices may not have been checked yet
    latent = tl.where(valid, latent, 0)
    begin = tl.load(offsets + latent)
    end = tl.load(offsets + latent + 1)
    first = begin + tl.where(valid, (entry - begin) // CHUNK * CHUNK, 0)
    valid = valid & (end - begin > CHUNK) & (first + CHUNK <= end)
    last = tl.where(valid, first + CHUNK, first)
    column = tl.program_id(1) * BD + tl.arange(0, BD)
    acc = tl.zeros((BL, BD), tl.float32)
    acc = add_entries(acc, weight, source, table, aux, first, last, column, n, d, TABLES)
    tl.store(
        partial + slot[:, None] * d + column[None, :],
        acc,
        mask=valid[:, None] & (column < d)[None, :],
    )


def partial_sums(
    segments: Segments, weight: Tensor, source: Tensor, table: Tensor, aux: Tensor
) -> Tensor:
    """Sum the full chunks of long segments.

    Args:
        segments: the sorted entries, m of them.
        weight: [m] float32 in sorted order.
        source: [m] int32, a row of `table`, or n plus a row of `aux`.
        table: [n, d] contiguous, float32 or bfloat16.
        aux: [n, d] likewise; `table` itself where sources from n on are its rows again.

    An entry whose latent lies outside [0, f) belongs to no segment and is added to nothing.

    Returns:
        [ceil(m / CHUNK), d] float32; slots without a full chunk are not written, and not read by
        `add_partials`.
    """
    n, d = table.shape
    m = weight.numel()
    partial = torch.empty(max(slots(m), 1), d, dtype=torch.float32, device=table.device)
    if m > CHUNK:
        BL, BD = tile(slots(m), d, not table.is_cuda, 1024, 1024)
        _chunk_kernel[(triton.cdiv(slots(m), BL), triton.cdiv(d, BD))](
            weight, source, segments.latents, segments.offsets, table, aux, partial, m, n, d,
            segments.offsets.numel() - 1,
            TABLES=1 if aux is table else 2, CHUNK=CHUNK, BL=BL, BD=BD, enable_fp_fusion=True,
        )  # fmt: skip
    return partial
