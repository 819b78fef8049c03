"""Candidates for rows of any length: compute what `csr_filter` listed, set overflow apart.

Shared by `batch_topk_encode` and `threshold_encode`. A row is either listed (every feature that
could matter is on its list, with its float32 value) or whole (all f values are computed). Of
`batch_topk_encode`, which looks at values many times, whole rows are few; the first `slots` of them
have their values in a scratch, of the others each kernel computes them again, one row after
another, so that no host needs to know how many there are. `threshold_encode` computes whole rows
tile by tile (`threshold_whole`) and has no slots. A value comes from the same float32 sum always.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, import-untyped"
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from microtome.kernels import dots
from microtome.kernels import topk_select as select
from torch import Tensor

from microtome._look import Look

WORKSPACE = 64 * 2**20  # bytes of the values of whole rows
SCAN = 512  # values of a whole row looked at together
LISTED = (8, 64)  # rows, and candidates of each, looked at together


class Rows:
    """The rows of one call and what is known about them.

    Attributes:
        lists: count [n], index and value [n, capacity], failed [n] and failures [1]: whole rows in
            no particular order. A whole row's count is 0, and -1 before it is found to be one.
        passed: [n] int32, features that passed the filter; f for a whole row.
        scratch: [2 slots, f] float32, where there are slots: values of the first whole rows, then
            room in which each program over whole rows computes those of a later one.
        bad: [n] int32, 1 for a row with a computed value that is not finite.
        weights: x, b_dec, W_enc, b_enc, x in place of what is absent.
        has: constants of the kernels that compute values.
    """

    def __init__(
        self, x: Tensor, W_enc: Tensor, b_enc: Tensor | None, b_dec: Tensor | None, capacity: int,
        slots: int,
    ) -> None:  # fmt: skip
        n, f = x.shape[0], W_enc.shape[0]
        self.n, self.f, self.d, self.capacity, self.slots = n, f, x.shape[1], capacity, slots
        self.lists = select.Lists(n, capacity, x.device)
        self.passed = torch.full((n,), f, dtype=torch.int32, device=x.device)
        self.bad = torch.zeros(n, dtype=torch.int32, device=x.device)
        whole = slots if capacity < f else 0  # a list of all features overflows never
        self.scratch = torch.empty(max(2 * whole, 1), f, dtype=torch.float32, device=x.device)
        self.weights = (
            x,
            x if b_dec is None else b_dec,
            W_enc,
            x if b_enc is None else b_enc,
        )
        self.biases = (b_enc, b_dec)
        self.has = {
            "HAS_B_DEC": b_dec is not None,
            "HAS_BIAS": b_enc is not None,
            "BD": select.WIDTH,
        }

    @property
    def everything(self) -> bool:
        """Whether every list holds all features, so that nothing is screened."""
        return self.capacity == self.f

    def listed(self) -> tuple[tuple[int], dict[str, int]]:
        """Grid and tile of a kernel over listed rows; interpreted, a program costs milliseconds."""
        BN, BC = LISTED if self.passed.is_cuda else (32, 64)
        return (triton.cdiv(self.n, BN),), {"BN": BN, "BC": BC}

    def whole(self) -> tuple[tuple[int], dict[str, int]]:
        """Grid and tile of a kernel over whole rows."""
        return (self.slots,), {"BN": 1, "BC": SCAN}


def slots_of(n: int, f: int) -> int:
    """Whole rows that the workspace holds."""
    return max(1, min(WORKSPACE // (8 * max(f, 1)), n))


@triton.jit
def _overflow_kernel(count, passed, failed, failures, rows, capacity, BN: tl.constexpr):
    """Make rows whole whose list overflowed or, with a count of -1, could not be filled."""
    row = tl.program_id(0) * BN + tl.arange(0, BN)
    live = row < rows
    many = tl.load(count + row, mask=live, other=0)
    over = (many > capacity) | (many < 0)
    tl.store(passed + row, many, mask=live & ~over)
    set_apart(row, over, count, failed, failures, BN)


@triton.jit
def set_apart(row, which, count, failed, failures, BN: tl.constexpr):
    """Make the rows that `which` [BN] marks whole: on the list of whole rows, no list of theirs."""
    at = tl.atomic_add(
        failures + tl.zeros((BN,), tl.int32), which.to(tl.int32), mask=which, sem="relaxed"
    )
    tl.store(failed + at, row, mask=which)
    tl.store(count + row, tl.zeros((BN,), tl.int32), mask=which)


def block(rows: Rows) -> int:
    """Features of a whole row computed together."""
    return select.TILE[1] if rows.passed.is_cuda else 512


def compute(rows: Rows) -> None:
    """float32 values of what is listed (of everything, where the lists hold everything)."""
    lists = rows.lists
    if rows.everything:
        lists.count.fill_(rows.f)
    BN, BC = select.TILE if rows.passed.is_cuda else (32, 32)
    blocks = min(triton.cdiv(rows.capacity, BC), select.MOST)
    select._value_kernel[(triton.cdiv(rows.n, BN), blocks)](
        *rows.weights, lists.count, lists.index, lists.value, rows.n, rows.d, rows.capacity,
        ALL=rows.everything, BN=BN, BC=BC, **rows.has, enable_fp_fusion=True,
    )  # fmt: skip


def set_overflowed_apart(rows: Rows) -> None:
    """Make rows whose list overflowed whole."""
    lists = rows.lists
    BN = 128
    _overflow_kernel[(triton.cdiv(rows.n, BN),)](
        lists.count, rows.passed, lists.failed, lists.failures, rows.n, rows.capacity, BN=BN,
        enable_fp_fusion=True,
    )  # fmt: skip


def compute_whole(rows: Rows) -> None:
    """Values of the first whole rows."""
    BC = block(rows)
    dots._whole_kernel[(triton.cdiv(rows.f, BC),)](
        *rows.weights, rows.lists.failed, rows.lists.failures, rows.scratch, rows.f, rows.d,
        rows.slots, ORDERED=False, BC=BC, **rows.has, enable_fp_fusion=True,
    )  # fmt: skip


def contiguous(*inputs: Tensor | None) -> list[Any]:
    """The inputs as kernels read them: x, W_enc, and what there is of b_enc and b_dec."""
    return [None if t is None else t.contiguous() for t in inputs]


def capturing(x: Tensor) -> bool:
    """Whether a CUDA graph is being captured, so that nothing can be read back."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def look_at(
    op: str, x: Tensor, W_enc: Tensor, b_enc: Tensor | None, b_dec: Tensor | None,
    threshold: Tensor | None = None, norms: Tensor | None = None,
) -> Look:  # fmt: skip
    """A look for NaN and infinity in the inputs; norms [f]: those of W_enc, where they are there.

    A feature that is -inf passes no filter, so the inputs themselves are looked at.
    """
    look = Look(op, x.device)
    look.finite("x", x)
    look.finite("W_enc", W_enc, norms)
    look.finite("b_enc", b_enc)
    look.finite("b_dec", None if b_dec is None else b_dec[None])
    look.finite("threshold", threshold)
    return look


def look_afterwards(
    op: str, rows: Rows, threshold: Tensor | None = None, norms: Tensor | None = None
) -> Look:
    """A look for rows with a computed value that is not finite, and on a GPU, where nobody has
    looked before, for NaN and infinity in the inputs."""
    x, _, W_enc, _ = rows.weights
    look = (
        look_at(op, x, W_enc, *rows.biases, threshold, norms) if x.is_cuda else Look(op, x.device)
    )
    look.finite("x W_enc^T", torch.where(rows.bad > 0, float("inf"), 0.0))
    return look


def certificate(rows: Rows) -> Tensor:
    """Features computed for each row; -1 where one of them is not finite."""
    return torch.where(rows.bad > 0, -1, rows.passed)
