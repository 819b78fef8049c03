"""The ops of Shapley sampling on a card."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import torch
from torch import Tensor

from benchmarks.floors import Need
from benchmarks.on_gpu.against import against_reference, equal_to_reference
from benchmarks.on_gpu.device import Run
from benchmarks.on_gpu.goals import TORCH
from benchmarks.on_gpu.item import AbsentError, Context, Item, Row, Subject, under
from benchmarks.on_gpu.patching import drawer, each, small
from microtome.ops import (
    IDENTITY,
    RELU,
    coalition_gram,
    coalition_inputs,
    mlp_shapley,
    shapley_reduce,
)


def orders(context: Context, *size: int) -> Tensor:
    """Random ranks [..., p] int32."""
    g = torch.Generator(context.device.torch).manual_seed(21)
    drawn = torch.rand(*size, generator=g, device=context.device.torch)
    return drawn.argsort(-1).argsort(-1).to(torch.int32)


def written(context: Context, p: int) -> list[Row]:
    """coalition_inputs: every step of a few orders, for some background rows."""
    draw = drawer(context, 22)
    m = 6 if context.device.dry else p
    q, n = small(context, 16, 2), small(context, 16, 2)
    x, background, ranks = draw(1, m), draw(n, m), orders(context, q, m)
    place = context.device.torch
    grid = torch.cartesian_prod(*(torch.arange(s, device=place) for s in (q, m + 1, n)))
    rows = torch.zeros(len(grid), 5, dtype=torch.int32, device=place)
    rows[:, 2], rows[:, 4], rows[:, 1] = grid[:, 0], grid[:, 1], grid[:, 2]
    args = (x, background, ranks, rows)

    def torch_way() -> Run:
        order, until, behind = (rows[:, c].long() for c in (2, 4, 1))
        return lambda: torch.where(ranks[order] < until[:, None], x, background[behind])

    def build(backend: str) -> Subject:
        run = under(backend, functools.partial(coalition_inputs, *args))
        check = functools.partial(against_reference, backend, coalition_inputs, args)
        need = Need(hbm=4 * len(rows) * m)
        return Subject(run, check, need, {TORCH: torch_way}, backend=backend)

    base = {"part": 2, "item": "coalition_inputs", "shape": str(p)}
    return each(context, "coalition_inputs", base, build)


def reduced(context: Context, p: int) -> list[Row]:
    """shapley_reduce of many antithetic walks, one output."""
    draw = drawer(context, 23)
    players = 5 if context.device.dry else p
    S, U = small(context, 64, 2), small(context, 64, 3)
    values, ranks = draw(1, S, U, 1, 2 * players + 1, 1), orders(context, S, U, 1, players)

    def torch_way() -> Run:
        v = values[0, :, :, 0, :, 0].double()  # [S, U, 2 p + 1]

        def run() -> tuple[Tensor, Tensor]:
            at = ranks[:, :, 0].long()
            go = v.gather(2, at + 1) - v.gather(2, at)
            wide = torch.cat([v[..., players:], v[..., :1]], -1)
            back = wide.gather(2, at) - wide.gather(2, at + 1)
            unit = (go + back) / 2
            mean = unit.mean(1)
            return mean, (unit - mean[:, None]).pow(2).sum(1)

        return run

    def build(backend: str) -> Subject:
        args = (values, ranks, True)
        run = under(backend, functools.partial(shapley_reduce, *args))
        check = functools.partial(against_reference, backend, shapley_reduce, args, args)
        need = Need(hbm=4 * values.numel() + 4 * ranks.numel())
        return Subject(run, check, need, {TORCH: torch_way}, backend=backend)

    base = {"part": 2, "item": "shapley_reduce", "shape": str(p)}
    return each(context, "shapley_reduce", base, build)


def gram(context: Context, p: int) -> list[Row]:
    """coalition_gram beside torch's products in float64; integer weights, so sums are exact."""
    g = torch.Generator(context.device.torch).manual_seed(24)
    players = 7 if context.device.dry else p
    K, place = small(context, 16384, 6), context.device.torch
    words = -(-players // 64)
    coalitions = torch.randint(-(2**62), 2**62, (K, words), generator=g, device=place)
    weights = torch.randint(1, 9, (1, K), generator=g, device=place).double()
    values = torch.randint(-8, 9, (2, K, 1), generator=g, device=place).double()
    args = (coalitions, weights, values, players)

    def torch_way() -> Run:
        player = torch.arange(players, device=place)

        def run() -> tuple[Tensor, Tensor]:
            z = torch.ones(K, players + 1, dtype=torch.float64, device=place)
            z[:, 1:] = coalitions[:, player // 64] >> (player % 64) & 1
            weighted = z * weights[0, :, None]
            return weighted.mT @ z, weighted.mT @ values

        return run

    def build(backend: str) -> Subject:
        run = under(backend, functools.partial(coalition_gram, *args))
        check = functools.partial(equal_to_reference, backend, coalition_gram, args)
        need = Need(hbm=8 * K * (words + 3), fp64=float(K * (players + 1) ** 2))
        return Subject(run, check, need, {TORCH: torch_way}, backend=backend)

    base = {"part": 2, "item": "coalition_gram", "shape": str(p)}
    return each(context, "coalition_gram", base, build)


def mlp_args(context: Context) -> tuple[Any, ...]:
    """A 30-128-128-1 network, 100 background rows that share 10 antithetic pairs of orders."""
    draw = drawer(context, 25)
    m, hidden = (4, 16) if context.device.dry else (30, 128)
    n, units = small(context, 100, 3), small(context, 10, 2)
    widths = (m, hidden, hidden, 1)
    weights = [draw(o, i) / i**0.5 for i, o in itertools.pairwise(widths)]
    biases = [0.1 * draw(o) for o in widths[1:]]
    ranks = orders(context, 1, units, 1, m)
    return draw(small(context, 8, 1), m), draw(n, m), ranks, weights, biases, [RELU, RELU, IDENTITY]


def network(context: Context) -> list[Row]:
    """mlp_shapley beside the network called on written inputs."""
    args = mlp_args(context)
    x, background, ranks, weights, biases, _ = args
    (e, m), n, units = x.shape, background.shape[0], ranks.shape[1]
    walked = e * n * units * 2 * (m + 1)

    def torch_way() -> Run:
        if walked * m * 4 > 16e9:
            msg = "inputs would take more than 16 GB"
            raise AbsentError(msg)
        flat = ranks[0, :, 0].long()

        def run() -> Tensor:
            until = torch.arange(m + 1, device=x.device)
            on = flat[:, None] < until[:, None]  # [U, m + 1, m]
            on = torch.stack([on, ~on])  # and each order backwards
            a = torch.where(
                on[None, None], x[:, None, None, None, None], background[:, None, None, None]
            )
            for W, b in zip(weights[:-1], biases[:-1], strict=True):
                a = torch.nn.functional.linear(a, W, b).relu_()
            return torch.nn.functional.linear(a, weights[-1], biases[-1])

        return run

    def build(backend: str) -> Subject:
        run = under(backend, functools.partial(mlp_shapley, *args))
        check = functools.partial(against_reference, backend, mlp_shapley, args)
        hidden = sum(W.numel() for W in weights[1:])
        need = Need(fp32=2.0 * walked * hidden, hbm=4.0 * ranks.numel())
        return Subject(run, check, need, {TORCH: torch_way}, backend=backend)

    return each(context, "mlp_shapley", {"part": 2, "item": "mlp_shapley", "shape": "30"}, build)


def items() -> list[Item]:
    """These ops in part 2."""
    return [
        Item(2, "coalition_inputs", "784", lambda c: written(c, 784), 8, gib=4),
        Item(2, "shapley_reduce", "784", lambda c: reduced(c, 784), 8, gib=2),
        Item(2, "coalition_gram", "64", lambda c: gram(c, 64), 8, gib=2),
        Item(2, "mlp_shapley", "30", network, 10, gib=8),
    ]
