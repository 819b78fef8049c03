"""x + (a' - a) W_dec[f] in one pass: a row stays in registers, the features' rows in the cache."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, import-untyped"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

SIZE = 4096  # elements of a tile: the features' rows are read once for its rows


@triton.jit
def _feature_clamp_kernel(
    x, features, targets, W_enc, b_enc, b_dec, W_dec, threshold, current, out,
    n, m, d, target_stride,
    MODE: tl.constexpr, HAS_B_ENC: tl.constexpr, HAS_B_DEC: tl.constexpr,
    HAS_THRESHOLD: tl.constexpr, HAS_CURRENT: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    column = tl.arange(0, BD)
    live, inside = row < n, column < d
    mask = live[:, None] & inside[None, :]
    at = row[:, None] * d + column[None, :]
    value = tl.load(x + at, mask=mask, other=0.0)
    wide = value.to(tl.float32)
    centred = wide
    if HAS_B_DEC:
        centred -= tl.load(b_dec + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    moved = tl.zeros((BR, BD), tl.float32)
    touched = tl.zeros((BR,), tl.int32)
    for j in range(0, m):
        feature = tl.load(features + j).to(tl.int64)
        if HAS_CURRENT:
            a = tl.load(current + row * m + j, mask=live, other=0.0).to(tl.float32)
        else:
            w = tl.load(W_enc + feature * d + column, mask=inside, other=0.0).to(tl.float32)
            a = tl.sum(centred * w[None, :], 1)
            if HAS_B_ENC:
                a += tl.load(b_enc + feature).to(tl.float32)
            least = 0.0
            if HAS_THRESHOLD:
                least = tl.load(threshold + feature).to(tl.float32)
            a = tl.where(a > least, a, 0.0)
        t = tl.load(targets + row * target_stride + j, mask=live, other=0.0).to(tl.float32)
        if MODE == "set":
            change = t - a
        elif MODE == "add":
            change = t
        else:
            change = a * t - a
        touched = touched | (change != 0.0).to(tl.int32)
        w = tl.load(W_dec + feature * d + column, mask=inside, other=0.0).to(tl.float32)
        moved += change[:, None] * w[None, :]
    result = tl.where(touched[:, None] > 0, (wide + moved).to(out.dtype.element_ty), value)
    tl.store(out + at, result, mask=mask)


def geometry(n: int, d: int, interpreted: bool) -> tuple[int, int, int]:
    """Rows and columns of a tile, and warps: at most 32 elements a thread."""
    BD = triton.next_power_of_2(max(d, 16))
    BR = min(triton.next_power_of_2(max(n, 1)), max((1 << 16 if interpreted else SIZE) // BD, 1))
    return BR, BD, min(max(BR * BD // 1024, 1), 16)


def launch(
    x: Tensor, features: Tensor, targets: Tensor, W_enc: Tensor | None, b_enc: Tensor | None,
    b_dec: Tensor | None, W_dec: Tensor, threshold: Tensor | None, current: Tensor | None,
    mode: str,
) -> Tensor:  # fmt: skip
    """`feature_clamp`: a program per block of rows; x is read once and written once."""
    (n, d), m = x.shape, features.shape[0]
    out = torch.empty(n, d, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    BR, BD, warps = geometry(n, d, not x.is_cuda)
    x = x.contiguous()
    given = [None if t is None else t.contiguous() for t in (W_enc, b_enc, b_dec)]
    rest = [None if t is None else t.contiguous() for t in (threshold, current)]
    with torch.cuda.device_of(x):
        _feature_clamp_kernel[(triton.cdiv(n, BR),)](
            x, features.contiguous(), targets.contiguous(), *(x if t is None else t for t in given),
            W_dec.contiguous(), *(x if t is None else t for t in rest), out,
            n, m, d, m if targets.dim() == 2 else 0,
            MODE=mode, HAS_B_ENC=b_enc is not None, HAS_B_DEC=b_dec is not None,
            HAS_THRESHOLD=threshold is not None, HAS_CURRENT=current is not None, BR=BR, BD=BD,
            num_warps=warps, enable_fp_fusion=True,
        )  # fmt: skip
    return out
