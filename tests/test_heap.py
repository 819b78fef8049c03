"""Freed memory that the next call finds again."""

import platform
import subprocess
import sys

import pytest

# Faults of writing 6 MiB twenty times over, in a process whose heap nobody has used before.
CHILD = """
import resource, sys
import numpy as np
from microtome._heap import keep_freed

if sys.argv[1] == "kept":
    keep_freed()
before = resource.getrusage(resource.RUSAGE_SELF)
for _ in range(20):
    blocks = [np.empty(3 << 20, dtype=np.uint8), np.empty(3 << 20, dtype=np.uint8)]
    for block in blocks:
        block.fill(1)
    del blocks, block
after = resource.getrusage(resource.RUSAGE_SELF)
print(after.ru_minflt - before.ru_minflt, (after.ru_maxrss - before.ru_maxrss) >> 10)
"""


def faults(monkeypatch, kept):
    for name in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"):
        monkeypatch.delenv(name, raising=False)
    command = [sys.executable, "-c", CHILD, kept]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return tuple(map(int, done.stdout.split()))


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="malloc of another C library")
def test_memory_freed_by_one_call_serves_the_next_without_page_faults(monkeypatch):
    before, _ = faults(monkeypatch, "returned")
    after, grown = faults(monkeypatch, "kept")
    assert after < before / 3
    assert grown < 16  # MiB: the block that teaches malloc has no pages
