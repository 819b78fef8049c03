"""The k largest of all ranks' features: exact, from few candidates of each rank."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from microtome.sae.ranks import Ranks


def first_round(k: int, size: int) -> int:
    """Candidates that each rank sends first: twice its share of the k, plus 1."""
    return min(k, 2 * k // size + 1)


def top_k_of_ranks(
    ranks: Ranks,
    local: Callable[[], tuple[Tensor, Tensor]],
    like: Tensor,
    k: int,
    available: list[int],
    numbers: Tensor | None = None,
) -> tuple[Tensor, Tensor, list[list[float]]]:
    """Pick the k largest of every row out of what all ranks have.

    The ranks are those of one row. Each first sends its q = 2 k / size + 1 best. The k best of
    these are the k best of all unless a rank's last one is among them: only then may what that rank
    kept back belong there, too, and for those rows every rank sends the rest. All ranks see the
    same candidates, so they agree on this without asking.

    Args:
        ranks: the ranks.
        local: makes this rank's candidates, [n, available[rank]] values descending, equal ones by
            index ascending, and their indices over all ranks int32. Ranks hold ascending indices.
        like: [n, .] of the values' dtype.
        k: how many, at most the sum of `available`.
        available: how many candidates each rank has, at most k.
        numbers: goes with the first message.

    Returns:
        values [n, k] and indices [n, k] int32, value descending, index ascending: the bits of one
        process that holds every feature; and the numbers of all ranks, row after row.

    Raises:
        MicrotomeError: a rank has failed.
    """
    n, q = len(like), first_round(k, ranks.size)

    def nothing() -> tuple[Tensor, Tensor]:
        values = like.new_zeros(n, available[ranks.rank])
        return values, values.int()

    values, indices = ranks.attempt(local, nothing)
    values, indices = _padded(values, k, float("-inf")), _padded(indices, k, 0)
    heads, (sent, places) = ranks.gather(values[:, :q], indices[:, :q], numbers=numbers)
    top, found, order = _merged(sent, places, k)
    more = [count > q for count in available]
    if not any(more):
        return top, found, heads
    last = order % q == q - 1  # [n, k]: the last that its rank sent
    unsure = last & torch.tensor(more, device=order.device)[order // q]
    rows = unsure.any(1).nonzero().flatten()
    if len(rows):
        rest, rest_places = ranks.features.gather(values[rows, q:], indices[rows, q:])
        whole = torch.cat([sent[:, rows], rest], -1)  # [size, rows, k]
        top[rows], found[rows], _ = _merged(whole, torch.cat([places[:, rows], rest_places], -1), k)
    return top, found, heads


def _padded(t: Tensor, width: int, value: float) -> Tensor:
    """Columns up to `width`; what is put in comes after every candidate."""
    return torch.nn.functional.pad(t, (0, width - t.shape[1]), value=value)


def _merged(values: Tensor, indices: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The k largest of [size, n, q], with their places among the size * q.

    Ranks follow each other by index and so do a rank's equal values: a stable sort leaves ties to
    the lower index.
    """
    size, n, q = values.shape
    flat, numbers = (t.transpose(0, 1).reshape(n, size * q) for t in (values, indices))
    order = torch.sort(flat, dim=1, descending=True, stable=True).indices[:, :k]
    return flat.gather(1, order), numbers.gather(1, order), order


def own_entries(values: Tensor, indices: Tensor, features: range) -> tuple[Tensor, Tensor]:
    """The entries of a code that fall on some features, moved to the left in their order.

    Args:
        values: [n, k].
        indices: [n, k] int32 over all features.
        features: those of this rank.

    Returns:
        values [n, m] and indices [n, m] int32 counted from features.start, m being the most that a
        row has, at least 1. Rows with fewer end in zeros, which no op here takes for active; their
        indices go round the features, so that no latent's list grows long with them.
    """
    own = (indices >= features.start) & (indices < features.stop) & (values != 0)
    most = int(own.sum(1).max()) if own.numel() else 0
    order = torch.sort((~own).byte(), dim=1, stable=True).indices[:, : max(1, most)]
    kept = own.gather(1, order)
    filler = torch.arange(len(values), device=values.device)[:, None] % len(features)
    places = torch.where(kept, indices.gather(1, order) - features.start, filler)
    return torch.where(kept, values.gather(1, order), 0.0), places.int()
