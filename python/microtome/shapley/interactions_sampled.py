"""Interactions from samples that grow until an error, a time or the user ends them."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from microtome.shapley.coalitions import MEAN, spans, unpack
from microtome.shapley.game import Game
from microtome.shapley.indices import Sets, constrained, kernel_weights
from microtome.shapley.link import Link
from microtome.shapley.regression import one_thread
from microtome.shapley.running import Stop
from microtome.shapley.subsets import Drawn, Plan

_LEAST = 0.05  # of a residual that is taken to be left after the fit


def terms_of(p: int, degree: int) -> int:
    """How many sets of 1 to `degree` of p players there are."""
    return sum(math.comb(p, d) for d in range(1, degree + 1))


def by_column(matrix: Tensor, columns: Tensor) -> Tensor:
    """matrix [T, K] times columns [e', K, o] -> [e', T, o], each column by itself."""
    with one_thread():
        out = [matrix @ column for row in columns for column in row.T]
    shape = (len(columns), columns.shape[2], len(matrix))
    return torch.stack(out).reshape(shape).transpose(1, 2) if out else columns.new_zeros(
        len(columns), len(matrix), columns.shape[2]
    )  # fmt: skip


@dataclass(frozen=True)
class Design:
    """What the values of 2 U coalitions, U and then their complements, say of the sets.

    Attributes:
        x: [2 U, A], whether each term of the polynomial lies in each coalition.
        fit: [A, 2 U], from values to the polynomial's terms, and d [A], of full - empty.
        to_sets: [T, 2 U], from values to interactions, and to_ends [T], of full - empty.
        inflate: [2 U], what residuals count, as in a jackknife.
        rest: [U], what part of a unit's stratum was not drawn.
        note: the polynomial's degree and how many coalitions there are.
    """

    x: Tensor
    fit: Tensor
    d: Tensor
    to_sets: Tensor
    to_ends: Tensor
    inflate: Tensor
    rest: Tensor
    note: str

    def solve(self, target: Tensor, apart: Tensor, exact: bool) -> tuple[Tensor, Tensor]:
        """Interactions and standard errors [e', T, o].

        Args:
            target: [e', 2 U, o], values less the empty coalition's.
            apart: [e', o], full - empty.
            exact: whether nothing is left out, so that there is no error.
        """
        apart = apart[:, None]
        values = by_column(self.to_sets, target) + self.to_ends[:, None] * apart
        if exact:
            return values, torch.zeros_like(values)
        terms = by_column(self.fit, target) + self.d[:, None] * apart  # [e', A, o]
        left = (target - by_column(self.x, terms)) * self.inflate[:, None]
        U = len(self.rest)
        variance = torch.empty_like(values)
        for i, row in enumerate(left):
            for j, column in enumerate(row.T):
                share = self.to_sets * column
                pair = share[:, :U] + share[:, U:]
                variance[i, :, j] = (pair.square() * self.rest).sum(1)
        return values, variance.sqrt()


def design_of(sets: Sets, index: str, drawn: Drawn, plan: Plan) -> Design:
    """The design of the first plan.units units drawn."""
    p, U = sets.p, plan.units
    drawn = drawn.first_units(U)
    inside = unpack(drawn.words[0], p)
    inside = torch.cat([inside, ~inside])
    weights, rest = plan.weights(drawn.sizes)
    kernel = kernel_weights(p)[inside.sum(1)]
    expand = weights.repeat(2) / (2 * kernel)  # coalitions of the size over those drawn
    # The largest degree for which the sample has coalitions to spare.
    degree = max(d for d in range(1, sets.order + 1) if d == 1 or 1.5 * terms_of(p, d) <= 2 * U)
    if index == "FSII":
        degree = sets.order
    x = sets.monomials(inside)[:, : terms_of(p, degree)]  # [2 U, A]
    weighted = x * (kernel * expand)[:, None]
    with one_thread():
        matrix, d = constrained(x.T @ weighted)
        fit = matrix @ weighted.T  # [A, 2 U]
        leverage = (x.T * fit).sum(0)
    if index == "FSII":
        to_sets = fit
        of_terms = torch.eye(len(sets), dtype=torch.float64)
    else:
        base = "STII" if index == "STII" else "SII"
        of_terms = sets.of_polynomial(base, degree)
        of_rest = sets.coefficients(base, inside).T * expand
        with one_thread():
            if index == "k-SII":
                of_terms, of_rest = sets.gather() @ of_terms, sets.gather() @ of_rest
            of_terms = of_terms - of_rest @ x
            to_sets = of_rest + of_terms @ fit  # [T, 2 U]
    inflate = 1 / (1 - leverage).clamp(min=_LEAST)
    note = f"a polynomial of degree {degree} and {2 * U} coalitions"
    return Design(x, fit, d, to_sets, of_terms @ d, inflate, rest, note)


class Sampled:
    """Interactions from a stratified sample of pairs of coalitions, helped by a polynomial.

    Args:
        game: the game.
        sets: whose interactions.
        index: "k-SII", "SII", "STII" or "FSII".
        link: what is explained is link(mean over the background of f); identity if None.
        plans: from small to large; between them the clock, the error and the user are looked at.
        seed: of the coalitions.
        stop: when to stop before the last.

    Attributes:
        note: of the largest design that was solved.
        exact: whether the last plan is all coalitions, and was reached by all.
        all, each: coalitions that are evaluated for an explicand, and held at a time.
    """

    def __init__(
        self,
        game: Game,
        sets: Sets,
        index: str,
        link: Link | None,
        plans: Sequence[Plan],
        seed: int,
        stop: Stop,
    ) -> None:
        self.game, self.sets, self.index, self.link = game, sets, index, link
        self.plans, self.stop, self.seed = plans, stop, seed
        self.drawn = Drawn(0, 1, plans[-1], seed)
        self._orders: list[tuple[Tensor, Tensor]] = []  # of each plan, drawn when it is reached
        self._designs: dict[int, Design] = {}
        self.exact, self.note, self._furthest = plans[-1].complete, "", -1
        self.all = self.each = 2 * plans[-1].units

    def __call__(
        self, who: Tensor, empty: Tensor, full: Tensor, into: tuple[Tensor, Tensor], until: float
    ) -> str:
        """Fill in values and standard errors [e, T, o] of some explicands.

        Args:
            who: [e'], which.
            empty: [e', o], their ends, as is `full`.
            full: [e', o].
            into: values and standard errors of all explicands.
            until: when to look no further.

        Returns:
            "done", "late" if the time came first, "interrupted" if the user did.

        Raises:
            KeyboardInterrupt: before there is anything to keep.
        """
        rows = torch.arange(len(who))  # those that still grow
        held: Tensor | None = None  # [e', 2, U, o]
        for turn, plan in enumerate(self.plans):
            last, began = turn + 1 == len(self.plans), time.monotonic()
            try:
                new = self._new(turn, who[rows], empty[rows])
            except KeyboardInterrupt:
                if held is None:
                    raise
                self._solve(turn - 1, held, who[rows], (full - empty)[rows], into)
                return "interrupted"
            held = new if held is None else torch.cat([held, new], 2)
            late = not last and self.stop.ends_late(
                began, plan.units - (self.plans[turn - 1].units if turn else 0),
                self.plans[turn + 1].units - plan.units, until,
            )  # fmt: skip
            if last or late or self.stop.target_error is not None:
                self._solve(turn, held, who[rows], (full - empty)[rows], into)
            if last or late:
                return "late" if late else "done"
            if self.stop.target_error is not None:
                keep = ~self.stop.reached(into[0][who[rows]], into[1][who[rows]])
                self.exact &= bool(keep.all())
                rows, held = rows[keep], held[keep]
                if len(rows) == 0:
                    break
        return "done"

    def _new(self, turn: int, who: Tensor, empty: Tensor) -> Tensor:
        """[e', 2, new, o]: what a plan's new coalitions, and their complements, are above empty."""
        if turn == len(self._orders):
            self._orders.append(self.drawn.extend(self.plans[turn]))
        ranks, sizes = self._orders[turn]
        new = len(sizes)
        lo = torch.cat([torch.zeros_like(sizes), sizes])
        hi = torch.cat([sizes, torch.full_like(sizes, self.sets.p)])
        background = torch.tensor(MEAN if self.game.backgrounds > 1 else 0)
        v = self.game.values(ranks[0], spans(background, torch.arange(new).repeat(2), lo, hi), who)
        v = v if self.link is None else self.link(v)
        return (v - empty[:, None]).unflatten(1, (2, new))

    def _solve(
        self, turn: int, held: Tensor, who: Tensor, apart: Tensor, into: tuple[Tensor, Tensor]
    ) -> None:
        plan = self.plans[turn]
        if turn not in self._designs:
            if len(self._designs) > 0 and self.stop.target_error is None:
                self._designs.clear()
            self._designs[turn] = design_of(self.sets, self.index, self.drawn, plan)
        design = self._designs[turn]
        if turn > self._furthest:
            self._furthest, self.note = turn, design.note
        held = held[:, :, : plan.units].flatten(1, 2)
        for whole, part in zip(into, design.solve(held, apart, plan.complete), strict=True):
            whole[who] = part
