"""One optimizer step of an SAE: gradients, projection, rule and renorm in one pass over the
weights.

Two kernels, one for each matrix: a program walks through a run of latents, adds up a latent's
gradient in registers from the rows of its entries, and reads and writes parameter and moments once.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, import-untyped"
from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from microtome.kernels.bf16 import norm_above
from microtome.kernels.sae_update_entries import sort_entries
from microtome.kernels.sae_update_rows import copied, dot, gradient, plus, rows_at, shadowed, start
from microtome.kernels.sae_update_states import BLOCK, moments, moved, moved_by
from microtome.kernels.segments import CHUNK, partial_sums
from torch import Tensor

from microtome import _check
from microtome._look import look_after_writing
from microtome._seed import step_key

# At most. Each program sums its latents' share of b_dec's gradient, so the number must not vary by
# machine.
PROGRAMS = 2048
# At most 128 registers a thread, so that two programs of eight warps fit on a multiprocessor.
OPTIONS = {"maxnreg": 128, "enable_fp_fusion": True}
SCALARS = ["key"]  # changes every step: not to be compiled for


@triton.jit(do_not_specialize=SCALARS)
def _encoder_kernel(
    grad_weight, source, flags, offsets, partial, x, W_enc, b_enc, m_W, v_W, m_b, v_b, shadow,
    stats, copy, place, extra_W, extra_b, centre, fired, touched, verdict,
    n, f, d, turns, shadow_stride, row_bytes, key,
    lr, beta1, rest1, beta2, rest2, eps, decay, shrink, correction,
    OPTIMIZER: tl.constexpr, MOMENTUM: tl.constexpr, STATE: tl.constexpr, ROWSPARSE: tl.constexpr,
    CENTER: tl.constexpr, SHADOW: tl.constexpr, COPY: tl.constexpr, EXTRA: tl.constexpr,
    FLIGHT: tl.constexpr, CHUNK: tl.constexpr, BE: tl.constexpr, BL: tl.constexpr,
    BD: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    if tl.load(verdict) != 0.0:  # NaN: an input is wrong, and nothing may be written
        return
    rule = (lr, beta1, rest1, beta2, rest2, eps, decay, shrink, correction)
    of_bias = (lr, beta1, rest1, beta2, rest2, eps, 0.0, 1.0, correction)
    HELD: tl.constexpr = BL > 1 or BD <= 2048
    sum_centre = tl.zeros((BL, BD if HELD else 1), tl.float32)
    if BT > 0:
        sum_tail = tl.zeros((BL, BT if HELD else 1), tl.float32)
    if CENTER:
        start(centre, program, d, HELD, 0, BD)
        if BT > 0:
            start(centre, program, d, HELD, BD, BT)
    for turn in range(0, turns):
        row = (program * turns + turn) * BL + tl.arange(0, BL)
        live = row < f
        begin = tl.load(offsets + row, mask=live, other=0)
        end = tl.load(offsets + row + 1, mask=live, other=0)
        longest = tl.max(end - begin, 0)
        db = tl.zeros((BL,), tl.float32)
        positive = tl.zeros((BL,), tl.int32)
        nonzero = tl.zeros((BL,), tl.int32)
        put = row
        if EXTRA:
            put = tl.load(place + row, mask=live, other=-1)
            db += tl.load(extra_b + put, mask=put >= 0, other=0.0)
            nonzero += (put >= 0).to(tl.int32)
        for first in range(0, longest, BE):
            entry = begin[:, None] + first + tl.arange(0, BE)[None, :]
            inside = entry < end[:, None]
            db += tl.sum(tl.load(grad_weight + entry, mask=inside, other=0.0), 1)
            flag = tl.load(flags + entry, mask=inside, other=0).to(tl.int32)
            positive += tl.sum(flag & 1, 1)
            nonzero += tl.sum(flag >> 1, 1)
        tl.store(fired + row, positive, mask=live)
        if ROWSPARSE:
            tl.store(touched + row, nonzero, mask=live)
            change = live & (nonzero > 0)
            some = tl.max(nonzero, 0) > 0 or longest > 0
        else:
            change = live
            some = True
        if some:
            g, g_ = gradient(partial, grad_weight, source, x, x, begin, end, extra_W, put, n, d, 1,
                             EXTRA, FLIGHT, CHUNK, BL, BD, BT)  # fmt: skip
            at, mask = rows_at(W_enc, row, change, d, d, 0, BD)
            p = tl.load(at, mask=mask, other=0.0)
            if CENTER:
                sum_centre = plus(sum_centre, db[:, None] * p, centre, program, d, HELD, 0, BD)
            m, v = moments(m_W, v_W, p, row, change, mask, d, row_bytes, OPTIMIZER, MOMENTUM, STATE,
                           0, BD)  # fmt: skip
            p = moved(p, m, v, g, m_W, v_W, row, change, mask, d, row_bytes, key, rule, OPTIMIZER,
                      MOMENTUM, STATE, 0, BD)  # fmt: skip
            tl.store(at, p, mask=mask)
            if COPY:
                copied(copy, p, row, change, d, 0, BD)
            if SHADOW:
                p, lost = shadowed(shadow, p, row, change, mask, d, shadow_stride, 0, BD)
            if BT > 0:
                at_, mask_ = rows_at(W_enc, row, change, d, d, BD, BT)
                p_ = tl.load(at_, mask=mask_, other=0.0)
                if CENTER:
                    sum_tail = plus(sum_tail, db[:, None] * p_, centre, program, d, HELD, BD, BT)
                m_, v_ = moments(m_W, v_W, p_, row, change, mask_, d, row_bytes, OPTIMIZER,
                                 MOMENTUM, STATE, BD, BT)  # fmt: skip
                p_ = moved(p_, m_, v_, g_, m_W, v_W, row, change, mask_, d, row_bytes, key, rule,
                           OPTIMIZER, MOMENTUM, STATE, BD, BT)  # fmt: skip
                tl.store(at_, p_, mask=mask_)
                if COPY:
                    copied(copy, p_, row, change, d, BD, BT)
            if SHADOW:
                tail, lost_ = p, lost
                if BT > 0:
                    tail, lost_ = shadowed(
                        shadow, p_, row, change, mask_, d, shadow_stride, BD, BT)  # fmt: skip
                squares = dot(p, p, tail, tail, BT)
                tl.store(stats + row * 4 + 1, norm_above(squares, d), mask=change)
                squares = dot(lost, lost, lost_, lost_, BT)
                tl.store(stats + row * 4 + 2, norm_above(squares, d), mask=change)
            b = tl.load(b_enc + row, mask=change, other=0.0)
            mb = tl.load(m_b + row, mask=change & MOMENTUM, other=0.0)
            vb = tl.load(v_b + row, mask=change & (OPTIMIZER == "adam"), other=0.0)
            b, mb, vb = moved_by(b, db, mb, vb, of_bias, OPTIMIZER, MOMENTUM)
            tl.store(b_enc + row, b, mask=change)
            tl.store(m_b + row, mb, mask=change & MOMENTUM)
            tl.store(v_b + row, vb, mask=change & (OPTIMIZER == "adam"))
    if CENTER and HELD:
        column = tl.arange(0, BD)
        tl.store(centre + program * d + column, tl.sum(sum_centre, 0), mask=column < d)
        if BT > 0:
            column = BD + tl.arange(0, BT)
            tl.store(centre + program * d + column, tl.sum(sum_tail, 0), mask=column < d)


@triton.jit(do_not_specialize=SCALARS)
def _decoder_kernel(
    weight, source, offsets, partial, grad_out, aux_grad_out, W_dec, m_W, v_W, copy, place,
    extra_W, touched, verdict, n, f, d, turns, row_bytes, key,
    lr, beta1, rest1, beta2, rest2, eps, decay, shrink, correction,
    OPTIMIZER: tl.constexpr, MOMENTUM: tl.constexpr, STATE: tl.constexpr, ROWSPARSE: tl.constexpr,
    PROJECT: tl.constexpr, RENORM: tl.constexpr, COPY: tl.constexpr, EXTRA: tl.constexpr,
    TABLES: tl.constexpr,
    FLIGHT: tl.constexpr, CHUNK: tl.constexpr, BL: tl.constexpr, BD: tl.constexpr,
    BT: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    if tl.load(verdict) != 0.0:  # NaN: an input is wrong, and nothing may be written
        return
    rule = (lr, beta1, rest1, beta2, rest2, eps, decay, shrink, correction)
    SOON: tl.constexpr = BD <= 4096  # there are registers for it
    for turn in range(0, turns):
        row = (program * turns + turn) * BL + tl.arange(0, BL)
        live = row < f
        begin = tl.load(offsets + row, mask=live, other=0)
        end = tl.load(offsets + row + 1, mask=live, other=0)
        if ROWSPARSE:
            live = live & (tl.load(touched + row, mask=live, other=0) > 0)
            some = tl.max(live.to(tl.int32), 0) > 0
        else:
            some = True
        if some:
            put = row
            if EXTRA:
                put = tl.load(place + row, mask=live, other=-1)
            g, g_ = gradient(partial, weight, source, grad_out, aux_grad_out, begin, end, extra_W,
                             put, n, d, TABLES, EXTRA, FLIGHT, CHUNK, BL, BD, BT)  # fmt: skip
            at, mask = rows_at(W_dec, row, live, d, d, 0, BD)
            p = tl.load(at, mask=mask, other=0.0)
            if BT > 0:
                at_, mask_ = rows_at(W_dec, row, live, d, d, BD, BT)
                p_ = tl.load(at_, mask=mask_, other=0.0)
            if SOON:  # before the sums over the row, which wait for all of it
                m, v = moments(m_W, v_W, p, row, live, mask, d, row_bytes, OPTIMIZER, MOMENTUM,
                               STATE, 0, BD)  # fmt: skip
            if BT == 0:
                p_ = p
            if PROJECT:
                along = dot(g, p, g_, p_, BT) / tl.maximum(dot(p, p, p_, p_, BT), 1e-30)
                g -= along[:, None] * p
                if BT > 0:
                    g_ -= along[:, None] * p_
            if not SOON:
                m, v = moments(m_W, v_W, p, row, live, mask, d, row_bytes, OPTIMIZER, MOMENTUM,
                               STATE, 0, BD)  # fmt: skip
            p = moved(p, m, v, g, m_W, v_W, row, live, mask, d, row_bytes, key, rule, OPTIMIZER,
                      MOMENTUM, STATE, 0, BD)  # fmt: skip
            if BT > 0:
                m_, v_ = moments(m_W, v_W, p_, row, live, mask_, d, row_bytes, OPTIMIZER, MOMENTUM,
                                 STATE, BD, BT)  # fmt: skip
                p_ = moved(p_, m_, v_, g_, m_W, v_W, row, live, mask_, d, row_bytes, key, rule,
                           OPTIMIZER, MOMENTUM, STATE, BD, BT)  # fmt: skip
            if RENORM:
                p = tl.where(mask, p, 0.0)
                if BT > 0:
                    p_ = tl.where(mask_, p_, 0.0)
                length = tl.maximum(tl.sqrt_rn(dot(p, p, p_, p_, BT)), 1e-30)
                inverse = tl.div_rn(tl.full((BL,), 1.0, tl.float32), length)
                p = p * inverse[:, None]
                if BT > 0:
                    p_ = p_ * inverse[:, None]
            tl.store(at, p, mask=mask)
            if BT > 0:
                tl.store(at_, p_, mask=mask_)
            if COPY:
                copied(copy, p, row, live, d, 0, BD)
                if BT > 0:
                    copied(copy, p_, row, live, d, BD, BT)


@triton.jit
def _bias_kernel(
    b_dec, base, centre, m_b, v_b, verdict, d, programs, scale,
    lr, beta1, rest1, beta2, rest2, eps, correction,
    OPTIMIZER: tl.constexpr, MOMENTUM: tl.constexpr, BP: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """b_dec's step: its gradient is scale * base less the programs' encoder parts."""
    if tl.load(verdict) != 0.0:  # NaN: an input is wrong, and nothing may be written
        return
    column = tl.program_id(0) * BD + tl.arange(0, BD)
    mask = column < d
    away = tl.zeros((BP, BD), tl.float32)
    for first in range(0, programs, BP):
        program = first + tl.arange(0, BP)
        inside = (program < programs)[:, None] & mask[None, :]
        at = centre + program.to(tl.int64)[:, None] * d + column[None, :]
        away += tl.load(at, mask=inside, other=0.0)
    g = scale * tl.load(base + column, mask=mask, other=0.0) - tl.sum(away, 0)
    b = tl.load(b_dec + column, mask=mask, other=0.0)
    m = tl.load(m_b + column, mask=mask & MOMENTUM, other=0.0)
    v = tl.load(v_b + column, mask=mask & (OPTIMIZER == "adam"), other=0.0)
    rule = (lr, beta1, rest1, beta2, rest2, eps, 0.0, 1.0, correction)
    b, m, v = moved_by(b, g, m, v, rule, OPTIMIZER, MOMENTUM)
    tl.store(b_dec + column, b, mask=mask)
    tl.store(m_b + column, m, mask=mask & MOMENTUM)
    tl.store(v_b + column, v, mask=mask & (OPTIMIZER == "adam"))


class Geometry(NamedTuple):
    """How the latents are dealt out.

    Attributes:
        programs: of each kernel.
        turns: each takes so many blocks of latents.
        BL: latents of a block.
        BD: columns of a row's first tile.
        BT: columns of its second tile, or 0.
        warps: of a program.
        FLIGHT: rows asked for at once.
    """

    programs: int
    turns: int
    BL: int
    BD: int
    BT: int
    warps: int
    FLIGHT: int


def geometry(f: int, d: int, interpreted: bool) -> Geometry:
    """The tiles for f rows of d numbers.

    A tile is a power of two wide, so a row of 2304 takes two, of 2048 and 256, rather than one of
    4096; one of more than 8192 would not fit in registers.
    """
    BD, BT = triton.next_power_of_2(max(d, 16)), 0
    below = BD // 2
    rest = max(triton.next_power_of_2(max(d - below, 1)), BLOCK.value)
    split = (below >= 2 * BLOCK.value and rest < below) or BD > 8192
    if split and not (interpreted and f > 8):  # there a program a latent would take minutes
        BD, BT = below, rest
    room = max((1 << 17 if interpreted else 1024) // (BD + BT), 1)
    BL = 1 if BT else min(triton.next_power_of_2(max(f, 1)), room)
    blocks = triton.cdiv(f, BL)
    turns = triton.cdiv(blocks, PROGRAMS)
    warps = min(max(BL * BD // 256, 4), 8 if BD <= 4096 else 16)
    FLIGHT = 4 if BD <= 2048 else 2 if BD <= 4096 else 1
    return Geometry(triton.cdiv(blocks, turns), turns, BL, BD, BT, warps, FLIGHT)


def launch(
    indices: Tensor, values: Tensor, grad_values: Tensor, grad_out: Tensor, scale: float,
    aux_indices: Tensor | None, aux_values: Tensor | None, aux_grad_values: Tensor | None,
    aux_grad_out: Tensor | None, aux_scale: float,
    x: Tensor, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, b_dec: Tensor,
    m_W_enc: Tensor | None, v_W_enc: Tensor | None, m_b_enc: Tensor | None, v_b_enc: Tensor | None,
    m_W_dec: Tensor | None, v_W_dec: Tensor | None, m_b_dec: Tensor | None, v_b_dec: Tensor | None,
    kind: str, shadow: Tensor | None, stats: Tensor | None,
    W_enc_bf16: Tensor | None, W_dec_bf16: Tensor | None,
    extra_place: Tensor | None, extra_W_enc: Tensor | None, extra_b_enc: Tensor | None,
    extra_W_dec: Tensor | None,
    optimizer: str, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float,
    step: int,
    rowsparse: bool, project: bool, renorm: bool, center: bool, verdict: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`sae_update`: sort the entries by latent; a program updates all parameters of a run of
    latents.

    Rows in bfloat16 are widened as they are read. All memory is taken before the first parameter is
    written: an out-of-memory error leaves them as they were. With a screen a step that went beyond
    float32 is an error: on a GPU that of a later call (_pending.py), while a CUDA graph is captured
    none.

    verdict: [1] float32 on the device; where it is not 0, nothing is written and nothing has fired.
    """
    (n, _), (f, d) = indices.shape, W_enc.shape
    x, grad_out = x.contiguous(), grad_out.contiguous()
    other = grad_out if aux_grad_out is None else aux_grad_out.contiguous()
    g = geometry(f, d, not x.is_cuda)
    adam = optimizer in ("adam", "adamw")
    decoupled = optimizer in ("adamw", "signsgd")
    rate = lr / (1 - beta1**step) if adam else lr
    correction = (1 - beta2**step) ** -0.5 if adam else 1.0
    decay, shrink = (0.0, 1 - lr * weight_decay) if decoupled else (weight_decay, 1.0)
    rule = (rate, beta1, 1 - beta1, beta2, 1 - beta2, eps)
    kinds = {"OPTIMIZER": "adam" if adam else optimizer, "MOMENTUM": m_W_enc is not None}
    state = {"STATE": "float32" if m_W_enc is None else _check.dtype_name(m_W_enc.dtype)}
    row_bytes = d if m_W_enc is None else m_W_enc.shape[1]
    (m_W, v_W), (m_b, v_b), (m_D, v_D), (m_d, v_d) = (
        [
            b_enc if t is None else t.view(torch.int16) if t.dtype == torch.bfloat16 else t
            for t in pair
        ]
        for pair in ((m_W_enc, v_W_enc), (m_b_enc, v_b_enc), (m_W_dec, v_W_dec), (m_b_dec, v_b_dec))
    )
    refresh = shadow is not None and stats is not None and kind == "bf16"
    enc_copy, dec_copy = (
        b_enc if t is None else t.view(torch.int16) for t in (W_enc_bf16, W_dec_bf16)
    )
    place, extra_W, extra_b, extra_D = (
        b_enc if t is None else t.contiguous()
        for t in (extra_place, extra_W_enc, extra_b_enc, extra_W_dec)
    )
    given = {"EXTRA": extra_place is not None}
    tiles = {
        "FLIGHT": g.FLIGHT,
        "CHUNK": CHUNK,
        "BL": g.BL,
        "BD": g.BD,
        "BT": g.BT,
    }
    options = {"num_warps": g.warps, **OPTIONS}
    with torch.cuda.device_of(x):
        e = sort_entries(
            indices, values, grad_values, scale, aux_indices, aux_values, aux_grad_values,
            aux_scale, f,
        )  # fmt: skip
        dec_partial = partial_sums(e.segments, e.weight, e.source, grad_out, other)
        enc_partial = partial_sums(e.segments, e.grad_weight, e.source, x, x)
        base = grad_out.sum(0, dtype=torch.float32)
        centre = torch.empty(g.programs if center else 0, d, dtype=torch.float32, device=x.device)
        fired, touched = (torch.zeros(f, dtype=torch.int32, device=x.device) for _ in range(2))
        verdict = b_enc.new_zeros(1) if verdict is None else verdict
        # From here on parameters change, and nothing is allocated.
        _encoder_kernel[(g.programs,)](
            e.grad_weight, e.source, e.flags, e.segments.offsets, enc_partial, x,
            W_enc, b_enc, m_W, v_W, m_b, v_b, shadow if refresh else b_enc,
            stats if refresh else b_enc, enc_copy,
            place, extra_W, extra_b, centre, fired, touched, verdict,
            n, f, d, g.turns, shadow.stride(0) if refresh and shadow is not None else d, row_bytes,
            _signed(step_key(step, 0)), *rule, decay, shrink, correction, **kinds, **state,
            ROWSPARSE=rowsparse, CENTER=center, SHADOW=refresh, COPY=W_enc_bf16 is not None, BE=32,
            **given, **tiles, **options,
        )  # fmt: skip
        _decoder_kernel[(g.programs,)](
            e.weight, e.source, e.segments.offsets, dec_partial, grad_out, other, W_dec, m_D, v_D,
            dec_copy, place, extra_D, touched, verdict, n, f, d, g.turns, row_bytes,
            _signed(step_key(step, 2)),
            *rule, decay, shrink, correction, **kinds, **state, ROWSPARSE=rowsparse,
            PROJECT=project, RENORM=renorm, COPY=W_dec_bf16 is not None,
            TABLES=1 if other is grad_out else 2, **given, **tiles, **options,
        )  # fmt: skip
        _bias_kernel[(triton.cdiv(d, 32),)](
            b_dec, base, centre, m_d, v_d, verdict, d, len(centre), scale, *rule, correction,
            **kinds, BP=128, BD=32, enable_fp_fusion=True,
        )  # fmt: skip
    if refresh and stats is not None:
        look_after_writing("sae_update", "W_enc", W_enc, norms=stats[:, 1])
    return fired


def _signed(word: int) -> int:
    """The int32 of a 32-bit word's bits: Triton would make another kernel for an int64."""
    return word - (1 << 32) if word >= 1 << 31 else word
