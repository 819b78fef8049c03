"""Owen values: Shapley values when players come in groups, and groups in groups."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from microtome import _check
from microtome.errors import ArgumentError
from microtome.shapley import running
from microtome.shapley._start import as_game
from microtome.shapley.coalitions import MEAN, of_members, pack, unpack
from microtome.shapley.game import MEMORY, Game
from microtome.shapley.hierarchy import (
    HierarchyOrders,
    Node,
    by_correlation,
    contributions,
    evaluations,
    tree_of,
)
from microtome.shapley.inputs import InputGame
from microtome.shapley.link import Link, link_of
from microtome.shapley.mlp import mlp_walker
from microtome.shapley.permutation import plan_walks, sample
from microtome.shapley.result import ShapleyValues, finish
from microtome.shapley.running import Stop
from microtome.shapley.walks import GameWalker, Walker

_EXACT = 1 << 17  # evaluations of a row below which values are exact
_CHUNK = 1 << 12  # coalitions at a time; fixed, so that sums are folded alike for any `memory`


def partition(
    f: Any,
    x: Any = None,
    background: Any = None,
    hierarchy: Any = "correlation",
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
    memory: int = MEMORY,
    check: bool = True,
    progress: bool = True,
) -> ShapleyValues:
    """Owen values over a hierarchy: a player's mean effect over orders that keep groups together.

    A group's members share exactly what the group is worth as one player beside its sister groups,
    at every level. For a hierarchy of two levels these are Owen's values, for a deeper one
    Winter's; without groups they are the Shapley values.

    Values are exact where that takes at most max_evaluations (131,072 by default) model rows a row
    explained, and n_permutations is not given: in a node of c children every child meets all
    2^(c-1) coalitions of its sisters, in each context its parent meets. Otherwise orders that keep
    groups together are sampled as `permutation` samples orders.

    Args:
        f: a function of rows, a torch module, a scikit-learn estimator; or a game, and then x,
            background and groups are None.
        x: [e, m] rows to explain ([m] for one).
        background: [n, m] rows that absent players are drawn from.
        hierarchy: nested lists of players (numbers or names), a mapping from groups' names to their
            players or to further mappings, scipy's linkage [p - 1, 4], or "correlation": that of
            the columns by their correlation in the background.
        n_permutations: orders each background row walks, as in `permutation`.
        design: "antithetic" or "plain".
        shared: let all background rows walk the same orders, and average them first.
        groups: players that are groups of columns, as in `permutation`.
        max_evaluations: most model rows for each explicand.
        target_error: of sampling, as in `permutation`.
        seconds: of sampling, as in `permutation`.
        seed: of the orders.
        link: "identity", "logit", or a function: explains link(mean over background of f); sampling
            under another than the identity needs shared=True.
        memory: bytes of rows in one call of f, and of values held.
        check: call f twice on x to find out whether it is deterministic.
        progress: show a progress bar, if it takes longer than a second.

    Returns:
        ShapleyValues, [e, p] or [e, p, o], with method "owen".

    Raises:
        ArgumentError: a hierarchy that does not hold every player once, too small a budget, an
            unknown option, a function that is not deterministic.
        ShapeError, NonFiniteError: f returns something else than numbers for each row.
        PackageError: "correlation" without scipy.

    Ctrl-C keeps the rows, or the samples, that are done. Deterministic.
    Source: Owen 1977; Winter 1989 (Int. J. Game Theory 18).

    Example:
        >>> import torch
        >>> x, background = torch.ones(1, 3), torch.zeros(1, 3)
        >>> partition(lambda a: a.prod(1), x, background, [[0, 1], 2]).values
        tensor([[0.2500, 0.2500, 0.5000]], dtype=torch.float64)
    """
    op = "partition"
    _check.one_of(op, "design", design, ("antithetic", "plain"))
    game = as_game(op, f, x, background, groups=groups, memory=memory, check=check)
    root = _root(op, game, hierarchy)
    linked = link_of(op, link)
    stop = Stop(op, target_error, seconds)
    budget = _EXACT if max_evaluations is None else max_evaluations
    if (
        n_permutations is None
        and seconds is None
        and evaluations(root) * game.backgrounds <= budget
    ):
        return _exact(op, game, root, linked, memory, progress)
    if linked is not None and not shared and game.backgrounds > 1:
        msg = (
            f"{op}: link={link!r} applies to the mean over background rows, which needs them all "
            "on one order. Pass shared=True."
        )
        raise ArgumentError(msg)
    S = 1 if shared else game.backgrounds
    plan = plan_walks(op, game, design, S, n_permutations, max_evaluations, stop)
    walker: Walker | None = mlp_walker(op, game, S, "auto") if linked is None else None
    walker = walker or GameWalker(game, S, linked)
    draw = HierarchyOrders(root, len(game.players))
    return sample(game, walker, plan, S, stop, seed, memory, progress, linked, draw, "owen")


def _root(op: str, game: Game, hierarchy: Any) -> Node:
    if isinstance(hierarchy, str):
        if hierarchy == "correlation" and len(game.players) == 1:
            return tree_of(op, [0], game.players.names)
        if (
            hierarchy != "correlation"
            or not isinstance(game, InputGame)
            or (game.player is not None or game.rows._pools is not None)
        ):
            msg = (
                f"{op}: hierarchy must be nested lists, a mapping or a linkage, or 'correlation' "
                f"for a table of numbers without groups, got {hierarchy!r}."
            )
            raise ArgumentError(msg)
        hierarchy = by_correlation(op, game.rows.background.cpu())
    return tree_of(op, hierarchy, game.players.names)


def _exact(
    op: str, game: Game, root: Node, link: Link | None, memory: int, progress: bool
) -> ShapleyValues:
    """Every coalition once, its value spread over the players whose steps it begins or ends."""
    p = len(game.players)
    empty, full = game.ends()
    empty = empty.mean(1)
    if link is not None:
        empty, full = link(empty), link(full)
    e, o = full.shape
    after, before, player, weight = contributions(root, p)
    words, place = torch.unique(pack(torch.cat([after, before])), dim=0, return_inverse=True)
    order = torch.argsort(place, stable=True)
    place, player, weight = (
        place[order],
        player.repeat(2)[order],
        torch.cat([weight, -weight])[order],
    )
    inside = unpack(words, p)
    size = inside.sum(1)
    values = torch.full((e, p, o), math.nan, dtype=torch.float64)
    fits = memory // (8 * o * min(len(words), _CHUNK))
    block = max(1, min(fits, running.KEPT // (game.backgrounds * len(words))))
    background = MEAN if game.backgrounds > 1 else 0
    done = 0
    try:
        with running.bar(e * len(words), op, "coalition", progress) as bar:
            for at in range(0, e, block):
                who = torch.arange(at, min(at + block, e))
                total = torch.zeros(len(who), p, o, dtype=torch.float64)
                for first in range(0, len(words), _CHUNK):
                    last = min(first + _CHUNK, len(words))
                    v = torch.empty(len(who), last - first, o, dtype=torch.float64)
                    v[:, size[first:last] == 0] = empty.expand(e, -1)[who][:, None]
                    v[:, size[first:last] == p] = full[who][:, None]
                    inner = (size[first:last] > 0) & (size[first:last] < p)
                    if bool(inner.any()):
                        table = of_members(inside[first:last][inner], background)
                        found = game.values(*table, who)
                        v[:, inner] = found if link is None else link(found)
                    low, high = torch.searchsorted(place, torch.tensor([first, last])).tolist()
                    steps = weight[low:high, None] * v[:, place[low:high] - first]
                    total.index_add_(1, player[low:high], steps)
                    bar.update(len(who) * (last - first))
                values[who], done = total, at + len(who)
    except KeyboardInterrupt:
        if done == 0:
            raise
    note = "" if done == e else f"ended early; rows from {done} on were not done"
    return finish(
        game, values, None, "owen", exact=True, interrupted=done < e, note=note, link=link
    )  # fmt: skip
