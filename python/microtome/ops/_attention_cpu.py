"""cascade_attention and swap_key_attention in C++: addresses and strides in, errors out."""

from __future__ import annotations

import torch
from torch import Tensor

from microtome import _native
from microtome.ops import _attention_rows as inputs
from microtome.ops._registry import why_not_common


def why_not(*args: object) -> str | None:
    """Why the C++ kernels cannot take these arguments, or None."""
    return why_not_common("cpu", [a for a in args if isinstance(a, Tensor)], (torch.float32,))


def _view(tensor: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """A tensor [(b,) tokens, heads, width] whose elements of a head adjoin, copied only if not.

    With it, what the kernel is told of it: the address and the strides of example, token and head.
    """
    if tensor.stride(-1) != 1 and tensor.shape[-1] != 1:
        tensor = tensor.contiguous()
    strides = tensor.stride()[:-1]
    return tensor, (tensor.data_ptr(), *(0,) * (3 - len(strides)), *strides)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_base: Tensor,
    v_base: Tensor,
    rows: Tensor,
    q_positions: Tensor,
    first: Tensor,
    scale: float,
    softcap: float,
    window: int,
) -> tuple[Tensor, Tensor]:
    """csrc/cpu/cascade_attention_kernel.h; no tensor is copied whose last stride is 1."""
    Tq, h, dh = q.shape
    T, hk, dv = v.shape
    b, t = k_base.shape[:2]
    _held, views = zip(*map(_view, (q, k, v, k_base, v_base)), strict=True)
    tables = [_native.saturated(table) for table in (rows, q_positions, first)]
    z, lse = _native.empty(Tq, h, dv), _native.empty(Tq, h)
    code, at = _native.module().cascade_attention(
        *views, *(table.data_ptr() for table in tables), (Tq, T, len(rows), b, t, h, hk, dh, dv),
        scale, softcap, window, z.data_ptr(), lse.data_ptr(), _native.forced_isa(),
        _native.threads(),
    )  # fmt: skip
    if code:
        inputs.raise_cascade(code, at, rows, q_positions, first, (Tq, T, b, t))
    return z, lse


def swap(
    z: Tensor,
    lse: Tensor,
    q: Tensor,
    k_base: Tensor,
    v_base: Tensor,
    q_new: Tensor,
    k_new: Tensor,
    v_new: Tensor,
    rows: Tensor,
    first: Tensor,
    scale: float,
    softcap: float,
    window: int,
    total: int,
) -> Tensor:
    """csrc/cpu/cascade_attention_kernel.h; no tensor is copied whose last stride is 1."""
    b, t, h, dh = q.shape
    hk, dv = v_base.shape[2:]
    tensors = (z, lse[..., None], q, k_base, v_base, q_new, k_new, v_new)
    _held, views = zip(*map(_view, tensors), strict=True)
    tables = [_native.saturated(table) for table in (rows, first)]
    out = _native.empty(max(total, 0), h, dv)
    code, at = _native.module().swap_key_attention(
        *views, *(table.data_ptr() for table in tables), (total, len(rows), b, t, h, hk, dh, dv),
        scale, softcap, window, out.data_ptr(), _native.forced_isa(), _native.threads(),
    )  # fmt: skip
    if code:
        inputs.raise_swap(code, at, rows, (b, t), total)
    return out
