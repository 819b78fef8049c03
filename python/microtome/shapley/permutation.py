"""Shapley values by sampled permutations, each background row walking its own."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from microtome.errors import ArgumentError
from microtome.shapley import running
from microtome.shapley._start import as_game
from microtome.shapley.game import MEMORY, Game
from microtome.shapley.link import Link, link_of
from microtome.shapley.mlp import mlp_walker
from microtome.shapley.orders import Design, design_of, ranks
from microtome.shapley.result import ShapleyValues, finish
from microtome.shapley.running import Moments, Stop
from microtome.shapley.walks import GameWalker, Walker

_WALKS = 64  # permutations in all, unless the user says otherwise, but
_LEAST = 4  # at least so many for each background row: two units, which make a standard error
_RANKS = 1 << 20  # numbers drawn for a round of the white box, which looks at no single call
_WALKED = 1 << 24  # model rows of such a round: about two seconds of a network 30-128-128-1


def permutation(
    f: Any,
    x: Any = None,
    background: Any = None,
    *,
    n_permutations: int | None = None,
    design: str = "antithetic",
    shared: bool = False,
    groups: Mapping[str, Sequence[int | str]] | Sequence[int] | Tensor | None = None,
    max_evaluations: int | None = None,
    target_error: float | None = None,
    seconds: float | None = None,
    seed: int = 0,
    link: str | Link = "identity",
    precision: str = "auto",
    memory: int = MEMORY,
    check: bool = True,
    progress: bool = True,
) -> ShapleyValues:
    """Estimate Shapley values by walking through random permutations of the players.

        phi_j = mean over background rows b, mean over permutations of
                v_b(players before j, and j) - v_b(players before j)

    Every background row walks its own permutations, unless `shared`: at the same number of model
    rows the error is then a third of that of permutations shared by all rows (docs/shapley.md).

    Args:
        f: a function of rows, a torch module, a scikit-learn estimator; or a game, and then x,
            background and groups are None.
        x: [e, m] rows to explain ([m] for one); [e, ...] for inputs of more dimensions.
        background: [n, m] rows that absent players are drawn from.
        n_permutations: permutations each background row walks, rounded up to whole units of the
            design (2 for "antithetic"). By default 64 / n, at least 4.
        design: "antithetic", "plain", "orthogonal" or "sobol" (orders.py).
        shared: let all background rows walk the same permutations, and average them first.
        groups: players that are groups of columns: a mapping from names to columns, or the
            group's number of each column.
        max_evaluations: most model rows for each explicand; instead of n_permutations.
        target_error: stop a row when the RMS standard error over players falls below this fraction
            of the RMS value, n_permutations or max_evaluations permitting (without either: when it
            does).
        seconds: stop all when so much time has passed, but not before every row has its first
            walks; the result then depends on the machine.
        seed: of the permutations. The same seed gives the same bits for any `memory` and number of
            threads, and a row's values do not depend on which other rows are explained with it.
        link: "identity", "logit", or a function: explains link(mean over background of f); other
            links than the identity need shared=True.
        precision: of the white-box path of multilayer perceptrons: "auto", "fp32" or "bf16".
            "auto" takes bf16 products where the processor has AMX and the shift they cause, which
            is measured, stays far below the standard error; the note says so (mlp.py).
        memory: bytes of rows in one call of f.
        check: call f twice on x to find out whether it is deterministic.
        progress: show a progress bar, if it takes longer than a second.

    Returns:
        ShapleyValues, [e, p] or [e, p, o], with standard errors; sums match f(x) - mean f(b).

    Raises:
        ArgumentError: too small a budget, an unknown option, a function that is not deterministic.
        ShapeError, NonFiniteError: f returns something else than numbers for each row.

    Ctrl-C ends the sampling and returns what is there, with its errors (`interrupted`); rows that
    were not begun are NaN, and before a first round of walks is over there is nothing to return.
    Source: Castro et al. 2009; Mitchell et al. 2022 (JMLR 23:43).

    Example:
        >>> import torch
        >>> x, background = torch.tensor([[1.0, 2.0]]), torch.zeros(1, 2)
        >>> permutation(lambda a: a[:, 0] * a[:, 1], x, background).values
        tensor([[1., 1.]], dtype=torch.float64)
    """
    op = "permutation"
    game = as_game(op, f, x, background, groups=groups, memory=memory, check=check)
    linked = link_of(op, link)
    if linked is not None and not shared and game.backgrounds > 1:
        msg = (
            f"{op}: link={link!r} applies to the mean over background rows, which needs them all "
            "on one permutation. Pass shared=True."
        )
        raise ArgumentError(msg)
    stop = Stop(op, target_error, seconds)
    n = game.backgrounds
    S = 1 if shared else n
    plan = plan_walks(op, game, design, S, n_permutations, max_evaluations, stop)
    walker: Walker | None = None
    if linked is None:
        walker = mlp_walker(op, game, S, precision)
    elif precision == "bf16":
        msg = f"{op}: precision='bf16' needs the white-box path, which has no link. Drop one."
        raise ArgumentError(msg)
    walker = walker or GameWalker(game, S, linked)
    return sample(game, walker, plan, S, stop, seed, memory, progress, linked)


def plan_walks(
    op: str,
    game: Game,
    name: str,
    S: int,
    n_permutations: int | None,
    max_evaluations: int | None,
    stop: Stop,
) -> Design:
    """The design and how many of its units a stratum walks."""
    p, n = len(game.players), game.backgrounds
    if max_evaluations is None:
        if n_permutations is None:
            n_permutations = max(_LEAST, math.ceil(_WALKS / S))
            if stop.asked:
                n_permutations = 1 << 20  # until it stops
        return design_of(op, name, p, n_permutations)
    if n_permutations is not None:
        msg = f"{op}: give n_permutations or max_evaluations, not both."
        raise ArgumentError(msg)
    ends = n + 1
    one = design_of(op, name, p, 1)
    if p == 1 and max_evaluations >= ends:  # the ends tell all
        return one
    affordable = (max_evaluations - ends) // max(1, one.steps * n)
    if affordable < 1:
        msg = (
            f"{op}: max_evaluations={max_evaluations} is too few for p={p} players and n={n} "
            f"background rows: one round of {name} walks takes {one.steps * n + ends}. Raise it, "
            "pass fewer background rows, group players, or use kernel()."
        )
        raise ArgumentError(msg)
    wanted = affordable * one.permutations
    found = design_of(op, name, p, wanted)
    fits = (max_evaluations - ends) // max(1, found.steps * n)
    return replace(found, U=max(1, min(found.U, fits)))


def sample(
    game: Game,
    walker: Walker,
    plan: Design,
    S: int,
    stop: Stop,
    seed: int,
    memory: int,
    progress: bool,
    link: Link | None,
    draw: Callable[[Design, int, int, int, int], Tensor] = ranks,
    method: str = "permutation",
) -> ShapleyValues:
    """Walk what `draw` gives until the plan or a stop ends it."""
    e, p = game.explicands, plan.p
    o = game.ends()[1].shape[1]
    rows = max(1, plan.steps * game.backgrounds)  # of a unit
    each = max(1, game.rows_per_round // rows)  # units a round, at most
    least, kept = max(1, each // 4), running.KEPT // 2
    if walker.engine == "mlp":
        kept = _WALKED
        if not stop.asked:
            least = each = max(1, min(plan.U, _RANKS // (S * plan.A * p)))
    if stop.seconds is not None:
        least = 1 if S > 1 else 2  # as few as make a standard error
    values = torch.full((e, p, o), math.nan, dtype=torch.float64)
    stderr = torch.full_like(values, math.nan)
    block = memory // max(1, 8 * o * S * max(3 * p, each * plan.A * (2 * p + 1)))
    block = max(1, min(block, kept // (min(each, plan.U) * rows)))
    quick = e * plan.U <= least  # one round: no bar, which would cost a part of it
    bar = running.bar(e * plan.U, method, "unit", progress and not quick)
    interrupted, done = False, 0
    with bar:
        for at in range(0, e, block):
            who = torch.arange(at, min(at + block, e))
            moments = _Rows(who, values, stderr, stop)
            until, stopped = stop.share(len(who) / (e - at)), False
            try:
                for first, units in running.rounds(plan.U, least, each, stop, until):
                    part = draw(plan, S, first, units, seed)
                    moments.add(*walker(part, plan.paired, moments.who), units)
                    bar.update(units * len(who))
                    done = at + len(who)
                    if len(moments.who) == 0:
                        break
                    if stop.late(until):
                        interrupted = True
                        break
            except KeyboardInterrupt:
                interrupted = stopped = True
                if done == 0:
                    raise
            if stopped:
                break
    notes = [getattr(walker, "note", "")]
    if interrupted:
        notes.append(
            f"ended early; rows from {done} on were not begun" if done < e else "ended early"
        )
    design = plan.name if S == 1 else f"{plan.name}, every background row its own"
    notes.insert(0, design)
    return finish(
        game, values, stderr, method, interrupted=interrupted,
        note="; ".join(filter(None, notes)), engine=walker.engine, link=link,
    )  # fmt: skip


class _Rows:
    """The rows of a block that are still being sampled; those done are written out."""

    def __init__(self, who: Tensor, values: Tensor, stderr: Tensor, stop: Stop) -> None:
        self.who, self.values, self.stderr, self.stop = who, values, stderr, stop
        self.moments = Moments()

    def add(self, mean: Tensor, m2: Tensor, units: int) -> None:
        self.moments.add(mean, m2, units)
        found, error = self.moments.estimate()
        self.values[self.who], self.stderr[self.who] = found, error
        reached = self.stop.reached(found, error)
        if bool(reached.any()) and self.moments.count > 1:
            keep = ~reached
            self.who = self.who[keep]
            self.moments.mean = self.moments.mean[keep]
            self.moments.m2 = self.moments.m2[keep]
