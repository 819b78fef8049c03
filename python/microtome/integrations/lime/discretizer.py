"""Bins of a training table under the names of lime's discretizers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from microtome.errors import ArgumentError
from microtome.integrations.lime.base import random_state_of
from microtome.lime.bins import bins_of, edges_of, padded
from microtome.lime.levels import Levels, Uniform, cumulative

_STATS = ("means", "mins", "maxs", "stds", "feature_values", "feature_frequencies")


class Discretizer:
    """Bins of the columns that are not categorical, and normal distributions within them.

    Args:
        data: [n, m] training rows.
        categorical: columns to leave as they are.
        feature_names: m names.
        how: "quartile", "decile" or "entropy"; ignored if stats are given.
        labels: [n], for "entropy".
        random_state: draws values within bins.
        stats: lime's training_data_stats: means, stds, mins and maxs of every bin, and bins.

    Attributes:
        edges: column -> [b] edges.
        names: column -> what each bin says.
        lambdas: column -> function from values to bins.
        means, stds, mins, maxs: column -> a number for each bin.
    """

    def __init__(
        self,
        data: np.ndarray,
        categorical: Sequence[int],
        feature_names: Sequence[str],
        how: str = "quartile",
        labels: Any = None,
        random_state: Any = None,
        stats: Mapping[str, Any] | None = None,
    ) -> None:
        op = "LimeTabularExplainer"
        self.to_discretize = [j for j in range(data.shape[1]) if j not in set(categorical)]
        self.random_state = random_state_of(op, random_state)
        self.edges: dict[int, np.ndarray]
        if stats is None:
            self._measure(op, data, how, labels)
        else:
            known = stats.get("bins") or {}
            self.edges = {j: np.unique(known[j]) for j in self.to_discretize if j in known}
            self.means, self.stds = stats["means"], stats["stds"]
            self.mins, self.maxs = stats["mins"], stats["maxs"]
        self.lambdas = {j: partial(np.searchsorted, edges) for j, edges in self.edges.items()}
        self.names = {j: _names(feature_names[j], edges) for j, edges in self.edges.items()}

    def _measure(self, op: str, data: np.ndarray, how: str, labels: Any) -> None:
        columns = self.to_discretize
        found = edges_of(op, data, columns, how, labels, self.random_state)
        single = [np.unique(edges) for edges in found]
        bins = bins_of(np.ascontiguousarray(data[:, columns].T, dtype=float), padded(single))
        self.edges = dict(zip(columns, single, strict=True))
        self.means, self.stds, self.mins, self.maxs = (
            {j: table[at, : len(single[at]) + 1].tolist() for at, j in enumerate(columns)}
            for table in (bins.mean, bins.spread, bins.least, bins.most)
        )

    def discretize(self, data: np.ndarray) -> np.ndarray:
        """Rows [..., m] with bins in place of numbers."""
        out = data.copy()
        for j, edges in self.edges.items():
            out[..., j] = np.searchsorted(edges, data[..., j])
        return out

    def undiscretize(self, data: np.ndarray) -> np.ndarray:
        """Rows [..., m] with numbers drawn from the bins."""
        rows = np.atleast_2d(data)
        out = rows.astype(float)
        levels = self.levels({j: range(len(self.means[j])) for j in self.means})
        level = np.ascontiguousarray(rows[:, list(self.means)].T.astype(np.int64))
        uniform = self.uniform(levels, level, dict(zip(self.means, range(len(level)), strict=True)))
        out[:, list(self.means)] = levels.values(level, uniform).T
        return out.reshape(data.shape)

    def uniform(self, levels: Levels, level: np.ndarray, row: Mapping[int, int]) -> Uniform:
        """Numbers for the values within the bins, drawn in lime's order.

        Column after column, and only where a bin holds more than one value.
        """
        order = [row[j] for j in self.means]
        some = (levels.scale > 0) | np.isnan(levels.code)
        if some.all() and order == list(range(len(level))):
            return lambda n: self.random_state.random_sample((n, level.shape[1]))
        out = np.zeros(level.shape)
        for at in order:
            drawn = some[at][level[at]]
            out[at, drawn] = self.random_state.random_sample(int(drawn.sum()))
        return out

    def levels(
        self, values: Mapping[int, Any], frequencies: Mapping[int, Any] | None = None
    ) -> Levels:
        """Levels of columns from the values they take and how often.

        A bin of one value gives, as lime has it, how far that lies from the bin's mean in units of
        its spread, which is 0 as a rule, and not the value itself.
        """
        L, V = len(values), max(map(len, values.values()), default=1)
        code, count = np.full((L, V), np.nan), np.zeros((L, V))
        low, width, mean, scale = (np.zeros((L, V)) for _ in range(4))
        for at, (j, own) in enumerate(values.items()):
            v = len(own)
            code[at, :v] = own
            count[at, :v] = 1 if frequencies is None else frequencies[j]
            mean[at, :v] = own
            if j not in self.means:
                continue
            bins = np.asarray(own, dtype=np.int64)
            tables = (self.mins[j], self.maxs[j], self.means[j], self.stds[j])
            least, most, centre, spread = (np.asarray(table)[bins] for table in tables)
            ends = np.stack([least - centre, most - centre]) / spread
            start, stop = torch.erf(torch.from_numpy(ends / np.sqrt(2))).numpy()
            point = ends[0] == ends[1]
            low[at, :v], width[at, :v] = start, stop - start
            mean[at, :v] = np.where(point, ends[0], centre)
            scale[at, :v] = np.where(point, 0.0, np.sqrt(2) * spread)
        return Levels(code, cumulative(count), low, width, mean, scale)


def check_stats(op: str, stats: Mapping[str, Any]) -> None:
    """Raise ArgumentError unless training_data_stats has everything lime asks for."""
    missing = [name for name in _STATS if name not in stats]
    if missing:
        msg = f"{op}: training_data_stats must have {', '.join(_STATS)}; missing: {missing}."
        raise ArgumentError(msg)


def _names(column: str, edges: np.ndarray) -> list[str]:
    at = [f"{edge:.2f}" for edge in edges]
    between = [f"{low} < {column} <= {high}" for low, high in pairwise(at)]
    return [f"{column} <= {at[0]}", *between, f"{column} > {at[-1]}"] if at else [column]
