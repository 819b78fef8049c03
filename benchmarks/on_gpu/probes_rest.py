"""Probes of the ops of patched runs and of Shapley sampling."""

from __future__ import annotations

import functools
from typing import Any

import torch

from benchmarks.on_gpu import patching, shapley
from benchmarks.on_gpu.against import against_reference, equal_to_reference
from benchmarks.on_gpu.device import Device
from benchmarks.on_gpu.inputs import Shape
from benchmarks.on_gpu.item import Context
from benchmarks.on_gpu.probes import Call, Probe
from microtome.ops import (
    ADD,
    REPLACE,
    SCALE,
    ZERO,
    attribution_scores,
    cascade_attention,
    coalition_gram,
    coalition_inputs,
    delta_linear,
    mlp_shapley,
    pack_weights,
    patch_rows,
    random_ranks,
    shapley_reduce,
    swap_key_attention,
    use_backend,
)


def drawn(device: Device, seed: int) -> Any:
    """A function that draws normal tensors on the device."""
    return patching.drawer(Context(device), seed)


def patch(kind: str, shape: Shape, device: Device) -> Call | None:
    """patch_rows: every operation, spans that overlap, and one that is NaN."""
    if kind in ("ties", "dense"):
        return None
    draw, place = drawn(device, 41), device.torch
    t, w, n = 5, shape.d, min(shape.n, 40)
    rows = torch.tensor([(i % 2, i % t, t) for i in range(n)], dtype=torch.int32, device=place)
    operations = (REPLACE, ADD, ZERO, SCALE)
    table = torch.tensor(
        [(i % n, t - 1, i % 3, w - i % 2, i % 4, operations[i % 4]) for i in range(2 * n)],
        dtype=torch.int32,
        device=place,
    )
    base = draw(2, t, w)
    if kind == "nan":
        base[0, t - 1, w // 2] = float("nan")
    return Call(patch_rows, (base, draw(4, w), rows, table, draw(2 * n)))


def delta(kind: str, shape: Shape, device: Device) -> Call | None:
    """delta_linear, some rows equal to their base."""
    if kind in ("ties", "dense"):
        return None
    draw = drawn(device, 42)
    T, r, i, o = shape.n, 3, shape.d, shape.d + 5
    x_base, W = draw(r, i), draw(o, i) / i**0.5
    index = torch.arange(T, device=W.device) % r
    x = x_base[index] + 0.1 * draw(T, i)
    x[::2] = x_base[index][::2]
    if kind == "nan":
        x[T // 2, 0] = float("nan")
    args = (x, x_base, x_base @ W.T, index, pack_weights(W, "bf16"), o, draw(T, o))
    return Call(delta_linear, args)


def cascade(kind: str, shape: Shape, device: Device) -> Call | None:
    """cascade_attention; "ties": all keys equal; "dense": scores of some ten thousands."""
    if kind == "nan":
        return None
    args = patching.cascade_args(Context(Device(dry=True)))
    q, k, v, k_base, v_base, rows, where, first, scale = (
        a.to(device.torch) if isinstance(a, torch.Tensor) else a for a in args
    )
    if kind == "ties":
        k, k_base = torch.ones_like(k), torch.ones_like(k_base)
    if kind == "dense":
        q, k, k_base = 30 * q, 30 * k, 30 * k_base
    return Call(cascade_attention, (q, k, v, k_base, v_base, rows, where, first, scale))


def swapped(kind: str, shape: Shape, device: Device) -> Call | None:
    """swap_key_attention; "ties": the new key is the old; "dense": scores of some ten thousands."""
    if kind == "nan":
        return None
    draw, place, (b, t, h, hk, dh) = drawn(device, 47), device.torch, (2, 20, 6, 2, 64)
    table = [(i % 2, p, t - i % 3) for i, p in enumerate(range(0, t - 3, 4))]
    n, first = len(table), torch.tensor([0, 3], dtype=torch.int32, device=place)
    rows = torch.tensor(table, dtype=torch.int32, device=place)
    q, k, v = draw(b, t, h, dh), draw(b, t, hk, dh), draw(b, t, hk, dh)
    q_new, k_new, v_new = draw(n, h, dh), draw(n, hk, dh), draw(n, hk, dh)
    if kind == "ties":
        at = (rows[:, 0].long(), rows[:, 1].long())
        q_new, k_new, v_new = q[at], k[at], v[at]
    if kind == "dense":
        q, k, q_new, k_new = 30 * q, 30 * k, 30 * q_new, 30 * k_new
    whole = [[e, 0, e * t, t, e * t, t] for e in range(b)]
    causal = torch.tensor(whole, dtype=torch.int32, device=place)
    positions = torch.arange(t, dtype=torch.int32, device=place).repeat(b)
    flat = [x.flatten(0, 1) for x in (q, k, v)]
    with use_backend("reference"):
        z, lse = cascade_attention(*flat, k[:, :0], v[:, :0], causal, positions, first, dh**-0.5)
    z, lse = z.view(b, t, h, dh), lse.view(b, t, h)
    args = (z, lse, q, k, v, q_new, k_new, v_new, rows, first, dh**-0.5)
    judge = functools.partial(against_reference, call=swap_key_attention, args=args, factor=4.0)
    return Call(swap_key_attention, args, judge)


def ranks(kind: str, shape: Shape, device: Device) -> Call | None:
    """random_ranks: the very orders of the reference, of few players and of many."""
    if kind not in ("random", "dense"):
        return None
    samples = torch.arange(min(shape.n, 300), device=device.torch) * 2**33
    args = (samples, 7 if kind == "random" else 1500, 2**40 + 5)
    judge = functools.partial(equal_to_reference, call=random_ranks, args=args)
    return Call(random_ranks, args, judge)


def attribution(kind: str, shape: Shape, device: Device) -> Call | None:
    """attribution_scores by groups of three columns, rows that are equal among them."""
    if kind == "dense":
        return None
    draw = drawn(device, 43)
    w = shape.d - shape.d % 3
    source, base, grad = draw(shape.n, w), draw(shape.n, w), draw(shape.n, w)
    if kind == "ties":
        base = source.clone()
    if kind == "nan":
        grad[shape.n // 2, 1] = float("nan")
    return Call(attribution_scores, (source, base, grad, w // 3))


def written(kind: str, shape: Shape, device: Device) -> Call | None:
    """coalition_inputs with groups of columns."""
    if kind in ("ties", "dense"):
        return None
    draw, place = drawn(device, 44), device.torch
    m, p, q = shape.d, 5, 4
    ranks = shapley.orders(Context(device), q, p)
    rows = torch.tensor(
        [(0, i % 2, i % q, i % 3, 3 + i % 3) for i in range(min(shape.n, 200))],
        dtype=torch.int32,
        device=place,
    )
    player = (torch.arange(m, device=place) % (p + 1) - 1).to(torch.int32)
    x = draw(1, m)
    if kind == "nan":
        x[0, 1] = float("nan")
    return Call(coalition_inputs, (x, draw(2, m), ranks, rows, player))


def reduced(kind: str, shape: Shape, device: Device) -> Call | None:
    """shapley_reduce, paired."""
    if kind == "dense":
        return None
    draw, p = drawn(device, 45), 7
    values = draw(2, 3, 4, 2, 2 * p + 1, 2)
    if kind == "ties":
        values = values.round()
    if kind == "nan":
        values[0, 0, 0, 0, 3, 0] = float("nan")
    args = (values, shapley.orders(Context(device), 3, 4, 2, p), True)
    judge = functools.partial(against_same, shapley_reduce, args)
    return Call(shapley_reduce, args, judge)


def gram(kind: str, shape: Shape, device: Device) -> Call | None:
    """coalition_gram: integer weights must be exact; "dense": all players in every coalition."""
    if kind == "nan":
        return None
    g = torch.Generator(device.torch).manual_seed(46)
    p, K, place = 70, min(shape.n, 300), device.torch
    coalitions = torch.randint(-(2**62), 2**62, (K, 2), generator=g, device=place)
    if kind == "dense":
        coalitions.fill_(-1)
    weights = torch.randint(1, 9, (2, K), generator=g, device=place).double()
    values = torch.randint(-9, 9, (2, K, 2), generator=g, device=place).double()
    if kind == "random":
        weights += torch.rand(weights.shape, generator=g, device=place, dtype=torch.float64)
    args = (coalitions, weights, values, p)
    if kind == "random":
        return Call(coalition_gram, args, functools.partial(against_same, coalition_gram, args))

    def exactly(backend: str) -> dict[str, Any]:
        return equal_to_reference(backend, coalition_gram, args)

    return Call(coalition_gram, args, exactly)


def against_same(call: Any, args: tuple[Any, ...], backend: str) -> dict[str, Any]:
    """Ops that already work in float64: beside the reference's own answer, to its rounding."""
    return against_reference(backend, call, args, args)


def network(kind: str, shape: Shape, device: Device) -> Call | None:
    """mlp_shapley of a small network."""
    if kind in ("ties", "nan", "dense"):
        return None
    args = shapley.mlp_args(Context(Device(dry=True)))
    to = lambda a: a.to(device.torch) if isinstance(a, torch.Tensor) else a  # noqa: E731
    moved = tuple([to(t) for t in a] if isinstance(a, list) else to(a) for a in args)
    return Call(mlp_shapley, moved)


def probes() -> list[Probe]:
    """All of them."""
    return [
        Probe("patch_rows", "patch_rows", patch),
        Probe("delta_linear", "delta_linear", delta),
        Probe("cascade_attention", "cascade_attention", cascade),
        Probe("swap_key_attention", "swap_key_attention", swapped),
        Probe("random_ranks", "random_ranks", ranks),
        Probe("attribution_scores", "attribution_scores", attribution),
        Probe("coalition_inputs", "coalition_inputs", written),
        Probe("shapley_reduce", "shapley_reduce", reduced),
        Probe("coalition_gram", "coalition_gram", gram),
        Probe("mlp_shapley", "mlp_shapley", network),
    ]
