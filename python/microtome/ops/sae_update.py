"""One optimizer step of an SAE: segment-reduced gradients, projection, update and decoder renorm in one pass."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from microtome import _check, _native
from microtome.ops._registry import Backend, Op, why_not_common
from microtome.ops.screen_weights import Screen

OPTIMIZERS = ("adam", "adamw", "sgd", "signsgd")


@dataclass(frozen=True)
class UpdateRule:
    """How parameters move, given their gradient.

    Attributes:
        optimizer: "adam", "adamw" (decoupled decay), "sgd" (momentum is beta1, 0 for none, as torch.optim.SGD) or
            "signsgd" (sign of the gradient, or of the momentum m = beta1 m + (1 - beta1) g when beta1 > 0).
        lr: step size.
        beta1: Adam's first decay, or the momentum.
        beta2: Adam's second decay.
        eps: Adam's epsilon.
        weight_decay: L2 for adam and sgd (added to the gradient), decoupled for adamw and signsgd. Acts on W_enc and
            W_dec, not on biases.
        rowsparse: leave rows that no code touched, and their moments, as they are (torch.optim.SparseAdam's
            semantics: another algorithm than Adam, opt-in).
        project: remove from each decoder row's gradient its component along the row.
        renorm: scale each decoder row to length 1 after the step.
    """

    optimizer: str = "adam"
    lr: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    rowsparse: bool = False
    project: bool = True
    renorm: bool = True


@dataclass
class Code:
    """One sparse code of a step with what its gradients need.

    Attributes:
        indices: [n, k] int32 or int64.
        values: [n, k] activations after the ReLU.
        grad_values: [n, k] gradient of the values, zero where the value is zero.
        grad_out: [n, d] gradient of this code's reconstruction.
        scale: every gradient of this code is multiplied by it (1 / total variance, say).
    """

    indices: Tensor
    values: Tensor
    grad_values: Tensor
    grad_out: Tensor
    scale: float = 1.0


def sae_update(
    code: Code,
    x: Tensor,
    params: tuple[Tensor, Tensor, Tensor, Tensor],
    moments: list[Tensor | None],
    rule: UpdateRule,
    step: int,
    *,
    aux: Code | None = None,
    center: bool = True,
    screen: Screen | None = None,
) -> Tensor:
    """Take one optimizer step on W_enc, b_enc, W_dec, b_dec, in place, without forming a dense gradient.

        dW_dec[g] = sum over entries of g:  scale * value * grad_out[row]
        dW_enc[g] = sum over entries of g:  scale * grad_value * x[row];    db_enc[g] = sum scale * grad_value
        db_dec    = sum_rows scale * grad_out[row] - (center) sum_g db_enc[g] W_enc[g]
        dW_dec[g] -= <dW_dec[g], W_dec[g]> / |W_dec[g]|^2 * W_dec[g]     (project)
        p = rule(p, dp);  W_dec[g] /= |W_dec[g]|                           (renorm)

    Entries of the aux code are added to the same sums, save that its grad_out does not reach b_dec.

    Args:
        code: the main code; shapes n, k.
        x: [n, d] float32, what the encoder saw: already centred by b_dec if the SAE does that.
        params: W_enc [f, d], b_enc [f], W_dec [f, d], b_dec [d], float32, updated in place.
        moments: eight tensors or None: first and second moments of W_enc, b_enc, W_dec, b_dec in that order
            (m, v, m, v, ...), float32, shaped like their parameter, updated in place. `moments_for` makes them.
        rule: the optimizer.
        step: 1 for the first step (Adam's bias correction).
        aux: a second code of the same rows (AuxK for dead latents), or None.
        center: the encoder's input was x - b_dec, so b_dec's gradient has an encoder part.
        screen: the encoder's shadow, refreshed in the same pass, or None.

    Returns:
        fired [f] int32: entries of the main code with a value above zero, per feature.

    Raises:
        ShapeError, DtypeError, DeviceError, ArgumentError: inputs do not agree; nothing has been changed.
        BackendError: a demanded backend cannot run these inputs.

    Not differentiable. Deterministic for any thread count: entries are sorted by latent, long segments are summed in
    fixed chunks. Reads and writes each parameter and moment once. Source: Kingma & Ba 2015, arXiv:1412.6980; Gao et
    al. 2024, arXiv:2406.04093.
    """
    op = "sae_update"
    W_enc, b_enc, W_dec, b_dec = params
    sizes = _check.shapes(
        op,
        x=(x, "n d"),
        indices=(code.indices, "n k"),
        values=(code.values, "n k"),
        grad_values=(code.grad_values, "n k"),
        grad_out=(code.grad_out, "n d"),
        W_enc=(W_enc, "f d"),
        b_enc=(b_enc, "f"),
        W_dec=(W_dec, "f d"),
        b_dec=(b_dec, "d"),
        aux_indices=(aux.indices if aux else None, "n a"),
        aux_values=(aux.values if aux else None, "n a"),
        aux_grad_values=(aux.grad_values if aux else None, "n a"),
        aux_grad_out=(aux.grad_out if aux else None, "n d"),
    )
    wide = (torch.float32, torch.float64)
    _check.dtype(op, wide, x=x)
    _check.same_dtype(op, x=x, values=code.values, W_enc=W_enc, b_enc=b_enc, W_dec=W_dec, b_dec=b_dec)
    _check.device(op, x=x, indices=code.indices, W_enc=W_enc, W_dec=W_dec)
    _check.one_of(op, "optimizer", rule.optimizer, OPTIMIZERS)
    _check.between(op, "step", step, 1, 2**62)
    _check.index_range(op, code.indices, sizes["f"])
    if aux is not None:
        _check.index_range(op, aux.indices, sizes["f"])
    for name, tensor in zip(("W_enc", "b_enc", "W_dec", "b_dec"), params, strict=True):
        if not tensor.is_contiguous():
            msg = f"{op}: {name} is updated in place and must be contiguous; pass {name}.contiguous()."
            raise _check.ArgumentError(msg)
    expected = [t is not None for t in moments_for(params, rule, meta=True)]
    if [m is not None for m in moments] != expected or len(moments) != 8:
        msg = f"{op}: moments do not fit optimizer {rule.optimizer!r}; make them with moments_for(params, rule)."
        raise _check.ArgumentError(msg)
    fired: Tensor = _update(
        code.indices, code.values, code.grad_values, code.grad_out, code.scale,
        *((aux.indices, aux.values, aux.grad_values, aux.grad_out, aux.scale) if aux else (None,) * 4 + (0.0,)),
        x, W_enc, b_enc, W_dec, b_dec, *moments,
        *((screen.kind, screen.shadow, screen.stats) if screen else ("", None, None)),
        rule.optimizer, rule.lr, rule.beta1, rule.beta2, rule.eps, rule.weight_decay, step,
        rule.rowsparse, rule.project, rule.renorm, center,
    )  # fmt: skip
    return fired


def moments_for(
    params: tuple[Tensor, Tensor, Tensor, Tensor], rule: UpdateRule, *, meta: bool = False
) -> list[Tensor | None]:
    """Zeroed optimizer state for `sae_update`: eight entries, None where the rule keeps none."""
    adam = rule.optimizer in ("adam", "adamw")
    first, second = adam or rule.beta1 > 0, adam
    device = "meta" if meta else None
    moments: list[Tensor | None] = []
    for p in params:
        moments.append(torch.zeros_like(p, device=device) if first else None)
        moments.append(torch.zeros_like(p, device=device) if second else None)
    return moments


def apply_rule(
    p: Tensor, grad: Tensor, m: Tensor | None, v: Tensor | None,
    optimizer: str, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float, step: int,
) -> None:  # fmt: skip
    """One optimizer step on a tensor, in place: the spec that every backend follows."""
    if optimizer in ("adamw", "signsgd") and weight_decay:
        p.mul_(1 - lr * weight_decay)
    elif weight_decay:
        grad = grad + weight_decay * p
    if optimizer in ("adam", "adamw"):
        assert m is not None and v is not None
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
    optimizer: str, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float, step: int,
    rowsparse: bool, project: bool, renorm: bool, center: bool,
) -> Tensor:  # fmt: skip
    """Dense gradients by index_add, then the rule on every tensor."""
    f = W_enc.shape[0]
    dW_enc, dW_dec, db_enc = torch.zeros_like(W_enc), torch.zeros_like(W_dec), torch.zeros_like(b_enc)
    touched = torch.zeros(f, dtype=torch.bool, device=x.device)
    codes = [(indices, values, grad_values, grad_out, scale)]
    if aux_indices is not None:
        assert aux_values is not None and aux_grad_values is not None and aux_grad_out is not None
        codes.append((aux_indices, aux_values, aux_grad_values, aux_grad_out, aux_scale))
    for idx, val, grad_val, grad, s in codes:
        for j in range(idx.shape[1]):
            column = idx[:, j].long()
            dW_dec.index_add_(0, column, (s * val[:, j, None]) * grad)
            dW_enc.index_add_(0, column, (s * grad_val[:, j, None]) * x)
            db_enc.index_add_(0, column, s * grad_val[:, j])
        touched[idx.flatten().long()[(val != 0).flatten()]] = True
    db_dec = scale * grad_out.sum(0)
    if center:
        db_dec = db_dec - db_enc @ W_enc
    if project:
        along = (dW_dec * W_dec).sum(-1) / (W_dec * W_dec).sum(-1).clamp_min(1e-30)
        dW_dec = dW_dec - along[:, None] * W_dec

    hyper = (optimizer, lr, beta1, beta2, eps)
    rows = touched if rowsparse else slice(None)
    for p, grad, m, v, decay in (
        (W_enc, dW_enc, m_W_enc, v_W_enc, weight_decay),
        (b_enc, db_enc, m_b_enc, v_b_enc, 0.0),
        (W_dec, dW_dec, m_W_dec, v_W_dec, weight_decay),
    ):
        part = [None if t is None else t[rows] for t in (p, m, v)]
        assert part[0] is not None
        apply_rule(part[0], grad[rows], part[1], part[2], *hyper, decay, step)
        if rowsparse:  # boolean indexing copies
            for whole, piece in zip((p, m, v), part, strict=True):
                if whole is not None and piece is not None:
                    whole[rows] = piece
    apply_rule(b_dec, db_dec, m_b_dec, v_b_dec, *hyper, 0.0, step)
    if renorm:
        W_dec[rows] = W_dec[rows] / W_dec[rows].norm(dim=-1, keepdim=True).clamp_min(1e-30)
    if shadow is not None and stats is not None:
        new_shadow, new_stats = torch.ops.microtome.screen_weights(W_enc, kind)
        shadow.copy_(new_shadow)
        stats.copy_(new_stats)
    return torch.bincount(indices.flatten()[(values > 0).flatten()].long(), minlength=f).int()


_MUTATED = (
    "W_enc", "b_enc", "W_dec", "b_dec", "m_W_enc", "v_W_enc", "m_b_enc", "v_b_enc",
    "m_W_dec", "v_W_dec", "m_b_dec", "v_b_dec", "shadow", "stats",
)  # fmt: skip


def _fake(indices: Tensor, *args: object) -> Tensor:
    W_enc = args[10]
    assert isinstance(W_enc, Tensor)
    return torch.empty(W_enc.shape[0], dtype=torch.int32, device=indices.device)


def _why_not_triton(*args: object) -> str | None:
    x, kind, shadow = args[10], args[23], args[24]
    if isinstance(x, Tensor) and x.shape[1] > 16384:
        return f"d={x.shape[1]} (a program holds a row of up to 16384)"
    if shadow is not None and kind != "bf16":
        return f"screen kind {kind!r} (refreshes 'bf16')"
    return why_not_common("triton", [a for a in args if isinstance(a, Tensor)], (torch.float32,))


_update = Op(
    sae_update_reference,
    fake=_fake,
    backends=(Backend("triton", "microtome.kernels.sae_update:launch", _why_not_triton),),
    mutates=_MUTATED,
)
