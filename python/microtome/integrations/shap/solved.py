"""What a call asks for, and the values of one row or of several."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from microtome import _check
from microtome.errors import ArgumentError
from microtome.integrations.shap.explanation import explanation
from microtome.integrations.shap.tree import Tree
from microtome.shapley.coalitions import MEAN, inverse, spans
from microtome.shapley.game import Game
from microtome.shapley.link import Link

ERRORS = ("standard", "marginal")


def numbers_of(outputs: Any, full: Tensor) -> np.ndarray:
    """Which outputs `outputs` names for a row whose full value is [o]."""
    if hasattr(outputs, "apply"):  # one of shap's chains, such as Explanation.argsort.flip[:2]
        outputs = outputs.apply(explanation(values=full.numpy())).values
    if isinstance(outputs, list | tuple):
        outputs = np.asarray(outputs)
    return np.atleast_1d(np.arange(len(full))[outputs])


@dataclass(frozen=True)
class Asked:
    """The arguments of a call, under shap's names; `Explainer.__call__` says what they mean."""

    max_evals: int | str = 500
    main_effects: bool = False
    error_bounds: bool = False
    batch_size: int | str = "auto"
    outputs: Any = None
    silent: bool = False
    error_kind: str = "standard"
    design: str = "antithetic"
    l1_reg: Any = False
    fixed_context: int | None = None
    interactions: bool | int = 1

    @classmethod
    def of(cls, op: str, *layers: Mapping[str, Any]) -> Asked:
        """From arguments by name; later layers overrule earlier ones.

        Raises:
            ArgumentError: a name or a value that no call takes.
        """
        given = {name: value for layer in layers for name, value in layer.items()}
        known = cls.__dataclass_fields__
        unknown = sorted(set(given) - set(known))
        if unknown:
            msg = f"{op}: no call takes {', '.join(unknown)}. Allowed are {', '.join(known)}."
            raise ArgumentError(msg)
        asked = cls(**given)
        _check.one_of(op, "error_kind", asked.error_kind, ERRORS)
        return asked

    @property
    def chosen(self) -> Callable[[Tensor], np.ndarray] | None:
        """From a row's full value [o] to the outputs that are kept; None if all are."""
        return None if self.outputs is None else partial(numbers_of, self.outputs)

    @property
    def batch(self) -> int | None:
        return None if self.batch_size == "auto" else int(self.batch_size)


@dataclass(frozen=True)
class Solved:
    """Values of e rows, as float64 tensors.

    Attributes:
        values: [e, p, o].
        base: [e, o], the value with every player masked.
        full: [e, o], the value with none masked.
        scalar: whether the model returns one number a row.
        error: like values, or None.
        main_effects: like values, or None.
        tree: the hierarchy that was kept to, or None.
        nodes: [e, nodes, o], values of a hierarchy's nodes, or None.
    """

    values: Tensor
    base: Tensor
    full: Tensor
    scalar: bool
    error: Tensor | None = None
    main_effects: Tensor | None = None
    tree: Any = None
    nodes: Tensor | None = None

    @classmethod
    def of(cls, found: Any, **more: Any) -> Solved:
        """From microtome.shapley.ShapleyValues."""
        scalar = found.values.dim() == 2
        each = (found.values, found.base_values, found.full_values, found.stderr)
        values, base, full, error = (a[..., None] if scalar else a for a in each)
        return cls(values, base, full, scalar, error, **more)

    def completed(self, game: Game, link: Link | None, tree: Tree | None, asked: Asked) -> Solved:
        """With the tree that was kept to, and the main effects if they were asked for."""
        solved = self if tree is None else replace(self, tree=tree.clustering)
        return solved.with_main_effects(game, link) if asked.main_effects else solved

    def with_main_effects(self, game: Game, link: Link | None) -> Solved:
        """Also f of each player alone, less the base."""
        p = self.values.shape[1]
        j = torch.arange(p)
        orders = (j[:, None] + j) % p  # each begins with another player
        behind = MEAN if game.backgrounds > 1 else 0
        alone = spans(0 * j + behind, j, 0 * j, 0 * j + 1)
        everyone = torch.arange(game.explicands)
        values = game.values(inverse(orders), alone, everyone)
        values = values if link is None else link(values)
        return replace(self, main_effects=values - self.base[:, None])

    def row(self, i: int, features: np.ndarray, count: int) -> Solved:
        """One row's values, laid out over all of a masker's features: [1, count, o]."""

        def wide(a: Tensor | None) -> Tensor | None:
            if a is None:
                return None
            at = torch.from_numpy(np.asarray(features))
            if a.dim() == 4:  # pairs of features
                out = a.new_zeros(1, count, count, a.shape[3])
                out[0, at[:, None], at] = a[i]
                return out
            out = a.new_zeros(1, count, a.shape[2])
            out[0, at] = a[i]
            return out

        return replace(
            self, values=wide(self.values), base=self.base[i : i + 1], full=self.full[i : i + 1],
            error=wide(self.error), main_effects=wide(self.main_effects),
            nodes=None if self.nodes is None else self.nodes[i : i + 1],
        )  # fmt: skip

    def keep(self, outputs: Any) -> tuple[Solved, Any]:
        """Some outputs of one row, and their numbers (None for all)."""
        if outputs is None or self.scalar:
            return self, None
        at = numbers_of(outputs, self.full[0])

        def kept(a: Tensor | None) -> Tensor | None:
            return None if a is None else a[..., torch.from_numpy(at)]

        some = replace(
            self, values=kept(self.values), base=kept(self.base), full=kept(self.full),
            error=kept(self.error), main_effects=kept(self.main_effects), nodes=kept(self.nodes),
        )  # fmt: skip
        return some, at
