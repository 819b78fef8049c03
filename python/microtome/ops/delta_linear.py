"""A linear layer on what a patch changed: a float32 base plus a bfloat16 product."""

from __future__ import annotations

import torch
from torch import Tensor

from microtome import _check, _native
from microtome.ops._registry import Backend, Op, triton_backend, why_not_common
from microtome.ops.pack_weights import FLOATS, check_outputs, check_packed, unpack_weights


def delta_linear(
    x: Tensor,
    x_base: Tensor,
    y_base: Tensor,
    index: Tensor,
    packed: Tensor,
    o: int,
    add: Tensor | None = None,
) -> Tensor:
    """Multiply only what differs from a base row, in bfloat16, and add the base's own product.

        y[t] = y_base[index[t]] + bf16(x[t] - x_base[index[t]]) bf16(W)^T + add[t]

    With y_base = x_base W^T + bias in float32 the error of an output is at most about 2^-8 of
    sum_c |x - x_base|_c |W|_c: it scales with the effect of the patch and not with the activation.
    Where x[t] equals its base row, y[t] is y_base[index[t]] (+ add[t]) exactly.

    Args:
        x: [T, i] float32 or float64. Rows may lie apart, as may those of x_base, y_base and add.
        x_base: [r, i], dtype of x. The base rows.
        y_base: [r, o], dtype of x. What the layer made of them, bias included.
        index: [T] int32 or int64, each in [0, r): the base row of a row.
        packed: [ceil(o/32), 16 ceil(i/32), 32, 2] bfloat16, from `pack_weights(W, "bf16")`.
        o: outputs, the rows of W.
        add: [T, o], dtype of x, or None for zero.

    Returns:
        [T, o], dtype of x; products and sums in float32 (float64 for float64).

    Raises:
        ShapeError: the letters above do not agree.
        DtypeError: the dtypes differ or are not those above.
        DeviceError: the tensors lie on different devices.
        ArgumentError: an index lies outside [0, r).
        BackendError: a demanded backend cannot run these inputs.

    Not differentiable. Deterministic: the same bits for any number of threads at one instruction
    set. The levels avx512bf16 and amx take subnormal numbers for zero and round sums in their own
    way, so their last bits differ from those of the other levels. NaN and infinity pass through.
    Neither x - x_base nor its rounding is ever stored: both happen as rows are packed for the
    product (on a GPU many rows are rounded first, at most 64 MiB at once). Costs 2 T i o
    operations.
    Source: docs/exactness.md.

    Example:
        >>> import torch
        >>> from microtome.ops import pack_weights
        >>> W, x_base = torch.tensor([[1.0, 2.0], [0.0, -1.0]]), torch.tensor([[1000.1, 1.0]])
        >>> x = torch.tensor([[1000.1, 1.5]])
        >>> index, packed = torch.tensor([0]), pack_weights(W, "bf16")
        >>> delta_linear(x, x_base, x_base @ W.T, index, packed, o=2) - x_base @ W.T
        tensor([[ 1.0000, -0.5000]])
    """
    op = "delta_linear"
    sizes = _check.shapes(
        op,
        x=(x, "T i"),
        x_base=(x_base, "r i"),
        y_base=(y_base, "r o"),
        index=(index, "T"),
        add=(add, "T o"),
    )
    check_outputs(op, sizes, o)
    _check.dtype(op, FLOATS, x=x)
    _check.same_dtype(op, x=x, x_base=x_base, y_base=y_base, add=add)
    _check.dtype(op, _check.INDICES, index=index)
    check_packed(op, packed, o, sizes["i"], "bf16", torch.bfloat16)
    _check.device(op, x=x, x_base=x_base, y_base=y_base, index=index, packed=packed, add=add)
    if _check.readable(index):
        _check.index_range(op, index, sizes["r"], "r")
    y: Tensor = _delta(x, x_base, y_base, index, packed, o, add)
    return y


def delta_linear_reference(
    x: Tensor,
    x_base: Tensor,
    y_base: Tensor,
    index: Tensor,
    packed: Tensor,
    o: int,
    add: Tensor | None,
) -> Tensor:
    """The formula above, each step a tensor of its own."""
    at = index.long()
    delta = (x - x_base[at]).to(torch.bfloat16).to(x.dtype)  # [T, i]
    W = unpack_weights(packed, o, x.shape[1]).to(x.dtype)  # [o, i]
    y = y_base[at] + delta @ W.T  # [T, o]
    return y if add is None else y + add


def _fake(
    x: Tensor,
    x_base: Tensor,
    y_base: Tensor,
    index: Tensor,
    packed: Tensor,
    o: int,
    add: Tensor | None,
) -> Tensor:
    return x.new_empty(x.shape[0], o)


def _cpu(
    x: Tensor,
    x_base: Tensor,
    y_base: Tensor,
    index: Tensor,
    packed: Tensor,
    o: int,
    add: Tensor | None,
) -> Tensor:
    x, x_base, y_base, packed = *map(_native.rows, (x, x_base, y_base)), packed.contiguous()
    add = None if add is None else _native.rows(add)
    (T, i), r = x.shape, x_base.shape[0]
    at = _native.int32(index, r)
    y = _native.empty(T, o)
    bad = _native.module().delta_linear(
        x.data_ptr(),
        x.stride(0),
        x_base.data_ptr(),
        x_base.stride(0),
        y_base.data_ptr(),
        y_base.stride(0),
        at.data_ptr(),
        packed.data_ptr(),
        _native.address(add),
        0 if add is None else add.stride(0),
        y.data_ptr(),
        T,
        r,
        i,
        o,
        _native.isa(),
        _native.threads(),
    )
    if bad >= 0:
        _check.index_range("delta_linear", index, r, "r")
    return y


def _why_not_cpu(
    x: Tensor,
    x_base: Tensor,
    y_base: Tensor,
    index: Tensor,
    packed: Tensor,
    o: int,
    add: Tensor | None,
) -> str | None:
    if x_base.shape[0] >= 2**31:
        return f"r={x_base.shape[0]} (has r below 2**31)"
    return why_not_common("cpu", [x, x_base, y_base, index, add], (torch.float32,))


_delta = Op(
    delta_linear_reference,
    fake=_fake,
    gathers={"index": ("x_base", "r")},
    backends=[
        triton_backend("microtome.kernels.delta_linear:launch", torch.float32, torch.bfloat16),
        Backend("cpu", f"{__name__}:_cpu", _why_not_cpu),
    ],
)
