"""Owen values along a tree of features."""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from microtome._seed import generator
from microtome.integrations.shap.solved import Solved
from microtome.integrations.shap.tree import Tree
from microtome.shapley.coalitions import MEAN, of_members
from microtome.shapley.game import Game
from microtome.shapley.link import Link
from microtome.shapley.running import Moments
from microtome.shapley.walks import GameWalker


class _Task(NamedTuple):
    """A node in a context: what its features add to some that are present already."""

    node: int
    inside: np.ndarray  # [M] bool, who is present
    without: Tensor  # [e, o], the value of the context
    together: Tensor  # [e, o], the value with the node's features
    weight: float


def owen(
    game: Game,
    tree: Tree,
    link: Link | None,
    evaluations: int,
    batch: int,
    fixed_context: int | None = None,
    chosen: Callable[[Tensor], Any] | None = None,
) -> Solved:
    """Owen values by splitting nodes, those with the largest effects first.

    A node's features enter while its sibling is absent, and while it is present, with half of the
    weight each; or in one of these contexts alone (`fixed_context` 0 or 1), and then what the two
    siblings do together stays with their parent. When evaluations run out, what was not split is
    shared out by the numbers of features.

    Args:
        game: over all M features.
        tree: the hierarchy.
        link: of means over the background, or None.
        evaluations: most coalitions of a row, both ends among them.
        batch: coalitions evaluated between two looks at which nodes come next.
        fixed_context: None, 0 or 1.
        chosen: from a row's full value [o] to the outputs whose effects say which nodes come next;
            None for all.

    Returns:
        Exact values, with errors of zero, if evaluations reach `tree.evaluations()` and no context
        is fixed. Values of the nodes are in `nodes`.

    Source: Owen 1977; Lundberg et al., shap's partition explainer.
    """
    empty, full = game.ends()
    base = empty.mean(1).expand(game.explicands, -1)
    if link is not None:
        base, full = link(base), link(full)
    contexts = 2 if fixed_context is None else 1
    enough = evaluations >= tree.evaluations()
    rows = torch.arange(game.explicands)
    groups = [rows] if enough else list(rows.split(1))
    nodes = torch.zeros(len(rows), 2 * tree.features - 1, full.shape[1], dtype=torch.float64)
    for who in groups:
        search = _Search(game, tree, link, who, batch if not enough else 1 << 12)
        if chosen is not None and not enough:
            search.seen = chosen(full[who[0]])
        root = _Task(tree.root, np.zeros(tree.features, dtype=bool), base[who], full[who], 1.0)
        nodes[who] = search.run(root, evaluations - 2, fixed_context)
    values = tree.lowered(nodes)
    exact = enough and contexts == 2
    error = torch.zeros_like(values) if exact else torch.full_like(values, math.nan)
    return Solved(values, base, full, game.scalar, error, nodes=nodes)


class _Search:
    """The splitting of nodes, for rows that take the same course."""

    def __init__(self, game: Game, tree: Tree, link: Link | None, who: Tensor, batch: int) -> None:
        self.game, self.tree, self.link, self.who, self.batch = game, tree, link, who, batch
        self.queue: list[tuple[float, int, _Task]] = []
        self.numbers = itertools.count()
        self.seen: Any = slice(None)

    def run(self, root: _Task, budget: int, fixed_context: int | None) -> Tensor:
        """[e, 2 M - 1, o]: what stays with each node."""
        e, o = root.together.shape
        nodes = torch.zeros(e, 2 * self.tree.features - 1, o, dtype=torch.float64)
        self._put(root)
        done = 0
        while self.queue:
            tasks: list[_Task] = []
            while self.queue and 2 * len(tasks) < self.batch and done + 2 * len(tasks) < budget:
                task = heapq.heappop(self.queue)[2]
                if self.tree.parts(task.node) is None:
                    nodes[:, task.node] += (task.together - task.without) * task.weight
                else:
                    tasks.append(task)
            if tasks:
                done += 2 * len(tasks)
                for task, apart in zip(tasks, self._values(tasks).unbind(0), strict=True):
                    self._split(task, apart, fixed_context, nodes)
            elif done >= budget:
                for _, _, task in self.queue:
                    nodes[:, task.node] += (task.together - task.without) * task.weight
                break
        return nodes

    def _put(self, task: _Task) -> None:
        change = (task.together - task.without)[:, self.seen]
        size = float(change.abs().max()) * task.weight
        heapq.heappush(self.queue, (-size, next(self.numbers), task))

    def _values(self, tasks: list[_Task]) -> Tensor:
        """[tasks, 2, e, o]: each task's context with the one child, and with the other."""
        below = self.tree.below
        inside = np.stack(
            [task.inside | below[part] for task in tasks for part in self.tree.parts(task.node)]
        )
        behind = MEAN if self.game.backgrounds > 1 else 0
        found = self.game.values(*of_members(torch.from_numpy(inside), behind), self.who)
        if self.link is not None:
            found = self.link(found)
        return found.unflatten(1, (len(tasks), 2)).permute(1, 2, 0, 3)

    def _split(self, task: _Task, apart: Tensor, fixed_context: int | None, nodes: Tensor) -> None:
        left, right = self.tree.parts(task.node)
        with_left, with_right = apart
        weight = task.weight
        if fixed_context is None:
            weight /= 2
        else:
            both = task.together - with_left - with_right + task.without
            nodes[:, task.node] += both * (weight if fixed_context == 0 else -weight)
        if fixed_context in (None, 0):
            self._put(_Task(left, task.inside, task.without, with_left, weight))
            self._put(_Task(right, task.inside, task.without, with_right, weight))
        if fixed_context in (None, 1):
            below = self.tree.below
            beside_right = task.inside | below[right]
            beside_left = task.inside | below[left]
            self._put(_Task(left, beside_right, with_right, task.together, weight))
            self._put(_Task(right, beside_left, with_left, task.together, weight))


def owen_by_walks(
    game: Game, tree: Tree, link: Link | None, pairs: int, seed: int, shared: bool
) -> Solved:
    """Owen values from random orders that keep the features of each node together.

    Args:
        game: over all features.
        tree: the hierarchy; its negative distances are without effect.
        link: of means over the background, or None; not None needs shared.
        pairs: of an order and its reverse, for each background row.
        seed: of the orders.
        shared: let all background rows walk the same orders.
    """
    S = 1 if shared else game.backgrounds
    walker = GameWalker(game, S, link)
    stream = generator(seed, "shapley", "tree")
    moments = Moments()
    each = max(1, game.rows_per_round // max(1, game.backgrounds * 2 * tree.features))
    everyone = torch.arange(game.explicands)
    for first in range(0, pairs, each):
        units = min(each, pairs - first)
        ranks = tree.ranks((S, units, 1), stream)
        moments.add(*walker(ranks, True, everyone), units)
    values, error = moments.estimate()
    base = walker.empty.mean(1).expand(game.explicands, -1)
    return Solved(values, base, walker.full, game.scalar, error)
