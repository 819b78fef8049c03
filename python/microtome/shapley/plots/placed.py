"""Players that have a place: superpixels over their image, stretches of time under their series."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from microtome.errors import ArgumentError
from microtome.shapley.plots.canvas import (
    ERRORS,
    INK,
    LINE,
    SOFT,
    Chosen,
    as_is,
    bare,
    choose,
    colour,
    cut,
    diverging,
    ends,
    paper,
    save,
    scale_words,
)


def image(
    result: Any,
    path: str | Path,
    *,
    row: int = 0,
    output: int | str | None = None,
    limit: int | None = None,
    title: str | None = None,
) -> Path:
    """The image, and beside it, over a pale grey copy, the superpixels in red and blue.

    Args:
        result: ShapleyValues of an image game.
        path: where to write; the ending says the format.
        row: which row.
        output: by number or name; None for the one with the largest full value.
        limit: superpixels coloured, those with the largest |value|; None for all.
        title: words above.
    """
    op = "plot: image"
    _of_kind(op, result, "image", "superpixels")
    chosen = choose(op, result, row, output)
    seen, segments = result.players.view["image"], result.players.view["segments"]
    h, w = segments.shape
    v = chosen.values.copy()
    if limit is not None:
        v[np.argsort(-np.abs(v), kind="stable")[max(0, limit) :]] = 0
    top = float(np.abs(chosen.values).max()) or 1.0
    across = 3.6
    tall = min(8.0, max(1.6, across * h / w))
    across = tall * w / h
    figure = paper(op, 2 * across + 1.15, tall + 0.62 + (0.3 if title else 0), title, "compressed")
    from matplotlib.collections import LineCollection

    left, right = figure.subplots(1, 2)
    colours = seen[:, :, 0] if seen.shape[2] == 1 else seen
    left.imshow(colours, cmap="gray", vmin=0, vmax=1)
    right.imshow(0.45 + 0.55 * seen.mean(2), cmap="gray", vmin=0, vmax=1)
    field = np.append(v, 0.0)[segments]  # a pixel of segment -1 reads the zero at the end
    drawn = right.imshow(
        field, cmap=diverging(), vmin=-top, vmax=top,
        alpha=np.sqrt(np.abs(field) / top) * 0.82, interpolation="nearest",
    )  # fmt: skip
    outlines = LineCollection(_edges(segments), colors=INK, linewidths=0.5, alpha=0.4)
    right.add_collection(outlines, autolim=False)
    for axes in (left, right):
        axes.set_xticks([])
        axes.set_yticks([])
        for side in axes.spines.values():
            side.set_visible(False)
    left.set_title(ends(chosen), fontsize=9, loc="left", **as_is(SOFT))
    error = "" if chosen.exact else f", about ±{ERRORS * _rms(chosen.stderr):.2g}"
    right.set_title(
        f"{len(chosen.names)} superpixel{'s' * (len(chosen.names) > 1)}{error}",
        fontsize=9,
        color=SOFT,
        loc="left",
    )
    scale = figure.colorbar(drawn, ax=right, fraction=0.05, pad=0.03, aspect=25)
    scale.outline.set_visible(False)
    scale.ax.tick_params(length=0, labelsize=8, labelcolor=SOFT)
    scale.solids.set_alpha(1)
    return save(figure, path)


def _rms(a: np.ndarray) -> float:
    return float(np.sqrt((a * a).mean()))


def _edges(segments: np.ndarray) -> np.ndarray:
    """[lines, 2, 2]: from (x, y) to (x, y), between neighbouring pixels of two superpixels."""
    y, x = np.nonzero(segments[:, 1:] != segments[:, :-1])
    upright = np.stack([x + 0.5, y - 0.5, x + 0.5, y + 0.5], 1)
    y, x = np.nonzero(segments[1:] != segments[:-1])
    level = np.stack([x - 0.5, y + 0.5, x + 0.5, y + 0.5], 1)
    return np.concatenate([upright, level]).reshape(-1, 2, 2)


def series(
    result: Any,
    path: str | Path,
    *,
    row: int = 0,
    output: int | str | None = None,
    title: str | None = None,
) -> Path:
    """The series on a ground of red and blue by its stretches' values, and the values below.

    Args:
        result: ShapleyValues of a series game.
        path: where to write; the ending says the format.
        row: which row.
        output: by number or name; None for the one with the largest full value.
        title: words above.
    """
    op = "plot: series"
    _of_kind(op, result, "series", "stretches of a series")
    chosen = choose(op, result, row, output)
    view = result.players.view
    lines, bounds, named = view["series"], view["bounds"], view["channels"]
    t, c = lines.shape
    v = chosen.values.reshape(-1, len(bounds) - 1)  # [1 or c, stretches]
    error = chosen.stderr.reshape(v.shape)
    panels = c if view["per_channel"] or c > 1 else 1
    sheets = len(v)
    heights = [1.0] * panels + [0.75] * sheets
    tall = min(12.0, 0.95 + 0.95 * panels + 0.8 * sheets + (0.3 if title else 0))
    figure = paper(op, 7.6, max(2.6, tall), title)
    grid = figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    top = float(np.abs(v).max()) or 1.0
    for k in range(panels):
        axes = grid[k]
        _ground(axes, v[k if sheets > 1 else 0], bounds, top)
        style = {"marker": "o", "markersize": 2.5} if t <= 60 else {}
        axes.plot(range(t), lines[:, k], color=INK, linewidth=1.2, zorder=3, **style)
        bare(axes, left=True)
        axes.grid(visible=False)
        if c > 1:
            axes.set_ylabel(cut(named[k], 14), fontsize=9, **as_is(INK))
    low, high = (v - ERRORS * error).min(), (v + ERRORS * error).max()
    room = 0.08 * (max(high, 0.0) - min(low, 0.0) or 1.0)
    for k in range(sheets):
        grid[panels + k].set_ylim(min(low, 0.0) - room, max(high, 0.0) + room)
        _bars(grid[panels + k], v[k], error[k], bounds, chosen)
        if sheets > 1:
            grid[panels + k].set_ylabel(cut(named[k], 14), fontsize=9, **as_is(INK))
    grid[-1].set_xlim(-0.5, t - 0.5)
    grid[-1].set_xlabel("step")
    grid[0].set_title(ends(chosen), fontsize=9, loc="left", **as_is(SOFT))
    what = scale_words(chosen, "Shapley value")
    grid[panels].set_title(what, fontsize=9, loc="left", **as_is(SOFT))
    return save(figure, path)


def _ground(axes: Any, v: np.ndarray, bounds: list[int], top: float) -> None:
    for value, start, end in zip(v, bounds[:-1], bounds[1:], strict=True):
        shade = 0.55 * abs(float(value)) / top
        axes.axvspan(start - 0.5, end - 0.5, color=colour(value), alpha=shade, linewidth=0)


def _bars(axes: Any, v: np.ndarray, error: np.ndarray, bounds: list[int], chosen: Chosen) -> None:
    starts, widths = np.array(bounds[:-1]), np.diff(bounds)
    middle = starts - 0.5 + widths / 2
    shades = [colour(value) for value in v]
    axes.bar(middle, v, width=widths - np.minimum(0.25 * widths, 0.6), color=shades, linewidth=0)
    if not chosen.exact:
        at = error > 0
        axes.errorbar(middle[at], v[at], yerr=ERRORS * error[at], fmt="none", ecolor=INK,
                      elinewidth=0.8, capsize=1.5)  # fmt: skip
    axes.axhline(0, color=SOFT, linewidth=0.8)
    bare(axes, left=True)
    axes.grid(visible=False)
    axes.grid(axis="y", color=LINE, linewidth=0.7)


def _of_kind(op: str, result: Any, kind: str, what: str) -> None:
    if result.players.kind != kind:
        msg = f"{op}: these players are {result.players.kind}, not {what}. Use kind='bar'."
        raise ArgumentError(msg)
