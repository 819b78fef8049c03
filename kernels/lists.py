"""Candidates of rows: features that a tile of scores lets through, appended in any order."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, import-untyped"
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def append(
    keep, row, live, feature, count, index, capacity, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Append the features [BN] that `keep` [BM, BN] marks to the lists of the rows [BM].

    count [rows] counts all of them, index [rows, capacity] holds those that fit. The order in which
    programs append is not fixed, so an answer may not depend on it. Integer atomics only.
    """
    kept = keep.to(tl.int32)
    at = tl.atomic_add(count + row, tl.sum(kept, 1), mask=live, sem="relaxed")  # [BM]
    at = at[:, None] + tl.cumsum(kept, 1) - kept
    place = row.to(tl.int64)[:, None] * capacity + at
    tl.store(
        index + place, tl.zeros((BM, BN), tl.int32) + feature[None, :], mask=keep & (at < capacity)
    )
