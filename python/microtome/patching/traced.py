"""Logits that are computed where a metric looks: any callable pays for what it reads alone.

The metric is called on the unpatched run first, which records the positions and tokens it reads.
Patched runs are computed there, and the metric reads them from a table. If it ever reads anything
else, for its reads may depend on the numbers, or writes into what it reads twice, `BeyondError`
tells, and all logits are computed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

# (positions [m], tokens [c] or None for all) -> [b, m, c]
Fetch = Callable[[Tensor, "Tensor | None"], Tensor]


class BeyondError(BaseException):
    """A metric did what only real logits can answer; its own `except Exception` does not see it."""


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


class Logits(Tensor):
    """Stands for logits [b, t, vocabulary]; an index computes just what it picks.

    It is a tensor without numbers of its own: whatever else is done to it is done to all of them,
    which are computed then, once. What it returns is a plain tensor and a copy, so nothing that a
    metric does in place reaches another cell; whether it reached all it should, `check` tells.

    Args:
        shape: (b, t, vocabulary).
        like: a tensor with their dtype and device.
        fetch: computes them.
    """

    _fetch: Fetch
    _all: Tensor | None
    _given: list[tuple[Tensor, int]]  # parts that were handed out, and their versions then

    @staticmethod
    def __new__(cls, shape: tuple[int, int, int], like: Tensor, fetch: Fetch) -> Logits:
        del fetch
        made: Logits = Tensor._make_wrapper_subclass(
            cls, shape, dtype=like.dtype, device=like.device
        )
        return made

    def __init__(self, shape: tuple[int, int, int], like: Tensor, fetch: Fetch) -> None:
        del shape, like
        self._fetch = fetch
        self._all = None
        self._given = []

    def whole(self) -> Tensor:
        """All of them."""
        if self._all is None:
            self._all = self._give(self._fetch(torch.arange(self.shape[1]), None))
        return self._all

    def check(self) -> None:
        """Raise BeyondError if something was written into one part while another was out.

        Parts of a tensor share its memory, and these do not.
        """
        if len(self._given) > 1 and any(_version(part) != was for part, was in self._given):
            raise BeyondError

    def _give(self, part: Tensor) -> Tensor:
        self._given.append((part, _version(part)))
        return part

    def __getitem__(self, index: Any) -> Any:
        parts = _parts(index)
        if parts is None or self._all is not None:  # all of them may have been written to
            return self.whole()[index]
        rows, positions, tokens = parts
        wanted, positions = _picked(positions, self.shape[1])
        some, tokens = _picked(tokens, self.shape[2])
        every = isinstance(tokens, slice) and len(some) == self.shape[2]
        part = self._fetch(wanted, None if every else some)
        return self._give(part[rows, positions, tokens])

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """What is known without the numbers, or any function of all of them."""
        if function in _KNOWN:
            with torch._C.DisableTorchFunctionSubclass():
                return function(*args, **(kwargs or {}))
        return cls.__torch_dispatch__(function, types, args, kwargs)

    @classmethod
    def __torch_dispatch__(
        cls, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Any function takes all of them, also where torch calls it itself."""
        del types
        args, kwargs = tree_map_only(Logits, Logits.whole, (tuple(args), kwargs or {}))
        return function(*args, **kwargs)


_KNOWN = frozenset(
    [getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "is_cuda")]
    + [Tensor.size, Tensor.dim, Tensor.numel, Tensor.__len__, Tensor.is_floating_point]
)


def reads_of(
    metric: Callable[[Any], Any], shape: tuple[int, int, int], like: Tensor, fetch: Fetch
) -> Reads:
    """What a metric reads of the unpatched run, which `fetch` computes.

    Args:
        metric: called once.
        shape: (b, t, vocabulary).
        like: a tensor with the logits' dtype and device.
        fetch: computes logits of the unpatched run.

    Raises:
        BeyondError: the metric needs real logits.
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

    logits = Logits(shape, like, record)
    metric(logits)
    logits.check()
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


def _version(part: Tensor) -> int:
    """Counts what was written in place; in inference mode nothing does."""
    return 0 if part.is_inference() else part._version


def _parts(index: Any) -> tuple[Any, Any, Any] | None:
    """Rows, positions and tokens of an index, or None where only a tensor can say."""
    parts = list(index) if isinstance(index, tuple) else [index]
    dots = [i for i, part in enumerate(parts) if part is Ellipsis]
    if dots:
        missing = 3 - (len(parts) - 1)
        parts[dots[0] : dots[0] + 1] = [slice(None)] * max(0, missing)
    parts += [slice(None)] * (3 - len(parts))
    if len(parts) != 3 or not all(map(_plain, parts)):
        return None
    return parts[0], parts[1], parts[2]


def _plain(part: Any) -> bool:
    """Whether a part of an index is integers or a slice, and no mask."""
    if isinstance(part, Tensor):
        return part.dtype in (torch.int64, torch.int32)
    if isinstance(part, (list, range)):
        return all(isinstance(i, int) and not isinstance(i, bool) for i in part)
    return isinstance(part, (int, slice)) and not isinstance(part, bool)


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
