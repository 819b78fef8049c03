"""TransformerLens's names and calls, over its models and over plain Hugging Face models."""

from microtome.integrations.transformer_lens import patching
from microtome.integrations.transformer_lens.cache import ActivationCache
from microtome.integrations.transformer_lens.hook_points import HookPoint
from microtome.integrations.transformer_lens.hooked import HookedModel
from microtome.integrations.transformer_lens.names import get_act_name
from microtome.integrations.transformer_lens.patching import *  # noqa: F403

__all__ = [
    "ActivationCache",
    "HookPoint",
    "HookedModel",
    "get_act_name",
    "patching",
    *patching.__all__,
]
