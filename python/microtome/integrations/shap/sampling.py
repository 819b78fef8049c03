"""shap's SamplingExplainer: permutations over backgrounds of any size."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from microtome._seed import generator
from microtome.errors import ArgumentError
from microtome.integrations.shap.explainer import Explainer
from microtome.integrations.shap.linked import WeightedGame
from microtome.integrations.shap.solved import Asked, Solved
from microtome.integrations.shap.tree import Tree
from microtome.shapley.exact import affordable, exact
from microtome.shapley.game import MEMORY, Game
from microtome.shapley.inputs import InputGame
from microtome.shapley.link import Link
from microtome.shapley.permutation import permutation


class SamplingExplainer(Explainer):
    """shap.SamplingExplainer: Shapley values for a background too large to be gone through.

    `nsamples` pairs of model rows are spent on antithetic pairs of permutations, each over a
    background row of its own; where they are fewer than the background rows, on a part of those,
    and the values are then made to sum to f(x) less the mean over the whole background, by
    corrections in proportion to their variance. Where they are enough for all coalitions over all
    rows, the values are exact.

    Args:
        model: as in `Explainer`, like feature_names, seed and memory.
        data: [n, m] background rows, an array or a DataFrame, or what shap.kmeans returns.
        feature_names: names of the columns.
        link: "identity"; there is no other.
        seed: of the permutations and of the background rows.
        keep_index: hand the model DataFrames, if the rows come as one.
        memory: bytes of masked inputs in one call of the model.

    Example:
        >>> import numpy as np
        >>> explainer = SamplingExplainer(lambda x: x[:, 0] * x[:, 1], np.zeros((1, 2)))
        >>> explainer.shap_values(np.array([2.0, 3.0]))
        array([3., 3.])
    """

    method = "SamplingExplainer"
    background_rows = None

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
        super().__init__(model, data, link, feature_names, seed=seed, memory=memory)
        self.keep_index, self.data = keep_index, data
        if self._background is None:
            msg = (
                f"{self.method}: data must be a background table [rows, features], got "
                f"{type(data).__name__}. For maskers take PermutationExplainer."
            )
            raise ArgumentError(msg)
        self._check_link()

    def _check_link(self) -> None:
        if self._linked is not None:
            msg = (
                f"{self.method}: link must be 'identity', got {self.link!r}. Take KernelExplainer."
            )
            raise ArgumentError(msg)

    def __call__(self, X: Any, y: Any = None, nsamples: int | str = 2000, **options: Any) -> Any:
        """Explain rows.

        Args:
            X: [rows, features].
            y: without effect.
            nsamples: pairs of model rows for each row; "auto" is 1000 for each feature.
            **options: error_bounds, error_kind, main_effects, batch_size, outputs, silent: as in
                `Explainer.__call__`.

        Returns:
            shap.Explanation, or its likeness where shap is absent.
        """
        return self._explain((X,), Asked.of(self.method, {"max_evals": nsamples}, options))

    def shap_values(self, X: Any, nsamples: int | str = "auto", **options: Any) -> np.ndarray:
        """The values alone: [rows, features], and [features] for a single row; outputs last."""
        found = self(X, nsamples=nsamples, **options)
        self.expected_value = found.base_values[0]
        return found.values[0] if np.ndim(X) == 1 else found.values

    def _frames(self, X: Any) -> bool:
        return self.keep_index

    def _solve(self, game: Game, asked: Asked, link: Link | None, tree: Tree | None) -> Solved:
        p, n = len(game.players), game.backgrounds
        nsamples = 1000 * p if asked.max_evals == "auto" else int(asked.max_evals)
        rows = 2 * nsamples
        progress = not asked.silent
        if affordable(game, rows):
            return Solved.of(exact(game, max_evaluations=rows, progress=progress))
        pairs = rows // (2 * (p - 1))
        if pairs < 1:
            msg = (
                f"{self.method}: nsamples={nsamples} is too low, it must be at least features - 1 ="
                f" {p - 1}. Raise it, or pass nsamples='auto'."
            )
            raise ArgumentError(msg)
        seed = 0 if self.seed is None else self.seed
        base = game.ends()[0].mean(1)
        if pairs < n:
            game = _some_rows(game, pairs, seed)
        found = permutation(
            game, n_permutations=2 * max(1, pairs // n), seed=seed, progress=progress,
            memory=self.memory,
        )  # fmt: skip
        solved = Solved.of(found)
        return _corrected(replace(solved, base=base.expand(len(solved.full), -1)))


def _some_rows(game: Game, count: int, seed: int) -> Game:
    """The game with so many of its background rows, drawn without repeats."""
    order = torch.randperm(game.backgrounds, generator=generator(seed, "shapley", "background"))
    taken = order[:count].sort().values
    if isinstance(game, WeightedGame):
        inner = game.game
        weights = game.weights[taken]
        return WeightedGame(inner.with_background(taken), weights / weights.mean(0), game.link)
    assert isinstance(game, InputGame)
    return game.with_background(taken)


def _corrected(solved: Solved) -> Solved:
    """Values that sum to full - base; what is missing is shared out by variance."""
    missing = solved.full - solved.base - solved.values.sum(1)  # [e, o]
    share = torch.nan_to_num(solved.error, nan=0.0).square()
    total = share.sum(1, keepdim=True)
    even = torch.full_like(share, 1 / share.shape[1])
    share = torch.where(total > 0, share / total, even)
    values: Tensor = solved.values + share * missing[:, None]
    return replace(solved, values=values)
