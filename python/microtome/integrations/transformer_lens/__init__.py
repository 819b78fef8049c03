"""TransformerLens's names and calls, over its models and over plain Hugging Face models."""

from microtome.integrations.transformer_lens.cache import ActivationCache
from microtome.integrations.transformer_lens.hook_points import HookPoint
from microtome.integrations.transformer_lens.hooked import HookedModel
from microtome.integrations.transformer_lens.names import get_act_name

__all__ = ["ActivationCache", "HookPoint", "HookedModel", "get_act_name"]
