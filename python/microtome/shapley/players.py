"""Who plays: names, and what a plot needs to show them where they came from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from microtome.errors import ArgumentError

KINDS = ("columns", "text", "image", "series", "parts")


@dataclass(frozen=True, eq=False)
class Players:
    """The players of a game.

    Attributes:
        names: one for each player.
        kind: "columns", "text", "image", "series" or "parts": how plots show them.
        shown: [e, p] values to print beside the names, a tensor or an array of objects, or None.
        view: what the kind's plot needs besides: "text" and "spans", or "pieces", the whole text
            as (letters, player or -1); "image" and "segments"; "series" and "bounds"; and
            "outputs", the names of the outputs, where they are known; "ends", what a picture
            calls the base and the full value, if not "base" and "f(x)".
    """

    names: tuple[str, ...]
    kind: str = "columns"
    shown: Any = None
    view: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.names)


def column_players(
    op: str,
    columns: Sequence[str],
    groups: Mapping[str, Sequence[int | str]] | Sequence[int] | Tensor | None,
) -> tuple[Players, Tensor | None]:
    """Players that are table columns, or groups of them.

    Args:
        op: name for messages.
        columns: the names of the m columns.
        groups: None for every column by itself; a mapping from a group's name to its columns (by
            name or number); or the group of each column, [m] integers or [m] names. A column that
            no group holds keeps the explicand's value; so does one with the number -1.

    Returns:
        The players, and [m] int32 with each column's player, or None for the identity.

    Raises:
        ArgumentError: an unknown column, a column in two groups, an empty group.
    """
    m = len(columns)
    if groups is None:
        return Players(tuple(columns)), None
    if isinstance(groups, Mapping):
        return _named(op, columns, groups)
    if len(groups) == m and m and all(isinstance(name, str) for name in groups):
        held: dict[str, list[int | str]] = {}
        for c, name in enumerate(groups):
            held.setdefault(str(name), []).append(c)
        return _named(op, columns, held)
    if not isinstance(groups, Tensor) and any(isinstance(name, str) for name in groups):
        msg = (
            f"{op}: groups must name the group of each of the m={m} columns, or be a mapping from "
            f"a group's name to its columns, got {list(groups)!r}."
        )
        raise ArgumentError(msg)
    numbers = torch.as_tensor(groups)
    if numbers.shape != (m,) or numbers.dtype.is_floating_point:
        msg = (
            f"{op}: groups must be m={m} integers, one for each column, got {list(numbers.shape)}."
        )
        raise ArgumentError(msg)
    p = int(numbers.max()) + 1 if m else 0
    missing = sorted(set(range(p)) - set(numbers.tolist()))
    if p < 1 or missing:
        msg = f"{op}: groups must be numbered 0, 1, ... without gaps, {missing or 'all'} missing."
        raise ArgumentError(msg)
    return Players(tuple(f"group {j}" for j in range(p))), numbers.to(torch.int32)


def _named(
    op: str, columns: Sequence[str], groups: Mapping[str, Sequence[int | str]]
) -> tuple[Players, Tensor]:
    at = {name: j for j, name in enumerate(columns)}
    player = torch.full((len(columns),), -1, dtype=torch.int32)
    for j, (name, held) in enumerate(groups.items()):
        for column in held:
            c = at.get(column, -1) if isinstance(column, str) else column
            if c != c or int(c) != c or not 0 <= c < len(columns):
                known = ", ".join(columns[:8]) + (" ..." if len(columns) > 8 else "")
                msg = f"{op}: group {name!r} names column {column!r}; the columns are {known}."
                raise ArgumentError(msg)
            c = int(c)
            if player[c] >= 0:
                msg = f"{op}: column {columns[c]!r} lies in two groups, one of them {name!r}."
                raise ArgumentError(msg)
            player[c] = j
        if not len(held):
            msg = f"{op}: group {name!r} holds no column. Give it one, or leave it out."
            raise ArgumentError(msg)
    return Players(tuple(groups)), player
