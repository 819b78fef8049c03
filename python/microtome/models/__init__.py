"""Models: named sites, capture and splice, activation stores, packaged models and texts."""

from microtome.models.activations import Activations
from microtome.models.capture import capture
from microtome.models.packaged import LoadedModel, load
from microtome.models.sites import sites
from microtome.models.splice import splice
from microtome.models.store import ActivationStore, StoreView, capture_to_store
from microtome.models.texts import Corpus, corpus, tokenise
from microtome.models.toy import ByteTokenizer, ToyConfig, ToyModel

__all__ = [
    "ActivationStore",
    "Activations",
    "ByteTokenizer",
    "Corpus",
    "LoadedModel",
    "StoreView",
    "ToyConfig",
    "ToyModel",
    "capture",
    "capture_to_store",
    "corpus",
    "load",
    "sites",
    "splice",
    "tokenise",
]
