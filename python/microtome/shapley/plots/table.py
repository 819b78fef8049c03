"""Bars, waterfalls and swarms: values of players that have names and no place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from microtome.shapley.plots.canvas import (
    ERRORS,
    INK,
    LINE,
    REST,
    SOFT,
    alike,
    bare,
    choose,
    colour,
    cut,
    halo,
    labels,
    name_ticks,
    number,
    paper,
    ranked,
    save,
    scale_words,
)

PLAIN = "#4a5a78"  # of sizes, which have no sign
_LINE = 0.29  # inches for a player


def bar(
    result: Any,
    path: str | Path,
    *,
    row: int | None = None,
    output: int | str | None = None,
    limit: int = 20,
    title: str | None = None,
) -> Path:
    """Bars: the values of one row, or the mean |value| over all rows.

    Args:
        result: ShapleyValues.
        path: where to write; the ending says the format.
        row: which row; None for the only one, or for the mean over all.
        output: by number or name; None for the one with the largest full value.
        limit: players drawn; the rest is summed in one bar.
        title: words above.

    Error bars are two standard errors to each side. Those of a mean over rows are at most that:
    rows share their permutations, so errors are added as if they went together.
    """
    op = "plot: bar"
    if row is None and len(result.values) == 1:
        row = 0
    chosen = choose(op, result, row, output)
    if row is None:
        found = ~np.isnan(chosen.values).any(1)
        v, error = np.abs(chosen.values[found]).mean(0), chosen.stderr[found].mean(0)
        signed = False
        what = f"mean |value| over {int(found.sum())} rows"
    else:
        v, error, signed = chosen.values, chosen.stderr, True
        what = "Shapley value"
    first, rest = ranked(np.abs(v), limit, op)
    words = labels(chosen, first) if signed else [cut(chosen.names[j]) for j in first]
    sizes = [*v[first], *([v[rest].sum()] if rest else [])]
    errors = [*error[first], *([0.0] if rest else [])]
    shades = [colour(s) if signed else PLAIN for s in sizes]
    if rest:
        words.append(f"sum of {len(rest)} others")
        shades[-1] = REST
    figure = paper(op, 7.0, 1.05 + _LINE * len(words), title)
    axes = figure.add_subplot()
    bare(axes)
    at = range(len(words))
    axes.barh(at, sizes, height=0.68, color=shades, linewidth=0)
    if not chosen.exact:
        _error_bars(axes, sizes, at, errors)
    write = alike(sizes)
    low = min(0.0, *(s - ERRORS * e for s, e in zip(sizes, errors, strict=True)))
    high = max(0.0, *(s + ERRORS * e for s, e in zip(sizes, errors, strict=True)))
    span = high - low or 1.0
    room = max(0.13, 0.026 * max(len(write(s)) for s in sizes)) * span  # for the numbers
    left, right = (room if low < 0 else 0.0), (room if high > 0 or low == 0 else 0.0)
    axes.set_xlim(low - left, high + right)
    for i, (s, e) in enumerate(zip(sizes, errors, strict=True)):
        end = s + np.copysign(ERRORS * e + 0.012 * span, s)
        side = "left" if s >= 0 else "right"
        said = write(s) if signed else write(s).lstrip("+")
        axes.text(end, i, said, va="center", ha=side, fontsize=8.5, color=INK)
    axes.axvline(0, color=SOFT, linewidth=0.8)
    name_ticks(axes, words)
    axes.set_xlabel(scale_words(chosen, what), loc="left")
    return save(figure, path)


def _error_bars(axes: Any, sizes: Any, at: Any, errors: Any) -> None:
    kept = [i for i, e in enumerate(errors) if e > 0]
    axes.errorbar(
        [sizes[i] for i in kept], [at[i] for i in kept], xerr=[ERRORS * errors[i] for i in kept],
        fmt="none", ecolor=INK, elinewidth=0.9, capsize=2.2, capthick=0.9, zorder=4,
    )  # fmt: skip


def waterfall(
    result: Any,
    path: str | Path,
    *,
    row: int = 0,
    output: int | str | None = None,
    limit: int = 20,
    title: str | None = None,
) -> Path:
    """How a row's values lead from the base value, below, to its full value, on top.

    Args:
        result: ShapleyValues.
        path: where to write; the ending says the format.
        row: which row.
        output: by number or name; None for the one with the largest full value.
        limit: players drawn; the rest is summed in one step.
        title: words above.
    """
    op = "plot: waterfall"
    chosen = choose(op, result, row, output)
    v, error = chosen.values, chosen.stderr
    first, rest = ranked(np.abs(v), limit, op)
    words = labels(chosen, first)
    sizes = [*v[first], *([v[rest].sum()] if rest else [])]
    errors = [*error[first], *([0.0] if rest else [])]
    if rest:
        words.append(f"sum of {len(rest)} others")
    ends = chosen.base + np.cumsum(sizes[::-1])[::-1]  # after each step, from the bottom up
    starts = ends - sizes
    figure = paper(op, 7.2, 1.5 + _LINE * len(words), title)
    axes = figure.add_subplot()
    bare(axes)
    tips = ERRORS * np.array(errors)
    low, high = min(*starts, *(ends - tips)), max(*starts, *(ends + tips))
    span = (high - low) or 1.0
    axes.set_xlim(low - 0.19 * span, high + 0.17 * span)
    name_ticks(axes, words)
    write = alike(sizes)
    for i, (start, size) in enumerate(zip(starts, sizes, strict=True)):
        last = rest and i == len(sizes) - 1
        _arrow(axes, start, size, i, 0.018 * span, REST if last else colour(size))
        _label(axes, start, size, ERRORS * errors[i], i, span, write(size))
        if i + 1 < len(sizes):
            axes.plot([start, start], [i - 0.36, i + 1.36], color=SOFT, linewidth=0.6, zorder=1)
    if not chosen.exact:
        _error_bars(axes, ends, range(len(ends)), errors)
    axes.axvline(chosen.base, color=REST, linewidth=0.8, linestyle=(0, (3, 3)), zorder=0)
    axes.axvline(chosen.full, color=REST, linewidth=0.8, linestyle=(0, (3, 3)), zorder=0)
    axes.text(
        chosen.full, -0.75, f"f(x) = {number(chosen.full)}", ha="center", va="bottom", fontsize=9.5,
        color=INK, fontweight="bold",
    )  # fmt: skip
    axes.text(
        chosen.base, len(words) - 0.32, f"base value {number(chosen.base)}", ha="center", va="top",
        fontsize=9, color=SOFT, path_effects=halo(),
    )  # fmt: skip
    axes.set_ylim(len(words) + 0.25, -0.8)
    axes.set_xlabel(scale_words(chosen, "model output"), loc="left")
    return save(figure, path)


def _arrow(axes: Any, start: float, size: float, at: int, head: float, shade: str) -> None:
    end = start + size
    neck = end - np.copysign(min(head, abs(size)), size)
    half = 0.34
    outline = [
        (start, at - half), (neck, at - half), (end, at), (neck, at + half), (start, at + half),
    ]  # fmt: skip
    axes.fill(*zip(*outline, strict=True), color=shade, linewidth=0, zorder=2)


def _label(
    axes: Any, start: float, size: float, error: float, at: int, span: float, text: str
) -> None:
    end = start + size
    if abs(size) - error > 0.16 * span:
        middle = (start + end - np.copysign(error, size)) / 2
        axes.text(middle, at, text, ha="center", va="center", fontsize=8.5, color="white", zorder=5)
        return
    right = max(start, end) + (error if size >= 0 else 0) + 0.012 * span
    left = min(start, end) - (error if size < 0 else 0) - 0.012 * span
    x, side = (right, "left") if size >= 0 else (left, "right")
    axes.text(x, at, text, ha=side, va="center", fontsize=8.5, color=INK, path_effects=halo())


def beeswarm(
    result: Any,
    path: str | Path,
    *,
    output: int | str | None = None,
    limit: int = 20,
    title: str | None = None,
) -> Path:
    """Every row a dot, by player; coloured by the player's own value where it is a number.

    Args:
        result: ShapleyValues of several rows.
        path: where to write; the ending says the format.
        output: by number or name; None for the one with the largest full value.
        limit: players drawn, those with the largest mean |value|; the rest is summed by row.
        title: words above.
    """
    op = "plot: beeswarm"
    chosen = choose(op, result, None, output)
    kept = ~np.isnan(chosen.values).any(1)
    v = chosen.values[kept]
    first, rest = ranked(np.abs(v).mean(0), limit, op)
    words = [cut(chosen.names[j]) for j in first]
    columns = [v[:, j] for j in first]
    shades: list[Any] = [_feature_colours(chosen.shown, kept, j) for j in first]
    if rest:
        words.append(f"sum of {len(rest)} others")
        columns.append(v[:, rest].sum(1))
        shades.append(None)
    figure = paper(op, 7.2, 1.15 + 0.33 * len(words), title)
    axes = figure.add_subplot()
    bare(axes)
    low, high = min(c.min() for c in columns), max(c.max() for c in columns)
    span = (high - low) or 1.0
    size = 14.0 if len(v) <= 400 else 7.0
    drawn = None
    for i, (values, shade) in enumerate(zip(columns, shades, strict=True)):
        axes.axhline(i, color=LINE, linewidth=0.6, zorder=0)
        lift = _lifts(values, span * 0.009, 0.075 if size > 10 else 0.05)
        style = {"s": size, "linewidths": 0, "zorder": 3, "alpha": 0.9}
        if shade is None:
            axes.scatter(values, i + lift, color=REST, **style)
        else:
            known = ~np.isnan(shade)
            axes.scatter(values[~known], (i + lift)[~known], color=REST, **style)
            drawn = axes.scatter(
                values[known],
                (i + lift)[known],
                c=shade[known],
                cmap=_map(),
                vmin=0,
                vmax=1,
                **style,
            )
    axes.axvline(0, color=SOFT, linewidth=0.8, zorder=1)
    axes.set_xlim(low - 0.04 * span, high + 0.04 * span)
    name_ticks(axes, words)
    axes.set_xlabel(", ".join(filter(None, ("Shapley value", chosen.output))), loc="left")
    if drawn is not None:
        colours = figure.colorbar(drawn, ax=axes, aspect=55, pad=0.02, fraction=0.03)
        colours.set_ticks([0, 1], labels=["low", "high"])
        colours.outline.set_visible(False)
        colours.ax.tick_params(length=0, labelsize=8.5, labelcolor=SOFT)
        colours.set_label("feature value", color=SOFT, fontsize=9, labelpad=-12)
    return save(figure, path)


def _map() -> Any:
    """Low to high without the red and blue that say which way a value goes."""
    from matplotlib.colors import LinearSegmentedColormap

    stops = ["#3b2f7f", "#2b7f8e", "#4bb07a", "#c9c63a", "#f2b134"]
    return LinearSegmentedColormap.from_list("microtome low to high", stops)


def _feature_colours(shown: Any, kept: np.ndarray, j: int) -> np.ndarray | None:
    """[e] in [0, 1] between the 5th and the 95th percentile; None where values are no numbers."""
    if shown is None:
        return None
    try:
        column = np.asarray(shown[:, j][kept], dtype=np.float64)
    except (TypeError, ValueError):
        return None
    known = column[np.isfinite(column)]
    if len(known) == 0:
        return None
    low, high = np.percentile(known, [5, 95])
    if low == high:
        low, high = known.min(), known.max()
    if low == high:
        return np.where(np.isfinite(column), 0.5, np.nan)
    return np.clip((column - low) / (high - low), 0, 1)


def _lifts(values: np.ndarray, width: float, step: float) -> np.ndarray:
    """[e] distances from a player's line: dots that would cover each other stack up around it."""
    bins = np.round(values / width).astype(np.int64)
    lift = np.zeros(len(values))
    for held in (np.flatnonzero(bins == b) for b in np.unique(bins)):
        places = np.arange(len(held))
        stacked = (places + 1) // 2 * np.where(places % 2, 1, -1)
        crowd = min(step, 0.36 / max(1, len(held) // 2))
        lift[held] = stacked * crowd
    return lift
