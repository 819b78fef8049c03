"""Walk permutations through a multilayer perceptron: what changes is added, nothing is stored.

A program holds the first layer's pre-activations of a tile of walks in registers, adds the columns
of one player to each, runs the further layers and writes the outputs, until the walks end. Those
outputs, the values of the coalitions, are what `shapley_reduce` then reads: masked inputs and
hidden states never leave the program. (In float32 a tile of activations passes through memory that
the program alone uses and the cache holds, because registers cannot be cut for a product.)
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, import-untyped"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from microtome.kernels import shapley_reduce
from microtome.kernels.mlp_layers import Layers, _outputs, passed, read_layers
from torch import Tensor

WORKSPACE = 256 * 2**20  # bytes of values, and of activations in float32, held at a time


@triton.jit
def _walks_kernel(
    x, background, weight, first, held, columns, offsets, order, empty, full, scratch,
    W_2, bias_2, W_out, bias_out, out, rows, each, n, m, p, o, wide, hidden, held_row, empty_row,
    SHARED: tl.constexpr, PAIRED: tl.constexpr, GROUPED: tl.constexpr,
    DEPTH: tl.constexpr, ACT_1: tl.constexpr, ACT_2: tl.constexpr, ACT_OUT: tl.constexpr,
    BF16: tl.constexpr, RESIDENT: tl.constexpr, UPCAST: tl.constexpr,
    BW: tl.constexpr, B1: tl.constexpr, B2: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Rows are walks: where PAIRED, an order forward and the same order back, one by one."""
    DIRECTIONS: tl.constexpr = 2 if PAIRED else 1
    tiles = tl.cdiv(rows, BW)
    i = (tl.program_id(0) // tiles).to(tl.int64)
    row = (tl.program_id(0) % tiles).to(tl.int64) * BW + tl.arange(0, BW)
    live, back = row < rows, row % DIRECTIONS == 1
    walk = tl.where(live, row // DIRECTIONS, 0)
    if SHARED:
        which, b = walk // n, walk % n  # every background row walks each order
    else:
        which, b = walk, walk // each  # each its own
    outputs = tl.cast(o, tl.int64)  # of which a walk may have 2^31
    v = out + (i * (rows // DIRECTIONS) + walk) * (DIRECTIONS * p + 1) * o
    for k in range(0, o):
        value = tl.load(empty + i * empty_row + b * o + k)
        tl.store(v + tl.where(back, 2 * p, 0) * outputs + k, value, mask=live)
        value = tl.load(full + i * o + k + tl.zeros((BW,), tl.int32))
        tl.store(v + p * outputs + k, value, mask=live & (row % DIRECTIONS == 0))
    unit = tl.arange(0, B1)
    known = (unit < wide)[None, :]
    h = tl.load(first + b[:, None] * wide + unit[None, :], mask=known, other=0.0)
    h += tl.load(held + i * held_row + unit, mask=unit < wide, other=0.0)[None, :]  # [BW, B1]
    if DEPTH == 3 and RESIDENT:
        # Read before the steps, so that it is put into shared memory once.
        W_2 = tl.load(W_2 + tl.arange(0, B1)[:, None] * B2 + tl.arange(0, B2)[None, :])
    scratch += tl.program_id(0).to(tl.int64) * BW * B1
    for step in range(1, p):
        j = tl.load(order + which * p + tl.where(back, p - step, step - 1))
        if GROUPED:
            c, end = tl.load(offsets + j), tl.load(offsets + j + 1)
            for _ in range(0, tl.max(end - c, 0)):
                more = c < end
                column = tl.load(columns + c, mask=more, other=0).to(tl.int64)
                delta = tl.load(x + i * m + column, mask=more, other=0.0)
                delta -= tl.load(background + b * m + column, mask=more, other=0.0)
                at = column[:, None] * wide + unit[None, :]
                h += delta[:, None] * tl.load(weight + at, mask=known & more[:, None], other=0.0)
                c += 1
        else:
            j = j.to(tl.int64)
            delta = tl.load(x + i * m + j) - tl.load(background + b * m + j)
            at = j[:, None] * wide + unit[None, :]
            h += delta[:, None] * tl.load(weight + at, mask=known, other=0.0)
        to = v + tl.where(back, 2 * p - step, step) * outputs
        _outputs(
            h, scratch, W_2, bias_2, W_out, bias_out, to,
            live, o, hidden, DEPTH, ACT_1, ACT_2, ACT_OUT, BF16, RESIDENT, UPCAST, BW, B1, B2, BK,
        )  # fmt: skip


def launch(
    x: Tensor, background: Tensor, ranks: Tensor, weights: list[Tensor], biases: list[Tensor],
    activations: list[int], player: Tensor | None, paired: bool, precision: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`mlp_shapley`: a program per explicand and tile of walks, then `shapley_reduce`.

    The first layer of every row, and the values of no player and of all, are computed once.
    Explicands are done a block at a time, and strata where one explicand's are too many; neither
    that nor the number of explicands changes a bit.
    """
    e, n, (S, U, A, p), o = x.shape[0], background.shape[0], ranks.shape, weights[-1].shape[0]
    mean = torch.empty(e, S, p, o, dtype=torch.float64, device=x.device)
    m2 = torch.empty_like(mean)
    if mean.numel() == 0:
        return mean, m2
    walks = U * A * (n if S == 1 else 1)  # of a stratum
    rows, L = (2 * walks, 2 * p + 1) if paired else (walks, p + 1)
    layers = read_layers(weights, biases, activations, precision == "bf16", rows)
    each = 4 * (walks * L * o + rows * passed(layers.constants))  # bytes of a stratum
    some, many = min(max(WORKSPACE // each, 1), S), min(max(WORKSPACE // (each * S), 1), e)
    groups = None if player is None else _columns_of(player, p)
    x, background, ranks = x.contiguous(), background.contiguous(), ranks.contiguous()
    player = None if player is None else player.contiguous()
    with torch.cuda.device_of(x):
        base = layers.first(background, player, held=False)
        for i in range(0, e, many):
            part = x[i : i + many]
            whole = layers.first(part, player, held=False)
            held = layers.bias_1[None]
            if player is not None:
                held = layers.first(part, player, held=True)
            full = layers.ends(whole, held, (len(part), 1, o), 1)
            empty = layers.ends(base, held, (1 if player is None else len(part), n, o), 0)
            for s in range(0, S, some):
                own = slice(s, s + some) if S > 1 else slice(None)  # background rows
                values = _walk(
                    layers, part, background[own], base[own], held, empty[:, own], full,
                    ranks[s : s + some], groups, paired,
                )  # fmt: skip
                repeat = n if S == 1 else 1
                answer = shapley_reduce.launch(values, ranks[s : s + some], paired, repeat)
                mean[i : i + many, s : s + some], m2[i : i + many, s : s + some] = answer
    return mean, m2


def _columns_of(player: Tensor, p: int) -> tuple[Tensor, Tensor]:
    """The columns [m] by player, those of none first, and where each player's begin [p + 1]."""
    ordered, columns = player.long().sort(stable=True)
    bounds = torch.arange(p + 1, device=player.device)
    return columns.int(), torch.searchsorted(ordered, bounds).int()


def _walk(
    layers: Layers, x: Tensor, background: Tensor, base: Tensor, held: Tensor, empty: Tensor,
    full: Tensor, ranks: Tensor, groups: tuple[Tensor, Tensor] | None, paired: bool,
) -> Tensor:  # fmt: skip
    """[e, S, U, A, L, o]: the values of every walk; where S is 1, A counts background rows too."""
    (e, m), n, (S, U, A, p), o = x.shape, background.shape[0], ranks.shape, full.shape[2]
    shared = S == 1
    each, L = A * (n if shared else 1), 2 * p + 1 if paired else p + 1
    rows = S * U * each * (2 if paired else 1)
    order = ranks.argsort(-1).int()
    values = x.new_empty(e, S, U, each, L, o)
    columns, offsets = groups or (order, order)
    programs = e * triton.cdiv(rows, layers.constants["BW"])
    scratch = x.new_empty(programs * layers.constants["BW"] * passed(layers.constants))
    _walks_kernel[(programs,)](
        x, background, layers.W_1, base, held, columns, offsets, order, empty, full, scratch,
        *layers.further, values, rows, U * A, n, m, p, o, base.shape[1], layers.hidden,
        held.stride(0) if len(held) > 1 else 0, empty.stride(0) if len(empty) > 1 else 0,
        SHARED=shared, PAIRED=paired, GROUPED=groups is not None,
        **layers.constants, **layers.options,
    )  # fmt: skip
    return values
