"""Checks at the public edge: messages say what was asked, what came, what is allowed."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from microtome import _autocast
from microtome.errors import ArgumentError, DeviceError, DtypeError, NonFiniteError, ShapeError

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INDICES = (torch.int32, torch.int64)


def shapes(op: str, **named: tuple[Tensor | None, str]) -> dict[str, int]:
    """Match tensors against shape letters and return each letter's size.

    Args:
        op: name for the message.
        **named: argument name -> (tensor or None, letters such as "n d"); None is skipped.

    Returns:
        {"n": 4, "d": 16, ...}.

    Raises:
        DtypeError: what should be a tensor is none.
        ShapeError: a tensor has another number of dimensions, or a letter has two sizes.
    """
    sizes: dict[str, tuple[int, str]] = {}
    for name, (tensor, letters) in named.items():
        if tensor is None:
            continue
        names = letters.split()
        if not isinstance(tensor, Tensor):
            msg = f"{op}: {name} must be a tensor [{', '.join(names)}], got "
            msg += f"{type(tensor).__name__}. Make one with torch.as_tensor."
            raise DtypeError(msg)
        if tensor.dim() != len(names):
            msg = f"{op}: {name} must be [{', '.join(names)}], got shape {list(tensor.shape)}."
            raise ShapeError(msg)
        for letter, size in zip(names, tensor.shape, strict=True):
            seen = sizes.setdefault(letter, (size, name))
            if seen[0] != size:
                msg = (
                    f"{op}: {name} must be [{', '.join(names)}] with {letter}={seen[0]} "
                    f"as in {seen[1]}, got shape {list(tensor.shape)}."
                )
                raise ShapeError(msg)
    return {letter: size for letter, (size, _) in sizes.items()}


def columns(op: str, name: str, table: Tensor, what: Sequence[str], letter: str = "n") -> None:
    """Raise ShapeError unless an index table is [letter, columns] with one column for each name."""
    if table.dim() != 2 or table.shape[1] != len(what):
        msg = (
            f"{op}: {name} must be [{letter}, {len(what)}] = ({', '.join(what)}), "
            f"got shape {list(table.shape)}."
        )
        raise ShapeError(msg)


def dtype_name(dtype: torch.dtype) -> str:
    """`float32` for torch.float32."""
    return str(dtype).removeprefix("torch.")


def dtype(op: str, allowed: Sequence[torch.dtype], **tensors: Tensor | None) -> None:
    """Raise DtypeError unless each tensor's dtype, after autocast, is one of `allowed`."""
    for name, kind in _autocast.dtypes(op, tensors).items():
        if kind not in allowed:
            has = ", ".join(dtype_name(d) for d in allowed)
            msg = f"{op}: {name} must be {has}, got {dtype_name(kind)}. Cast it with .to()."
            raise DtypeError(msg)


def same_dtype(op: str, **tensors: Tensor | None) -> None:
    """Raise DtypeError unless all tensors share one dtype, after autocast."""
    present = _autocast.dtypes(op, tensors)
    if len(set(present.values())) > 1:
        got = ", ".join(f"{n} {dtype_name(d)}" for n, d in present.items())
        msg = f"{op}: all weights and inputs must share one dtype, got {got}. Cast them with .to()."
        raise DtypeError(msg)


def device(op: str, **tensors: Tensor | None) -> None:
    """Raise DeviceError, naming what to move where, unless all tensors lie on one device."""
    present = {name: t for name, t in tensors.items() if t is not None}
    if len({t.device for t in present.values()}) <= 1:
        return
    got = ", ".join(f"{name} {list(t.shape)} on {t.device}" for name, t in present.items())
    # The least is moved by going where most bytes are; nothing can be moved off "meta".
    held: dict[torch.device, int] = {}
    for t in present.values():
        held[t.device] = held.get(t.device, 0) + (0 if t.is_meta else t.nbytes + 1)
    target = max(held, key=lambda d: held[d])
    elsewhere = {name: t for name, t in present.items() if t.device != target}
    moves = [f"{name}.to({str(target)!r})" for name, t in elsewhere.items() if not t.is_meta]
    empty = [name for name, t in elsewhere.items() if t.is_meta]
    ways = [f"move with {', '.join(moves)}"] if moves else []
    if empty:
        ways.append(f"load {', '.join(empty)} on {target} (meta tensors hold no data)")
    way = " and ".join(ways)
    msg = f"{op}: all tensors must lie on one device, got {got}. {way[0].upper()}{way[1:]}."
    raise DeviceError(msg)


def whole(op: str, name: str, value: Any) -> int:
    """A whole number as an int, NumPy's and those of 0-d tensors too; else ArgumentError."""
    if isinstance(value, (int, torch.SymInt)):
        return value  # type: ignore[return-value]
    try:
        return operator.index(value)
    except TypeError:
        msg = f"{op}: {name} must be a whole number, got {name}={value!r}."
        raise ArgumentError(msg) from None


def between(op: str, name: str, value: int, low: int, high: int, high_name: str = "") -> None:
    """Raise ArgumentError unless value is a whole number and low <= value <= high."""
    value = whole(op, name, value)
    if not low <= value <= high:
        limit = f"{high_name}={high}" if high_name else str(high)
        msg = f"{op}: {name} must be between {low} and {limit}, got {name}={value}."
        raise ArgumentError(msg)


def one_of(op: str, name: str, value: str, allowed: Sequence[str]) -> None:
    """Raise ArgumentError unless value is one of allowed."""
    if value not in allowed:
        msg = f"{op}: {name} must be one of {', '.join(map(repr, allowed))}, got {value!r}."
        raise ArgumentError(msg)


def readable(tensor: Tensor) -> bool:
    """Whether a check at the public edge may read numbers: not in a graph, nor back from a GPU.

    There the op's body looks, or its kernel.
    """
    return not (torch.compiler.is_compiling() or tensor.is_cuda)


def index_range(
    op: str, indices: Tensor, size: int, letter: str = "f", name: str = "indices"
) -> None:
    """Raise ArgumentError unless every index lies in [0, size). One pass over `indices`."""
    if indices.numel() == 0:
        return
    low, high = (int(v) for v in torch.aminmax(indices))
    if low < 0 or high >= size:
        bad = low if low < 0 else high
        msg = f"{op}: {name} must lie in [0, {letter}={size}), got {bad}."
        raise ArgumentError(msg)


def finite_rows(op: str, name: str, tensor: Tensor) -> None:
    """Raise NonFiniteError naming the first rows of a matrix that hold NaN or infinity."""
    # A sum is finite only if every term is; overflow of a finite row is told apart below.
    if bool(
        torch.isfinite(
            tensor.sum(dtype=torch.float64 if tensor.dtype == torch.float64 else torch.float32)
        )
    ):
        return
    bad = (~torch.isfinite(tensor)).any(dim=-1).nonzero().flatten()
    if bad.numel():
        rows(op, name, bad)


def rows(op: str, name: str, bad: Tensor) -> None:
    """Raise NonFiniteError for the row numbers in `bad`."""
    first = ", ".join(str(int(i)) for i in bad[:5])
    more = f" and {bad.numel() - 5} more" if bad.numel() > 5 else ""
    msg = (
        f"{op}: {name} holds NaN or infinity in row {first}{more}. "
        f"Drop or repair these rows (torch.isfinite({name}).all(-1) finds them)."
    )
    raise NonFiniteError(msg)
