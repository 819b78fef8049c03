"""microtome: fused kernels and a thin Python layer for mechanistic interpretability on PyTorch."""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

# Public name -> module that holds it, imported on first use, so that `import microtome` costs next
# to nothing.
_PUBLIC = {
    "SAE": "microtome.sae",
    "TopK": "microtome.sae",
    "SparseCode": "microtome.sae",
    "TrainConfig": "microtome.sae",
    "train": "microtome.sae",
    "shard": "microtome.sae",
    "evaluate": "microtome.sae",
    "capture": "microtome.models",
    "sites": "microtome.models",
    "ActivationStore": "microtome.models",
    "check_now": "microtome.ops",
    "explain": "microtome.ops",
    "info": "microtome.ops",
    "synchronize": "microtome.ops",
    "use_backend": "microtome.ops",
}
_MODULES = (
    "errors",
    "integrations",
    "kernels",
    "lime",
    "models",
    "ops",
    "patching",
    "sae",
    "shapley",
    "testing",
)

__all__ = ["__version__", *_MODULES, *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        value = getattr(importlib.import_module(_PUBLIC[name]), name)
        globals()[name] = value
        return value
    if name in _MODULES:
        return importlib.import_module(f"microtome.{name}")
    msg = f"module 'microtome' has no attribute {name!r}"
    raise AttributeError(msg)


def __dir__() -> list[str]:
    return sorted(__all__)
