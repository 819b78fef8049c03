"""The ops of patched runs on a card: expand and patch, deltas, ragged attention, attribution."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.floors import Need
from benchmarks.on_gpu.against import against_reference
from benchmarks.on_gpu.device import Run
from benchmarks.on_gpu.goals import TORCH
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
from microtome.ops import (
    REPLACE,
    attribution_scores,
    cascade_attention,
    delta_linear,
    pack_weights,
    patch_rows,
)


def drawer(context: Context, seed: int) -> Any:
    """A function that draws normal tensors on the device."""
    g = torch.Generator(context.device.torch).manual_seed(seed)
    return lambda *size: torch.randn(*size, generator=g, device=context.device.torch)


def small(context: Context, full: int, dry: int) -> int:
    """A size: `dry` of it in a dry run, a quarter where only compiling."""
    if context.device.dry:
        return dry
    return max(full // 4, 1) if context.warm else full


def each(context: Context, op: str, base: Row, build: Any, *, repeats: int = REPEATS) -> list[Row]:
    """Measure `build(backend)` for every backend of an op."""
    out = []
    for backend in backends_here(op):
        out += measure(context, base, build(backend), repeats=repeats)
        context.device.free()
    return out


def patched(context: Context, width: int) -> list[Row]:
    """patch_rows: runs of one prompt, each with one position's row replaced."""
    draw = drawer(context, 11)
    t, w = small(context, 64, 4), 16 if context.device.dry else width
    n = small(context, 1024, 3)
    base_run, sources = draw(1, t, w), draw(t, w)
    place = context.device.torch
    rows = torch.zeros(n, 3, dtype=torch.int32, device=place)
    rows[:, 2] = t
    table = torch.zeros(n, 6, dtype=torch.int32, device=place)
    table[:, 0] = torch.arange(n, device=place)
    table[:, 1] = table[:, 4] = torch.arange(n, device=place) % t
    table[:, 3], table[:, 5] = w, REPLACE
    args = (base_run, sources, rows, table, torch.ones(n, device=place), n * t)

    def torch_way() -> Run:
        at = table[:, 1].long()
        each_run = torch.arange(n, device=place)

        def run() -> Tensor:
            out = base_run.expand(n, -1, -1).clone()
            out[each_run, at] = sources[at]
            return out

        return run

    def build(backend: str) -> Subject:
        run = under(backend, functools.partial(patch_rows, *args))
        check = functools.partial(against_reference, backend, patch_rows, args)
        need = Need(hbm=4 * (n * t + t) * w)
        return Subject(run, check, need, {TORCH: torch_way}, backend=backend)

    return each(
        context, "patch_rows", {"part": 2, "item": "patch_rows", "shape": str(width)}, build
    )


def delta(context: Context, width: int) -> list[Row]:
    """delta_linear: rows of patched runs through one layer of `width` inputs and outputs."""
    draw = drawer(context, 12)
    T, r, w = small(context, 16384, 5), small(context, 64, 2), 16 if context.device.dry else width
    x_base, W = draw(r, w), draw(w, w) / w**0.5
    index = torch.arange(T, device=W.device) % r
    x = x_base[index] + 0.1 * draw(T, w)
    args = (x, x_base, x_base @ W.T, index, pack_weights(W, "bf16"), w)

    def bf16() -> Run:
        a, b = x.bfloat16(), W.bfloat16()
        return lambda: a @ b.T

    def build(backend: str) -> Subject:
        run = under(backend, functools.partial(delta_linear, *args))
        check = functools.partial(against_reference, backend, delta_linear, args)
        need = Need(hbm=4 * 2 * T * w + 2 * w * w, bf16=2 * T * w * w)
        beside = {"bf16 product": bf16, "fp32 product": lambda: lambda: x @ W.T}
        return Subject(run, check, need, beside, backend=backend)

    base = {"part": 2, "item": "delta_linear", "shape": str(width)}
    return each(context, "delta_linear", base, build)


def cascade_args(context: Context) -> tuple[Any, ...]:
    """Suffixes of one prompt that begin at every position, as a sweep over positions has them."""
    draw = drawer(context, 13)
    h, dh, t = small(context, 12, 1), 16 if context.device.dry else 64, small(context, 64, 4)
    copies = small(context, 8, 1)
    place, table, at = context.device.torch, [], 0
    for _ in range(copies):
        for start in range(t):
            table.append((0, start, at, t - start, at, t - start))
            at += t - start
    positions = torch.cat([torch.arange(start, t) for start in range(t)] * copies)
    q, k, v = draw(at, h, dh), draw(at, h, dh), draw(at, h, dh)
    rows = torch.tensor(table, dtype=torch.int32, device=place)
    first = torch.zeros(1, dtype=torch.int32, device=place)
    where = positions.to(torch.int32).to(place)
    return (q, k, v, draw(1, t, h, dh), draw(1, t, h, dh), rows, where, first, dh**-0.5)


def cascade(context: Context) -> list[Row]:
    """cascade_attention beside flash attention over whole runs, prefix copied into each."""
    args = cascade_args(context)
    q, k_base, rows = args[0], args[3], args[5]
    t, h, dh = k_base.shape[1], q.shape[1], q.shape[2]
    n = len(rows)
    pairs = int((args[6].long() + 1).sum())

    def whole() -> Run:
        # Not from the device's own generator, which a capture that failed may leave unusable.
        draw = drawer(context, 15)
        full = [draw(n, h, t, dh) for _ in range(3)]
        return lambda: scaled_dot_product_attention(*full, is_causal=True)

    def build(backend: str) -> Subject:
        run = under(backend, functools.partial(cascade_attention, *args))
        check = functools.partial(against_reference, backend, cascade_attention, args)
        need = Need(hbm=4 * 4 * q.numel(), fp32=4 * dh * h * pairs)
        return Subject(run, check, need, {"torch, whole runs": whole}, backend=backend)

    base = {"part": 2, "item": "cascade_attention", "shape": "64"}
    return each(context, "cascade_attention", base, build)


def attribution(context: Context) -> list[Row]:
    """attribution_scores of every head beside the same in torch."""
    draw = drawer(context, 14)
    n, w, units = small(context, 65536, 4), 16 if context.device.dry else 768, 4
    units = units if context.device.dry else 12
    source, base_run, grad = draw(n, w), draw(n, w), draw(n, w)
    base_run[::3] = source[::3]
    args = (source, base_run, grad, units)

    def torch_way() -> Run:
        return lambda: (
            ((source - base_run) * grad).unflatten(1, (units, -1)).sum(-1),
            (source != base_run).unflatten(1, (units, -1)).any(-1),
        )

    def build(backend: str) -> Subject:
        run = under(backend, functools.partial(attribution_scores, *args))
        check = functools.partial(against_reference, backend, attribution_scores, args)
        return Subject(run, check, Need(hbm=12 * n * w), {TORCH: torch_way}, backend=backend)

    base = {"part": 2, "item": "attribution_scores", "shape": "768"}
    return each(context, "attribution_scores", base, build)


def items() -> list[Item]:
    """These ops in part 2."""
    return [
        Item(2, "patch_rows", "768", lambda c: patched(c, 768), 8, gib=3),
        Item(2, "delta_linear", "768", lambda c: delta(c, 768), 8, gib=3),
        Item(2, "cascade_attention", "64", cascade, 10, gib=3),
        Item(2, "attribution_scores", "768", attribution, 6, gib=3),
    ]
