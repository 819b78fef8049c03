"""`topk_encode` on Hopper GPUs: sample and filter by csrc/cuda/topk_encode.cu, the rest by Triton.

The filter has no scores to hand on, so every candidate's value is computed in float32.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, import-untyped"
from __future__ import annotations

from collections.abc import Callable

import torch
from microtome.kernels import topk_encode as encode
from microtome.kernels import topk_select as select
from microtome.kernels import topk_select_cuda as cuda_select
from microtome.kernels.bf16 import shadow_rows
from torch import Tensor

from microtome import _native

_TILE = 256  # features
_GROUPS = (16, 4, 1)  # sampled features behind one stored maximum


def launch(
    x: Tensor, W_enc: Tensor, b_enc: Tensor | None, b_dec: Tensor | None, k: int,
    precision: str, kind: str, shadow: Tensor | None, stats: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`topk_encode`, as the Triton kernels answer it: the same bits, other candidates."""
    given = (shadow, stats) if kind == "bf16" and shadow is not None and stats is not None else None
    plan = encode.plan(x.shape[0], W_enc.shape[0], k, _TILE)
    out: tuple[Tensor, Tensor, Tensor] = encode.run(
        plan, x, W_enc, b_enc, b_dec, k, given, fill=_fill, choose=cuda_select.select
    )
    return out


def _fill(
    p: encode.Plan, x: Tensor, b_dec: Tensor | None, w_shadow: Tensor, w_stats: Tensor,
    b_enc: Tensor | None, lists: select.Lists,
) -> None:  # fmt: skip
    x_shadow, x_stats = shadow_rows(x, b_dec)
    x_shadow, w_shadow = (_aligned(t)[:, : x.shape[1]] for t in (x_shadow, w_shadow))
    screen(x_shadow, x_stats, w_shadow, w_stats, b_enc, p.stride, p.rank, lists)


def _aligned(shadow: Tensor) -> Tensor:
    """Rows that begin on 16 bytes, as the copy engine reads them; a copy where they do not.

    One row is contiguous whatever its stride, also 0, which no tensor map has.
    """
    (_, d), stride = shadow.shape, shadow.stride(0)
    if shadow.data_ptr() % 16 == 0 and stride % 8 == 0 and stride >= d:
        return shadow
    copy = shadow.new_empty(shadow.shape[0], -(-d // 8) * 8)
    copy[:, :d] = shadow
    return copy


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
    x: Tensor,
    x_stats: Tensor,
    w: Tensor,
    w_stats: Tensor,
    b_enc: Tensor | None,
    lists: select.Lists,
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
    rank: int, lists: select.Lists,
    threshold: Callable[[Tensor, int, Tensor], None] = select.threshold,
) -> None:  # fmt: skip
    """Predict each row's threshold from a sample, and fill its list.

    No host synchronisation, and safe to capture in a CUDA graph.
    """
    b_enc = None if b_enc is None else b_enc.float().contiguous()
    group, groups = groups_of(w.shape[0], stride, rank)
    maxima = torch.empty(x.shape[0], groups, dtype=torch.float32, device=x.device)
    with _native.device_of(x):
        sample(x, w, b_enc, stride, group, maxima)
        threshold(maxima, rank, lists.theta)
        keep(x, x_stats, w, w_stats, b_enc, lists)
