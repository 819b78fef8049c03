"""e4m3 shadows of rows turned by signs and a Hadamard matrix: codes, scale, what rounding lost."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, import-untyped"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from microtome._look import Look


@triton.jit
def round_to_e4m3(value):
    """float32 of at most 464 in size to the bits of the nearest e4m3, ties to even; and its value.

    In integers, because neither the interpreter nor a GPU below compute capability 8.9 converts.
    e4m3 has 3 bits behind the point and numbers down to 2^-6; below it steps of 2^-9. Adding 2^14,
    whose last bit is 2^-9, rounds to those steps.
    """
    bits = value.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    normal = (size + 0x7FFFF + ((size >> 20) & 1)) >> 20  # exponent and 3 bits
    steps = tl.abs(value) + 16384.0
    code = tl.where(
        size >= 0x3C800000,  # 2^-6
        normal - (120 << 3),
        steps.to(tl.int32, bitcast=True) - 0x46800000,  # 2^14
    )
    code = tl.minimum(code, 126)
    normal = ((code + (120 << 3)) << 20).to(tl.float32, bitcast=True)
    near = tl.where(code >= 8, normal, code.to(tl.float32) * 0.001953125)
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8), tl.where(bits < 0, -near, near)


@triton.jit
def _turned(source, subtract, row, first, live, d, HAS_SUBTRACT: tl.constexpr, BR: tl.constexpr):
    """Columns first ... first + 127 of BR rows, less `subtract`, turned, times 2^-3.5: [BR, 128].

    `screen_weights._turned` does the same additions.
    """
    i = first + tl.arange(0, 128)
    mask = live & (i < d)[None, :]
    value = tl.load(source + row[:, None] * d + i[None, :], mask=mask, other=0.0).to(tl.float32)
    if HAS_SUBTRACT:
        value -= tl.load(subtract + i, mask=i < d, other=0.0).to(tl.float32)[None, :]
        value = tl.where(mask, value, 0.0)
    mixed = (i.to(tl.int64) + 1) * 2654435761 & 0xFFFFFFFF
    mixed = (mixed ^ (mixed >> 15)) * 0x45D9F3B
    value = value * tl.where((mixed >> 16) & 1 == 0, 0.0078125, -0.0078125)[None, :]
    for _ in tl.static_range(7):
        a, b = tl.split(tl.reshape(value, (BR, 64, 2)))
        value = tl.reshape(tl.permute(tl.join(a + b, a - b), (0, 2, 1)), (BR, 128))
    return value


@triton.jit
def _rows_kernel(
    source, subtract, shadow, stats, rows, d, stride, HAS_SUBTRACT: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """Codes and [scale, norm, norm of what rounding lost, 0] of BR rows, read twice."""
    root: tl.constexpr = 11.313708498984761  # 2^3.5
    row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    live = (row < rows)[:, None]
    largest = tl.zeros((BR, 128), tl.float32)
    for first in range(0, stride, 128):
        value = _turned(source, subtract, row, first, live, d, HAS_SUBTRACT, BR)
        largest = tl.maximum(largest, tl.abs(value))
    most = tl.max(largest, 1)
    step = tl.where(most > 0, tl.maximum(tl.div_rn(most, 448.0), 8.673617379884035e-19), 1.0)
    scale = step * 11.313708305358887  # the float32 nearest to 2^3.5
    squares = tl.zeros((BR, 128), tl.float64)
    lost_squares = tl.zeros((BR, 128), tl.float64)
    for first in range(0, stride, 128):
        value = _turned(source, subtract, row, first, live, d, HAS_SUBTRACT, BR)
        code, near = round_to_e4m3(tl.div_rn(value, tl.broadcast_to(step[:, None], (BR, 128))))
        wide = value.to(tl.float64) * root
        lost = wide - near.to(tl.float64) * scale[:, None].to(tl.float64)
        squares += wide * wide
        lost_squares += lost * lost
        i = (first + tl.arange(0, 128))[None, :]
        tl.store(shadow + row[:, None] * stride + i, code, mask=live)
    at = stats + row * 4
    tl.store(at, scale, mask=row < rows)
    tl.store(at + 1, _above(tl.sum(squares, 1)), mask=row < rows)
    tl.store(at + 2, _above(tl.sum(lost_squares, 1)), mask=row < rows)
    tl.store(at + 3, tl.zeros((BR,), tl.float32), mask=row < rows)


@triton.jit
def _above(squares):
    """The root of a float64 sum, a little up, as float32: as the reference makes it."""
    up: tl.constexpr = 1.00000095367431640625  # 1 + 2^-20
    least: tl.constexpr = 7.703719777548943e-34  # 2^-110
    return (tl.sqrt(squares) * up + least).to(tl.float32)


def rows(source: Tensor, subtract: Tensor | None) -> tuple[Tensor, Tensor]:
    """Turn the rows of a matrix and round them to e4m3 times a scale: `screen_weights`, "fp8".

    Args:
        source: [m, d] contiguous.
        subtract: [d] taken from every row first, in float32, or None.

    Returns:
        codes [m, stride] uint8, d rounded up to a multiple of 128; stats [m, 4] float32 a row:
        scale, norm, norm of what rounding lost, 0.
    """
    m, d = source.shape
    width = max(triton.cdiv(d, 128), 1) * 128
    shadow = torch.empty(m, width, dtype=torch.uint8, device=source.device)
    stats = torch.empty(m, 4, dtype=torch.float32, device=source.device)
    BR = ROWS if source.is_cuda else 128
    _rows_kernel[(triton.cdiv(m, BR),)](
        source, source if subtract is None else subtract, shadow, stats, m, d, width,
        HAS_SUBTRACT=subtract is not None, BR=BR, **OPTIONS,
    )  # fmt: skip
    return shadow, stats


ROWS = 8
OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}


def screen(W_enc: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """`screen_weights` of kind "fp8"."""
    look = Look("screen_weights", W_enc.device)
    if not W_enc.is_cuda:
        look.finite("W_enc", W_enc)
    with torch.cuda.device_of(W_enc):
        shadow, stats = rows(W_enc.contiguous(), None)
    if W_enc.is_cuda:
        look.finite("W_enc", W_enc, stats[:, 1])
    look.submit()
    return shadow, stats
