"""Decode, squared error and the gradient of the values; a row's residual stays in registers."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, import-untyped"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from microtome.kernels.segments import tile
from torch import Tensor


def warps(BN: int, BD: int) -> int:
    """16 elements of a tile a thread."""
    return min(max(BN * BD // 512, 1), 16)


@triton.jit
def _sae_loss_kernel(
    x, values, indices, W_dec, b_dec, sse, grad_out, grad_values, n, k, d, stride_f, stride_d,
    HAS_BIAS: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    column = tl.arange(0, BD)
    live = row < n
    mask = live[:, None] & (column < d)[None, :]
    offset = column[None, :].to(tl.int64) * stride_d
    e = -tl.load(x + row[:, None] * d + column[None, :], mask=mask, other=0.0).to(
        tl.float32
    )  # [BN, BD]
    if HAS_BIAS:
        e += tl.load(b_dec + column, mask=column < d, other=0.0).to(tl.float32)[None, :]
    for j in range(0, k):
        feature = tl.load(indices + row * k + j, mask=live, other=0).to(tl.int64)
        value = tl.load(values + row * k + j, mask=live, other=0.0).to(tl.float32)
        w = tl.load(W_dec + feature[:, None] * stride_f + offset, mask=mask, other=0.0)
        e += value[:, None] * w.to(tl.float32)
    e = tl.where(mask, e, 0.0)
    tl.store(sse + row, tl.sum(e * e, 1), mask=live)
    g = 2.0 * e
    tl.store(
        grad_out + row[:, None] * d + column[None, :], g.to(grad_out.dtype.element_ty), mask=mask
    )
    for j in range(0, k):
        feature = tl.load(indices + row * k + j, mask=live, other=0).to(tl.int64)
        # A value cut by the ReLU has no gradient, so its row is not read again.
        used = tl.load(values + row * k + j, mask=live, other=0.0).to(tl.float32) != 0.0
        w = tl.load(
            W_dec + feature[:, None] * stride_f + offset, mask=mask & used[:, None], other=0.0
        )
        dot = tl.sum(g * w.to(tl.float32), 1)  # [BN]
        tl.store(grad_values + row * k + j, dot.to(grad_values.dtype.element_ty), mask=live)


def launch(
    x: Tensor, values: Tensor, indices: Tensor, W_dec: Tensor, b_dec: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """`sae_loss`: a program per block of rows."""
    (n, k), d = values.shape, W_dec.shape[1]
    sse = torch.empty(n, dtype=torch.float32, device=x.device)
    grad_out = torch.empty(n, d, dtype=x.dtype, device=x.device)
    grad_values = torch.empty(n, k, dtype=x.dtype, device=x.device)
    if n:
        BN, BD = tile(n, d, not x.is_cuda)
        with torch.cuda.device_of(x):
            _sae_loss_kernel[(triton.cdiv(n, BN),)](
                x.contiguous(), values.contiguous(), indices.contiguous(), W_dec,
                W_dec if b_dec is None else b_dec.contiguous(), sse, grad_out, grad_values, n, k, d,
                W_dec.stride(0), W_dec.stride(1), HAS_BIAS=b_dec is not None, BN=BN, BD=BD,
                num_warps=warps(BN, BD),
                enable_fp_fusion=True,
            )  # fmt: skip
    return sse, grad_out, grad_values
