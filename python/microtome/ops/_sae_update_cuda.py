"""`sae_update` in CUDA C++: csrc/cuda/sae_entries.cu and sae_update.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from microtome import _native
from microtome._look import look_after_writing
from microtome.ops import _sae_update_inputs as inputs

CHUNK, WIDEST, WIDEST_ODD = 128, 16384, 8192  # as in csrc/cuda/sae_update.h


def why_not(*args: object) -> str | None:
    """None when the kernels take a call's arguments, all by position, else the reason."""
    tensors = [a for a in args if isinstance(a, Tensor)]
    reason = inputs.why_not("cuda", args)
    indices, aux_indices, x, W_enc = args[0], args[5], args[10], args[11]
    if reason or not isinstance(x, Tensor) or not isinstance(W_enc, Tensor):
        return reason
    if args[28] is not None:
        return "gradients of rows"
    if args[24] is not None and args[23] != "bf16":
        return f"screen kind {args[23]!r} (refreshes 'bf16')"
    (n, d), f = x.shape, W_enc.shape[0]
    entries = sum(t.numel() for t in (indices, aux_indices) if isinstance(t, Tensor))
    if not (0 < f < 2**31 - 1 and n < 2**30 and entries < 2**31):
        return f"n={n}, f={f}, entries={entries} (needs 0 < f < 2^31 - 1, n < 2^30, entries < 2^31)"
    aligned = d % 4 == 0 and all(t.data_ptr() % 16 == 0 for t in tensors)
    widest = WIDEST if aligned else WIDEST_ODD
    if not 0 < d <= widest:
        beyond = f"; {WIDEST} where rows start at multiples of 16 bytes" if not aligned else ""
        return f"d={d} (a block holds a row of up to {widest}{beyond})"
    return None


def update(
    indices: Tensor, values: Tensor, grad_values: Tensor, grad_out: Tensor, scale: float,
    aux_indices: Tensor | None, aux_values: Tensor | None, aux_grad_values: Tensor | None,
    aux_grad_out: Tensor | None, aux_scale: float,
    x: Tensor, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, b_dec: Tensor,
    m_W_enc: Tensor | None, v_W_enc: Tensor | None, m_b_enc: Tensor | None, v_b_enc: Tensor | None,
    m_W_dec: Tensor | None, v_W_dec: Tensor | None, m_b_dec: Tensor | None, v_b_dec: Tensor | None,
    kind: str, shadow: Tensor | None, stats: Tensor | None,
    W_enc_bf16: Tensor | None, W_dec_bf16: Tensor | None,
    extra_place: Tensor | None, extra_W_enc: Tensor | None, extra_b_enc: Tensor | None,
    extra_W_dec: Tensor | None,
    optimizer: str, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float,
    step: int, rowsparse: bool, project: bool, renorm: bool, center: bool,
    verdict: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`sae_update`: sort the entries by latent; a block updates both rows of a run of latents.

    Everything is allocated before anything is written. With a screen a step that went beyond
    float32 is an error: on a GPU that of a later call (_pending.py), while a CUDA graph is captured
    none.
    """
    native, f, (n, d) = _native.cuda(), W_enc.shape[0], x.shape
    device = x.device

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device=device)

    with _native.device_of(x):
        flat = indices.flatten().int()
        if aux_indices is not None:
            flat = torch.cat([flat, aux_indices.flatten().int()])
        main = [t.contiguous() for t in (values, grad_values, grad_out)]
        aux = main
        if aux_values is not None and aux_grad_values is not None and aux_grad_out is not None:
            aux = [t.contiguous() for t in (aux_values, aux_grad_values, aux_grad_out)]
        x = x.contiguous()
        latents, order = torch.sort(flat, stable=True)
        m = flat.numel()
        slots = -(-m // CHUNK) if m > CHUNK else 0
        fired = empty(f, dtype=torch.int32)
        entries = (
            latents, order, empty(m), empty(m), empty(m, dtype=torch.int32),
            empty(m, dtype=torch.uint8), empty(f + 1, dtype=torch.int32), empty(f), fired,
            empty(f, dtype=torch.int32), empty(slots, d), empty(slots, d),
        )  # fmt: skip
        centre = empty(native.update_programs(f), d) if center else None
        # Where the verdict is not 0, fired is all of this that is written.
        native.sae_update(
            [t.data_ptr() for t in entries], [m, n, d, f],
            ([*(t.data_ptr() for t in main), indices.shape[1]], scale),
            ([*(t.data_ptr() for t in aux), 1 if aux_indices is None else aux_indices.shape[1]],
             aux_scale),
            x.data_ptr(),
            *_rule(optimizer, lr, beta1, beta2, eps, weight_decay, step, m_W_enc is not None),
            [_native.address(t) for t in (
                W_enc, m_W_enc, v_W_enc, b_enc, m_b_enc, v_b_enc,
                W_dec, m_W_dec, v_W_dec, b_dec, m_b_dec, v_b_dec,
            )],
            [_native.address(shadow), _native.address(stats),
             0 if shadow is None else shadow.stride(0)],
            [_native.address(W_enc_bf16), _native.address(W_dec_bf16)],
            _native.address(centre), _native.address(verdict),
            [rowsparse, project, renorm, x.dtype == torch.bfloat16],
            _native.stream(x),
        )  # fmt: skip
    if stats is not None:
        look_after_writing("sae_update", "W_enc", W_enc, norms=stats[:, 1])
    return fired


def _rule(
    optimizer: str, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float,
    step: int, momentum: bool,
) -> tuple[list[bool], list[float]]:  # fmt: skip
    """Rule's fields, in the order of csrc/cuda/sae_update.h."""
    adam = optimizer in ("adam", "adamw")
    decoupled = optimizer in ("adamw", "signsgd")
    rate = lr / (1 - beta1**step) if adam else lr
    root = (1 - beta2**step) ** 0.5 if adam else 1.0
    decay, shrink = (0.0, 1 - lr * weight_decay) if decoupled else (weight_decay, 1.0)
    numbers = [rate, beta1, 1 - beta1, beta2, 1 - beta2, eps, decay, shrink, 1 / root]
    return [adam, optimizer == "signsgd", momentum], numbers
