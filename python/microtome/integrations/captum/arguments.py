"""captum's arguments, checked and brought into one form."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from microtome.errors import ArgumentError, ShapeError


@dataclass(frozen=True)
class Request:
    """What `attribute` was asked to do.

    Attributes:
        op: name for messages.
        single: whether inputs came as one tensor, and not as a tuple.
        inputs: [e, ...] each.
        baselines: like inputs, of e rows or of one that stands for all.
        players: [1 or e, m] int64 for each input, the player that each of its columns belongs to.
        features: [p] int64, the number that feature_mask gave each player, ascending.
        target: as given.
        extra: the additional arguments of the forward function.
    """

    op: str
    single: bool
    inputs: tuple[Tensor, ...]
    baselines: tuple[Tensor, ...]
    players: tuple[Tensor, ...]
    features: Tensor
    target: Any
    extra: tuple[Any, ...]

    @property
    def rows(self) -> int:
        return self.inputs[0].shape[0]

    def back(self, parts: Sequence[Tensor]) -> Tensor | tuple[Tensor, ...]:
        """One tensor for one tensor, a tuple for a tuple."""
        return parts[0] if self.single else tuple(parts)


def request(
    op: str, inputs: Any, baselines: Any, target: Any, extra: Any, feature_mask: Any
) -> Request:
    """Check the arguments of an `attribute` call.

    Raises:
        ArgumentError, ShapeError: inputs, baselines and feature_mask do not agree.
    """
    single = isinstance(inputs, Tensor)
    given = (inputs,) if single else tuple(inputs) if isinstance(inputs, tuple | list) else ()
    if not given or not all(isinstance(x, Tensor) and x.dim() for x in given):
        msg = (
            f"{op}: inputs must be a tensor [examples, ...] or a tuple of such tensors, got "
            f"{type(inputs).__name__}."
        )
        raise ArgumentError(msg)
    counts = {x.shape[0] for x in given}
    if len(counts) != 1 or 0 in counts:
        shapes = ", ".join(str(list(x.shape)) for x in given)
        msg = f"{op}: all inputs must have the same number of examples, at least 1, got {shapes}."
        raise ShapeError(msg)
    given = tuple(x.detach() for x in given)
    bases = _matched(op, "baselines", baselines, given, 0)
    behind = tuple(_baseline(op, b, x) for b, x in zip(bases, given, strict=True))
    players, features = _players(op, feature_mask, given)
    if extra is None:
        extra = ()
    extra = extra if isinstance(extra, tuple) else (extra,)
    return Request(op, single, given, behind, players, features, target, extra)


def _matched(op: str, name: str, value: Any, inputs: tuple[Tensor, ...], absent: Any) -> tuple:
    """One entry for each input."""
    if value is None:
        return (absent,) * len(inputs)
    value = value if isinstance(value, tuple | list) else (value,)
    if len(value) != len(inputs):
        msg = (
            f"{op}: {name} must have one entry for each of the {len(inputs)} inputs, got "
            f"{len(value)}."
        )
        raise ArgumentError(msg)
    return tuple(value)


def _baseline(op: str, base: Any, x: Tensor) -> Tensor:
    """[1 or e, ...] of the dtype and device of x."""
    number = isinstance(base, int | float)
    if not (number or isinstance(base, Tensor)):
        msg = f"{op}: a baseline must be a tensor or a number, got {type(base).__name__}."
        raise ArgumentError(msg)
    if isinstance(base, Tensor) and base.dim() and base.shape == x.shape[1:]:
        base = base[None]  # of one example, without the dimension that counts examples
    if number or base.dim() == 0:
        held = x.new_full((1, *x.shape[1:]), base)
    else:
        if base.shape[1:] != x.shape[1:] or base.shape[0] not in (1, x.shape[0]):
            msg = (
                f"{op}: a baseline must have the shape of its input {list(x.shape)}, or 1 in place "
                f"of the number of examples, got {list(base.shape)}."
            )
            raise ShapeError(msg)
        held = base.detach().to(x)
    if not x.dtype.is_floating_point:
        wanted = torch.as_tensor(base).double().to(held.device)
        if bool((held.double() != wanted).any()):
            msg = (
                f"{op}: the baseline cannot be held in the input's dtype {x.dtype}. Pass baselines "
                "that can, or inputs of a floating-point dtype."
            )
            raise ArgumentError(msg)
    return held


def _players(
    op: str, feature_mask: Any, inputs: tuple[Tensor, ...]
) -> tuple[tuple[Tensor, ...], Tensor]:
    """Which player holds each column, and the players' numbers in feature_mask."""
    if feature_mask is None:
        sizes = [math.prod(x.shape[1:]) for x in inputs]
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        masks = [torch.arange(at, at + m)[None] for at, m in zip(starts, sizes, strict=True)]
    else:
        given = _matched(op, "feature_mask", feature_mask, inputs, None)
        masks = [_mask(op, mask, x) for mask, x in zip(given, inputs, strict=True)]
    flat = torch.cat([mask.flatten() for mask in masks])
    if not len(flat):
        msg = f"{op}: the inputs have no elements, so there are no features. Pass non-empty inputs."
        raise ArgumentError(msg)
    features, players = torch.unique(flat, return_inverse=True)
    parts = players.split([mask.numel() for mask in masks])
    return tuple(p.reshape(m.shape) for p, m in zip(parts, masks, strict=True)), features


def _mask(op: str, mask: Any, x: Tensor) -> Tensor:
    """[1 or e, m] int64 on the CPU."""
    if not isinstance(mask, Tensor) or mask.dtype.is_floating_point or mask.dtype.is_complex:
        got = f"dtype {mask.dtype}" if isinstance(mask, Tensor) else type(mask).__name__
        msg = f"{op}: feature_mask must be integer tensors, one for each input, got {got}."
        raise ArgumentError(msg)
    shape = (1,) * (x.dim() - mask.dim()) + tuple(mask.shape)
    fits = mask.dim() <= x.dim() and all(a in (1, b) for a, b in zip(shape, x.shape, strict=True))
    if not fits:
        msg = (
            f"{op}: feature_mask must broadcast to its input {list(x.shape)}, got "
            f"{list(mask.shape)}."
        )
        raise ShapeError(msg)
    full = mask.detach().to("cpu", torch.int64).reshape(shape)
    return full.expand(shape[0], *x.shape[1:]).reshape(shape[0], -1)
