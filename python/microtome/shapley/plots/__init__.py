"""Pictures of Shapley values, one function for each kind.

    bar         the values of a row, or the mean |value| over rows
    waterfall   from the base value to a row's own, step by step
    beeswarm    every row a dot, by player
    text        a text with its pieces highlighted (text_html: as HTML)
    image       superpixels over their image
    series      stretches of time under their series
    heat        interactions of pairs

Red raises the value, blue lowers it. No function touches matplotlib's global state.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from microtome import _check
from microtome.shapley.plots.heat import heat
from microtome.shapley.plots.placed import image, series
from microtome.shapley.plots.table import bar, beeswarm, waterfall
from microtome.shapley.plots.written import text, text_html

__all__ = ["bar", "beeswarm", "draw", "heat", "image", "series", "text", "text_html", "waterfall"]

_KINDS = {
    "bar": bar,
    "beeswarm": beeswarm,
    "waterfall": waterfall,
    "text": text,
    "image": image,
    "series": series,
    "heat": heat,
}


def draw(result: Any, path: str | Path, kind: str = "auto", **options: Any) -> Path:
    """Draw a result.

    Args:
        result: ShapleyValues, or interactions (an object with `.matrix` and `.names`).
        path: where to write the picture; its ending says the format.
        kind: one of the kinds above, or "auto": what suits the players; for tables a waterfall of
            one row, a beeswarm of several.
        **options: of the kind's function: `row`, `output`, `limit`, `title`.

    Returns:
        The path.

    Raises:
        ArgumentError: an unknown kind, or one that does not suit the players.
        PackageError: matplotlib is not installed.
    """
    _check.one_of("plot", "kind", kind, ("auto", *_KINDS))
    if kind == "auto":
        kind = _suited(result)
    return _KINDS[kind](result, path, **options)


def _suited(result: Any) -> str:
    if hasattr(result, "matrix"):
        return "heat"
    if result.players.kind in ("text", "image", "series"):
        return str(result.players.kind)
    return "waterfall" if len(result.values) == 1 else "beeswarm"
