"""Which of a model's outputs is explained, for each row of a call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from microtome.errors import ArgumentError, ShapeError


def as_output(op: str, out: Any) -> Tensor:
    """What the forward function returned, as a tensor of at least one dimension.

    Raises:
        ArgumentError: it is neither a tensor nor a number.
    """
    out = getattr(out, "logits", out)
    if isinstance(out, Tensor):
        return out.detach().reshape(1) if out.dim() == 0 else out.detach()
    if isinstance(out, int | float):
        return torch.tensor([out], dtype=torch.float64)
    msg = f"{op}: forward_func must return a tensor or a number, got {type(out).__name__}."
    raise ArgumentError(msg)


def selected(op: str, out: Tensor, target: Any, who: Tensor, rows: int) -> Tensor:
    """The entries of `out` that `target` names.

    Args:
        op: name for messages.
        out: [R, ...].
        target: an integer or a tuple for all rows; a tensor or list with one for each of the e
            examples; or None.
        who: [R], which example each row belongs to.
        rows: e.

    Raises:
        ShapeError: target names entries that are not there.
    """
    if target is None:
        return out
    if isinstance(target, Tensor) and target.numel() == 1:
        target = int(target)
    if isinstance(target, int):
        target = (target,)
    if isinstance(target, tuple):
        if len(target) > out.dim() - 1:
            raise ShapeError(_too_deep(op, target, out))
        _within(op, [target], out)
        return out[(slice(None), *target)]
    if isinstance(target, Tensor):
        target = target.tolist()
    if not isinstance(target, list) or len(target) != rows:
        got = f"{len(target)}" if isinstance(target, list) else type(target).__name__
        msg = (
            f"{op}: target must be an integer, a tuple, or a list or tensor with one of them for "
            f"each of the {rows} examples, got {got}."
        )
        raise ArgumentError(msg)
    each = [t if isinstance(t, tuple) else (t,) for t in target]
    if len({len(t) for t in each}) != 1 or len(each[0]) > out.dim() - 1:
        raise ShapeError(_too_deep(op, target, out))
    _within(op, each, out)
    columns = torch.tensor(each, device=out.device)[who.to(out.device)]  # [R, depth]
    return out[(torch.arange(len(out), device=out.device), *columns.unbind(1))]


def _within(op: str, each: list[tuple[Any, ...]], out: Tensor) -> None:
    for one in each:
        for at, size in zip(one, out.shape[1:], strict=False):
            if isinstance(at, int) and not -size <= at < size:
                msg = (
                    f"{op}: target={one if len(one) > 1 else at} names an entry that is not there: "
                    f"forward_func returned shape {list(out.shape)} for {out.shape[0]} rows."
                )
                raise ShapeError(msg)


def _too_deep(op: str, target: Any, out: Tensor) -> str:
    return (
        f"{op}: target={target!r} cannot name an entry of outputs of shape {list(out.shape)}: it "
        f"may have at most {out.dim() - 1} indices, the same number for each example."
    )


def for_rows(extra: tuple[Any, ...], who: Tensor, rows: int) -> tuple[Any, ...]:
    """The additional arguments of each row: tensors with one entry an example are expanded."""
    return tuple(
        a[who.to(a.device)] if isinstance(a, Tensor) and a.dim() and a.shape[0] == rows else a
        for a in extra
    )
