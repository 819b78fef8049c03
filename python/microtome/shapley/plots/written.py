"""Texts with their pieces highlighted: as a picture, and as HTML."""

from __future__ import annotations

import html
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from microtome.errors import ArgumentError
from microtome.shapley.plots.canvas import (
    INK,
    NEGATIVE,
    POSITIVE,
    REST,
    SOFT,
    Chosen,
    alike,
    as_is,
    boxes_for_letters,
    choose,
    colour,
    ends,
    fonts,
    number,
    paper,
    save,
)

_SIZE, _LEADING = 13.0, 0.46  # points, inches from line to line
_MARGIN = 0.3
_Placed = tuple[float, float, str, int]  # x and width in inches, the letters, their player or -1


def text(
    result: Any,
    path: str | Path,
    *,
    row: int = 0,
    output: int | str | None = None,
    width: float = 7.5,
    limit: int | None = None,
    title: str | None = None,
) -> Path:
    """The text, each piece on red or blue by its value, with the number below the larger ones.

    Args:
        result: ShapleyValues of a text game.
        path: where to write; the ending says the format.
        row: which row.
        output: by number or name; None for the one with the largest full value.
        width: of the picture, inches.
        limit: most numbers written; by default those of at least a tenth of the largest.
        title: words above.
    """
    op = "plot: text"
    pieces = _pieces(op, result)
    chosen = choose(op, result, row, output)
    top = float(np.abs(chosen.values).max()) or 1.0
    paper(op, width, 1.0)  # raises where there is no matplotlib
    with boxes_for_letters():
        lines, height = _laid_out(pieces, width)
    height += 0.72 + (0.3 if title else 0.0)
    figure = paper(op, width, height)
    figure.set_layout_engine("none")
    if title:
        x = _MARGIN / width
        figure.text(x, 1 - 0.26 / height, title, fontsize=11, va="center", **as_is(INK))
    _header(figure, chosen, width, height, 0.62 if title else 0.34)
    y = height - (1.06 if title else 0.78)
    write = alike([*chosen.values, chosen.base, chosen.full])
    numbered = _numbered(chosen.values, top, limit)
    for line in lines:
        for i, (x, _, said, player) in enumerate(line):
            place = (x / width, y / height)
            figure.text(*place, said, fontsize=_SIZE, va="baseline", zorder=2, **as_is(INK))
            if player >= 0:
                _ground(figure, line, i, y, chosen.values[player] / top)
        _numbers(figure, line, (y, width, height), chosen.values, numbered, write)
        y -= _LEADING
    return save(figure, path)


def text_html(
    result: Any, *, row: int = 0, output: int | str | None = None, path: str | Path | None = None
) -> str:
    """The highlighted text as an HTML fragment without outside references; hover for numbers.

    Args:
        result: ShapleyValues of a text game.
        row: which row.
        output: by number or name; None for the one with the largest full value.
        path: also write it there.
    """
    op = "plot: text_html"
    pieces = _pieces(op, result)
    chosen = choose(op, result, row, output)
    top = float(np.abs(chosen.values).max()) or 1.0
    parts = []
    for said, player in pieces:
        safe = html.escape(said)
        if player < 0:
            parts.append(safe)
            continue
        value, error = chosen.values[player], chosen.stderr[player]
        red, green, blue = _rgb(POSITIVE if value >= 0 else NEGATIVE)
        hover = number(value, sign=True) + (f" ± {number(error)}" if error else "")
        parts.append(
            f'<span title="{hover}" style="background:rgba({red},{green},{blue},'
            f'{0.75 * abs(value) / top:.3f});border-radius:3px;padding:1px 0">{safe}</span>'
        )
    head = html.escape(ends(chosen))
    body = "".join(parts)
    page = (
        '<div style="font-family:sans-serif;line-height:1.8">'
        f'<div style="font-size:80%;opacity:.7">{head}</div>'
        f'<div style="white-space:pre-wrap">{body}</div></div>'
    )
    if path is not None:
        Path(path).write_text(f'<!doctype html><meta charset="utf-8">{page}\n', encoding="utf-8")
    return page


def _pieces(op: str, result: Any) -> list[tuple[str, int]]:
    """The whole text in order: pieces with their player, -1 for what belongs to none."""
    view, names = result.players.view, result.names
    if result.players.kind != "text":
        msg = (
            f"{op}: these players are {result.players.kind}, not pieces of a text. Use kind='bar' "
            "or 'waterfall'."
        )
        raise ArgumentError(msg)
    if "pieces" in view:
        return list(view["pieces"])
    whole, spans = view.get("text", ""), view.get("spans")
    if spans is None:  # a tokenizer that tells no places: its tokens, one after another
        return [part for j, name in enumerate(names) for part in ((name, j), (" ", -1))]
    out, at = [], 0
    for j, (start, end) in enumerate(spans):
        out += [(whole[at:start], -1), (whole[start:end], j)]
        at = end
    out.append((whole[at:], -1))
    return [(letters, j) for letters, j in out if letters]


def _numbered(values: np.ndarray, top: float, limit: int | None) -> set[int]:
    """The players whose numbers are to be written."""
    order = np.argsort(-np.abs(values), kind="stable").tolist()
    if limit is not None:
        return set(order[: max(0, limit)])
    return {j for j in order if abs(values[j]) >= 0.1 * top}


def _laid_out(pieces: list[tuple[str, int]], width: float) -> tuple[list[list[_Placed]], float]:
    """Lines of (x, width, letters, player) in inches, broken at white space, and their height."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import text_to_path

    font = FontProperties(family=fonts(), size=_SIZE)
    cache: dict[str, float] = {}

    def measured(letters: str) -> float:
        if letters not in cache:
            # The path of a trailing space is empty, so its advance comes from a difference.
            wide = text_to_path.get_text_width_height_descent
            with_end = wide(f"{letters}|", font, ismath=False)[0]
            cache[letters] = (with_end - wide("|", font, ismath=False)[0]) / 72
        return cache[letters]

    lines: list[list[_Placed]] = [[]]
    x, room = _MARGIN, width - _MARGIN
    for word in _words(pieces):
        if word[0][0] == "\n":
            lines.append([])
            x = _MARGIN
            continue
        needed = sum(measured(letters) for letters, _ in word)
        if x + needed > room and x > _MARGIN:
            lines.append([])
            x = _MARGIN
            if word[0][0].isspace():
                word = word[1:]
        if needed > room - _MARGIN:  # longer than a line: broken wherever the line ends
            word = [(letter, player) for letters, player in word for letter in letters]
        for letters, player in word:
            wide = measured(letters)
            if x + wide > room and x > _MARGIN:
                lines.append([])
                x = _MARGIN
            if letters.strip():
                lines[-1].append((x, wide, letters, player))
            x += wide
    lines = [_joined(line) for line in lines]
    return [line for line in lines if line], _LEADING * max(1, sum(map(bool, lines)))


def _joined(line: list[_Placed]) -> list[_Placed]:
    """The line with touching letters of one player in one piece."""
    out: list[_Placed] = []
    for x, wide, letters, player in line:
        if out and out[-1][3] == player and abs(out[-1][0] + out[-1][1] - x) < 1e-6:
            start, before, earlier, _ = out.pop()
            out.append((start, before + wide, earlier + letters, player))
        else:
            out.append((x, wide, letters, player))
    return out


def _words(pieces: list[tuple[str, int]]) -> Iterator[list[tuple[str, int]]]:
    """Runs that must stay on one line: white space, a newline, or pieces without any between."""
    run: list[tuple[str, int]] = []
    for letters, player in pieces:
        part = ""
        for letter in letters.expandtabs(4):
            if letter.isspace():
                if part:
                    run.append((part, player))
                    part = ""
                if run:
                    yield run
                    run = []
                yield [("\n" if letter == "\n" else " ", -1)]
            else:
                part += letter
        if part:
            run.append((part, player))
    if run:
        yield run


def _header(figure: Any, chosen: Chosen, width: float, height: float, down: float) -> None:
    said = ends(chosen)
    y = 1 - down / height
    figure.text(_MARGIN / width, y, said, fontsize=9.5, va="center", **as_is(SOFT))
    right = 1 - _MARGIN / width
    figure.text(right, y, "lowers", fontsize=9, color=NEGATIVE, va="center", ha="right")
    figure.text(right - 0.55 / width, y, "raises", fontsize=9, color=POSITIVE, va="center",
                ha="right")  # fmt: skip


def _ground(figure: Any, line: list[_Placed], i: int, y: float, share: float) -> None:
    """Red or blue behind piece i; a little wider than its letters where no other piece touches."""
    from matplotlib.patches import FancyBboxPatch

    x, wide, _, _ = line[i]
    near = 1e-6
    left = i > 0 and abs(line[i - 1][0] + line[i - 1][1] - x) < near and line[i - 1][3] >= 0
    right = i + 1 < len(line) and abs(x + wide - line[i + 1][0]) < near and line[i + 1][3] >= 0
    start = x + (0.006 if left else -0.018)
    end = x + wide + (-0.006 if right else 0.018)
    box = FancyBboxPatch(
        (start, y - 0.065), end - start, 0.23, boxstyle="round,pad=0,rounding_size=0.035",
        facecolor=colour(share) if share else REST, alpha=0.06 + 0.7 * abs(share), linewidth=0,
        zorder=1, transform=figure.dpi_scale_trans,
    )  # fmt: skip
    figure.add_artist(box)


def _numbers(
    figure: Any,
    line: list[_Placed],
    place: tuple[float, float, float],
    values: np.ndarray,
    numbered: set[int],
    write: Callable[[float], str],
) -> None:
    """Values below a line's pieces, the largest first; one that another's would cover is left."""
    y, width, height = place
    taken: list[float] = []
    for x, wide, _, player in sorted(line, key=lambda placed: -abs(values[placed[3]])):
        middle, said = x + wide / 2, write(float(values[max(player, 0)]))
        room = 0.062 * len(said)
        if player not in numbered or any(abs(middle - other) < room for other in taken):
            continue
        numbered.discard(player)  # a piece on two lines has its number once
        taken.append(middle)
        figure.text(
            middle / width, (y - 0.155) / height, said, fontsize=6.5, ha="center", va="center",
            color=colour(values[player]),
        )  # fmt: skip


def _rgb(shade: str) -> tuple[int, int, int]:
    return int(shade[1:3], 16), int(shade[3:5], 16), int(shade[5:7], 16)
