"""lime's explainers, with lime's signatures, samples and numbers, fitted from Gram matrices."""

from microtome.integrations.lime.image import LimeImageExplainer
from microtome.integrations.lime.recurrent import RecurrentTabularExplainer
from microtome.integrations.lime.tabular import LimeTabularExplainer
from microtome.integrations.lime.text import LimeTextExplainer

__all__ = [
    "LimeImageExplainer",
    "LimeTabularExplainer",
    "LimeTextExplainer",
    "RecurrentTabularExplainer",
]
