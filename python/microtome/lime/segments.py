"""Images cut into segments, and copies of an image with some segments hidden."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from microtome.errors import ArgumentError, PackageError, ShapeError
from microtome.ops import coalition_inputs
from microtome.shapley.coalitions import of_members
from microtome.shapley.image import mean_colours

ALGORITHMS = ("quickshift", "slic", "felzenszwalb")


def grid(height: int, width: int, cells: int) -> np.ndarray:
    """[height, width] squares, about `cells` of them."""
    side = max(1, round((height * width / max(1, cells)) ** 0.5))
    rows, columns = np.arange(height) // side, np.arange(width) // side
    return rows[:, None] * (columns[-1] + 1) + columns


def segments_of(op: str, image: np.ndarray, segments: Any) -> np.ndarray:
    """[H, W] int64 segments 0, 1, ... of an image [H, W, C].

    Args:
        op: name for messages.
        image: the image.
        segments: how many squares to cut it into; "quickshift", "slic" or "felzenszwalb" (through
            scikit-image); a function from the image to [H, W]; or [H, W] itself.

    Raises:
        ShapeError: segments of another size. ArgumentError: an unknown algorithm.
        PackageError: scikit-image is not installed.
    """
    height, width = image.shape[:2]
    if isinstance(segments, str):
        found = _algorithm(op, segments)(image)
    elif isinstance(segments, int) and not isinstance(segments, bool):
        if segments < 1:
            msg = f"{op}: segments must be at least 1, got segments={segments}."
            raise ArgumentError(msg)
        found = grid(height, width, segments)
    else:
        found = segments(image) if callable(segments) else segments
    found = np.asarray(found)
    if found.shape != (height, width):
        msg = (
            f"{op}: segments must be [{height}, {width}] like the image, got shape "
            f"{list(found.shape)}."
        )
        raise ShapeError(msg)
    return np.unique(found, return_inverse=True)[1].reshape(height, width).astype(np.int64)


def _algorithm(op: str, name: str) -> Callable[[np.ndarray], np.ndarray]:
    if name not in ALGORITHMS:
        msg = (
            f"{op}: segments must be a number of squares, {', '.join(map(repr, ALGORITHMS))}, a "
            f"function of the image or [H, W] numbers, got {name!r}."
        )
        raise ArgumentError(msg)
    try:
        from skimage import segmentation
    except ImportError as error:
        msg = (
            f"{op}: segments={name!r} comes from scikit-image, which is not installed ({error}). "
            "Install it (pip install scikit-image) or pass a number of squares."
        )
        raise PackageError(msg) from error
    if name == "quickshift":
        return lambda image: segmentation.quickshift(
            image, kernel_size=4, max_dist=200, ratio=0.2, rng=0
        )
    found: Callable[[np.ndarray], np.ndarray] = getattr(segmentation, name)
    return found


def hidden(image: np.ndarray, segments: np.ndarray, color: Any) -> np.ndarray:
    """What stands in for an image [H, W, C]: each segment's mean colour, or one colour."""
    if color is None:
        return mean_colours(image, segments)
    out = image.copy()
    out[:] = color
    return out


class Curtain:
    """Copies of an image with some of its segments hidden, written by `coalition_inputs`.

    Args:
        image: [H, W, C], any kind of number the op takes.
        behind: [H, W, C], shown where a segment is off.
        segments: [H, W] int64.
    """

    def __init__(self, image: np.ndarray, behind: np.ndarray, segments: np.ndarray) -> None:
        self.shape, self.dtype = image.shape, image.dtype
        channels = image.shape[2]
        self._player = torch.from_numpy(np.repeat(segments.ravel(), channels).astype(np.int32))
        self._image, self._behind = (_bits(a).reshape(1, -1) for a in (image, behind))

    def __call__(self, on: np.ndarray) -> np.ndarray:
        """[K, H, W, C] for [K, p] bool."""
        ranks, spans = of_members(torch.from_numpy(on), 0)
        rows = torch.zeros(len(on), 5, dtype=torch.int32)
        rows[:, 1:] = spans
        out: Tensor = coalition_inputs(self._image, self._behind, ranks, rows, self._player)
        return out.numpy().view(self.dtype).reshape(len(on), *self.shape)


def _bits(image: np.ndarray) -> Tensor:
    """An image as a tensor of numbers of the same size in bytes, which is all the op looks at."""
    like = {1: np.uint8, 2: np.float16, 4: np.int32, 8: np.int64}[image.dtype.itemsize]
    return torch.from_numpy(np.ascontiguousarray(image).view(like))
