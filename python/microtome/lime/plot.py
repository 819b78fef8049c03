"""Bars of the largest coefficients of one explanation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from microtome.errors import PackageError
from microtome.shapley.plots.canvas import INK, as_is, boxes_for_letters, cut

if TYPE_CHECKING:
    from microtome.lime.result import LimeExplanation

_UP, _DOWN = "#1f6f8b", "#c2410c"


def figure() -> Any:
    """The figure class of matplotlib's file backend.

    Raises:
        PackageError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        msg = f"plot: matplotlib is not there ({error}). Install it: pip install matplotlib"
        raise PackageError(msg) from error

    def make(size: tuple[float, float]) -> Any:
        made = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(made)
        return made

    return make


def draw_bars(axes: Any, names: Sequence[str], values: Sequence[float], title: str) -> None:
    """Horizontal bars, the first name on top; long names lose their middle."""
    place = range(len(names), 0, -1)
    axes.barh(list(place), values, color=[_UP if v > 0 else _DOWN for v in values])
    axes.set_yticks(list(place), [cut(name, 34) for name in names], **as_is(INK))
    axes.axvline(0, color="#333333", linewidth=0.8)
    axes.set_title(title, fontsize=10)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)


def bars(
    explanation: LimeExplanation,
    path: str | Path,
    *,
    row: int = 0,
    output: int = 0,
    limit: int = 10,
) -> Path:
    """Draw the largest coefficients of a row, with its fidelity in the title."""
    found = explanation.top(limit, row, output)
    scores = [a[row] if a.dim() == 1 else a[row, output] for a in _scores(explanation)]
    make = figure()
    made = make((6.4, 1.2 + 0.3 * max(1, len(found))))
    axes = made.subplots()
    title = "f = {:.4g}, local model {:.4g}, R² {:.2f}".format(*map(float, scores))
    draw_bars(axes, [one["feature"] for one in found], [one["value"] for one in found], "")
    made.suptitle(title, fontsize=10)  # over the names too: it is wider than short bars
    axes.set_xlabel("local coefficient", fontsize=9)
    path = Path(path)
    with boxes_for_letters():
        made.savefig(path)
    return path


def _scores(explanation: LimeExplanation) -> tuple[Any, Any, Any]:
    return explanation.prediction, explanation.local_prediction, explanation.fidelity
