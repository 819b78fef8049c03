"""The resident memory of this process: what it holds now, and its peak since a mark."""

from __future__ import annotations

import ctypes
import gc
import resource
from contextlib import suppress
from pathlib import Path


def _status_mib(name: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def memory_mark() -> float:
    """Forget the peak so far and return the memory held now, in MiB.

    Where the kernel does not let a process reset its peak, the mark is the peak so far (ru_maxrss).
    """
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return _status_mib("VmRSS")


def memory_peak() -> float:
    """The largest resident memory since `memory_mark`, in MiB."""
    return _status_mib("VmHWM")
