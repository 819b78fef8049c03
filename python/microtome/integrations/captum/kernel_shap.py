"""KernelSHAP under captum's name."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from microtome.errors import ArgumentError, ShapeError
from microtome.integrations.captum.game import ForwardGame
from microtome.integrations.captum.method import Method
from microtome.shapley.exact import affordable, exact
from microtome.shapley.kernel import kernel
from microtome.shapley.result import ShapleyValues as Result


class KernelShap(Method):
    """captum.attr.KernelShap: Shapley values by weighted least squares on sampled coalitions.

    `n_samples` coalitions of each example, as in captum, but without repeats and in pairs of a
    coalition and its complement; where they are enough for all 2^p, the values are exact. They sum
    to the difference of the outputs exactly, where captum gives that a large weight.

    Args:
        forward_func: see `Method`, like seed and memory.

    Example:
        >>> import torch
        >>> method = KernelShap(lambda x: x[:, 0] * x[:, 1])
        >>> method.attribute(torch.tensor([[2.0, 3.0]]))
        tensor([[3., 3.]])
    """

    def attribute(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        baselines: Any = None,
        target: Any = None,
        additional_forward_args: Any = None,
        feature_mask: Tensor | tuple[Tensor, ...] | None = None,
        n_samples: int = 25,
        perturbations_per_eval: int | None = None,
        return_input_shape: bool = True,
        show_progress: bool = False,
    ) -> Any:
        """Arguments as in `ShapleyValueSampling.attribute`, and:

        Args:
            inputs: [examples, ...], or a tuple.
            baselines: as there.
            target: as there; the output must be one number for each example.
            additional_forward_args: as there.
            feature_mask: as there.
            n_samples: coalitions, the empty and the full one among them; at least features + 3, and
                twice the features and 2 to draw them in pairs.
            perturbations_per_eval: as there.
            return_input_shape: False for a value of each feature instead, [examples, features].
            show_progress: as there.

        Returns:
            Like the inputs, float32.

        Raises:
            ArgumentError: fewer samples than features need; as there.
        """
        game = self._game(
            inputs, baselines, target, additional_forward_args, feature_mask,
            perturbations_per_eval,
        )  # fmt: skip
        one_output(type(self).__name__, game)
        found = self._explain(game, n_samples, show_progress)
        if return_input_shape:
            return game.spread(found.values, torch.float32)
        return by_feature(game, found.values[..., 0])

    def _explain(self, game: ForwardGame, n_samples: int, progress: bool) -> Result:
        p = len(game.players)
        if affordable(game, n_samples):
            return exact(game, progress=progress)
        if n_samples - 2 < p + 1:
            msg = (
                f"{type(self).__name__}: n_samples={n_samples} is too few for p={p} features: a fit"
                f" takes {p + 3}, and {2 * p + 2} in pairs. Raise it, or group features with "
                "feature_mask."
            )
            raise ArgumentError(msg)
        return kernel(
            game, max_evaluations=n_samples, paired=n_samples - 2 >= 2 * p, seed=self.seed,
            memory=self.memory, progress=progress,
        )  # fmt: skip


def one_output(op: str, game: ForwardGame) -> None:
    """Raise ShapeError unless the forward function gives one number an explicand."""
    o = game.ends()[1].shape[1]
    if o != 1:
        msg = (
            f"{op}: forward_func must give one number for each example, or one for the batch, got "
            f"outputs of shape {list(game.output_shape)}. Choose one with target."
        )
        raise ShapeError(msg)
    # Outputs [e, 1] are a number for each example too, and attributions have no axis for them.
    game.output_shape = game.output_shape[:1]


def by_feature(game: ForwardGame, values: Tensor) -> Tensor:
    """[e, features] float32 of values [e, p]: features that no element has get zero."""
    at = game.asked.features - game.asked.features.min()
    out = torch.zeros(len(values), int(at.max()) + 1, device=game.x[0].device)
    out[:, at.to(out.device)] = values.to(out)
    return out
