"""captum's perturbation methods under its names and calls, over microtome's estimators."""

from microtome.integrations.captum.feature_ablation import FeatureAblation
from microtome.integrations.captum.kernel_shap import KernelShap
from microtome.integrations.captum.lime import Lime
from microtome.integrations.captum.linear import Lasso
from microtome.integrations.captum.llm import accept_in_llm_attribution
from microtome.integrations.captum.shapley_value import ShapleyValues, ShapleyValueSampling
from microtome.integrations.captum.similarity import get_exp_kernel_similarity_function

__all__ = [
    "FeatureAblation",
    "KernelShap",
    "Lasso",
    "Lime",
    "ShapleyValueSampling",
    "ShapleyValues",
    "accept_in_llm_attribution",
    "get_exp_kernel_similarity_function",
]
