"""captum's LLMAttribution with our methods."""

from __future__ import annotations

from microtome.errors import PackageError
from microtome.integrations.captum.feature_ablation import FeatureAblation
from microtome.integrations.captum.kernel_shap import KernelShap
from microtome.integrations.captum.lime import Lime
from microtome.integrations.captum.shapley_value import ShapleyValues, ShapleyValueSampling


def accept_in_llm_attribution() -> None:
    """Let captum.attr.LLMAttribution take the methods of this package.

    It takes instances of the classes it lists, and so this adds ours to its list. It calls the
    model with one row at a time, and reads the values of all target tokens from it.

    Raises:
        PackageError: captum is not installed.
    """
    try:
        from captum.attr import LLMAttribution
    except ImportError as error:
        msg = "accept_in_llm_attribution: captum is not installed. Run pip install captum."
        raise PackageError(msg) from error
    several = (FeatureAblation, ShapleyValueSampling, ShapleyValues)
    lists = {
        "SUPPORTED_METHODS": (*several, Lime, KernelShap),
        "SUPPORTED_PER_TOKEN_ATTR_METHODS": several,
    }
    for name, ours in lists.items():
        listed = getattr(LLMAttribution, name)
        setattr(LLMAttribution, name, (*listed, *(c for c in ours if c not in listed)))
