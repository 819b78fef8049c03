"""Games whose players are stretches of a time series, of all channels or of each by itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from microtome import _check
from microtome.errors import ArgumentError, ShapeError
from microtome.shapley.game import MEMORY
from microtome.shapley.inputs import InputGame
from microtome.shapley.players import Players


def series_game(
    f: Any,
    x: Any,
    *,
    steps: int | Sequence[int] = 1,
    background: str | float | np.ndarray | Tensor = "mean",
    per_channel: bool = False,
    time_last: bool = False,
    channels: Sequence[str] | None = None,
    memory: int = MEMORY,
    check: bool = True,
) -> InputGame:
    """The game of one series: absent stretches of time are taken from a background series.

    Args:
        f: takes series [R, ...] of the layout, kind and dtype of x; returns [R] or [R, o]. Whole
            numbers become fractions where the background has some, as the mean has.
        x: [t] or [t, c], an array, a tensor or a DataFrame's values; [c, t] if `time_last`.
        steps: who plays: stretches of so many steps (the last may be shorter), or the places
            where a new stretch starts: [8, 20] makes 0-7, 8-19 and 20 to the end.
        background: "mean" (each channel's mean over time), a number, one number for each channel,
            a series like x, or several, [n, ...].
        per_channel: every channel's stretch plays by itself.
        time_last: the time is the last axis, as convolutions have it.
        channels: names of the c channels.
        memory: bytes of series in one call of f.
        check: call f twice on x, to find out whether it is deterministic.

    Returns:
        A game of one explicand, for any estimator.

    Raises:
        ShapeError: x or its background have another shape.
        ArgumentError: no step, or stretches that do not lie in the series.

    Example:
        >>> import torch
        >>> x = torch.tensor([1.0, 2.0, 3.0, 4.0])
        >>> series_game(lambda a: a[:, -1] - a[:, 0], x, steps=2).players.names
        ('0-1', '2-3')
    """
    op = "series_game"
    raw = x.detach() if isinstance(x, Tensor) else np.asarray(x)
    if raw.ndim not in (1, 2) or 0 in raw.shape:
        msg = (
            f"{op}: x must be [t] or [t, c], or [c, t] with time_last=True, got shape "
            f"{list(raw.shape)}. Pass one series at a time."
        )
        raise ShapeError(msg)
    seen = raw.cpu().double().numpy() if isinstance(raw, Tensor) else raw.astype(np.float64)
    seen = seen[:, None] if raw.ndim == 1 else seen.T if time_last else seen  # [t, c]
    t, c = seen.shape
    bounds = _bounds(op, steps, t)
    if channels is not None and len(channels) != c:
        msg = f"{op}: channels must name c={c} channels, got {len(channels)} names."
        raise ArgumentError(msg)
    named = tuple(map(str, channels)) if channels is not None else tuple(map(str, range(c)))
    starts, ends = bounds[:-1], bounds[1:]
    stretches = [
        str(s) if e == s + 1 else f"{s}-{e - 1}" for s, e in zip(starts, ends, strict=True)
    ]
    which = np.repeat(np.arange(len(stretches)), np.diff(bounds))[:, None]  # [t, 1]
    if per_channel:
        which = np.arange(c) * len(stretches) + which
        names = tuple(f"{channel} {stretch}" for channel in named for stretch in stretches)
    else:
        which = np.repeat(which, c, 1)
        names = tuple(stretches)
    which = which[:, 0] if raw.ndim == 1 else which.T if time_last else which
    player = torch.tensor(np.ascontiguousarray(which, dtype=np.int32).reshape(-1))
    view = {"series": seen, "bounds": bounds, "channels": named, "per_channel": per_channel}
    rows = _background(op, background, raw, time_last)
    return InputGame(
        f, raw[None], rows, groups=(Players(names, "series", None, view), player), memory=memory,
        check=check, op=op,
    )  # fmt: skip


def _bounds(op: str, steps: int | Sequence[int], t: int) -> list[int]:
    if isinstance(steps, int):
        if steps < 1:
            msg = f"{op}: steps must be at least 1, got steps={steps}."
            raise ArgumentError(msg)
        return [*range(0, t, steps), t]
    inner = [int(s) for s in steps if s not in (0, t)]
    if any(not 0 < s < t for s in inner) or inner != sorted(set(inner)):
        msg = f"{op}: steps must rise between 0 and t={t}, got {list(steps)}."
        raise ArgumentError(msg)
    return [0, *inner, t]


def _background(op: str, background: Any, raw: Any, time_last: bool) -> Any:
    """[n, ...] of the kind of x."""
    time = raw.ndim - 1 if time_last else 0
    if isinstance(background, str):
        _check.one_of(op, "background", background, ("mean",))
        if isinstance(raw, Tensor):
            real = raw.dtype if raw.is_floating_point() else torch.get_default_dtype()
            mean = raw.double().mean(time, keepdim=True).to(real)
            return mean.expand(raw.shape)[None].contiguous()
        mean = raw.mean(time, keepdims=True)
        mean = mean.astype(raw.dtype) if raw.dtype.kind == "f" else mean
        return np.broadcast_to(mean, raw.shape)[None]
    back = background.cpu().numpy() if isinstance(background, Tensor) else np.asarray(background)
    shape = tuple(raw.shape)
    if back.ndim == 1 and raw.ndim == 2 and len(back) == shape[1 - time]:
        back = np.expand_dims(back, time)
    if back.ndim == 0 or (back.ndim == raw.ndim == 2 and back.shape[time] == 1):
        back = np.broadcast_to(back, shape)
    if back.shape == shape:
        back = back[None]
    if back.shape[1:] != shape or len(back) == 0:
        letters = ", ".join(map(str, shape))
        msg = (
            f"{op}: background must be 'mean', a number, one for each channel, or series "
            f"[{letters}] or [n, {letters}], got shape {list(back.shape)}."
        )
        raise ShapeError(msg)
    if isinstance(raw, Tensor):
        found = torch.tensor(np.ascontiguousarray(back))
        whole = found.is_floating_point() and not raw.is_floating_point()
        return found.to(torch.get_default_dtype() if whole else raw.dtype)
    return back if back.dtype.kind == "f" and raw.dtype.kind != "f" else back.astype(raw.dtype)
