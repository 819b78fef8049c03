"""What all plots share: paper, colours, names, and the choice of a row and an output."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from microtome import _check
from microtome.errors import ArgumentError, PackageError

POSITIVE, NEGATIVE = "#cf3a4c", "#2c6fb3"
INK, SOFT, LINE, REST = "#26282c", "#6b7078", "#e3e5e8", "#9aa0a8"
_WIDER = (
    "Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans JP", "Source Han Sans", "PingFang SC",
    "Hiragino Sans", "Microsoft YaHei", "Yu Gothic", "Malgun Gothic", "WenQuanYi Micro Hei",
    "Noto Sans Devanagari", "Noto Sans Thai", "Noto Emoji", "Segoe UI Emoji", "Symbola",
)  # fmt: skip
_ROUNDING = 1e-9  # of the largest value: standard errors below are those of a float64 sum
CUT = 28  # letters of a name that are shown
ERRORS = 2.0  # standard errors to each side of an error bar


@dataclass(frozen=True)
class Chosen:
    """One output, of one row or of all, as arrays.

    Attributes:
        values, stderr: [p] for one row, else [e, p]. NaN standard errors are zeros here.
        base, full: numbers for one row, else [e].
        shown: the players' values, [p] or [e, p], or None.
        names: p names.
        output: the output's name, or "".
        exact: whether there are no standard errors to draw.
        called: what base and full are.
    """

    values: np.ndarray
    stderr: np.ndarray
    base: Any
    full: Any
    shown: Any
    names: tuple[str, ...]
    output: str
    exact: bool
    called: tuple[str, str]


def choose(op: str, result: Any, row: int | None, output: int | str | None) -> Chosen:
    """A row (None: all) and an output (None: the one with the largest full value, on average).

    Raises:
        ArgumentError: no such row or output.
    """
    values, stderr = array(result.values), array(result.stderr)
    base, full = array(result.base_values), array(result.full_values)
    named = tuple(result.players.view.get("outputs", ()))
    called = result.players.view.get("ends", ("base", "f(x)"))
    title = ""
    if values.ndim == 3:
        count = values.shape[2]
        if output is None:
            output = int(np.nan_to_num(full).mean(0).argmax())
        elif isinstance(output, str):
            _check.one_of(op, "output", output, named)
            output = named.index(output)
        _check.between(op, "output", output, 0, count - 1)
        title = named[output] if len(named) == count else f"output {output}"
        values, stderr, base, full = (a[..., output] for a in (values, stderr, base, full))
    elif output not in (None, 0):
        msg = f"{op}: there is one output, so output must be 0 or None, got output={output!r}."
        raise ArgumentError(msg)
    shown = result.players.shown
    shown = shown if shown is None or isinstance(shown, np.ndarray) else array(shown)
    stderr = np.nan_to_num(stderr)
    exact = float(stderr.max(initial=0)) <= _ROUNDING * float(np.nanmax(np.abs(values), initial=0))
    if row is not None:
        if not 0 <= row < len(values):
            msg = f"{op}: row must be between 0 and {len(values) - 1}, got row={row}."
            raise ArgumentError(msg)
        values, stderr, base, full = values[row], stderr[row], float(base[row]), float(full[row])
        shown = None if shown is None else shown[row]
        if np.isnan(values).any():
            msg = f"{op}: row {row} has no values; the sampling ended before it was begun."
            raise ArgumentError(msg)
    return Chosen(values, stderr, base, full, shown, result.names, title, exact, called)


def array(a: Any) -> np.ndarray:
    """A tensor or an array as float64."""
    a = a.detach().cpu().double().numpy() if hasattr(a, "detach") else a
    return np.asarray(a, dtype=np.float64)


def ranked(size: np.ndarray, limit: int, op: str) -> tuple[list[int], list[int]]:
    """The players with the largest `size`, largest first, and all others.

    One left over is shown too: a line for "1 other" would take as much room.
    """
    if limit < 1:
        msg = f"{op}: limit must be at least 1 player, got limit={limit}."
        raise ArgumentError(msg)
    order = np.argsort(-size, kind="stable").tolist()
    if len(order) == limit + 1:
        limit += 1
    return order[:limit], order[limit:]


def cut(name: str, letters: int = CUT) -> str:
    """A name, its middle left out if it is long."""
    name = " ".join(name.split()) or repr(name)[1:-1]
    if len(name) <= letters:
        return name
    head = (letters - 1) * 2 // 3
    return f"{name[:head]}…{name[len(name) - (letters - 1 - head) :]}"


def labels(chosen: Chosen, players: Sequence[int]) -> list[str]:
    """Names, and what the row has there, where that is known."""
    if chosen.shown is None:
        return [cut(chosen.names[j]) for j in players]
    return [f"{cut(chosen.names[j])} = {number(chosen.shown[j])}" for j in players]


def number(value: Any, *, sign: bool = False) -> str:
    """Three figures, with a real minus; other things as text."""
    if isinstance(value, str | bytes | bool) or value is None:
        return cut(str(value), 16)
    try:
        value = float(value)
    except (TypeError, ValueError):
        return cut(str(value), 16)
    if not math.isfinite(value):
        return "missing" if math.isnan(value) else str(value)
    if value == int(value) and abs(value) < 1e6 and not sign:
        text = str(int(value))
    else:
        text = f"{value:.0f}" if 1000 <= abs(value) < 1e6 else f"{value:.3g}"
    if sign and value > 0:
        text = f"+{text}"
    return text.replace("-", "\u2212")  # a minus, not a hyphen


def alike(values: Any) -> Callable[[float], str]:
    """Writes signed numbers of one picture with as many decimals as give the largest three figures.

    Very large and very small ones are written each by itself.
    """
    top = float(np.abs(np.asarray(values, dtype=np.float64)).max(initial=0))
    if not 1e-4 <= top < 1e6:
        return lambda value: number(value, sign=True)
    places = max(0, 2 - math.floor(math.log10(top)))

    def write(value: float) -> str:
        text = f"{value:+.{places}f}"
        return text[1:] if float(text) == 0 else text.replace("-", "\u2212")

    return write


def ends(chosen: Chosen) -> str:
    """Where the values lead from and to, in words."""
    write = alike([chosen.base, chosen.full])
    base, full = (write(value).lstrip("+") for value in (chosen.base, chosen.full))
    first, last = chosen.called
    return (f"{chosen.output}:  " if chosen.output else "") + f"{first} {base}  →  {last} {full}"


def halo() -> list[Any]:
    """White around letters that lie over lines."""
    from matplotlib.patheffects import withStroke

    return [withStroke(linewidth=2.5, foreground="white")]


def colour(value: float) -> str:
    """Red for what raises the value, blue for what lowers it."""
    return POSITIVE if value >= 0 else NEGATIVE


def diverging() -> Any:
    """The colour map from NEGATIVE through white to POSITIVE."""
    from matplotlib.colors import LinearSegmentedColormap

    stops = [NEGATIVE, "#9cc0e2", "#f7f7f7", "#efa9af", POSITIVE]
    return LinearSegmentedColormap.from_list("microtome", stops)


def paper(
    op: str, width: float, height: float, title: str | None = None, layout: str = "constrained"
) -> Any:
    """An empty figure, inches.

    Raises:
        PackageError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        msg = f"{op}: matplotlib is not installed. Install microtome[plot]."
        raise PackageError(msg) from error
    figure = Figure(figsize=(width, height), layout=layout, facecolor="white")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.08)
    if title:
        figure.suptitle(title, fontsize=11, x=0.1 / width, **as_is(INK), ha="left")
    return figure


def as_is(shade: str) -> dict[str, Any]:
    """How to draw text that comes from users: as it is, and from other fonts if need be."""
    return {"color": shade, "parse_math": False, "fontfamily": fonts()}


@functools.cache
def fonts() -> list[str]:
    """matplotlib's own font, and those installed that have the letters it lacks."""
    from matplotlib.font_manager import get_font_names

    installed = set(get_font_names())
    return ["DejaVu Sans", *(name for name in _WIDER if name in installed)]


def bare(axes: Any, *, left: bool = False) -> None:
    """Axes with soft ticks, a light grid of values, and no frame but the lower line."""
    for side in ("top", "right", *(() if left else ("left",))):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(LINE)
    axes.tick_params(colors=SOFT, labelsize=8.5, length=0, color=LINE)
    axes.set_axisbelow(True)
    axes.grid(axis="x", color=LINE, linewidth=0.7)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set(color=SOFT, fontsize=9)


def name_ticks(axes: Any, names: Sequence[str]) -> None:
    """Names down the left side, the first at the top."""
    axes.set_yticks(range(len(names)), names, fontsize=9.5, **as_is(INK))
    axes.set_ylim(len(names) - 0.4, -0.6)


def save(figure: Any, path: str | Path) -> Path:
    """Write the figure; letters that no installed font has become boxes, silently.

    Raises:
        ArgumentError: the ending of the path is no format that can be written.
    """
    path = Path(path)
    known = sorted(figure.canvas.get_supported_filetypes())
    if path.suffix[1:].lower() not in known:
        msg = f"plot: the ending of the path must be one of {', '.join(known)}, got {path.name!r}."
        raise ArgumentError(msg)
    with boxes_for_letters():
        figure.savefig(path, dpi=160, facecolor="white")
    return path


@contextmanager
def boxes_for_letters() -> Iterator[None]:
    """Without matplotlib's warning of letters that its font lacks, which are drawn as boxes."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"(?s)Glyph .* missing from")
        yield


def scale_words(chosen: Chosen, what: str) -> str:
    """The label of the value axis."""
    text = ", ".join(filter(None, (what, chosen.output)))
    return text if chosen.exact else f"{text}   (bars: ±{ERRORS:g} standard errors)"
