"""Where tests of CUDA kernels run: on a GPU, or on the emulator of the development build."""

from __future__ import annotations

import importlib.util

import torch

# Where there is no device the same kernels and hosts run on the CPU (csrc/emulator).
EMULATED = not torch.cuda.is_available() and (
    importlib.util.find_spec("microtome._emulated_ext") is not None
)
ORDERS = ("forward", "reverse", "shuffled")


def set_order(order: str, seed: int = 0) -> None:
    """The order in which the emulator runs threads and blocks; an answer may not depend on it."""
    if EMULATED:
        importlib.import_module("microtome._emulated_ext").set_order(order, seed)
