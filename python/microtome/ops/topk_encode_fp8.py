"""The k largest pre-activations of every row, screened in 8 bits by a model of the errors.

On a CPU there is no 8-bit screen: `topk_encode`'s own kernels answer.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from microtome import _check
from microtome.errors import ArgumentError
from microtome.ops._registry import OPS, Backend, Op, why_not_common
from microtome.ops.screen_weights import Screen
from microtome.ops.topk_encode import REPAIR, SIGMAS, backward, check, fake, setup_context

_LEAST = (8, 9)  # compute capability whose tensor cores multiply e4m3


def topk_encode_fp8(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None = None,
    b_dec: Tensor | None = None,
    *,
    k: int,
    sigmas: float = SIGMAS,
    repair: float = REPAIR,
    screen: Screen | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`topk_encode(precision="fp8")` with its certificate: find the k largest of every row.

        z = (x - b_dec) W_enc^T + b_enc
        values[i], indices[i] = top k of z[i], value descending, index ascending

    Products of e4m3 rows, twice as fast as bf16 on a GPU that has them, drop every feature whose
    score lies more than `sigmas` standard deviations of its error below what the k-th needs; the
    others are computed in float32. The standard deviation is that of a model, which nothing proves:
    the rounding errors of a row and of a feature are independent of each other and of the numbers
    that they meet, column by column. So values are always exact for their features, but a feature
    is missing if its error exceeds `sigmas`.

    Every feature that is computed shows how large its error was: `observed` is the largest of the
    row. A row with more than `repair` is computed whole, and is exact.

    Args:
        x: [n, d] float32, bfloat16, float16 or float64. Activations.
        W_enc: [f, d], dtype of x, one row per feature.
        b_enc: [f], or None for zero.
        b_dec: [d] subtracted from x first, or None.
        k: how many, 1 <= k <= f.
        sigmas: how many standard deviations a feature may be off, greater than `repair`.
        repair: how many may be seen in a row before it is computed whole, greater than 0. At 4
            about one row in a hundred is, where the model holds; at 5 one in ten thousand.
        screen: what `screen_weights(W_enc, "fp8")` returned for these very weights.

    Returns:
        values [n, k], indices [n, k] int32 and candidates [n] int32 as `topk_encode`: f means that
        the row was computed whole.
        observed [n] float32, the certificate: the largest |score - value| of the row's computed
        features, in standard deviations of the model, before any repair. 0 where no score of 8 bits
        was used: on a backend that answers exactly, and for rows computed whole from the start.

    Raises:
        ArgumentError: k, sigmas or repair is out of its range.
        ShapeError, DtypeError, DeviceError, NonFiniteError: as `topk_encode`.
        BackendError: Triton was demanded on a GPU without products of e4m3.

    Screens on a GPU of compute capability 8.9 or newer, through Triton; elsewhere it answers
    exactly, as `topk_encode` does. Differentiable and deterministic as `topk_encode`.
    Source: docs/exactness.md.

    Example:
        >>> import torch
        >>> W_enc = torch.tensor([[1.0, 0.0], [3.0, 2.0], [0.0, 2.0]])
        >>> values, indices, candidates, observed = topk_encode_fp8(torch.eye(2), W_enc, k=1)
        >>> values.tolist(), indices.tolist(), observed.tolist()
        ([[3.0], [2.0]], [[1], [1]], [0.0, 0.0])
    """
    op = "topk_encode_fp8"
    sizes = check(op, x, W_enc, b_enc, b_dec, screen)
    _check.between(op, "k", k, 1, sizes["f"], "f")
    if not 0 < repair < sigmas < math.inf:
        msg = (
            f"{op}: sigmas must be greater than repair, and repair than 0, got sigmas={sigmas}, "
            f"repair={repair}. 6 and 4 are the defaults."
        )
        raise ArgumentError(msg)
    kind, shadow, stats = screen if screen is not None else ("auto", None, None)
    values, indices, candidates, observed = _encode(
        x, W_enc, b_enc, b_dec, k, sigmas, repair, kind, shadow, stats
    )
    return values, indices, candidates, observed


def topk_encode_fp8_reference(
    x: Tensor, W_enc: Tensor, b_enc: Tensor | None, b_dec: Tensor | None, k: int,
    sigmas: float, repair: float, kind: str, shadow: Tensor | None, stats: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """`topk_encode` by whatever backend is best, or demanded: there is no need to screen."""
    exact = torch.ops.microtome.topk_encode
    answer = exact(x, W_enc, b_enc, b_dec, k, "exact", kind, shadow, stats)
    return (*answer, torch.zeros(x.shape[0], dtype=torch.float32, device=x.device))


def _fake(
    x: Tensor, W_enc: Tensor, b_enc: Tensor | None, b_dec: Tensor | None, k: int, *_: object
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    observed = torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
    return (*fake(x, W_enc, b_enc, b_dec, k), observed)


def _setup_context(
    ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]
) -> None:
    setup_context(ctx, inputs, output[:3])
    ctx.mark_non_differentiable(*output[1:])


def _backward(
    ctx: torch.autograd.function.FunctionCtx, grad: Tensor, *_: Tensor | None
) -> tuple[Tensor | None, ...]:
    return (*backward(ctx, grad), None)


def _why_not_triton(*args: Tensor | None) -> str | None:
    reason = why_not_common("triton", args[:4], (torch.float32, torch.bfloat16, torch.float16))
    x = args[0]
    if reason or x is None or not x.is_cuda:
        return reason
    capability = torch.cuda.get_device_capability(x.device)
    if capability < _LEAST:
        has = ".".join(map(str, capability))
        return (
            f"compute capability {has} has no products of e4m3 (needs 8.9); "
            'precision="exact" screens in bf16 there'
        )
    return None


def _as(name: str) -> Callable[..., str | None]:
    """Why `topk_encode` cannot run on that backend: a question of its tensors and k."""
    backend = next(b for b in OPS["topk_encode"].backends if b.name == name)

    def why_not(*args: Any) -> str | None:
        return backend.why_not(*args[:5])

    return why_not


_EXACT = f"{__name__}:topk_encode_fp8_reference"
_encode = Op(
    topk_encode_fp8_reference,
    fake=_fake,
    backends=(
        Backend("cuda", _EXACT, _as("cuda"), on_demand=True),
        Backend("triton", "microtome.kernels.topk_encode_fp8:launch", _why_not_triton),
        Backend("cpu", _EXACT, _as("cpu")),
    ),
    backward=_backward,
    setup_context=_setup_context,
)
