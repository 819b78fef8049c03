"""The k largest pre-activations of every row, exact, without forming the [n, f] pre-activations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from microtome import _check, _native
from microtome.ops._registry import Backend, Op, unavailable, why_not_common
from microtome.ops.screen_weights import KINDS, Screen, check_screen, stride

PRECISIONS = ("exact", "fast", "fp8")
SIGMAS, REPAIR = 6.0, 4.0  # of `topk_encode_fp8`
MOST_ACTIVE_CUDA = 8192  # keys that a block sorts: csrc/cuda/topk_select.h


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

        z = (x - b_dec) W_enc^T + b_enc
        values[i], indices[i] = top k of z[i], value descending, index ascending

    Low precision (bf16 tiles or 16-bit integers) rules out the features that provably cannot be
    among the k; the few that remain are computed in float32. So the answer is that of the float32
    product.

    Args:
        x: [n, d] float32, bfloat16, float16 or float64. Activations.
        W_enc: [f, d], dtype of x, one row per feature.
        b_enc: [f], or None for zero.
        b_dec: [d] subtracted from x first, or None.
        k: how many, 1 <= k <= f.
        precision: "exact", or "fast": the k best by the low-precision scores, whose values are then
            computed in float32. "fast" may miss a feature whose value is within the rounding of the
            low precision (bf16: about 0.4 % of |x||w|) of the k-th; a backend that does not screen
            answers exactly. "fp8": products of 8 bits on a GPU that has them, which may miss a
            feature whose error is far beyond what a model expects; elsewhere the exact answer.
            `topk_encode_fp8` says how, and returns its certificate, too.
        screen: what `screen_weights(W_enc)`, for "fp8" `screen_weights(W_enc, "fp8")`, returned for
            these very weights, so that the call need not build it.

    Returns:
        values [n, k] in x's dtype, accumulated in float32 (pre-activations: the ReLU is yours);
        indices [n, k] int32;
        candidates [n] int32, the certificate: how many features of the row were computed in
        float32. f means that the row was computed whole.

    Raises:
        ShapeError, DtypeError, DeviceError: the letters, dtypes or devices do not agree.
        ArgumentError: k or precision is out of its range, or the screen is none of such a W_enc.
        NonFiniteError: x, W_enc or b_enc holds NaN or infinity; the message names the rows. On a
            GPU a later call raises it (docs/inside_torch.md).
        BackendError: a demanded backend cannot run these inputs.

    Differentiable in x, W_enc, b_enc, b_dec (through the k selected features). Deterministic; ties
    go to the lower index. Cost: one low-precision product, plus about 2 k float32 dot products a
    row. Source: docs/exactness.md.

    Example:
        >>> import torch
        >>> W_enc = torch.tensor([[1.0, 0.0], [3.0, 2.0], [0.0, 2.0]])
        >>> values, indices, _ = topk_encode(torch.eye(2), W_enc, k=1)
        >>> values.tolist(), indices.tolist()
        ([[3.0], [2.0]], [[1], [1]])
    """
    op = "topk_encode"
    sizes = check(op, x, W_enc, b_enc, b_dec, screen)
    _check.between(op, "k", k, 1, sizes["f"], "f")
    _check.one_of(op, "precision", precision, PRECISIONS)
    kind, shadow, stats = screen if screen is not None else ("auto", None, None)
    if precision == "fp8":
        in_8_bits = torch.ops.microtome.topk_encode_fp8
        answer = in_8_bits(x, W_enc, b_enc, b_dec, k, SIGMAS, REPAIR, kind, shadow, stats)
        return answer[0], answer[1], answer[2]
    values, indices, candidates = _encode(x, W_enc, b_enc, b_dec, k, precision, kind, shadow, stats)
    return values, indices, candidates


def check(
    op: str,
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    b_dec: Tensor | None,
    screen: Screen | None,
) -> dict[str, int]:
    """Raise unless shapes, dtypes and devices agree; the sizes n, d, f."""
    sizes = _check.shapes(
        op, x=(x, "n d"), W_enc=(W_enc, "f d"), b_enc=(b_enc, "f"), b_dec=(b_dec, "d")
    )
    tensors = {"x": x, "W_enc": W_enc, "b_enc": b_enc, "b_dec": b_dec}
    _check.dtype(op, _check.FLOATS, x=x)
    _check.same_dtype(op, **tensors)
    # A screen has a say in where most bytes are, hence in what to move.
    shadow, stats = screen[1:] if isinstance(screen, Screen) else (None, None)
    _check.device(op, **tensors, shadow=shadow, stats=stats)
    check_screen(op, screen, W_enc)
    return sizes


def top_k(z: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of every row, value descending, index ascending (torch.topk: any)."""
    values, indices = torch.topk(z, k, dim=-1)
    last = values[:, -1:]  # [n, 1]
    # rows in which a tie crosses the border
    split = ((z == last).sum(-1) != (values == last).sum(-1)).nonzero().flatten()
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
    if b_dec is not None:
        _check.finite_rows("topk_encode", "b_dec", b_dec[None])
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    centred = x.to(wide) if b_dec is None else x.to(wide) - b_dec.to(wide)
    z = torch.nn.functional.linear(
        centred, W_enc.to(wide), None if b_enc is None else b_enc.to(wide)
    )
    if n == 0:
        return (
            x.new_empty(0, k),
            torch.empty(0, k, dtype=torch.int32, device=x.device),
            _counts(x, f),
        )
    values, indices = top_k(z, k)
    return values.to(x.dtype), indices.int(), _counts(x, f)


def _cpu(
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
    native, forced = _native.module(), _native.forced_isa()
    n, f, d = x.shape[0], W_enc.shape[0], x.shape[1]
    x = x if x.stride(1) == 1 or d == 1 else x.contiguous()
    W_enc = W_enc.contiguous()
    b_enc = b_enc.contiguous() if b_enc is not None else None
    if b_dec is not None:
        b_dec = b_dec.contiguous()
        _check.finite_rows("topk_encode", "b_dec", b_dec[None])
    if kind != KINDS[native.screen_kind(forced)]:
        shadow = stats = None  # built for another instruction set
    values = torch.empty(n, k, dtype=x.dtype)
    indices = torch.empty(n, k, dtype=torch.int32)
    candidates = torch.empty(n, dtype=torch.int32)
    inputs = [_native.address(t) for t in (W_enc, b_enc, b_dec)]
    screen = [_native.address(shadow), _native.address(stats), stride(d)]
    outputs = [t.data_ptr() for t in (values, indices, candidates)]
    bad_row, bad_feature = native.topk_encode(
        x.data_ptr(),
        x.stride(0),
        *inputs,
        n,
        d,
        f,
        k,
        precision == "fast",
        *screen,
        *outputs,
        forced,
        _native.threads(),
    )
    if bad_feature >= 0:
        name = "W_enc" if b_enc is None or bool(torch.isfinite(b_enc[bad_feature])) else "b_enc"
        _check.rows("topk_encode", name, torch.tensor([bad_feature]))
    if bad_row >= 0:
        bad = (~torch.isfinite(x)).any(-1).nonzero().flatten()
        _check.rows(
            "topk_encode",
            "x" if bad.numel() else "x W_enc^T",
            bad if bad.numel() else torch.tensor([bad_row]),
        )
    return values, indices, candidates


def _why_not_cpu(*args: Tensor | None) -> str | None:
    return why_not_common("cpu", args[:4], (torch.float32,))


def _counts(x: Tensor, f: int) -> Tensor:
    return torch.full((x.shape[0],), f, dtype=torch.int32, device=x.device)


def setup_context(
    ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]
) -> None:
    """Keep what `backward` reads."""
    x, W_enc, _, b_dec = inputs[:4]
    _, indices, candidates = output
    ctx.save_for_backward(x, W_enc, b_dec, indices)
    ctx.mark_non_differentiable(indices, candidates)


def backward(
    ctx: torch.autograd.function.FunctionCtx, grad: Tensor, *_: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Gradients of x, W_enc, b_enc, b_dec through the k selected features, then five None."""
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


def fake(
    x: Tensor, W_enc: Tensor, b_enc: Tensor | None, b_dec: Tensor | None, k: int, *_: object
) -> tuple[Tensor, Tensor, Tensor]:
    """Empty outputs."""
    n = x.shape[0]
    indices = torch.empty(n, k, dtype=torch.int32, device=x.device)
    return x.new_empty(n, k), indices, torch.empty(n, dtype=torch.int32, device=x.device)


def _why_not_triton(*args: Tensor | None) -> str | None:
    return why_not_common("triton", args[:4], (torch.float32, torch.bfloat16, torch.float16))


def _why_not_cuda(*args: Any) -> str | None:
    x, k = args[0], args[4]
    reason = why_not_common("cuda", args[:4], (torch.float32, torch.bfloat16))
    if reason or unavailable("triton"):
        return reason or unavailable("triton")
    if x.is_cuda and torch.cuda.get_device_capability(x.device) != (9, 0):
        return "the device is not of compute capability 9.0"
    if k > MOST_ACTIVE_CUDA:
        return f"k={k} (a block sorts up to {MOST_ACTIVE_CUDA})"
    return "d is 0" if x.shape[1] == 0 else None


_encode = Op(
    topk_encode_reference,
    fake=fake,
    backends=(
        Backend(
            "cuda",
            "microtome.kernels.topk_encode_cuda:launch",
            _why_not_cuda,
            on_demand=True,
            calls=("triton",),
        ),
        Backend("triton", "microtome.kernels.topk_encode:launch", _why_not_triton),
        Backend("cpu", "microtome.ops.topk_encode:_cpu", _why_not_cpu),
    ),
    backward=backward,
    setup_context=setup_context,
)
