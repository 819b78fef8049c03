"""What a table was taken on, and how long an import takes."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from microtome import _native, ops
from microtome.ops import _registry
from microtome.ops.screen_weights import best_kind

FLAGS = (
    "avx2",
    "fma",
    "f16c",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "amx_tile",
    "amx_bf16",
    "amx_int8",
)
PACKAGES = (
    "torch",
    "numpy",
    "triton",
    "microtome",
    "eai-sparsify",
    "sae-lens",
    "dictionary-learning",
    "transformers",
    "transformer-lens",
    "nnsight",
    "pyvene",
    "shap",
    "captum",
    "shapiq",
    "lime",
    "scikit-learn",
)


def isa() -> str:
    """The instruction-set level of the native kernels, or "reference" where they are absent.

    "amx-emulated" is not a level: no time taken on it says anything about AMX.
    """
    if _native.why_absent():
        return "reference"
    return "amx-emulated" if _native.emulates_amx() else _native.isa()


def describe(threads: int) -> dict[str, Any]:
    """Processor, versions, level in use, threads, date."""
    cpu = _cpuinfo()
    present = set(cpu.get("flags", "").split())
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    except (ValueError, OSError):
        memory = 0.0
    return {
        "cpu": cpu.get("model name", platform.processor() or platform.machine()),
        "flags": [flag for flag in FLAGS if flag in present],
        "cores": os.cpu_count(),
        "memory_gib": round(memory, 1),
        "load_average": list(os.getloadavg()),
        "isa": isa(),
        "screen": best_kind(),
        "backends": {
            name: [b.name for b in op.backends] for name, op in sorted(_registry.OPS.items())
        },
        "available": ops.info(),
        "threads": threads,
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "torch_parallel": torch.__config__.parallel_info().splitlines()[0],
    }


def _cpuinfo() -> dict[str, str]:
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return {}
    first = path.read_text().split("\n\n")[0]
    pairs = (line.split(":", 1) for line in first.splitlines() if ":" in line)
    return {key.strip(): value.strip() for key, value in pairs}


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    root = Path(__file__).parent
    try:
        head = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=root, capture_output=True, text=True
        )
        changed = subprocess.run(
            ["git", "status", "--porcelain", "-uno"], cwd=root, capture_output=True, text=True
        )
    except OSError:
        return None
    if head.returncode:
        return None
    return head.stdout.strip() + ("+changes" if changed.stdout.strip() else "")


def import_times(runs: int = 7) -> dict[str, float]:
    """Seconds that imports take in a fresh process, the least of several.

    Args:
        runs: fresh processes.

    Returns:
        torch: `import torch`; microtome: what `import microtome` adds to it; ops: what `import
        microtome.ops` adds to both.
    """
    code = (
        "from time import perf_counter as t; a = t(); import torch; b = t(); import microtome;"
        "c = t(); import microtome.ops; print(b - a, c - b, t() - c)"
    )
    rows = []
    for _ in range(runs):
        out = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        )
        rows.append([float(word) for word in out.stdout.split()])
    return dict(zip(("torch", "microtome", "ops"), map(min, zip(*rows, strict=True)), strict=True))
