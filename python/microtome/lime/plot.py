"""Pictures of one explanation: bars, a text highlighted, or segments over their image."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from microtome import _check
from microtome.errors import PackageError
from microtome.shapley import plots
from microtome.shapley.players import Players
from microtome.shapley.plots.canvas import INK, as_is, boxes_for_letters, cut
from microtome.shapley.result import ShapleyValues

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


def draw(
    explanation: LimeExplanation, path: str | Path, kind: str, *, row: int, output: int, limit: int
) -> Path:
    """Draw one row. Texts and images are drawn as Shapley values are."""
    _check.one_of("plot", "kind", kind, ("auto", "bar", "text", "image"))
    rows, outputs = len(explanation.names), explanation.coefficients[0, 0].numel()
    _check.between("plot", "row", row, 0, rows - 1)
    _check.between("plot", "output", output, 0, outputs - 1)
    if kind == "auto":
        kind = explanation.kind if explanation.kind in ("text", "image") else "bar"
    if kind == "bar":
        return bars(explanation, path, row=row, output=output, limit=limit)
    seen = _as_values(explanation, row, output)
    fidelity = float(explanation.fidelity.reshape(rows, -1)[row, output])
    title = f"LIME, local model with R² {fidelity:.2f}"
    return plots.draw(seen, path, kind, limit=limit, title=title)


def _as_values(explanation: LimeExplanation, row: int, output: int) -> ShapleyValues:
    """The local model of a row: from its intercept, by its coefficients, to its prediction.

    Where every feature is on or off and the explicand has all of them on, the sum is exact.
    """
    view = {name: values[row] for name, values in explanation.view.items()}
    names = explanation.names[row]
    if explanation.kind == "text":
        view = {"pieces": view["pieces"]}
    elif explanation.kind == "image":
        view = {"image": view["images"], "segments": view["segments"].numpy()}
    view["ends"] = ("intercept", "local model")
    one = lambda a: a.reshape(len(explanation.names), -1)[row, output].reshape(1)  # noqa: E731
    coefficients = explanation.coefficients
    values = (coefficients if coefficients.dim() == 2 else coefficients[:, :, output])[row]
    values = values[: len(names)].reshape(1, -1)
    return ShapleyValues(
        values, torch.zeros_like(values), one(explanation.intercept),
        one(explanation.local_prediction), Players(names, explanation.kind, None, view), "lime",
        "", explanation.evaluations, exact=True,
    )  # fmt: skip


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
