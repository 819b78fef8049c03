"""Games whose players are the superpixels of an image."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from microtome import _check
from microtome.errors import ArgumentError, NonFiniteError, PackageError, ShapeError
from microtome.shapley.game import MEMORY
from microtome.shapley.inputs import InputGame
from microtome.shapley.players import Players

_SEGMENTS = 64
_ROUND = 512  # rows between two looks at the clock; fixed, since results depend on it
_BLUR = 1 / 12  # of the shorter side: the standard deviation of the blurred background
_CHANNELS = (1, 3, 4)


def image_game(
    f: Any,
    image: Any,
    *,
    segments: int | str | np.ndarray | Tensor | Callable[[np.ndarray], Any] | None = None,
    background: str | float | np.ndarray | Tensor = "blur",
    channels_last: bool | None = None,
    memory: int = MEMORY,
    check: bool = True,
) -> InputGame:
    """The game of one image: absent superpixels are taken from a background image.

    Args:
        f: takes images [R, ...] of the image's own layout, kind and dtype; returns [R] or [R, o].
        image: [h, w], [h, w, c] or [c, h, w], an array, a tensor, or a PIL image.
        segments: who plays. A number of superpixels, about 64 by default: found by scikit-image's
            SLIC where it is installed and finds at least a quarter of them, else cells of a grid.
            "slic" or "grid" says which. Or [h, w] integers, the superpixel of every pixel (pixels
            of negative numbers are always there), or a function from the image [h, w, c] to them.
        background: "blur", "mean" (one colour), "segments" (the mean colour of each), a number, a
            colour [c], an image like `image`, or several, [n, ...].
        channels_last: where the channels are. By default last in arrays and first in tensors,
            unless only one of the two has 1, 3 or 4.
        memory: bytes of images in one call of f.
        check: call f twice on the image, to find out whether it is deterministic.

    Returns:
        A game of one explicand, for any estimator.

    Raises:
        ShapeError: the image, its segments or its background have another shape.
        ArgumentError: an unknown option, or no superpixel.
        NonFiniteError: the image holds NaN or infinity.
        PackageError: segments="slic" without scikit-image.

    A superpixel's value depends on the background: a blurred image keeps its colours, which a model
    may live on; a grey one is an edge to it.

    Example:
        >>> image = np.zeros((8, 8)); image[:4] = 1
        >>> game = image_game(lambda a: a.mean((1, 2)), image, segments="grid", background=0)
        >>> game.ends()[1]
        tensor([[0.5000]], dtype=torch.float64)
    """
    op = "image_game"
    array, last, raw = _image(op, image, channels_last)  # [h, w, c]
    found = _segments(op, segments, array)
    names, owner = np.unique(found[found >= 0], return_inverse=True)
    if len(names) == 0:
        msg = f"{op}: all segments are negative, so no pixel plays. Number them from 0."
        raise ArgumentError(msg)
    numbered = np.full(found.shape, -1, np.int32)
    numbered[found >= 0] = owner
    rows = _background(op, background, array, numbered, image, last)  # [n, h, w, c]

    def layout(a: np.ndarray) -> np.ndarray:
        """[..., h, w, c] as the image has it."""
        if raw.ndim == 2:
            return a[..., 0]
        return a if last else np.moveaxis(a, -1, -3)

    whose = layout(np.broadcast_to(numbered[:, :, None], array.shape))
    player = torch.tensor(np.ascontiguousarray(whose).reshape(-1))
    back = torch.tensor(np.ascontiguousarray(layout(rows)))
    if isinstance(image, Tensor):
        x: Any = image.detach()[None]
        b: Any = back.to(image.dtype)
    else:
        x, b = raw[None], back.numpy().astype(raw.dtype)
    view = {"image": to_show(array), "segments": numbered}
    players = Players(tuple(f"segment {j}" for j in names.tolist()), "image", None, view)
    game = InputGame(f, x, b, groups=(players, player), memory=memory, check=check, op=op)
    game.rows_per_round = _ROUND
    return game


def _image(op: str, image: Any, channels_last: bool | None) -> tuple[np.ndarray, bool, np.ndarray]:
    """[h, w, c], whether channels are last, and the array as it came."""
    raw = image.detach().cpu() if isinstance(image, Tensor) else np.asarray(image)
    if isinstance(raw, Tensor):
        raw = (raw.float() if raw.dtype == torch.bfloat16 else raw).numpy()
    if raw.ndim not in (2, 3) or raw.size == 0 or raw.dtype.kind not in "buif":
        what = "" if raw.dtype.kind in "buif" else f" of {raw.dtype}"
        msg = (
            f"{op}: image must be [h, w], [h, w, c] or [c, h, w], got shape {list(raw.shape)}"
            f"{what}. Pass one image at a time."
        )
        raise ShapeError(msg)
    if raw.dtype.kind == "f" and not np.isfinite(raw).all():
        count = int((~np.isfinite(raw)).sum())
        msg = f"{op}: image holds NaN or infinity in {count} places. Fill them in, then explain it."
        raise NonFiniteError(msg)
    if raw.ndim == 2:
        return raw[:, :, None], True, raw
    if channels_last is None:
        first, last = (raw.shape[axis] in _CHANNELS for axis in (0, 2))
        if not first and not last:
            msg = (
                f"{op}: neither end of the image's shape {list(raw.shape)} is 1, 3 or 4 channels. "
                "Pass channels_last=True or False."
            )
            raise ShapeError(msg)
        channels_last = not isinstance(image, Tensor) if first and last else last
    return (raw if channels_last else np.moveaxis(raw, 0, -1)), channels_last, raw


def _segments(op: str, segments: Any, array: np.ndarray) -> np.ndarray:
    """[h, w] integers."""
    h, w = array.shape[:2]
    if segments is None or isinstance(segments, str | int):
        how = segments if isinstance(segments, str) else "auto"
        _check.one_of(op, "segments", how, ("auto", "grid", "slic"))
        count = segments if isinstance(segments, int) else _SEGMENTS
        if count < 1:
            msg = f"{op}: segments must be at least 1 superpixel, got segments={count}."
            raise ArgumentError(msg)
        found = None if how == "grid" else _slic(op, array, count, demanded=how == "slic")
        # SLIC joins what it cannot tell apart: noise and plain colour end as a single superpixel.
        if found is None or (how == "auto" and 4 * len(np.unique(found)) < count):
            return grid(h, w, count)
        return found
    found = segments(array) if callable(segments) else segments
    found = found.cpu().numpy() if isinstance(found, Tensor) else np.asarray(found)
    if found.shape != (h, w) or found.dtype.kind not in "biu":
        whose = "the function returned" if callable(segments) else "got"
        msg = (
            f"{op}: segments must be [{h}, {w}] integers, one for each pixel, {whose} "
            f"{list(found.shape)} of {found.dtype}."
        )
        raise ShapeError(msg)
    return found.astype(np.int64)


def grid(h: int, w: int, count: int) -> np.ndarray:
    """[h, w] integers: about `count` cells as square as they get, row by row."""
    down = min(h, max(1, round((count * h / w) ** 0.5)))
    across = min(w, max(1, round(count / down)))
    rows, columns = np.arange(h) * down // h, np.arange(w) * across // w
    return rows[:, None] * across + columns


def _slic(op: str, array: np.ndarray, count: int, *, demanded: bool) -> np.ndarray | None:
    try:
        slic = importlib.import_module("skimage.segmentation").slic
    except ImportError as error:
        if not demanded:
            return None
        msg = f"{op}: segments='slic' needs scikit-image. Install it, or pass segments='grid'."
        raise PackageError(msg) from error
    seen = to_show(array)
    colours = seen if seen.shape[2] == 3 else seen[:, :, :1]
    return slic(colours, n_segments=count, compactness=10.0, start_label=0, channel_axis=-1)


def to_show(array: np.ndarray) -> np.ndarray:
    """[h, w, 1 or 3] float64 in [0, 1], to be shown: scaled if it was not so before."""
    out = array[:, :, : 3 if array.shape[2] >= 3 else 1].astype(np.float64)
    if array.dtype == np.uint8:
        return out / 255
    low, high = float(out.min()), float(out.max())
    if low >= 0 and high <= 1:
        return out
    if low >= 0 and high <= 255 and high > 2:
        return out / 255
    return (out - low) / max(high - low, 1e-30)


def _background(
    op: str, background: Any, array: np.ndarray, segments: np.ndarray, image: Any, last: bool
) -> np.ndarray:
    """[n, h, w, c], in the image's dtype."""
    whole = array.dtype.kind in "bui"
    base = array.astype(np.float64)
    c = array.shape[2]
    if isinstance(background, str):
        _check.one_of(op, "background", background, ("blur", "mean", "segments"))
        if background == "blur":
            out = blurred(base, _BLUR * min(base.shape[:2]))[None]
        elif background == "mean":
            out = np.broadcast_to(base.mean((0, 1)), base.shape)[None]
        else:
            out = mean_colours(base, segments)[None]
        return (np.rint(out) if whole else out).astype(array.dtype)
    back = background.detach().cpu() if isinstance(background, Tensor) else np.asarray(background)
    if isinstance(back, Tensor):
        back = (back.float() if back.dtype == torch.bfloat16 else back).numpy()
    if whole and back.dtype.kind == "f" and bool((back != np.rint(back)).any()):
        msg = (
            f"{op}: background holds fractions, and the image is {array.dtype}. Give whole numbers "
            "in the image's range, or the image as floats (image / 255)."
        )
        raise ArgumentError(msg)
    like = tuple(image.shape) if isinstance(image, Tensor) else np.asarray(image).shape
    if back.ndim == 0 or back.shape == (c,):
        return np.broadcast_to(back, array.shape)[None].astype(array.dtype)
    if back.shape == like:
        back = back[None]
    if back.shape[1:] != like or len(back) == 0:
        shape = ", ".join(map(str, like))
        msg = (
            f"{op}: background must be 'blur', 'mean', 'segments', a number, a colour [{c}], or "
            f"images [{shape}] or [n, {shape}], got shape {list(back.shape)}."
        )
        raise ShapeError(msg)
    if len(like) == 2:
        back = back[..., None]
    elif not last:
        back = np.moveaxis(back, -3, -1)
    return back.astype(array.dtype)


def mean_colours(base: np.ndarray, segments: np.ndarray) -> np.ndarray:
    """[h, w, c] with each segment 0, 1, ... in its mean colour; other pixels as they were."""
    out = base.copy()
    held = segments >= 0
    numbers = segments[held]
    count = np.bincount(numbers)
    for c in range(base.shape[2]):
        total = np.bincount(numbers, base[..., c][held])
        out[..., c][held] = (total / count)[numbers]
    return out


def blurred(base: np.ndarray, sigma: float) -> np.ndarray:
    """[h, w, c] smoothed by a Gaussian of `sigma` pixels, edges repeated."""
    reach = max(1, int(3 * sigma + 0.5))
    places = np.arange(-reach, reach + 1)
    weights = np.exp(-0.5 * (places / max(sigma, 0.5)) ** 2)
    weights /= weights.sum()
    for axis in (0, 1):
        pad = [(reach, reach) if a == axis else (0, 0) for a in range(3)]
        wide = np.pad(base, pad, mode="edge")
        windows = np.lib.stride_tricks.sliding_window_view(wide, len(weights), axis)
        base = windows @ weights
    return base
