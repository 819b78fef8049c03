"""What each part runs, in the order of what is wanted most."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from pathlib import Path
from typing import Any

from benchmarks.on_gpu import ceilings
from benchmarks.on_gpu.item import Item

COMPILE_SECONDS = (
    110.0  # at most for compiling ahead; what is not compiled then is compiled in turn
)
PACKAGES = ("torch", "triton", "numpy", "microtome", "eai-sparsify")


def items(part: int) -> list[Item]:
    """The part's items; the ceilings are the first of every part."""
    first = [ceilings.item(part)]
    if part == 1:
        from benchmarks.on_gpu import probes, sanitize

        return [*first, *probes.items(), *sanitize.items()]
    if part == 2:
        from benchmarks.on_gpu import codes, decode, encode, patching, shapley, update

        parts = [m.items() for m in (encode, decode, update, codes, patching, shapley)]
        parts += [encode.huge(), update.huge()]
        return [*first, *(item for group in parts for item in group)]
    from benchmarks.on_gpu import repeats, steps, whole

    return [*first, *steps.items(), *repeats.items(), *whole.items()]


def software() -> dict[str, Any]:
    """Versions, and the commit where this is a checkout."""
    versions: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return {"python": platform.python_version(), "versions": versions, "commit": commit()}


def commit() -> str | None:
    """Short hash, "+changes" behind it where files differ; None where git knows nothing."""
    root = Path(__file__).parent

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, timeout=20)
        return done.stdout.strip()

    try:
        head = git("rev-parse", "--short", "HEAD")
        return head + ("+changes" if head and git("status", "--porcelain", "-uno") else "") or None
    except (OSError, subprocess.TimeoutExpired):
        return None
