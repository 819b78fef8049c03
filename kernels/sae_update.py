"""One optimizer step of an SAE: gradients, projection, rule and renorm in one pass over the
weights."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, import-untyped"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from microtome.kernels.bf16 import norm_above, round_to_bf16
from microtome.kernels.segments import (
    CHUNK,
    add_entries,
    add_partials,
    partial_sums,
    sort_by_latent,
    tile,
)
from torch import Tensor

from microtome._look import look_after_writing

# At most. Each program sums its latents' share of b_dec's gradient, so the number must not vary by
# machine.
PROGRAMS = 2048


@triton.jit
def _step(p, g, m_at, v_at, m_mask, lr, beta1, rest1, beta2, rest2, eps, decay, shrink, root,
          OPTIMIZER: tl.constexpr, MOMENTUM: tl.constexpr):  # fmt: skip
    """One step of the rule on p with gradient g; the moments are read and written at m_at and v_at.

    lr holds Adam's 1 / (1 - beta1^t), root is sqrt(1 - beta2^t), rest is 1 - beta, shrink 1 - lr *
    decoupled decay.
    """
    g = g + decay * p
    p = p * shrink
    if OPTIMIZER == "adam":
        m = tl.load(m_at, mask=m_mask, other=0.0)
        v = tl.load(v_at, mask=m_mask, other=0.0)
        m = m + rest1 * (g - m)
        v = beta2 * v + rest2 * (g * g)
        tl.store(m_at, m, mask=m_mask)
        tl.store(v_at, v, mask=m_mask)
        p = p - lr * tl.div_rn(
            m, tl.div_rn(tl.sqrt_rn(v), tl.full(v.shape, root, tl.float32)) + eps
        )
    else:
        if MOMENTUM:
            m = beta1 * tl.load(m_at, mask=m_mask, other=0.0)
            m = m + (rest1 * g if OPTIMIZER == "signsgd" else g)
            tl.store(m_at, m, mask=m_mask)
            g = m
        if OPTIMIZER == "signsgd":
            g = tl.where(g > 0.0, 1.0, tl.where(g < 0.0, -1.0, 0.0))
        p = p - lr * g
    return p


@triton.jit
def _sae_update_kernel(
    value, grad_value, source, offsets, dec_partial, enc_partial, touched, x, grad_out,
    aux_grad_out,
    W_enc, b_enc, W_dec, m_W_enc, v_W_enc, m_b_enc, v_b_enc, m_W_dec, v_W_dec, shadow, stats,
    centre,
    n, f, d, turns, shadow_stride,
    lr, beta1, rest1, beta2, rest2, eps, decay, shrink, root,
    OPTIMIZER: tl.constexpr, MOMENTUM: tl.constexpr, ROWSPARSE: tl.constexpr, PROJECT: tl.constexpr,
    RENORM: tl.constexpr, CENTER: tl.constexpr, SHADOW: tl.constexpr,
    CHUNK: tl.constexpr, BE: tl.constexpr, BL: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BD)
    sum_centre = tl.zeros((BD,), tl.float32)
    for turn in range(0, turns):
        latent = (program * turns + turn) * BL + tl.arange(0, BL)
        live = latent < f
        begin = tl.load(offsets + latent, mask=live, other=0)
        end = tl.load(offsets + latent + 1, mask=live, other=0)
        mask = live[:, None] & (column < d)[None, :]
        place = latent[:, None] * d + column[None, :]

        db = tl.zeros((BL,), tl.float32)
        for first in range(0, tl.max(end - begin, 0), BE):
            entry = begin[:, None] + first + tl.arange(0, BE)[None, :]
            db += tl.sum(tl.load(grad_value + entry, mask=entry < end[:, None], other=0.0), 1)
        enc = tl.load(W_enc + place, mask=mask, other=0.0)  # [BL, BD]
        if CENTER:
            sum_centre += tl.sum(db[:, None] * enc, 0)

        d_enc = tl.zeros((BL, BD), tl.float32)
        d_enc, rest = add_partials(d_enc, enc_partial, begin, end, column, d, CHUNK)
        d_enc = add_entries(d_enc, grad_value, source, x, x, rest, end, column, n, d)
        if ROWSPARSE:
            live = live & (tl.load(touched + latent, mask=live, other=0) > 0)
            mask = live[:, None] & (column < d)[None, :]
        enc = _step(enc, d_enc, m_W_enc + place, v_W_enc + place, mask, lr, beta1, rest1, beta2,
        rest2, eps,
                    decay, shrink, root, OPTIMIZER, MOMENTUM)  # fmt: skip
        tl.store(W_enc + place, enc, mask=mask)
        if SHADOW:
            enc = tl.where(mask, enc, 0.0)
            bits, rounded = round_to_bf16(enc)
            lost = enc - rounded
            tl.store(shadow + latent[:, None] * shadow_stride + column[None, :], bits, mask=mask)
            tl.store(stats + latent * 4 + 1, norm_above(tl.sum(enc * enc, 1), d), mask=live)
            tl.store(stats + latent * 4 + 2, norm_above(tl.sum(lost * lost, 1), d), mask=live)
        b = tl.load(b_enc + latent, mask=live, other=0.0)
        b = _step(b, db, m_b_enc + latent, v_b_enc + latent, live, lr, beta1, rest1, beta2, rest2,
        eps,
                  0.0, 1.0, root, OPTIMIZER, MOMENTUM)  # fmt: skip
        tl.store(b_enc + latent, b, mask=live)

        d_dec = tl.zeros((BL, BD), tl.float32)
        d_dec, rest = add_partials(d_dec, dec_partial, begin, end, column, d, CHUNK)
        d_dec = add_entries(d_dec, value, source, grad_out, aux_grad_out, rest, end, column, n, d)
        dec = tl.load(W_dec + place, mask=mask, other=0.0)
        if PROJECT:
            along = tl.sum(d_dec * dec, 1) / tl.maximum(tl.sum(dec * dec, 1), 1e-30)
            d_dec -= along[:, None] * dec
        dec = _step(dec, d_dec, m_W_dec + place, v_W_dec + place, mask, lr, beta1, rest1, beta2,
        rest2, eps,
                    decay, shrink, root, OPTIMIZER, MOMENTUM)  # fmt: skip
        if RENORM:
            dec = tl.where(mask, dec, 0.0)
            length = tl.maximum(tl.sqrt_rn(tl.sum(dec * dec, 1)), 1e-30)
            dec = tl.div_rn(dec, length[:, None] + tl.zeros((BL, BD), tl.float32))
        tl.store(W_dec + place, dec, mask=mask)
    if CENTER:
        tl.store(centre + program * d + column, sum_centre, mask=column < d)


@triton.jit
def _sae_update_bias_kernel(
    b_dec, grad, m_b_dec, v_b_dec, d, lr, beta1, rest1, beta2, rest2, eps, root,
    OPTIMIZER: tl.constexpr, MOMENTUM: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0) * BD + tl.arange(0, BD)
    mask = column < d
    b = tl.load(b_dec + column, mask=mask, other=0.0)
    g = tl.load(grad + column, mask=mask, other=0.0)
    b = _step(b, g, m_b_dec + column, v_b_dec + column, mask, lr, beta1, rest1, beta2, rest2, eps,
              0.0, 1.0, root, OPTIMIZER, MOMENTUM)  # fmt: skip
    tl.store(b_dec + column, b, mask=mask)


def geometry(f: int, d: int, interpreted: bool) -> tuple[int, int, int, int, int]:
    """Programs, turns of each, latents and columns of a turn, warps."""
    BL, BD = tile(f, d, interpreted, size=1024)
    blocks = triton.cdiv(f, BL)
    turns = triton.cdiv(blocks, PROGRAMS)
    return triton.cdiv(blocks, turns), turns, BL, BD, min(max(BL * BD // 128, 1), 16)


def launch(
    indices: Tensor, values: Tensor, grad_values: Tensor, grad_out: Tensor, scale: float,
    aux_indices: Tensor | None, aux_values: Tensor | None, aux_grad_values: Tensor | None,
    aux_grad_out: Tensor | None, aux_scale: float,
    x: Tensor, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, b_dec: Tensor,
    m_W_enc: Tensor | None, v_W_enc: Tensor | None, m_b_enc: Tensor | None, v_b_enc: Tensor | None,
    m_W_dec: Tensor | None, v_W_dec: Tensor | None, m_b_dec: Tensor | None, v_b_dec: Tensor | None,
    kind: str, shadow: Tensor | None, stats: Tensor | None,
    optimizer: str, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float,
    step: int,
    rowsparse: bool, project: bool, renorm: bool, center: bool,
) -> Tensor:  # fmt: skip
    """`sae_update`: sort the entries by latent; a program updates all parameters of a run of
    latents.

    With a screen a step that went beyond float32 is an error: on a GPU that of a later call
    (_pending.py), while a CUDA graph is captured none.
    """
    (n, k), (f, d) = indices.shape, W_enc.shape
    x, grad_out = x.contiguous(), grad_out.contiguous()
    flat, value, grad_value = indices.flatten(), values.flatten(), grad_values.flatten()
    weight, grad_weight, other = value * scale, grad_value * scale, grad_out
    if aux_indices is not None:
        assert aux_values is not None
        assert aux_grad_values is not None
        assert aux_grad_out is not None
        flat = torch.cat([flat.long(), aux_indices.flatten().long()])
        value = torch.cat([value, aux_values.flatten()])
        weight = torch.cat([weight, aux_values.flatten() * aux_scale])
        grad_weight = torch.cat([grad_weight, aux_grad_values.flatten() * aux_scale])
        other = aux_grad_out.contiguous()
    a = 1 if aux_indices is None else max(aux_indices.shape[1], 1)
    segments = sort_by_latent(flat, f)
    order = segments.order
    source = torch.where(order < n * k, order // max(k, 1), n + (order - n * k) // a).int()
    weight, grad_weight = weight[order].float(), grad_weight[order].float()
    fired = _count((value[order] > 0) & (order < n * k), segments.offsets)
    touched = _count(value[order] != 0, segments.offsets) if rowsparse else fired

    adam = optimizer in ("adam", "adamw")
    decoupled = optimizer in ("adamw", "signsgd")
    rate = lr / (1 - beta1**step) if adam else lr
    root = (1 - beta2**step) ** 0.5 if adam else 1.0
    decay, shrink = (0.0, 1 - lr * weight_decay) if decoupled else (weight_decay, 1.0)
    rule = (rate, beta1, 1 - beta1, beta2, 1 - beta2, eps)
    kinds = {"OPTIMIZER": "adam" if adam else optimizer, "MOMENTUM": m_W_enc is not None}
    programs, turns, BL, BD, warps = geometry(f, d, not x.is_cuda)
    moments = [
        x if t is None else t for t in (m_W_enc, v_W_enc, m_b_enc, v_b_enc, m_W_dec, v_W_dec)
    ]
    refresh = shadow is not None and stats is not None and kind == "bf16"
    centre = torch.empty(programs if center else 0, d, dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        dec_partial = partial_sums(segments, weight, source, grad_out, other)
        enc_partial = partial_sums(segments, grad_weight, source, x, x)
        _sae_update_kernel[(programs,)](
            weight, grad_weight, source, segments.offsets, dec_partial, enc_partial, touched, x,
            grad_out, other,
            W_enc, b_enc, W_dec, *moments, shadow if refresh else x, stats if refresh else x,
            centre,
            n, f, d, turns, shadow.stride(0) if refresh and shadow is not None else d,
            *rule, decay, shrink, root, **kinds, ROWSPARSE=rowsparse, PROJECT=project,
            RENORM=renorm,
            CENTER=center, SHADOW=refresh, CHUNK=CHUNK, BE=32, BL=BL, BD=BD, num_warps=warps,
            enable_fp_fusion=True,
        )  # fmt: skip
        grad = scale * grad_out.sum(0) - centre.sum(0)
        _sae_update_bias_kernel[(triton.cdiv(d, 256),)](
            b_dec, grad, x if m_b_dec is None else m_b_dec, x if v_b_dec is None else v_b_dec,
            d, *rule, root, **kinds, BD=256, enable_fp_fusion=True,
        )  # fmt: skip
    if refresh and stats is not None:
        look_after_writing("sae_update", "W_enc", W_enc, norms=stats[:, 1])
    return fired


def _count(flags: Tensor, offsets: Tensor) -> Tensor:
    """How many flags are set in each segment, [f] int32."""
    before = torch.nn.functional.pad(flags.cumsum(0), (1, 0))
    return (before[offsets[1:]] - before[offsets[:-1]]).int()
