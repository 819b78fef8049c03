"""Attention patterns that writes change: formed where they are written, and applied."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from microtome.models.native.base import BaseRun, softmax_scores
from microtome.models.native.changes import Changes
from microtome.models.native.rows import Rows

ENTRIES = 1 << 24  # of patterns formed at a time


def patterned(
    base: BaseRun,
    at: Changes,
    layer: int,
    rows: Rows,
    keep: Tensor | None,
    z: Tensor,
    own: tuple[Tensor, Tensor, Tensor] | None,
) -> Tensor:
    """Heads' outputs with the writes to the attention pattern of their rows.

    The pattern is formed for the queries that have a write, written to, and applied to the values.

    Args:
        base: the base run.
        at: the writes.
        layer: which.
        rows: all rows of the batch.
        keep: the tokens that ask, or None for all.
        z: [T or kept, h * d_head], right for queries without such writes.
        own: queries of the kept tokens and keys and values of the rows; the base run's if None.

    Returns:
        [T or kept, h * d_head], a copy of z.
    """
    block, kept, (_, t) = base.stack.blocks[layer], base.layers[layer], base.shape
    group, z = block.heads // block.kv_heads, z.clone()
    tokens = torch.arange(rows.tokens, device=z.device) if keep is None else keep
    asks = at.wants(layer, "pattern", rows.keys[tokens]).nonzero().flatten()  # of z
    where = torch.arange(t, device=z.device)
    step = max(1, ENTRIES // (block.heads * t))
    for here, example, k, v in _groups(base, layer, rows, tokens, asks, own):
        values = v.transpose(0, 1).repeat_interleave(group, dim=0)  # [h, keys, d_head]
        for some in here.split(step):
            q = kept.q_turned[rows.index[tokens[some]]] if own is None else own[0][some]
            pattern = softmax_scores(
                block,
                q.transpose(0, 1)[None],
                k.transpose(0, 1)[None],
                rows.position[tokens[some]],
                where[: len(k)],
                base.first[example : example + 1],
            )[0]  # [h, m, keys]
            padded = torch.nn.functional.pad(pattern, (0, t - len(k))).transpose(0, 1)
            new = at.write(layer, "pattern", rows.keys[tokens[some]], padded.flatten(1))
            new = new.unflatten(-1, (block.heads, t))[..., : len(k)].transpose(0, 1)
            z[some] = (new @ values).transpose(0, 1).flatten(1)
    return z


def _groups(
    base: BaseRun,
    layer: int,
    rows: Rows,
    tokens: Tensor,
    asks: Tensor,
    own: tuple[Tensor, Tensor, Tensor] | None,
) -> Iterator[tuple[Tensor, int, Tensor, Tensor]]:
    """Queries that share their keys: their places in z, their prompt, keys and values."""
    kept, t = base.layers[layer], base.shape[1]
    row = rows.row[tokens[asks]]
    if own is None:
        prompt = rows.example[row]
        for example in prompt.unique().tolist():
            whole = slice(example * t, (example + 1) * t)
            yield asks[prompt == example], example, kept.k_turned[whole], kept.v[whole]
        return
    for i in row.unique().tolist():
        example, start = int(rows.example[i]), int(rows.start[i])
        mine = slice(int(rows.offset[i]), int(rows.offset[i] + rows.count[i]))
        before = slice(example * t, example * t + start)
        k = torch.cat((kept.k_turned[before], own[1][mine]))
        v = torch.cat((kept.v[before], own[2][mine]))
        yield asks[row == i], example, k, v
