"""What an op says when memory runs out: its inputs with their bytes, and a way out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from microtome import _check
from microtome.errors import MicrotomeError, OutOfMemoryError

_ROWS = "Pass fewer rows of {} at once."
# What makes a call of each op smaller; another op names its largest input.
WAYS = {
    "topk_encode": _ROWS.format("x") + " A screen made once by screen_weights(W_enc) saves each "
    "call a bfloat16 copy of W_enc.",
    "topk_encode_fp8": _ROWS.format("x") + ' A screen made once by screen_weights(W_enc, "fp8") '
    "saves each call a copy of W_enc of a byte a weight.",
    "batch_topk_encode": _ROWS.format("x") + " A smaller batch takes its n * k largest from fewer.",
    "threshold_encode": _ROWS.format("x") + " A higher threshold or a capacity bounds the code.",
    "sparse_decode": _ROWS.format("values and indices"),
    "sparse_decode_grad_values": _ROWS.format("grad_out and indices"),
    "sparse_decode_grad_W_dec": "The gradient is as large as W_dec: sae_update takes a step "
    "without forming it.",
    "sparse_decode_csr": "Pass the entries of fewer rows at once, with their offsets.",
    "sparse_decode_csr_grad_values": "Pass the entries of fewer rows at once, with their offsets.",
    "sparse_decode_csr_grad_W_dec": "The gradient is as large as W_dec, and in float32 until it is "
    "returned.",
    "feature_clamp": _ROWS.format("x"),
    "solu": _ROWS.format("x"),
    "solu_grad_x": _ROWS.format("x"),
    "sae_loss": _ROWS.format("x, values and indices"),
    "sae_update": _ROWS.format("indices, values, grad_values, grad_out and x")
    + " Moments in bfloat16 or int8 (moments_for) take 2 or 1 bytes a weight instead of 4.",
    "patch_rows": _ROWS.format("rows and table"),
    "delta_linear": _ROWS.format("x and index"),
    "packed_linear": _ROWS.format("x"),
    "cascade_attention": _ROWS.format("rows, with their queries and keys,"),
    "swap_key_attention": _ROWS.format("rows, q_new, k_new and v_new"),
    "attribution_scores": _ROWS.format("source, base and grad"),
    "random_ranks": "Draw fewer samples at once: a sample's ranks depend on its number alone.",
    "coalition_inputs": _ROWS.format("rows"),
    "coalition_gram": "Pass fewer explicands of values at once.",
    "shapley_reduce": "Pass fewer explicands of values at once.",
    "mlp_shapley": _ROWS.format("x"),
}
_FRAGMENTS = (
    "If much is reserved but unallocated, start with "
    "PYTORCH_ALLOC_CONF=expandable_segments:True: the memory is there, but in pieces."
)


def ran_out(error: BaseException) -> bool:
    """Whether an error is torch's, Python's or C++'s word for too little memory, not yet ours."""
    if isinstance(error, MicrotomeError):
        return False
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error)  # on the CPU torch raises a plain RuntimeError
    return "DefaultCPUAllocator" in text and "memory" in text


def described(
    op: str, backend: str, names: Sequence[str], args: Sequence[object], error: BaseException
) -> OutOfMemoryError:
    """The error to raise in place of `error`."""
    tensors = list(_tensors(names, args))
    device = tensors[0][1].device if tensors else torch.device("cpu")
    lines = [f"{op}: out of memory on {device}; backend {backend!r} was given"]
    for name, tensor in tensors:
        kind = _check.dtype_name(tensor.dtype)
        lines.append(f"  {name}: {list(tensor.shape)} {kind}, {amount(tensor.nbytes)}")
    lines.append(f"  together {amount(sum(tensor.nbytes for _, tensor in tensors))}")
    if str(error):
        lines.append(f"and asked for more: {str(error).splitlines()[0]}")
    largest = max(tensors, key=lambda named: named[1].nbytes)[0] if tensors else "the inputs"
    lines.append(WAYS.get(op, f"Pass less of {largest} at once."))
    if device.type == "cuda":
        lines.append(_FRAGMENTS)
    return OutOfMemoryError("\n".join(lines))


def amount(size: int) -> str:
    """`1.5 GB` for 1500000000, in powers of 1000."""
    value, units = float(size), ["bytes", "kB", "MB", "GB", "TB"]
    while value >= 999.95 and len(units) > 1:
        value, units = value / 1000, units[1:]
    return f"{value:.0f} {units[0]}" if units[0] == "bytes" else f"{value:.1f} {units[0]}"


def _tensors(names: Sequence[str], args: Sequence[object]) -> Iterator[tuple[str, Tensor]]:
    for name, value in zip(names, args, strict=False):
        if isinstance(value, Tensor):
            yield name, value
        elif isinstance(value, (list, tuple)):
            yield from _tensors([f"{name}[{i}]" for i in range(len(value))], value)
