"""LIME for rows of a table."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from microtome import _check
from microtome.errors import ArgumentError
from microtome.lime.columns import Columns
from microtome.lime.equations import Equations, from_coalitions, from_rows
from microtome.lime.kernels import (
    Distance,
    Kernel,
    binary_distances,
    distances_of,
    kernel_of,
    weights_of,
)
from microtome.lime.local import Settings
from microtome.lime.model import Model
from microtome.lime.neighbourhood import Neighbourhood, Samples, words_of
from microtome.lime.result import LimeExplanation, finish
from microtome.shapley import running
from microtome.shapley.call import as_function
from microtome.shapley.game import MEMORY


def explain_tabular(
    f: Any,
    x: Any,
    background: Any,
    *,
    discretize: Any = True,
    labels: Any = None,
    categorical: str | Sequence[int | str] = "auto",
    num_samples: int = 5000,
    num_features: int = 10,
    selection: str = "auto",
    kernel: Kernel | None = None,
    kernel_width: float | None = None,
    distance: Distance = "euclidean",
    around: bool = False,
    sampling: str = "gaussian",
    alpha: float = 1.0,
    outputs: Sequence[int] | None = None,
    repeats: int = 1,
    seed: int = 0,
    memory: int = MEMORY,
    check: bool = True,
    progress: bool = True,
) -> LimeExplanation:
    """Explain rows of a table by sparse linear models of f around them.

    Samples are drawn column by column from the background's distribution, f is evaluated on them,
    and a ridge regression weighted by closeness to the row is fitted to the features that were
    chosen. All rows share one set of samples unless `around` is set, so that f is evaluated on
    num_samples rows in all, however many rows are explained.

    Args:
        f: a function of rows, a torch module or a scikit-learn estimator.
        x: [e, m] rows to explain, [m] for one: a tensor, an array, a DataFrame or a list.
        background: [n, m], whose columns' distributions are sampled.
        discretize: True or "quartile", "decile", "entropy" (needs labels), or a mapping from
            columns to edges: features then say that a column lies in the row's bin. False:
            features are columns in standard deviations.
        labels: [n] classes of the background rows, for "entropy".
        categorical: columns by name or number whose values are compared, not measured; "auto": the
            columns that hold no numbers.
        num_samples: samples of each row, the row itself among them.
        num_features: features to keep at most.
        selection: "auto", "forward", "highest_weights", "lasso_path" or "none" (selection.py).
        kernel: a function from distances [K] to weights [K]; by default exponential(kernel_width).
        kernel_width: by default 0.75 sqrt(m).
        distance: "euclidean", "cosine", a metric of scikit-learn, or a function
            (features [K, m], the row's [m]) -> [K].
        around: draw columns without bins around the row instead of the background's mean.
        sampling: "gaussian" for independent draws, or "lhs" (Latin hypercube), which spreads the
            draws of each column evenly.
        alpha: the ridge penalty.
        outputs: which of f's outputs to explain; all by default.
        repeats: run with so many seeds and report how much the explanations differ (`stability`).
        seed: of the samples. A row's explanation does not depend on the other rows.
        memory: bytes of rows in one call of f.
        check: call f twice on x to find out whether it is deterministic.
        progress: show a progress bar over the rows.

    Returns:
        LimeExplanation, [e, m] or [e, m, o].

    Raises:
        ArgumentError: missing values, unknown options, a function that is not deterministic.
        ShapeError, NonFiniteError: f returns something else than numbers for each row.
        PackageError: an option needs scikit-learn.

    Ctrl-C returns what can be said with the answers that had come (`interrupted`).
    Source: Ribeiro et al. 2016, arXiv:1602.04938.

    Example:
        >>> import torch
        >>> background = torch.randn(200, 2, generator=torch.Generator().manual_seed(0))
        >>> found = explain_tabular(
        ...     lambda a: 3 * a[:, 0] - a[:, 1], background[:1], background, discretize=False
        ... )
        >>> [round(v, 1) for v in (found.coefficients[0] / background.std(0)).tolist()]
        [3.0, -1.0]
    """
    op = "explain_tabular"
    settings = Settings(op, num_features, selection, alpha, num_samples, repeats)
    _check.one_of(op, "sampling", sampling, ("gaussian", "lhs"))
    function, wants = as_function(op, f)
    columns = Columns(op, x, background, wants, categorical, f)
    e, m = columns.x.shape
    if not e:
        msg = f"{op}: x has no rows to explain."
        raise ArgumentError(msg)
    kernel = kernel_of(op, kernel, kernel_width, 0.75 * math.sqrt(m))
    model = Model(op, function, outputs, memory // (8 * m))
    near = Neighbourhood(op, columns, discretize, labels, around)
    # Copies: f may work in place, and these rows are read again.
    prediction = model.explicands(lambda a, b: columns.back(columns.x[a:b].copy()), e, check)
    table = None
    if near.binary and isinstance(distance, str) and distance in ("euclidean", "cosine"):
        table = weights_of(op, kernel, binary_distances(distance, m))
    bar = running.bar(e * repeats, op, "row", progress)

    def systems(run: int) -> Iterator[Equations]:
        samples = near.draw(num_samples - 1, seed + run, sampling)
        values = _values(model, columns, samples) if near.shared else None
        for i in range(e):
            if values is None or not near.shared:
                near.centre(samples, i)
                values = _values(model, columns, samples)
            K = len(values)  # fewer than were drawn where the user ended it
            every = torch.cat([prediction[i : i + 1], values])
            if table is not None:
                yield _coalitions(near.same(samples, i)[:, :K], table, every)
            else:
                z = near.features(samples, i)[: K + 1]
                weights = weights_of(op, kernel, distances_of(op, distance, z, z[0]))
                yield from_rows(torch.from_numpy(z), torch.from_numpy(weights), every)
            bar.update()
            if model.interrupted and not near.shared:
                return

    with bar:
        runs, note = settings.run(model, systems, e)
    return finish(
        runs, prediction, model.scalar, near.names, kind="table", evaluations=model.evaluations,
        note=note, interrupted=model.interrupted,
    )  # fmt: skip


def _values(model: Model, columns: Columns, samples: Samples) -> Tensor:
    return model(lambda a, b: columns.back(samples.rows[a:b].copy()), len(samples.rows))


def _coalitions(same: np.ndarray, table: np.ndarray, values: Tensor) -> Equations:
    """Of samples that agree with the explicand in some features; `table` weighs by how many."""
    kept = np.full(same.shape[1] + 1, len(same))
    kept[1:] = same.sum(0)
    weights = torch.from_numpy(table[kept])
    return from_coalitions(words_of(same), weights, values, len(same))
