"""Thousands of players: walks cut short, and evaluations spent on those who may be in the top k."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from microtome import _check
from microtome.errors import ArgumentError
from microtome.shapley import running
from microtome.shapley._start import as_game
from microtome.shapley.game import MEMORY
from microtome.shapley.partial_walks import Cut, Sampler
from microtome.shapley.result import ShapleyValues, finish
from microtome.shapley.running import Stop

_FIRST = 8  # whole walks before anyone is given up: enough for a variance to go by
_BUDGET = 64  # walks' worth of evaluations, unless the user says otherwise


def adaptive(
    f: Any,
    x: Any = None,
    background: Any = None,
    *,
    k: int | None = 10,
    by: str = "magnitude",
    confidence: float = 0.95,
    tolerance: float = 0.0,
    truncation: float = 0.0,
    side: str = "full",
    finish_rate: float = 0.25,
    max_evaluations: int | None = None,
    seconds: float | None = None,
    groups: Any = None,
    seed: int = 0,
    memory: int = MEMORY,
    check: bool = True,
    progress: bool = True,
) -> ShapleyValues:
    """Find the k players with the largest Shapley values among many.

    Walks random permutations of all players first. Then it keeps an interval for each player and
    samples on only for those whose interval leaves open on which side of the k-th place they are:
    of a permutation, a contested player needs just the coalitions before and after it.

    Walks can be cut short: where v(S) has come within `truncation` * |v(full) - v(empty)| of the
    end, the players that are left share the rest equally. A fraction `finish_rate` of such walks,
    drawn at random, is walked to the end all the same, and what it shows beside the equal share
    counts 1 / finish_rate times: so the values are unbiased, at a little more variance.

    Args:
        f: a game, or a function as in `permutation`.
        x: as in `permutation`.
        background: likewise; each walk draws one of its rows.
        k: how many, all where there are fewer; None samples all players alike, which leaves
            truncation alone.
        by: "magnitude" or "value": largest in what sense.
        confidence: that all players are on the right side of the k-th place, when it says so; by
            Student intervals of all players and all looks at once (Bonferroni).
        tolerance: a fraction of |v(full) - v(empty)|; players that differ by less may trade places.
        truncation: see above; 0 walks every walk to its end.
        side: "full": walks start from nobody and are cut where v(S) is near v(full); "empty": they
            start from everybody, taking players out, and are cut near v(empty). The second suits
            networks that fail when a few parts are gone.
        finish_rate: see above, in (0, 1]; or 0 for none, and then a value may be off by the share
            of walks that were cut before its player, times the marginals that were not seen (at
            most `truncation` each in a monotone game).
        max_evaluations: for each explicand, about; 64 walks' worth if None.
        seconds: wall time for everything, shared out among the rows; each gets its first walks.
        groups: as in `permutation`.
        seed: of permutations and draws, alike for all rows: a row's values do not depend on which
            others are explained with it.
        memory: bytes of rows in one call of f.
        check: as in `permutation`.
        progress: show a progress bar, if it takes longer than a second.

    Returns:
        ShapleyValues [e, p] with standard errors. Players that were given up early have larger
        ones, and sums over players are right only within errors. `note` says whether the top k is
        settled, and how many players are contested.

    Raises:
        ArgumentError: an unknown option, several outputs, or too small a budget.

    Ctrl-C ends it and returns what is there (`interrupted`).
    Source: Ghorbani and Zou 2020, arXiv:2002.09815 (truncation, bandit); Ghorbani and Zou 2019,
    arXiv:1904.02868 (truncation).

    Example:
        >>> import torch
        >>> from microtome.shapley import SetGame
        >>> weights = torch.zeros(40); weights[7] = 5.0; weights[3] = -4.0
        >>> found = adaptive(SetGame(lambda inside: inside.float() @ weights, 40), k=2)
        >>> [top["player"] for top in found.top(2)]
        ['player 7', 'player 3']
    """
    op = "adaptive"
    game = as_game(op, f, x, background, groups=groups, memory=memory, check=check)
    p = len(game.players)
    _check.one_of(op, "by", by, ("magnitude", "value"))
    _check.one_of(op, "side", side, ("full", "empty"))
    if k is not None:
        _check.between(op, "k", k, 1, 1 << 31)
        k = min(k, p)
    for name, value, low in (
        ("confidence", confidence, 0.0), ("finish_rate", finish_rate, -1e-300),
    ):  # fmt: skip
        if not low < value <= 1.0 or (name == "confidence" and value == 1.0):
            msg = f"{op}: {name} must lie between 0 and 1, got {name}={value}."
            raise ArgumentError(msg)
    for name, value in (("tolerance", tolerance), ("truncation", truncation)):
        if not 0.0 <= value < 1.0:
            msg = f"{op}: {name} must lie in [0, 1), got {name}={value}."
            raise ArgumentError(msg)
    budget = _BUDGET * p if max_evaluations is None else max_evaluations
    if budget < 2 * p:
        msg = (
            f"{op}: max_evaluations={budget} is too few for p={p} players: two walks take {2 * p}. "
            "Raise it, or group players."
        )
        raise ArgumentError(msg)
    full = game.ends()[1]
    if full.shape[1] != 1:
        msg = (
            f"{op}: f returns {full.shape[1]} outputs, and the largest values are those of one. "
            "Choose the output inside f."
        )
        raise ArgumentError(msg)
    stop = Stop(op, None, seconds)
    values = torch.full((game.explicands, p, 1), math.nan, dtype=torch.float64)
    stderr = torch.full_like(values, math.nan)
    notes, interrupted = [], False
    total = game.explicands * budget
    with running.bar(total, op, "evaluation", progress) as bar:
        for i in range(game.explicands):
            sampler = Sampler(game, i, Cut(truncation, side, finish_rate), seed)
            race = _Race(sampler, k, by, confidence, tolerance)
            until, stopped = stop.share(1 / (game.explicands - i)), False
            try:
                while not race.settled and sampler.spent < budget:
                    before = sampler.spent
                    race.round(budget)
                    bar.update(sampler.spent - before)
                    if stop.late(until):
                        interrupted = True
                        break
            except KeyboardInterrupt:
                interrupted = stopped = True
                if i == 0 and sampler.count.max() == 0:
                    raise
            values[i, :, 0], stderr[i, :, 0] = sampler.mean, sampler.stderr
            notes.append(race.note())
            if stopped:
                break
    note = "; ".join(notes if len(set(notes)) > 1 else notes[:1])
    if truncation and not finish_rate:
        note += "; walks were cut, so values are biased by what was not seen"
    if interrupted:
        note += "; ended early"
    return finish(game, values, stderr, op, interrupted=interrupted, note=note, engine=game.engine)


@dataclass
class _Race:
    """Who is in the top k, who is not, and who may be."""

    sampler: Sampler
    k: int | None
    by: str
    confidence: float
    tolerance: float
    looks: int = 0

    def __post_init__(self) -> None:
        p = len(self.sampler.game.players)
        self.contested = torch.ones(p, dtype=torch.bool)
        self.low = torch.full((p,), -math.inf, dtype=torch.float64)
        self.high = -self.low
        self.settled = False

    def round(self, budget: int) -> None:
        """Sample the contested players some more, and look who they are now."""
        s, p = self.sampler, len(self.contested)
        # Of the contested, those known least: a narrow interval waits for its neighbours.
        width = torch.where(self.contested, self.high - self.low, -1.0)
        who = (width >= width.max() / 2).nonzero().flatten() if self.looks else torch.arange(p)
        each = min(p, 2 * len(who))  # evaluations of a permutation, about
        left = max(2, (budget - s.spent) // max(1, each))
        walks = max(2, min(left, s.game.rows_per_round // max(1, each)))
        if s.count.max() == 0:
            walks = min(left, _FIRST)
        elif len(who) < p:  # the sooner it looks, the sooner it gives players up
            walks = max(2, min(walks, int(s.count[who].max())))
        s.sample(who, walks)
        self.look()

    def look(self) -> None:
        """Compare intervals with the k-th place."""
        s, k, p = self.sampler, self.k, len(self.contested)
        if k is None:
            return
        if k == p:
            self.contested[:], self.settled = False, True
            return
        self.looks += 1
        # Half of an interval; looks share the risk as 6 / (pi r)^2, which sums to one.
        risk = (1.0 - self.confidence) * 6.0 / (math.pi * self.looks) ** 2 / (2 * p)
        half = s.stderr * student(risk, s.count - 1)
        score = s.mean if self.by == "value" else s.mean.abs()
        # All looks hold at once, so an interval never widens again.
        low = self.low = torch.maximum(self.low, score - half)
        high = self.high = torch.minimum(self.high, score + half)
        order = score.argsort(descending=True, stable=True)
        top = torch.zeros(p, dtype=torch.bool)
        top[order[:k]] = True
        slack = self.tolerance * s.scale
        self.contested = torch.where(
            top, low < high[~top].max() - slack, high > low[top].min() + slack
        )
        self.settled = not bool(self.contested.any())

    def note(self) -> str:
        """What is known of the top k."""
        if self.k is None:
            return "all players alike"
        if self.settled:
            return f"top {self.k} settled at confidence {self.confidence:g}"
        return f"top {self.k} not settled: {int(self.contested.sum())} players are contested"


def student(risk: float, freedom: Tensor) -> Tensor:
    """The quantile of Student's t that is exceeded with probability `risk`, of each [p] freedom.

    By the expansion about the normal quantile (Abramowitz and Stegun 26.7.5).
    """
    z = float(-torch.special.ndtri(torch.tensor(risk, dtype=torch.float64)))
    n = freedom.double().clamp_min(1.0)
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / n + second / n**2 + third / n**3
