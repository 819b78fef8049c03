"""The pre-activations above a threshold: ReLU, JumpReLU and gated codes, without forming [n, f]."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from microtome._csr import Entries, check_room, offsets_of
from microtome.errors import ArgumentError
from microtome.ops import _csr_encode as shared
from microtome.ops._registry import Op, triton_backend
from microtome.ops.screen_weights import Screen

OP = "threshold_encode"


class Thresholded(NamedTuple):
    """What `threshold_encode` returns.

    Attributes:
        code: the entries above the threshold.
        window: the entries within half a bandwidth of it, on either side.
        candidates: [n] int32, the certificate: how many features of the row were computed in
            float32. f means that the row was computed whole.
    """

    code: Entries
    window: Entries
    candidates: Tensor


def threshold_encode(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None = None,
    b_dec: Tensor | None = None,
    *,
    threshold: Tensor | None = None,
    bandwidth: float = 0.0,
    precision: str = "exact",
    screen: Screen | None = None,
    capacity: int | None = None,
    per_row: int | None = None,
) -> Thresholded:
    """Find every pre-activation above its feature's threshold, and those close to it.

        z = (x - b_dec) W_enc^T + b_enc
        code: all z[i, j] > threshold[j]          window: all |z[i, j] - threshold[j]| < bandwidth/2

    Without a threshold this is the ReLU. With one and `jump_relu` it is JumpReLU, whose
    straight-through gradient needs the window. On the gate's weights it gives the active features
    of a gated SAE. Comparisons are those of float32 tensors: an entry at its threshold is out, and
    -0.0 is not above 0.

    On a GPU low precision rules out what provably lies below; the rest is computed in float32, and
    rows that do not fit are computed whole. On a CPU plain PyTorch forms the pre-activations a
    block of rows at a time.

    Args:
        x: [n, d] float32, bfloat16, float16 or float64. Activations.
        W_enc: [f, d], dtype of x, one row per feature.
        b_enc: [f], or None for zero.
        b_dec: [d] subtracted from x first, or None.
        threshold: [f], or None for zero. Its gradient comes from `jump_relu`.
        bandwidth: width of the window, in units of z; 0 for none.
        precision: "exact", or "fast" as in `topk_encode`; no backend of this op takes the licence.
        screen: what `screen_weights(W_enc)` returned for these very weights; a bf16 one is used on
            a GPU.
        capacity: entries to make room for, in the code and in the window; without it the sizes
            follow the data, and the host waits for a GPU to tell them. A graph of
            torch.compile holds the op whole with a capacity, or without one where
            torch._dynamo.config.capture_dynamic_output_shape_ops is set.
        per_row: candidates of a row that a GPU makes room for, 8 bytes each: entries, those of the
            window, and what low precision cannot tell from them. None for f/64, at least 256, and
            twice what a capacity has for each row, up to f/8. The answer is the same for any; rows
            with more candidates are computed whole, f float32 dot products each, and again in the
            second of two passes where more than 64 MiB of values are whole. `candidates` shows it:
            where it is f for more than a few rows, pass more, or use the dense formula.

    The dense formula, a linear layer and a comparison, is the better choice for dense codes, as
    those of a ReLU SAE at initialisation, where half of all features are active. By the bytes that
    are read and the operations of the product a GPU gains from sparse codes below about f/150
    entries a row, or f/70 where W_dec stays in its cache.

    Returns:
        Thresholded(code, window, candidates); code and window are (values [m] in x's dtype,
        accumulated in float32, indices [m] int32, offsets [n + 1] int64), the index ascending in a
        row. With `capacity` m is the capacity, offsets[n] says how many entries there are, and the
        others are 0.

    Raises:
        ShapeError, DtypeError, DeviceError: the letters, dtypes or devices do not agree.
        ArgumentError: bandwidth, precision, capacity or per_row is out of its range, or there are
            more entries than the capacity.
        NonFiniteError: an input or a pre-activation is NaN or infinite; the message names the rows.
            On a GPU a later call raises this error and that of the capacity
            (docs/inside_torch.md), and nothing does for a captured CUDA graph: entries that do not
            fit are left out, and the candidates of their rows, like those of rows with a value that
            is NaN or infinite, are -1.
        BackendError: a demanded backend cannot run these inputs.

    Differentiable in x, W_enc, b_enc, b_dec, through the values of the code; the window's values
    carry no gradient. Deterministic. Cost: one low-precision product, plus a float32 dot product
    for each entry and for each feature that the low precision cannot tell from one.
    Source: Rajamanoharan et al. 2024, arXiv:2407.14435 (JumpReLU), arXiv:2404.16014 (gated).

    Example:
        >>> import torch
        >>> x = torch.tensor([[3.0, 2.0], [1.0, 0.0]])
        >>> code, window, _ = threshold_encode(
        ...     x, torch.eye(2), threshold=torch.tensor([1.0, 1.5]), bandwidth=1.5
        ... )
        >>> code.values.tolist(), code.indices.tolist(), code.offsets.tolist()
        ([3.0, 2.0], [0, 1], [0, 2, 2])
        >>> window.values.tolist(), window.offsets.tolist()
        ([2.0, 1.0], [0, 1, 2])
    """
    shared.check_inputs(OP, x, W_enc, b_enc, b_dec, precision, threshold)
    if not 0.0 <= bandwidth < float("inf"):
        msg = f"{OP}: bandwidth must be finite and at least 0, got {bandwidth}."
        raise ArgumentError(msg)
    if capacity is not None and capacity < 0:
        msg = f"{OP}: capacity must be at least 0, or None for what the data need, got {capacity}."
        raise ArgumentError(msg)
    if per_row is not None and per_row < 1:
        msg = f"{OP}: per_row must be at least 1, or None for what f suggests, got {per_row}."
        raise ArgumentError(msg)
    out = _encode(
        x, W_enc, b_enc, b_dec, threshold, float(bandwidth), capacity, precision,
        *shared.parts_of(OP, screen, W_enc), per_row,
    )  # fmt: skip
    return Thresholded(Entries(*out[:3]), Entries(*out[3:6]), out[6])


def threshold_encode_reference(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    b_dec: Tensor | None,
    threshold: Tensor | None,
    bandwidth: float,
    capacity: int | None,
    precision: str,
    kind: str,
    shadow: Tensor | None,
    stats: Tensor | None,
    per_row: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compare every pre-activation, a block of rows at a time."""
    n, f = x.shape[0], W_enc.shape[0]
    shared.check_finite(OP, x, W_enc, b_enc, b_dec, threshold)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    above = torch.zeros(f, dtype=wide, device=x.device)
    if threshold is not None:
        above = threshold.to(wide)
    nothing = (x.new_empty(0), x.new_empty(0, dtype=torch.int32), x.new_empty(0, dtype=torch.int64))
    found = ([nothing], [nothing])  # values, indices and row lengths of each block
    if bandwidth == 0:
        found[1].append((*nothing[:2], nothing[2].new_zeros(n)))
    for _, z in shared.blocks(OP, x, W_enc, b_enc, b_dec):
        masks = [z > above]
        if bandwidth > 0:
            masks.append((z - above).abs() < bandwidth / 2)
        for entries, mask in zip(found, masks, strict=False):
            entries.append((z[mask].to(x.dtype), mask.nonzero()[:, 1].int(), mask.sum(1)))
    out: list[Tensor] = []
    for entries, what in zip(found, ("entries", "entries in the window"), strict=True):
        values, indices, counts = (torch.cat(parts) for parts in zip(*entries, strict=True))
        fixed = capacity is not None and (bandwidth > 0 or not out)
        room = capacity if fixed and capacity is not None else values.numel()
        check_room(OP, values.numel(), room, what)
        out += [_padded(values, room), _padded(indices, room), offsets_of(counts)]
    candidates = torch.full((n,), f, dtype=torch.int32, device=x.device)
    return out[0], out[1], out[2], out[3], out[4], out[5], candidates


def _padded(entries: Tensor, room: int) -> Tensor:
    return torch.cat([entries, entries.new_zeros(room - entries.numel())])


def _fake(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    b_dec: Tensor | None,
    threshold: Tensor | None,
    bandwidth: float,
    capacity: int | None,
    *_: object,
) -> tuple[Tensor, ...]:
    n = x.shape[0]
    out: list[Tensor] = []
    for wanted in (True, bandwidth > 0):
        m: int | torch.SymInt | None = capacity if wanted else 0
        if m is None:
            m = torch.library.get_ctx().new_dynamic_size()
        out += [
            x.new_empty(m),
            x.new_empty(m, dtype=torch.int32),
            x.new_empty(n + 1, dtype=torch.int64),
        ]
    return (*out, x.new_empty(n, dtype=torch.int32))


def _setup_context(
    ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]
) -> None:
    x, W_enc, _, b_dec = inputs[:4]
    ctx.save_for_backward(x, W_enc, b_dec, output[1], output[2])
    ctx.mark_non_differentiable(*output[1:])


def _backward(
    ctx: torch.autograd.function.FunctionCtx, grad: Tensor, *_: Tensor | None
) -> tuple[Tensor | None, ...]:
    x, W_enc, b_dec, indices, offsets = ctx.saved_tensors  # type: ignore[attr-defined]
    need = ctx.needs_input_grad  # type: ignore[attr-defined]
    grads = shared.backward(need, grad, indices, offsets, x, W_enc, b_dec)
    return (*grads, *(None,) * 8)


_encode = Op(
    threshold_encode_reference,
    fake=_fake,
    backends=[
        triton_backend(
            "microtome.kernels.threshold_encode:launch",
            torch.float32,
            torch.bfloat16,
            torch.float16,
        )
    ],
    backward=_backward,
    setup_context=_setup_context,
)
