"""Perturbed rows of a table, drawn in lime's order from lime's random state."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from microtome.integrations.lime.discretizer import Discretizer
from microtome.lime.levels import Levels, cumulative


@dataclass(frozen=True, eq=False)
class Sample:
    """K samples of a row, itself the first.

    Attributes:
        inverse: [K, m], what the model gets; a sparse matrix for sparse rows.
        on: [K, m] bool where every feature is 0 or 1, else None.
        data: makes the features [K, m] as numbers.
        first: [m], the row's features.
        columns: numbers of the features if they are not all columns (sparse rows), else None.
    """

    inverse: Any
    on: np.ndarray | None
    data: Callable[[], np.ndarray]
    first: np.ndarray
    columns: np.ndarray | None = None


class TableSampler:
    """Draws samples for a LimeTabularExplainer, all columns at once.

    lime draws its columns one after another from one stream; the same stream is read here in one
    piece and cut up.
    """

    def __init__(self, explainer: Any) -> None:
        self.explainer = explainer
        own = explainer.discretizer
        self.fast = isinstance(own, Discretizer)
        values, frequencies = explainer.feature_values, explainer.feature_frequencies
        self.columns = list(values)
        self.levels = own.levels(values, frequencies) if self.fast else _plain(values, frequencies)

    def draw(self, row: np.ndarray, K: int, method: str) -> Sample:
        """K samples of a row [m]."""
        levels, random, m = self.levels, self.explainer.random_state, len(row)
        smooth = self.explainer.discretizer is None
        data = self._continuous(row, K, method) if smooth else np.empty((K, m))
        L = len(self.columns)
        level = levels.pick(lambda n: random.random_sample((n, K)), K)
        first = row if smooth else self.explainer.discretizer.discretize(row)
        own = levels.level_of(first[self.columns])
        on = np.empty((K, L), dtype=bool)
        np.equal(level, own[:, None], out=on.T)
        on[0] = True
        level = level[:, 1:]
        if self.fast:
            place = {j: at for at, j in enumerate(self.columns)}
            second = self.explainer.discretizer.uniform(levels, level, place)
            levels.values(level, second, out=data[1:].T)
        elif not smooth:
            drawn = levels.values(level, None)
            data[1:] = self.explainer.discretizer.undiscretize(np.ascontiguousarray(drawn.T))
        if not smooth:
            data[0] = row
            return Sample(data, on, lambda: on.astype(float), np.ones(m))
        scaler = self.explainer.scaler
        scaled = (data - scaler.mean_) / scaler.scale_
        scaled[:, self.columns] = on
        if L:
            data[1:, self.columns] = levels.values(level, None).T
        return Sample(data, None, lambda: scaled, scaled[0])

    def _continuous(self, row: np.ndarray, K: int, method: str) -> np.ndarray:
        """[K, m] normal numbers in the columns' units; the row first."""
        m, scaler = len(row), self.explainer.scaler
        if method == "lhs":
            data = latin_hypercube(self.explainer.random_state, K, m)
        else:
            data = self.explainer.random_state.normal(0, 1, K * m).reshape(K, m)
        data *= scaler.scale_
        data += row if self.explainer.sample_around_instance else scaler.mean_
        data[0] = row
        return data


def latin_hypercube(random: np.random.RandomState, K: int, m: int) -> np.ndarray:
    """[K, m] standard normal numbers, in each column one from each of K equally likely ranges."""
    place = random.random_sample((K, m)).argsort(0)
    uniform = (place + random.random_sample((K, m))) / K
    uniform = np.clip(2 * uniform - 1, -1 + 2**-53, 1 - 2**-53)
    return torch.erfinv(torch.from_numpy(uniform)).numpy() * math.sqrt(2)


def _plain(values: dict[int, Any], frequencies: dict[int, Any]) -> Levels:
    """Levels whose values are fixed."""
    L, V = len(values), max(map(len, values.values()), default=1)
    code, count, zero = np.full((L, V), np.nan), np.zeros((L, V)), np.zeros((L, V))
    for at, j in enumerate(values):
        code[at, : len(values[j])], count[at, : len(values[j])] = values[j], frequencies[j]
    return Levels(code, cumulative(count) if L else count, zero, zero, np.nan_to_num(code), zero)
