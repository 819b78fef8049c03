"""What the explainers have in common: maskers and rows in, an Explanation out."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import numpy as np

from microtome.errors import ArgumentError, PackageError
from microtome.integrations.shap.assemble import Layout, assemble, masker_layout
from microtome.integrations.shap.callables import is_pipeline, label_names, plain
from microtome.integrations.shap.linked import WeightedGame, linear_weights, tensor_link
from microtome.integrations.shap.masked import MaskerGame
from microtome.integrations.shap.solved import Asked, Solved
from microtome.integrations.shap.tabular import background_of, table_of
from microtome.integrations.shap.tree import Tree
from microtome.shapley.game import MEMORY, Game
from microtome.shapley.link import Link


class Explainer:
    """A model, a masker and a link; the subclasses say how values are found.

    Args:
        model: a function of arrays, a scikit-learn estimator, a torch module, or a Hugging Face
            text classification pipeline.
        masker: a background table (array, DataFrame, sparse matrix; at most 100 rows of it are
            used), any of shap's maskers, a tokenizer, or a function masker(mask, *inputs) that
            returns masked inputs.
        link: the scale that is explained: shap.links.identity or logit, their names, or a function.
        feature_names: instead of the names of a DataFrame's columns.
        linearize_link: average link(f) over background rows with weights that keep a model additive
            which is so for each of them, and not take the link of the average.
        seed: of the samples; None is 0. The same seed gives the same values for each call. The
            global random states are neither read nor moved.
        output_names: names of the outputs.
        memory: most bytes of masked inputs in one call of the model.
        **call_args: defaults for the arguments of calls.
    """

    method = "Explainer"
    keeps_to_tree = False  # whether a masker's clustering matters
    keeps_axis = False  # of a single output; shap's explainers differ
    background_rows: int | None = 100

    def __init__(
        self,
        model: Any,
        masker: Any,
        link: Any = "identity",
        feature_names: Any = None,
        linearize_link: bool = True,
        seed: int | None = None,
        *,
        output_names: Any = None,
        memory: int = MEMORY,
        **call_args: Any,
    ) -> None:
        self.model, self.link = model, link
        self.masker = self._masker(model, masker)
        self.feature_names, self.output_names = feature_names, output_names
        self.linearize_link, self.seed, self.memory = linearize_link, seed, memory
        self.call_args = call_args
        self._expected: Any = None
        self._background = background_of(self.masker, self.background_rows)
        self._linked = tensor_link(self.method, link)
        if self._background is None and not callable(self.masker):
            msg = (
                f"{self.method}: masker must be a background table, one of shap's maskers or a "
                f"function masker(mask, *inputs), got {type(masker).__name__}."
            )
            raise ArgumentError(msg)

    @property
    def expected_value(self) -> Any:
        """The base value, a number or [outputs]; None before the first call of other maskers.

        Over a background table the model is asked when this is first read.
        """
        if self._expected is None and self._background is not None:
            held = self._background
            first = held.rows[:1]
            table = table_of(self.method, self.model, held, first, self._frames(first))
            names = [str(j) for j in range(table.varying.shape[1])]
            game = next(table.games(self.method, self.model, names, self.memory))[2]
            linked, link = self._game(game)
            base = linked.ends()[0].mean(1)
            base = (base if link is None else link(base))[0].numpy()
            self._expected = float(base[0]) if linked.scalar else base
        return self._expected

    @expected_value.setter
    def expected_value(self, value: Any) -> None:
        self._expected = value

    def _masker(self, model: Any, masker: Any) -> Any:
        """The masker; shap's masker of texts for a tokenizer, or for a pipeline's own."""
        if masker is None and is_pipeline(model):
            masker = model.tokenizer
        if not (hasattr(masker, "convert_ids_to_tokens") and hasattr(masker, "vocab_size")):
            return masker
        try:
            import shap
        except ImportError as error:
            msg = f"{self.method}: masking with a tokenizer needs shap. Run pip install shap."
            raise PackageError(msg) from error
        return shap.maskers.Text(masker)

    def __call__(self, *args: Any, **options: Any) -> Any:
        """Explain rows.

        Args:
            *args: the rows, an array or a DataFrame, or a list of texts; one for each input of the
                model.
            **options: by name, each by default as the constructor was told, or else:
                max_evals=500, most coalitions for each row, each of which is evaluated over the
                whole background; "auto" is ten permutations there and back.
                main_effects=False, also f of each feature alone, less the base value.
                error_bounds=False, also error_std, and bounds two standard errors away.
                batch_size="auto", most coalitions in one call of the model; by default as many as
                fit in `memory`.
                outputs=None, which outputs to keep: numbers, or one of shap's chains such as
                Explanation.argsort.flip[:2].
                silent=False, show no progress bar.
                error_kind="standard", the standard error of the values, or "marginal": what shap
                calls error_std, the deviation of single marginals, which does not fall as more of
                them are drawn.

        Returns:
            shap.Explanation, or its likeness where shap is absent; a list with one for each input
            of a model of several.

        Raises:
            ArgumentError: too small a max_evals, or an unknown option.
        """
        return self._explain(args, Asked.of(self.method, self.call_args, options))

    def _solve(self, game: Game, asked: Asked, link: Link | None, tree: Tree | None) -> Solved:
        """Values of a game; `link` is still to be applied to means over the background."""
        raise NotImplementedError

    def _explain(self, args: tuple[Any, ...], asked: Asked) -> Any:
        start = time.monotonic()
        labels = self.output_names or label_names(self.model)
        if self._background is not None and len(args) == 1:
            parts, layout = self._tabular(args[0], asked)
        else:
            names = self.feature_names
            for frame in (a for a in args if names is None and hasattr(a, "iloc") and a.ndim == 2):
                names = list(map(str, frame.columns))
            # Going through a DataFrame gives its columns' names; shap too hands maskers arrays.
            args = tuple(a.to_numpy() if hasattr(a, "iloc") else a for a in args)
            parts = [self._masked(row, asked) for row in zip(*args, strict=True)]
            layout = masker_layout(self.masker, args, names)
        return assemble(parts, layout, asked, labels, start, self.keeps_axis)

    def _game(self, game: Game) -> tuple[Game, Link | None]:
        """A game on the scale of the link, as far as its background rows are games of their own."""
        weights = getattr(self._background, "weights", None)
        if self._linked is None and weights is None:
            return game, None
        if self._linked is not None and self.linearize_link:
            weights = linear_weights(game.ends()[0][0], self._linked)
            return WeightedGame(game, weights, self._linked), None
        if weights is not None:
            game = WeightedGame(game, weights, None)
        return game, self._linked

    def _tabular(self, X: Any, asked: Asked) -> tuple[list[Solved], Layout]:
        held = self._background
        table = table_of(self.method, self.model, held, X, self._frames(X))
        names = self._names(X, table.varying.shape[1])
        memory = self.memory
        if asked.batch is not None:
            row = table.data.shape[1] * np.dtype(np.float64).itemsize
            memory = min(memory, asked.batch * len(table.background) * row)
        tree = self._tree(held.clustering, len(names))
        if tree is not None:
            table = replace(table, varying=np.ones_like(table.varying))
        parts: dict[int, Solved] = {}
        for rows, features, game in table.games(self.method, self.model, names, memory):
            linked, link = self._game(game)
            found = self._solve(linked, asked, link, tree)
            found = found.completed(linked, link, tree, asked)
            for i, row in enumerate(rows):
                parts[row] = found.row(i, features, table.varying.shape[1])
        each = [parts[row] for row in range(len(parts))]
        return each, Layout([table.data], [[(len(names),)]] * len(parts), [names])

    def _tree(self, clustering: Any, features: int) -> Tree | None:
        if clustering is None or not self.keeps_to_tree:
            return None
        return Tree(self.method, clustering, features)

    def _frames(self, X: Any) -> bool:
        return True

    def _masked(self, args: tuple[Any, ...], asked: Asked) -> Solved:
        function = plain(self.method, self.model)
        clustering = getattr(self.masker, "clustering", None)
        clustering = clustering(*args) if callable(clustering) else clustering
        whole = self.keeps_to_tree and clustering is not None
        game = MaskerGame(self.method, function, self.masker, args, asked.batch, self.memory, whole)
        tree = self._tree(clustering, game.features)
        linked, link = self._game(game)
        found = self._solve(linked, asked, link, tree)
        found = found.completed(linked, link, tree, asked)
        return found.row(0, game.varying, game.features)

    def _names(self, X: Any, count: int) -> list[str]:
        if hasattr(X, "columns") and self._background.groups is None:
            return [str(name) for name in X.columns]
        names = self.feature_names
        if names is None:
            names = self._background.columns
        return [f"Feature {j}" for j in range(count)] if names is None else list(names)
