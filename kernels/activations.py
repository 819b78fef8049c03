"""Pointwise activations by code, accurate near zero and handing NaN on."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, import-untyped"
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tanh(h):
    """The series near zero, where 1 - 2 / (exp(2 h) + 1) loses its digits."""
    size = tl.abs(h)
    z = tl.where(size < 0.3, h * h, 0.0)
    # z^k of (tanh h) / h: 1, -1/3, 2/15, -17/315, 62/2835, -1382/155925, 21844/6081075
    series = 0.003592128 * z - 0.008863236
    series = (series * z + 0.021869488) * z - 0.053968254
    series = ((series * z + 0.13333333) * z - 0.33333333) * z
    far = 1.0 - 2.0 / (tl.exp(2.0 * size) + 1.0)
    return tl.where(size < 0.3, h + h * series, tl.where(h < 0.0, -far, far))


@triton.jit
def activate(h, CODE: tl.constexpr):
    """IDENTITY, RELU, GELU, GELU_TANH, SILU, TANH, SIGMOID, LEAKY_RELU, ELU, SOFTPLUS = 0 .. 9."""
    if CODE == 0:
        return h
    if CODE == 1:
        return tl.where(h < 0.0, 0.0, h)
    if CODE == 2:
        return 0.5 * h * (1.0 + tl.erf(h * 0.70710678))
    if CODE == 3:
        return 0.5 * h * (1.0 + tanh(0.79788456 * (h + 0.044715 * h * h * h)))
    if CODE == 4:
        return h / (1.0 + tl.exp(-h))
    if CODE == 5:
        return tanh(h)
    if CODE == 6:
        return 1.0 / (1.0 + tl.exp(-h))
    if CODE == 7:
        return tl.where(h < 0.0, 0.01 * h, h)
    if CODE == 8:
        # exp(h) - 1 = 2 t / (1 - t) of t = tanh(h / 2), which keeps the digits of a small h.
        t = tanh(tl.where(h > 0.0, 0.0, h) * 0.5)
        return tl.where(h > 0.0, h, 2.0 * t / (1.0 - t))
    # log(1 + z) = log(u) z / (u - 1) of u = 1 + z rounded: the rounding cancels.
    z = tl.exp(-tl.abs(h))
    u = 1.0 + z
    near = tl.where(u == 1.0, z, tl.log(u) * (z / tl.where(u == 1.0, 1.0, u - 1.0)))
    return tl.where(h < 0.0, 0.0, h) + near
