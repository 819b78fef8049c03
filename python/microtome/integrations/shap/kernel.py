"""shap's KernelExplainer over `microtome.shapley.kernel`."""

from __future__ import annotations

from typing import Any

import numpy as np

from microtome.errors import ArgumentError
from microtome.integrations.shap.explainer import Explainer
from microtome.integrations.shap.masked import MaskerGame
from microtome.integrations.shap.selection import selected_fit
from microtome.integrations.shap.solved import Asked, Solved
from microtome.integrations.shap.tree import Tree
from microtome.shapley.exact import affordable, exact
from microtome.shapley.game import MEMORY, Game
from microtome.shapley.kernel import kernel
from microtome.shapley.link import Link


class KernelExplainer(Explainer):
    """shap.KernelExplainer: Shapley values by weighted least squares on sampled coalitions.

    Features are not selected unless l1_reg says so. shap's own default is "num_features(10)", which
    sets all but ten values to zero: with 30 features of a small network that was a relative error
    of 0.49 to 0.55, against 0.03 without it (docs/shapley.md).

    Args:
        model: as in `Explainer`, like feature_names, seed and memory.
        data: [n, m] background rows, an array or a DataFrame; what shap.kmeans returns, with its
            weights; or any masker of `Explainer`. All its rows are used.
        feature_names: names of the columns.
        link: "identity", "logit", or a function; of the mean over the background.
        seed: of the coalitions.
        keep_index: hand the model DataFrames, if the rows come as one.
        memory: bytes of masked inputs in one call of the model.

    Attributes:
        expected_value: the base value, a number or [outputs].

    Example:
        >>> import numpy as np
        >>> explainer = KernelExplainer(lambda x: x[:, 0] * x[:, 1], np.zeros((1, 2)))
        >>> explainer.shap_values(np.array([2.0, 3.0]))
        array([3., 3.])
    """

    method = "KernelExplainer"
    background_rows = None
    keeps_axis = True

    def __init__(
        self,
        model: Any,
        data: Any,
        feature_names: Any = None,
        link: Any = "identity",
        *,
        seed: int | None = None,
        keep_index: bool = False,
        memory: int = MEMORY,
    ) -> None:
        super().__init__(
            model, data, link, feature_names, linearize_link=False, seed=seed, memory=memory
        )
        self.keep_index, self.data = keep_index, data

    def __call__(self, X: Any, l1_reg: Any = False, silent: bool = False, **options: Any) -> Any:
        """Explain rows.

        Args:
            X: [rows, features]; for a masker, whatever it masks.
            l1_reg: False to fit all features; "num_features(k)", "aic", "bic", "auto" ("aic" where
                less than a fifth of the coalitions is seen) or the weight of a lasso, to fit those
                that it selects, by scikit-learn.
            silent: show no progress bar.
            **options: nsamples, error_bounds, error_kind, main_effects, batch_size, outputs:
                as in `shap_values` and `Explainer.__call__`.

        Returns:
            shap.Explanation, or its likeness where shap is absent.
        """
        nsamples = options.pop("nsamples", "auto")
        given = {"max_evals": nsamples, "l1_reg": l1_reg, "silent": silent}
        return self._explain((X,), Asked.of(self.method, given, options))

    def shap_values(
        self,
        X: Any,
        nsamples: int | str = "auto",
        l1_reg: Any = False,
        silent: bool = False,
        gc_collect: bool = False,
        **options: Any,
    ) -> np.ndarray:
        """The values alone: [rows, features], and [features] for a single row; outputs last.

        Args:
            X: [rows, features].
            nsamples: coalitions for each row, each evaluated over the whole background; "auto" is
                2 * features + 2048.
            l1_reg: as in calls.
            silent: as in calls.
            gc_collect: without effect: nothing is kept.
            **options: as in calls.
        """
        found = self(X, l1_reg, silent, nsamples=nsamples, **options)
        return found.values[0] if np.ndim(X) == 1 else found.values

    def _frames(self, X: Any) -> bool:
        return self.keep_index

    def _solve(self, game: Game, asked: Asked, link: Link | None, tree: Tree | None) -> Solved:
        solved = self._fitted(game, asked, link)
        base = solved.base[0].numpy()
        self.expected_value = float(base[0]) if solved.scalar else base
        return solved

    def _fitted(self, game: Game, asked: Asked, link: Link | None) -> Solved:
        p, n = len(game.players), game.backgrounds
        nsamples = 2 * p + 2048 if asked.max_evals == "auto" else int(asked.max_evals)
        seed = 0 if self.seed is None else self.seed
        given = {"link": "identity" if link is None else link, "progress": not asked.silent}
        if affordable(game, (nsamples + 2) * n):
            found = Solved.of(exact(game, max_evaluations=(nsamples + 2) * n, **given))
            if asked.l1_reg in (False, 0, None, "auto"):
                return found
        if nsamples < p + 1 and p > 1:
            msg = (
                f"{self.method}: nsamples={nsamples} is too low, it must be at least features + 1 ="
                f" {p + 1}. Raise it, or pass nsamples='auto'."
            )
            raise ArgumentError(msg)
        if asked.l1_reg not in (False, 0, None):
            return selected_fit(self.method, game, nsamples, asked.l1_reg, link, seed)
        # A masker makes all rows of its background at once.
        shared = link is not None or isinstance(getattr(game, "game", game), MaskerGame)
        found = kernel(
            game, n_coalitions=nsamples, paired=nsamples >= 2 * p, shared=shared, seed=seed,
            memory=self.memory, **given,
        )  # fmt: skip
        return Solved.of(found)
