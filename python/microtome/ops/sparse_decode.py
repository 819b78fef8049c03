"""Reconstruct activations from k active features per row, and the two gradients of doing so."""

from __future__ import annotations

import torch
from torch import Tensor

from microtome import _check, _native
from microtome.ops._registry import Backend, Op, why_not_common

_FLOATS = (torch.float32, torch.bfloat16)


def sparse_decode(values: Tensor, indices: Tensor, W_dec: Tensor, b_dec: Tensor | None = None) -> Tensor:
    """Reconstruct activations from k active features per row.

        out[i] = b_dec + sum_j values[i, j] * W_dec[indices[i, j]]

    Args:
        values: [n, k] float32, bfloat16, float16 or float64. Feature activations, in units of the decoder rows.
        indices: [n, k] int32 or int64, each in [0, f). Repeats add up.
        W_dec: [f, d], one row per feature, dtype of values.
        b_dec: [d], or None for zero.

    Returns:
        [n, d], dtype of values, accumulated in float32 (float64 for float64).

    Raises:
        ShapeError: the letters above do not agree.
        DtypeError: values, W_dec and b_dec differ in dtype, or indices are not integers.
        ArgumentError: an index lies outside [0, f).
        BackendError: a demanded backend cannot run these inputs.

    Differentiable in values, W_dec, b_dec. Deterministic. Reads n*k*d weights; never forms the [n, f] code.
    Source: Gao et al. 2024, arXiv:2406.04093.

    Example:
        >>> import torch
        >>> sparse_decode(torch.tensor([[2.0]]), torch.tensor([[1]]), torch.tensor([[1.0, 0.0], [0.0, 3.0]]))
        tensor([[0., 6.]])
    """
    sizes = _check.shapes(
        "sparse_decode", values=(values, "n k"), indices=(indices, "n k"), W_dec=(W_dec, "f d"), b_dec=(b_dec, "d")
    )
    _check.dtype("sparse_decode", _check.FLOATS, values=values)
    _check.same_dtype("sparse_decode", values=values, W_dec=W_dec, b_dec=b_dec)
    _check.dtype("sparse_decode", _check.INDICES, indices=indices)
    _check.device("sparse_decode", values=values, indices=indices, W_dec=W_dec, b_dec=b_dec)
    if not torch.compiler.is_compiling():
        _check.index_range("sparse_decode", indices, sizes["f"])
    out: Tensor = _decode(values, indices, W_dec, b_dec)
    return out


def sparse_decode_reference(values: Tensor, indices: Tensor, W_dec: Tensor, b_dec: Tensor | None) -> Tensor:
    """One feature at a time, so nothing larger than [n, d] is formed."""
    wide = torch.float64 if values.dtype == torch.float64 else torch.float32
    out = torch.zeros(values.shape[0], W_dec.shape[1], dtype=wide, device=values.device)  # [n, d]
    for j in range(values.shape[1]):
        out += values[:, j, None].to(wide) * W_dec[indices[:, j].long()].to(wide)
    if b_dec is not None:
        out += b_dec.to(wide)
    return out.to(values.dtype)


def sparse_decode_grad_values_reference(grad_out: Tensor, indices: Tensor, W_dec: Tensor) -> Tensor:
    """grad_values[i, j] = <grad_out[i], W_dec[indices[i, j]]>, [n, k], dtype of grad_out."""
    wide = torch.float64 if grad_out.dtype == torch.float64 else torch.float32
    out = torch.empty(indices.shape, dtype=wide, device=grad_out.device)  # [n, k]
    for j in range(indices.shape[1]):
        out[:, j] = (grad_out.to(wide) * W_dec[indices[:, j].long()].to(wide)).sum(-1)
    return out.to(grad_out.dtype)


def sparse_decode_grad_W_dec_reference(values: Tensor, indices: Tensor, grad_out: Tensor, f: int) -> Tensor:
    """grad_W_dec[g] = sum over (i, j) with indices[i, j] == g of values[i, j] * grad_out[i], [f, d]."""
    wide = torch.float64 if values.dtype == torch.float64 else torch.float32
    out = torch.zeros(f, grad_out.shape[1], dtype=wide, device=values.device)  # [f, d]
    for j in range(values.shape[1]):
        out.index_add_(0, indices[:, j].long(), values[:, j, None].to(wide) * grad_out.to(wide))
    return out.to(values.dtype)


def _setup_context(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    values, indices, W_dec, _ = inputs
    ctx.save_for_backward(values, indices, W_dec)


def _backward(ctx: torch.autograd.function.FunctionCtx, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    values, indices, W_dec = ctx.saved_tensors  # type: ignore[attr-defined]
    need = ctx.needs_input_grad  # type: ignore[attr-defined]
    grad_out = grad_out.contiguous()
    return (
        _grad_values(grad_out, indices, W_dec) if need[0] else None,
        None,
        _grad_W_dec(values, indices, grad_out, W_dec.shape[0]) if need[2] else None,
        grad_out.sum(0) if need[3] else None,
    )


def _why_not(backend: str, *tensors: Tensor | None) -> str | None:
    return why_not_common(backend, tensors, _FLOATS)


def _why_not_triton(*args: object) -> str | None:
    tensors = [a for a in args if isinstance(a, Tensor)]
    return why_not_common("triton", tensors, (*_FLOATS, torch.float16))


_KERNEL = "microtome.kernels.sparse_decode:"
_grad_values = Op(
    sparse_decode_grad_values_reference,
    fake=lambda grad_out, indices, W_dec: grad_out.new_empty(indices.shape),
    backends=(Backend("triton", _KERNEL + "launch_grad_values", _why_not_triton),),
)
_grad_W_dec = Op(
    sparse_decode_grad_W_dec_reference,
    fake=lambda values, indices, grad_out, f: values.new_empty(f, grad_out.shape[1]),
    backends=(Backend("triton", _KERNEL + "launch_grad_W_dec", _why_not_triton),),
)
_decode = Op(
    sparse_decode_reference,
    fake=lambda values, indices, W_dec, b_dec: values.new_empty(values.shape[0], W_dec.shape[1]),
    backends=(Backend("triton", _KERNEL + "launch", _why_not_triton),),
    backward=_backward,
    setup_context=_setup_context,
)
