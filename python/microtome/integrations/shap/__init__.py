"""shap's model-agnostic explainers under its names and calls, over microtome's estimators."""

from microtome.integrations.shap.exact import ExactExplainer
from microtome.integrations.shap.explanation import Explanation
from microtome.integrations.shap.kernel import KernelExplainer
from microtome.integrations.shap.partition import PartitionExplainer
from microtome.integrations.shap.permutation import PermutationExplainer
from microtome.integrations.shap.sampling import SamplingExplainer

__all__ = [
    "ExactExplainer",
    "Explanation",
    "KernelExplainer",
    "PartitionExplainer",
    "PermutationExplainer",
    "SamplingExplainer",
]
