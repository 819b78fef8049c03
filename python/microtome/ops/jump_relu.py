"""JumpReLU's straight-through gradient: the threshold learns from pre-activations close to it.

No kernel of its own: it is made of those of `sparse_decode_csr`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from microtome import _check
from microtome._csr import Entries, rows_of
from microtome.errors import ArgumentError
from microtome.ops.sparse_decode_csr import csr_decode, csr_grad_values


class JumpReLUCode(NamedTuple):
    """What `jump_relu` returns.

    Attributes:
        code: the entries of the code, then those of the window with the value 0, row by row. A
            feature may stand twice in a row; repeats add up.
        l0: [n] float32 (float64 for float64), active features of each row.
    """

    code: Entries
    l0: Tensor


def jump_relu(code: Entries, window: Entries, threshold: Tensor, bandwidth: float) -> JumpReLUCode:
    """Give a JumpReLU code and its L0 their pseudo-derivatives with respect to the threshold.

        d JumpReLU(z) / d threshold = -(threshold / bandwidth) K((z - threshold) / bandwidth)
        d H(z - threshold) / d threshold = -(1 / bandwidth) K((z - threshold) / bandwidth)

    K is the rectangle, 1 where its argument lies within 1/2 of 0, so only the window counts. Half
    of its entries are not active; they join the code with the value 0, which changes no
    reconstruction and lets whatever the code is used for tell the threshold what they would do.

    Args:
        code: `threshold_encode`'s code. The gradient of its values passes through.
        window: `threshold_encode`'s window, of the same bandwidth.
        threshold: [f], dtype of the values.
        bandwidth: the width of the window, above 0.

    Returns:
        JumpReLUCode(code, l0). `sparse_decode(*code[:2], W_dec, b_dec, code.offsets)` is the
        reconstruction; `l0.mean()` is the sparsity loss.

    Raises:
        ArgumentError: bandwidth is not above 0.
        ShapeError, DtypeError: threshold is not [f], or differs from the values in dtype.

    Differentiable in code.values and threshold. Deterministic. Costs a few passes over the entries.
    Source: Rajamanoharan et al. 2024, arXiv:2407.14435, equations 11 and 12.

    Example:
        >>> import torch
        >>> from microtome.ops import threshold_encode
        >>> theta = torch.tensor([1.0, 1.0], requires_grad=True)
        >>> x = torch.tensor([[3.0, 0.9]])
        >>> code, window, _ = threshold_encode(x, torch.eye(2), threshold=theta, bandwidth=0.5)
        >>> (values, indices, offsets), l0 = jump_relu(code, window, theta, 0.5)
        >>> values.tolist(), indices.tolist(), l0.tolist()
        ([3.0, 0.0], [0, 1], [1.0])
        >>> torch.autograd.grad(l0.sum(), theta)[0][1].item()
        -2.0
    """
    _check.shapes("jump_relu", threshold=(threshold, "f"))
    _check.same_dtype("jump_relu", code_values=code.values, threshold=threshold)
    if not bandwidth > 0.0:
        msg = f"jump_relu: bandwidth must be above 0, got {bandwidth}."
        raise ArgumentError(msg)
    wide = torch.float64 if threshold.dtype == torch.float64 else torch.float32
    theta = threshold.to(wide)
    # Zero with the derivative -1, and every sum over entries is one of the deterministic ops.
    moved = theta.detach() - theta
    n = code.offsets.numel() - 1
    ones = torch.ones(n, 1, dtype=wide, device=theta.device)
    jump = (theta.detach() / bandwidth * moved)[:, None]  # [f, 1]
    zeros = csr_grad_values(ones, window.indices, window.offsets, jump)
    counted = torch.ones(window.indices.shape, dtype=wide, device=theta.device)
    step = (moved / bandwidth)[:, None]
    crossing = csr_decode(counted, window.indices, window.offsets, step, None).flatten()
    merged = _merge(code, Entries(zeros.to(code.values.dtype), *window[1:]))
    return JumpReLUCode(merged, code.offsets.diff().to(wide) + crossing)


def _merge(first: Entries, second: Entries) -> Entries:
    """Each row's entries of `first`, then those of `second`; unused entries stay at the end."""
    places = []
    for mine, other, own_begin in ((first, second, True), (second, first, False)):
        m = mine.indices.numel()
        rows = rows_of(mine.offsets, m)
        at = torch.arange(m, device=rows.device)
        used = at < mine.offsets[-1]
        before = other.offsets[:-1] if own_begin else other.offsets[1:]
        spare = other.offsets[-1] if own_begin else first.indices.numel()
        shift = before[rows] if before.numel() else torch.zeros_like(at)
        places.append(at + torch.where(used, shift, spare))
    total = first.indices.numel() + second.indices.numel()
    place = torch.cat(places)
    values = torch.cat([first.values, second.values])
    indices = torch.cat([first.indices, second.indices])
    order = torch.empty(total, dtype=torch.int64, device=place.device).scatter_(
        0, place, torch.arange(total, device=place.device)
    )
    return Entries(values[order], indices[order], first.offsets + second.offsets)
