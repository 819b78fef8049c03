"""shap's PartitionExplainer: Owen values along the masker's clustering."""

from __future__ import annotations

from typing import Any

import numpy as np

from microtome.errors import ArgumentError, PackageError
from microtome.integrations.shap.explainer import Explainer
from microtome.integrations.shap.owen import owen
from microtome.integrations.shap.solved import Asked, Solved
from microtome.integrations.shap.tabular import Background
from microtome.integrations.shap.tree import Tree
from microtome.shapley.game import MEMORY, Game
from microtome.shapley.link import Link

_BATCH = 10  # coalitions at a time, as in shap: the course of a short search depends on it


class PartitionExplainer(Explainer):
    """shap.PartitionExplainer: Owen values, Shapley values that keep to a hierarchy of features.

    Exact where max_evals is enough for the whole tree: about the square of the features' number,
    if it is balanced. With fewer evaluations the nodes with the largest effects are split first,
    and the rest is shared out evenly below them, which is no sampling: the error has no estimate.

    Args:
        model: as in `Explainer`, like the other arguments.
        masker: with a `clustering`: shap.maskers.Partition, Text, Image, or any of that kind; or a
            table, which shap.maskers.Partition then clusters.
        output_names: names of the outputs.
        link: the scale that is explained.
        linearize_link: see `Explainer`.
        feature_names: see `Explainer`.
        memory: bytes of masked inputs in one call of the model.
        **call_args: defaults for the arguments of calls. Calls also take fixed_context: None (or
            "auto"), or 0 or 1 to look at features while their sibling is absent or present alone.

    Example:
        >>> import numpy as np
        >>> def masker(mask, x):
        ...     return np.where(mask, x, 0.0)[None]
        >>> masker.clustering = np.array([[0, 1, 1.0, 2], [2, 3, 2.0, 3]])
        >>> explainer = PartitionExplainer(lambda x: x[:, 0] * x[:, 1] * x[:, 2], masker)
        >>> explainer(np.ones((1, 3))).values
        array([[0.25, 0.25, 0.5 ]])
    """

    method = "PartitionExplainer"
    keeps_to_tree = True
    keeps_axis = True

    def __init__(
        self,
        model: Any,
        masker: Any,
        *,
        output_names: Any = None,
        link: Any = "identity",
        linearize_link: bool = True,
        feature_names: Any = None,
        memory: int = MEMORY,
        **call_args: Any,
    ) -> None:
        super().__init__(
            model, masker, link, feature_names, linearize_link,
            output_names=output_names, memory=memory, **call_args,
        )  # fmt: skip
        held = self._background
        tree = held.clustering if isinstance(held, Background) else None
        if tree is None and getattr(self.masker, "clustering", None) is None:
            msg = (
                f"{self.method}: the masker has no clustering. Take one with a hierarchy, such as "
                "shap.maskers.Partition(data), or PermutationExplainer."
            )
            raise ArgumentError(msg)

    def _masker(self, model: Any, masker: Any) -> Any:
        """For a table shap's Partition masker of it, which clusters the columns, as in shap."""
        if not (hasattr(masker, "iloc") or isinstance(masker, np.ndarray)) or masker.ndim != 2:
            return super()._masker(model, masker)
        try:
            import shap
        except ImportError as error:
            msg = f"{self.method}: clustering a table needs shap. Run pip install shap."
            raise PackageError(msg) from error
        return shap.maskers.Partition(masker)

    def _solve(self, game: Game, asked: Asked, link: Link | None, tree: Tree | None) -> Solved:
        context = None if asked.fixed_context == "auto" else asked.fixed_context
        if context not in (None, 0, 1):
            msg = f"{self.method}: fixed_context must be None, 'auto', 0 or 1, got {context!r}."
            raise ArgumentError(msg)
        most = 500 if asked.max_evals == "auto" else int(asked.max_evals)
        batch = asked.batch or getattr(self.masker, "default_batch_size", _BATCH)
        return owen(game, tree, link, most, batch, context, asked.chosen)
