"""The screen of `topk_encode` on Hopper GPUs: prediction and filter by csrc/cuda/topk_encode.cu."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from microtome import _native

_TILE = 256  # features
_GROUPS = (16, 4, 1)  # sampled features behind one stored maximum


class Lists(Protocol):
    """Candidates of some rows: the part of kernels/topk_select.py's `Lists` that a screen fills.

    Attributes:
        theta: [rows] float32 thresholds.
        count: [rows] int32, zero: features that passed, also those beyond the capacity.
        index: [rows, capacity] int32: the candidates in no particular order.
    """

    theta: Tensor
    count: Tensor
    index: Tensor


def why_not(x_shadow: Tensor, w_shadow: Tensor) -> str | None:
    """None where these bf16 rows can be screened here, else the reason in a few words.

    The kernels use instructions of compute capability 9.0 that no other has.
    """
    reason = _native.why_no_cuda()
    if reason:
        return reason
    if x_shadow.is_cuda and torch.cuda.get_device_capability(x_shadow.device) != (9, 0):
        return "the device is not of compute capability 9.0"
    if not (x_shadow.is_cuda or _native.emulates_cuda()):
        return f"device is {x_shadow.device.type} (needs cuda)"
    if x_shadow.shape[1] == 0:
        return "d is 0"
    for shadow in (x_shadow, w_shadow):
        if shadow.data_ptr() % 16 or shadow.stride(0) % 8 or shadow.stride(1) != 1:
            return "rows must be 16-byte aligned (a d that is a multiple of 8)"
    return None


def groups_of(f: int, stride: int, rank: int) -> tuple[int, int]:
    """How many sampled features stand behind one stored maximum, and how many maxima a row has.

    The rank-th largest of a few maxima lies far below the rank-th largest of what is behind them,
    so there are four times as many as the rank, where the sample has so many.
    """
    sampled = -(-f // stride)
    tiles = -(-sampled // _TILE)
    for group in _GROUPS:
        if tiles * (_TILE // group) >= 4 * rank:
            break
    return group, tiles * (_TILE // group)


def sample(
    x: Tensor, w: Tensor, b_enc: Tensor | None, stride: int, group: int, maxima: Tensor
) -> None:
    """Write the maxima of groups of every stride-th feature's scores.

    Args:
        x: [rows, d] bf16, 16-byte aligned rows.
        w: [f, d] likewise.
        b_enc: [f] float32, or None for zero.
        stride: every stride-th feature is sampled, from the first.
        group: 1, 4 or 16 features behind a maximum.
        maxima: [rows, groups] float32, with the groups of `groups_of`; -inf where no feature is.
    """
    _native.cuda().topk_encode_sample(
        x.data_ptr(), x.stride(0), w.data_ptr(), w.stride(0), _native.address(b_enc),
        maxima.data_ptr(), x.shape[0], w.shape[0], x.shape[1], stride, group, _native.stream(x),
    )  # fmt: skip


def keep(
    x: Tensor, x_stats: Tensor, w: Tensor, w_stats: Tensor, b_enc: Tensor | None, lists: Lists
) -> None:
    """Append to the lists every feature whose float32 value may reach the row's threshold.

    Args:
        x: [rows, d] bf16, 16-byte aligned rows.
        x_stats: [rows, 4] float32: 1, the norm before rounding, the norm of what rounding lost, 0.
        w: [f, d] likewise.
        w_stats: [f, 4] likewise.
        b_enc: [f] float32, or None for zero.
        lists: theta is read, count and index are written.
    """
    _native.cuda().topk_encode_filter(
        x.data_ptr(), x.stride(0), x_stats.data_ptr(), w.data_ptr(), w.stride(0),
        w_stats.data_ptr(), _native.address(b_enc), lists.theta.data_ptr(),
        lists.count.data_ptr(), lists.index.data_ptr(), x.shape[0], w.shape[0], x.shape[1],
        lists.index.shape[1], _native.stream(x),
    )  # fmt: skip


def screen(
    x: Tensor, x_stats: Tensor, w: Tensor, w_stats: Tensor, b_enc: Tensor | None, stride: int,
    rank: int, threshold: Callable[[Tensor, int, Tensor], None], lists: Lists,
) -> None:  # fmt: skip
    """Predict each row's threshold from a sample, and fill its list.

    Two launches and `threshold`, which writes the rank-th largest of each row's maxima to
    lists.theta; no host synchronisation, and safe to capture in a CUDA graph.
    """
    b_enc = None if b_enc is None else b_enc.float().contiguous()
    group, groups = groups_of(w.shape[0], stride, rank)
    maxima = torch.empty(x.shape[0], groups, dtype=torch.float32, device=x.device)
    with _native.device_of(x):
        sample(x, w, b_enc, stride, group, maxima)
        threshold(maxima, rank, lists.theta)
        keep(x, x_stats, w, w_stats, b_enc, lists)
