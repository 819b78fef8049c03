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
from microtome.shapley.coalitions import MEAN, spans, unpack
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
from microtome.shapley.link import Link, link_of
from microtome.shapley.regression import one_thread
from microtome.shapley.result import finish
from microtome.shapley.subsets import Drawn, Plan, plan_of, population

_EXACT = 1 << 17  # evaluations of a row below which all coalitions are taken
_ROWS = 4  # coalitions for each term of the fit, by default
_LEAST = 0.05  # of a residual that is taken to be left after the fit
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
    seed: int = 0,
    link: str | Link = "identity",
    memory: int = MEMORY,
    check: bool = True,
    progress: bool = True,
) -> Interactions:
    """Shapley interactions of up to `order` players (indices.py says what each index is).

        I(T) = sum over coalitions S of c(T, S) v(S)

    From all coalitions where 2^p n evaluations fit the budget, and n_coalitions is not given. Else
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
    players act together in the world. Ctrl-C keeps the rows that are done. Deterministic.

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
    if _terms(p, order) * p > _NUMBERS:
        msg = (
            f"{op}: p={p} players have {_terms(p, order):,} sets of up to {order}, more than can "
            "be held. Lower the order, or group players."
        )
        raise ArgumentError(msg)
    sets = Sets(p, order)
    budget = _EXACT if max_evaluations is None else max_evaluations
    whole = n_coalitions is None and affordable(game, budget)
    run: _Enumerated | _Sampled
    if whole:
        run = _Enumerated(game, sets, index, linked)
    else:
        plan = _plan(op, game, sets, index, n_coalitions, max_evaluations)
        run = _Sampled(game, sets, index, linked, plan, seed)
    return _collect(op, game, run, sets, index, linked, memory, progress)


def _plan(
    op: str,
    game: Game,
    sets: Sets,
    index: str,
    n_coalitions: int | None,
    max_evaluations: int | None,
) -> Plan:
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
    return plan_of(p, True, "leverage", min(n_coalitions, every) // 2, whole)


def _pieces(matrix: Tensor, columns: Tensor) -> Tensor:
    """matrix [T, K] times columns [e', K, o] -> [e', T, o], each column by itself."""
    with one_thread():
        out = [matrix @ column for row in columns for column in row.T]
    shape = (len(columns), columns.shape[2], len(matrix))
    return torch.stack(out).reshape(shape).transpose(1, 2) if out else columns.new_zeros(
        len(columns), len(matrix), columns.shape[2]
    )  # fmt: skip


class _Enumerated:
    """Interactions from all coalitions."""

    exact = True
    note = ""

    def __init__(self, game: Game, sets: Sets, index: str, link: Link | None) -> None:
        self.game, self.sets, self.index, self.link = game, sets, index, link
        self.all = 1 << sets.p  # coalitions, and how many of them are held at a time
        self.each = min(self.all, 1 << 12)

    def __call__(self, who: Tensor, empty: Tensor, full: Tensor) -> tuple[Tensor, Tensor | None]:
        """values [e', T, o] of explicands, from their ends [e', o]."""
        sets, index = self.sets, self.index
        total = torch.zeros(len(who), len(sets), empty.shape[1], dtype=torch.float64)
        weights = kernel_weights(sets.p)
        base = "STII" if index == "STII" else "SII"
        for inside, v in self._all(who, empty, full):
            if index == "FSII":
                matrix = sets.monomials(inside) * weights[inside.sum(1)][:, None]
                total += _pieces(matrix.T, v - empty[:, None])
            else:
                total += _pieces(sets.coefficients(base, inside).T, v)
        if index == "FSII":
            with one_thread():
                matrix, d = constrained(kernel_gram(sets))
            return _pieces(matrix, total) + d[:, None] * (full - empty)[:, None], None
        return (_pieces(sets.gather(), total) if index == "k-SII" else total), None

    def _all(self, who: Tensor, empty: Tensor, full: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        ends = torch.tensor([False, True])[:, None].expand(2, self.sets.p)
        yield ends, torch.stack([empty, full], 1)
        yield from every_coalition(self.game, who, self.link)


class _Sampled:
    """Interactions from a stratified sample of pairs of coalitions, helped by a polynomial."""

    def __init__(
        self, game: Game, sets: Sets, index: str, link: Link | None, plan: Plan, seed: int
    ) -> None:
        self.game, self.link, self.exact = game, link, plan.complete
        drawn = Drawn(0, 1, plan, seed)
        ranks, sizes = drawn.extend(plan)
        self.ranks, p, U = ranks[0], sets.p, len(sizes)
        zero, last = torch.zeros_like(sizes), torch.full_like(sizes, p)
        lo, hi = torch.cat([zero, sizes]), torch.cat([sizes, last])
        background = torch.tensor(MEAN if game.backgrounds > 1 else 0)
        self.spans = spans(background, torch.arange(U).repeat(2), lo, hi)  # first all S, then S^c
        inside = unpack(drawn.words[0], p)
        inside = torch.cat([inside, ~inside])
        weights, rest = plan.weights(sizes)
        kernel = kernel_weights(p)[inside.sum(1)]
        expand = weights.repeat(2) / (2 * kernel)  # coalitions of the size over those drawn
        # The largest degree for which the sample has coalitions to spare.
        degree = max(d for d in range(1, sets.order + 1) if d == 1 or 1.5 * _terms(p, d) <= 2 * U)
        if index == "FSII":
            degree = sets.order
        self.note = f"a polynomial of degree {degree} and {2 * U} coalitions"
        self.x = sets.monomials(inside)[:, : _terms(p, degree)]  # [2 U, A]
        weighted = self.x * (kernel * expand)[:, None]
        with one_thread():
            matrix, self.d = constrained(self.x.T @ weighted)
            self.fit = matrix @ weighted.T  # [A, 2 U]
            leverage = (self.x.T * self.fit).sum(0)
        if index == "FSII":
            self.to_sets = self.fit
            of_terms = torch.eye(len(sets), dtype=torch.float64)
        else:
            base = "STII" if index == "STII" else "SII"
            of_terms = sets.of_polynomial(base, degree)
            of_rest = sets.coefficients(base, inside).T * expand
            with one_thread():
                if index == "k-SII":
                    of_terms, of_rest = sets.gather() @ of_terms, sets.gather() @ of_rest
                of_terms = of_terms - of_rest @ self.x
                self.to_sets = of_rest + of_terms @ self.fit  # [T, 2 U]
        self.to_ends = of_terms @ self.d
        self.inflate = 1 / (1 - leverage).clamp(min=_LEAST)  # of residuals, as in a jackknife
        self.rest = rest
        self.all = self.each = 2 * U

    def __call__(self, who: Tensor, empty: Tensor, full: Tensor) -> tuple[Tensor, Tensor | None]:
        """values and standard errors [e', T, o] of explicands, from their ends [e', o]."""
        v = self.game.values(self.ranks, self.spans, who)
        target = (v if self.link is None else self.link(v)) - empty[:, None]
        apart = (full - empty)[:, None]
        values = _pieces(self.to_sets, target) + self.to_ends[:, None] * apart
        if self.exact:
            return values, None
        terms = _pieces(self.fit, target) + self.d[:, None] * apart  # [e', A, o]
        left = (target - _pieces(self.x, terms)) * self.inflate[:, None]
        U = len(self.rest)
        variance = torch.empty_like(values)
        for i, j in torch.cartesian_prod(
            torch.arange(len(who)), torch.arange(values.shape[2])
        ).tolist():
            share = self.to_sets * left[i, :, j]
            pair = share[:, :U] + share[:, U:]
            variance[i, :, j] = (pair.square() * self.rest).sum(1)
        return values, variance.sqrt()


def _terms(p: int, degree: int) -> int:
    return sum(math.comb(p, d) for d in range(1, degree + 1))


def _collect(
    op: str,
    game: Game,
    run: _Enumerated | _Sampled,
    sets: Sets,
    index: str,
    link: Link | None,
    memory: int,
    progress: bool,
) -> Interactions:
    """Run over blocks of explicands, and the result."""
    empty, full = game.ends()
    empty = empty.mean(1)
    if link is not None:
        empty, full = link(empty), link(full)
    e, o = full.shape
    empty = empty.expand(e, -1)
    values = torch.full((e, len(sets), o), math.nan, dtype=torch.float64)
    stderr = torch.zeros_like(values)
    fits = memory // (8 * o * max(run.each, len(sets)))
    block = max(1, min(fits, running.KEPT // (game.backgrounds * run.all)))
    done = 0
    try:
        with running.bar(e, op, "row", progress) as bar:
            for at in range(0, e, block):
                who = torch.arange(at, min(at + block, e))
                values[who], error = run(who, empty[who], full[who])
                if error is not None:
                    stderr[who] = error
                done = at + len(who)
                bar.update(len(who))
    except KeyboardInterrupt:
        if done == 0:
            raise
    notes = [run.note, "" if done == e else f"ended early; rows from {done} on were not done"]
    ends = finish(game, values, stderr, op, link=link)
    return Interactions(
        ends.values, ends.stderr, sets.sets, index, sets.order, ends.base_values, ends.full_values,
        game.players, op, game.engine, game.evaluations, run.exact, done < e,
        "; ".join(filter(None, notes)),
    )  # fmt: skip
