"""The low-precision shadow of an encoder that `topk_encode` screens with."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from microtome import _check, _native
from microtome.errors import ArgumentError
from microtome.ops._registry import Backend, Op, unavailable, why_not_common

KINDS = ("bf16", "q15", "fp8")
REFRESHED = KINDS[:2]  # kinds that csrc/cpu makes, and `sae_update` keeps up to date
# ||q_x|| * ||q_w|| <= 46340^2 < 2^31: by Cauchy-Schwarz no partial sum of an integer dot product
# overflows int32.
Q_NORM = 46340.0
_BLOCK = 1 << 24  # weights that the reference holds in float64 at once


class Screen(NamedTuple):
    """A shadow of W_enc in few bits with the numbers that bound its error.

    Attributes:
        kind: "bf16" (AMX tiles), "q15" (integers times one scale a row, exact in int32) or "fp8"
            (turned rows in e4m3 times one scale a row, for `topk_encode_fp8`).
        shadow: [f, stride] int16: bf16 bits or integers, zero from column d on; the stride is d
            rounded up to an odd number of 64-byte lines, so that sixteen rows never share one cache
            set. fp8: uint8, bits of e4m3; the stride is d rounded up to a multiple of 128.
        stats: [f, 4] float32, per row w: its scale (1 for bf16), ||w||, ||w - shadow||, 0. The
            norms are bounds from above.
    """

    kind: str
    shadow: Tensor
    stats: Tensor


def stride(d: int, kind: str = "bf16") -> int:
    """Elements between two shadow rows: d rounded up to an odd multiple of 32 (64 bytes); for fp8
    of 128."""
    if kind == "fp8":
        return max(1, -(-d // 128)) * 128
    lines = max(1, -(-d // 32))
    return 32 * (lines if lines % 2 else lines + 1)


def check_screen(op: str, screen: Screen | None, W_enc: Tensor) -> None:
    """Raise unless a screen has the layout that W_enc's own would have: kernels read it by address.

    Of another matrix of the same shape it makes every row fail its certificate, and slow.

    Raises:
        ArgumentError: it is no Screen, of an unknown kind, or of a W_enc of another shape.
        DeviceError: it lies elsewhere.
    """
    if screen is None:
        return
    if not isinstance(screen, Screen):
        msg = f"{op}: screen must be a Screen, got {type(screen).__name__}. "
        msg += "Make it with screen_weights(W_enc)."
        raise ArgumentError(msg)
    kind, shadow, stats = screen
    _check.one_of(op, "screen.kind", kind, KINDS)
    _check.device(op, W_enc=W_enc, shadow=shadow, stats=stats)
    (f, d), dtype = W_enc.shape, torch.uint8 if kind == "fp8" else torch.int16
    fits = (shadow.shape, shadow.dtype) == ((f, stride(d, kind)), dtype)
    fits = fits and (stats.shape, stats.dtype) == ((f, 4), torch.float32)
    if not (fits and shadow.is_contiguous() and stats.is_contiguous()):
        msg = (
            f"{op}: screen does not belong to W_enc {list(W_enc.shape)}: shadow "
            f"{list(shadow.shape)}, stats {list(stats.shape)}. "
            "Make it with screen_weights(W_enc)."
        )
        raise ArgumentError(msg)


def has_screen(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `topk_encode` reads a screen there: on a CPU, and on a GPU that Triton reaches."""
    reached = device.type == "cuda" and unavailable("triton") is None
    return dtype == torch.float32 and (device.type == "cpu" or reached)


def best_kind() -> str:
    """The kind that this processor multiplies fastest."""
    return "bf16" if _native.why_absent() is None and _native.isa() == "amx" else "q15"


# What torch.compiler.assume_constant_result sets, without importing the compiler to do so.
best_kind._dynamo_marked_constant = True  # type: ignore[attr-defined]


def screen_weights(W_enc: Tensor, kind: str = "auto") -> Screen:
    """Build the shadow of an encoder that `topk_encode` screens with.

        q15:  s = max(max|w| / 32767, ||w|| / (46340 - sqrt(d)), 2^-100);  shadow = round(w / s)
        bf16: s = 1;  shadow = w rounded to nearest even, at most the largest finite bfloat16
        fp8:  t = w turned;  s = max(max|t| / 448, 2^-60);  shadow = e4m3(t / s), nearest even

    Turned: fixed signs, then an orthogonal Hadamard matrix on every 128 columns. Two turned rows
    have the product that the rows have, but none of their columns stands out.

    Args:
        W_enc: [f, d] float32.
        kind: "bf16", "q15", "fp8" for `topk_encode_fp8` (`sae_update` does not refresh it: make it
            anew after a step), or "auto" for the one this processor multiplies fastest (bf16 for a
            W_enc on a GPU).

    Returns:
        A Screen; 2 bytes a weight, 1 for fp8, plus 16 bytes a feature.

    Raises:
        ShapeError, DtypeError: W_enc is not a float32 matrix.
        NonFiniteError: a row of W_enc holds NaN or infinity; the message names it.

    Not differentiable. Deterministic for any thread count. Reads W_enc once. On a GPU Triton makes
    the kind fp8, plain PyTorch the others; the Triton encoder screens without one, too.
    Source: docs/exactness.md.
    """
    _check.shapes("screen_weights", W_enc=(W_enc, "f d"))
    _check.dtype("screen_weights", (torch.float32,), W_enc=W_enc)
    _check.one_of("screen_weights", "kind", kind, ("auto", *KINDS))
    if kind == "auto":
        kind = "bf16" if W_enc.is_cuda else best_kind()
    shadow, stats = _screen(W_enc, kind)
    return Screen(kind, shadow, stats)


def screen_weights_reference(W_enc: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """The formulas above; norms in float64, then a little up, so they bound from above."""
    f, d = W_enc.shape
    _check.finite_rows("screen_weights", "W_enc", W_enc)
    shadow, stats = _fake(W_enc, kind)
    shadow.zero_()
    block = max(1, _BLOCK // max(d, 1))  # the float64 of all of W_enc would be many times its size
    for first in range(0, f, block):
        part = slice(first, first + block)
        codes, stats[part] = _screen_rows(W_enc[part], kind)
        shadow[part, : codes.shape[1]] = codes
    return shadow, stats


def _screen_rows(W_enc: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Codes [rows, d], for fp8 [rows, stride], and statistics [rows, 4] of some rows."""
    f, d = W_enc.shape
    wide = W_enc.double()
    norm = wide.norm(dim=1)
    if kind == "bf16":
        scale = torch.ones(f, dtype=torch.float32, device=W_enc.device)
        largest_bf16 = torch.finfo(torch.bfloat16).max
        bits = W_enc.clamp(-largest_bf16, largest_bf16).bfloat16()
        rounded, codes = bits.double(), bits.view(torch.int16)
    elif kind == "fp8":
        turned = _turned(W_enc)
        wide = turned.double() * 2**3.5
        norm = wide.norm(dim=1)
        top = turned.abs().amax(1)
        step = torch.where(top > 0, (top / 448.0).clamp_min(2**-60), 1.0)
        bits = (turned / step[:, None]).to(torch.float8_e4m3fn)  # at most 448, its largest number
        scale = step * torch.tensor(2**3.5, dtype=torch.float32)
        rounded, codes = bits.double() * scale.double()[:, None], bits.view(torch.uint8)
    else:
        largest = wide.abs().amax(1) if d else norm
        step = torch.maximum(largest / 32767.0, norm / (Q_NORM - d**0.5)) * (1 + 2**-20)
        scale = torch.where(norm > 0, step.clamp_min(2**-100), 1.0).float()
        codes = (wide / scale.double()[:, None]).round().to(torch.int16)
        rounded = codes.double() * scale.double()[:, None]
    up = 1 + 2**-20
    error = (wide - rounded).norm(dim=1)
    # Denormals that a processor flushes to zero weigh less than 2^-126 sqrt(d) <= 2^-110.
    bounds = [(t * up + 2**-110).float() for t in (norm, error)]
    return codes, torch.stack([scale, *bounds, torch.zeros_like(scale)], dim=1)


def _turned(rows: Tensor) -> Tensor:
    """Turned rows [m, d], d rounded up to a multiple of 128, times 2^-3.5: none grows.

    The same float32 additions as in kernels/fp8.py, hence the same bits. Signs: a bit of a hash of
    the column.
    """
    m, d = rows.shape
    columns = stride(d, "fp8")
    i = torch.arange(columns, dtype=torch.int64, device=rows.device)
    mixed = ((i + 1) * 2654435761) & 0xFFFFFFFF
    mixed = (mixed ^ (mixed >> 15)) * 0x45D9F3B
    signs = torch.where((mixed >> 16) & 1 == 0, 2.0**-7, -(2.0**-7))
    out = torch.nn.functional.pad(rows, (0, columns - d)) * signs  # [m, columns]
    for _ in range(7):
        a, b = out.view(m, columns // 128, 64, 2).unbind(-1)
        out = torch.cat([a + b, a - b], -1)
    return out.reshape(m, columns)


def _fake(W_enc: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    f, d = W_enc.shape
    dtype = torch.uint8 if kind == "fp8" else torch.int16
    return W_enc.new_empty(f, stride(d, kind), dtype=dtype), W_enc.new_empty(f, 4)


def screen_weights_cpu(W_enc: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Row by row in C++, csrc/cpu/screen_row.h."""
    W_enc = W_enc.contiguous()
    f, d = W_enc.shape
    shadow, stats = _fake(W_enc, kind)
    finite = _native.module().screen_weights(
        W_enc.data_ptr(), f, d, shadow.shape[1], KINDS.index(kind), shadow.data_ptr(),
        stats.data_ptr(), _native.forced_isa(), _native.threads(),
    )  # fmt: skip
    if not finite:
        bad = (~torch.isfinite(W_enc)).any(-1).nonzero().flatten()
        _check.rows("screen_weights", "W_enc", bad)
    return shadow, stats


def _why_not_triton(W_enc: Tensor, kind: str) -> str | None:
    reason = why_not_common("triton", [W_enc], (torch.float32,))
    return reason if reason or kind == "fp8" else f"kind {kind!r} (makes 'fp8')"


def _why_not_cpu(W_enc: Tensor, kind: str) -> str | None:
    if kind not in REFRESHED:
        return f"kind {kind!r} (makes 'bf16' and 'q15')"
    reason = why_not_common("cpu", [W_enc], (torch.float32,))
    if not reason and W_enc.shape[1] >= 2**24:
        return f"d={W_enc.shape[1]} (needs d < 2^24)"
    return reason


_screen = Op(
    screen_weights_reference,
    fake=_fake,
    backends=[
        Backend("triton", "microtome.kernels.fp8:screen", _why_not_triton),
        Backend("cpu", "microtome.ops.screen_weights:screen_weights_cpu", _why_not_cpu),
    ],
)
