"""Join many patched runs to a base run from one table of what each of them changes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from microtome import _check, _native
from microtome._look import Look
from microtome.errors import ArgumentError, ShapeError
from microtome.ops._registry import Backend, Op, demanded_backend, triton_backend, why_not_common

REPLACE, ADD, ZERO, SCALE = range(4)

_ROWS = ("example", "start", "stop")
_TABLE = ("row", "position", "lo", "hi", "source", "op")
# Codes shared with csrc/cpu/patch_rows.h; a row, then an entry, has the first that applies.
_EXAMPLE, _SPAN, _TOTAL, _ROW, _POSITION, _COLUMNS, _OP, _SOURCE, _WIDTH = range(1, 10)


def patch_rows(
    base: Tensor,
    sources: Tensor,
    rows: Tensor,
    table: Tensor,
    factors: Tensor,
    total: int | None = None,
) -> Tensor:
    """Pack the tokens of n runs that differ from a base run where a table says so.

    Row r fills its stop - start packed tokens with base[example, start:stop]. Then each table
    entry, in order, changes columns lo .. hi - 1 of the token at `position` of row `row`:

        REPLACE  out = factor * src        ADD    out = out + factor * src
        ZERO     out = 0                   SCALE  out = out * factor

    where src[c] = sources[source, c] if the sources are as wide as the base, else
    sources[source, c - lo]. A product is rounded before it is added.

    Args:
        base: [b, t, w] float32 (float64 on the reference): activations of b runs; any stride
            between examples and tokens.
        sources: [S, w_s], dtype of base: what is put in.
        rows: [n, 3] int32 (example, start, stop), 0 <= start <= stop <= t.
        table: [m, 6] int32 (row, position, lo, hi, source, op), start <= position < stop,
            0 <= lo <= hi <= w; op is one of REPLACE, ADD, ZERO, SCALE. ZERO and SCALE ignore
            `source`. The mean of a site is put in by REPLACE with a source that holds it.
        factors: [m], dtype of base.
        total: T, where it is known: the sum over rows of stop - start. Saves reading `rows`.

    Returns:
        [T, w], dtype of base: the rows' tokens one after another.

    Raises:
        ShapeError, DtypeError, DeviceError: the letters above do not agree.
        ArgumentError: a row or an entry reaches outside its tensors, or total is not the sum. On a
            GPU a later call raises: such an entry changes nothing meanwhile, and what such rows
            move is arbitrary, or NaN.
        BackendError: a demanded backend cannot run these inputs.

    Not differentiable. Every backend gives the same bits. Writes T*w numbers once and reads them
    once; what is patched is read and written once more, out of the cache.

    Example:
        >>> import torch
        >>> base = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]])
        >>> rows, table = torch.tensor([[0, 1, 2]]), torch.tensor([[0, 1, 1, 2, 0, ADD]])
        >>> patch_rows(base, torch.tensor([[10.0]]), rows, table, torch.tensor([0.5]))
        tensor([[3., 9.]])
    """
    _check.shapes(
        "patch_rows", base=(base, "b t w"), sources=(sources, "S w_s"), factors=(factors, "m")
    )
    _check.columns("patch_rows", "rows", rows, _ROWS)
    _check.columns("patch_rows", "table", table, _TABLE, "m")
    if table.shape[0] != factors.shape[0]:
        msg = (
            f"patch_rows: factors must be [m] with m={table.shape[0]} as in table, "
            f"got shape {list(factors.shape)}."
        )
        raise ShapeError(msg)
    _check.dtype("patch_rows", (torch.float32, torch.float64), base=base)
    _check.same_dtype("patch_rows", base=base, sources=sources, factors=factors)
    _check.dtype("patch_rows", _check.INDICES, rows=rows, table=table)
    _check.device("patch_rows", base=base, sources=sources, rows=rows, table=table, factors=factors)
    if total is None:
        total = int((rows[:, 2] - rows[:, 1]).sum())
    if _check.readable(base) and not _checks_itself(base):
        check_tables(base, sources, rows, table, total)
    out: Tensor = _patch(base, sources, rows, table, factors, total)
    return out


def _checks_itself(base: Tensor) -> bool:
    """Whether the backend to come checks the tables: the reference and the C++ kernel do."""
    return base.device.type == "cpu" and demanded_backend() != "triton"


def patch_rows_reference(
    base: Tensor, sources: Tensor, rows: Tensor, table: Tensor, factors: Tensor, total: int
) -> Tensor:
    """Row by row, then entry by entry."""
    check_tables(base, sources, rows, table, total)
    out = base.new_empty(total, base.shape[2])
    token, at = [], 0  # the packed token at which position 0 of each row would lie
    for example, start, stop in rows.tolist():
        out[at : at + stop - start] = base[example, start:stop]
        token.append(at - start)
        at += stop - start
    for (row, position, lo, hi, source, op), factor in zip(table.tolist(), factors, strict=True):
        part = out[token[row] + position, lo:hi]
        if op in (REPLACE, ADD):
            from_ = lo if sources.shape[1] == base.shape[2] else 0
            src = factor * sources[source, from_ : from_ + hi - lo]
            part.copy_(src if op == REPLACE else part + src)
        elif op == ZERO:
            part.zero_()
        else:
            part.mul_(factor)
    return out


def check_tables(base: Tensor, sources: Tensor, rows: Tensor, table: Tensor, total: int) -> None:
    """Raise ArgumentError for the first row or table entry that reaches outside its tensors."""
    problems = _problems(base, sources, rows, table, total)
    if not bool(torch.cat([bad for _, bad in problems]).any()):
        return
    for code, bad in problems:
        if bool(bad.any()):
            raise_table(code, int(bad.nonzero()[0]), base, sources, rows, table, total)


def _problems(
    base: Tensor, sources: Tensor, rows: Tensor, table: Tensor, total: int
) -> list[tuple[int, Tensor]]:
    """What can be wrong: with which rows [n], or [1] with all, then with which entries [m]."""
    (b, t, w), (S, w_s), n = base.shape, sources.shape, rows.shape[0]
    example, start, stop = rows.long().unbind(1)  # each [n]
    row, position, lo, hi, source, op = table.long().unbind(1)  # each [m]
    if n:
        own = row.clamp(0, n - 1)
        outside = (position < start[own]) | (position >= stop[own])
    else:
        outside = torch.zeros_like(row, dtype=torch.bool)
    reads = (op == REPLACE) | (op == ADD)
    return [
        (_EXAMPLE, (example < 0) | (example >= b)),
        (_SPAN, (start < 0) | (start > stop) | (stop > t)),
        (_TOTAL, ((stop - start).sum() != total)[None]),
        (_ROW, (row < 0) | (row >= n)),
        (_POSITION, outside),
        (_COLUMNS, (lo < 0) | (lo > hi) | (hi > w)),
        (_OP, (op < REPLACE) | (op > SCALE)),
        (_SOURCE, reads & ((source < 0) | (source >= S))),
        (_WIDTH, reads & (hi - lo > w_s) & (w_s != w)),
    ]


def _look(
    look: Look, base: Tensor, sources: Tensor, rows: Tensor, table: Tensor, factors: Tensor,
    total: int,
) -> tuple[Any, ...]:  # fmt: skip
    """The tables with zeros for every row and entry that reaches outside: those do nothing."""
    given = base, sources, rows, table, total
    if look.now or total < 0 or (rows.shape[0] == 0 and (total or table.shape[0])):
        check_tables(*given)  # which waits; without rows the sizes alone say that it raises
        return base, sources, rows, table, factors, total
    problems = _problems(*given)
    text = dict.fromkeys((_EXAMPLE, _SPAN), f"in rows ({', '.join(_ROWS)}) ")
    text |= dict.fromkeys(range(_ROW, _WIDTH + 1), f"in table ({', '.join(_TABLE)}) ")
    look.wrong(
        "rows",
        [
            (bad, f"{text.get(code, '')}{_why(code, base, sources, rows, total)}, which fails")
            for code, bad in problems
        ],
    )
    of = dict(problems)
    stray = of[_EXAMPLE] | of[_SPAN]
    lost = torch.stack([of[code] for code in range(_ROW, _WIDTH + 1)]).any(0)
    rows, table = (x.masked_fill(bad[:, None], 0) for x, bad in ((rows, stray), (table, lost)))
    return base, sources, rows, table, factors, total


def raise_table(
    code: int, at: int, base: Tensor, sources: Tensor, rows: Tensor, table: Tensor, total: int
) -> None:
    """Raise ArgumentError for what `code` says of row `at`, or of table entry `at`."""
    if code == _TOTAL:
        tokens = int((rows[:, 2] - rows[:, 1]).sum())
        msg = f"patch_rows: total must be the sum of stop - start={tokens}, got {total}."
        raise ArgumentError(msg)
    why = _why(code, base, sources, rows, total)
    if code in (_EXAMPLE, _SPAN):
        msg = f"patch_rows: row {at} of rows ({', '.join(_ROWS)}) is {rows[at].tolist()}: {why}."
        raise ArgumentError(msg)
    entry = table[at].tolist()
    if code == _POSITION:
        start, stop = rows[entry[0], 1:].tolist()
        why = f"position must lie in the row's [start={start}, stop={stop})"
    msg = f"patch_rows: entry {at} of table ({', '.join(_TABLE)}) is {entry}: {why}."
    raise ArgumentError(msg)


def _why(code: int, base: Tensor, sources: Tensor, rows: Tensor, total: int) -> str:
    """What must hold and does not, as far as the sizes tell."""
    (b, t, w), (S, w_s) = base.shape, sources.shape
    return {
        _EXAMPLE: f"example must lie in [0, b={b})",
        _SPAN: f"0 <= start <= stop <= t={t} must hold",
        _TOTAL: f"total={total} must be the sum of stop - start",
        _ROW: f"row must lie in [0, n={rows.shape[0]})",
        _POSITION: "position must lie in the row's [start, stop)",
        _COLUMNS: f"0 <= lo <= hi <= w={w} must hold",
        _OP: "op must be REPLACE=0, ADD=1, ZERO=2 or SCALE=3",
        _SOURCE: f"source must lie in [0, S={S})",
        _WIDTH: f"hi - lo must be at most the width w_s={w_s} of the sources",
    }[code]


def _fake(
    base: Tensor, sources: Tensor, rows: Tensor, table: Tensor, factors: Tensor, total: int
) -> Tensor:
    return base.new_empty(total, base.shape[2])


def _cpu_patch(
    base: Tensor, sources: Tensor, rows: Tensor, table: Tensor, factors: Tensor, total: int
) -> Tensor:
    """csrc/cpu/patch_rows.cpp; base and sources are copied only if their last stride is not 1."""
    (b, t, w), (S, w_s) = base.shape, sources.shape
    base, sources = (x if x.stride(-1) == 1 else x.contiguous() for x in (base, sources))
    rows32, table32 = _native.saturated(rows), _native.saturated(table)
    factors, out = factors.contiguous(), _native.empty(max(total, 0), w)
    code, at = _native.module().patch_rows(
        base.data_ptr(), *base.stride()[:2], sources.data_ptr(), sources.stride(0),
        rows32.data_ptr(), table32.data_ptr(), factors.data_ptr(),
        (total, len(rows), len(table), b, t, w, S, w_s), out.data_ptr(), _native.threads(),
    )  # fmt: skip
    if code:
        raise_table(code, at, base, sources, rows, table, total)
    return out


def _why_not_cpu(*args: object) -> str | None:
    return why_not_common("cpu", [a for a in args if isinstance(a, Tensor)], (torch.float32,))


_patch = Op(
    patch_rows_reference,
    fake=_fake,
    backends=[
        triton_backend("microtome.kernels.patch_rows:launch", torch.float32),
        Backend("cpu", "microtome.ops.patch_rows:_cpu_patch", _why_not_cpu),
    ],
    looks=_look,
)
