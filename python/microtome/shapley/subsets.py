"""Which coalitions a regression sees: how many of each size, drawn without replacement.

A unit is a coalition and its complement if paired, else one coalition; a stratum is the units of
one size. Strata whose share of the budget reaches their number are enumerated, the rest of the
budget goes to the others by `sampling`:

    kernel      like the kernel's weight of a size, 1 / (s (p - s)) (Lundberg and Lee 2017)
    leverage    alike for every size: leverage scores (Musco and Witter 2025, arXiv:2410.01917)

A unit's weight in the regression is its stratum's weight in all over the units drawn from it.
"""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from microtome._seed import generator
from microtome.shapley.coalitions import of_members, pack

SAMPLING = ("leverage", "kernel")
_TABLE = 4  # a stratum at most so many times as large as what is drawn from it is listed


@dataclass(frozen=True)
class Plan:
    """How many units of each size are drawn.

    Attributes:
        p: players.
        paired: whether a unit is a coalition and its complement.
        counts: units of size 1, 2, ..., up to p // 2 if paired, else p - 1.
    """

    p: int
    paired: bool
    counts: tuple[int, ...]

    @property
    def units(self) -> int:
        return sum(self.counts)

    @property
    def coalitions(self) -> int:
        return self.units * (2 if self.paired else 1)

    @property
    def complete(self) -> bool:
        """Whether it holds every coalition there is."""
        return all(m == population(self.p, s, self.paired) for s, m in enumerate(self.counts, 1))

    def weights(self, sizes: Tensor) -> tuple[Tensor, Tensor]:
        """Each unit's weight, and what part of its stratum was not drawn; [U] from sizes [U]."""
        weight, rest = [0.0], [0.0]
        for s, drawn in enumerate(self.counts, 1):
            sides = 2 if self.paired and 2 * s != self.p else 1
            weight.append(sides * (self.p - 1) / (s * (self.p - s)) / max(drawn, 1))
            rest.append(1 - drawn / population(self.p, s, self.paired))
        both = torch.tensor([weight, rest], dtype=torch.float64)[:, sizes]
        return both[0], both[1]


def population(p: int, s: int, paired: bool) -> int:
    """How many units there are of size s."""
    return math.comb(p, s) // (2 if paired and 2 * s == p else 1)


def plan_of(p: int, paired: bool, sampling: str, units: int, whole_to: int = 0) -> Plan:
    """Spread `units` over the sizes; at least one unit of every size, at most all there are.

    Sizes up to `whole_to` are taken whole in any case.
    """
    sizes = range(1, p // 2 + 1) if paired else range(1, p)
    whole = {s: population(p, s, paired) for s in sizes}
    share = {s: 0.5 if paired and 2 * s == p else 1.0 for s in sizes}
    if sampling == "kernel":
        share = {s: share[s] / (s * (p - s)) for s in sizes}
    counts = {s: whole[s] for s in sizes if s <= whole_to}
    while True:  # every turn completes the sizes that the rest of the budget covers
        left = units - sum(counts.values())
        total = sum(share[s] for s in sizes if s not in counts)
        # Not whole * total: beyond 1029 players the middle sizes are larger than a float holds.
        covered = [s for s in sizes if s not in counts and whole[s] <= left * share[s] / total]
        counts.update({s: whole[s] for s in covered})
        if not covered:
            break
    open_ = [s for s in sizes if s not in counts]
    exact = {s: left * share[s] / total for s in open_}
    counts.update({s: max(1, int(exact[s])) for s in open_})
    spare = units - sum(counts.values())
    for s in sorted(open_, key=lambda s: int(exact[s]) - exact[s])[: max(0, spare)]:
        counts[s] += 1
    return Plan(p, paired, tuple(counts[s] for s in sizes))


def growing(
    largest: Plan, first: int, factor: float, sampling: str, whole_to: int = 0
) -> list[Plan]:
    """Plans from about `first` units to the largest, each `factor` times the one before."""
    found = []
    while first < largest.units / factor:
        found.append(first)
        first = math.ceil(first * factor)
    plans = [largest]
    for units in reversed(found):  # rounding must not take from a size what a smaller plan gave it
        smaller = plan_of(largest.p, largest.paired, sampling, units, whole_to)
        counts = tuple(map(min, smaller.counts, plans[0].counts))
        plans.insert(0, Plan(largest.p, largest.paired, counts))
    return plans


class Drawn:
    """The units of some rows, each row with its own; grows from plan to larger plan.

    Args:
        first: number of the first row, which with the seed names the stream of random numbers.
        rows: C.
        largest: the largest plan there will be.
        seed: of the draws.

    Attributes:
        words: [C, U, w] int64, packed coalitions, of each unit the smaller.
        sizes: [U] int64, their sizes, alike for all rows.
    """

    def __init__(self, first: int, rows: int, largest: Plan, seed: int) -> None:
        self.first, self.rows, self.largest, self.seed = first, rows, largest, seed
        self.words = torch.empty(rows, 0, (largest.p + 63) // 64, dtype=torch.int64)
        self.sizes = torch.empty(0, dtype=torch.int64)

    def extend(self, plan: Plan) -> tuple[Tensor, Tensor]:
        """Draw what `plan` has beyond what is there.

        Returns:
            ranks [C, new, p] int32 and sizes [new]: the unit is the first `size` of its order, and
            the rest of it if paired.
        """
        p = plan.p
        ranks, words, sizes = [], [], []
        for s, count in enumerate(plan.counts, 1):
            here = self.words[:, self.sizes == s]
            new = count - here.shape[1]
            if new <= 0:
                continue
            found = self._listed(s, here.shape[1], count)
            if found is None:
                found = self._sampled(s, here, new)
            ranks.append(found)
            words.append(_words(found, s))
            sizes.append(torch.full((new,), s))
        if not ranks:
            return torch.empty(self.rows, 0, p, dtype=torch.int32), self.sizes[:0]
        self.words = torch.cat([self.words, *words], 1)
        self.sizes = torch.cat([self.sizes, *sizes])
        return torch.cat(ranks, 1), torch.cat(sizes)

    def first_units(self, units: int) -> Drawn:
        """The same rows with the first units drawn alone."""
        if units == len(self.sizes):
            return self
        part = Drawn(self.first, self.rows, self.largest, self.seed)
        part.words, part.sizes = self.words[:, :units], self.sizes[:units]
        return part

    def _listed(self, s: int, have: int, count: int) -> Tensor | None:
        """Units from a list of all, in a random order of each row; None where it is too long."""
        p, most = self.largest.p, self.largest.counts[s - 1]
        whole = population(p, s, self.largest.paired)
        if whole > _TABLE * most:
            return None
        table = _table(p, s, whole)
        if have == 0 and count == whole:
            return table.expand(self.rows, -1, -1)
        stream = generator(self.seed, "coalitions", s, self.first)
        order = torch.argsort(torch.rand(self.rows, whole, generator=stream), dim=1)
        return table[order[:, have:count]]

    def _sampled(self, s: int, here: Tensor, new: int) -> Tensor:
        """Random units; those that are there already are drawn again."""
        p, paired = self.largest.p, self.largest.paired
        stream = generator(self.seed, "coalitions", s, self.first, here.shape[1])
        ranks = torch.empty(self.rows, new, p, dtype=torch.int32)
        again = torch.ones(self.rows, new, dtype=torch.bool)
        before = _hash(here)
        while bool(again.any()):
            keys = torch.rand(int(again.sum()), p, generator=stream)
            drawn = torch.argsort(keys, dim=1).to(torch.int32)
            if paired and 2 * s == p:  # of two halves, the one with the first player
                drawn = torch.where(drawn[:, :1] < s, drawn, p - 1 - drawn)
            ranks[again] = drawn
            again = _repeated(torch.cat([before, _hash(_words(ranks, s))], 1))[:, -new:]
        return ranks


@functools.lru_cache(maxsize=16)
def _table(p: int, s: int, whole: int) -> Tensor:
    """[whole, p] int32 ranks of all coalitions of size s (the first half: with player 0)."""
    few = min(s, p - s)  # the smaller of a coalition and its complement is quicker to list
    listed = itertools.islice(itertools.combinations(range(p), few), whole)
    places = torch.from_numpy(np.fromiter(listed, np.dtype((np.int64, few)), whole))
    inside = torch.full((whole, p), few != s).scatter_(1, places, few == s)
    return of_members(inside)[0]


def _words(ranks: Tensor, s: int) -> Tensor:
    C, U, p = ranks.shape
    return pack((ranks < s).reshape(C * U, p)).reshape(C, U, -1)


def _hash(words: Tensor) -> Tensor:
    """[C, U]: one number for each coalition; equal for equal ones."""
    out = words[..., 0]
    for k in range(1, words.shape[-1]):
        out = (out ^ (out >> 29)) * 0x1E3779B97F4A7C15 + words[..., k]
    return out


def _repeated(numbers: Tensor) -> Tensor:
    """[C, U] bool: whether the same number stands earlier in the row."""
    ordered, order = numbers.sort(dim=1, stable=True)
    same = torch.zeros_like(order, dtype=torch.bool)
    same[:, 1:] = ordered[:, 1:] == ordered[:, :-1]
    return torch.zeros_like(same).scatter_(1, order, same)
