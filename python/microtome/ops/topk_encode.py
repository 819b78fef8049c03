"""The k largest pre-activations of every row, exact, without forming the [n, f] pre-activations."""

from __future__ import annotations

import torch
from torch import Tensor

from microtome import _check, _native
from microtome.ops._registry import Backend, Op, why_not_common
from microtome.ops.screen_weights import Screen

PRECISIONS = ("exact", "fast")


def topk_encode(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None = None,
    b_dec: Tensor | None = None,
    *,
    k: int,
    precision: str = "exact",
    screen: Screen | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Find the k largest pre-activations of every row without forming all of them.

        z = (x - b_dec) W_enc^T + b_enc;  values[i], indices[i] = top k of z[i], value descending, index ascending

    Low precision (bf16 tiles or 16-bit integers) rules out the features that provably cannot be among the k; the
    few that remain are computed in float32. So the answer is that of the float32 product.

    Args:
        x: [n, d] float32, bfloat16, float16 or float64. Activations.
        W_enc: [f, d], dtype of x, one row per feature.
        b_enc: [f], or None for zero.
        b_dec: [d] subtracted from x first, or None.
        k: how many, 1 <= k <= f.
        precision: "exact", or "fast": the k best by the low-precision scores, whose values are then computed in
            float32. "fast" may miss a feature whose value is within the rounding of the low precision (bf16: about
            0.4 % of |x||w|) of the k-th; a backend that does not screen answers exactly.
        screen: what `screen_weights(W_enc)` returned for these very weights, so that the call need not build it.

    Returns:
        values [n, k] in x's dtype (pre-activations: apply the ReLU yourself), accumulated in float32;
        indices [n, k] int32;
        candidates [n] int32, the certificate: how many features of the row were computed in float32. f means that
        the row was computed whole.

    Raises:
        ShapeError, DtypeError, DeviceError: the letters, dtypes or devices do not agree.
        ArgumentError: k or precision is out of its range.
        NonFiniteError: x, W_enc or b_enc holds NaN or infinity; the message names the rows.
        BackendError: a demanded backend cannot run these inputs.

    Differentiable in x, W_enc, b_enc, b_dec (through the k selected features). Deterministic; ties go to the lower
    index. Cost: one low-precision product, plus about 2 k float32 dot products a row. Source: docs/exactness.md.

    Example:
        >>> import torch
        >>> values, indices, _ = topk_encode(torch.eye(2), torch.tensor([[1.0, 0.0], [3.0, 2.0], [0.0, 2.0]]), k=1)
        >>> values.tolist(), indices.tolist()
        ([[3.0], [2.0]], [[1], [1]])
    """
    op = "topk_encode"
    sizes = _check.shapes(op, x=(x, "n d"), W_enc=(W_enc, "f d"), b_enc=(b_enc, "f"), b_dec=(b_dec, "d"))
    _check.dtype(op, _check.FLOATS, x=x)
    _check.same_dtype(op, x=x, W_enc=W_enc, b_enc=b_enc, b_dec=b_dec)
    _check.device(op, x=x, W_enc=W_enc, b_enc=b_enc, b_dec=b_dec)
    _check.between(op, "k", k, 1, sizes["f"], "f")
    _check.one_of(op, "precision", precision, PRECISIONS)
    kind, shadow, stats = screen if screen is not None else ("auto", None, None)
    values, indices, candidates = _encode(x, W_enc, b_enc, b_dec, k, precision, kind, shadow, stats)
    return values, indices, candidates


def top_k(z: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of every row, value descending, index ascending. torch.topk leaves the order of ties open."""
    values, indices = torch.topk(z, k, dim=-1)
    last = values[:, -1:]  # [n, 1]
    split = ((z == last).sum(-1) != (values == last).sum(-1)).nonzero().flatten()  # a tie crosses the border
    if split.numel():
        sorted_values, sorted_indices = torch.sort(z[split], dim=-1, descending=True, stable=True)
        values[split], indices[split] = sorted_values[:, :k], sorted_indices[:, :k]
    indices, order = torch.sort(indices, dim=-1)
    values, order = torch.sort(values.gather(1, order), dim=-1, descending=True, stable=True)
    return values, indices.gather(1, order)


def topk_encode_reference(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    b_dec: Tensor | None,
    k: int,
    precision: str,
    kind: str,
    shadow: Tensor | None,
    stats: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Form every pre-activation, then sort. `precision` and the screen change nothing here."""
    n, f = x.shape[0], W_enc.shape[0]
    _check.finite_rows("topk_encode", "x", x)
    _check.finite_rows("topk_encode", "W_enc", W_enc)
    if b_enc is not None:
        _check.finite_rows("topk_encode", "b_enc", b_enc[:, None])
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    centred = x.to(wide) if b_dec is None else x.to(wide) - b_dec.to(wide)
    z = torch.nn.functional.linear(centred, W_enc.to(wide), None if b_enc is None else b_enc.to(wide))
    if n == 0:
        return x.new_empty(0, k), torch.empty(0, k, dtype=torch.int32, device=x.device), _counts(x, f)
    values, indices = top_k(z, k)
    return values.to(x.dtype), indices.int(), _counts(x, f)


def _counts(x: Tensor, f: int) -> Tensor:
    return torch.full((x.shape[0],), f, dtype=torch.int32, device=x.device)


def _setup_context(
    ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]
) -> None:
    x, W_enc, _, b_dec = inputs[:4]
    _, indices, candidates = output
    ctx.save_for_backward(x, W_enc, b_dec, indices)
    ctx.mark_non_differentiable(indices, candidates)


def _backward(
    ctx: torch.autograd.function.FunctionCtx, grad: Tensor, *_: Tensor | None
) -> tuple[Tensor | None, ...]:
    x, W_enc, b_dec, indices = ctx.saved_tensors  # type: ignore[attr-defined]
    need = ctx.needs_input_grad  # type: ignore[attr-defined]
    grad = grad.contiguous()
    ops = torch.ops.microtome
    grad_x = ops.sparse_decode(grad, indices, W_enc, None) if need[0] or need[3] else None  # [n, d]
    grad_W = grad_b = None
    if need[1]:
        centred = x if b_dec is None else x - b_dec
        grad_W = ops.sparse_decode_grad_W_dec(grad, indices, centred, W_enc.shape[0])
    if need[2]:
        ones = torch.ones(grad.shape[0], 1, dtype=grad.dtype, device=grad.device)
        grad_b = ops.sparse_decode_grad_W_dec(grad, indices, ones, W_enc.shape[0]).flatten()
    grad_b_dec = -grad_x.sum(0) if need[3] and grad_x is not None else None
    return (grad_x if need[0] else None, grad_W, grad_b, grad_b_dec, None, None, None, None, None)


def _fake(x: Tensor, W_enc: Tensor, *args: object) -> tuple[Tensor, Tensor, Tensor]:
    n, k = x.shape[0], args[2]
    indices = torch.empty(n, k, dtype=torch.int32, device=x.device)  # type: ignore[call-overload]
    return x.new_empty(n, k), indices, torch.empty(n, dtype=torch.int32, device=x.device)  # type: ignore[arg-type]


def _why_not_triton(x: Tensor, W_enc: Tensor, b_enc: Tensor | None, b_dec: Tensor | None, *_: object) -> str | None:
    return why_not_common("triton", (x, W_enc, b_enc, b_dec), (torch.float32, torch.bfloat16, torch.float16))


_encode = Op(
    topk_encode_reference,
    fake=_fake,
    backends=(Backend("triton", "microtome.kernels.topk_encode:launch", _why_not_triton),),
    backward=_backward,
    setup_context=_setup_context,
)
