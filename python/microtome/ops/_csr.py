"""Codes with any number of entries a row: values, indices, and where each row begins."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from microtome import _check
from microtome.errors import ArgumentError, ShapeError


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


def check_offsets(op: str, offsets: Tensor, entries: int) -> None:
    """Raise unless offsets [n + 1] begin with 0, never fall and end within the entries."""
    if offsets.dim() != 1 or offsets.numel() == 0:
        msg = f"{op}: offsets must be [n + 1], n rows and one end, got shape {list(offsets.shape)}."
        raise ShapeError(msg)
    _check.dtype(op, _check.INDICES, offsets=offsets)
    if torch.compiler.is_compiling():
        return
    steps = offsets.diff()
    falls = int(steps.argmin()) if steps.numel() and int(steps.min()) < 0 else -1
    if falls >= 0:
        msg = (
            f"{op}: offsets must not fall, got {int(offsets[falls])} then "
            f"{int(offsets[falls + 1])} at row {falls}."
        )
        raise ArgumentError(msg)
    first, last = int(offsets[0]), int(offsets[-1])
    if first != 0 or last > entries:
        msg = f"{op}: offsets must go from 0 to at most m={entries}, got {first} to {last}."
        raise ArgumentError(msg)
