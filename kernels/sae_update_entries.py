"""The entries of a step's codes in the order of their latents, with the weights they add with."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, import-untyped"
from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from microtome.kernels.segments import Segments, sort_by_latent
from torch import Tensor

FIRED, TOUCHED = tl.constexpr(1), tl.constexpr(2)


class Entries(NamedTuple):
    """Entries of both codes, sorted by latent; m of them.

    Attributes:
        segments: their order, and where each latent's begin.
        weight: [m] float32, scale * value: of a row of grad_out in the decoder's gradient.
        grad_weight: [m] float32, scale * grad_value: of a row of x in the encoder's.
        source: [m] int32, the row; n more for an entry of the aux code.
        flags: [m] int8: FIRED, a value above zero of the main code; TOUCHED, a value not zero.
    """

    segments: Segments
    weight: Tensor
    grad_weight: Tensor
    source: Tensor
    flags: Tensor


@triton.jit
def _entries_kernel(
    order, value, grad_value, aux_value, aux_grad_value, weight, grad_weight, source, flags,
    n, k, a, main, entries, scale, aux_scale, AUX: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0).to(tl.int64) * BE + tl.arange(0, BE)
    mask = place < entries
    entry = tl.load(order + place, mask=mask, other=0)
    first = mask & (entry < main)
    v = tl.load(value + entry, mask=first, other=0.0).to(tl.float32)
    g = tl.load(grad_value + entry, mask=first, other=0.0).to(tl.float32)
    row = entry // k
    flag = tl.where(v > 0.0, 1, 0) | tl.where(v != 0.0, 2, 0)
    times = tl.where(first, scale, aux_scale)
    if AUX:
        second = mask & (entry >= main)
        rest = entry - main
        aux_v = tl.load(aux_value + rest, mask=second, other=0.0).to(tl.float32)
        v += aux_v
        g += tl.load(aux_grad_value + rest, mask=second, other=0.0).to(tl.float32)
        flag = flag | tl.where(aux_v != 0.0, 2, 0)
        row = tl.where(first, row, n + rest // a)
    tl.store(weight + place, v * times, mask=mask)
    tl.store(grad_weight + place, g * times, mask=mask)
    tl.store(source + place, row.to(tl.int32), mask=mask)
    tl.store(flags + place, flag.to(tl.int8), mask=mask)


def sort_entries(
    indices: Tensor, values: Tensor, grad_values: Tensor, scale: float,
    aux_indices: Tensor | None, aux_values: Tensor | None, aux_grad_values: Tensor | None,
    aux_scale: float, f: int,
) -> Entries:  # fmt: skip
    """Sort the entries of a code and, after them, of the aux code.

    Args:
        indices: [n, k].
        values: [n, k] float32 or bfloat16.
        grad_values: [n, k], dtype of values.
        scale: of the code's gradients.
        aux_indices: [n, a], or None.
        aux_values: [n, a], dtype of values, or None.
        aux_grad_values: [n, a], dtype of values, or None.
        aux_scale: of the aux code's gradients.
        f: latents.
    """
    (n, k), main, device = indices.shape, indices.numel(), indices.device
    latents, values, grad_values = indices.flatten(), values.contiguous(), grad_values.contiguous()
    a, aux_value, aux_grad = 1, values, grad_values
    if aux_indices is not None and aux_values is not None and aux_grad_values is not None:
        a = aux_indices.shape[1]
        latents = torch.cat([latents.int(), aux_indices.flatten().int()])
        aux_value, aux_grad = aux_values.contiguous(), aux_grad_values.contiguous()
    segments, m = sort_by_latent(latents, f), latents.numel()
    weight, grad_weight = (torch.empty(m, dtype=torch.float32, device=device) for _ in range(2))
    source = torch.empty(m, dtype=torch.int32, device=device)
    flags = torch.empty(m, dtype=torch.int8, device=device)
    if m:
        BE = 1024
        _entries_kernel[(triton.cdiv(m, BE),)](
            segments.order, values, grad_values, aux_value, aux_grad, weight, grad_weight, source,
            flags, n, max(k, 1), max(a, 1), main, m, scale, aux_scale,
            AUX=aux_indices is not None, BE=BE, enable_fp_fusion=True,
        )  # fmt: skip
    return Entries(segments, weight, grad_weight, source, flags)
