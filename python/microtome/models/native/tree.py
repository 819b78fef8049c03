"""Coalitions of a model's parts as a tree: runs that agree up to a place are one run up to there.

The places that players hold are met in the order of a forward. Two coalitions with the same absent
players at the first i places are one node there; at the next place it forks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from microtome.models.native.plan import STAGES


class Change(Protocol):
    """What absent players do to an activation.

    Attributes:
        keeps: something of the activation stays even if every player is absent.
    """

    keeps: bool

    def __call__(
        self, own: Tensor, at: Tensor, present: Tensor, tokens: Tensor, *, joins: bool
    ) -> Tensor:
        """The activation of m runs.

        Args:
            own: [c, N, w], the activation before the change.
            at: [m] int64, which of these each run has.
            present: [m, p] bool, who is in.
            tokens: [N] int64, the token of the base run that each stands on.
            joins: own is the base run's.

        Returns:
            [m, N, w].
        """
        ...


@dataclass(frozen=True)
class Place:
    """Where some players lie.

    Attributes:
        layer, stage: as in plan.STAGES.
        players: [p'] int64, their numbers among all players.
        change: what their absence does; `present` in it is over these players.
    """

    layer: int
    stage: str
    players: Tensor
    change: Change

    @property
    def key(self) -> int:
        """Sorts places in the order of a forward."""
        return self.layer * len(STAGES) + STAGES.index(self.stage)


@dataclass(frozen=True)
class Level:
    """The nodes of the tree after one place.

    Attributes:
        place: which.
        parent: [U] int64, the node before the place that each comes from.
        present: [U, p'] bool, of the place's players.
        touched: [U] bool: somebody is absent, here or before.
    """

    place: Place
    parent: Tensor
    present: Tensor
    touched: Tensor


@dataclass(frozen=True)
class Tree:
    """Some coalitions, each once, in an order in which those that agree longest are neighbours.

    Attributes:
        places: in the order of a forward.
        present: [U, p] bool.
        differs: [U, places] bool: at which places a coalition first differs from the one before
            it, and all later ones.
    """

    places: tuple[Place, ...]
    present: Tensor
    differs: Tensor

    def levels(self, low: int, high: int) -> list[Level]:
        """The levels of coalitions low ... high - 1 alone; the last one's nodes are these."""
        present, differs = self.present[low:high], self.differs[low:high].clone()
        differs[:1] = True
        before = torch.zeros(len(present), dtype=torch.int64)
        touched = torch.zeros(len(present), dtype=torch.bool)
        found = []
        for i, place in enumerate(self.places):
            first = differs[:, i].nonzero().flatten()  # one coalition of each node
            own = present[:, place.players]
            touched = touched | ~own.all(1)
            found.append(Level(place, before[first], own[first], touched[first]))
            before = differs[:, i].cumsum(0) - 1
        return found

    def entries(self) -> Tensor:
        """[U] int64, the layer of the first place where somebody is absent; -1 for none."""
        layer = torch.full((len(self.present),), -1)
        for place in reversed(self.places):
            layer[~self.present[:, place.players].all(1)] = place.layer
        return layer


def tree(present: Tensor, places: tuple[Place, ...]) -> tuple[Tree, Tensor]:
    """The tree of K coalitions.

    Args:
        present: [K, p] bool.
        places: in the order of a forward; every player lies at one of them.

    Returns:
        The tree, and [K] int64, where each coalition is among its U.
    """
    words = [_packed(~present[:, place.players]) for place in places]
    joined = torch.cat(words, 1)
    rows, which = joined.unique(dim=0, return_inverse=True)
    some = torch.empty(len(rows), dtype=torch.int64)
    some[which] = torch.arange(len(present))  # any coalition of each
    changes = torch.ones(len(rows), joined.shape[1], dtype=torch.bool)
    changes[1:] = rows[1:] != rows[:-1]
    ends = torch.tensor([w.shape[1] for w in words]).cumsum(0) - 1
    differs = changes.int().cummax(1).values.bool()[:, ends]
    # The last level's nodes are the coalitions themselves.
    return Tree(places, present[some], differs), which


def _packed(bits: Tensor) -> Tensor:
    """[K, w] int64, 62 bits a word, so that sorting never meets a sign."""
    K, p = bits.shape
    width = (p + 61) // 62
    padded = torch.zeros(K, width * 62, dtype=torch.int64)
    padded[:, :p] = bits
    return (padded.reshape(K, width, 62) << torch.arange(62)).sum(-1)
