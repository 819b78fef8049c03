"""From what a user passes to a game."""

from __future__ import annotations

from typing import Any

from microtome.errors import ArgumentError
from microtome.shapley.game import MEMORY, Game
from microtome.shapley.inputs import InputGame


def as_game(
    op: str,
    f: Any,
    x: Any,
    background: Any,
    *,
    groups: Any = None,
    memory: int = MEMORY,
    check: bool = True,
) -> Game:
    """`f` itself if it is a game, else the game of its inputs.

    Raises:
        ArgumentError: a game and rows at once, or a function without rows.
    """
    if hasattr(f, "ends") and hasattr(f, "values") and hasattr(f, "rows_per_round"):
        if x is not None or background is not None or groups is not None:
            msg = f"{op}: a game brings its own rows and players. Leave out x, background, groups."
            raise ArgumentError(msg)
        game: Game = f
        return game
    if x is None or background is None:
        msg = f"{op}: pass the rows x to explain and background rows, or a game instead of f."
        raise ArgumentError(msg)
    return InputGame(f, x, background, groups=groups, memory=memory, check=check, op=op)
