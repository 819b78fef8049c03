"""The n*k largest pre-activations of a whole batch, without forming the [n, f] pre-activations."""

from __future__ import annotations

import torch
from torch import Tensor

from microtome import _check
from microtome._csr import offsets_of
from microtome.ops import _csr_encode as shared
from microtome.ops._registry import Op, triton_backend
from microtome.ops.screen_weights import Screen

OP = "batch_topk_encode"


def batch_topk_encode(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None = None,
    b_dec: Tensor | None = None,
    *,
    k: int,
    precision: str = "exact",
    screen: Screen | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Find the n*k largest pre-activations of a batch of n rows, however they fall to the rows.

        z = (x - b_dec) W_enc^T + b_enc
        the n*k largest of all z[i, j]; at the border a tie goes to the lower row, then the lower j

    On a GPU one threshold for the whole batch is predicted from a sample, low precision rules out
    what provably lies below it, the survivors are computed in float32, and the n*k-th of them is
    found exactly; rows that do not fit are computed whole. On a CPU plain PyTorch forms the
    pre-activations a block of rows at a time.

    Args:
        x: [n, d] float32, bfloat16, float16 or float64. Activations.
        W_enc: [f, d], dtype of x, one row per feature.
        b_enc: [f], or None for zero.
        b_dec: [d] subtracted from x first, or None.
        k: the mean number of entries a row, 1 <= k <= f.
        precision: "exact", or "fast" as in `topk_encode`; no backend of this op takes the licence.
        screen: what `screen_weights(W_enc)` returned for these very weights; a bf16 one is used on
            a GPU.

    Returns:
        values [n*k] in x's dtype, accumulated in float32 (pre-activations: the ReLU is yours);
        indices [n*k] int32;
        offsets [n + 1] int64: row i is entries offsets[i] to offsets[i + 1], value descending,
        then index ascending; offsets[n] is n*k;
        candidates [n] int32, the certificate: how many features of the row were computed in
        float32. f means that the row was computed whole.

    Raises:
        ShapeError, DtypeError, DeviceError: the letters, dtypes or devices do not agree.
        ArgumentError: k or precision is out of its range.
        NonFiniteError: an input or a pre-activation is NaN or infinite; the message names the rows.
            On a GPU a later call raises it (docs/inside_torch.md), and nothing does for a captured
            CUDA graph; the candidates of rows with such a value are -1.
        BackendError: a demanded backend cannot run these inputs.

    Differentiable in x, W_enc, b_enc, b_dec (through the selected entries). Deterministic. Cost:
    one low-precision product, plus a few k float32 dot products a row.
    Source: Bussmann et al. 2024, arXiv:2412.06410.

    Example:
        >>> import torch
        >>> x = torch.tensor([[3.0, 2.0], [1.0, 0.0]])
        >>> values, indices, offsets, _ = batch_topk_encode(x, torch.eye(2), k=1)
        >>> values.tolist(), indices.tolist(), offsets.tolist()
        ([3.0, 2.0], [0, 1], [0, 2, 2])
    """
    sizes = shared.check_inputs(OP, x, W_enc, b_enc, b_dec, precision)
    _check.between(OP, "k", k, 1, sizes["f"], "f")
    values, indices, offsets, candidates = _encode(
        x, W_enc, b_enc, b_dec, k, precision, *shared.parts_of(OP, screen, W_enc)
    )
    return values, indices, offsets, candidates


def batch_topk_encode_reference(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    b_dec: Tensor | None,
    k: int,
    precision: str,
    kind: str,
    shadow: Tensor | None,
    stats: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Go through the batch a block of rows at a time, keeping the n*k best so far."""
    n, f = x.shape[0], W_enc.shape[0]
    shared.check_finite(OP, x, W_enc, b_enc, b_dec)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    best = torch.empty(0, dtype=wide, device=x.device)  # always in order of its places
    places = torch.empty(0, dtype=torch.int64, device=x.device)  # row * f + feature
    for first, z in shared.blocks(OP, x, W_enc, b_enc, b_dec):
        scores = z.flatten()
        enters = scores > best.min() if best.numel() == n * k else _largest(scores, n * k)
        at = enters.nonzero().flatten()
        best = torch.cat([best, scores[at]])
        places = torch.cat([places, at + first * f])
        if best.numel() > n * k:
            kept = _largest(best, n * k)
            best, places = best[kept], places[kept]
    rows, indices = places // f, places % f
    best, order = torch.sort(best, descending=True, stable=True)
    rows, by_row = torch.sort(rows[order], stable=True)
    offsets = offsets_of(torch.bincount(rows, minlength=n))
    candidates = torch.full((n,), f, dtype=torch.int32, device=x.device)
    return best[by_row].to(x.dtype), indices[order][by_row].int(), offsets, candidates


def _largest(scores: Tensor, m: int) -> Tensor:
    """Which of `scores` are the m largest, of equal ones the first; a mask."""
    if scores.numel() <= m:
        return torch.ones_like(scores, dtype=torch.bool)
    least = torch.topk(scores, m).values[-1]
    kept = scores > least
    ties = (scores == least).nonzero().flatten()
    kept[ties[: m - int(kept.sum())]] = True
    return kept


def _fake(
    x: Tensor, W_enc: Tensor, b_enc: Tensor | None, b_dec: Tensor | None, k: int, *_: object
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n = x.shape[0]
    return (
        x.new_empty(n * k),
        x.new_empty(n * k, dtype=torch.int32),
        x.new_empty(n + 1, dtype=torch.int64),
        x.new_empty(n, dtype=torch.int32),
    )


def _setup_context(
    ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]
) -> None:
    x, W_enc, _, b_dec = inputs[:4]
    _, indices, offsets, candidates = output
    ctx.save_for_backward(x, W_enc, b_dec, indices, offsets)
    ctx.mark_non_differentiable(indices, offsets, candidates)


def _backward(
    ctx: torch.autograd.function.FunctionCtx, grad: Tensor, *_: Tensor | None
) -> tuple[Tensor | None, ...]:
    x, W_enc, b_dec, indices, offsets = ctx.saved_tensors  # type: ignore[attr-defined]
    need = ctx.needs_input_grad  # type: ignore[attr-defined]
    grads = shared.backward(need, grad, indices, offsets, x, W_enc, b_dec)
    return (*grads, None, None, None, None, None)


_encode = Op(
    batch_topk_encode_reference,
    fake=_fake,
    backends=[
        triton_backend(
            "microtome.kernels.batch_topk_encode:launch",
            torch.float32,
            torch.bfloat16,
            torch.float16,
        )
    ],
    backward=_backward,
    setup_context=_setup_context,
)
