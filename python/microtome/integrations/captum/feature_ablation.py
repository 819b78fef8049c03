"""Feature ablation under captum's name."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from microtome.integrations.captum.method import Method
from microtome.shapley.coalitions import inverse, spans


class FeatureAblation(Method):
    """captum.attr.FeatureAblation: what the output loses when one feature is replaced.

    Args:
        forward_func: see `Method`, like seed (nothing is drawn) and memory.

    A large value says that the output needs this feature with all others in place; of two features
    that can stand in for each other neither is seen.

    Example:
        >>> import torch
        >>> method = FeatureAblation(lambda x: x[:, 0] * x[:, 1])
        >>> method.attribute(torch.tensor([[2.0, 3.0]]))
        tensor([[6., 6.]])
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
        """Arguments as in `ShapleyValueSampling.attribute`.

        Returns:
            Like the inputs, in the dtype of the outputs. Outputs of more dimensions than one are
            flattened, as in captum: [numbers in the output, *input shape without the first].
        """
        game = self._game(
            inputs, baselines, target, additional_forward_args, feature_mask,
            perturbations_per_eval,
        )  # fmt: skip
        p, full = len(game.players), game.ends()[1]
        everyone = torch.arange(len(full))
        parts = [game.values(*_without(part, p), everyone) for part in _blocks(p)]
        values = torch.cat(parts, 1)  # [e, p, o]
        attributions = game.spread(full[:, None] - values, game.dtype)
        many = len(game.output_shape) - 1
        each = attributions if isinstance(attributions, tuple) else (attributions,)
        return game.asked.back([part.flatten(0, many) for part in each])


def _blocks(p: int) -> tuple[Tensor, ...]:
    """Players, so many at a time that their orders stay small."""
    return torch.arange(p).split(max(1, (1 << 22) // p))


def _without(players: Tensor, p: int) -> tuple[Tensor, Tensor]:
    """Ranks and spans of the coalitions of all players but one."""
    # Each order begins with one player; the rest of it is the coalition without that player.
    orders = (players[:, None] + torch.arange(p)) % p
    j = torch.arange(len(players))
    return inverse(orders), spans(0 * j, j, 0 * j + 1, 0 * j + p)
