"""What the two attention ops check of their inputs, and the words they say it in.

The C++ kernels make the checks of the index tables themselves and return a code and a row; the
functions here find the same code and row where another backend runs, and turn them into a message.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from microtome import _check
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
    Tq, T, b, t = sizes
    example, start, kv_at, kv_count, q_at, q_count = rows.long().unbind(1)  # each [n]
    if b:
        reach = first.long()[example.clamp(0, b - 1)].clamp_min(t)  # [n]
        wrong_example = (example < 0) | (example >= b)
    else:
        reach, wrong_example = torch.zeros_like(start), torch.zeros_like(start, dtype=torch.bool)
    # Rows laid over the queries: how many own each, and where the keys of the owner lie.
    spans = torch.stack([torch.ones_like(start), start, start + kv_count], 1)  # [n, 3]
    steps = rows.new_zeros(Tq + 1, 3, dtype=torch.int64)
    steps.index_add_(0, q_at.clamp(0, Tq), spans)
    steps.index_add_(0, (q_at + q_count).clamp(0, Tq), -spans)
    owners, low, high = steps.cumsum(0)[:Tq].unbind(1)  # each [Tq]
    problems = (
        (EXAMPLE, wrong_example),
        (START, (start < 0) | (start > reach)),
        (KEYS, (kv_at < 0) | (kv_count < 0) | (kv_at + kv_count > T)),
        (QUERIES, (q_at < 0) | (q_count < 0) | (q_at + q_count > Tq)),
        (COVER, owners != 1),
        (POSITION, (q_positions < low) | (q_positions >= high)),
    )
    if not bool(torch.cat([bad for _, bad in problems]).any()):
        return
    for code, bad in problems:
        if bool(bad.any()):
            at = int(bad.nonzero()[0])
            raise_cascade(code, at, rows, q_positions, first, sizes)


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
    Tq, T, b, t = sizes
    if code in (COVER, POSITION):
        if code == COVER:
            why = "each must belong to exactly one row of rows (q_at, q_count)"
        else:
            why = "its row must hold a key of its own there: start <= position < start + kv_count"
        position = int(q_positions[at])
        msg = f"cascade_attention: query {at} at position {position}: {why}."
        raise ArgumentError(msg)
    row = rows[at].tolist()
    if code == START and b == 0:
        why = "start must be 0, for k_base holds no example"
    else:
        why = {
            EXAMPLE: f"example must lie in [0, b={b})",
            START: f"start must lie in [0, t={t}], or up to first[example]",
            KEYS: f"kv_at .. kv_at + kv_count must lie in [0, T={T}]",
            QUERIES: f"q_at .. q_at + q_count must lie in [0, Tq={Tq}]",
        }[code]
    msg = f"cascade_attention: row {at} of rows ({', '.join(CASCADE)}) is {row}: {why}."
    raise ArgumentError(msg)


def check_swap(q: Tensor, rows: Tensor, total: int) -> None:
    """Raise ArgumentError for the first row of swap_key_attention that lies outside the base."""
    b, t = q.shape[:2]
    example, position, stop = rows.long().unbind(1)  # each [n]
    wrong_example = (example < 0) | (example >= b)
    wrong_span = (position < 0) | (position > stop) | (stop > t)
    tokens = (stop - position).sum()
    if not bool((wrong_example | wrong_span).any() | (tokens != total)):
        return
    for code, bad in ((EXAMPLE, wrong_example), (SPAN, wrong_span)):
        if bool(bad.any()):
            raise_swap(code, int(bad.nonzero()[0]), rows, (b, t), total)
    raise_swap(TOTAL, 0, rows, (b, t), total)


def raise_swap(code: int, at: int, rows: Tensor, sizes: tuple[int, int], total: int) -> None:
    """Raise ArgumentError for what `code` says of row `at`."""
    b, t = sizes
    if code == TOTAL:
        tokens = int((rows[:, 2] - rows[:, 1]).sum())
        msg = f"swap_key_attention: total must be the sum of stop - position={tokens}, got {total}."
        raise ArgumentError(msg)
    why = {
        EXAMPLE: f"example must lie in [0, b={b})",
        SPAN: f"0 <= position <= stop <= t={t} must hold",
    }[code]
    msg = f"swap_key_attention: row {at} of rows ({', '.join(SWAP)}) is {rows[at].tolist()}: {why}."
    raise ArgumentError(msg)


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
