"""Where training reads its activations: a store, a view of one, or a plain tensor."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from microtome import _check
from microtome._seed import generator
from microtome.errors import ArgumentError, ShapeError


@runtime_checkable
class ActivationSource(Protocol):
    """What `train` and `evaluate` need: `microtome.models.ActivationStore` and its views."""

    @property
    def d(self) -> int:
        """Width of a row."""
        ...

    def __len__(self) -> int:
        """Number of rows."""
        ...

    def rows(self, index: Tensor | slice) -> Tensor:
        """Rows by number, [m, d] float32."""
        ...

    def batches(self, batch_size: int, *, seed: int, start: int = 0) -> Iterator[Tensor]:
        """Endless shuffled batches from number `start`; batch i is a function of (seed, i)."""
        ...


class InMemory:
    """Activations held in one tensor.

    Args:
        data: [rows, d], any floating dtype.
        op: what is called, for messages.

    Batch i of a seed is entries i * batch_size to (i + 1) * batch_size of an endless list: the rows
    in random order, then again in another order, and so on. So every row is seen once before any is
    seen twice.

    Raises:
        ShapeError, DtypeError: the data is no [rows, d] of floats with at least one row.
    """

    def __init__(self, data: Tensor, op: str = "train") -> None:
        _check.shapes(op, activations=(data, "rows d"))
        _check.dtype(op, _check.FLOATS, activations=data)
        if data.shape[0] == 0:
            msg = f"{op}: activations must have at least one row, got shape "
            raise ShapeError(msg + f"{list(data.shape)}.")
        self.data = data.detach()

    @property
    def d(self) -> int:
        """Width of a row."""
        return self.data.shape[1]

    def __len__(self) -> int:
        return self.data.shape[0]

    def rows(self, index: Tensor | slice) -> Tensor:
        """Rows by number, [m, d] float32."""
        return self.data[index].float()

    def batches(self, batch_size: int, *, seed: int, start: int = 0) -> Iterator[Tensor]:
        """Endless shuffled batches from number `start`."""
        size, epoch, order = len(self), -1, torch.empty(0, dtype=torch.long)
        for number in range(start, 2**62):
            place, stop, parts = number * batch_size, (number + 1) * batch_size, []
            while place < stop:
                if place // size != epoch:
                    epoch = place // size
                    order = torch.randperm(size, generator=generator(seed, "shuffle", epoch))
                within = place % size
                parts.append(order[within : within + stop - place])
                place += len(parts[-1])
            yield self.rows(torch.cat(parts))


def as_source(op: str, activations: Any, d: int) -> ActivationSource:
    """A tensor as a source, a source as itself; the width is checked.

    Raises:
        ArgumentError: neither.
        ShapeError: another width than the SAE's, or no rows.
    """
    if isinstance(activations, Tensor):
        activations = InMemory(activations, op)
    if not isinstance(activations, ActivationSource):
        msg = f"{op}: activations must be a tensor [rows, d], an ActivationStore or have .d, "
        msg += f"len(), .rows() and .batches(), got {type(activations).__name__}."
        raise ArgumentError(msg)
    if activations.d != d:
        msg = (
            f"{op}: activations must be [rows, d={d}] as the SAE's d_model, got d={activations.d}."
        )
        raise ShapeError(msg)
    if len(activations) == 0:
        msg = f"{op}: activations have no rows."
        raise ShapeError(msg)
    return activations
