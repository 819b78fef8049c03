"""A linear layer over packed float32 weights, with bias and a second term added as it is stored.

Only processors read such panels, so there is no Triton kernel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from microtome import _autocast, _check, _native
from microtome.ops._registry import Backend, Op, why_not_common
from microtome.ops.pack_weights import FLOATS, check_outputs, check_packed, unpack_weights


def packed_linear(
    x: Tensor, packed: Tensor, o: int, bias: Tensor | None = None, add: Tensor | None = None
) -> Tensor:
    """Multiply rows with a packed weight matrix, and add a bias and a matrix on the way out.

        y = x W^T + bias + add,  packed = pack_weights(W, "fp32")

    Args:
        x: [T, i] float32 or float64. Rows may lie apart (a view of columns needs no copy).
        packed: [ceil(o/32), i, 32], dtype of x, from `pack_weights`.
        o: outputs, the rows of W.
        bias: [o], dtype of x, or None for zero.
        add: [T, o], dtype of x, or None for zero: a residual stream, say.

    Returns:
        [T, o], dtype of x, accumulated in it.

    Raises:
        ShapeError, ArgumentError: the letters above do not agree.
        DtypeError: the dtypes differ, or are neither float32 nor float64.
        DeviceError: the tensors lie on different devices.
        BackendError: a demanded backend cannot run these inputs.

    Not differentiable. Deterministic: the same bits for any number of threads. NaN and infinity
    pass through as in torch.nn.functional.linear. Costs 2 T i o operations and one reading of
    `packed` for each block of rows that fits the second-level cache.

    Example:
        >>> import torch
        >>> from microtome.ops import pack_weights
        >>> W = torch.tensor([[1.0, 2.0], [0.0, -1.0], [3.0, 0.0]])
        >>> packed_linear(torch.tensor([[1.0, 10.0]]), pack_weights(W), o=3)
        tensor([[ 21., -10.,   3.]])
    """
    op = "packed_linear"
    sizes = _check.shapes(op, x=(x, "T i"), bias=(bias, "o"), add=(add, "T o"))
    check_outputs(op, sizes, o)
    _check.dtype(op, FLOATS, x=x)
    _check.same_dtype(op, x=x, bias=bias, add=add)
    (dtype,) = _autocast.dtypes(op, {"x": x}).values()
    check_packed(op, packed, o, sizes["i"], "fp32", dtype)
    _check.device(op, x=x, packed=packed, bias=bias, add=add)
    y: Tensor = _linear(x, packed, o, bias, add)
    return y


def packed_linear_reference(
    x: Tensor, packed: Tensor, o: int, bias: Tensor | None, add: Tensor | None
) -> Tensor:
    """Unpack, and let torch multiply."""
    y = torch.nn.functional.linear(x, unpack_weights(packed, o, x.shape[1]), bias)  # [T, o]
    return y if add is None else y + add


def _fake(x: Tensor, packed: Tensor, o: int, bias: Tensor | None, add: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], o)


def _cpu(x: Tensor, packed: Tensor, o: int, bias: Tensor | None, add: Tensor | None) -> Tensor:
    x, packed = _native.rows(x), packed.contiguous()
    bias = None if bias is None else bias.contiguous()
    add = None if add is None else _native.rows(add)
    y = torch.empty(x.shape[0], o, dtype=x.dtype)
    _native.module().packed_linear(
        x.data_ptr(),
        x.stride(0),
        packed.data_ptr(),
        _native.address(bias),
        _native.address(add),
        0 if add is None else add.stride(0),
        y.data_ptr(),
        *x.shape,
        o,
        _native.forced_isa(),
        _native.threads(),
    )
    return y


def _why_not_cpu(
    x: Tensor, packed: Tensor, o: int, bias: Tensor | None, add: Tensor | None
) -> str | None:
    return why_not_common("cpu", [x, packed, bias, add], (torch.float32,))


_linear = Op(
    packed_linear_reference,
    fake=_fake,
    backends=[Backend("cpu", f"{__name__}:_cpu", _why_not_cpu)],
)
