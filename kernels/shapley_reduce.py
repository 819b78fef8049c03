"""Every player gathers what it adds along every walk; float64 sums in a fixed order, no atomics."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, import-untyped"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from microtome.kernels.segments import tile
from torch import Tensor

WIDEST, SIZE = 256, 256  # players times outputs, and sums, of a tile


@triton.jit
def _unit_mean(
    values, ranks, walk, ranked, player, output, mask, p, o, points, A, repeat,
    PAIRED: tl.constexpr,
):  # fmt: skip
    """[BR, BC] what each player adds on average over the A orders of a unit, in float64.

    walk [BR] is the first of the unit's walks in `values`, ranked [BR] its first order in `ranks`;
    `repeat` walks that follow each other share an order.
    """
    total = tl.zeros(mask.shape, tl.float64)
    for a in range(0, A):
        order = (ranked + a // repeat)[:, None] * p
        rank = tl.load(ranks + order + player, mask=mask, other=0)
        rank = tl.minimum(tl.maximum(rank, 0), p - 1).to(tl.int64)  # a GPU's are not checked yet
        v = values + ((walk + a)[:, None] * points + rank) * o + output
        step = tl.load(v + o, mask=mask, other=0.0).to(tl.float64)
        step -= tl.load(v, mask=mask, other=0.0).to(tl.float64)
        if PAIRED:
            v += p * o
            back = tl.load(v, mask=mask, other=0.0).to(tl.float64)
            back -= tl.load(v + o, mask=mask, other=0.0).to(tl.float64)
            step = (step + back) * 0.5
        total += step
    return total / A


@triton.jit
def _shapley_reduce_kernel(
    values, ranks, mean, m2, strata, S, U, A, repeat, p, o, points,
    PAIRED: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(p * o, BC)
    row = (tl.program_id(0) // tiles).to(tl.int64) * BR + tl.arange(0, BR)  # explicand * S + s
    column = tl.program_id(0) % tiles * BC + tl.arange(0, BC)
    player, output = (column // o)[None, :], (column % o)[None, :]
    live = row < strata
    mask = live[:, None] & (column < p * o)[None, :]
    walk, ranked = row * U * A, row % S * U * (A // repeat)
    units = tl.zeros((BR, BC), tl.float64)
    for unit in tl.range(0, U, loop_unroll_factor=4):
        u = tl.cast(unit, tl.int64)
        units += _unit_mean(
            values, ranks, walk + u * A, ranked + u * (A // repeat), player, output, mask,
            p, o, points, A, repeat, PAIRED,
        )  # fmt: skip
    units = units / U
    squares = tl.zeros((BR, BC), tl.float64)
    for unit in tl.range(0, U, loop_unroll_factor=4):
        u = tl.cast(unit, tl.int64)
        apart = units - _unit_mean(
            values, ranks, walk + u * A, ranked + u * (A // repeat), player, output, mask,
            p, o, points, A, repeat, PAIRED,
        )  # fmt: skip
        squares += apart * apart
    at = row[:, None] * p * o + column[None, :]
    tl.store(mean + at, units, mask=mask)
    tl.store(m2 + at, squares, mask=mask)


def launch(values: Tensor, ranks: Tensor, paired: bool, repeat: int = 1) -> tuple[Tensor, Tensor]:
    """`shapley_reduce`: a program per block of (explicand, stratum)s, of players and outputs.

    The spread is summed in a second pass, which reads the values again, from the cache where they
    fit it. Sums run as in the reference and no product is fused into one, so the bits are the same.

    `repeat` walks that follow each other may share an order: ranks then has A / repeat a unit.
    """
    (e, S, U, A, points, o), p = values.shape, ranks.shape[3]
    mean = torch.empty(e, S, p, o, dtype=torch.float64, device=values.device)
    m2 = torch.empty_like(mean)
    if mean.numel() == 0:
        return mean, m2
    BR, BC = tile(e * S, p * o, not values.is_cuda, WIDEST, SIZE)
    with torch.cuda.device_of(values):
        _shapley_reduce_kernel[(triton.cdiv(e * S, BR) * triton.cdiv(p * o, BC),)](
            values.contiguous(), ranks.contiguous(), mean, m2, e * S, S, U, A, repeat, p, o, points,
            PAIRED=paired, BR=BR, BC=BC, enable_fp_fusion=False,
        )  # fmt: skip
    return mean, m2
