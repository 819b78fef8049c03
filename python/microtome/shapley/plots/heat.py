"""Interactions of pairs of players as a heat map."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from microtome import _check
from microtome.errors import ArgumentError, ShapeError
from microtome.shapley.plots.canvas import (
    INK,
    SOFT,
    array,
    as_is,
    cut,
    diverging,
    number,
    paper,
    ranked,
    save,
)


def heat(
    interactions: Any,
    path: str | Path,
    *,
    row: int = 0,
    output: int = 0,
    limit: int = 20,
    title: str | None = None,
) -> Path:
    """Red where two players add to each other, blue where they take away; the diagonal is single.

    Args:
        interactions: Interactions, or what has `.names` and a `.matrix` [p, p], [e, p, p] or
            [e, p, p, o].
        path: where to write; the ending says the format.
        row: which row, where there are several.
        output: which output, where there are several.
        limit: players drawn, those with the largest sums of |interaction|; others are left out.
        title: words above.

    Raises:
        ArgumentError: there is no matrix of interactions, or no such row or output.
        PackageError: matplotlib is not installed.

    The colours are scaled to the largest interaction of two players; a single player beyond that
    has the end's colour.
    """
    op = "plot: heat"
    if not hasattr(interactions, "matrix"):
        msg = (
            f"{op}: these are values of single players, not interactions. Use kind='bar', or plot "
            "what shapley.interactions() returns."
        )
        raise ArgumentError(msg)
    matrix, names = interactions.matrix, tuple(map(str, interactions.names))
    matrix = array(matrix() if callable(matrix) else matrix)
    if matrix.ndim == 4:
        _check.between(op, "output", output, 0, matrix.shape[3] - 1)
        matrix = matrix[..., output]
    if matrix.ndim == 3:
        _check.between(op, "row", row, 0, matrix.shape[0] - 1)
        matrix = matrix[row]
    p = len(names)
    if matrix.shape != (p, p):
        msg = f"{op}: matrix must be [p, p] for p={p} names, got shape {list(matrix.shape)}."
        raise ShapeError(msg)
    between = np.where(np.eye(p, dtype=bool), 0, np.nan_to_num(matrix))
    kept, left_out = ranked(np.abs(np.nan_to_num(matrix)).sum(1), limit, op)
    kept = sorted(kept)  # in the players' own order: neighbours stay neighbours
    shown, pairs = matrix[np.ix_(kept, kept)], between[np.ix_(kept, kept)]
    top = float(np.abs(pairs).max()) or float(np.nanmax(np.abs(shown), initial=0)) or 1.0
    side = max(2.2, 0.42 * len(kept))
    words = [cut(names[j], 22) for j in kept]
    figure = paper(op, side + 2.9, side + 1.6, title)
    axes = figure.add_subplot()
    drawn = axes.imshow(shown, cmap=diverging(), vmin=-top, vmax=top)
    at = range(len(kept))
    axes.set_xticks(at, words, rotation=45, ha="right", rotation_mode="anchor", **as_is(INK))
    axes.set_yticks(at, words, **as_is(INK))
    axes.tick_params(length=0, labelsize=9, labelcolor=INK)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.set_xticks(np.arange(len(kept) + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(len(kept) + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=1.6)
    axes.tick_params(which="minor", length=0)
    if len(kept) <= 12:
        for i in at:
            for j in at:
                value = shown[i, j]
                shade = "white" if abs(value) > 0.72 * top else INK
                axes.text(j, i, _short(value), ha="center", va="center", fontsize=7.5, color=shade)
    scale = figure.colorbar(drawn, ax=axes, fraction=0.045, pad=0.02, aspect=28)
    scale.outline.set_visible(False)
    scale.ax.tick_params(length=0, labelsize=8, labelcolor=SOFT)
    if left_out:
        axes.set_xlabel(f"{len(left_out)} players left out", fontsize=8.5, color=SOFT)
    return save(figure, path)


def _short(value: float) -> str:
    return number(float(f"{value:.2g}"), sign=True) if value else "0"
