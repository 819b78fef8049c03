"""Walking permutations through a game and reducing what is seen to moments of marginals."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from microtome.ops import shapley_reduce
from microtome.shapley.coalitions import walk, walk_spans
from microtome.shapley.game import Game
from microtome.shapley.link import Link


class Walker(Protocol):
    """Moments of marginals over a round of walks."""

    engine: str

    def __call__(self, ranks: Tensor, paired: bool, who: Tensor) -> tuple[Tensor, Tensor]:
        """mean and m2 as `shapley_reduce` gives them, for ranks [S, U, A, p] and explicands."""
        ...


class GameWalker:
    """Any game, by the values of the coalitions on the walks; the ends are known already.

    Args:
        game: the game.
        strata: S; 1 averages every coalition over the background rows.
        link: what is explained is link(mean over the background of f); identity if None.
    """

    def __init__(self, game: Game, strata: int, link: Link | None) -> None:
        self.game, self.link = game, link
        self.engine = game.engine
        self.mean = strata == 1 and game.backgrounds > 1
        empty, full = game.ends()
        self.empty = empty.mean(1, keepdim=True) if strata == 1 else empty  # [1 or e, S, o]
        self.full = full  # [e, o]
        if link is not None:
            self.empty, self.full = link(self.empty), link(self.full)

    def __call__(self, ranks: Tensor, paired: bool, who: Tensor) -> tuple[Tensor, Tensor]:
        return shapley_reduce(self.along(ranks, paired, who), ranks, paired)

    def along(self, ranks: Tensor, paired: bool, who: Tensor) -> Tensor:
        """The values on the walks, [e, S, U, A, L, o], as `shapley_reduce` takes them."""
        S, U, A, p = ranks.shape
        e, o = len(who), self.full.shape[1]
        at = walk(p, paired)[2]
        values = torch.empty(e, S, U * A, 2 * p + 1 if paired else p + 1, o, dtype=torch.float64)
        if len(at):
            spans = walk_spans(S, U * A, p, paired, self.mean)
            inner = self.game.values(ranks.reshape(-1, p), spans, who)
            if self.link is not None:
                inner = self.link(inner)
            values[:, :, :, at] = inner.reshape(e, S, U * A, len(at), o)
        empty = self.empty if len(self.empty) == 1 else self.empty[who]
        values[:, :, :, 0] = empty[:, :, None]
        values[:, :, :, p] = self.full[who][:, None, None]
        if paired:
            values[:, :, :, 2 * p] = empty[:, :, None]
        return values.reshape(e, S, U, A, -1, o)
