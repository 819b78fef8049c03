"""Cutting columns into bins, and what a bin holds: how often it occurs, its mean and spread."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from microtome.errors import ArgumentError, PackageError

QUANTILES = {
    "quartile": (25, 50, 75),
    "decile": (10, 20, 30, 40, 50, 60, 70, 80, 90),
}
_COMPARE = 16  # edges up to which counting comparisons beats a binary search
_TINY = 1e-11  # added to the spread of a bin, so that a bin of equal values has one


@dataclass(frozen=True, eq=False)
class Bins:
    """The bins of L columns; tables are padded to the most.

    Attributes:
        edges: [L, b], ascending, then infinity; bin i holds edges[i - 1] < x <= edges[i].
        mean, spread, least, most: [L, b + 1], of the rows in each bin; an empty bin has mean 0.
        count: [L, b + 1], rows in each bin.
    """

    edges: np.ndarray
    mean: np.ndarray
    spread: np.ndarray
    least: np.ndarray
    most: np.ndarray
    count: np.ndarray

    def name(self, at: int, level: int, column: str) -> str:
        """What a bin says of its column, as in "1.5 < age <= 3"."""
        edges = self.edges[at]
        low = f"{edges[level - 1]:.4g} < " if level else ""
        high = f" <= {edges[level]:.4g}" if level < len(edges) and edges[level] < np.inf else ""
        if low and not high:
            return f"{column} > {low[:-3]}"
        return f"{low}{column}{high}"


def padded(edges: Sequence[np.ndarray]) -> np.ndarray:
    """[L, b] from the edges of each column: sorted, repeats dropped, infinity at the end."""
    single = [np.unique(np.asarray(own, dtype=np.float64)) for own in edges]
    out = np.full((len(single), max(map(len, single), default=0)), np.inf)
    for row, own in zip(out, single, strict=True):
        row[: len(own)] = own
    return out


def codes(edges: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """[L, n] int64 bins of entries [L, n], for padded edges [L, b]."""
    b = edges.shape[1]
    if b > _COMPARE:
        both = zip(edges, rows, strict=True)
        return np.stack([np.searchsorted(own, row) for own, row in both])
    code = np.zeros(rows.shape, dtype=np.uint8)
    for k in range(b):
        code += rows > edges[:, k, None]
    return code.astype(np.int64)


def bins_of(rows: np.ndarray, edges: np.ndarray) -> Bins:
    """Describe the entries of columns [L, n] that fall between each two of the edges [L, b]."""
    (L, _), b = rows.shape, edges.shape[1] + 1
    code = (codes(edges, rows) + np.arange(0, L * b, b)[:, None]).ravel()

    def total(values: np.ndarray | None = None) -> np.ndarray:
        return np.bincount(code, None if values is None else values.ravel(), L * b)

    count = total()
    some = np.maximum(count, 1)
    mean = total(rows) / some
    # A second pass, as a bin far from zero would lose its spread to rounding.
    mean += total(rows - mean[code].reshape(rows.shape)) / some
    spread = np.sqrt(total(np.square(rows - mean[code].reshape(rows.shape))) / some) + _TINY
    lowest, highest = rows.min(1, initial=np.inf), rows.max(1, initial=-np.inf)
    least = np.concatenate([lowest[:, None], edges], 1)
    # The last bin ends where the column does.
    most = np.concatenate([np.where(edges < np.inf, edges, highest[:, None]), highest[:, None]], 1)
    tables = (mean.reshape(L, b), spread.reshape(L, b), least, most, count.reshape(L, b))
    return Bins(edges, *tables)


def edges_of(
    op: str,
    rows: np.ndarray,
    columns: Sequence[int],
    discretize: Any,
    labels: Any = None,
    seed: Any = 0,
) -> list[np.ndarray]:
    """The edges of each column that is to be cut.

    Args:
        op: name for messages.
        rows: [n, m] float64, the background.
        columns: which of the m columns to cut.
        discretize: "quartile", "decile", "entropy" (a decision tree of depth 3 on labels) or a
            mapping from columns to edges.
        labels: [n], for "entropy".
        seed: of the trees, a number or a numpy RandomState.

    Raises:
        ArgumentError: an unknown way, labels are missing, or a column without edges.
        PackageError: "entropy" without scikit-learn.
    """
    if isinstance(discretize, Mapping):
        missing = [j for j in columns if j not in discretize]
        if missing:
            msg = (
                f"{op}: discretize has no edges for column {missing[0]}. Give every column that is "
                "not categorical a list of edges (an empty list leaves one bin)."
            )
            raise ArgumentError(msg)
        return [np.asarray(discretize[j], dtype=np.float64) for j in columns]
    if discretize in QUANTILES:
        if not len(columns):
            return []
        table = np.percentile(rows[:, list(columns)], QUANTILES[discretize], axis=0)
        return list(table.T)
    if discretize != "entropy":
        msg = (
            f"{op}: discretize must be True, False, 'quartile', 'decile', 'entropy' or a mapping "
            f"from columns to edges, got {discretize!r}."
        )
        raise ArgumentError(msg)
    if labels is None or len(labels) != len(rows):
        got = "none" if labels is None else str(len(labels))
        msg = (
            f"{op}: discretize='entropy' needs the labels of the {len(rows)} background rows "
            f"(one each), got {got}."
        )
        raise ArgumentError(msg)
    return [_entropy_edges(op, rows[:, j], labels, seed) for j in columns]


def _entropy_edges(op: str, column: np.ndarray, labels: Any, seed: Any) -> np.ndarray:
    """Where a decision tree of depth 3 on one column splits; the median where it does not."""
    try:
        from sklearn.tree import DecisionTreeClassifier
    except ImportError as error:
        msg = (
            f"{op}: discretize='entropy' grows decision trees with scikit-learn, which is not "
            f"installed ({error}). Install it (pip install scikit-learn) or use 'quartile'."
        )
        raise PackageError(msg) from error
    tree = DecisionTreeClassifier(criterion="entropy", max_depth=3, random_state=seed)
    grown = tree.fit(column[:, None], labels).tree_
    edges = grown.threshold[grown.children_left > -1]
    return np.sort(edges) if len(edges) else np.array([np.median(column)])
