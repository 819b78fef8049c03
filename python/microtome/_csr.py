"""Codes with any number of entries a row: values, indices, and where each row begins."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from microtome.errors import ArgumentError


class Entries(NamedTuple):
    """A code by rows (CSR).

    Attributes:
        values: [m], in the dtype of what was encoded.
        indices: [m] int32, the feature of each entry.
        offsets: [n + 1] int64: row i is entries offsets[i] to offsets[i + 1]. Entries from
            offsets[n] on are unused.
    """

    values: Tensor
    indices: Tensor
    offsets: Tensor


def rows_of(offsets: Tensor, entries: int) -> Tensor:
    """The row of each of the first `entries` entries, [entries] int64; unused ones: the last."""
    if offsets.numel() < 2:
        return torch.zeros(entries, dtype=torch.int64, device=offsets.device)
    at = torch.arange(entries, device=offsets.device)
    return torch.searchsorted(offsets[1:].contiguous().long(), at, right=True).clamp_(
        max=offsets.numel() - 2
    )


def offsets_of(counts: Tensor) -> Tensor:
    """Row lengths [n] to offsets [n + 1] int64."""
    return torch.cat([counts.new_zeros(1, dtype=torch.int64), counts.cumsum(0, dtype=torch.int64)])


def check_room(op: str, entries: int, room: int, what: str) -> None:
    """Raise ArgumentError where there are more entries than there is room for."""
    if entries > room:
        msg = (
            f"{op}: {entries} {what}, capacity={room}. "
            f"Pass capacity={entries} or more, or None to size by the data."
        )
        raise ArgumentError(msg)
