"""One optimizer step of an SAE: gradients, projection, update and decoder renorm in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from microtome import _check, _native
from microtome._seed import step_key
from microtome.ops import _sae_update_cuda
from microtome.ops import _sae_update_inputs as inputs
from microtome.ops import _sae_update_states as states
from microtome.ops._registry import Backend, Op
from microtome.ops._sae_update_inputs import (
    OPTIMIZERS,
    Code,
    Params,
    RowGradients,
    UpdateRule,
    moments_for,
)
from microtome.ops.screen_weights import KINDS, Screen

__all__ = [
    "OPTIMIZERS",
    "Code",
    "RowGradients",
    "UpdateRule",
    "apply_rule",
    "moments_for",
    "sae_update",
]


def sae_update(
    code: Code,
    x: Tensor,
    params: Params,
    moments: list[Tensor | None],
    rule: UpdateRule,
    step: int,
    *,
    aux: Code | None = None,
    extra: RowGradients | None = None,
    center: bool = True,
    screen: Screen | None = None,
    copies: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Take one optimizer step on W_enc, b_enc, W_dec, b_dec in place, with no dense gradient.

        dW_dec[g] = sum over entries of g:  scale * value * grad_out[row]
        dW_enc[g] = sum over entries of g:  scale * grad_value * x[row]
        db_enc[g] = sum over entries of g:  scale * grad_value
        db_dec    = sum_rows scale * grad_out[row] - (center) sum_g db_enc[g] W_enc[g]
        dW_dec[g] -= <dW_dec[g], W_dec[g]> / |W_dec[g]|^2 * W_dec[g]     (project)
        p = rule(p, dp);  W_dec[g] /= |W_dec[g]|                           (renorm)

    Entries of the aux code are added to the same sums, save that its grad_out does not reach b_dec;
    so are the rows of `extra`, whose latents count as touched.

    Args:
        code: the main code; shapes n, k.
        x: [n, d] float32 or bfloat16, what the encoder saw: already centred by b_dec if the SAE
            does that. Rows in bfloat16, these and those of the codes, halve the bytes that are
            gathered; the step is that of the same numbers in float32.
        params: W_enc [f, d], b_enc [f], W_dec [f, d], b_dec [d], float32, updated in place.
        moments: eight tensors or None: first and second moments of W_enc, b_enc, W_dec, b_dec in
            that order (m, v, m, v, ...), updated in place. `moments_for` makes them: those of the
            weights in float32, bfloat16 or 8 bits a number, those of the biases in float32.
        rule: the optimizer.
        step: 1 for the first step (Adam's bias correction).
        aux: a second code of the same rows (AuxK for dead latents), or None.
        extra: gradients of some latents' rows that products have formed (AuxK where few latents
            are dead), or None.
        center: the encoder's input was x - b_dec, so b_dec's gradient has an encoder part.
        screen: the encoder's shadow, refreshed in the same pass, or None.
        copies: W_enc.bfloat16() and W_dec.bfloat16() [f, d], refreshed in the same pass, or None:
            what `topk_encode` and `sae_loss` take for a step whose rows are bfloat16.

    Returns:
        fired [f] int32: entries of the main code with a value above zero, per feature.

    Raises:
        ShapeError, DtypeError, DeviceError, ArgumentError: inputs do not agree; nothing has been
            changed.
        NonFiniteError: an input holds NaN or infinity; nothing has been changed. Or, with a screen
            only, the step itself took a row of W_enc beyond float32; the parameters have moved.
            On a GPU this and an index out of range raise in a later call (docs/inside_torch.md):
            the kernels know and write nothing, nor does a captured CUDA graph, and fired is 0.
        BackendError: a demanded backend cannot run these inputs.

    Not differentiable. Deterministic for any thread count: entries are sorted by latent, long
    segments are summed in fixed chunks, and the random bits of rounded moments are a hash of step
    and place. Reads and writes each parameter and moment once: with Adam 24 bytes a weight, 16 with
    bfloat16 moments, 12 with 8-bit ones, and 2 more for the shadow and for each copy. A step
    divides by the moments before they are rounded. On CPU, results below 2^-126 become zero: the
    moments of features that no longer fire would otherwise decay into slow denormals.
    Source: Kingma & Ba 2015, arXiv:1412.6980; Gao et al. 2024, arXiv:2406.04093; Dettmers et al.
    2022, arXiv:2110.02861 (8-bit states).
    """
    sizes = inputs.check_shapes(code, x, params, aux, extra)
    inputs.check_types(code, x, params, aux, extra)
    inputs.check_rule(rule, step)
    inputs.check_state(params, moments, rule, screen, copies)
    verdict = None
    if not torch.compiler.is_compiling():
        code, aux, extra, verdict = inputs.check_contents(code, x, aux, extra, sizes["f"])
    fired: Tensor = _update(
        code.indices, code.values, code.grad_values, code.grad_out, code.scale,
        *((aux.indices, aux.values, aux.grad_values, aux.grad_out, aux.scale)
          if aux else (None,) * 4 + (0.0,)),
        x, *params, *moments,
        *((screen.kind, screen.shadow, screen.stats) if screen else ("", None, None)),
        *(copies or (None, None)),
        *(extra.tensors if extra else (None,) * 4),
        rule.optimizer, rule.lr, rule.beta1, rule.beta2, rule.eps, rule.weight_decay, step,
        rule.rowsparse, rule.project, rule.renorm, center, verdict,
    )  # fmt: skip
    return fired


def apply_rule(
    p: Tensor, grad: Tensor, m: Tensor | None, v: Tensor | None,
    optimizer: str, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float,
    step: int,
) -> None:  # fmt: skip
    """One optimizer step on a tensor, in place: the spec that every backend follows."""
    if optimizer in ("adamw", "signsgd") and weight_decay:
        p.mul_(1 - lr * weight_decay)
    elif weight_decay:
        grad = grad + weight_decay * p
    if optimizer in ("adam", "adamw"):
        assert m is not None
        assert v is not None
        m.lerp_(grad, 1 - beta1)
        v.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        denominator = (v.sqrt() / (1 - beta2**step) ** 0.5).add_(eps)
        p.addcdiv_(m, denominator, value=-lr / (1 - beta1**step))
    elif optimizer == "sgd":
        if m is not None:
            grad = m.mul_(beta1).add_(grad)
        p.sub_(grad, alpha=lr)
    else:
        if m is not None:
            grad = m.mul_(beta1).add_(grad, alpha=1 - beta1)
        p.sub_(grad.sign(), alpha=lr)


def sae_update_reference(
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
    """Dense gradients by index_add, then the rule on every tensor."""
    f = W_enc.shape[0]
    if inputs.refused(verdict):
        return torch.zeros(f, dtype=torch.int32, device=x.device)
    values, grad_values, grad_out, x = (
        t.to(W_enc.dtype) for t in (values, grad_values, grad_out, x)
    )
    # Parameters may be leaves that require grad.
    W_enc, b_enc, W_dec, b_dec = (p.detach() for p in (W_enc, b_enc, W_dec, b_dec))
    dW_enc, dW_dec, db_enc = (
        torch.zeros_like(W_enc),
        torch.zeros_like(W_dec),
        torch.zeros_like(b_enc),
    )
    touched = torch.zeros(f, dtype=torch.bool, device=x.device)
    codes = [(indices, values, grad_values, grad_out, scale)]
    if aux_indices is not None:
        assert aux_values is not None
        assert aux_grad_values is not None
        assert aux_grad_out is not None
        aux = [t.to(W_enc.dtype) for t in (aux_values, aux_grad_values, aux_grad_out)]
        codes.append((aux_indices, aux[0], aux[1], aux[2], aux_scale))
    for idx, val, grad_val, grad, s in codes:
        for j in range(idx.shape[1]):
            column = idx[:, j].long()
            dW_dec.index_add_(0, column, (s * val[:, j, None]) * grad)
            dW_enc.index_add_(0, column, (s * grad_val[:, j, None]) * x)
            db_enc.index_add_(0, column, s * grad_val[:, j])
        touched[idx.flatten().long()[(val != 0).flatten()]] = True
    if extra_place is not None:
        given = extra_place >= 0
        touched |= given
        for total, part in ((dW_enc, extra_W_enc), (db_enc, extra_b_enc), (dW_dec, extra_W_dec)):
            assert part is not None
            total[given] += part[extra_place[given].long()]
    db_dec = scale * grad_out.sum(0)
    if center:
        db_dec = db_dec - db_enc @ W_enc
    if project:
        along = (dW_dec * W_dec).sum(-1) / (W_dec * W_dec).sum(-1).clamp_min(1e-30)
        dW_dec = dW_dec - along[:, None] * W_dec

    hyper = (optimizer, lr, beta1, beta2, eps)
    rows = touched if rowsparse else slice(None)
    numbers = torch.arange(f, device=x.device)[rows]
    for matrix, p, grad, m, v, decay in (
        (0, W_enc, dW_enc, m_W_enc, v_W_enc, weight_decay),
        (1, b_enc, db_enc, m_b_enc, v_b_enc, 0.0),
        (2, W_dec, dW_dec, m_W_dec, v_W_dec, weight_decay),
    ):
        kept = [(t, second) for t, second in ((m, False), (v, True)) if t is not None]
        part = p[rows]  # a copy where rows are a mask
        full = [states.read(t[rows], part, second=second) for t, second in kept]
        first, other = (*full, None, None)[:2]
        apply_rule(part, grad[rows], first, other, *hyper, decay, step)
        p[rows] = part
        bits = None
        if any(t.dtype != p.dtype for t, _ in kept):
            bits = states.words(step_key(step, matrix), numbers, p.shape[1])
        for (t, second), new in zip(kept, full, strict=True):
            if bits is not None:
                states.write(t, rows, new, bits, second=second)
            else:
                t[rows] = new
    apply_rule(b_dec, db_dec, m_b_dec, v_b_dec, *hyper, 0.0, step)
    if renorm:
        W_dec[rows] = W_dec[rows] / W_dec[rows].norm(dim=-1, keepdim=True).clamp_min(1e-30)
    for copy, p in ((W_enc_bf16, W_enc), (W_dec_bf16, W_dec)):
        if copy is not None:
            copy[rows] = p[rows].bfloat16()
    if shadow is not None and stats is not None:
        new_shadow, new_stats = torch.ops.microtome.screen_weights(W_enc, kind)
        shadow.copy_(new_shadow)
        stats.copy_(new_stats)
    return torch.bincount(indices.flatten()[(values > 0).flatten()].long(), minlength=f).int()


_MUTATED = (
    "W_enc", "b_enc", "W_dec", "b_dec", "m_W_enc", "v_W_enc", "m_b_enc", "v_b_enc",
    "m_W_dec", "v_W_dec", "m_b_dec", "v_b_dec", "shadow", "stats", "W_enc_bf16", "W_dec_bf16",
)  # fmt: skip


def _fake(indices: Tensor, *args: object) -> Tensor:
    W_enc = args[10]
    assert isinstance(W_enc, Tensor)
    return torch.empty(W_enc.shape[0], dtype=torch.int32, device=indices.device)


def sae_update_cpu(
    indices: Tensor, values: Tensor, grad_values: Tensor, grad_out: Tensor, scale: float,
    aux_indices: Tensor | None, aux_values: Tensor | None, aux_grad_values: Tensor | None,
    aux_grad_out: Tensor | None, aux_scale: float,
    x: Tensor, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, b_dec: Tensor,
    *rest: Tensor | str | float | None,
) -> Tensor:  # fmt: skip
    """One pass in C++, csrc/cpu/sae_update.cpp."""
    # After these comes the verdict: none on a CPU, where everything was looked at before.
    moments, (kind, shadow, stats, *others), rule = rest[:8], rest[8:17], rest[17:28]
    n, k = indices.shape
    f, d = W_enc.shape
    fired = torch.empty(f, dtype=torch.int32)
    packed: list[Tensor] = []  # copies live until the kernel is done

    def address(tensor: Tensor | str | float | None) -> int:
        if not isinstance(tensor, Tensor):
            return 0
        packed.append(tensor.contiguous())
        return packed[-1].data_ptr()

    def widened(tensor: Tensor | None) -> Tensor | None:
        """Once for all the entries that name a row."""
        return None if tensor is None else tensor.float()

    def addresses(idx: Tensor | None, *others: Tensor | None) -> tuple[int, ...]:
        size = idx.element_size() if idx is not None else 4
        return (address(idx), size, *(address(widened(t)) for t in others))

    bad = _native.module().sae_update(
        n, d, f, k, *addresses(indices, values, grad_values, grad_out), scale,
        0 if aux_indices is None else aux_indices.shape[1],
        *addresses(aux_indices, aux_values, aux_grad_values, aux_grad_out), aux_scale,
        *map(address, (widened(x), W_enc, b_enc, W_dec, b_dec, *moments)),
        KINDS.index(kind) if isinstance(shadow, Tensor) else -1,
        shadow.shape[1] if isinstance(shadow, Tensor) else 0, address(shadow), address(stats),
        *map(address, others), *rule, fired.data_ptr(), _native.forced_isa(), _native.threads(),
    )  # fmt: skip
    if bad >= 0:
        _check.rows("sae_update", "W_enc", (~torch.isfinite(W_enc)).any(-1).nonzero().flatten())
    return fired


def _why_not_cpu(*args: object) -> str | None:
    reason, x, W_enc = inputs.why_not("cpu", args), args[10], args[11]
    if reason or not isinstance(x, Tensor) or not isinstance(W_enc, Tensor):
        return reason
    (n, d), f = x.shape, W_enc.shape[0]
    if not (0 < d < 2**24 and 0 < f < 2**31 - 1 and n < 2**31):
        return f"n={n}, d={d}, f={f} (needs 0 < d < 2^24, 0 < f < 2^31 - 1, n < 2^31)"
    return None


def _why_not_triton(*args: object) -> str | None:
    x, kind, shadow = args[10], args[23], args[24]
    if isinstance(x, Tensor) and x.shape[1] > 16384:
        return f"d={x.shape[1]} (a program holds a row of up to 16384)"
    if shadow is not None and kind != "bf16":
        return f"screen kind {kind!r} (refreshes 'bf16')"
    return inputs.why_not("triton", args, every_state=True)


_update = Op(
    sae_update_reference,
    fake=_fake,
    backends=(
        Backend(
            "cuda",
            "microtome.ops._sae_update_cuda:update",
            _sae_update_cuda.why_not,
            on_demand=True,
        ),
        Backend("triton", "microtome.kernels.sae_update:launch", _why_not_triton),
        Backend("cpu", "microtome.ops.sae_update:sae_update_cpu", _why_not_cpu),
    ),
    mutates=_MUTATED,
)
