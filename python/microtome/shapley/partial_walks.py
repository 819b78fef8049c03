"""Walks through permutations that evaluate only what is asked, and stop where nothing is left."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from microtome._seed import generator
from microtome.shapley.coalitions import inverse, spans
from microtome.shapley.game import Game

_BLOCKS = 8  # pieces of a walk between two looks at whether it may be cut


@dataclass(frozen=True)
class Cut:
    """Where walks are cut short; see `adaptive`."""

    truncation: float
    side: str
    finish_rate: float


class Sampler:
    """Marginals of some players of one explicand's game, and their moments.

    Args:
        game: the game, of one output.
        row: which explicand.
        cut: where walks are cut short.
        seed: of permutations and draws.

    Attributes:
        count, mean: [p], samples of each player so far and their mean.
        scale: |v(full) - v(empty)|.
        spent: evaluations so far.
        cuts: walks that were cut.
    """

    def __init__(self, game: Game, row: int, cut: Cut, seed: int) -> None:
        self.game, self.cut, self.seed = game, cut, seed
        self.who = torch.tensor([row])
        empty, full = game.ends()
        self.empty = (empty if len(empty) == 1 else empty[self.who])[0, :, 0]  # [n]
        self.full = full[row, 0]
        self.scale = float((self.full - self.empty.mean()).abs())
        p = len(game.players)
        self.count = torch.zeros(p, dtype=torch.int64)
        self.mean = torch.full((p,), torch.nan, dtype=torch.float64)
        self._m2 = torch.zeros(p, dtype=torch.float64)
        self.spent = self.cuts = self._rounds = 0

    @property
    def stderr(self) -> Tensor:
        """[p] standard errors; NaN for players with fewer than two samples."""
        n = self.count.double()
        return torch.where(self.count > 1, (self._m2 / (n - 1) / n).sqrt(), torch.nan)

    def sample(self, players: Tensor, walks: int) -> None:
        """Add a marginal of each of some players [c] from each of `walks` permutations."""
        p = len(self.count)
        stream = generator(self.seed, "adaptive", self._rounds)  # of no row: alike alone
        self._rounds += 1
        keys = torch.rand(walks, p, generator=stream, dtype=torch.float64)
        ranks = inverse(torch.argsort(keys, dim=1).to(torch.int32))
        background = torch.randint(self.game.backgrounds, (walks,), generator=stream)
        draws = torch.rand(walks, generator=stream, dtype=torch.float64)
        rank = ranks[:, players].long()  # [walks, c]
        wanted = torch.zeros(walks, p + 1, dtype=torch.bool)
        wanted.scatter_(1, rank, True)
        wanted.scatter_(1, rank + 1, True)
        found = self._marginals(ranks, background, draws, wanted, rank)
        self._add(players, found)

    def _marginals(
        self, ranks: Tensor, background: Tensor, draws: Tensor, wanted: Tensor, rank: Tensor
    ) -> Tensor:
        """[walks, c]: of the players at places rank [walks, c]."""
        walks, p = ranks.shape
        values = torch.full((walks, p + 1), torch.nan, dtype=torch.float64)
        values[:, 0], values[:, p] = self.empty[background], self.full
        todo = wanted.clone()
        todo[:, 0] = todo[:, p] = False
        down = self.cut.side == "empty"
        goal = self.empty[background] if down else self.full.expand(walks)
        place = torch.arange(p + 1)
        place = p - place if down else place  # steps from where a walk begins
        pieces = _BLOCKS if self.cut.truncation else 1
        cut_at = torch.full((walks,), p + 1)  # step after which a walk is cut, or weighs more
        alive = torch.ones(walks, dtype=torch.bool)
        for piece in range(pieces):
            until = -(-p * (piece + 1) // pieces)
            here = todo & alive[:, None] & (place <= until)
            todo &= ~here
            self._evaluate(ranks, background, here, values)
            if piece + 1 == pieces:
                break
            # The furthest value known so far decides; a walk is looked at until it is cut.
            known = ~values.isnan() & (place <= until)
            step = torch.where(known, place, -1).amax(1)  # [walks]
            at = p - step if down else step
            near = (values.gather(1, at[:, None])[:, 0] - goal).abs()
            near = (near <= self.cut.truncation * self.scale) & (step > 0) & (cut_at > p)
            cut_at = torch.where(near, step, cut_at)
            alive &= ~near | (draws < self.cut.finish_rate)
        self.cuts += int((cut_at <= p).sum())
        return self._weighed(values, rank, cut_at, alive)

    def _evaluate(self, ranks: Tensor, background: Tensor, here: Tensor, values: Tensor) -> None:
        """Fill in the values at `here` [walks, p + 1]."""
        walk, t = here.nonzero(as_tuple=True)
        if len(walk) == 0:
            return
        zero = torch.zeros_like(t)
        table = spans(background[walk], walk, zero, t)
        values[walk, t] = self.game.values(ranks, table, self.who)[0, :, 0]
        self.spent += len(walk)

    def _weighed(self, values: Tensor, rank: Tensor, cut_at: Tensor, alive: Tensor) -> Tensor:
        """Marginals, those past a cut as the equal share, corrected by the walks that went on."""
        p = values.shape[1] - 1
        own = values.gather(1, rank + 1) - values.gather(1, rank)  # [walks, c]
        if not bool((cut_at <= p).any()):
            return own
        down = self.cut.side == "empty"
        # In steps from the start, the player's marginal is the one of step + 1.
        step = p - 1 - rank if down else rank
        past = step >= cut_at[:, None]
        at = cut_at.clamp(max=p)
        held = values.gather(1, (p - at if down else at)[:, None])
        end = values[:, :1] if down else values[:, p:]
        rest = held - end if down else end - held
        share = rest / (p - at).clamp_min(1)[:, None]
        rate = max(self.cut.finish_rate, 1e-300)
        more = torch.where(alive[:, None], (own - share) / rate, 0.0)
        return torch.where(past, share + more, own)

    def _add(self, players: Tensor, found: Tensor) -> None:
        """Merge samples [walks, c] into the moments (Chan et al. 1979)."""
        n, m = self.count[players].double(), len(found)
        old = torch.where(n > 0, self.mean[players], 0.0)
        new = found.mean(0)
        total = n + m
        apart = new - old
        self._m2[players] += (found - new).square().sum(0) + apart.square() * (n * m / total)
        self.mean[players] = old + apart * (m / total)
        self.count[players] += m
