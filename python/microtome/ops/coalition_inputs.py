"""Write the inputs of many coalitions: a player in it brings the explicand's columns."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from microtome import _check, _native
from microtome._look import Look
from microtome.errors import ArgumentError, ShapeError
from microtome.ops._registry import Backend, Op, demanded_backend, triton_backend, why_not_common

_COLUMNS = ("explicand", "background", "order", "lo", "hi")
_DTYPES = (
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
)
# What can be wrong with a row, shared with csrc/cpu/coalition_inputs.h; the lowest is named.
_EXPLICAND, _BACKGROUND, _ORDER, _SPAN, _PLAYER = range(1, 6)


def coalition_inputs(
    x: Tensor, background: Tensor, ranks: Tensor, rows: Tensor, player: Tensor | None = None
) -> Tensor:
    """Write an input per coalition: its players bring columns of x, the rest is background.

        out[r, c] = x[explicand, c]           if lo <= ranks[order, player[c]] < hi
                    background[background, c] otherwise

    where rows[r] = (explicand, background, order, lo, hi): a coalition is a span of an order.

    Args:
        x: [e, m] float32, float64, bfloat16, float16, int64, int32, uint8 or bool: the rows to
            explain.
        background: [n, m], dtype of x: what stands in for players that are absent.
        ranks: [q, p] int32 or int64; ranks[i, j] is the place of player j in order i, 0 first. Not
            checked to be permutations: any number is compared with lo and hi as it is.
        rows: [R, 5] int32 or int64, (explicand, background, order, lo, hi), 0 <= lo <= hi <= p.
        player: [m] int32 or int64, the player that each column belongs to, in [0, p), or -1 for a
            column that always comes from x. None: p = m, and column c is player c.

    Returns:
        [R, m], dtype of x.

    Raises:
        ShapeError, DtypeError, DeviceError: the letters above do not agree.
        ArgumentError: a row or a player reaches outside its tensors. On a GPU a later call raises;
            such a row is background row 0 meanwhile, such a player's column comes from x.
        BackendError: a demanded backend cannot run these inputs.

    Not differentiable. Moves bits: every backend gives the same, NaN included. Writes R*m items
    once; what it reads stays in the cache, and no mask is formed. Rows that share an order are best
    neighbours.
    Source: Strumbelj and Kononenko 2014, doi:10.1007/s10115-013-0679-x.

    Example:
        >>> import torch
        >>> x, background = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[0.0, 0.0, -1.0]])
        >>> ranks = torch.tensor([[2, 0, 1]], dtype=torch.int32)  # player 1, then 2, then 0
        >>> rows = torch.tensor([[0, 0, 0, 0, 1], [0, 0, 0, 1, 3]], dtype=torch.int32)
        >>> coalition_inputs(x, background, ranks, rows)
        tensor([[ 0.,  2., -1.],
                [ 1.,  0.,  3.]])
    """
    op = "coalition_inputs"
    sizes = _check.shapes(
        op,
        x=(x, "e m"),
        background=(background, "n m"),
        ranks=(ranks, "q p"),
        player=(player, "m"),
    )
    _check.columns(op, "rows", rows, _COLUMNS, "R")
    if player is None and sizes["p"] != sizes["m"]:
        msg = (
            f"{op}: ranks must be [q, p] with p=m={sizes['m']} where player is None, got shape "
            f"{list(ranks.shape)}. Name the player of each column with player=."
        )
        raise ShapeError(msg)
    _check.dtype(op, _DTYPES, x=x)
    _check.same_dtype(op, x=x, background=background)
    _check.dtype(op, _check.INDICES, ranks=ranks, rows=rows, player=player)
    _check.device(op, x=x, background=background, ranks=ranks, rows=rows, player=player)
    if _check.readable(x) and not _checks_itself(x):
        check_tables(x, background, ranks, rows, player)
    out: Tensor = _inputs(x, background, ranks, rows, player)
    return out


def _checks_itself(x: Tensor) -> bool:
    """Whether the backend to come checks the rows: the reference and the C++ kernel do."""
    return x.device.type == "cpu" and demanded_backend() not in ("triton", "cuda")


def coalition_inputs_reference(
    x: Tensor, background: Tensor, ranks: Tensor, rows: Tensor, player: Tensor | None
) -> Tensor:
    """A block of rows at a time, so that no mask as large as the answer is formed."""
    check_tables(x, background, ranks, rows, player)
    out = x.new_empty(rows.shape[0], x.shape[1])
    block = max(1, (1 << 20) // max(1, x.shape[1]))
    for part, into in zip(torch.split(rows.long(), block), torch.split(out, block), strict=True):
        explicand, behind, order, lo, hi = part.unbind(1)  # each [block]
        place = ranks[order]  # [block, p]
        present = (place >= lo[:, None]) & (place < hi[:, None])
        if player is not None:
            always = present.new_ones(len(part), 1)  # read by index -1
            present = torch.cat([present, always], 1)[:, player.long()]  # [block, m]
        torch.where(present, x[explicand], background[behind], out=into)
    return out


def check_tables(
    x: Tensor, background: Tensor, ranks: Tensor, rows: Tensor, player: Tensor | None
) -> None:
    """Raise ArgumentError for the first column's player, then row, that reaches outside."""
    if player is not None:
        outside = _strange(player, ranks)
        if bool(outside.any()):
            raise_table(_PLAYER, int(outside.nonzero()[0]), x, background, ranks, rows, player)
    problems = _problems(x, background, ranks, rows)
    bad = problems.any(0)
    if bool(bad.any()):
        at = int(bad.nonzero()[0])
        code = int(problems[:, at].nonzero()[0]) + _EXPLICAND
        raise_table(code, at, x, background, ranks, rows, player)


def _problems(x: Tensor, background: Tensor, ranks: Tensor, rows: Tensor) -> Tensor:
    """[4, R]: what can be wrong with a row, by code, _EXPLICAND first."""
    (q, p), e, n = ranks.shape, x.shape[0], background.shape[0]
    explicand, behind, order, lo, hi = rows.unbind(1)  # each [R]
    return torch.stack(
        [
            (explicand < 0) | (explicand >= e),
            (behind < 0) | (behind >= n),
            (order < 0) | (order >= q),
            (lo < 0) | (lo > hi) | (hi > p),
        ]
    )


def _strange(player: Tensor, ranks: Tensor) -> Tensor:
    """[m]: which columns have a player that does not exist."""
    return (player < -1) | (player >= ranks.shape[1])


def _look(
    look: Look, x: Tensor, background: Tensor, ranks: Tensor, rows: Tensor, player: Tensor | None
) -> tuple[Any, ...]:
    """The tables with zeros for every row that reaches outside, and -1 for every such player."""
    given = x, background, ranks, rows, player
    if look.now or (rows.shape[0] and 0 in (x.shape[0], background.shape[0], ranks.shape[0])):
        check_tables(*given)  # which waits; where there is nothing to number it raises
        return given
    if player is not None:
        strange = _strange(player, ranks)
        look.wrong("player", [(strange, f"{_why(_PLAYER, *given[:3])}, and does not")])
        player = player.masked_fill(strange, -1)
    problems = _problems(x, background, ranks, rows)
    text = f"in rows ({', '.join(_COLUMNS)}) "
    look.wrong(
        "rows",
        [
            (bad, f"{text}{_why(code, *given[:3])}, which fails")
            for code, bad in enumerate(problems, _EXPLICAND)
        ],
    )
    return x, background, ranks, rows.masked_fill(problems.any(0)[:, None], 0), player


def raise_table(
    code: int,
    at: int,
    x: Tensor,
    background: Tensor,
    ranks: Tensor,
    rows: Tensor,
    player: Tensor | None,
) -> None:
    """Raise ArgumentError for what `code` says of row `at`, or of the player of column `at`."""
    why = _why(code, x, background, ranks)
    if code == _PLAYER and player is not None:
        msg = f"coalition_inputs: {why}, got {int(player[at])} for column {at}."
        raise ArgumentError(msg)
    msg = (
        f"coalition_inputs: row {at} of rows ({', '.join(_COLUMNS)}) is {rows[at].tolist()}: {why}."
    )
    raise ArgumentError(msg)


def _why(code: int, x: Tensor, background: Tensor, ranks: Tensor) -> str:
    """What must hold and does not."""
    q, p = ranks.shape
    return {
        _EXPLICAND: f"explicand must lie in [0, e={x.shape[0]})",
        _BACKGROUND: f"background must lie in [0, n={background.shape[0]})",
        _ORDER: f"order must lie in [0, q={q})",
        _SPAN: f"0 <= lo <= hi <= p={p} must hold",
        _PLAYER: f"player must lie in [-1, p={p})",
    }[code]


def _fake(
    x: Tensor, background: Tensor, ranks: Tensor, rows: Tensor, player: Tensor | None
) -> Tensor:
    return x.new_empty(rows.shape[0], x.shape[1])


def _cpu_inputs(
    x: Tensor, background: Tensor, ranks: Tensor, rows: Tensor, player: Tensor | None
) -> Tensor:
    """csrc/cpu/coalition_inputs.cpp; x and background are copied only if columns lie apart."""
    (e, m), n, (q, p), R = x.shape, background.shape[0], ranks.shape, rows.shape[0]
    x, background = _native.rows(x), _native.rows(background)
    ranks32, rows32 = _native.saturated(ranks), _native.saturated(rows)
    player32 = None if player is None else _native.saturated(player)
    out = _native.empty(R, m, dtype=x.dtype)
    code, at = _native.module().coalition_inputs(
        x.data_ptr(), x.stride(0), background.data_ptr(), background.stride(0),
        ranks32.data_ptr(), rows32.data_ptr(), _native.address(player32),
        e, n, q, p, m, R, x.itemsize, out.data_ptr(), _native.forced_isa(), _native.threads(),
    )  # fmt: skip
    if code:
        raise_table(code, at, x, background, ranks, rows, player)
    return out


def _cuda_inputs(
    x: Tensor, background: Tensor, ranks: Tensor, rows: Tensor, player: Tensor | None
) -> Tensor:
    """csrc/cuda/coalition_inputs.cu: 16 bytes at a time where rows start at multiples of that."""
    x, background = x.contiguous(), background.contiguous()
    tables = [_native.saturated(t) for t in (ranks, rows)]
    player32 = None if player is None else _native.saturated(player)
    out = torch.empty(rows.shape[0], x.shape[1], dtype=x.dtype, device=x.device)
    with _native.device_of(x):
        _native.cuda().coalition_inputs(
            x.itemsize, x.data_ptr(), background.data_ptr(), *(t.data_ptr() for t in tables),
            _native.address(player32), x.shape[1], ranks.shape[1], rows.shape[0], out.data_ptr(),
            _native.stream(x),
        )  # fmt: skip
    return out


def _why_not_cuda(*args: object) -> str | None:
    return why_not_common("cuda", [a for a in args if isinstance(a, Tensor)], _DTYPES)


def _why_not_cpu(*args: object) -> str | None:
    return why_not_common("cpu", [a for a in args if isinstance(a, Tensor)], _DTYPES)


_inputs = Op(
    coalition_inputs_reference,
    fake=_fake,
    backends=[
        Backend("cuda", f"{__name__}:_cuda_inputs", _why_not_cuda, on_demand=True),
        triton_backend("microtome.kernels.coalition_inputs:launch", *_DTYPES),
        Backend("cpu", f"{__name__}:_cpu_inputs", _why_not_cpu),
    ],
    looks=_look,
)
