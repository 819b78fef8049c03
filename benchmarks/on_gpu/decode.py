"""sparse_decode and sae_loss beside dense products and gathers by plain torch."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from benchmarks.agreement import within
from benchmarks.floors import decode_need
from benchmarks.on_gpu import inputs
from benchmarks.on_gpu.device import Run
from benchmarks.on_gpu.goals import OPENAI, TORCH
from benchmarks.on_gpu.inputs import sample
from benchmarks.on_gpu.item import (
    REPEATS,
    Context,
    Item,
    Row,
    Subject,
    backends_here,
    measure,
    under,
)
from microtome.ops import sae_loss, sparse_decode


def decoded(values: Tensor, indices: Tensor, W_dec: Tensor, b_dec: Tensor) -> Tensor:
    """The reconstruction of a few rows in float64, [r, d]."""
    active = W_dec[indices.long()].double()
    return torch.einsum("rk,rkd->rd", values.double(), active) + b_dec.double()


def gather(values: Tensor, indices: Tensor, W_dec: Tensor, b_dec: Tensor) -> Tensor:
    """Plain torch's sparse decode."""
    return embedding_bag(indices, W_dec, per_sample_weights=values, mode="sum") + b_dec


def dense(values: Tensor, indices: Tensor, W_dec: Tensor, b_dec: Tensor) -> Run:
    """Plain torch's dense decode: scatter into [n, f], then a product in bf16."""
    wide, W, b = indices.long(), W_dec.bfloat16(), b_dec.bfloat16()
    codes = torch.zeros(values.shape[0], W.shape[0], dtype=W.dtype, device=W.device)
    short = values.bfloat16()
    return lambda: codes.zero_().scatter_(1, wide, short) @ W + b


def by_autograd(
    x: Tensor, values: Tensor, indices: Tensor, W_dec: Tensor, b_dec: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Squared error, its gradient and that of the values by plain torch."""
    active = values.detach().clone().requires_grad_()
    error = gather(active, indices, W_dec, b_dec) - x
    error.pow(2).sum().backward()
    assert active.grad is not None
    return error.detach().pow(2).sum(1), 2 * error.detach(), active.grad.masked_fill(values == 0, 0)


def loss(context: Context, name: str, dtype: torch.dtype) -> list[Row]:
    """sae_loss by every backend that is there."""
    shape = inputs.sized(context, name)
    width = dtype.itemsize
    item = "sae_loss bf16" if dtype == torch.bfloat16 else "sae_loss"
    out = []
    for backend in backends_here("sae_loss"):
        b = inputs.batch(context.device, shape)
        values, indices = inputs.code(b)
        args = (b.x.to(dtype), values.to(dtype), indices, b.W_dec.to(dtype), b.b_dec.to(dtype))
        run = under(backend, functools.partial(sae_loss, *args))
        need = decode_need(
            shape.n, shape.d, shape.f, shape.k, width, context.device.cache_bytes, loss=True
        )
        subject = Subject(run, functools.partial(check_loss, run, *args), need, backend=backend)
        if dtype == torch.float32:
            subject.beside = {
                TORCH: lambda args=args: functools.partial(by_autograd, *args),
                OPENAI: lambda args=args: openai_loss(*args),
            }
        out += measure(context, {"part": 2, "item": item, "shape": name}, subject, repeats=REPEATS)
    return out


def openai_loss(x: Tensor, values: Tensor, indices: Tensor, W_dec: Tensor, b_dec: Tensor) -> Run:
    """Decode, error, and the gradient of the values by the kernels beside us."""
    from benchmarks.peers import openai_style

    def run() -> tuple[Tensor, Tensor]:
        error = openai_style.decode(values, indices, W_dec) + b_dec - x
        return error, openai_style.grad_values(error, indices, W_dec)

    return run


def check_loss(
    run: Run, x: Tensor, values: Tensor, indices: Tensor, W_dec: Tensor, b_dec: Tensor
) -> dict[str, Any]:
    """A few rows of all three outputs."""
    sse, grad_out, grad_values = run()  # type: ignore[misc]
    rows = sample(x.shape[0]).to(x.device)
    args = (x[rows], values[rows], indices[rows], W_dec, b_dec)
    plain = by_autograd(args[0], args[1], args[2].int(), W_dec, b_dec)
    e = decoded(*args[1:]) - args[0].double()
    active = W_dec[indices[rows].long()].double()
    grad = torch.einsum("rd,rkd->rk", 2 * e, active).masked_fill(values[rows] == 0, 0)
    exact = (e.pow(2).sum(1), 2 * e, grad)
    found: dict[str, Any] = {}
    names = ("sse", "grad_out", "grad_values")
    got = (sse[rows], grad_out[rows], grad_values[rows])
    for what, g, p, x64 in zip(names, got, plain, exact, strict=True):
        found.update(within(what, g, p, x64))
    return found


def decode(context: Context, name: str) -> list[Row]:
    """sparse_decode in float32 by every backend that is there."""
    shape = inputs.sized(context, name)
    out = []
    for backend in backends_here("sparse_decode"):
        b = inputs.batch(context.device, shape)
        values, indices = inputs.code(b)
        args = (values, indices, b.W_dec, b.b_dec)
        run = under(backend, functools.partial(sparse_decode, *args))
        subject = Subject(
            run,
            functools.partial(check_decode, run, *args),
            decode_need(
                shape.n, shape.d, shape.f, shape.k, 4, context.device.cache_bytes, loss=False
            ),
            {
                TORCH: lambda args=args: functools.partial(gather, *args),
                "torch dense bf16": lambda args=args: dense(*args),
                OPENAI: lambda args=args: openai_decode(*args),
            },
            backend=backend,
        )
        base = {"part": 2, "item": "sparse_decode", "shape": name}
        out += measure(context, base, subject, repeats=REPEATS)
    return out


def openai_decode(values: Tensor, indices: Tensor, W_dec: Tensor, b_dec: Tensor) -> Run:
    """The decode kernel beside us."""
    from benchmarks.peers import openai_style

    return lambda: openai_style.decode(values, indices, W_dec) + b_dec


def check_decode(
    run: Run, values: Tensor, indices: Tensor, W_dec: Tensor, b_dec: Tensor
) -> dict[str, Any]:
    """A few rows of the reconstruction."""
    out = run()
    assert isinstance(out, Tensor)
    rows = sample(out.shape[0]).to(out.device)
    args = (values[rows], indices[rows], W_dec, b_dec)
    return within("out", out[rows], gather(args[0], args[1].int(), W_dec, b_dec), decoded(*args))


def items() -> list[Item]:
    """Decoding in part 2."""
    bf16, fp32 = torch.bfloat16, torch.float32
    return [
        Item(2, "sae_loss bf16", "M", lambda c: loss(c, "M", bf16), 10, gib=6),
        Item(2, "sae_loss", "M", lambda c: loss(c, "M", fp32), 12, gib=8),
        Item(2, "sae_loss", "S", lambda c: loss(c, "S", fp32), 8, gib=3),
        Item(2, "sae_loss bf16", "L", lambda c: loss(c, "L", bf16), 20, gib=20),
        Item(2, "sparse_decode", "M", lambda c: decode(c, "M"), 10, gib=8),
    ]
