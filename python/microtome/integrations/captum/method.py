"""What captum's perturbation methods have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from microtome.integrations.captum.arguments import request
from microtome.integrations.captum.game import ForwardGame, calls_wanted
from microtome.shapley.game import MEMORY


class Method:
    """A method over a forward function.

    Args:
        forward_func: the model or any function of it, called with the inputs and then the
            additional arguments. It returns one number, or an array of them, for each row it is
            given; or one answer for the whole batch, and then every coalition is a call.
        seed: of the samples. The same seed gives the same attributions; the global random state is
            neither read nor moved.
        memory: bytes of inputs, and of outputs, in one call of forward_func.
    """

    def __init__(
        self, forward_func: Callable[..., Any], *, seed: int = 0, memory: int = MEMORY
    ) -> None:
        self.forward_func, self.seed, self.memory = forward_func, seed, memory

    @property
    def multiplies_by_inputs(self) -> bool:
        return False

    def has_convergence_delta(self) -> bool:
        return False

    @classmethod
    def get_name(cls) -> str:
        """The class's name as words, as captum's progress bars have it."""
        return "".join(" " + c if c.isupper() and i else c for i, c in enumerate(cls.__name__))

    def _game(
        self,
        inputs: Any,
        baselines: Any,
        target: Any,
        additional_forward_args: Any,
        feature_mask: Any,
        perturbations_per_eval: int | None,
    ) -> ForwardGame:
        asked = request(
            type(self).__name__, inputs, baselines, target, additional_forward_args, feature_mask
        )
        wanted = calls_wanted(self.forward_func, perturbations_per_eval)
        return ForwardGame(self.forward_func, asked, wanted, self.memory)
