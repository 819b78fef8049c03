"""`sparse_decode` of codes with any number of entries a row, and its two gradients.

There is no C++: on a CPU the reference answers, by torch's embedding_bag.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from microtome import _check
from microtome._csr import rows_of
from microtome.errors import ArgumentError, ShapeError
from microtome.ops._registry import Op, triton_backend

_BLOCK = 1 << 22  # elements that a reference gathers at once
_RUN = 64  # entries added up one after another; the sums of such runs are added up alike


def check_offsets(op: str, offsets: Tensor, entries: int) -> None:
    """Raise unless offsets [n + 1] begin with 0, never fall and end within the entries.

    Their values are not read back from a GPU; there a kernel reads no entry that is not there.
    """
    if offsets.dim() != 1 or offsets.numel() == 0:
        msg = f"{op}: offsets must be [n + 1], n rows and one end, got shape {list(offsets.shape)}."
        raise ShapeError(msg)
    _check.dtype(op, _check.INDICES, offsets=offsets)
    if torch.compiler.is_compiling() or offsets.is_cuda:
        return
    falls = (offsets.diff() < 0).nonzero().flatten()
    if falls.numel():
        row = int(falls[0])
        before, after = offsets[row : row + 2].tolist()
        msg = f"{op}: offsets must not fall, got {before} then {after} at row {row}."
        raise ArgumentError(msg)
    first, last = int(offsets[0]), int(offsets[-1])
    if first != 0 or last > entries:
        msg = f"{op}: offsets must go from 0 to at most m={entries}, got {first} to {last}."
        raise ArgumentError(msg)


def _sums(weights: Tensor, sources: Tensor, offsets: Tensor, table: Tensor) -> Tensor:
    """out[s] = sum of weights[e] table[sources[e]] over the entries of s, in float32 or float64.

    A row of a BatchTopK code can hold thousands of entries. Added up one after another they lose
    several times what a product of matrices loses, so long segments are summed in runs.
    """
    wide = torch.float64 if weights.dtype == torch.float64 else torch.float32
    segments, used = offsets.numel() - 1, int(offsets[-1])
    if segments == 0 or table.shape[1] == 0 or used == 0:
        return torch.zeros(segments, table.shape[1], dtype=wide, device=table.device)
    offsets = offsets.long()
    runs = (offsets.diff() + _RUN - 1) // _RUN
    ends = torch.nn.functional.pad(runs.cumsum(0), (1, 0))
    starts, long = offsets, int(runs.max()) > 1
    if long:
        run = torch.arange(int(ends[-1]), device=offsets.device)
        within = run - ends[:-1].repeat_interleave(runs)
        starts = offsets[:-1].repeat_interleave(runs) + _RUN * within
        starts = torch.cat([starts, offsets[-1:]])
    # Of what is not contiguous embedding_bag takes the sum in another order.
    weights, sources, starts, table = (t.contiguous() for t in (weights, sources, starts, table))
    out = embedding_bag(
        sources[:used].long(), table.to(wide), starts, mode="sum",
        per_sample_weights=weights[:used].to(wide), include_last_offset=True,
    )  # fmt: skip
    return _sums(torch.ones_like(run, dtype=wide), run, ends, out) if long else out


def sparse_decode_csr_reference(
    values: Tensor, indices: Tensor, offsets: Tensor, W_dec: Tensor, b_dec: Tensor | None
) -> Tensor:
    """out[i] = b_dec + sum of values[e] W_dec[indices[e]] over the entries e of row i, [n, d]."""
    out = _sums(values, indices, offsets, W_dec)
    if b_dec is not None:
        out = out + b_dec.to(out.dtype)
    return out.to(values.dtype)


def sparse_decode_csr_grad_values_reference(
    grad_out: Tensor, indices: Tensor, offsets: Tensor, W_dec: Tensor
) -> Tensor:
    """grad_values[e] = <grad_out[row of e], W_dec[indices[e]]>, [m]; unused entries get 0."""
    wide = torch.float64 if grad_out.dtype == torch.float64 else torch.float32
    used = int(offsets[-1])
    rows = rows_of(offsets, used)
    out = torch.zeros(indices.numel(), dtype=wide, device=grad_out.device)
    grad_out, W_dec = grad_out.contiguous(), W_dec.contiguous()
    step = max(1, _BLOCK // max(1, W_dec.shape[1]))
    for first in range(0, used, step):
        e = slice(first, min(first + step, used))
        out[e] = (grad_out[rows[e]].to(wide) * W_dec[indices[e].long()].to(wide)).sum(-1)
    return out.to(grad_out.dtype)


def sparse_decode_csr_grad_W_dec_reference(
    values: Tensor, indices: Tensor, offsets: Tensor, grad_out: Tensor, f: int
) -> Tensor:
    """grad_W_dec[g] = sum of values[e] grad_out[row of e] where indices[e] == g, [f, d]."""
    used = int(offsets[-1])
    latents, order = torch.sort(indices[:used].long(), stable=True)
    bounds = torch.searchsorted(latents, torch.arange(f + 1, device=latents.device))
    out = _sums(values[:used][order], rows_of(offsets, used)[order], bounds, grad_out)
    return out.to(values.dtype)


def _save(
    ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Tensor, ...], output: Tensor
) -> None:
    ctx.save_for_backward(*inputs[:4])


# Each op is linear in what it is made of, so the three are each other's derivatives.
def _backward(
    ctx: torch.autograd.function.FunctionCtx, grad_out: Tensor
) -> tuple[Tensor | None, ...]:
    values, indices, offsets, W_dec = ctx.saved_tensors  # type: ignore[attr-defined]
    need = ctx.needs_input_grad  # type: ignore[attr-defined]
    return (
        csr_grad_values(grad_out, indices, offsets, W_dec) if need[0] else None,
        None,
        None,
        csr_grad_W_dec(values, indices, offsets, grad_out, W_dec.shape[0]) if need[3] else None,
        grad_out.sum(0) if need[4] else None,
    )


def _grad_values_backward(
    ctx: torch.autograd.function.FunctionCtx, grad: Tensor
) -> tuple[Tensor | None, ...]:
    grad_out, indices, offsets, W_dec = ctx.saved_tensors  # type: ignore[attr-defined]
    need = ctx.needs_input_grad  # type: ignore[attr-defined]
    return (
        csr_decode(grad, indices, offsets, W_dec, None) if need[0] else None,
        None,
        None,
        csr_grad_W_dec(grad, indices, offsets, grad_out, W_dec.shape[0]) if need[3] else None,
    )


def _grad_W_dec_backward(
    ctx: torch.autograd.function.FunctionCtx, grad: Tensor
) -> tuple[Tensor | None, ...]:
    values, indices, offsets, grad_out = ctx.saved_tensors  # type: ignore[attr-defined]
    need = ctx.needs_input_grad  # type: ignore[attr-defined]
    return (
        csr_grad_values(grad_out, indices, offsets, grad) if need[0] else None,
        None,
        None,
        csr_decode(values, indices, offsets, grad, None) if need[3] else None,
        None,
    )


def _fake_decode(
    values: Tensor, indices: Tensor, offsets: Tensor, W_dec: Tensor, b_dec: Tensor | None
) -> Tensor:
    return values.new_empty(offsets.shape[0] - 1, W_dec.shape[1])


_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_KERNELS = "microtome.kernels.sparse_decode_csr"

csr_grad_values = Op(
    sparse_decode_csr_grad_values_reference,
    fake=lambda grad_out, indices, offsets, W_dec: grad_out.new_empty(indices.shape),
    backends=[triton_backend(f"{_KERNELS}:launch_grad_values", *_FLOATS)],
    gathers={"indices": ("W_dec", "f")},
    backward=_grad_values_backward,
    setup_context=_save,
)
csr_grad_W_dec = Op(
    sparse_decode_csr_grad_W_dec_reference,
    fake=lambda values, indices, offsets, grad_out, f: values.new_empty(f, grad_out.shape[1]),
    backends=[triton_backend(f"{_KERNELS}:launch_grad_W_dec", *_FLOATS)],
    backward=_grad_W_dec_backward,
    setup_context=_save,
)
csr_decode = Op(
    sparse_decode_csr_reference,
    fake=_fake_decode,
    backends=[triton_backend(f"{_KERNELS}:launch", *_FLOATS)],
    gathers={"indices": ("W_dec", "f")},
    backward=_backward,
    setup_context=_save,
)
