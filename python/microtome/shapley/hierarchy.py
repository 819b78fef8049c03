"""Hierarchies of players: who belongs together, from nested lists, mappings or a linkage."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from microtome._seed import generator
from microtome.errors import ArgumentError, PackageError
from microtome.shapley.orders import Design


@dataclass(frozen=True)
class Node:
    """A coalition of coalitions: its children are nodes, or players by number."""

    children: tuple[Node | int, ...]

    @property
    def members(self) -> tuple[int, ...]:
        out: list[int] = []
        left: list[Node | int] = [self]  # a linkage may be deeper than Python calls can be
        while left:
            part = left.pop()
            if isinstance(part, int):
                out.append(part)
            else:
                left += reversed(part.children)
        return tuple(out)

    @property
    def nodes(self) -> list[Node]:
        """All nodes, each after those in it."""
        out: list[Node] = []
        left = [self]
        while left:
            out.append(left.pop())
            left += [child for child in out[-1].children if isinstance(child, Node)]
        return out[::-1]


def members_of(child: Node | int) -> tuple[int, ...]:
    return (child,) if isinstance(child, int) else child.members


def tree_of(op: str, hierarchy: Any, names: Sequence[str]) -> Node:
    """The tree of a hierarchy.

    Args:
        op: name for messages.
        hierarchy: nested lists of players' numbers or names; a mapping from a group's name to such
            a list (or mapping); or scipy's linkage of the p players, [p - 1, 4].
        names: of the p players.

    Raises:
        ArgumentError: a player is unknown, missing or in two places, or a group is empty.
    """
    p = len(names)
    if isinstance(hierarchy, np.ndarray | Tensor) and hierarchy.ndim == 2:
        return _of_linkage(op, np.asarray(hierarchy), p)
    at = {name: j for j, name in enumerate(names)}

    def build(part: Any) -> Node | int:
        if isinstance(part, Mapping):
            part = list(part.values())
        if isinstance(part, list | tuple):
            if not part:
                msg = f"{op}: the hierarchy has an empty group. Leave it out."
                raise ArgumentError(msg)
            children = tuple(build(child) for child in part)
            return children[0] if len(children) == 1 else Node(children)
        j = at.get(part, -1) if isinstance(part, str) else part
        if not isinstance(j, int | np.integer) or not 0 <= j < p:
            msg = (
                f"{op}: the hierarchy names the player {part!r}; there are 0 ... {p - 1} "
                f"({', '.join(names[:5])}{', ...' if p > 5 else ''})."
            )
            raise ArgumentError(msg)
        return int(j)

    found = build(hierarchy)
    root = Node((found,)) if isinstance(found, int) else found
    held = sorted(root.members)
    if held != list(range(p)):
        twice = sorted({j for j in held if held.count(j) > 1})
        missing = sorted(set(range(p)) - set(held))
        what = f"holds {twice[:5]} twice" if twice else f"lacks the players {missing[:5]}"
        msg = f"{op}: the hierarchy {what}. Every one of the p={p} players must be in one place."
        raise ArgumentError(msg)
    return root


def _of_linkage(op: str, linkage: np.ndarray, p: int) -> Node:
    if linkage.shape != (p - 1, 4):
        msg = (
            f"{op}: a linkage of p={p} players must be [{p - 1}, 4] as scipy gives it, got shape "
            f"{list(linkage.shape)}."
        )
        raise ArgumentError(msg)
    nodes: list[Node | int] = list(range(p))
    for left, right in linkage[:, :2].astype(int).tolist():
        nodes.append(Node((nodes[left], nodes[right])))
    root = nodes[-1]
    return Node((root,)) if isinstance(root, int) else root


def by_correlation(op: str, background: Tensor) -> np.ndarray:
    """scipy's average linkage of columns by 1 - |correlation| over the background rows.

    Raises:
        PackageError: scipy is not installed.
    """
    try:
        from scipy.cluster.hierarchy import linkage
    except ImportError as error:
        msg = f"{op}: hierarchy='correlation' needs scipy: pip install scipy."
        raise PackageError(msg) from error
    rows = background.double()
    rows = rows - rows.mean(0)
    rows = rows / rows.norm(dim=0).clamp(min=1e-30)
    distance = (1 - (rows.T @ rows).abs()).clamp(min=0)
    upper = torch.triu_indices(len(distance), len(distance), 1)
    return np.asarray(linkage(distance[upper[0], upper[1]].numpy(), "average"))


def evaluations(root: Node) -> int:
    """Coalitions the exact values take, those met twice counted twice."""
    total, left = 0, [(root, 1)]
    while left:
        node, contexts = left.pop()
        c = len(node.children)
        total += contexts << c
        left += [(child, contexts << (c - 1)) for child in node.children if isinstance(child, Node)]
    return total


def contributions(root: Node, p: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The exact values as sums over pairs of coalitions.

    Returns:
        with_, without [M, p] bool, player [M] int64 and weight [M]: the value of a player is the
        sum of weight (v(with_) - v(without)).
    """
    found: list[tuple[Tensor, Tensor, int, Tensor]] = []

    def visit(node: Node, contexts: Tensor, weights: Tensor) -> None:
        c = len(node.children)
        for at, child in enumerate(node.children):
            others = [members_of(o) for o in node.children[:at] + node.children[at + 1 :]]
            chosen = (
                torch.arange(1 << (c - 1))[:, None] >> torch.arange(c - 1) & 1
            )  # [2^(c-1), c-1]
            joined = torch.zeros(len(chosen), p, dtype=torch.bool)
            for k, held in enumerate(others):
                joined[:, list(held)] = chosen[:, k : k + 1].bool()
            share = torch.tensor([1 / (c * math.comb(c - 1, s)) for s in range(c)]).double()
            before = (contexts[:, None] | joined).reshape(-1, p)
            weight = (weights[:, None] * share[chosen.sum(1)]).reshape(-1)
            if isinstance(child, Node):
                visit(child, before, weight)
                continue
            after = before.clone()
            after[:, child] = True
            found.append((after, before, child, weight))

    visit(root, torch.zeros(1, p, dtype=torch.bool), torch.ones(1, dtype=torch.float64))
    after, before, player, weight = zip(*found, strict=True)
    players = torch.cat([torch.full((len(w),), j) for j, w in zip(player, weight, strict=True)])
    return torch.cat(after), torch.cat(before), players, torch.cat(weight)


class HierarchyOrders:
    """Random orders in which every group of a hierarchy stays together."""

    def __init__(self, root: Node, p: int) -> None:
        self.nodes: list[tuple[Tensor, Tensor]] = []  # child of each member [p] or -1, sizes [c]
        for node in root.nodes:
            child_of = torch.full((p,), -1)
            held = [members_of(child) for child in node.children]
            for at, players in enumerate(held):
                child_of[list(players)] = at
            self.nodes.append((child_of, torch.tensor([len(players) for players in held])))

    def __call__(self, design: Design, S: int, first: int, units: int, seed: int) -> Tensor:
        """[S, units, A, p] int32, as orders.ranks gives them."""
        stream = generator(seed, "shapley", "hierarchy", first)
        shape = (S, units, design.A)
        ranks = torch.zeros(*shape, design.p, dtype=torch.int64)
        for child_of, sizes in self.nodes:
            keys = torch.rand(*shape, len(sizes), generator=stream, dtype=torch.float64)
            order = torch.argsort(keys, dim=-1)
            ends = sizes[order].cumsum(-1)
            offset = torch.empty_like(order).scatter_(-1, order, ends - sizes[order])
            held = child_of >= 0
            ranks[..., held] += offset[..., child_of[held]]
        return ranks.to(torch.int32)
