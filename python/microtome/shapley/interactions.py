"""Shapley interactions: what groups of players do together beyond what they do apart."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from microtome import _check
from microtome.errors import ArgumentError
from microtome.shapley import running
from microtome.shapley._start import as_game
from microtome.shapley.exact import affordable, every_coalition
from microtome.shapley.game import MEMORY, Game
from microtome.shapley.indices import (
    INDICES,
    Sets,
    constrained,
    kernel_gram,
    kernel_weights,
)
from microtome.shapley.interaction_values import Interactions
from microtome.shapley.interactions_sampled import Sampled, by_column, terms_of
from microtome.shapley.link import Link, link_of
from microtome.shapley.regression import one_thread
from microtome.shapley.result import finish
from microtome.shapley.running import Stop
from microtome.shapley.subsets import Plan, growing, plan_of, population

_EXACT = 1 << 17  # evaluations of a row below which all coalitions are taken
_ROWS = 4  # coalitions for each term of the fit, by default
_MOST = 1 << 15  # coalitions where nothing else but the error or the time ends the sampling
_ORDERS = 5
_NUMBERS = 1 << 27  # of the matrix from coalitions to sets


def interactions(
    f: Any,
    x: Any = None,
    background: Any = None,
    *,
    index: str = "k-SII",
    order: int = 2,
    n_coalitions: int | None = None,
    groups: Mapping[str, Sequence[int | str]] | Sequence[int] | Tensor | None = None,
    max_evaluations: int | None = None,
    target_error: float | None = None,
    seconds: float | None = None,
    seed: int = 0,
    link: str | Link = "identity",
    memory: int = MEMORY,
    check: bool = True,
    progress: bool = True,
) -> Interactions:
    """Shapley interactions of up to `order` players (indices.py says what each index is).

        I(T) = sum over coalitions S of c(T, S) v(S)

    From all coalitions where 2^p n evaluations fit the budget, and neither n_coalitions nor seconds
    is given. Else
    from a sample: a polynomial of degree `order` is fitted as `kernel` fits a linear function, its
    interactions are known, and those of what it leaves are estimated by the same sample (the
    regression estimator of survey sampling; Witter et al. 2025 for Shapley values). FSII is that
    fit itself.

    Args:
        f: a function of rows, a torch module, a scikit-learn estimator; or a game, and then x,
            background and groups are None.
        x: [e, m] rows to explain ([m] for one).
        background: [n, m] rows that absent players are drawn from; values are means over them.
        index: "k-SII" (sums to f(x) - mean f(b)), "SII" (its single players are the Shapley
            values), "STII" or "FSII".
        order: size of the largest sets, 1 to 5; p where there are fewer players.
        n_coalitions: coalitions sampled; by default 4 for each set of the fit, at least 2048.
        groups: players that are groups of columns, as in `permutation`.
        max_evaluations: most model rows for each explicand; 131,072 by default where that is
            enough for all coalitions.
        target_error: stop a row when the RMS standard error over sets falls below this fraction of
            the RMS interaction, n_coalitions or max_evaluations permitting.
        seconds: stop all when so much time has passed, but not before every row has a first fit;
            the result then depends on the machine.
        seed: of the coalitions.
        link: "identity", "logit", or a function: explains link(mean over background of f).
        memory: bytes of rows in one call of f, and of values held.
        check: call f twice on x to find out whether it is deterministic.
        progress: show a progress bar, if it takes longer than a second.

    Returns:
        Interactions, by set and as a matrix, with standard errors.

    Raises:
        ArgumentError: an unknown index, an order or a budget that does not fit, a function that is
            not deterministic.
        ShapeError, NonFiniteError: f returns something else than numbers for each row.

    An interaction says how f answers to values changing together; it does not follow that the
    players act together in the world. Ctrl-C keeps the rows that are done, and of the row it meets
    the samples up to the last look at it, with their errors. Deterministic.

    Example:
        >>> import torch
        >>> x, background = torch.tensor([[1.0, 2.0, 3.0]]), torch.zeros(1, 3)
        >>> found = interactions(lambda a: a[:, 0] * a[:, 1] + a[:, 2], x, background)
        >>> found[0, 1], found["x2",]
        (tensor([2.], dtype=torch.float64), tensor([3.], dtype=torch.float64))
    """
    op = "interactions"
    _check.one_of(op, "index", index, INDICES)
    game = as_game(op, f, x, background, groups=groups, memory=memory, check=check)
    p = len(game.players)
    _check.between(op, "order", order, 1, _ORDERS)
    order = min(order, p)
    linked = link_of(op, link)
    if terms_of(p, order) * p > _NUMBERS:
        msg = (
            f"{op}: p={p} players have {terms_of(p, order):,} sets of up to {order}, more than can "
            "be held. Lower the order, or group players."
        )
        raise ArgumentError(msg)
    sets = Sets(p, order)
    stop = Stop(op, target_error, seconds)
    budget = _EXACT if max_evaluations is None else max_evaluations
    free = n_coalitions is None and seconds is None
    whole = p == 1 or (free and affordable(game, budget))  # one player's value is full - empty
    run: _Enumerated | Sampled
    if whole:
        run = _Enumerated(game, sets, index, linked)
    else:
        plans = _plans(op, game, sets, index, n_coalitions, max_evaluations, stop)
        run = Sampled(game, sets, index, linked, plans, seed, stop)
    return _collect(op, game, run, sets, index, linked, memory, progress, stop)


def _plans(
    op: str,
    game: Game,
    sets: Sets,
    index: str,
    n_coalitions: int | None,
    max_evaluations: int | None,
    stop: Stop,
) -> list[Plan]:
    """Plans from small to large; they depend on sizes and budgets alone."""
    p, n = sets.p, game.backgrounds
    small = {s: population(p, s, True) for s in range(1, min(sets.order, p // 2 + 1))}
    least = 2 * p
    if index == "STII":
        least = max(least, 2 * sum(small.values()) + 2 * (p // 2))
    if index == "FSII":
        least = len(sets) + 2
    every = (1 << p) - 2
    least = min(least, every)
    if max_evaluations is not None:
        most = (max_evaluations - n - 1) // n
        n_coalitions = most if n_coalitions is None else min(n_coalitions, most)
    elif n_coalitions is None:
        n_coalitions = max(_ROWS * len(sets), 2048)
        if stop.asked:
            n_coalitions = max(n_coalitions, min(_MOST, _NUMBERS // (4 * len(sets))))
    if n_coalitions < least:
        msg = (
            f"{op}: {index} of order {sets.order} takes at least {least} coalitions for p={p} "
            f"players ({least * n + n + 1} evaluations), got n_coalitions={n_coalitions}. Raise "
            "n_coalitions or max_evaluations, or lower the order."
        )
        raise ArgumentError(msg)
    if n_coalitions * len(sets) > _NUMBERS:
        msg = (
            f"{op}: {len(sets)} sets of up to {sets.order} of p={p} players and {n_coalitions} "
            f"coalitions take a matrix of {n_coalitions * len(sets) * 8 / 1e9:.1f} GB. Lower the "
            "order, group players, or sample fewer coalitions."
        )
        raise ArgumentError(msg)
    whole = sets.order - 1 if index == "STII" else 0
    largest = plan_of(p, True, "leverage", min(n_coalitions, every) // 2, whole)
    rows = 0 if stop.seconds is not None else game.rows_per_round
    first = max(least, rows // (2 * n))
    return growing(largest, first, 1.5 if stop.asked else 2, "leverage", whole)


class _Enumerated:
    """Interactions from all coalitions."""

    exact = True
    note = ""

    def __init__(self, game: Game, sets: Sets, index: str, link: Link | None) -> None:
        self.game, self.sets, self.index, self.link = game, sets, index, link
        self.all = 1 << sets.p  # coalitions, and how many of them are held at a time
        self.each = min(self.all, 1 << 12)

    def __call__(
        self, who: Tensor, empty: Tensor, full: Tensor, into: tuple[Tensor, Tensor], until: float
    ) -> str:
        """Fill in values and errors [e, T, o] of explicands, from their ends [e', o]."""
        into[0][who], into[1][who] = self._values(who, empty, full), 0.0
        return "done"

    def _values(self, who: Tensor, empty: Tensor, full: Tensor) -> Tensor:
        sets, index = self.sets, self.index
        total = torch.zeros(len(who), len(sets), empty.shape[1], dtype=torch.float64)
        weights = kernel_weights(sets.p)
        base = "STII" if index == "STII" else "SII"
        for inside, v in self._all(who, empty, full):
            if index == "FSII":
                matrix = sets.monomials(inside) * weights[inside.sum(1)][:, None]
                total += by_column(matrix.T, v - empty[:, None])
            else:
                total += by_column(sets.coefficients(base, inside).T, v)
        if index == "FSII":
            with one_thread():
                matrix, d = constrained(kernel_gram(sets))
            return by_column(matrix, total) + d[:, None] * (full - empty)[:, None]
        return by_column(sets.gather(), total) if index == "k-SII" else total

    def _all(self, who: Tensor, empty: Tensor, full: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        ends = torch.tensor([False, True])[:, None].expand(2, self.sets.p)
        yield ends, torch.stack([empty, full], 1)
        yield from every_coalition(self.game, who, self.link)


def _collect(
    op: str,
    game: Game,
    run: _Enumerated | Sampled,
    sets: Sets,
    index: str,
    link: Link | None,
    memory: int,
    progress: bool,
    stop: Stop,
) -> Interactions:
    """Run over blocks of explicands, and the result."""
    empty, full = game.ends()
    empty = empty.mean(1)
    if link is not None:
        empty, full = link(empty), link(full)
    e, o = full.shape
    empty = empty.expand(e, -1)
    values = torch.full((e, len(sets), o), math.nan, dtype=torch.float64)
    stderr = torch.full_like(values, math.nan)
    fits = memory // (8 * o * max(run.each, len(sets)))
    block = max(1, min(fits, running.KEPT // (game.backgrounds * run.all)))
    done, interrupted = 0, False
    try:
        with running.bar(e, op, "row", progress) as bar:
            for at in range(0, e, block):
                who = torch.arange(at, min(at + block, e))
                until = stop.share(len(who) / (e - at))
                ended = run(who, empty[who], full[who], (values, stderr), until)
                done = at + len(who)
                bar.update(len(who))
                interrupted |= ended != "done"
                if ended == "interrupted":
                    break
    except KeyboardInterrupt:
        if done == 0:
            raise
        interrupted = True
    notes = [run.note]
    if interrupted:
        rest = f"; rows from {done} on were not done" if done < e else ""
        notes.append(f"ended early{rest}")
    ends = finish(game, values, stderr, op, link=link)
    return Interactions(
        ends.values, ends.stderr, sets.sets, index, sets.order, ends.base_values, ends.full_values,
        game.players, op, game.engine, game.evaluations, run.exact and not interrupted, interrupted,
        "; ".join(filter(None, notes)),
    )  # fmt: skip
