"""SoLU, the activation that makes neurons of an MLP compete: x * softmax(x).

There is no C++: on a CPU the reference answers, by torch's softmax and a product.
"""

from __future__ import annotations

import torch
from torch import Tensor

from microtome import _check
from microtome.ops._registry import Op, triton_backend

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def solu(x: Tensor) -> Tensor:
    """Multiply every entry by its share of the softmax over the last axis.

        out[..., i] = x[..., i] * softmax(x, -1)[..., i]

    A layer of it favours few large neurons over many middling ones. The models of its paper have a
    LayerNorm right after it.

    Args:
        x: [..., d] float32, bfloat16, float16 or float64.

    Returns:
        [..., d] in x's dtype, contiguous, computed in float32 (float64 for float64).

    Raises:
        ShapeError: x has no axis.
        DtypeError: x is not floating.
        BackendError: a demanded backend cannot run these inputs.

    Differentiable. Deterministic. Reads x once and writes once (twice where d is above 16384); the
    gradient reads x and the gradient once.
    Source: Elhage et al. 2022, https://transformer-circuits.pub/2022/solu.

    Example:
        >>> import torch
        >>> solu(torch.tensor([0.0, 4.0])).round(decimals=2)
        tensor([0.0000, 3.9300])
    """
    if x.dim() == 0:
        _check.shapes("solu", x=(x, "d"))
    _check.dtype("solu", _check.FLOATS, x=x)
    out: Tensor = _solu(x)
    return out


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def solu_reference(x: Tensor) -> Tensor:
    """The formula."""
    wide = _wide(x)
    return (wide * wide.softmax(-1)).to(x.dtype).contiguous()


def solu_grad_x_reference(grad_out: Tensor, x: Tensor) -> Tensor:
    """With s = softmax(x): s * (g + g x - <g, x s>)."""
    g, wide = _wide(grad_out), _wide(x)
    s = wide.softmax(-1)
    along = (g * wide * s).sum(-1, keepdim=True)
    return (s * (g + g * wide - along)).to(x.dtype).contiguous()


def _fake(*tensors: Tensor) -> Tensor:
    return torch.empty(tensors[-1].shape, dtype=tensors[-1].dtype, device=tensors[-1].device)


def _setup_context(
    ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Tensor], output: Tensor
) -> None:
    ctx.save_for_backward(inputs[0])


def _backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> Tensor:
    (x,) = ctx.saved_tensors  # type: ignore[attr-defined]
    out: Tensor = _solu_grad_x(grad, x)
    return out


_solu = Op(
    solu_reference,
    fake=_fake,
    backends=[triton_backend("microtome.kernels.solu:launch", *_FLOATS)],
    backward=_backward,
    setup_context=_setup_context,
)
_solu_grad_x = Op(
    solu_grad_x_reference,
    fake=_fake,
    backends=[triton_backend("microtome.kernels.solu:launch_grad_x", *_FLOATS)],
)
