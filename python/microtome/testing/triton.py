"""Where tests of Triton kernels run: on a GPU, or interpreted in a process of their own.

Triton decides at import whether it interprets, so this is decided at import too.
"""

from __future__ import annotations

import os

import pytest
import torch

from microtome.ops import _registry

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
RUNS = INTERPRETED or torch.cuda.is_available()
DEVICE = "cpu" if INTERPRETED else "cuda"
_DEMANDED = "triton" in os.environ.get("MICROTOME_REQUIRE", "").split(",")
FAILS = _registry.unavailable("triton") if INTERPRETED and not _DEMANDED else None
MARKS = [
    pytest.mark.triton,
    pytest.mark.skipif(not RUNS, reason="no CUDA device, and TRITON_INTERPRET is not 1"),
    pytest.mark.skipif(FAILS is not None, reason=str(FAILS)),
]
# Numpy warns of 0 * inf in lanes that a kernel masks; a GPU computes them in silence.
SILENT = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")
