"""Gather active decoder rows, and the two gradients of doing so. float32 accumulation, no
atomics."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, import-untyped"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from microtome.kernels.segments import (
    CHUNK,
    add_entries,
    add_partials,
    partial_sums,
    sort_by_latent,
    tile,
)
from torch import Tensor

WIDEST = 1024  # columns of a gathered tile


@triton.jit
def _sparse_decode_kernel(
    values, indices, W_dec, b_dec, out, n, k, d, stride_f, stride_d,
    HAS_BIAS: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    column = tl.program_id(1) * BD + tl.arange(0, BD)
    live = row < n
    mask = live[:, None] & (column < d)[None, :]
    acc = tl.zeros((BN, BD), tl.float32)
    for j in range(0, k):
        feature = tl.load(indices + row * k + j, mask=live, other=0).to(tl.int64)
        value = tl.load(values + row * k + j, mask=live, other=0.0).to(tl.float32)
        place = feature[:, None] * stride_f + column[None, :].to(tl.int64) * stride_d
        acc += value[:, None] * tl.load(W_dec + place, mask=mask, other=0.0).to(tl.float32)
    if HAS_BIAS:
        acc += tl.load(b_dec + column, mask=column < d, other=0.0).to(tl.float32)[None, :]
    tl.store(out + row[:, None] * d + column[None, :], acc.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _sparse_decode_grad_values_kernel(
    grad_out,
    indices,
    W_dec,
    out,
    entries,
    k,
    d,
    stride_f,
    stride_d,
    BE: tl.constexpr,
    BD: tl.constexpr,
):
    entry = tl.program_id(0).to(tl.int64) * BE + tl.arange(0, BE)  # row * k + j
    live = entry < entries
    feature = tl.load(indices + entry, mask=live, other=0).to(tl.int64)
    row = entry // k
    acc = tl.zeros((BE, BD), tl.float32)
    for start in range(0, d, BD):
        column = start + tl.arange(0, BD)
        mask = live[:, None] & (column < d)[None, :]
        g = tl.load(grad_out + row[:, None] * d + column[None, :], mask=mask, other=0.0).to(
            tl.float32
        )
        place = feature[:, None] * stride_f + column[None, :].to(tl.int64) * stride_d
        acc += g * tl.load(W_dec + place, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + entry, tl.sum(acc, 1).to(out.dtype.element_ty), mask=live)


@triton.jit
def _sparse_decode_grad_W_dec_kernel(
    weight, source, offsets, partial, grad_out, out, n, f, d,
    CHUNK: tl.constexpr, BL: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    latent = tl.program_id(0).to(tl.int64) * BL + tl.arange(0, BL)
    column = tl.program_id(1) * BD + tl.arange(0, BD)
    live = latent < f
    begin = tl.load(offsets + latent, mask=live, other=0)
    end = tl.load(offsets + latent + 1, mask=live, other=0)
    acc = tl.zeros((BL, BD), tl.float32)
    acc, begin = add_partials(acc, partial, begin, end, column, d, CHUNK)
    acc = add_entries(acc, weight, source, grad_out, grad_out, begin, end, column, n, d)
    mask = live[:, None] & (column < d)[None, :]
    tl.store(out + latent[:, None] * d + column[None, :], acc.to(out.dtype.element_ty), mask=mask)


def launch(values: Tensor, indices: Tensor, W_dec: Tensor, b_dec: Tensor | None) -> Tensor:
    """`sparse_decode`: a program per block of rows and of columns."""
    (n, k), d = values.shape, W_dec.shape[1]
    out = torch.empty(n, d, dtype=values.dtype, device=values.device)
    if out.numel() == 0:
        return out
    BN, BD = tile(n, d, not values.is_cuda, WIDEST)
    with torch.cuda.device_of(values):
        _sparse_decode_kernel[(triton.cdiv(n, BN), triton.cdiv(d, BD))](
            values.contiguous(), indices.contiguous(), W_dec,
            W_dec if b_dec is None else b_dec.contiguous(),
            out, n, k, d, W_dec.stride(0), W_dec.stride(1), HAS_BIAS=b_dec is not None, BN=BN,
            BD=BD,
            enable_fp_fusion=True,
        )  # fmt: skip
    return out


def launch_grad_values(grad_out: Tensor, indices: Tensor, W_dec: Tensor) -> Tensor:
    """`sparse_decode_grad_values`: a program per block of (row, feature) pairs."""
    (n, k), d = indices.shape, W_dec.shape[1]
    out = torch.empty(n, k, dtype=grad_out.dtype, device=grad_out.device)
    if out.numel() == 0:
        return out
    BE, BD = tile(n * k, d, not grad_out.is_cuda, WIDEST)
    with torch.cuda.device_of(grad_out):
        _sparse_decode_grad_values_kernel[(triton.cdiv(n * k, BE),)](
            grad_out.contiguous(), indices.contiguous(), W_dec, out, n * k, k, d,
            W_dec.stride(0), W_dec.stride(1), BE=BE, BD=BD, enable_fp_fusion=True,
        )  # fmt: skip
    return out


def launch_grad_W_dec(values: Tensor, indices: Tensor, grad_out: Tensor, f: int) -> Tensor:
    """`sparse_decode_grad_W_dec`: entries sorted, a program per block of latents and of columns."""
    (n, k), d = values.shape, grad_out.shape[1]
    out = torch.empty(f, d, dtype=values.dtype, device=values.device)
    if out.numel() == 0:
        return out
    segments = sort_by_latent(indices.flatten(), f)
    weight = values.flatten()[segments.order].float()
    source = (segments.order // max(k, 1)).int()
    grad_out = grad_out.contiguous()
    BL, BD = tile(f, d, not values.is_cuda, WIDEST, 1024)
    with torch.cuda.device_of(values):
        partial = partial_sums(segments, weight, source, grad_out, grad_out)
        _sparse_decode_grad_W_dec_kernel[(triton.cdiv(f, BL), triton.cdiv(d, BD))](
            weight, source, segments.offsets, partial, grad_out, out, n, f, d,
            CHUNK=CHUNK, BL=BL, BD=BD, enable_fp_fusion=True,
        )  # fmt: skip
    return out
