"""Shapley values by the values of all coalitions."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from microtome.errors import ArgumentError
from microtome.ops import coalition_gram
from microtome.shapley import running
from microtome.shapley._start import as_game
from microtome.shapley.coalitions import MEAN, of_members, pack
from microtome.shapley.game import MEMORY, Game
from microtome.shapley.link import Link, link_of
from microtome.shapley.result import ShapleyValues, finish

MAX_EVALUATIONS = 1 << 22  # model rows an explicand may take
_CHUNK = 1 << 12  # coalitions at a time; fixed, so that sums are folded alike for any `memory`
_MOST = 62  # players whose coalitions an int64 can count


def exact(
    f: Any,
    x: Any = None,
    background: Any = None,
    *,
    groups: Mapping[str, Sequence[int | str]] | Sequence[int] | Tensor | None = None,
    max_evaluations: int = MAX_EVALUATIONS,
    link: str | Link = "identity",
    memory: int = MEMORY,
    check: bool = True,
    progress: bool = True,
) -> ShapleyValues:
    """Shapley values from every one of the 2^p coalitions: no sampling, no error but rounding.

        phi_j = sum over S without j of  |S|! (p - |S| - 1)! / p!  (v(S and j) - v(S))

    Coalitions come in the order of a Gray code, each one player away from the last, and are
    weighted as they pass; memory does not grow with their number.

    Args:
        f: a function of rows, a torch module, a scikit-learn estimator; or a game, and then x,
            background and groups are None.
        x: [e, m] rows to explain ([m] for one); [e, ...] for inputs of more dimensions.
        background: [n, m] rows that absent players are drawn from.
        groups: players that are groups of columns, as in `permutation`.
        max_evaluations: most model rows for each explicand; 2^p n are needed.
        link: "identity", "logit", or a function: explains link(mean over background of f).
        memory: bytes of rows in one call of f, and of values held.
        check: call f twice on x to find out whether it is deterministic.
        progress: show a progress bar, if it takes longer than a second.

    Returns:
        ShapleyValues, [e, p] or [e, p, o], with exact=True and standard errors of zero.

    Raises:
        ArgumentError: 2^p n evaluations are too many, an unknown option, a function that is not
            deterministic.
        ShapeError, NonFiniteError: f returns something else than numbers for each row.

    Ctrl-C keeps the rows that are done (`interrupted`); the others are NaN. Deterministic: the same
    bits for any `memory` and number of threads. Cost: 2^p n evaluations an explicand.
    Source: Shapley 1953.

    Example:
        >>> import torch
        >>> x, background = torch.tensor([[1.0, 2.0]]), torch.zeros(1, 2)
        >>> exact(lambda a: a[:, 0] * a[:, 1], x, background).values
        tensor([[1., 1.]], dtype=torch.float64)
    """
    op = "exact"
    game = as_game(op, f, x, background, groups=groups, memory=memory, check=check)
    linked = link_of(op, link)
    need(op, game, max_evaluations)
    empty, full = game.ends()
    empty = empty.mean(1)
    if linked is not None:
        empty, full = linked(empty), linked(full)
    apart = (full - empty)[:, None]  # [e, 1, o]
    e, p, o = game.explicands, len(game.players), full.shape[1]
    weights = player_weights(p)
    values = torch.full((e, p, o), math.nan, dtype=torch.float64)
    fits = memory // (8 * o * min(1 << p, _CHUNK))
    block = max(1, min(fits, running.KEPT // (game.backgrounds << p)))
    bar = running.bar(e << p, op, "coalition", progress)
    done = 0
    try:
        with bar:
            for at in range(0, e, block):
                who = torch.arange(at, min(at + block, e))
                moments = torch.zeros(len(who), p, o, dtype=torch.float64)
                for inside, v in every_coalition(game, who, linked):
                    weight = weights[inside.sum(1)][None]
                    moments += coalition_gram(pack(inside), weight, v, p)[1][:, 1:]
                    bar.update(len(who) * len(inside))
                # The weights of a player's absence follow from the sum, which is full - empty.
                values[who] = moments - moments.mean(1, keepdim=True) + apart[who] / p
                done = at + len(who)
    except KeyboardInterrupt:
        if done == 0:
            raise
    note = "" if done == e else f"ended early; rows from {done} on were not done"
    return finish(
        game, values, None, op, exact=True, interrupted=done < e, note=note, link=linked
    )  # fmt: skip


def need(op: str, game: Game, max_evaluations: int) -> None:
    """Raise ArgumentError if all coalitions of a game are more than may be evaluated."""
    p, n = len(game.players), game.backgrounds
    if affordable(game, max_evaluations):
        return
    fits = max(0, min(int(math.log2(max(1, max_evaluations / n))), _MOST))
    count = f"2^{p} x {n} = {n << p:,}" if p <= _MOST else f"2^{p} x {n}"
    msg = (
        f"{op}: all coalitions of p={p} players over n={n} background rows take {count} evaluations"
        f" an explicand; max_evaluations={max_evaluations:,} is enough for {fits} players. Group "
        "players, pass fewer background rows, raise max_evaluations, or sample: permutation(), "
        "kernel()."
    )
    raise ArgumentError(msg)


def affordable(game: Game, max_evaluations: int) -> bool:
    """Whether all coalitions of a game fit into so many evaluations an explicand."""
    p = len(game.players)
    return p <= _MOST and game.backgrounds << p <= max_evaluations


def player_weights(p: int) -> Tensor:
    """[p + 1] float64 by size s of a coalition: what its value counts for a member, and more.

    w(s - 1) + w(s) with w(s) = s! (p - s - 1)! / p!, the weights in presence and absence together;
    0 for the empty and the full coalition.
    """
    weights = torch.zeros(p + 1, dtype=torch.float64)
    for s in range(1, p):
        weights[s] = 1 / (s * math.comb(p, s)) + 1 / ((p - s) * math.comb(p, s))
    return weights


def every_coalition(
    game: Game, who: Tensor, link: Link | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """All coalitions but the empty and the full one, in Gray-code order, a chunk at a time.

    Yields:
        [K, p] bool, who is in, and [e', K, o] the values for the explicands `who`.
    """
    p = len(game.players)
    player = torch.arange(p)
    background = MEAN if game.backgrounds > 1 else 0
    for at in range(0, 1 << p, _CHUNK):
        count = torch.arange(at, min(at + _CHUNK, 1 << p))
        inside = ((count ^ (count >> 1))[:, None] >> player & 1).bool()
        size = inside.sum(1)
        inside = inside[(size > 0) & (size < p)]
        if len(inside) == 0:
            continue
        values = game.values(*of_members(inside, background), who)
        yield inside, values if link is None else link(values)
