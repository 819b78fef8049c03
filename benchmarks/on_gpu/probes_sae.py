"""Probes of the ops of sparse autoencoders."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from benchmarks.agreement import DisagreementError, within
from benchmarks.on_gpu import inputs
from benchmarks.on_gpu.against import against_reference
from benchmarks.on_gpu.codes import check_threshold, csr_rows, public
from benchmarks.on_gpu.device import Device
from benchmarks.on_gpu.encode import check_rows, check_topk, preactivations
from benchmarks.on_gpu.inputs import Batch, Shape
from benchmarks.on_gpu.probes import Call, Probe, floats, problem, raises_for_nan
from benchmarks.on_gpu.update import RULE, STEP, check_update, code_of, narrow
from microtome.ops import (
    moments_for,
    sae_loss,
    sae_update,
    screen_weights,
    sparse_decode,
    topk_encode,
    use_backend,
)


def encode(
    kind: str, shape: Shape, device: Device, dtype: torch.dtype = torch.float32,
    precision: str = "exact",
) -> Call | None:  # fmt: skip
    """topk_encode; an error of fp8's screen that leaves a feature out would be found, too."""
    b = problem(kind, shape, device)
    tensors = tuple(t.to(dtype) for t in (b.x, b.W_enc, b.b_enc, b.b_dec))
    call = functools.partial(topk_encode, k=shape.k, precision=precision)
    if kind == "nan":
        return Call(call, tensors, raises_for_nan(call, tensors, shape.n // 2))
    if dtype != torch.float32:
        return Call(call, tensors, functools.partial(values_only, call, tensors))
    judge = functools.partial(top_judge, b, call, tensors, exact=kind == "ties")
    return Call(call, tensors, judge)


def top_judge(
    b: Batch, call: Any, tensors: tuple[Tensor, ...], backend: str, *, exact: bool
) -> dict[str, Any]:
    """Values and order by float64; where every product is an integer, the very indices."""
    with use_backend(backend):
        values, indices, candidates = call(*tensors)
    found = check_topk(b, values, indices)
    if exact:
        with use_backend("reference"):
            wanted = call(*tensors)
        found.update(within("values", values, wanted[0], wanted[0].double()))
        if not torch.equal(indices, wanted[1]):
            msg = f"ties: {int((indices != wanted[1]).sum())} indices are not the lower ones"
            raise DisagreementError(msg)
    return {**found, "candidates_mean": float(candidates.float().mean())}


def values_only(call: Any, tensors: tuple[Tensor, ...], backend: str) -> dict[str, Any]:
    """16-bit outputs: values by the rule; which of two equal values comes first is not judged."""
    with use_backend(backend):
        values, _, _ = call(*tensors)
    with use_backend("reference"):
        plain, _, _ = call(*tensors)
        exact, _, _ = call(*(t.double() for t in tensors))
    return within("values", values, plain, exact)


def encode_gradients(kind: str, shape: Shape, device: Device) -> Call | None:
    """Gradients of topk_encode in x, W_enc, b_enc, b_dec."""
    if kind not in ("random", "dense"):
        return None
    b = problem(kind, shape, device)
    seed = torch.linspace(0.5, 1.5, shape.n * shape.k, device=b.x.device).view(shape.n, shape.k)
    # Where the k-th and the next are closer than float32 rounds, another feature may be the k-th.
    z = linear(b.x.double() - b.b_dec.double(), b.W_enc.double(), b.b_enc.double())
    best = z.topk(shape.k + 1).values
    seed *= best[:, -2:-1] - best[:, -1:] > 1e-5 * z.abs().amax(1, keepdim=True)

    def call(*tensors: Tensor) -> list[Tensor]:
        leaves = floats(*tensors)
        values, indices, _ = topk_encode(*leaves, k=shape.k)
        # Sorted by feature: two values that nearly tie may come in either order.
        values = values.gather(1, indices.long().argsort(1))
        return list(torch.autograd.grad((values * seed.to(values.dtype)).sum(), leaves))

    return Call(call, (b.x, b.W_enc, b.b_enc, b.b_dec))


def coded(kind: str, shape: Shape, device: Device) -> tuple[Batch, Tensor, Tensor] | None:
    """A batch with a code; NaN in a value, or a latent on every row."""
    if kind == "ties":
        return None
    b = problem("dense" if kind == "dense" else "random", shape, device)
    values, indices = inputs.code(b, dense=kind == "dense")
    if kind == "nan":
        values[shape.n // 2, 0] = float("nan")
    return b, values, indices


def decode(
    kind: str, shape: Shape, device: Device, dtype: torch.dtype = torch.float32
) -> Call | None:
    """sparse_decode."""
    made = coded(kind, shape, device)
    if made is None:
        return None
    b, values, indices = made
    return Call(sparse_decode, (values.to(dtype), indices, b.W_dec.to(dtype), b.b_dec.to(dtype)))


def decode_gradients(kind: str, shape: Shape, device: Device) -> Call | None:
    """Gradients of sparse_decode in values, W_dec, b_dec."""
    made = coded(kind, shape, device)
    if made is None or kind == "nan":
        return None
    b, values, indices = made

    def call(values: Tensor, W_dec: Tensor, b_dec: Tensor, seed: Tensor) -> list[Tensor]:
        leaves = floats(values, W_dec, b_dec)
        out = sparse_decode(leaves[0], indices, *leaves[1:])
        return list(torch.autograd.grad((out * seed).sum(), leaves))

    return Call(call, (values, b.W_dec, b.b_dec, b.x))


def csr(kind: str, shape: Shape, device: Device) -> Call | None:
    """sparse_decode of rows of any length, some empty, and its gradients."""
    made = coded(kind, shape, device)
    if made is None or kind == "nan":
        return None
    b, values, indices = made
    keep = values > values.median()
    keep[::3] = False
    offsets = pad(keep.sum(1).cumsum(0), (1, 0))
    entries = indices[keep]

    def call(values: Tensor, W_dec: Tensor, b_dec: Tensor, seed: Tensor) -> list[Tensor]:
        leaves = floats(values, W_dec, b_dec)
        out = sparse_decode(leaves[0], entries, *leaves[1:], offsets)
        return [out.detach(), *torch.autograd.grad((out * seed).sum(), leaves)]

    return Call(call, (values[keep], b.W_dec, b.b_dec, b.x))


def screen(kind: str, shape: Shape, device: Device) -> Call | None:
    """screen_weights in 8 bits: the codes of the reference, and norms that differ by a unit."""
    if kind not in ("random", "ties"):
        return None
    W = problem(kind, shape, device).W_enc

    def judge(backend: str) -> dict[str, Any]:
        with use_backend(backend):
            _, codes, stats = screen_weights(W, "fp8")
        with use_backend("reference"):
            _, wanted, plain = screen_weights(W, "fp8")
        if not torch.equal(codes, wanted):
            msg = f"{int((codes != wanted).sum())} of {codes.numel()} codes are off"
            raise DisagreementError(msg)
        return within("stats", stats, plain, plain.double())

    return Call(functools.partial(screen_weights, W, "fp8"), (), judge)


def loss(
    kind: str, shape: Shape, device: Device, dtype: torch.dtype = torch.float32
) -> Call | None:
    """sae_loss."""
    made = coded(kind, shape, device)
    if made is None:
        return None
    b, values, indices = made
    args = (b.x.to(dtype), values.to(dtype), indices, b.W_dec.to(dtype), b.b_dec.to(dtype))
    return Call(sae_loss, args)


def update(kind: str, shape: Shape, device: Device, *, mixed: bool = False) -> Call | None:
    """sae_update: one Adam step on clones; `mixed`: rows in bfloat16, copies of the weights."""
    if kind in ("ties", "nan"):
        return None
    b = problem(kind, shape, device)
    code, x = code_of(b, dense=kind == "dense"), b.x - b.b_dec
    if mixed:
        code, x = narrow(code), x.bfloat16()
    moments = moments_for(b.weights, RULE)

    def call() -> list[Tensor]:
        params: Any = tuple(w.clone() for w in b.weights)
        kept = [m.clone() if isinstance(m, Tensor) else m for m in moments]
        copies = (params[0].bfloat16(), params[2].bfloat16()) if mixed else None
        fired = sae_update(code, x, params, kept, RULE, STEP, copies=copies)
        held = [m for m in kept if isinstance(m, Tensor)]
        return [*params, *held, fired, *(copies or ())]

    def judge(backend: str) -> dict[str, Any]:
        with use_backend(backend):
            after = call()
        return check_update(code, x, b.weights, moments, after, RULE, exact_state=True)

    return Call(call, (), judge)


def batch_topk(kind: str, shape: Shape, device: Device) -> Call | None:
    """batch_topk_encode."""
    call = functools.partial(public("batch_topk_encode"), k=shape.k)
    b = problem(kind, shape, device)
    tensors = (b.x, b.W_enc, b.b_enc, b.b_dec)
    if kind == "nan":
        return Call(call, tensors, raises_for_nan(call, tensors, shape.n // 2))

    def judge(backend: str) -> dict[str, Any]:
        with use_backend(backend):
            values, indices, offsets, _ = call(*tensors)
        if kind == "ties":
            return against_reference(backend, lambda *a: call(*a)[:3], tensors)
        rows = inputs.sample(shape.n, 32).to(b.x.device)
        least = values.min().double().expand(len(rows))
        return check_rows(b, rows, *csr_rows(b, values, indices, offsets, rows), least)

    return Call(call, tensors, judge)


def threshold(kind: str, shape: Shape, device: Device) -> Call | None:
    """threshold_encode with a threshold a feature and a window."""
    b = problem(kind, shape, device)
    z = preactivations(b, torch.arange(min(shape.n, 8), device=b.x.device))[0]
    border = z.nan_to_num(0.0).topk(shape.k).values[:, -1].median().clamp_min(0.0)
    # Half a unit off the integers of "ties", where nothing may lie on the border by rounding.
    theta = border.floor().add(0.5).expand(shape.f).contiguous() if kind == "ties" else None
    theta = torch.full_like(b.b_enc, float(border)) if theta is None else theta
    encode_above = public("threshold_encode")

    def call(x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor, above: Tensor) -> Any:
        return encode_above(x, W_enc, b_enc, b_dec, threshold=above, bandwidth=0.01)

    tensors = (b.x, b.W_enc, b.b_enc, b.b_dec, theta)
    if kind == "nan":
        return Call(call, tensors, raises_for_nan(call, tensors, shape.n // 2))
    if kind == "ties":
        return Call(lambda *a: call(*a)[0], tensors)

    def judge(backend: str) -> dict[str, Any]:
        with use_backend(backend):
            return check_threshold(b, theta, lambda: call(*tensors))

    return Call(call, tensors, judge)


def clamp(kind: str, shape: Shape, device: Device) -> Call | None:
    """feature_clamp."""
    call = public("feature_clamp")
    if kind == "ties":
        return None
    b = problem(kind, shape, device)
    features = torch.arange(3, device=b.x.device)
    targets = torch.tensor([0.0, 2.0, 5.0], device=b.x.device)
    return Call(call, (b.x, features, targets, b.W_enc, b.b_enc, b.b_dec, b.W_dec))


def solu(kind: str, shape: Shape, device: Device) -> Call | None:
    """solu, and its gradient."""
    call = public("solu")
    if kind == "dense":
        return None
    x = problem(kind, shape, device).x

    def both(x: Tensor) -> list[Tensor]:
        (leaf,) = floats(x)
        out = call(leaf)
        return [out.detach(), *torch.autograd.grad(out.pow(2).sum(), leaf)]

    return Call(both if kind != "nan" else call, (x,))


def probes() -> list[Probe]:
    """All of them."""
    bf16 = {"dtype": torch.bfloat16}
    at = functools.partial
    return [
        Probe("topk_encode", "topk_encode", encode),
        Probe("topk_encode bf16", "topk_encode", at(encode, **bf16)),
        Probe("topk_encode fp8", "topk_encode_fp8", at(encode, precision="fp8")),
        Probe("topk_encode gradients", "topk_encode", encode_gradients),
        Probe("sparse_decode", "sparse_decode", decode),
        Probe("sparse_decode bf16", "sparse_decode", at(decode, **bf16)),
        Probe("sparse_decode gradients", "sparse_decode", decode_gradients),
        Probe("sparse_decode csr", "sparse_decode_csr", csr),
        Probe("screen_weights fp8", "screen_weights", screen),
        Probe("sae_loss", "sae_loss", loss),
        Probe("sae_loss bf16", "sae_loss", at(loss, **bf16)),
        Probe("sae_update", "sae_update", update),
        Probe("sae_update mixed", "sae_update", at(update, mixed=True)),
        Probe("batch_topk_encode", "batch_topk_encode", batch_topk),
        Probe("threshold_encode", "threshold_encode", threshold),
        Probe("feature_clamp", "feature_clamp", clamp),
        Probe("solu", "solu", solu),
    ]
