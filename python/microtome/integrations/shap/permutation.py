"""shap's PermutationExplainer over `microtome.shapley.permutation`."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from microtome.errors import ArgumentError
from microtome.integrations.shap.explainer import Explainer
from microtome.integrations.shap.masked import MaskerGame
from microtome.integrations.shap.owen import owen, owen_by_walks
from microtome.integrations.shap.solved import Asked, Solved
from microtome.integrations.shap.tree import Tree
from microtome.ops import shapley_reduce
from microtome.shapley.exact import affordable, exact
from microtome.shapley.game import Game
from microtome.shapley.link import Link
from microtome.shapley.orders import design_of, ranks
from microtome.shapley.permutation import permutation
from microtome.shapley.walks import GameWalker


class PermutationExplainer(Explainer):
    """shap.PermutationExplainer: Shapley values from antithetic pairs of permutations.

    At the same number of evaluations the error is smaller than shap's: every background row walks
    its own permutations, where shap lets all of them walk the same. All coalitions are evaluated,
    and the values exact, where max_evals is enough for that. Along a masker's clustering, the
    values are Owen values.

    Arguments as in `Explainer`. Calls also take design="antithetic", or "orthogonal" or "sobol"
    (`microtome.shapley.permutation`).

    Example:
        >>> import numpy as np
        >>> explainer = PermutationExplainer(lambda x: x[:, 0] * x[:, 1], np.zeros((1, 2)))
        >>> explainer(np.array([[2.0, 3.0]])).values
        array([[3., 3.]])
    """

    method = "PermutationExplainer"
    keeps_to_tree = True

    def shap_values(
        self,
        X: Any,
        npermutations: int = 10,
        main_effects: bool = False,
        error_bounds: bool = False,
        batch_evals: bool = True,
        silent: bool = False,
    ) -> Any:
        """The values alone, [rows, features] or [rows, features, outputs].

        Args:
            X: [rows, features].
            npermutations: how often to go through all features, there and back; so many are done,
                where shap does less than half of them.
            main_effects: as in calls.
            error_bounds: as in calls.
            batch_evals: without effect.
            silent: as in calls.
        """
        count = np.shape(X)[-1]
        options = {"main_effects": main_effects, "error_bounds": error_bounds, "silent": silent}
        found = self(X, max_evals=npermutations * (2 * count + 1), **options)
        self.expected_value = found.base_values[0]
        return found.values

    def _solve(self, game: Game, asked: Asked, link: Link | None, tree: Tree | None) -> Solved:
        p = len(game.players)
        evals = 20 * p if asked.max_evals == "auto" else int(asked.max_evals)
        evals = max(evals, 2 * p + 1) if asked.max_evals == "auto" else evals
        need = 2 * p + 1
        if evals < need:
            msg = (
                f"{self.method}: max_evals={evals} is too low, it must be at least 2 * features + "
                f"1 = {need} for {p} features that differ from the background. Raise it, or pass "
                "max_evals='auto'."
            )
            raise ArgumentError(msg)
        marginal = asked.error_bounds and asked.error_kind == "marginal"
        given = {"link": "identity" if link is None else link, "progress": not asked.silent}
        if tree is not None:
            return self._along(game, tree, evals, link)
        if affordable(game, evals * game.backgrounds) and not marginal:
            most = evals * game.backgrounds
            return Solved.of(exact(game, max_evaluations=most, **given))
        pairs = max(1, (evals - 2) // max(1, 2 * (p - 1)))
        seed = 0 if self.seed is None else self.seed
        if marginal:
            return self._marginal(game, pairs, seed, link)
        shared = self._together(game, link)
        found = permutation(
            game,
            n_permutations=2 * pairs,
            design=asked.design,
            shared=shared,
            seed=seed,
            memory=self.memory,
            **given,
        )
        return Solved.of(found)

    def _along(self, game: Game, tree: Tree, evals: int, link: Link | None) -> Solved:
        """Owen values, exact if evals reach that far."""
        if evals >= tree.evaluations():
            return owen(game, tree, link, evals, evals)
        pairs = max(1, (evals - 2) // (2 * (tree.features - 1)))
        seed = 0 if self.seed is None else self.seed
        return owen_by_walks(game, tree, link, pairs, seed, self._together(game, link))

    def _together(self, game: Game, link: Link | None) -> bool:
        """Whether background rows share permutations: a masker makes all of them at once."""
        return link is not None or isinstance(getattr(game, "game", game), MaskerGame)

    def _marginal(self, game: Game, pairs: int, seed: int, link: Link | None) -> Solved:
        """Values, and the deviation of single marginals: means over the background, as in shap."""
        p = len(game.players)
        walked = ranks(design_of(self.method, "antithetic", p, 2 * pairs), 1, 0, pairs, seed)
        walker = Both(game, link)
        (there, m2), (back, m2_back) = walker(walked, torch.arange(game.explicands))
        values = (there + back) / 2
        spread = m2 + m2_back + pairs * (there - back).square() / 2
        empty, full = walker.empty.mean(1), walker.full
        base = empty.expand(len(full), -1)
        return Solved(values[:, 0], base, full, game.scalar, (spread[:, 0] / (2 * pairs)).sqrt())


class Both(GameWalker):
    """The moments of walks there, and of walks back, each by itself."""

    def __init__(self, game: Game, link: Link | None) -> None:
        super().__init__(game, 1, link)

    def __call__(  # type: ignore[override]
        self, walked: Tensor, who: Tensor
    ) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """(mean, m2) of both, [e, 1, p, o], for ranks [1, U, 1, p]."""
        values = self.along(walked, True, who)
        p = walked.shape[-1]
        there = values[..., : p + 1, :]
        back = values[..., p:, :].flip(-2)
        return (
            shapley_reduce(there.contiguous(), walked, False),
            shapley_reduce(back.contiguous(), p - 1 - walked, False),
        )
