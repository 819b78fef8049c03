"""From candidate lists to the answer of `topk_encode`, in CUDA C++: csrc/cuda/topk_select.cu."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from microtome import _native

if TYPE_CHECKING:
    from microtome.kernels.topk_select import Lists

_HAS = (torch.float32, torch.bfloat16)
WIDEST, MOST_ACTIVE = 49152, 8192  # columns whose float32 fit shared memory; keys sorted in it


def why_not(x: Tensor, W_enc: Tensor, k: int) -> str | None:
    """None when these kernels are there and take these sizes, else the reason."""
    reason = _native.why_no_cuda()
    if reason:
        return reason
    wanted = "cpu" if _native.emulates_cuda() else "cuda"
    if x.device.type != wanted:
        return f"device is {x.device.type} (needs {wanted})"
    if x.dtype not in _HAS or W_enc.dtype != x.dtype:
        return f"dtypes are {x.dtype} and {W_enc.dtype} (has one of float32, bfloat16)"
    if W_enc.shape[1] > WIDEST or k > MOST_ACTIVE:
        return f"d={W_enc.shape[1]}, k={k} (needs d <= {WIDEST}, k <= {MOST_ACTIVE})"
    return None


def fill_values(
    lists: Lists, x: Tensor, W_enc: Tensor, b_enc: Tensor | None, b_dec: Tensor | None
) -> None:
    """Compute the float32 pre-activations of the listed features.

    A list as long as W_enc is filled with every feature.
    """
    everything = lists.index.shape[1] == W_enc.shape[0]
    if everything:
        lists.count.fill_(W_enc.shape[0])
    with _native.device_of(x):
        _native.cuda().candidate_values(
            x.dtype == torch.bfloat16, *map(_native.address, (x, W_enc, b_enc, b_dec)),
            *map(_native.address, (lists.count, lists.index, lists.value)),
            *x.shape, lists.index.shape[1], everything, _native.stream(x),
        )  # fmt: skip


def select(
    lists: Lists, k: int, f: int, values: Tensor, indices: Tensor, candidates: Tensor,
    listed: bool = False,
) -> None:  # fmt: skip
    """Write the k best candidates of every row and list the rows whose candidates fell short.

    With `listed` only the rows in `lists.failed` are answered: after their repair.
    """
    with _native.device_of(values):
        _native.cuda().select_candidates(
            values.dtype == torch.bfloat16,
            *map(_native.address, (lists.theta, lists.count, lists.index, lists.value)),
            *map(_native.address, (lists.failed, lists.failures, values, indices, candidates)),
            lists.count.shape[0], k, f, lists.index.shape[1], listed, _native.stream(values),
        )  # fmt: skip


def answer(
    lists: Lists, x: Tensor, W_enc: Tensor, b_enc: Tensor | None, b_dec: Tensor | None, k: int,
    values: Tensor, indices: Tensor, candidates: Tensor,
) -> None:  # fmt: skip
    """`topk_select.answer` up to the repair: rows in `lists.failed` are still to be repaired.

    Args:
        lists: the candidates; their values are written.
        x: [n, d] contiguous, float32 or bfloat16.
        W_enc: [f, d] contiguous, dtype of x.
        b_enc: [f] or None.
        b_dec: [d], subtracted from every row of x, or None.
        k: how many of each row to keep.
        values: [n, k], dtype of x, written: value descending, then index ascending.
        indices: [n, k] int32, written.
        candidates: [n] int32, written: how many features passed the screen.
    """
    fill_values(lists, x, W_enc, b_enc, b_dec)
    select(lists, k, W_enc.shape[0], values, indices, candidates)
