"""Columns that take finitely many levels, bins or categories, and drawing them all at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from microtome.lime.bins import Bins

_BLOCK = 1 << 14  # numbers worked on at a time, which stay in the cache
_COMPARE = 16  # levels up to which counting thresholds below u beats a binary search

# Numbers in [0, 1) for each of L columns and K samples, [L, K]; or a function that returns those of
# the next columns [n, K], so that no more of them exist than fit into the cache.
Uniform = np.ndarray | Callable[[int], np.ndarray]


@dataclass(frozen=True, eq=False)
class Levels:
    """L columns with at most V levels each; tables are padded to V.

    A number u in [0, 1) picks the level whose share of the cumulative frequencies it falls into.
    A second one picks the value within the level: a category's is fixed, a bin's is normal with
    the bin's mean and spread, cut off at the bin's ends.

    Attributes:
        code: [L, V], the number of a bin or category, NaN beyond the column's own.
        share: [L, V], cumulative frequencies; 1 from the last level on.
        low, width: [L, V], erf of the lower end in units of sqrt(2) spreads, and how far it is to
            erf of the upper end: what a uniform number is stretched to.
        mean, scale: [L, V], value = mean + scale * erfinv(low + width * uniform); scale is
            sqrt(2) spreads, zero where the value is fixed.
    """

    code: np.ndarray
    share: np.ndarray
    low: np.ndarray
    width: np.ndarray
    mean: np.ndarray
    scale: np.ndarray

    def _blocks(self, K: int) -> Iterator[slice]:
        """Columns to work on at a time."""
        L = len(self.code)
        step = max(1, _BLOCK // max(1, K))
        return (slice(at, min(at + step, L)) for at in range(0, L, step))

    def pick(self, uniform: Uniform, K: int) -> np.ndarray:
        """[L, K] levels for uniform numbers."""
        L, V = self.code.shape
        level = np.zeros((L, K), dtype=np.uint8 if V <= _COMPARE else np.int64)
        for part in self._blocks(K):
            numbers = _next(uniform, part)
            if V > _COMPARE:
                for at, share, u in zip(range(L)[part], self.share[part], numbers, strict=True):
                    level[at] = np.searchsorted(share, u, side="right")
                continue
            for v in range(V - 1):
                level[part] += numbers >= self.share[part, v, None]
        return level

    def picked(self) -> Levels:
        """Levels for which the number that picked a level also serves as the second one."""
        start = np.concatenate([np.zeros_like(self.share[:, :1]), self.share[:, :-1]], 1)
        length = self.share - start
        slope = self.width / np.where(length > 0, length, 1.0)
        return replace(self, low=self.low - start * slope, width=slope)

    def values(
        self, level: np.ndarray, uniform: Uniform | None, out: np.ndarray | None = None
    ) -> np.ndarray:
        """[L, K] values of levels [L, K], from a uniform number each.

        Args:
            level: what `pick` returned.
            uniform: where within the level; None where every value is fixed.
            out: written and returned, if given; of any strides.
        """
        (L, K), V = level.shape, self.code.shape[1]
        out = np.empty((L, K)) if out is None else out
        for part in self._blocks(K):
            flat = level[part] + np.arange(0, (part.stop - part.start) * V, V)[:, None]
            if uniform is None:
                out[part] = np.take(self.mean[part], flat)
                continue
            inner = np.take(self.width[part], flat)
            inner *= _next(uniform, part)
            inner += np.take(self.low[part], flat)
            # 1 - 2^-53: an end that rounds to one would be infinity.
            np.clip(inner, -1 + 2**-53, 1 - 2**-53, out=inner)
            normal = torch.from_numpy(inner).erfinv_().numpy()
            normal *= np.take(self.scale[part], flat)
            np.add(normal, np.take(self.mean[part], flat), out=out[part])
        return out

    def level_of(self, codes: np.ndarray) -> np.ndarray:
        """[L] levels of one code per column; -1 where the background never has it."""
        same = self.code == codes[:, None]
        return np.where(same.any(1), same.argmax(1), -1)


def _next(uniform: Uniform, part: slice) -> np.ndarray:
    return uniform(part.stop - part.start) if callable(uniform) else uniform[part]


def of_bins(bins: Bins) -> Levels:
    """The bins of L columns as levels; empty bins are never picked."""
    root = math.sqrt(2) * bins.spread
    with np.errstate(invalid="ignore"):
        ends = np.stack([bins.least - bins.mean, bins.most - bins.mean]) / root
        point = ~(bins.least < bins.most)  # one value, without spread
    low, high = torch.erf(torch.from_numpy(ends)).numpy()
    code = np.arange(float(bins.count.shape[1]))
    return Levels(
        np.broadcast_to(code, bins.count.shape),
        cumulative(bins.count),
        np.where(point, 0.0, low),
        np.where(point, 0.0, high - low),
        np.where(point, bins.least, bins.mean),
        np.where(point, 0.0, root),
    )


def of_categories(columns: Sequence[np.ndarray]) -> Levels:
    """The different values of each column [n] as levels, as often as they occur."""
    found = [np.unique(column, return_counts=True) for column in columns]
    L, V = len(found), max((len(values) for values, _ in found), default=1)
    code, count = np.full((L, V), np.nan), np.zeros((L, V))
    for at, (values, times) in enumerate(found):
        code[at, : len(values)], count[at, : len(values)] = values, times
    zero = np.zeros((L, V))
    return Levels(code, cumulative(count), zero, zero, np.nan_to_num(code), zero)


def merge(first: Levels, second: Levels, order: np.ndarray) -> Levels:
    """The columns of both, in this order of those of `first` and then those of `second`."""
    V = max(first.code.shape[1], second.code.shape[1])
    fill = {"code": np.nan, "share": 1.0}
    tables = []
    for name in ("code", "share", "low", "width", "mean", "scale"):
        wide = [
            np.pad(table, ((0, 0), (0, V - table.shape[1])), constant_values=fill.get(name, 0.0))
            for table in (getattr(first, name), getattr(second, name))
        ]
        tables.append(np.concatenate(wide)[order])
    return Levels(*tables)


def cumulative(count: np.ndarray) -> np.ndarray:
    """[L, V] cumulative frequencies of counts; each ends at one."""
    share = np.cumsum(count / count.sum(1, keepdims=True), 1)
    return share / share[:, -1:]
