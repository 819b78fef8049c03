"""shap's ExactExplainer over `microtome.shapley.exact`."""

from __future__ import annotations

from typing import Any

from microtome.errors import ArgumentError
from microtome.integrations.shap.explainer import Explainer
from microtome.integrations.shap.owen import owen
from microtome.integrations.shap.pairs import interactions
from microtome.integrations.shap.solved import Asked, Solved
from microtome.integrations.shap.tree import Tree
from microtome.shapley.exact import affordable, exact
from microtome.shapley.game import MEMORY, Game
from microtome.shapley.link import Link


class ExactExplainer(Explainer):
    """shap.ExactExplainer: Shapley values from all coalitions; Owen values along a clustering.

    Only features that differ from the background play, so that a row takes 2 to the power of their
    number evaluations of the background, which is the limit max_evals (100000) puts on them.

    Args:
        model: as in `Explainer`, like the other arguments.
        masker: with a clustering (shap.maskers.Partition), the values are Owen values.
        link: the scale that is explained.
        linearize_link: see `Explainer`.
        feature_names: see `Explainer`.
        memory: bytes of masked inputs in one call of the model.
        **call_args: defaults for the arguments of calls. Calls also take interactions: 1 for
            values; 2 or True for the Shapley-Taylor interactions of pairs, [rows, features,
            features], with the features' main effects on the diagonal.

    Example:
        >>> import numpy as np
        >>> explainer = ExactExplainer(lambda x: x[:, 0] * x[:, 1], np.zeros((1, 2)))
        >>> explainer(np.array([[2.0, 3.0]])).values
        array([[3., 3.]])
    """

    method = "ExactExplainer"
    keeps_to_tree = True

    def __init__(
        self,
        model: Any,
        masker: Any,
        link: Any = "identity",
        linearize_link: bool = True,
        feature_names: Any = None,
        *,
        memory: int = MEMORY,
        **call_args: Any,
    ) -> None:
        call_args = {"max_evals": 100000, **call_args}
        super().__init__(
            model, masker, link, feature_names, linearize_link, memory=memory, **call_args
        )

    def _solve(self, game: Game, asked: Asked, link: Link | None, tree: Tree | None) -> Solved:
        p = len(game.players)
        most = (1 << 62) if asked.max_evals in ("auto", None) else int(asked.max_evals)
        if asked.interactions not in (False, 1, 2) or (tree is not None and _pairs(asked)):
            msg = (
                f"{self.method}: interactions must be 1 or 2 (or True), and 1 along a clustering, "
                f"got interactions={asked.interactions}."
            )
            raise ArgumentError(msg)
        if tree is not None:
            return self._along(game, tree, most, link)
        if not affordable(game, most * game.backgrounds):
            msg = (
                f"{self.method}: p={p} features that differ from the background take 2^{p} "
                f"evaluations, but max_evals={most}. Raise it, or take PermutationExplainer."
            )
            raise ArgumentError(msg)
        found = exact(
            game, max_evaluations=most * game.backgrounds,
            link="identity" if link is None else link, progress=not asked.silent,
        )  # fmt: skip
        solved = Solved.of(found)
        if _pairs(asked):
            return interactions(game, solved, link)
        return solved

    def _along(self, game: Game, tree: Tree, most: int, link: Link | None) -> Solved:
        """Owen values."""
        need = tree.evaluations()
        if need > most:
            msg = (
                f"{self.method}: the clustering of {tree.features} features takes {need} "
                f"evaluations, but max_evals={most}. Raise it, or take PartitionExplainer."
            )
            raise ArgumentError(msg)
        return owen(game, tree, link, need, need)


def _pairs(asked: Asked) -> bool:
    """Whether interactions of pairs are wanted; True is not 1 here, as in shap."""
    return asked.interactions is True or asked.interactions == 2
