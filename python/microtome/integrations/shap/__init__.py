"""shap's model-agnostic explainers under its names and calls, over microtome's estimators.

Whatever else shap has (maskers, plots, links, sample, kmeans, TreeExplainer, ...) is shap's own, so
that code which imported shap finds it here, if shap is installed.
"""

from typing import Any

from microtome.errors import PackageError
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


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    try:
        import shap
    except ImportError:
        shap = None
    if hasattr(shap, name):
        return getattr(shap, name)
    if shap is None:
        msg = (
            f"microtome.integrations.shap.{name} would be shap's own, and shap is not installed. "
            f"Run pip install shap. Without it there are {', '.join(__all__)}."
        )
        raise PackageError(msg)
    msg = f"neither microtome.integrations.shap nor shap has {name!r}."
    raise AttributeError(msg)
