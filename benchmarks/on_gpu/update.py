"""sae_update: every state it can keep, a latent on every row, and torch's Adam beside it."""

from __future__ import annotations

import functools
import inspect
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.agreement import DisagreementError, within
from benchmarks.floors import STATES, gather_bytes, update_need
from benchmarks.on_gpu import inputs
from benchmarks.on_gpu.device import Run
from benchmarks.on_gpu.encode import profile
from benchmarks.on_gpu.goals import OPENAI, TORCH
from benchmarks.on_gpu.inputs import Batch, sample
from benchmarks.on_gpu.item import (
    REPEATS,
    AbsentError,
    Context,
    Item,
    Row,
    Subject,
    backends_here,
    measure,
)
from microtome.ops import Code, UpdateRule, moments_for, sae_update, screen_weights, use_backend

Params = tuple[Tensor, Tensor, Tensor, Tensor]
RULE = UpdateRule(lr=1e-4)
STEP = 10


def code_of(b: Batch, *, dense: bool = False) -> Code:
    """The batch's code with its gradients, by plain torch, scaled so that the loss is the FVU."""
    values, indices = inputs.code(b, dense=dense)
    grad_out, grad_values = torch.empty_like(b.x), torch.empty_like(values)
    for first in range(0, b.x.shape[0], 256):
        rows = slice(first, first + 256)
        active = b.W_dec[indices[rows].long()]  # [256, k, d]
        e = torch.einsum("rk,rkd->rd", values[rows], active) + b.b_dec - b.x[rows]
        grad_out[rows] = 2 * e
        grad = torch.einsum("rd,rkd->rk", 2 * e, active)
        grad_values[rows] = grad.masked_fill(values[rows] == 0, 0.0)
    variance = float((b.x - b.x.mean(0)).pow(2).sum())
    return Code(indices, values, grad_values, grad_out, 1.0 / variance)


def state_for(params: Params, state: str) -> list[Any]:
    """Moments as after some steps, in that state.

    Raises:
        AbsentError: this build keeps float32 moments only.
    """
    if state == "float32":
        moments = moments_for(params, RULE)
        g = torch.Generator(params[0].device).manual_seed(5)
        for i, (moment, p) in enumerate(
            zip(moments, (p for p in params for _ in range(2)), strict=True)
        ):
            assert moment is not None
            if i % 2:
                moment.uniform_(0.5e-10, 1.5e-10, generator=g)
            else:
                moment.normal_(0.0, 1e-5, generator=g)
            assert moment.shape == p.shape
        return moments
    if "state" not in inspect.signature(moments_for).parameters:
        msg = f"sae_update: {state} moments are not in this build"
        raise AbsentError(msg)
    return moments_for(params, RULE, state=state)


def copies(state: list[Any]) -> list[Any]:
    """The same state, apart in memory; also of moments that are tuples of tensors."""
    from torch.utils._pytree import tree_map_only

    copied: list[Any] = tree_map_only(Tensor, torch.clone, state)
    return copied


def narrow(code: Code) -> Code:
    """The code in bfloat16."""
    parts = {name: getattr(code, name) for name in ("values", "grad_values", "grad_out")}
    return replace(code, **{name: t.bfloat16() for name, t in parts.items()})


def update(
    context: Context,
    name: str,
    state: str = "float32",
    rowsparse: bool = False,
    mixed: bool = False,
) -> list[Row]:
    """One update step by every backend that is there.

    Args:
        context: device and ceilings.
        name: of the shape.
        state: of the moments.
        rowsparse: leave rows alone that no entry touched.
        mixed: rows in bfloat16, and copies of the weights in place of a screen.
    """
    item = "sae_update" + {"float32": "", "bfloat16": " bf16"}.get(state, f" {state}")
    item += " rowsparse" * rowsparse + " mixed" * mixed
    base = {"part": 2, "item": item, "shape": name}
    shape, out = inputs.sized(context, name), []
    for backend in backends_here("sae_update"):
        b = inputs.batch(context.device, shape)
        plain = state == "float32" and not rowsparse and not mixed
        subject = update_subject(context, b, backend, state, rowsparse, mixed=mixed)
        if plain and name in ("S", "M"):
            code = code_of(b)
            subject.beside = {
                TORCH: functools.partial(torch_update, b, code),
                OPENAI: functools.partial(openai_update, b, code),
            }
        if plain and name == "M":
            subject.figures = functools.partial(dense_latent, context, b, backend)
        if mixed:  # of x and of grad_out, where the floor counts each row once
            gathered = 2 * gather_bytes(shape.n, shape.d, shape.k, 2) / 1e9
            subject.figures = lambda _, gathered=gathered: {"gathered_gb": gathered}
        out += measure(context, base, subject, repeats=4 if shape.name != "S" else REPEATS)
        del b, subject
        context.device.free()
    return out


def update_subject(
    context: Context,
    b: Batch,
    backend: str,
    state: str,
    rowsparse: bool = False,
    dense: bool = False,
    mixed: bool = False,
) -> Subject:
    """An update that goes on and on, its check on a few features, and repeats from one start."""
    code, x = code_of(b, dense=dense), b.x - b.b_dec
    if mixed:
        code, x = narrow(code), x.bfloat16()
    start: Params = b.weights
    params: Params = tuple(w.clone() for w in start)  # type: ignore[assignment]
    moments = state_for(params, state)
    kept: dict[str, Any] = {"screen": screen_weights(b.W_enc, "bf16")}
    if mixed:
        kept = {"copies": (b.W_enc.bfloat16(), b.W_dec.bfloat16())}
    rule = UpdateRule(lr=RULE.lr, rowsparse=rowsparse)
    count = STEP

    def run() -> Tensor:
        nonlocal count
        count += 1
        with use_backend(backend):
            return sae_update(code, x, params, moments, rule, count, **kept)

    def fresh() -> list[Any]:
        mine = tuple(w.clone() for w in start)
        state = copies(initial)
        with use_backend(backend):
            fired = sae_update(code, x, mine, state, rule, STEP, **kept)
        return [*mine, *state, fired, *(c.clone() for c in kept.get("copies", ()))]

    initial = copies(moments) if b.shape.name in ("", "S", "M") else moments

    def check() -> dict[str, Any]:
        if initial is moments:  # too large to keep a second copy: part 1 checked it
            return {}
        after = fresh()
        for copy, p in zip(kept.get("copies", ()), after[:3:2], strict=False):
            if not torch.equal(copy, p.bfloat16()):
                msg = "a copy is not the new weights in bfloat16"
                raise DisagreementError(msg)
        return check_update(code, x, start, initial, after, rule, exact_state=state == "float32")

    n, d, f, k = b.x.shape[0], b.shape.d, b.shape.f, b.shape.k
    need = update_need(n, d, f, k, state, rowsparse=rowsparse, mixed=mixed)
    repeat = None if initial is moments else fresh
    return Subject(run, check, need, repeat=repeat, backend=backend)


def update_stages(context: Context, name: str) -> list[Row]:
    """The kernels of one update, by time."""
    out = []
    for backend in backends_here("sae_update"):
        b = inputs.batch(context.device, inputs.sized(context, name))
        run = update_subject(context, b, backend, "float32").run
        base = {"part": 2, "item": "sae_update stages", "shape": name, "backend": backend}
        out += profile(context, base, run)
    return out


def dense_latent(context: Context, b: Batch, backend: str, row: Row) -> dict[str, Any]:
    """Time with one latent on every row, over the time without."""
    subject = update_subject(context, b, backend, "float32", dense=True)
    ms = context.device.time(subject.run).ms
    return {"dense_latent_ms": ms, "dense_latent_ratio": ms / row["ms"]}


def torch_update(b: Batch, code: Code) -> Run:
    """Dense gradients by index_add_, projection, fused Adam, renorm."""
    params = [torch.nn.Parameter(w.clone()) for w in b.weights]
    optimizer = torch.optim.Adam(params, lr=RULE.lr, fused=True)
    x = b.x - b.b_dec
    flat = code.indices.flatten().long()

    @torch.no_grad()
    def run() -> None:
        W_enc, b_enc, W_dec, b_dec = params
        for p in params:
            p.grad = torch.zeros_like(p)
        k = code.indices.shape[1]
        for first in range(0, x.shape[0], 1024):
            rows = slice(first, first + 1024)
            here = flat[first * k : (first + 1024) * k]
            enc = code.grad_values[rows, :, None] * x[rows, None]
            dec = code.values[rows, :, None] * code.grad_out[rows, None]
            W_enc.grad.index_add_(0, here, enc.flatten(0, 1), alpha=code.scale)
            W_dec.grad.index_add_(0, here, dec.flatten(0, 1), alpha=code.scale)
        b_enc.grad.index_add_(0, flat, code.grad_values.flatten(), alpha=code.scale)
        b_dec.grad = code.scale * code.grad_out.sum(0) - b_enc.grad @ W_enc
        W_dec.grad -= (W_dec.grad * W_dec).sum(1, keepdim=True) * W_dec
        optimizer.step()
        W_dec /= W_dec.norm(dim=1, keepdim=True)

    return run


def openai_update(b: Batch, code: Code) -> Run:
    """Gradients by sorted entries and float atomics, projection, fused Adam, renorm."""
    from benchmarks.peers import openai_style

    params = [torch.nn.Parameter(w.clone()) for w in b.weights]
    optimizer = torch.optim.Adam(params, lr=RULE.lr, fused=True)
    x = b.x - b.b_dec

    @torch.no_grad()
    def run() -> None:
        openai_style.gradients(params, code.indices, code.values, code.grad_values, code.grad_out,
                               x, code.scale)  # fmt: skip
        openai_style.finish(params, optimizer)

    return run


def check_update(
    code: Code,
    x: Tensor,
    before: Params,
    moments: list[Any],
    after: list[Any],
    rule: UpdateRule,
    *,
    exact_state: bool,
) -> dict[str, Any]:
    """Some features, from never to most often fired, against the formulas in float64.

    Args:
        code: the step's code.
        x: [n, d] centred.
        before: weights before the step.
        moments: before the step.
        after: weights after the step, then the rest.
        rule: the optimizer.
        exact_state: moments are float32; others are only held to a bf16's rounding of the step.
    """
    order = torch.bincount(code.indices.flatten().long(), minlength=before[0].shape[0]).argsort()
    chosen = order[sample(order.numel()).to(order.device)].unique()
    found: dict[str, Any] = {}
    answers = {}
    for dtype in (torch.float64, torch.float32):
        answers[dtype] = features(
            chosen, code, x, before, moments if exact_state else None, rule, dtype
        )
    for i, what in enumerate(("W_enc", "b_enc", "W_dec")):
        got, old = after[i][chosen], before[i][chosen]
        exact, plain = answers[torch.float64][i], answers[torch.float32][i]
        if exact_state:
            found.update(within(what, got, plain, exact, factor=4.0))
        else:  # Adam from zero moments moves by at most lr / (1 - beta1), whatever the rounding
            moved, most = float((got - old).abs().max()), 4 * rule.lr / (1 - rule.beta1) + 2e-6
            if not moved <= most:
                msg = f"{what}: a step from zero moments moved by {moved:.3e}, at most {most:.3e}"
                raise DisagreementError(msg)
            found[f"{what}_moved"] = moved
    return {**found, "features": chosen.numel()}


def features(
    chosen: Tensor,
    code: Code,
    x: Tensor,
    before: Params,
    moments: list[Any] | None,
    rule: UpdateRule,
    dtype: torch.dtype,
) -> list[Tensor]:
    """W_enc, b_enc, W_dec of a few features after one Adam step, by the formulas."""
    zero = torch.zeros((), dtype=dtype, device=x.device)
    out: list[list[Tensor]] = [[], [], []]
    for g in chosen.tolist():
        at = (code.indices == g).nonzero()
        row, slot = at[:, 0], at[:, 1]
        value, grad = code.values[row, slot].to(dtype), code.grad_values[row, slot].to(dtype)
        dW_enc = code.scale * (grad[:, None] * x[row].to(dtype)).sum(0)
        dW_dec = code.scale * (value[:, None] * code.grad_out[row].to(dtype)).sum(0)
        db = code.scale * grad.sum()
        W = before[2][g].to(dtype)
        dW_dec = dW_dec - (dW_dec @ W) / (W @ W) * W
        still = rule.rowsparse and not bool((value != 0).any())
        for i, gradient in enumerate((dW_enc, db, dW_dec)):
            p = before[i][g].to(dtype)
            m, v = (
                (zero, zero)
                if moments is None
                else (moments[2 * i + j][g].to(dtype) for j in (0, 1))
            )
            m = m + (1 - rule.beta1) * (gradient - m)
            v = rule.beta2 * v + (1 - rule.beta2) * gradient * gradient
            root = v.sqrt() / (1 - rule.beta2**STEP) ** 0.5 + rule.eps
            p = p - rule.lr / (1 - rule.beta1**STEP) * m / root
            moved = p / p.norm() if i == 2 else p
            out[i].append(before[i][g].to(dtype) if still else moved)
    return [torch.stack(parts) for parts in out]


def items() -> list[Item]:
    """Updates in part 2."""
    named = {"float32": "", "bfloat16": " bf16", "int8": " int8"}
    out = [
        Item(2, "sae_update", "M", lambda c: update(c, "M"), 30, gib=16),
        Item(2, "sae_update", "S", lambda c: update(c, "S"), 12, gib=4),
        Item(2, "sae_update mixed", "M", lambda c: update(c, "M", mixed=True), 14, gib=14),
        Item(2, "sae_update", "L", lambda c: update(c, "L"), 25, gib=30),
        Item(2, "sae_update rowsparse", "M", lambda c: update(c, "M", rowsparse=True), 10, gib=12),
    ]
    for state in STATES:
        if state != "float32":
            go = functools.partial(update, name="M", state=state)
            out.append(Item(2, "sae_update" + named[state], "M", go, 12, gib=12))
    stages = functools.partial(update_stages, name="M")
    out.append(Item(2, "sae_update stages", "M", stages, 10, gib=16, compiles=False))
    return out


def huge() -> list[Item]:
    """What only a large card holds: a million features with 8-bit moments."""
    go = functools.partial(update, name="XL", state="int8")
    return [Item(2, "sae_update int8", "XL", go, 40, gib=125, compiles=False)]
