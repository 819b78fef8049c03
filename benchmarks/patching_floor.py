"""Operations of a patching sweep, by formula: what peers do, and what is left when work is shared.

The model is a GPT-2: a token costs a block 24 d^2 (queries, keys and values 6 d^2, output 2 d^2,
MLP 16 d^2), and 4 d for each key it attends to. An exact sweep leaves out what a patch cannot have
changed: blocks below it, positions before it, and above the last block everything but the metric's
position and tokens. It shares the two base runs, and keys and values of the prefix. At the
patched block of a residual sweep each query, key and value is one of a base run's, so only the
patched position attends anew; the others swap one key for 6 d.

It is the count after these savings, not a proof that none is left: with one query, keys and values
of the last block could be folded into it, about 2 % of a residual sweep.
"""

from __future__ import annotations

from collections.abc import Iterable

from benchmarks.patching_case import ANSWERS, Sweep

Cell = tuple[int, int]


def naive(sweep: Sweep) -> int:
    """Operations of one full forward a cell, with the logits of every position."""
    return len(all_cells(sweep)) * forward(sweep)


def forward(sweep: Sweep) -> int:
    """Operations of one forward of one prompt."""
    t, s = sweep.length, sweep.shape
    return s.layers * (24 * s.d**2 * t + 4 * s.d * _pairs(0, t)) + 2 * s.d * s.vocabulary * t


def all_cells(sweep: Sweep) -> list[Cell]:
    """Every (layer, column)."""
    return [(layer, c) for layer in range(sweep.shape.layers) for c in range(sweep.columns)]


def changed_cells(sweep: Sweep) -> list[Cell]:
    """The cells whose patch changes a number: the others' answer is the corrupted run's.

    A residual cell before the first token that differs has equal residuals in both runs, and so has
    one at the first block whose token is the same. Every head is changed.
    """
    if sweep.site != "resid_pre" or sweep.differ == "all":
        return all_cells(sweep)
    first = sweep.first
    return [(i, p) for i, p in all_cells(sweep) if p == first or (p > first and i > 0)]


def floor(sweep: Sweep, cells: Iterable[Cell], *, start: int) -> int:
    """Operations of the two base runs and of these cells, each from its patch to its answer.

    Args:
        sweep: the sizes.
        cells: (layer, column).
        start: positions before it are taken as equal in both runs: a clean run does not repeat them
            and a head's patch does not carry them. 0 for a sweep that does not look.
    """
    per_cell = _residual_cell if sweep.site == "resid_pre" else _head_cell
    return _base_runs(sweep, start) + sum(per_cell(sweep, layer, c, start) for layer, c in cells)


def floors(sweep: Sweep) -> dict[str, int]:
    """The floor with every cell computed, with only the changed ones, and what peers do."""
    return {
        "all": floor(sweep, all_cells(sweep), start=0),
        "changed": floor(sweep, changed_cells(sweep), start=sweep.first),
        "naive": naive(sweep),
    }


def _pairs(start: int, stop: int) -> int:
    """Query-key pairs of causal attention for queries start ... stop - 1."""
    return (stop * (stop + 1) - start * (start + 1)) // 2


def _answer(sweep: Sweep) -> int:
    return 2 * sweep.shape.d * len(ANSWERS)


def _block(sweep: Sweep, start: int) -> int:
    """A whole block for the positions from start on."""
    d = sweep.shape.d
    return 24 * d**2 * (sweep.length - start) + 4 * d * _pairs(start, sweep.length)


def _last_block(sweep: Sweep, start: int) -> int:
    """Keys and values from start on; query, attention, output and MLP at the last position."""
    d = sweep.shape.d
    return 4 * d**2 * (sweep.length - start) + 20 * d**2 + 4 * d * sweep.length


def _base_runs(sweep: Sweep, start: int) -> int:
    """The corrupted run to its answer, the clean run to what the last block's cells read of it."""
    below = sweep.shape.layers - 1
    corrupted = below * _block(sweep, 0) + _last_block(sweep, 0) + _answer(sweep)
    read = 6 * sweep.shape.d**2 * (sweep.length - start)  # queries, keys and values
    if sweep.site == "z":
        read += 4 * sweep.shape.d * sweep.length  # z of the last position
    return corrupted + below * _block(sweep, start) + read


def _above(sweep: Sweep, layer: int, start: int) -> int:
    """The blocks after `layer` and the answer."""
    whole = sweep.shape.layers - 2 - layer
    return whole * _block(sweep, start) + _last_block(sweep, start) + _answer(sweep)


def _residual_cell(sweep: Sweep, layer: int, position: int, _: int) -> int:
    d, after = sweep.shape.d, sweep.length - 1 - position  # positions behind the patched one
    if layer == sweep.shape.layers - 1:
        attention = 6 * d if after else 4 * d * sweep.length
        return attention + 18 * d**2 + _answer(sweep)
    entry = 6 * d * after + 4 * d * (position + 1) + 18 * d**2 * (after + 1)
    return entry + _above(sweep, layer, position)


def _head_cell(sweep: Sweep, layer: int, _: int, start: int) -> int:
    d = sweep.shape.d
    token = 2 * d * (d // sweep.shape.heads) + 16 * d**2  # the head's share of W_O, and the MLP
    if layer == sweep.shape.layers - 1:
        return token + _answer(sweep)
    return token * (sweep.length - start) + _above(sweep, layer, start)
