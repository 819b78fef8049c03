"""Ops on codes and activations that came after the first set; each may be absent from a build."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

import microtome.ops as ops
from benchmarks.agreement import DisagreementError, within
from benchmarks.floors import Need, encode_need
from benchmarks.on_gpu import inputs
from benchmarks.on_gpu.against import against_reference
from benchmarks.on_gpu.device import Run
from benchmarks.on_gpu.encode import bare_product, check_rows, preactivations
from benchmarks.on_gpu.goals import CUBLAS, TORCH
from benchmarks.on_gpu.inputs import Batch
from benchmarks.on_gpu.item import (
    REPEATS,
    AbsentError,
    Context,
    Item,
    Row,
    Subject,
    backends_here,
    measure,
    under,
)

CLAMPED = 8  # features


def public(name: str) -> Any:
    """The op's public function; raises AbsentError where this build has none."""
    found = getattr(ops, name, None)
    if found is None:
        msg = f"{name}: not in this build"
        raise AbsentError(msg)
    return found


def csr_rows(
    b: Batch, values: Tensor, indices: Tensor, offsets: Tensor, rows: Tensor
) -> tuple[list[Tensor], list[Tensor]]:
    """Values and indices of a few CSR rows."""
    spans = [(int(offsets[r]), int(offsets[r + 1])) for r in rows]
    return [values[a:z] for a, z in spans], [indices[a:z] for a, z in spans]


def batch_topk(context: Context, name: str) -> list[Row]:
    """batch_topk_encode beside the product, and dictionary_learning's way of flattening it all."""
    call, shape, out = public("batch_topk_encode"), inputs.sized(context, name), []
    for backend in backends_here("batch_topk_encode"):
        b = inputs.batch(context.device, shape)
        screen = ops.screen_weights(b.W_enc, "bf16")
        run = under(
            backend,
            functools.partial(call, b.x, b.W_enc, b.b_enc, b.b_dec, k=shape.k, screen=screen),
        )
        subject = Subject(
            run,
            functools.partial(check_batch, b, run),
            encode_need(shape.n, shape.d, shape.f, shape.k),
            {
                CUBLAS: functools.partial(bare_product, b),
                TORCH: functools.partial(flat_topk, b),
            },
            backend=backend,
        )
        base = {"part": 2, "item": "batch_topk_encode", "shape": name}
        out += measure(context, base, subject, repeats=5)
    return out


def flat_topk(b: Batch) -> Run:
    """Dense ReLU pre-activations in bf16, flattened, torch.topk of n k, scattered back."""
    x, W, bias = (b.x - b.b_dec).bfloat16(), b.W_enc.bfloat16(), b.b_enc.bfloat16()
    count = b.x.shape[0] * b.shape.k

    def run() -> Tensor:
        flat = linear(x, W, bias).relu_().flatten()
        top = flat.topk(count, sorted=False)
        return torch.zeros_like(flat).scatter_(0, top.indices, top.values)

    return run


def check_batch(b: Batch, run: Run) -> dict[str, Any]:
    """As many entries as there must be, and a few rows against the border that the batch has."""
    values, indices, offsets, _ = run()  # type: ignore[misc]
    n, k = b.x.shape[0], b.shape.k
    if values.numel() != n * k or int(offsets[-1]) != n * k:
        msg = f"{values.numel()} entries and offsets up to {int(offsets[-1])}, expected {n * k}"
        raise DisagreementError(msg)
    rows = inputs.sample(n).to(b.x.device)
    least = values.min().double().expand(len(rows))
    return check_rows(b, rows, *csr_rows(b, values, indices, offsets, rows), least)


def threshold(context: Context, name: str, *, start: bool = False) -> list[Row]:
    """threshold_encode: a JumpReLU whose thresholds leave about k features a row; or, at the start
    of training, a ReLU that leaves half of all, so that every list overflows."""
    call, shape, out = public("threshold_encode"), inputs.sized(context, name), []
    for backend in backends_here("threshold_encode"):
        b = inputs.batch(context.device, shape)
        rows = inputs.sample(b.x.shape[0], 64).to(b.x.device)
        border = linear(b.x[rows] - b.b_dec, b.W_enc, b.b_enc).topk(shape.k).values[:, -1].median()
        spread = torch.linspace(0.9, 1.1, shape.f, device=b.x.device)
        theta = (border * spread).clamp_min(0.0) * (0.0 if start else 1.0)
        screen = ops.screen_weights(b.W_enc, "bf16")
        run = under(
            backend,
            functools.partial(
                call, b.x, b.W_enc, b.b_enc, b.b_dec,
                threshold=theta, bandwidth=0.001, screen=screen,
            ),
        )  # fmt: skip
        subject = Subject(
            run,
            functools.partial(check_threshold, b, theta, run),
            encode_need(shape.n, shape.d, shape.f, shape.f // 2 if start else shape.k),
            {CUBLAS: functools.partial(bare_product, b), TORCH: lambda b=b, t=theta: jump(b, t)},
            backend=backend,
        )
        item = "threshold_encode at the start" if start else "threshold_encode"
        base = {"part": 2, "item": item, "shape": name}
        out += measure(context, base, subject, repeats=5)
    return out


def jump(b: Batch, theta: Tensor) -> Run:
    """Dense JumpReLU in bf16."""
    x, W, bias = (b.x - b.b_dec).bfloat16(), b.W_enc.bfloat16(), b.b_enc.bfloat16()
    t = theta.bfloat16()

    def run() -> Tensor:
        z = linear(x, W, bias)
        return z * (z > t)

    return run


def check_threshold(b: Batch, theta: Tensor, run: Run) -> dict[str, Any]:
    """A few rows: every feature above its threshold and no other, up to float32 rounding."""
    (values, indices, offsets), _, _ = run()  # type: ignore[misc]
    rows = inputs.sample(b.x.shape[0]).to(b.x.device)
    plain, exact = preactivations(b, rows)
    border = 2 * float((plain.double() - exact).abs().max())
    part = csr_rows(b, values, indices, offsets, rows)
    for i, (_, at) in enumerate(zip(*part, strict=True)):
        chosen = torch.zeros(b.shape.f, dtype=torch.bool, device=theta.device)
        chosen[at.long()] = True
        over = exact[i] - theta.double()
        if bool((over[chosen] < -border).any()) or bool((over[~chosen] > border).any()):
            msg = f"row {int(rows[i])}: the features are not those above their thresholds"
            raise DisagreementError(msg)
    return check_values(rows, plain, exact, *part)


def check_values(
    rows: Tensor, plain: Tensor, exact: Tensor, values: list[Tensor], indices: list[Tensor]
) -> dict[str, Any]:
    """The values of a few rows by the rule."""
    found: dict[str, Any] = {"entries": sum(len(v) for v in values)}
    for i in range(len(rows)):
        at = indices[i].long()
        found.update(within("values", values[i], plain[i, at], exact[i, at]))
    return found


def clamp(context: Context, name: str) -> list[Row]:
    """feature_clamp of a few features beside a copy and a whole SAE in a hook."""
    call, shape, out = public("feature_clamp"), inputs.sized(context, name), []
    for backend in backends_here("feature_clamp"):
        b = inputs.batch(context.device, shape)
        features = torch.arange(min(CLAMPED, shape.f), device=b.x.device)
        targets = torch.linspace(1.0, 4.0, len(features), device=b.x.device)
        args = (b.x, features, targets, b.W_enc, b.b_enc, b.b_dec, b.W_dec)
        subject = Subject(
            under(backend, functools.partial(call, *args)),
            functools.partial(against_reference, backend, call, args),
            Need(hbm=8 * shape.n * shape.d),
            {
                "copy": lambda b=b: b.x.clone,
                TORCH: lambda b=b, a=args: functools.partial(whole_sae, b, *a[1:3]),
            },
            backend=backend,
        )
        base = {"part": 2, "item": "feature_clamp", "shape": name}
        out += measure(context, base, subject, repeats=REPEATS)
    return out


def whole_sae(b: Batch, features: Tensor, targets: Tensor) -> Tensor:
    """Encode all, set some, decode both, keep the error: what a hook on an SAE does, in bf16."""
    W_enc, W_dec = b.W_enc.bfloat16(), b.W_dec.bfloat16()
    z = linear((b.x - b.b_dec).bfloat16(), W_enc, b.b_enc.bfloat16()).relu_()
    error = b.x - (z @ W_dec).float()
    z[:, features] = targets.bfloat16()
    return (z @ W_dec).float() + error


def solu(context: Context, name: str) -> list[Row]:
    """solu forward beside torch's two ops."""
    call, shape, out = public("solu"), inputs.sized(context, name), []
    for backend in backends_here("solu"):
        g = torch.Generator(context.device.torch).manual_seed(3)
        x = 3 * torch.randn(shape.n, 4 * shape.d, generator=g, device=context.device.torch)
        subject = Subject(
            under(backend, functools.partial(call, x)),
            functools.partial(against_reference, backend, call, (x,)),
            Need(hbm=8 * x.numel()),
            {TORCH: lambda x=x: lambda: x * torch.softmax(x, -1)},
            backend=backend,
        )
        base = {"part": 2, "item": "solu", "shape": name}
        out += measure(context, base, subject, repeats=REPEATS)
    return out


def items() -> list[Item]:
    """These ops in part 2."""
    return [
        Item(2, "batch_topk_encode", "M", lambda c: batch_topk(c, "M"), 20, gib=10),
        Item(2, "threshold_encode", "M", lambda c: threshold(c, "M"), 15, gib=8),
        Item(
            2,
            "threshold_encode at the start",
            "S",
            lambda c: threshold(c, "S", start=True),
            15,
            gib=8,
        ),
        Item(2, "feature_clamp", "M", lambda c: clamp(c, "M"), 10, gib=8),
        Item(2, "solu", "M", lambda c: solu(c, "M"), 6, gib=3),
    ]
