"""What the encoders of codes with any number of entries a row share: checks, products, gradient."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import linear

from microtome import _check
from microtome.ops.screen_weights import Screen, check_screen
from microtome.ops.sparse_decode_csr import csr_decode, csr_grad_W_dec

PRECISIONS = ("exact", "fast")
BLOCK = 1 << 22  # pre-activations that a reference forms at once


def check_inputs(
    op: str,
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    b_dec: Tensor | None,
    precision: str,
    threshold: Tensor | None = None,
) -> dict[str, int]:
    """Raise unless shapes, dtypes, devices and precision agree; the sizes n, d, f."""
    sizes = _check.shapes(
        op,
        x=(x, "n d"),
        W_enc=(W_enc, "f d"),
        b_enc=(b_enc, "f"),
        b_dec=(b_dec, "d"),
        threshold=(threshold, "f"),
    )
    named = {"x": x, "W_enc": W_enc, "b_enc": b_enc, "b_dec": b_dec, "threshold": threshold}
    _check.dtype(op, _check.FLOATS, x=x)
    _check.same_dtype(op, **named)
    _check.device(op, **named)
    _check.one_of(op, "precision", precision, PRECISIONS)
    return sizes


def parts_of(
    op: str, screen: Screen | None, W_enc: Tensor
) -> tuple[str, Tensor | None, Tensor | None]:
    """A screen as three arguments of an op; ArgumentError unless it has W_enc's layout."""
    check_screen(op, screen, W_enc)
    return ("auto", None, None) if screen is None else tuple(screen)  # type: ignore[return-value]


def check_finite(
    op: str,
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    b_dec: Tensor | None,
    threshold: Tensor | None = None,
) -> None:
    """Raise NonFiniteError naming the rows of what holds NaN or infinity."""
    _check.finite_rows(op, "x", x)
    _check.finite_rows(op, "W_enc", W_enc)
    if b_enc is not None:
        _check.finite_rows(op, "b_enc", b_enc[:, None])
    if b_dec is not None:
        _check.finite_rows(op, "b_dec", b_dec[None])
    if threshold is not None:
        _check.finite_rows(op, "threshold", threshold[:, None])


def blocks(
    op: str, x: Tensor, W_enc: Tensor, b_enc: Tensor | None, b_dec: Tensor | None
) -> Iterator[tuple[int, Tensor]]:
    """Pre-activations in float32 (float64 for float64), a block of rows at a time.

    Yields:
        The first row of the block, and its pre-activations [rows, f], about `BLOCK` of them.
    """
    n, f = x.shape[0], W_enc.shape[0]
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    # Of what is not contiguous a product may take its sums in another order.
    x, W = x.contiguous(), W_enc.to(wide).contiguous()
    bias = None if b_enc is None else b_enc.to(wide)
    rows = max(1, BLOCK // max(1, f))
    for first in range(0, n, rows):
        part = x[first : first + rows].to(wide)
        z = linear(part if b_dec is None else part - b_dec.to(wide), W, bias)
        if not bool(torch.isfinite(z.sum())):
            bad = (~torch.isfinite(z)).any(-1).nonzero().flatten()
            if bad.numel():
                _check.rows(op, "x W_enc^T", bad + first)
        yield first, z


def backward(
    need: tuple[bool, ...],
    grad: Tensor,
    indices: Tensor,
    offsets: Tensor,
    x: Tensor,
    W_enc: Tensor,
    b_dec: Tensor | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, W_enc, b_enc and b_dec from those of the values, where `need` says so."""
    f = W_enc.shape[0]
    grad = grad.contiguous()
    grad_x = csr_decode(grad, indices, offsets, W_enc, None) if need[0] or need[3] else None
    grad_W = grad_b = None
    if need[1]:
        centred = x if b_dec is None else x - b_dec
        grad_W = csr_grad_W_dec(grad, indices, offsets, centred, f)
    if need[2]:
        ones = torch.ones(x.shape[0], 1, dtype=grad.dtype, device=grad.device)
        grad_b = csr_grad_W_dec(grad, indices, offsets, ones, f).flatten()
    grad_b_dec = -grad_x.sum(0) if need[3] and grad_x is not None else None
    return grad_x if need[0] else None, grad_W, grad_b, grad_b_dec
