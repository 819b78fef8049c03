"""Coalitions as spans of orders, and as packed bits where they have to be compared.

`ranks [q, p]` says which place each player has in each of q orders. A span (lo, hi) of an order
holds the players whose rank lies in [lo, hi). A walk forward through an order is the spans (0, t),
a walk back through it, which is its reverse permutation, the spans (t, p).
"""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor

MEAN = -1  # instead of a background row: the mean over all of them


def spans(background: Tensor, order: Tensor, lo: Tensor, hi: Tensor) -> Tensor:
    """[K, 4] int32 (background, order, lo, hi) from four broadcastable tensors."""
    parts = torch.broadcast_tensors(background, order, lo, hi)
    return torch.stack([part.reshape(-1) for part in parts], 1).to(torch.int32)


@functools.lru_cache(maxsize=32)
def walk(p: int, paired: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The inner steps of a walk: lo and hi of each, and where its value lies in the walk.

    Returns:
        lo, hi, at: [p - 1] for a walk forward, [2 p - 2] if it also goes back. The ends, which are
        the empty and the full coalition, are not among them.
    """
    t = torch.arange(1, p)
    nothing, everything = torch.zeros_like(t), torch.full_like(t, p)
    if not paired:
        return nothing, t, t
    return torch.cat([nothing, t]), torch.cat([t, everything]), torch.cat([t, p + t])


@functools.lru_cache(maxsize=4)
def walk_spans(S: int, chains: int, p: int, paired: bool, mean: bool) -> Tensor:
    """Spans of the inner steps of S * chains walks, one walk after another.

    Args:
        S: strata, each with its background row; walk c of stratum s follows order s * chains + c.
        chains: walks in a stratum.
        p: players.
        paired: whether walks also go back.
        mean: take the mean over all background rows instead.
    """
    lo, hi, _ = walk(p, paired)
    order = torch.arange(S * chains).reshape(S, chains, 1)
    row = torch.tensor(MEAN) if mean else torch.arange(S).reshape(S, 1, 1)
    return spans(row, order, lo, hi)


def members(ranks: Tensor, spans: Tensor) -> Tensor:
    """[K, p] bool: who is in each coalition."""
    rank = ranks[spans[:, 1].long()]
    return (rank >= spans[:, 2:3]) & (rank < spans[:, 3:4])


def of_members(inside: Tensor, background: int = MEAN) -> tuple[Tensor, Tensor]:
    """Ranks and spans of K coalitions given as [K, p] bool: each is the start of its own order."""
    K = len(inside)
    size = inside.sum(1)
    before = inside.cumsum(1)  # members up to each player, itself included
    place = torch.arange(inside.shape[1]) - before + size[:, None]
    ranks = torch.where(inside, before - 1, place).to(torch.int32)
    zero = torch.zeros(1, dtype=torch.int64)
    return ranks, spans(zero + background, torch.arange(K), zero, size)


def pack(inside: Tensor) -> Tensor:
    """[K, w] int64 words of [K, p] bool: bit j % 64 of word j // 64 is player j."""
    K, p = inside.shape
    out = np.zeros((K, 8 * ((p + 63) // 64)), dtype=np.uint8)
    out[:, : (p + 7) // 8] = np.packbits(inside.numpy(), axis=1, bitorder="little")
    return torch.from_numpy(out.view("<i8").astype(np.int64, copy=False))


def unpack(words: Tensor, p: int) -> Tensor:
    """[K, p] bool of [K, w] words."""
    return ((words[:, :, None] >> torch.arange(64)) & 1).bool().flatten(1)[:, :p]


def inverse(orders: Tensor) -> Tensor:
    """Ranks from orders and orders from ranks: the inverse of each permutation. [..., p] int32."""
    p = orders.shape[-1]
    places = torch.arange(p, dtype=torch.int32).expand(orders.shape)
    return torch.empty_like(places).scatter_(-1, orders.long(), places)
