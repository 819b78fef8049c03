"""Background tables, as shap's maskers hold them, and the rows explained against them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from microtome.errors import ArgumentError, ShapeError
from microtome.integrations.shap.callables import as_module_input
from microtome.shapley.inputs import InputGame
from microtome.shapley.players import Players

MOST_ROWS = 100  # of a background, unless a masker was made with more: shap's default


@dataclass(frozen=True)
class Background:
    """The rows that masked features are drawn from.

    Attributes:
        rows: [n, m], an array, a tensor or a DataFrame.
        columns: names, or None.
        clustering: a partition tree of the columns, or None.
        weights: [n] with mean 1, or None for equal ones.
        groups: lists of columns that are masked together, or None.
    """

    rows: Any
    columns: list[str] | None = None
    clustering: Any = None
    weights: Tensor | None = None
    groups: Any = None


def background_of(masker: Any, most: int | None = MOST_ROWS) -> Background | None:
    """The background table of a masker, or None if it masks in its own way.

    Args:
        masker: a table (array, tensor, DataFrame, sparse matrix), one of shap's tabular maskers, or
            what shap.kmeans returns.
        most: a larger table is cut to so many rows, the ones that shap draws.
    """
    if hasattr(masker, "toarray") and hasattr(masker, "tocsr"):
        masker = masker.toarray()
    kind = type(masker)
    if kind.__module__ == "shap.maskers._tabular" and kind.__name__ in ("Independent", "Partition"):
        names = list(masker.feature_names) if masker.output_dataframe else None
        rows = masker.data
        if masker.output_dataframe:
            rows = _frame(rows, names)
        return Background(rows, names, masker.clustering)
    if hasattr(masker, "group_names") and hasattr(masker, "weights"):  # shap.kmeans and its kind
        weights = np.asarray(masker.weights, dtype=np.float64)
        weights = torch.from_numpy(weights * (len(weights) / weights.sum()))
        equal = bool((weights == 1).all())
        groups = [list(map(int, g)) for g in masker.groups]
        single = all(len(g) == 1 for g in groups)
        names = [str(name) for name in masker.group_names]
        return Background(
            masker.data, names, None, None if equal else weights, None if single else groups
        )
    if isinstance(masker, dict) and "mean" in masker:
        return Background(np.asarray(masker["mean"])[None])
    if hasattr(masker, "columns") and hasattr(masker, "iloc"):
        return Background(_some(masker, most), list(map(str, masker.columns)))
    if isinstance(masker, np.ndarray | Tensor) and masker.ndim == 2:
        return Background(_some(masker, most))
    return None


def _some(rows: Any, most: int | None) -> Any:
    """At most so many rows, without repeats; the draw that shap makes with its fixed seed."""
    if most is None or len(rows) <= most:
        return rows
    order = np.arange(len(rows))
    np.random.RandomState(0).shuffle(order)
    taken = order[:most]
    return rows.iloc[taken] if hasattr(rows, "iloc") else rows[taken]


def _frame(rows: Any, columns: Any) -> Any:
    import pandas as pd

    return pd.DataFrame(np.asarray(rows), columns=columns).infer_objects()


@dataclass(frozen=True)
class Table:
    """Rows to explain and a background, both as the model takes them.

    Attributes:
        x: [e, m].
        background: [n, m] of the same kind.
        data: [e, m] array, the rows as they were given.
        varying: [e, P] bool, whether a feature differs from some background row.
        held: [m], the feature that each column belongs to.
    """

    x: Any
    background: Any
    data: np.ndarray
    varying: np.ndarray
    held: np.ndarray

    def games(
        self, op: str, model: Any, names: list[str], memory: int
    ) -> Iterator[tuple[np.ndarray, np.ndarray, InputGame]]:
        """Games of rows with the same varying features, which alone play.

        Yields:
            The rows' numbers, the features that play, and the game. A row without any plays with
            its first feature, whose value is then zero.
        """
        sets, which = self.varying[:1], np.zeros(len(self.varying), dtype=np.int64)
        if len(self.varying) > 1 and not (self.varying == sets).all():
            sets, which = np.unique(self.varying, axis=0, return_inverse=True)
        for i, plays in enumerate(sets):
            rows, features = np.flatnonzero(which.reshape(-1) == i), np.flatnonzero(plays)
            if not len(features):
                features = np.zeros(1, dtype=np.int64)
            # A column that is the same in x and in every background row changes no coalition.
            at = np.zeros(plays.size, dtype=np.int32)
            at[features] = np.arange(len(features))
            groups = None
            if len(features) < len(self.held):
                player = torch.from_numpy(at[self.held])
                groups = (Players(tuple(names[j] for j in features)), player)
            x = self.x.iloc[rows] if hasattr(self.x, "iloc") else self.x[rows]
            game = InputGame(model, x, self.background, groups=groups, memory=memory, op=op)
            yield rows, features, game


def table_of(op: str, model: Any, background: Background, X: Any, frames: bool = True) -> Table:
    """Rows X against a background, in the kind and dtype that the model takes.

    Args:
        op: name for messages.
        model: the model.
        background: as from `background_of`.
        X: [e, m], or [m] for one row.
        frames: whether a background DataFrame makes the model's inputs DataFrames.

    Raises:
        ShapeError: X has other columns than the background.
    """
    if hasattr(X, "toarray") and hasattr(X, "tocsr"):
        X = X.toarray()
    if isinstance(X, Tensor):
        X = X.detach().cpu().numpy()
    behind = background.rows
    m = behind.shape[1]
    data = np.asarray(X)
    data = data[None] if data.ndim == 1 else data
    if data.ndim != 2 or data.shape[1] != m:
        msg = (
            f"{op}: X must be [rows, {m}] as the background data of the masker, got shape "
            f"{list(np.shape(X))}."
        )
        raise ShapeError(msg)
    base = np.asarray(behind.detach().cpu() if isinstance(behind, Tensor) else behind)
    held = np.arange(m)
    for j, group in enumerate(background.groups or ()):
        held[group] = j
    varying = _varying(data, base)
    if background.groups is not None:
        varying = np.stack([varying[:, g].any(1) for g in background.groups], 1)
    if isinstance(model, nn.Module) or isinstance(getattr(model, "__self__", None), nn.Module):
        module = model if isinstance(model, nn.Module) else model.__self__
        x, base = (as_module_input(module, np.asarray(a, _number(op, a))) for a in (data, base))
    elif hasattr(behind, "iloc") and frames:
        x = X if hasattr(X, "iloc") and X.ndim == 2 else _frame(data, behind.columns)
        base = behind
    elif object in (data.dtype, base.dtype):
        x, base = data.astype(object), base.astype(object)
    else:
        dtype = np.result_type(data, base) if data.dtype.kind != "f" else data.dtype
        x, base = data.astype(dtype), base.astype(dtype)
    return Table(x, base, data, varying, held)


def _number(op: str, a: np.ndarray) -> Any:
    if a.dtype.kind in "fiub":
        return a.dtype
    try:
        a.astype(np.float64)
    except (TypeError, ValueError) as error:
        msg = f"{op}: a torch module takes numbers, and the data hold {a.dtype}. Encode them."
        raise ArgumentError(msg) from error
    return np.float64


def _varying(x: np.ndarray, base: np.ndarray) -> np.ndarray:
    """[e, m]: whether any background row has another value."""
    first, constant = base[0], np.ones(base.shape[1], dtype=bool)
    for row in base[1:]:
        constant &= _same(row, first)
    return ~(_same(x, first) & constant)


def _same(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.asarray((a == b) | ((a != a) & (b != b)), dtype=bool)
