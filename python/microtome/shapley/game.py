"""What a Shapley estimator asks of a game: the value of coalitions, many at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from microtome.errors import ArgumentError
from microtome.shapley.call import Outputs, check_deterministic
from microtome.shapley.coalitions import members
from microtome.shapley.players import Players

MEMORY = 32 << 20  # bytes of model inputs in one call, at most
# On a processor larger calls leave the cache: 2 MiB took half the time of 32 (30-128-128-1, float64
# rows, one thread). Fewer than 64 rows in a call are not worth it.
_CACHE, _ROWS = 2 << 20, 64
# Of short rows of a tensor so many: a network's hidden activations leave the cache next (1024 at a
# time took 1.22 times as long, 17,000 took 1.13).
_TENSOR_ROWS = 4096


def rows_a_call(
    memory: int, row_bytes: int, device: torch.device | str = "cpu", tensors: bool = False
) -> int:
    """How many rows to give a model at once, within `memory` bytes, as suits the device.

    tensors: the model takes tensors, so it is likely to be a network.
    """
    row_bytes = max(1, row_bytes)
    if torch.device(device).type == "cpu":
        memory = min(memory, max(_CACHE, _ROWS * row_bytes))
        if tensors:
            memory = min(memory, max(_TENSOR_ROWS * row_bytes, 1))
    return max(1, memory // row_bytes)


class Game(Protocol):
    """A value for every coalition of players; the contract between games and estimators.

    Attributes:
        players: who plays, with names, and how to show them.
        explicands: e, how many rows are explained; every row has its own game.
        backgrounds: n, how many background rows absent players are drawn from, 1 if none.
        evaluations: model rows computed so far.
        rows_per_round: about how many rows to ask for between two looks at the clock.
        scalar: whether a value is one number; known after `ends`.
        engine: what computes the values, in a word.
    """

    players: Players
    explicands: int
    backgrounds: int
    evaluations: int
    rows_per_round: int
    scalar: bool
    engine: str

    def ends(self) -> tuple[Tensor, Tensor]:
        """The empty coalition [1 or e, n, o] and the full one [e, o], float64, computed once."""
        ...

    def values(self, ranks: Tensor, spans: Tensor, who: Tensor) -> Tensor:
        """The value of each coalition for some explicands.

        Args:
            ranks: [q, p] int32.
            spans: [K, 4] int32 (background, order, lo, hi); background MEAN = -1 is the mean over
                all background rows.
            who: [e'] int64, which explicands.

        Returns:
            [e', K, o] float64.
        """
        ...


class SetGame:
    """A game given by its own function of coalitions: the plainest game, and the tests' own.

    Args:
        value: takes [K, p] bool (True: the player is in) and returns [K] or [K, o] numbers.
        players: names, or how many.
        per_call: most coalitions in one call of `value`; None for no limit.
        check: evaluate the full coalition twice, to find out whether `value` is deterministic.
        name: what messages call `value`.

    Example:
        >>> game = SetGame(lambda inside: inside.sum(1) ** 2, 3)
        >>> game.ends()[1]
        tensor([[9.]], dtype=torch.float64)
    """

    rows_per_round = 1 << 13
    engine = "function"
    explicands = 1
    backgrounds = 1

    def __init__(
        self,
        value: Callable[[Tensor], Any],
        players: Players | int,
        *,
        per_call: int | None = None,
        check: bool = False,
        name: str = "the value function",
    ) -> None:
        if isinstance(players, int):
            if players < 1:
                msg = f"SetGame: players must be at least 1, got players={players}."
                raise ArgumentError(msg)
            players = Players(tuple(f"player {j}" for j in range(players)))
        self.players = players
        self.evaluations = 0
        self.per_call, self.check, self.name = per_call, check, name
        self._call = Outputs(name, value)
        self._ends: tuple[Tensor, Tensor] | None = None

    @property
    def scalar(self) -> bool:
        return self._call.scalar

    def ends(self) -> tuple[Tensor, Tensor]:
        if self._ends is None:
            p = len(self.players)
            both = torch.tensor([False, True])[:, None].expand(2, p).contiguous()
            empty, full = self._run(both)
            if self.check:
                check_deterministic(self.name, full, self._run(both[1:])[0])
            self._ends = empty[None, None], full[None]
        return self._ends

    def values(self, ranks: Tensor, spans: Tensor, who: Tensor) -> Tensor:
        inside = members(ranks, spans)
        return self._run(inside)[None].expand(len(who), -1, -1)

    def _run(self, inside: Tensor) -> Tensor:
        self.evaluations += len(inside)
        parts = inside.split(self.per_call or max(1, len(inside)))
        out = [self._call(part, len(part)) for part in parts]
        return out[0] if len(out) == 1 else torch.cat(out)


class GameOver:
    """A game made of another one's values: what it says of itself is what that one says."""

    def __init__(self, game: Game) -> None:
        self.game = game
        self.rows_per_round = game.rows_per_round

    @property
    def players(self) -> Players:
        return self.game.players

    @property
    def explicands(self) -> int:
        return self.game.explicands

    @property
    def backgrounds(self) -> int:
        return self.game.backgrounds

    @property
    def evaluations(self) -> int:
        return self.game.evaluations

    @property
    def scalar(self) -> bool:
        return self.game.scalar

    @property
    def engine(self) -> str:
        return self.game.engine


class MeanGame(GameOver):
    """The mean of a game over its explicands, as a game of one.

    Shapley values are linear in the game, so the values of the mean are the means of the values;
    their standard errors hold for the mean, where walks shared by all explicands make the errors of
    single ones depend on each other.

    Args:
        game: with any number of explicands.

    Example:
        >>> game = MeanGame(SetGame(lambda inside: inside.sum(1) ** 2, 3))
        >>> game.explicands
        1
    """

    @property
    def explicands(self) -> int:
        return 1

    def ends(self) -> tuple[Tensor, Tensor]:
        """The empty coalition [1, n, o] and the full one [1, o]."""
        empty, full = self.game.ends()
        return empty.mean(0, keepdim=True), full.mean(0, keepdim=True)

    def values(self, ranks: Tensor, spans: Tensor, who: Tensor) -> Tensor:
        everyone = torch.arange(self.game.explicands)
        mean = self.game.values(ranks, spans, everyone).mean(0, keepdim=True)
        return mean.expand(len(who), -1, -1)
