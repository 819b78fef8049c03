"""A weight matrix in panels of 32 outputs, as `packed_linear` and `delta_linear` read it.

Only processors read such panels, so there is no Triton kernel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from microtome import _check, _native
from microtome.errors import ArgumentError, DtypeError, ShapeError
from microtome.ops._registry import Backend, Op, why_not_common

KINDS = ("fp32", "bf16")
LANES = 32  # outputs of a panel
PAIRS = 16  # a bf16 panel's pairs of inputs come in multiples of this: one AMX tile is 16 rows high
FLOATS = (torch.float32, torch.float64)


def pack_weights(W: Tensor, kind: str = "fp32") -> Tensor:
    """Lay a weight matrix out in panels of 32 outputs, once, for many products with it.

        fp32: packed[p, c, j]    = W[32 p + j, c]
        bf16: packed[p, q, j, e] = bfloat16(W[32 p + j, 2 q + e])

    and zero where W has no such row or column.

    Args:
        W: [o, i] float32 or float64, outputs by inputs as in torch.nn.Linear. Any strides: pass the
            transposed view of a weight that is stored [i, o].
        kind: "fp32" for `packed_linear`, "bf16" for `delta_linear`.

    Returns:
        fp32: [ceil(o/32), i, 32], dtype of W. bf16: [ceil(o/32), 16 ceil(i/32), 32, 2] bfloat16,
        rounded to nearest, ties to even. A copy: later changes of W do not reach it.

    Raises:
        ShapeError, DtypeError: W is not a float32 or float64 matrix.
        ArgumentError: kind is neither.

    Not differentiable. Deterministic. Reads W once, writes as much (half as much for bf16).

    Example:
        >>> import torch
        >>> W = torch.arange(66.0).reshape(33, 2)
        >>> pack_weights(W).shape, pack_weights(W, "bf16").shape
        (torch.Size([2, 2, 32]), torch.Size([2, 16, 32, 2]))
    """
    _check.shapes("pack_weights", W=(W, "o i"))
    _check.dtype("pack_weights", FLOATS, W=W)
    _check.one_of("pack_weights", "kind", kind, KINDS)
    packed: Tensor = _pack(W, kind)
    return packed


def packed_shape(o: int, i: int, kind: str) -> tuple[int, ...]:
    """The shape of the packed form of a [o, i] matrix."""
    panels = -(-o // LANES)
    return (panels, i, LANES) if kind == "fp32" else (panels, PAIRS * -(-i // LANES), LANES, 2)


def pack_weights_reference(W: Tensor, kind: str) -> Tensor:
    """The formulas above, by padding and transposing."""
    o, i = W.shape
    if kind == "fp32":
        panels = -(-o // LANES)
        wide = W.new_zeros(panels * LANES, i)
        wide[:o] = W
        return wide.reshape(panels, LANES, i).transpose(1, 2).contiguous()
    panels, pairs, _, _ = packed_shape(o, i, kind)
    narrow = W.new_zeros(panels * LANES, pairs * 2, dtype=torch.bfloat16)
    narrow[:o, :i] = W.to(torch.bfloat16)
    return narrow.reshape(panels, LANES, pairs, 2).transpose(1, 2).contiguous()


def unpack_weights(packed: Tensor, o: int, i: int) -> Tensor:
    """The matrix [o, i] of a packed one, dtype of packed."""
    rows = packed.shape[0] * LANES
    inputs = packed.shape[1] * (1 if packed.dim() == 3 else 2)
    return packed.transpose(1, 2).reshape(rows, inputs)[:o, :i]


def check_outputs(op: str, sizes: dict[str, int], o: int) -> None:
    """Raise unless o is a count and the one that the other tensors have."""
    if o < 0:
        msg = f"{op}: o must be the number of outputs, got o={o}."
        raise ArgumentError(msg)
    if sizes.get("o", o) != o:
        msg = f"{op}: o must be {sizes['o']}, as the other tensors have it, got o={o}."
        raise ShapeError(msg)


def check_packed(op: str, packed: Tensor, o: int, i: int, kind: str, dtype: torch.dtype) -> None:
    """Raise DtypeError or ShapeError unless `packed` is `pack_weights` of a [o, i] matrix."""
    if packed.dtype != dtype:
        msg = (
            f"{op}: packed must be {_check.dtype_name(dtype)}, got "
            f"{_check.dtype_name(packed.dtype)}. Make it with pack_weights(W, {kind!r})."
        )
        raise DtypeError(msg)
    wanted = packed_shape(o, i, kind)
    if tuple(packed.shape) != wanted:
        msg = (
            f"{op}: packed must be {list(wanted)} for o={o} outputs and i={i} inputs, got shape "
            f"{list(packed.shape)}. Make it with pack_weights(W, {kind!r}) of a W [o, i]."
        )
        raise ShapeError(msg)


def _fake(W: Tensor, kind: str) -> Tensor:
    dtype = W.dtype if kind == "fp32" else torch.bfloat16
    return W.new_empty(packed_shape(W.shape[0], W.shape[1], kind), dtype=dtype)


def _cpu(W: Tensor, kind: str) -> Tensor:
    """Panel by panel in C++, csrc/cpu/pack_weights.cpp."""
    packed = torch.empty(
        packed_shape(W.shape[0], W.shape[1], kind),
        dtype=torch.float32 if kind == "fp32" else torch.bfloat16,
    )
    _native.module().pack_weights(
        W.data_ptr(), *W.shape, *W.stride(), kind == "bf16", packed.data_ptr(), _native.threads()
    )
    return packed


def _why_not_cpu(W: Tensor, kind: str) -> str | None:
    return why_not_common("cpu", [W], (torch.float32,))


_pack = Op(
    pack_weights_reference,
    fake=_fake,
    backends=[Backend("cpu", f"{__name__}:_cpu", _why_not_cpu)],
)
