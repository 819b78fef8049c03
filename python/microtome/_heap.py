"""What malloc does with freed memory, where a model is called again and again."""

from __future__ import annotations

from functools import cache

import numpy as np

_LARGEST = 32 << 20  # bytes: no larger block teaches glibc anything


@cache  # glibc need not be told twice
def keep_freed() -> None:
    """Have glibc keep freed blocks of up to 32 MiB for the next call.

    At first it returns such blocks to the system one by one, and every page of the next one is a
    fault: a third of the time of 5000 rows of a small network. It stops doing so once a block of
    that size was freed (mallopt(3), M_MMAP_THRESHOLD), so one is, untouched: no page of it ever
    exists. Up to 64 MiB at the heap's end then stay with the process. Where MALLOC_MMAP_THRESHOLD_
    or MALLOC_TRIM_THRESHOLD_ is set, and with another malloc, nothing changes.
    """
    np.empty(_LARGEST - (1 << 16), dtype=np.uint8)
