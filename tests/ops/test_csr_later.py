"""What Triton's encoders of rows of any length find wrong on a GPU, and when they say so."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import microtome as mt
from microtome import errors
from microtome.ops.sparse_decode_csr import csr_decode, csr_grad_values
from microtome.testing import Case
from microtome.testing.paper import PaperGpu
from microtome.testing.triton import INTERPRETED, MARKS, RUNS

# A GPU of paper takes CPU tensors, so only the interpreter runs these.
pytestmark = [*MARKS, pytest.mark.skipif(not INTERPRETED, reason="TRITON_INTERPRET is not 1")]
if RUNS:
    pytest.importorskip("microtome.kernels.csr_rows")
    from microtome.kernels import batch_topk_encode, threshold_encode

CASE = Case("later", 5, 16, 400, 8)


def inputs_of(**bad: tuple[int, ...]) -> tuple[Tensor, ...]:
    i = CASE.inputs()
    for name, at in bad.items():
        i[name][at] = float("nan")
    return tuple(i[name] for name in ("x", "W_enc", "b_enc", "b_dec"))


def batch(*args: Tensor) -> tuple[Tensor, ...]:
    return batch_topk_encode.launch(*args, CASE.k, "exact", "auto", None, None)


def threshold(*args: Tensor, capacity: int | None) -> tuple[Tensor, ...]:
    theta = torch.full((CASE.f,), 6.0)
    return threshold_encode.launch(*args, theta, 1.0, capacity, "exact", "auto", None, None)


def test_nothing_is_read_back_where_the_sizes_are_known(gpu: PaperGpu, reads: list[str]) -> None:
    args = inputs_of()
    batch(*args)
    threshold(*args, capacity=2000)
    assert reads == []
    threshold(*args, capacity=None)
    assert reads == ["tolist"]
    assert sum(event.waited for event in gpu.events) == 0
    mt.synchronize()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of what a GPU does in silence
@pytest.mark.parametrize("capacity", [None, 4000, "batch"])
@pytest.mark.parametrize(("name", "at", "row"), [("x", (3, 1), 3), ("b_enc", (7,), 7)])
def test_what_is_not_finite_is_raised_later_and_marked_now(
    gpu: PaperGpu, capacity: Any, name: str, at: tuple[int, ...], row: int
) -> None:
    args = inputs_of(**{name: at})
    out = batch(*args) if capacity == "batch" else threshold(*args, capacity=capacity)
    marked = (out[-1] < 0).nonzero().flatten().tolist()
    assert marked == ([3] if name == "x" else list(range(CASE.n)))
    op = "batch_topk_encode" if capacity == "batch" else "threshold_encode"
    with pytest.raises(
        errors.NonFiniteError, match=rf"^{op}: {name} holds NaN or infinity in row {row}, the first"
    ):
        mt.synchronize()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_value_that_overflows_is_raised_later(gpu: PaperGpu) -> None:
    x = torch.full((3, 8), 3e38)
    x[0] = 0.0
    out = threshold_encode.launch(
        x, torch.full((400, 8), 3e38), None, None, None, 0.0, None, "exact", "auto", None, None
    )
    assert (out[-1] < 0).tolist() == [False, True, True]
    with pytest.raises(errors.NonFiniteError, match=r"x W_enc\^T holds NaN or infinity in row 1,"):
        mt.synchronize()


def test_entries_beyond_the_capacity_are_left_out_and_told_later(gpu: PaperGpu) -> None:
    usual = threshold(*inputs_of(), capacity=None)
    ends = usual[2].tolist()
    room = ends[2] + 1
    assert ends[3] > room
    assert int(usual[5][-1]) <= room
    got = threshold(*inputs_of(), capacity=room)
    assert torch.equal(got[0], usual[0][:room])
    assert torch.equal(got[1], usual[1][:room])
    assert torch.equal(got[2], usual[2].clamp(max=room))
    assert (got[6] < 0).tolist() == [False, False, True, True, True]
    text = (
        rf"^threshold_encode: capacity={room} must be larger, it has no room for all entries in "
        "row 2, the first such row, in an earlier call on cpu"
    )
    with pytest.raises(errors.ArgumentError, match=text):
        mt.synchronize()
    with mt.check_now(), pytest.raises(errors.ArgumentError, match=rf"{ends[-1]} entries, capac"):
        threshold(*inputs_of(), capacity=room)


@pytest.mark.parametrize("op", [csr_decode, csr_grad_values], ids=lambda op: op.name)
def test_indices_of_such_codes_are_clamped_before_any_backend_reads(gpu: PaperGpu, op: Any) -> None:
    offsets, W_dec = torch.tensor([0, 2, 3]), torch.ones(4, 2)
    first = torch.ones(3) if op is csr_decode else torch.ones(2, 2)
    args = (first, torch.tensor([1, 9, -1]), offsets, W_dec)
    assert op._within(torch.device("cpu"), args)[1].tolist() == [1, 3, 0]
    with pytest.raises(errors.ArgumentError, match=rf"^{op.name}: indices must lie in \[0, f=4\)"):
        mt.synchronize()
