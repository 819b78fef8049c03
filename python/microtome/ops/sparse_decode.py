"""Reconstruct activations from k active features per row, and the two gradients of doing so."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from microtome import _check, _native
from microtome.ops._registry import Backend, Op, why_not_common
from microtome.ops.sparse_decode_csr import check_offsets, csr_decode

_FLOATS = (torch.float32, torch.bfloat16)


def sparse_decode(
    values: Tensor,
    indices: Tensor,
    W_dec: Tensor,
    b_dec: Tensor | None = None,
    offsets: Tensor | None = None,
) -> Tensor:
    """Reconstruct activations from the active features of each row.

        out[i] = b_dec + sum_j values[i, j] * W_dec[indices[i, j]]

    Args:
        values: [n, k], or [m] with `offsets`. float32, bfloat16, float16 or float64. Feature
            activations, in units of the decoder rows.
        indices: int32 or int64, same shape, each in [0, f). Repeats add up.
        W_dec: [f, d], one row per feature, dtype of values.
        b_dec: [d], or None for zero.
        offsets: [n + 1] int64 or int32 for rows of any length, as `batch_topk_encode` and
            `threshold_encode` give: row i is entries offsets[i] to offsets[i + 1]. Entries from
            offsets[n] on are unused and get no gradient. On a CPU plain PyTorch runs these codes.

    Returns:
        [n, d], dtype of values, accumulated in float32 (float64 for float64).

    Raises:
        ShapeError: the letters above do not agree.
        DtypeError: values, W_dec and b_dec differ in dtype, or indices are not integers.
        ArgumentError: an index lies outside [0, f), or offsets fall or reach beyond the entries. On
            a GPU a later call raises for an index; offsets are not read back there, and entries
            that are not there count as none.
        BackendError: a demanded backend cannot run these inputs.

    Differentiable in values, W_dec, b_dec, to any order. Deterministic: the same bits for any
    number of threads. Reads n*k*d weights; never forms the [n, f] code. A W_dec that is not
    contiguous is copied first.
    Source: Gao et al. 2024, arXiv:2406.04093.

    Example:
        >>> import torch
        >>> W_dec = torch.tensor([[1.0, 0.0], [0.0, 3.0]])
        >>> sparse_decode(torch.tensor([[2.0]]), torch.tensor([[1]]), W_dec)
        tensor([[0., 6.]])
    """
    letters = "n k" if offsets is None else "m"
    sizes = _check.shapes(
        "sparse_decode",
        values=(values, letters),
        indices=(indices, letters),
        W_dec=(W_dec, "f d"),
        b_dec=(b_dec, "d"),
    )
    _check.dtype("sparse_decode", _check.FLOATS, values=values)
    _check.same_dtype("sparse_decode", values=values, W_dec=W_dec, b_dec=b_dec)
    _check.dtype("sparse_decode", _check.INDICES, indices=indices)
    _check.device(
        "sparse_decode", values=values, indices=indices, W_dec=W_dec, b_dec=b_dec, offsets=offsets
    )
    if offsets is not None:
        check_offsets("sparse_decode", offsets, sizes["m"])
    if _check.readable(indices):
        _check.index_range("sparse_decode", indices, sizes["f"])
    out: Tensor = (
        _decode(values, indices, W_dec, b_dec)
        if offsets is None
        else csr_decode(values, indices, offsets, W_dec, b_dec)
    )
    return out


def sparse_decode_reference(
    values: Tensor, indices: Tensor, W_dec: Tensor, b_dec: Tensor | None
) -> Tensor:
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


def sparse_decode_grad_W_dec_reference(
    values: Tensor, indices: Tensor, grad_out: Tensor, f: int
) -> Tensor:
    """grad_W_dec[g] = sum of values[i, j] * grad_out[i] where indices[i, j] == g, [f, d]."""
    wide = torch.float64 if values.dtype == torch.float64 else torch.float32
    out = torch.zeros(f, grad_out.shape[1], dtype=wide, device=values.device)  # [f, d]
    for j in range(values.shape[1]):
        out.index_add_(0, indices[:, j].long(), values[:, j, None].to(wide) * grad_out.to(wide))
    return out.to(values.dtype)


def _setup_context(
    ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Tensor, ...], output: Tensor
) -> None:
    values, indices, W_dec, _ = inputs
    ctx.save_for_backward(values, indices, W_dec)


def _backward(
    ctx: torch.autograd.function.FunctionCtx, grad_out: Tensor
) -> tuple[Tensor | None, ...]:
    values, indices, W_dec = ctx.saved_tensors  # type: ignore[attr-defined]
    need = ctx.needs_input_grad  # type: ignore[attr-defined]
    grad_out = grad_out.contiguous()
    return (
        _grad_values(grad_out, indices, W_dec) if need[0] else None,
        None,
        _grad_W_dec(values, indices, grad_out, W_dec.shape[0]) if need[2] else None,
        grad_out.sum(0) if need[3] else None,
    )


def why_not_code(backend: str, *args: object) -> str | None:
    """Why a backend cannot take a sparse code: the common reasons, mixed dtypes, or a huge f."""
    tensors = [a for a in args if isinstance(a, Tensor)]
    dtypes = {t.dtype for t in tensors if t.is_floating_point()}
    if len(dtypes) > 1:
        return "dtypes differ: " + ", ".join(sorted(str(d).removeprefix("torch.") for d in dtypes))
    f = max((a for a in args if isinstance(a, int)), default=tensors[2].shape[0])
    if f >= 2**31:
        return f"f={f} (has f below 2**31)"
    return why_not_common(backend, tensors, _FLOATS)


def _cpu_decode(values: Tensor, indices: Tensor, W_dec: Tensor, b_dec: Tensor | None) -> Tensor:
    (n, k), (f, d) = values.shape, W_dec.shape
    values, W_dec = values.contiguous(), W_dec.contiguous()
    b_dec = None if b_dec is None else b_dec.contiguous()
    codes = _native.int32(indices, f)
    out = torch.empty(n, d, dtype=values.dtype)
    _native.run_code("sparse_decode", (values, codes, W_dec, b_dec, out), indices, n, k, d, f)
    return out


def _cpu_grad_values(grad_out: Tensor, indices: Tensor, W_dec: Tensor) -> Tensor:
    (n, k), (f, d) = indices.shape, W_dec.shape
    grad_out, W_dec = grad_out.contiguous(), W_dec.contiguous()
    codes = _native.int32(indices, f)
    out = torch.empty(n, k, dtype=grad_out.dtype)
    _native.run_code(
        "sparse_decode_grad_values", (grad_out, codes, W_dec, out), indices, n, k, d, f
    )
    return out


def _cpu_grad_W_dec(values: Tensor, indices: Tensor, grad_out: Tensor, f: int) -> Tensor:
    (n, k), d = indices.shape, grad_out.shape[1]
    values, grad_out = values.contiguous(), grad_out.contiguous()
    codes = _native.int32(indices, f)
    out = torch.empty(f, d, dtype=values.dtype)
    _native.run_code(
        "sparse_decode_grad_W_dec", (values, codes, grad_out, out), indices, n, k, d, f
    )
    return out


def _why_not_triton(*args: object) -> str | None:
    tensors = [a for a in args if isinstance(a, Tensor)]
    return why_not_common("triton", tensors, (*_FLOATS, torch.float16))


def _native_backends(triton: str, cpu: str) -> list[Backend]:
    return [
        Backend("triton", f"microtome.kernels.sparse_decode:{triton}", _why_not_triton),
        Backend("cpu", f"{__name__}:{cpu}", partial(why_not_code, "cpu")),
    ]


def _save_tensors(
    ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Tensor, ...], output: Tensor
) -> None:
    ctx.save_for_backward(*inputs[:3])


# Each gradient is linear in what it is made of, so the three ops are each other's derivatives.
def _grad_values_backward(
    ctx: torch.autograd.function.FunctionCtx, grad: Tensor
) -> tuple[Tensor | None, ...]:
    grad_out, indices, W_dec = ctx.saved_tensors  # type: ignore[attr-defined]
    need = ctx.needs_input_grad  # type: ignore[attr-defined]
    return (
        _decode(grad, indices, W_dec, None) if need[0] else None,
        None,
        _grad_W_dec(grad, indices, grad_out, W_dec.shape[0]) if need[2] else None,
    )


def _grad_W_dec_backward(
    ctx: torch.autograd.function.FunctionCtx, grad: Tensor
) -> tuple[Tensor | None, ...]:
    values, indices, grad_out = ctx.saved_tensors  # type: ignore[attr-defined]
    need = ctx.needs_input_grad  # type: ignore[attr-defined]
    return (
        _grad_values(grad_out, indices, grad) if need[0] else None,
        None,
        _decode(values, indices, grad, None) if need[2] else None,
        None,
    )


_grad_values = Op(
    sparse_decode_grad_values_reference,
    fake=lambda grad_out, indices, W_dec: grad_out.new_empty(indices.shape),
    backends=_native_backends("launch_grad_values", "_cpu_grad_values"),
    gathers={"indices": ("W_dec", "f")},
    backward=_grad_values_backward,
    setup_context=_save_tensors,
)
_grad_W_dec = Op(
    sparse_decode_grad_W_dec_reference,
    fake=lambda values, indices, grad_out, f: values.new_empty(f, grad_out.shape[1]),
    backends=_native_backends("launch_grad_W_dec", "_cpu_grad_W_dec"),
    backward=_grad_W_dec_backward,
    setup_context=_save_tensors,
)
_decode = Op(
    sparse_decode_reference,
    fake=lambda values, indices, W_dec, b_dec: values.new_empty(values.shape[0], W_dec.shape[1]),
    backends=_native_backends("launch", "_cpu_decode"),
    gathers={"indices": ("W_dec", "f")},
    backward=_backward,
    setup_context=_setup_context,
)
