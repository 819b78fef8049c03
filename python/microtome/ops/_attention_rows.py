"""What the two attention ops check of their inputs, and the words they say it in.

The C++ kernels make the checks of the index tables themselves and return a code and a row; the
functions here find the same code and row where another backend runs, and turn them into a message.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from microtome import _check
from microtome._look import Look
from microtome.errors import ArgumentError, ShapeError
from microtome.ops._registry import demanded_backend

CASCADE = ("example", "start", "kv_at", "kv_count", "q_at", "q_count")
SWAP = ("example", "position", "stop")

# Codes shared with csrc/cpu/cascade_attention.h; a row has the first that applies.
EXAMPLE, START, KEYS, QUERIES, COVER, POSITION = range(1, 7)
SPAN, TOTAL = 7, 8


def checks_itself(tensor: Tensor) -> bool:
    """Whether the backend to come checks index tables: the reference and the C++ kernels do."""
    return tensor.device.type == "cpu" and demanded_backend() != "triton"


def check_scalars(
    op: str, sizes: dict[str, int], scale: float, softcap: float, window: int
) -> None:
    """Raise unless heads divide, the scale is finite, and softcap and window are not negative."""
    h, hk = sizes["h"], sizes["hk"]
    if hk < 1 or h % hk:
        msg = (
            f"{op}: h={h} query heads must be a multiple of hk={hk} key heads. "
            "Head j of q uses key head j // (h / hk)."
        )
        raise ShapeError(msg)
    if not abs(scale) < math.inf:  # not isfinite: in a compiled graph scale may be a symbol
        msg = f"{op}: scale must be finite, got scale={scale}. Usual is 1 / sqrt(dh)."
        raise ArgumentError(msg)
    if not 0 <= softcap < math.inf:
        msg = f"{op}: softcap must be positive, or 0 for none, got softcap={softcap}."
        raise ArgumentError(msg)
    if window < 0:
        msg = f"{op}: window must be a number of keys, or 0 for all, got window={window}."
        raise ArgumentError(msg)


def check_cascade(
    q: Tensor, k: Tensor, k_base: Tensor, rows: Tensor, q_positions: Tensor, first: Tensor
) -> None:
    """Raise ArgumentError for the first row of cascade_attention that no answer exists for."""
    sizes = cascade_sizes(q, k, k_base)
    problems = _cascade_problems(rows, q_positions, first, sizes)
    if not bool(torch.cat([bad for _, bad in problems]).any()):
        return
    for code, bad in problems:
        if bool(bad.any()):
            at = int(bad.nonzero()[0])
            raise_cascade(code, at, rows, q_positions, first, sizes)


def _cascade_problems(
    rows: Tensor, q_positions: Tensor, first: Tensor, sizes: tuple[int, int, int, int]
) -> list[tuple[int, Tensor]]:
    """What can be wrong: with which rows [n], then with which queries [Tq]."""
    Tq, T, b, t = sizes
    example, start, kv_at, kv_count, q_at, q_count = rows.long().unbind(1)  # each [n]
    if b:
        reach = first.long()[example.clamp(0, b - 1)].clamp_min(t)  # [n]
        wrong_example = (example < 0) | (example >= b)
    else:
        reach, wrong_example = torch.zeros_like(start), torch.zeros_like(start, dtype=torch.bool)
    problems = [
        (EXAMPLE, wrong_example),
        (START, (start < 0) | (start > reach)),
        (KEYS, (kv_at < 0) | (kv_count < 0) | (kv_count > T - kv_at)),
        (QUERIES, (q_at < 0) | (q_count < 0) | (q_count > Tq - q_at)),
    ]
    # Rows laid over the queries: how many own each, and where the keys of the owner lie. Rows that
    # are wrong own none, so that no two of them make up for each other.
    stray = torch.stack([bad for _, bad in problems]).any(0)
    start, kv_count, q_at, q_count = (
        x.masked_fill(stray, 0) for x in (start, kv_count, q_at, q_count)
    )
    spans = torch.stack([torch.ones_like(start), start, start + kv_count], 1)  # [n, 3]
    steps = rows.new_zeros(Tq + 1, 3, dtype=torch.int64)
    steps.index_add_(0, q_at, spans)
    steps.index_add_(0, q_at + q_count, -spans)
    owners, low, high = steps.cumsum(0)[:Tq].unbind(1)  # each [Tq]
    return [
        *problems,
        (COVER, owners != 1),
        (POSITION, (q_positions < low) | (q_positions >= high)),
    ]


def look_cascade(
    look: Look, q: Tensor, k: Tensor, v: Tensor, k_base: Tensor, v_base: Tensor, rows: Tensor,
    q_positions: Tensor, first: Tensor, *rest: Any,
) -> tuple[Any, ...]:  # fmt: skip
    """The tables with zeros for every row that is wrong, which then has no queries, and position -1
    for every query, which then sees nothing."""
    if look.now or (rows.shape[0] == 0 and q.shape[0]):
        check_cascade(q, k, k_base, rows, q_positions, first)  # without rows it raises
        return q, k, v, k_base, v_base, rows, q_positions, first, *rest
    sizes = cascade_sizes(q, k, k_base)
    problems = _cascade_problems(rows, q_positions, first, sizes)
    text = dict.fromkeys((EXAMPLE, START, KEYS, QUERIES), f"in rows ({', '.join(CASCADE)}) ")
    text |= {COVER: "of the queries ", POSITION: "of the queries "}
    whys = [f"{text[code]}{_why_cascade(code, sizes)}, which fails" for code, _ in problems]
    look.wrong("rows", [(bad, why) for (_, bad), why in zip(problems, whys, strict=True)])
    stray, lost = (torch.stack(bad).any(0) for bad in _halves(problems))
    rows = rows.masked_fill(stray[:, None], 0)
    return q, k, v, k_base, v_base, rows, q_positions.masked_fill(lost, -1), first, *rest


def _halves(problems: list[tuple[int, Tensor]]) -> tuple[list[Tensor], list[Tensor]]:
    """The masks of rows, and those of queries."""
    masks = [bad for _, bad in problems]
    return masks[:-2], masks[-2:]


def cascade_sizes(q: Tensor, k: Tensor, k_base: Tensor) -> tuple[int, int, int, int]:
    """Tq, T, b, t."""
    return q.shape[0], k.shape[0], k_base.shape[0], k_base.shape[1]


def raise_cascade(
    code: int,
    at: int,
    rows: Tensor,
    q_positions: Tensor,
    first: Tensor,
    sizes: tuple[int, int, int, int],
) -> None:
    """Raise ArgumentError for what `code` says of row `at`, or of query `at`."""
    why = _why_cascade(code, sizes)
    if code in (COVER, POSITION):
        position = int(q_positions[at])
        msg = f"cascade_attention: query {at} at position {position}: {why}."
        raise ArgumentError(msg)
    row = rows[at].tolist()
    msg = f"cascade_attention: row {at} of rows ({', '.join(CASCADE)}) is {row}: {why}."
    raise ArgumentError(msg)


def _why_cascade(code: int, sizes: tuple[int, int, int, int]) -> str:
    """What must hold and does not."""
    Tq, T, b, t = sizes
    if code == START and b == 0:
        return "start must be 0, for k_base holds no example"
    return {
        EXAMPLE: f"example must lie in [0, b={b})",
        START: f"start must lie in [0, t={t}], or up to first[example]",
        KEYS: f"kv_at .. kv_at + kv_count must lie in [0, T={T}]",
        QUERIES: f"q_at .. q_at + q_count must lie in [0, Tq={Tq}]",
        COVER: "each must belong to exactly one row of rows (q_at, q_count)",
        POSITION: "its row must hold a key of its own there: start <= position < start + kv_count",
    }[code]


def check_swap(q: Tensor, rows: Tensor, total: int) -> None:
    """Raise ArgumentError for the first row of swap_key_attention that lies outside the base."""
    problems = _swap_problems(q, rows, total)
    if not bool(torch.cat([bad for _, bad in problems]).any()):
        return
    for code, bad in problems:
        if bool(bad.any()):
            raise_swap(code, int(bad.nonzero()[0]), rows, (q.shape[0], q.shape[1]), total)


def _swap_problems(q: Tensor, rows: Tensor, total: int) -> list[tuple[int, Tensor]]:
    """What can be wrong: with which rows [n], or [1] with all."""
    b, t = q.shape[:2]
    example, position, stop = rows.long().unbind(1)  # each [n]
    return [
        (EXAMPLE, (example < 0) | (example >= b)),
        (SPAN, (position < 0) | (position > stop) | (stop > t)),
        (TOTAL, ((stop - position).sum() != total)[None]),
    ]


def look_swap(look: Look, *args: Any) -> tuple[Any, ...]:
    """The arguments with zeros for every row that lies outside the base: it has no tokens then."""
    q, rows, total = args[2], args[8], args[-1]
    if look.now or total < 0 or (rows.shape[0] == 0 and total):
        check_swap(q, rows, total)  # without rows it raises
        return args
    problems, sizes = _swap_problems(q, rows, total), (q.shape[0], q.shape[1])
    text = dict.fromkeys((EXAMPLE, SPAN), f"in rows ({', '.join(SWAP)}) ")
    text[TOTAL] = f"total={total} "
    look.wrong(
        "rows",
        [(bad, f"{text[code]}{_why_swap(code, sizes)}, which fails") for code, bad in problems],
    )
    stray = problems[0][1] | problems[1][1]
    return *args[:8], rows.masked_fill(stray[:, None], 0), *args[9:]


def raise_swap(code: int, at: int, rows: Tensor, sizes: tuple[int, int], total: int) -> None:
    """Raise ArgumentError for what `code` says of row `at`."""
    why = _why_swap(code, sizes)
    if code == TOTAL:
        tokens = int((rows[:, 2] - rows[:, 1]).sum())
        msg = f"swap_key_attention: total {why}={tokens}, got {total}."
        raise ArgumentError(msg)
    msg = f"swap_key_attention: row {at} of rows ({', '.join(SWAP)}) is {rows[at].tolist()}: {why}."
    raise ArgumentError(msg)


def _why_swap(code: int, sizes: tuple[int, int]) -> str:
    """What must hold and does not."""
    b, t = sizes
    return {
        EXAMPLE: f"example must lie in [0, b={b})",
        SPAN: f"0 <= position <= stop <= t={t} must hold",
        TOTAL: "must be the sum of stop - position",
    }[code]


def check_tensors(
    op: str, floats: dict[str, tuple[Tensor, str]], integers: dict[str, tuple[Tensor, str]]
) -> dict[str, int]:
    """Shapes, dtypes and devices of both ops; the sizes of the letters."""
    sizes = _check.shapes(op, **floats, **integers)
    tensors = {name: tensor for name, (tensor, _) in floats.items()}
    tables = {name: tensor for name, (tensor, _) in integers.items()}
    _check.dtype(op, (torch.float32, torch.float64), **tensors)
    _check.same_dtype(op, **tensors)
    _check.dtype(op, _check.INDICES, **tables)
    _check.device(op, **tensors, **tables)
    return sizes
