"""Decode, squared error and the gradient of the values, in one pass over the decoder rows."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from microtome import _check, _native
from microtome.ops._registry import Backend, Op, why_not_common
from microtome.ops.sparse_decode import _grad_W_dec, why_not_code


def sae_loss(
    x: Tensor, values: Tensor, indices: Tensor, W_dec: Tensor, b_dec: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Squared error of a sparse reconstruction, and what its backward pass needs, in one pass.

        e[i]              = b_dec + sum_j values[i, j] * W_dec[indices[i, j]] - x[i]
        sse[i]            = <e[i], e[i]>
        grad_out[i]       = 2 e[i]
        grad_values[i, j] = <grad_out[i], W_dec[indices[i, j]]>   where values[i, j] != 0, else 0

    A latent whose value is zero was cut by the ReLU, so it gets no gradient.

    Args:
        x: [n, d] float32, bfloat16, float16 or float64. The target.
        values: [n, k], dtype of x. Feature activations after the ReLU.
        indices: [n, k] int32 or int64, each in [0, f).
        W_dec: [f, d], dtype of x.
        b_dec: [d], or None for zero.

    Returns:
        sse [n] in float32 (float64 for float64), grad_out [n, d], grad_values [n, k] in x's dtype;
        all accumulated in float32.

    Raises:
        ShapeError, DtypeError, DeviceError, ArgumentError: as for sparse_decode.
        BackendError: a demanded backend cannot run these inputs.

    `sse` is differentiable once in x, values, W_dec, b_dec; the other two outputs are not.
    Deterministic: the same bits for any number of threads. Reads each active decoder row once from
    memory (the second use hits the cache); the reconstruction is never formed.
    Source: Gao et al. 2024, arXiv:2406.04093.
    """
    sizes = _check.shapes(
        "sae_loss",
        x=(x, "n d"),
        values=(values, "n k"),
        indices=(indices, "n k"),
        W_dec=(W_dec, "f d"),
        b_dec=(b_dec, "d"),
    )
    _check.dtype("sae_loss", _check.FLOATS, x=x)
    _check.same_dtype("sae_loss", x=x, values=values, W_dec=W_dec, b_dec=b_dec)
    _check.dtype("sae_loss", _check.INDICES, indices=indices)
    _check.device("sae_loss", x=x, values=values, indices=indices, W_dec=W_dec, b_dec=b_dec)
    if _check.readable(indices):
        _check.index_range("sae_loss", indices, sizes["f"])
    sse, grad_out, grad_values = _loss(x, values, indices, W_dec, b_dec)
    return sse, grad_out, grad_values


def sae_loss_reference(
    x: Tensor, values: Tensor, indices: Tensor, W_dec: Tensor, b_dec: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The formulas above, one feature slot at a time."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    e = -x.contiguous().to(wide)  # [n, d]
    if b_dec is not None:
        e = e + b_dec.to(wide)
    for j in range(values.shape[1]):
        e = e + values[:, j, None].to(wide) * W_dec[indices[:, j].long()].to(wide)
    grad_out = 2 * e
    grad_values = torch.empty(values.shape, dtype=wide, device=x.device)  # [n, k]
    for j in range(values.shape[1]):
        grad_values[:, j] = (grad_out * W_dec[indices[:, j].long()].to(wide)).sum(-1)
    grad_values = grad_values.masked_fill(values == 0, 0.0)
    return (e * e).sum(-1), grad_out.to(x.dtype), grad_values.to(x.dtype)


def _setup_context(
    ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]
) -> None:
    _, values, indices, W_dec, _ = inputs
    _, grad_out, grad_values = output
    ctx.save_for_backward(values, indices, grad_out, grad_values)
    ctx.f = W_dec.shape[0]  # type: ignore[attr-defined]
    ctx.mark_non_differentiable(grad_out, grad_values)


# The saved gradients stand for functions of the inputs: differentiating them again must not pass.
@once_differentiable
def _backward(
    ctx: torch.autograd.function.FunctionCtx, grad_sse: Tensor, *_: Tensor | None
) -> tuple[Tensor | None, ...]:
    values, indices, grad_out, grad_values = ctx.saved_tensors  # type: ignore[attr-defined]
    need, f = ctx.needs_input_grad, ctx.f  # type: ignore[attr-defined]
    row = grad_sse[:, None].to(grad_out.dtype)  # [n, 1]
    grad = grad_out * row  # [n, d]
    return (
        -grad if need[0] else None,
        grad_values * row if need[1] else None,
        None,
        _grad_W_dec(values, indices, grad, f) if need[3] else None,
        grad.sum(0) if need[4] else None,
    )


def _fake(
    x: Tensor, values: Tensor, indices: Tensor, W_dec: Tensor, b_dec: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.new_empty(x.shape[0], dtype=wide), x.new_empty(x.shape), x.new_empty(values.shape)


def _cpu_loss(
    x: Tensor, values: Tensor, indices: Tensor, W_dec: Tensor, b_dec: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    (n, k), (f, d) = values.shape, W_dec.shape
    x, values, W_dec = x.contiguous(), values.contiguous(), W_dec.contiguous()
    b_dec = None if b_dec is None else b_dec.contiguous()
    codes = _native.int32(indices, f)
    sse = torch.empty(n, dtype=torch.float32)
    grad_out, grad_values = torch.empty(n, d, dtype=x.dtype), torch.empty(n, k, dtype=x.dtype)
    tensors = (x, values, codes, W_dec, b_dec, sse, grad_out, grad_values)
    _native.run_code("sae_loss", tensors, indices, n, k, d, f)
    return sse, grad_out, grad_values


def _why_not(backend: str, x: Tensor, *code: Tensor | None) -> str | None:
    return why_not_code(backend, *code, x)


def _why_not_triton(x: Tensor, *rest: Tensor | None) -> str | None:
    if x.shape[1] > 16384:
        return f"d={x.shape[1]} (a program holds a row of up to 16384)"
    return why_not_common("triton", (x, *rest), (torch.float32, torch.bfloat16, torch.float16))


_loss = Op(
    sae_loss_reference,
    fake=_fake,
    gathers={"indices": ("W_dec", "f")},
    backends=(
        Backend("triton", "microtome.kernels.sae_loss:launch", _why_not_triton),
        Backend("cpu", f"{__name__}:_cpu_loss", partial(_why_not, "cpu")),
    ),
    backward=_backward,
    setup_context=_setup_context,
)
