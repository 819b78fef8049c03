"""No time without a right answer: each op against float64 on a few rows of the timed input.

The rule is microtome.testing's: an error at most twice that of plain PyTorch at the same dtype,
plus one unit in the last place of the largest entry.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.agreement import DisagreementError, largest_difference, within
from benchmarks.inputs import Inputs
from microtome.ops import Screen, sae_update, screen_weights, use_backend
from microtome.ops.sae_update import Code, UpdateRule, apply_rule

ROWS = 8


def sample(n: int) -> Tensor:
    """Row numbers spread over [0, n), first and last among them."""
    return torch.linspace(0, n - 1, min(n, ROWS)).round().long().unique()


def preactivations(inputs: Inputs, rows: Tensor) -> tuple[Tensor, Tensor]:
    """z of a few rows, by plain float32 and in float64, both [r, f], a panel of W_enc at a time."""
    centred = inputs.x[rows] - inputs.b_dec
    plain = torch.nn.functional.linear(centred, inputs.W_enc, inputs.b_enc)
    wide = inputs.x[rows].double() - inputs.b_dec.double()
    parts = [
        wide @ W.double().T + b.double()
        for W, b in zip(inputs.W_enc.split(8192), inputs.b_enc.split(8192), strict=True)
    ]
    return plain, torch.cat(parts, dim=1)


def check_code(
    inputs: Inputs, values: Tensor, indices: Tensor, *, relu: bool = False, slack: float = 0.0
) -> dict[str, Any]:
    """Check the top k of a few rows: the values, and that nothing larger was left out.

    Args:
        inputs: what was encoded.
        values: [n, k] pre-activations, or activations after the ReLU with `relu`.
        indices: [n, k].
        relu: compare after the ReLU; entries that it cut may be any feature.
        slack: for a selection in low precision: what a chosen feature may fall short of the k-th,
            as a fraction of |x| times the largest |w|.

    Returns:
        Errors, allowances and `recall`: the share of the true top k that was chosen.
    """
    rows = sample(values.shape[0])
    plain, exact = preactivations(inputs, rows)
    got, chosen = values[rows], indices[rows].long()
    k = inputs.case.k
    if got.shape != (rows.numel(), k):
        msg = f"code: shape {list(values.shape)}, expected [n, k={k}]"
        raise DisagreementError(msg)
    live = got > 0 if relu else torch.ones_like(got, dtype=torch.bool)
    expected_plain, expected = plain.gather(1, chosen), exact.gather(1, chosen)
    if relu:
        expected_plain, expected = expected_plain.relu(), expected.relu()
    zero = torch.zeros(())
    result: dict[str, Any] = within(
        "values",
        got.where(live, zero),
        expected_plain.where(live, zero),
        expected.where(live, zero.double()),
    )
    best, best_indices = exact.topk(k, dim=1)
    reach = (
        slack
        * (inputs.x[rows] - inputs.b_dec).norm(dim=1, keepdim=True).double()
        * inputs.W_enc.norm(dim=1).max()
    )
    short = (best[:, -1:] - reach - expected).where(live, zero.double()).amax()
    border = 2 * largest_difference(plain, exact)
    if float(short) > border:
        below = f"{float(short):.3e} below the k-th largest, rounding allows {border:.3e}"
        msg = f"selection: a chosen feature is {below}"
        raise DisagreementError(msg)
    ordered = chosen.sort(dim=1).values
    if bool((ordered[:, 1:] == ordered[:, :-1]).any()):
        msg = "selection: one feature was chosen twice in a row"
        raise DisagreementError(msg)
    lost = (best > border) if relu else torch.ones_like(best, dtype=torch.bool)
    found = (best_indices[:, :, None] == chosen[:, None, :]).any(-1)
    result["recall"] = float(found[lost].double().mean()) if bool(lost.any()) else 1.0
    if slack == 0.0 and bool((lost & ~found & (best - best[:, -1:] > border)).any()):
        msg = "selection: a feature clearly above the k-th largest was left out"
        raise DisagreementError(msg)
    return {**result, "rows": rows.numel()}


def decoded(values: Tensor, indices: Tensor, W_dec: Tensor, b_dec: Tensor) -> tuple[Tensor, Tensor]:
    """The reconstruction of a few rows, by plain float32 and in float64, both [r, d]."""
    rows = W_dec[indices.long()]  # [r, k, d]
    plain = torch.einsum("rk,rkd->rd", values, rows) + b_dec
    return plain, torch.einsum("rk,rkd->rd", values.double(), rows.double()) + b_dec.double()


def check_decode(
    out: Tensor, values: Tensor, indices: Tensor, W_dec: Tensor, b_dec: Tensor
) -> dict[str, Any]:
    """Check a few rows of a reconstruction."""
    rows = sample(out.shape[0])
    return within("out", out[rows], *decoded(values[rows], indices[rows], W_dec, b_dec))


def check_loss(
    outputs: tuple[Tensor, Tensor, Tensor],
    x: Tensor,
    values: Tensor,
    indices: Tensor,
    W_dec: Tensor,
    b_dec: Tensor,
) -> dict[str, Any]:
    """Check sse, grad_out and grad_values of a few rows."""
    rows = sample(x.shape[0])
    plain, exact = decoded(values[rows], indices[rows], W_dec, b_dec)
    e, e64 = plain - x[rows], exact - x[rows].double()
    active = W_dec[indices[rows].long()]
    cut = values[rows] == 0
    grad = torch.einsum("rd,rkd->rk", 2 * e, active).masked_fill(cut, 0.0)
    grad64 = torch.einsum("rd,rkd->rk", 2 * e64, active.double()).masked_fill(cut, 0.0)
    sse, grad_out, grad_values = (t[rows] for t in outputs)
    return {
        **within("sse", sse, e.pow(2).sum(1), e64.pow(2).sum(1)),
        **within("grad_out", grad_out, 2 * e, 2 * e64),
        **within("grad_values", grad_values, grad, grad64),
    }


def update_exact(
    chosen: Tensor,
    code: Code,
    x: Tensor,
    params: tuple[Tensor, ...],
    moments: list[Tensor | None],
    rule: UpdateRule,
    step: int,
    dtype: torch.dtype,
) -> list[Tensor]:
    """W_enc, b_enc, W_dec of a few features, and b_dec, after one step of the reference in `dtype`.

    The features are cut out into a small problem, with one more feature that takes every other
    entry; b_dec, which depends on all features, is worked out apart.

    Args:
        chosen: [g] feature numbers.
        code: the step's code.
        x: [n, d] what the encoder saw.
        params: W_enc, b_enc, W_dec, b_dec before the step.
        moments: as for sae_update, before the step.
        rule: the optimizer.
        step: number of the step.
        dtype: float64, or float32 for what plain PyTorch makes of it.
    """
    place = torch.full((params[0].shape[0],), chosen.numel(), dtype=torch.int64)
    place[chosen] = torch.arange(chosen.numel())
    local = place[code.indices.long()]  # [n, k]
    own = local < chosen.numel()
    rest = torch.ones(1, dtype=dtype)

    def cut(t: Tensor) -> Tensor:
        return torch.cat([t[chosen].to(dtype), rest.expand(1, *t.shape[1:])])

    small = (*(cut(p) for p in params[:3]), params[3].to(dtype).clone())
    state = [
        None if m is None else (cut(m) if i < 6 else m.to(dtype).clone())
        for i, m in enumerate(moments)
    ]
    part = Code(
        local,
        code.values.to(dtype),
        code.grad_values.to(dtype) * own,
        code.grad_out.to(dtype),
        code.scale,
    )
    with use_backend("reference"):
        sae_update(part, x.to(dtype), small, state, rule, step, center=False)
    encoder = torch.zeros_like(params[3], dtype=dtype)
    for grad, idx in zip(code.grad_values.split(64), code.indices.split(64), strict=True):
        encoder += torch.einsum("nk,nkd->d", grad.to(dtype), params[0][idx.long()].to(dtype))
    b_dec = params[3].to(dtype).clone()
    grad_b_dec = code.scale * (code.grad_out.to(dtype).sum(0) - encoder)
    m, v = (None if t is None else t.to(dtype).clone() for t in moments[6:])
    apply_rule(
        b_dec,
        grad_b_dec,
        m,
        v,
        rule.optimizer,
        rule.lr,
        rule.beta1,
        rule.beta2,
        rule.eps,
        0.0,
        step,
    )
    return [*(p[:-1] for p in small[:3]), b_dec]


def check_update(
    code: Code,
    x: Tensor,
    params: tuple[Tensor, Tensor, Tensor, Tensor],
    moments: list[Tensor | None],
    rule: UpdateRule,
    step: int,
    screen: Screen | None = None,
) -> dict[str, Any]:
    """Take one step and check some features, from most to never fired, and b_dec against float64.

    Args:
        code: the step's code.
        x: [n, d] what the encoder saw.
        params: updated in place, as sae_update does.
        moments: updated in place.
        rule: the optimizer.
        step: number of the step.
        screen: refreshed in place; compared with a screen built anew.
    """
    counts = torch.bincount(code.indices.flatten().long(), minlength=params[0].shape[0])
    order = counts.argsort()
    chosen = order[sample(order.numel())].unique()
    before = (chosen, code, x, params, moments, rule, step)
    exact, plain = update_exact(*before, torch.float64), update_exact(*before, torch.float32)
    sae_update(code, x, params, moments, rule, step, screen=screen)
    got = [*(p[chosen] for p in params[:3]), params[3]]
    result: dict[str, Any] = {}
    for name, g, p, e in zip(("W_enc", "b_enc", "W_dec", "b_dec"), got, plain, exact, strict=True):
        result.update(within(name, g, p, e))
    if screen is not None:
        rows = params[0][chosen].contiguous()
        fresh = screen_weights(rows, screen.kind)
        # The two may round a tie or a norm differently; what counts is that the shadow still shows
        # these weights.
        scale = screen.stats[chosen, :1]
        step_size = float((screen.shadow[chosen].float() - fresh.shadow.float()).abs().max())
        if step_size > 1 or not torch.allclose(scale, fresh.stats[:, :1], rtol=1e-5):
            msg = f"screen: {step_size:.0f} units from a shadow built anew"
            raise DisagreementError(msg)
    return {**result, "features": chosen.numel()}
