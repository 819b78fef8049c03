"""Shapley values under captum's names: sampled, and by all coalitions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from microtome.errors import ArgumentError
from microtome.integrations.captum.method import Method
from microtome.shapley.exact import affordable, exact
from microtome.shapley.game import MEMORY
from microtome.shapley.permutation import permutation
from microtome.shapley.result import ShapleyValues as Result


class ShapleyValueSampling(Method):
    """captum.attr.ShapleyValueSampling: Shapley values from sampled permutations.

    `n_samples` permutations of p features buy n_samples * p + 1 evaluations of each example, as in
    captum. They are spent on antithetic pairs of permutations (captum's are independent), and on
    all 2^p coalitions, which gives the exact values, where that is not more.

    Args:
        forward_func: see `Method`, like seed and memory.
        design: of the permutations, as in `microtome.shapley.permutation`.
        seed: see `Method`.
        memory: see `Method`.

    Example:
        >>> import torch
        >>> method = ShapleyValueSampling(lambda x: x[:, 0] * x[:, 1])
        >>> method.attribute(torch.tensor([[2.0, 3.0]]))
        tensor([[3., 3.]])
    """

    def __init__(
        self,
        forward_func: Callable[..., Any],
        *,
        design: str = "antithetic",
        seed: int = 0,
        memory: int = MEMORY,
    ) -> None:
        super().__init__(forward_func, seed=seed, memory=memory)
        self.design = design

    def attribute(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        baselines: Any = None,
        target: Any = None,
        additional_forward_args: Any = None,
        feature_mask: Tensor | tuple[Tensor, ...] | None = None,
        n_samples: int = 25,
        perturbations_per_eval: int | None = None,
        show_progress: bool = False,
    ) -> Any:
        """The attribution of each element of the inputs; elements of a group get the group's.

        Args:
            inputs: [examples, ...], or a tuple of such tensors, which the forward function takes as
                its first arguments. Each example is explained by itself.
            baselines: what absent features are replaced by: a tensor like the input, or of one
                example, or a number; a tuple of these for a tuple; by default 0.
            target: the output to explain: an integer, a tuple for outputs of more dimensions, or a
                list or tensor with one for each example.
            additional_forward_args: handed to the forward function after the inputs; tensors with
                an entry for each example are repeated along with it.
            feature_mask: integer tensors that broadcast to the inputs; elements with the same
                number, in any input, are one feature.
            n_samples: permutations.
            perturbations_per_eval: most perturbations of all examples in one call of the forward
                function; None, other than in captum, for as many as fit in `memory`.
            show_progress: show a progress bar.

        Returns:
            A tensor for a tensor and a tuple for a tuple, of float32 and the inputs' shapes; for a
            forward function with several outputs, [*output shape, *input shape without the first].

        Raises:
            ArgumentError, ShapeError: arguments that do not agree, with each other or with what the
                forward function returns.
        """
        game = self._game(
            inputs, baselines, target, additional_forward_args, feature_mask,
            perturbations_per_eval,
        )  # fmt: skip
        found = self._explain(game, n_samples, show_progress)
        return game.spread(found.values, torch.float32)

    def _explain(self, game: Any, n_samples: int, progress: bool) -> Result:
        name, p = type(self).__name__, len(game.players)
        if not isinstance(n_samples, int) or n_samples < 1:
            msg = f"{name}: n_samples must be a positive integer, got {n_samples!r}."
            raise ArgumentError(msg)
        evaluations = n_samples * p + 1
        if affordable(game, evaluations):
            return exact(game, progress=progress)
        if n_samples == 1:
            return permutation(
                game, n_permutations=1, design="plain", seed=self.seed, progress=progress
            )
        return permutation(
            game, max_evaluations=evaluations, design=self.design, seed=self.seed,
            progress=progress, memory=self.memory,
        )  # fmt: skip

    def explain(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        baselines: Any = None,
        target: Any = None,
        additional_forward_args: Any = None,
        feature_mask: Tensor | tuple[Tensor, ...] | None = None,
        n_samples: int = 25,
        perturbations_per_eval: int | None = None,
        show_progress: bool = False,
    ) -> Result:
        """The same as `microtome.shapley` returns it: a value for each feature, standard errors."""
        game = self._game(
            inputs, baselines, target, additional_forward_args, feature_mask,
            perturbations_per_eval,
        )  # fmt: skip
        return self._explain(game, n_samples, show_progress)


class ShapleyValues(ShapleyValueSampling):
    """captum.attr.ShapleyValues: exact Shapley values.

    captum goes through all p! permutations; the same values follow from the 2^p coalitions.
    """

    def attribute(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        baselines: Any = None,
        target: Any = None,
        additional_forward_args: Any = None,
        feature_mask: Tensor | tuple[Tensor, ...] | None = None,
        perturbations_per_eval: int | None = None,
        show_progress: bool = False,
    ) -> Any:
        """As `ShapleyValueSampling.attribute`, without n_samples: there is nothing to sample."""
        return super().attribute(
            inputs, baselines, target, additional_forward_args, feature_mask, 1,
            perturbations_per_eval, show_progress,
        )  # fmt: skip

    def _explain(self, game: Any, n_samples: int, progress: bool) -> Result:
        return exact(game, progress=progress)
