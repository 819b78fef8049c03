"""Logits that are computed where a metric looks: any callable pays for what it reads alone.

The metric is called on the unpatched run first, which records the positions and tokens it reads.
Patched runs are computed there, and the metric reads them from a table. If it ever reads anything
else, for its reads may depend on the numbers, `BeyondError` tells, and all logits are computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# (positions [m], tokens [c] or None for all) -> [b, m, c]
Fetch = Callable[[Tensor, "Tensor | None"], Tensor]


class BeyondError(Exception):
    """A metric read what it had not read before."""


@dataclass(frozen=True)
class Reads:
    """What a metric reads.

    Attributes:
        positions: [m] int64, in order.
        tokens: [c] int64, in order, or None for the whole vocabulary.
    """

    positions: Tensor
    tokens: Tensor | None

    def table(self, logits: Tensor) -> Fetch:
        """Serves what was read from logits [b, m, c]; BeyondError for anything else."""

        def fetch(positions: Tensor, tokens: Tensor | None) -> Tensor:
            at = _places(self.positions, positions)
            if self.tokens is None:
                return logits[:, at] if tokens is None else logits[:, at][..., tokens]
            if tokens is None:
                raise BeyondError
            return logits[:, at][..., _places(self.tokens, tokens)]

        return fetch


class Logits:
    """Stands for logits [b, t, vocabulary]; an index computes just what it picks.

    Everything else a tensor can do works too, on all of them.

    Args:
        shape: (b, t, vocabulary).
        like: a tensor with their dtype and device.
        fetch: computes them.
    """

    def __init__(self, shape: tuple[int, int, int], like: Tensor, fetch: Fetch) -> None:
        self.shape, self.dtype, self.device = torch.Size(shape), like.dtype, like.device
        self._fetch = fetch
        self._all: Tensor | None = None

    def whole(self) -> Tensor:
        """All of them."""
        if self._all is None:
            self._all = self._fetch(torch.arange(self.shape[1]), None)
        return self._all

    def __getitem__(self, index: Any) -> Any:
        parts = _parts(index)
        if parts is None:
            return self.whole()[index]
        rows, positions, tokens = parts
        wanted, positions = _picked(positions, self.shape[1])
        some, tokens = _picked(tokens, self.shape[2])
        every = isinstance(tokens, slice) and len(some) == self.shape[2]
        return self._fetch(wanted, None if every else some)[rows, positions, tokens]

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Any function of torch takes all of them."""
        del types
        return function(*_whole(args), **{k: _whole(v) for k, v in (kwargs or {}).items()})

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self.whole(), name)

    def size(self, axis: int | None = None) -> Any:
        """As of a tensor."""
        return self.shape if axis is None else self.shape[axis]

    def dim(self) -> int:
        """Three."""
        return 3

    def __len__(self) -> int:
        return self.shape[0]

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.whole())


def _operator(name: str) -> Callable[..., Any]:
    return lambda self, *args: getattr(self.whole(), name)(*_whole(args))


for _name in ("add", "sub", "mul", "truediv", "pow", "matmul"):
    setattr(Logits, f"__{_name}__", _operator(f"__{_name}__"))
    setattr(Logits, f"__r{_name}__", _operator(f"__r{_name}__"))
for _name in ("neg", "lt", "le", "gt", "ge"):
    setattr(Logits, f"__{_name}__", _operator(f"__{_name}__"))


def reads_of(
    metric: Callable[[Any], Any], shape: tuple[int, int, int], like: Tensor, fetch: Fetch
) -> Reads:
    """What a metric reads of the unpatched run, which `fetch` computes.

    Args:
        metric: called once.
        shape: (b, t, vocabulary).
        like: a tensor with the logits' dtype and device.
        fetch: computes logits of the unpatched run.
    """
    positions = torch.zeros(shape[1], dtype=torch.bool)
    tokens = torch.zeros(shape[2], dtype=torch.bool)
    whole = [False]

    def record(at: Tensor, some: Tensor | None) -> Tensor:
        positions[at] = True
        if some is None:
            whole[0] = True
        else:
            tokens[some.cpu()] = True
        return fetch(at, some)

    metric(Logits(shape, like, record))
    chosen = None if whole[0] else tokens.nonzero().flatten()
    return Reads(positions.nonzero().flatten(), chosen)


def _places(known: Tensor, wanted: Tensor) -> Tensor:
    """Where each of `wanted` stands in the sorted `known`; BeyondError if one does not."""
    wanted = wanted.cpu().contiguous()
    if wanted.numel() == 0:
        return wanted
    at = torch.searchsorted(known, wanted)
    if len(known) == 0 or bool((at >= len(known)).any()) or bool((known[at] != wanted).any()):
        raise BeyondError
    return at


def _parts(index: Any) -> tuple[Any, Any, Any] | None:
    """Rows, positions and tokens of an index, or None where only a tensor can say."""
    parts = list(index) if isinstance(index, tuple) else [index]
    dots = [i for i, part in enumerate(parts) if part is Ellipsis]
    if dots:
        missing = 3 - (len(parts) - 1)
        parts[dots[0] : dots[0] + 1] = [slice(None)] * max(0, missing)
    parts += [slice(None)] * (3 - len(parts))
    plain = all(isinstance(part, (int, slice, list, range, Tensor)) for part in parts)
    masks = any(isinstance(part, Tensor) and part.dtype == torch.bool for part in parts)
    lists = any(isinstance(part, (list, range)) and not _integers(part) for part in parts)
    if len(parts) != 3 or not plain or masks or lists or any(isinstance(p, bool) for p in parts):
        return None
    return parts[0], parts[1], parts[2]


def _integers(part: Sequence[Any]) -> bool:
    return all(isinstance(i, int) and not isinstance(i, bool) for i in part)


def _picked(part: Any, size: int) -> tuple[Tensor, Any]:
    """What of an axis an index picks, sorted, and the same index into just that."""
    if isinstance(part, int):
        if not -size <= part < size:
            msg = f"index {part} is out of bounds for dimension with size {size}"
            raise IndexError(msg)
        return torch.tensor([part % size]), 0
    if isinstance(part, slice):
        return torch.arange(size)[part], slice(None)
    wanted = torch.as_tensor(part if isinstance(part, Tensor) else list(part)).long()
    if wanted.numel() and not (-size <= int(wanted.min()) and int(wanted.max()) < size):
        msg = f"index is out of bounds for dimension with size {size}"
        raise IndexError(msg)
    values, place = (wanted % size).unique(return_inverse=True)
    return values.cpu(), place


def _whole(value: Any) -> Any:
    """Logits in lists and tuples as tensors."""
    if isinstance(value, Logits):
        return value.whole()
    if isinstance(value, (tuple, list)):
        return type(value)(_whole(part) for part in value)
    return value
