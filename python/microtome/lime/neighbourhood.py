"""Samples around rows of a table, drawn once for all rows that are explained."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from microtome._seed import generator
from microtome.lime.bins import bins_of, codes, edges_of, padded
from microtome.lime.columns import Columns
from microtome.lime.levels import merge, of_bins, of_categories
from microtome.shapley.coalitions import pack


@dataclass(frozen=True, eq=False)
class Samples:
    """K samples of a table's columns.

    Attributes:
        level: [L, K], levels of the L columns that have some.
        normal: [c, K], standard normal numbers for the c columns that have none.
        rows: [K, m] float64 for the model; of explicand 0 where the samples lie around it.
    """

    level: np.ndarray
    normal: np.ndarray
    rows: np.ndarray


class Neighbourhood:
    """How the columns of the background are distributed, and where the explicands are in them.

    Columns that are categorical or cut into bins are drawn level by level, as often as the
    background has them, and compared with the explicand's level: a feature is 1 where they agree.
    The others are drawn from a normal distribution with the background's standard deviation, around
    its mean or around the explicand, and are features in units of that deviation.

    Attributes:
        levelled, smooth: numbers of the columns with and without levels.
        bins: of the columns that are cut.
        own: [e, L], the explicands' levels; -1 where the background never has it.
        scaled: [e, c], the explicands' other columns in standard units.
        names: for each explicand the names of its m features.
    """

    def __init__(
        self, op: str, columns: Columns, discretize: Any, labels: Any, around: bool
    ) -> None:
        self.columns, self.around = columns, around
        x, background = columns.x, columns.background
        cut = np.flatnonzero(~columns.categorical) if discretize is not False else np.empty(0, int)
        fixed = np.flatnonzero(columns.categorical)
        order = np.concatenate([cut, fixed]).argsort()
        self.levelled = np.concatenate([cut, fixed])[order]
        self.smooth = np.setdiff1d(np.arange(x.shape[1]), self.levelled)
        how = "quartile" if discretize is True else discretize
        if isinstance(how, Mapping):
            how = {columns.column(key, "discretize"): edges for key, edges in how.items()}
        edges = padded(edges_of(op, background, cut, how, labels) if len(cut) else [])
        self.bins = bins_of(np.ascontiguousarray(background[:, cut].T), edges)
        self._place = {j: at for at, j in enumerate(cut.tolist())}
        self.levels = of_bins(self.bins)
        code = codes(edges, x[:, cut].T)  # [L, e]
        if len(fixed):
            found = of_categories([background[:, j] for j in fixed])
            self.levels = merge(self.levels, found, order)
            code = np.concatenate([code, x[:, fixed].T])[order]
        self.own = np.stack([self.levels.level_of(column) for column in code.T])
        rest = background[:, self.smooth]
        self.mean, spread = rest.mean(0), rest.std(0)
        # A column that rounding alone keeps from being constant counts as constant.
        self.spread = np.where(spread > 1e-12 * np.abs(self.mean), spread, 0.0)
        unit = np.where(self.spread > 0, self.spread, 1.0)
        self.scaled = (x[:, self.smooth] - self.mean) / unit
        self.names = self._names(code.T)

    def _names(self, code: np.ndarray) -> tuple[tuple[str, ...], ...]:
        columns = self.columns
        known: dict[tuple[int, float], str] = {}
        out = []
        for row in code.tolist():
            names = list(columns.names)
            for at, (j, level) in enumerate(zip(self.levelled.tolist(), row, strict=True)):
                if (at, level) not in known:
                    known[at, level] = (
                        f"{names[j]} = {columns.show(j, level)}"
                        if columns.categorical[j]
                        else self.bins.name(self._place[j], int(level), names[j])
                    )
                names[j] = known[at, level]
            out.append(tuple(names))
        return tuple(out)

    @property
    def shared(self) -> bool:
        """Whether one set of samples serves all explicands."""
        return not self.around or not len(self.smooth)

    @property
    def binary(self) -> bool:
        """Whether every feature is 0 or 1."""
        return not len(self.smooth)

    def draw(self, K: int, seed: int, sampling: str) -> Samples:
        """K samples; with sampling "lhs" the draws of each column are spread evenly."""
        L, c, m = len(self.levelled), len(self.smooth), self.columns.x.shape[1]
        random = generator(seed, "lime", "table")
        uniform = torch.rand(L, K, dtype=torch.float64, generator=random)
        if sampling == "lhs":
            uniform = _spread_evenly(uniform, random)
            normal = torch.rand(c, K, dtype=torch.float64, generator=random)
            normal = _spread_evenly(normal, random).clamp_(min=2**-54)
            normal = torch.erfinv(2 * normal - 1).mul_(math.sqrt(2))
        else:
            normal = torch.randn(c, K, dtype=torch.float64, generator=random)
        level = self.levels.pick(uniform.numpy(), K)
        rows, levels = np.empty((K, m)), self.levels.picked()
        if m == L:
            levels.values(level, uniform.numpy(), out=rows.T)
            return Samples(level, normal.numpy(), rows)
        rows[:, self.levelled] = levels.values(level, uniform.numpy()).T
        samples = Samples(level, normal.numpy(), rows)
        self.centre(samples, 0)
        return samples

    def centre(self, samples: Samples, row: int) -> None:
        """Move the samples around an explicand (or leave them around the mean), in place."""
        middle = self.columns.x[row, self.smooth] if self.around else self.mean
        samples.rows[:, self.smooth] = samples.normal.T * self.spread + middle

    def same(self, samples: Samples, row: int) -> np.ndarray:
        """[L, K] bool: where a sample has the explicand's level."""
        return samples.level == self.own[row][:, None]

    def features(self, samples: Samples, row: int) -> np.ndarray:
        """[K + 1, m] float64 features, the explicand's own first."""
        m = self.columns.x.shape[1]
        z = np.empty((samples.rows.shape[0] + 1, m))
        z[0, self.levelled], z[1:, self.levelled] = 1, self.same(samples, row).T
        middle = self.scaled[row] if self.around else 0.0
        z[0, self.smooth] = self.scaled[row]
        z[1:, self.smooth] = samples.normal.T * (self.spread > 0) + middle
        return z


def words_of(same: np.ndarray) -> torch.Tensor:
    """[K + 1, w] packed coalitions of [p, K] bool, the explicand (all on) first."""
    p, K = same.shape
    inside = np.ones((K + 1, p), dtype=bool)
    inside[1:] = same.T
    return pack(torch.from_numpy(inside))


def _spread_evenly(uniform: torch.Tensor, random: torch.Generator) -> torch.Tensor:
    """Latin hypercube: one number in each of K equal intervals, in random order, by column."""
    K = uniform.shape[1]
    shuffle = torch.rand(uniform.shape, generator=random, dtype=torch.float64).argsort(1)
    return ((shuffle + uniform) / K).clamp_(max=1 - 2**-53)
