"""The report's figures, as SVG with the colours and the font of the page, or as PNG files."""

from __future__ import annotations

import importlib
import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from microtome.errors import PackageError

# matplotlib draws in these; `svg` swaps them for the page's, so one figure does light and dark.
_INK, _GRID, _FIRST, _SECOND = "#010203", "#040506", "#070809", "#0a0b0c"
_PAGE = {
    _INK: "var(--soft)",
    _GRID: "var(--line)",
    _FIRST: "var(--first)",
    _SECOND: "var(--second)",
}
_PAPER = {_INK: "#333333", _GRID: "#dddddd", _FIRST: "#1f6f8b", _SECOND: "#c2410c"}
_SIZE = (4.6, 2.75)  # inches; about a phone's width, so that the letters keep their size there


@dataclass(frozen=True)
class Figure:
    """A figure: a file stem, what a screen reader says, the words below it, and who draws it."""

    name: str
    alt: str
    caption: str
    draw: Callable[[Any, dict[str, str]], None]


def matplotlib() -> Any:
    """The Agg figure class; raises PackageError where matplotlib is not installed."""
    try:
        importlib.import_module("matplotlib").use("Agg")
        return importlib.import_module("matplotlib.figure").Figure
    except ImportError as error:
        msg = f"report: matplotlib is not there ({error}). Install it: pip install matplotlib"
        raise PackageError(msg) from error


def svg(figure: Figure) -> str:
    """An <svg> element without any outside reference, to be put into a page."""
    settings = importlib.import_module("matplotlib").rc_context
    buffer = io.StringIO()
    with settings({"svg.fonttype": "none", "svg.hashsalt": figure.name}):
        _drawn(figure, {name: name for name in _PAGE}).savefig(
            buffer,
            format="svg",
            transparent=True,
            metadata={"Date": None, "Creator": None, "Format": None, "Type": None},
        )
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\s(xmlns(:xlink)?|version|width|height)="[^"]*"', "", text, count=5)
    text = re.sub(r'id="(figure|axes|patch|text|line2d|matplotlib|xtick|ytick)\.?_[^"]*"', "", text)
    text = re.sub(r"font: ([0-9.]+px) [^;\"]*", r"font-size: \1; font-family: inherit", text)
    for mark, colour in _PAGE.items():
        text = text.replace(mark, colour)
    return text.replace("<svg", f'<svg role="img" aria-label="{figure.alt}"', 1)


def png(figure: Figure, path: Path) -> None:
    """The same figure as a picture file on white paper, 160 dots an inch."""
    _drawn(figure, _PAPER).savefig(path, format="png", dpi=160, facecolor="white")


def _drawn(figure: Figure, colours: dict[str, str]) -> Any:
    drawn = matplotlib()(figsize=_SIZE, layout="constrained")
    axes = drawn.add_subplot()
    ink, grid = colours[_INK], colours[_GRID]
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(grid)
    axes.tick_params(colors=ink, labelsize=9, length=3, color=grid)
    axes.grid(axis="y", color=grid, linewidth=0.7)
    axes.set_axisbelow(True)
    figure.draw(axes, colours)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set(color=ink, fontsize=9)
    return drawn


def curve(history: Sequence[dict[str, Any]], key: str = "fvu") -> Figure:
    """FVU over the steps of a training log; held-out points beside it where the log has them."""

    def draw(axes: Any, colours: dict[str, str]) -> None:
        points = [(h["step"], h[key]) for h in history if h.get(key) is not None]
        held = [(h["step"], h[f"held_out_{key}"]) for h in history if h.get(f"held_out_{key}")]
        if points:
            axes.plot(*zip(*points, strict=True), color=colours[_FIRST], linewidth=1.6)
        if held:
            axes.plot(*zip(*held, strict=True), color=colours[_SECOND], marker="o", markersize=3)
        values = [value for _, value in points + held]
        if values and min(values) > 0:
            axes.set_yscale("log")
            _plain_ticks(axes, min(values), max(values))
        axes.set(xlabel="training step", ylabel="fraction of variance unexplained")

    return Figure(
        "fvu",
        "Fraction of variance unexplained, by training step",
        "Fraction of variance unexplained (FVU): line, training batches; dots, held-out tokens. "
        "Logarithmic; lower is better.",
        draw,
    )


def _plain_ticks(axes: Any, low: float, high: float) -> None:
    """Ticks such as 0.2 and 0.5, which are read faster than powers of ten."""
    ticker = importlib.import_module("matplotlib.ticker")
    wanted = [m * 10.0**e for e in range(-6, 4) for m in (1, 2, 5)]
    low, high = low * 0.9, high * 1.1
    axes.set_ylim(low, high)
    axes.yaxis.set_major_locator(ticker.FixedLocator([t for t in wanted if low <= t <= high]))
    axes.yaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    axes.yaxis.set_minor_locator(ticker.NullLocator())


def dead(history: Sequence[dict[str, Any]]) -> Figure:
    """The share of dead latents over the steps of a training log."""

    def draw(axes: Any, colours: dict[str, str]) -> None:
        points = [
            (h["step"], 100 * h["dead_fraction"])
            for h in history
            if h.get("dead_fraction") is not None
        ]
        if points:  # before the axis and not clipped by it, or a line at 0 is hidden
            style = {"color": colours[_FIRST], "linewidth": 1.6, "zorder": 3, "clip_on": False}
            axes.plot(*zip(*points, strict=True), **style)
        axes.set_ylim(0, max([5.0, *(1.1 * y for _, y in points)]))
        axes.set(xlabel="training step", ylabel="dead latents, %")

    return Figure(
        "dead",
        "Share of dead latents, by training step",
        "Latents that had not fired for a while at that step. They cost memory and say nothing.",
        draw,
    )


def density(share: Tensor) -> Figure:
    """How often features fire: a histogram of log10 of the share of tokens."""
    logs = torch.log10(share[share > 0].double())
    never = int((share == 0).sum())

    def draw(axes: Any, colours: dict[str, str]) -> None:
        axes.hist(logs.tolist(), bins=48, color=colours[_FIRST], linewidth=0)
        axes.set(xlabel="share of tokens on which it fires, log10", ylabel="features")

    return Figure(
        "density",
        "Histogram of log10 firing frequency",
        f"How often each feature fires: -2 means on 1 token in 100. {never:,} never fired here.",
        draw,
    )


def alignment(W_enc: Tensor, W_dec: Tensor) -> Figure:
    """The cosine between each feature's encoder and decoder direction."""
    cosine = torch.nn.functional.cosine_similarity(W_enc.detach(), W_dec.detach(), dim=1)

    def draw(axes: Any, colours: dict[str, str]) -> None:
        axes.hist(cosine.tolist(), bins=48, color=colours[_FIRST], linewidth=0)
        axes.set(xlabel="cosine of encoder and decoder direction", ylabel="features")

    return Figure(
        "alignment",
        "Histogram of the cosine between encoder and decoder directions",
        "1 means that a feature is read along the direction it writes. Features that share a "
        "direction with others are read aslant, to tell them apart.",
        draw,
    )
