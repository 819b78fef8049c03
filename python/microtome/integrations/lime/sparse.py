"""Sparse tables: only the entries of a row that are not zero are perturbed and explained."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from microtome.errors import ArgumentError
from microtome.integrations.lime.sampling import Sample


def is_sparse(a: Any) -> bool:
    """Whether it is a scipy sparse matrix; without scipy loaded nothing is."""
    scipy = sys.modules.get("scipy.sparse")
    return scipy is not None and bool(scipy.issparse(a))


def column(rows: Any, j: int) -> np.ndarray:
    """[n], column j of an array or a sparse matrix."""
    return rows[:, [j]].toarray().ravel() if is_sparse(rows) else rows[:, j]


def mean_and_scale(rows: Any) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each column; 1 where a column is constant up to rounding."""
    n = rows.shape[0]
    if is_sparse(rows):
        mean = np.asarray(rows.mean(0)).ravel()
        square = np.asarray(rows.multiply(rows).mean(0)).ravel()
        variance = np.maximum(square - mean**2, 0)
    else:
        mean, variance = rows.mean(0), rows.var(0)
    eps = np.finfo(np.float64).eps
    constant = variance <= n * eps * variance + (n * mean * eps) ** 2
    scale = np.sqrt(variance)
    scale[constant] = 1
    return mean, scale


def sample(explainer: Any, row: Any, K: int) -> Sample:
    """K samples of a sparse row.

    Raises:
        ArgumentError: categorical columns, a discretizer, or a row of zeros.
    """
    from scipy.sparse import csr_matrix

    op = explainer._op
    if explainer.discretizer is not None or explainer.categorical_features:
        msg = (
            f"{op}: sparse rows take neither a discretizer nor categorical_features. Pass "
            "row.toarray()[0], or train the explainer on sparse data."
        )
        raise ArgumentError(msg)
    row = row.tocsr()
    columns = row.nonzero()[1]
    c = len(columns)
    if not c:
        msg = f"{op}: the sparse row holds nothing but zeros, so there is nothing to explain."
        raise ArgumentError(msg)
    scaler = explainer.scaler
    own = row[:, columns].toarray().ravel().astype(float)
    data = explainer.random_state.normal(0, 1, K * c).reshape(K, c) * scaler.scale_[columns]
    data += own if explainer.sample_around_instance else scaler.mean_[columns]
    data[0] = own
    at, starts = np.tile(columns, K), np.arange(0, c * (K + 1), c)
    inverse = csr_matrix((data.ravel(), at, starts), shape=(K, row.shape[1]))
    # lime multiplies by the scale where it divides for dense rows; its weights follow from that.
    scaled = data * scaler.scale_[columns]
    return Sample(inverse, None, lambda: scaled, scaled[0], columns)


def padded(fits: list[Any], num_features: int, m: int) -> list[Any]:
    """Fits with zeros for further columns until there are num_features, as lime lists them."""
    out = []
    for intercept, pairs, score, local in fits:
        held = {int(j) for j, _ in pairs}
        rest = (j for j in range(m) if j not in held)
        more = [(j, 0.0) for j, _ in zip(rest, range(num_features - len(pairs)), strict=False)]
        out.append((intercept, pairs + more, score, local))
    return out
