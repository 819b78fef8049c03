"""LIME: a sparse linear model of a model around one input."""

from microtome.lime.image import explain_image
from microtome.lime.kernels import exponential
from microtome.lime.result import LimeExplanation, Stability
from microtome.lime.tabular import explain_tabular
from microtome.lime.text import explain_text

__all__ = [
    "LimeExplanation",
    "Stability",
    "explain_image",
    "explain_tabular",
    "explain_text",
    "exponential",
]
