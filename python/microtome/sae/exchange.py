"""What the ranks of a sharded SAE tell each other: rows, sums in a fixed order, numbers, errors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from microtome import errors
from microtome.errors import DistributedError, MicrotomeError

T = TypeVar("T")
_ALIGN = 8  # bytes: every piece of a message begins where any dtype may
_TEXT = 2048  # bytes of an error's message
# Renamed in torch 2.13, where the old name warns.
_all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Alone:
    """A run of one process: errors are raised where they happen."""

    rank, size = 0, 1
    first = True
    agreed = True

    def attempt(self, make: Callable[[], T], otherwise: Callable[[], T]) -> T:
        """`make()`."""
        del otherwise
        return make()

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Nothing is held."""
        yield

    @contextmanager
    def together(self) -> Iterator[None]:
        """There is nobody to wait for."""
        yield

    def listen(self, interrupted: Callable[[], bool]) -> None:
        """Ctrl-C is asked for in `stops`."""

    def stops(self, interrupted: bool) -> bool:
        """Whether to stop after this step."""
        return interrupted

    def copy_from_first_(self, tensor: Tensor) -> None:
        """There is only one."""


ALONE = Alone()


class Ranks:
    """The ranks that hold one SAE between them.

    Every method but `hold` and `attempt` is a collective: all ranks call it in the same order. An
    error of one rank is held until the next `gather` that is read, which raises it on all of them
    with the same message: so no rank waits for one that has given up.

    Args:
        group: the process group of the mesh's "feature" dimension.
        device: where the tensors are.

    Attributes:
        rank, size: this rank's number, and how many there are.
        error: this rank's error that the others have not been told of.
        agreed: whether an interrupt is one that every rank knows of.
        received: bytes that came from other ranks so far.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        self.group, self.device = group, device
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.error: Exception | None = None
        self.agreed = False
        self.received = 0
        self._interrupted: Callable[[], bool] = lambda: False

    @property
    def first(self) -> bool:
        """Whether this rank logs, shows the bar and writes what is written once."""
        return self.rank == 0

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Keep an error of local work until the next exchange. The first one counts."""
        try:
            yield
        except Exception as error:
            if self.error is None:
                self.error = error

    def attempt(self, make: Callable[[], T], otherwise: Callable[[], T]) -> T:
        """`make()`, or `otherwise()` where that fails or this rank holds an error already."""
        if self.error is None:
            with self.hold():
                return make()
        return otherwise()

    @contextmanager
    def together(self) -> Iterator[None]:
        """Local work that is done only when it is done on every rank."""
        with self.hold():
            yield
        self.gather()

    def listen(self, interrupted: Callable[[], bool]) -> None:
        """Tell the others with every exchange whether this rank was asked to stop."""
        self._interrupted, self.agreed = interrupted, False

    def stops(self, interrupted: bool) -> bool:
        """Whether to stop after this step: what the ranks said in its exchange, not since."""
        del interrupted
        return self.agreed

    def gather(
        self, *tensors: Tensor, numbers: Tensor | None = None, read: bool = True
    ) -> tuple[list[list[float]], list[Tensor]]:
        """Every rank's tensors, in one message.

        Args:
            *tensors: of the same shapes and dtypes on every rank.
            numbers: [h] float64 that the host is to know.
            read: look for errors, and bring the numbers; on a GPU that waits for it.

        Returns:
            numbers [size][h], empty unless read; and for each tensor [size, *shape].

        Raises:
            MicrotomeError: a rank held an error; the same on every rank.
        """
        flags = torch.tensor(
            [self.error is not None, self._interrupted()], dtype=torch.float64, device=self.device
        )
        head = flags if numbers is None else torch.cat([flags, numbers.double()])
        stacked = self._all_gather([head, *tensors])
        if not read:
            return [], stacked[1:]
        heads = stacked[0].tolist()
        if any(row[0] for row in heads):
            self._raise()
        self.agreed = self.agreed or any(row[1] for row in heads)
        return [row[2:] for row in heads], stacked[1:]

    def sum_rows(self, partial: Tensor) -> Tensor:
        """This rank's rows of the sum of all ranks' [n, d], added in the order of the ranks.

        Returns:
            [rows of this rank, d], see `rows_of`; its bits do not depend on which rank adds.
        """
        n, d = partial.shape
        each = -(-n // self.size)
        sent = torch.nn.functional.pad(partial, (0, 0, 0, each * self.size - n))
        parts = torch.empty_like(sent)
        dist.all_to_all_single(parts, sent.contiguous(), group=self.group)
        self.received += parts.nbytes // self.size * (self.size - 1)
        total, *others = parts.view(self.size, each, d)
        for part in others:
            total += part
        rows = self.rows_of(n)
        return total[: rows.stop - rows.start]

    def all_rows(self, block: Tensor, n: int, *, read: bool = True) -> Tensor:
        """[n, d] of the ranks' blocks of rows."""
        each = -(-n // self.size)
        block = torch.nn.functional.pad(block, (0, 0, 0, each - len(block)))
        _, (blocks,) = self.gather(block, read=read)
        return blocks.reshape(each * self.size, -1)[:n]

    def rows_of(self, n: int) -> slice:
        """Which of n rows this rank adds up: blocks of n / size, rounded up, in rank order."""
        each = -(-n // self.size)
        return slice(min(n, self.rank * each), min(n, (self.rank + 1) * each))

    def collect(self, tensor: Tensor, counts: list[int]) -> Tensor | None:
        """All ranks' rows [counts[rank], ...] below each other on the first rank; else None."""
        most = max(counts)
        short = tensor.new_zeros(most - len(tensor), *tensor.shape[1:])
        sent = torch.cat([tensor, short]) if len(short) else tensor.contiguous()
        parts = [torch.empty_like(sent) for _ in counts] if self.first else None
        source = dist.get_global_rank(self.group, 0)
        dist.gather(sent, parts, dst=source, group=self.group)
        if parts is None:
            return None
        self.received += sent.nbytes * (self.size - 1)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    def copy_from_first_(self, tensor: Tensor) -> None:
        """Give every rank the first rank's numbers, in place."""
        dist.broadcast(tensor, dist.get_global_rank(self.group, 0), group=self.group)

    def _all_gather(self, tensors: list[Tensor]) -> list[Tensor]:
        pieces, places, size = [], [], 0
        for tensor in tensors:
            raw = tensor.contiguous().flatten().view(torch.uint8)
            places.append((size, size + len(raw)))
            raw = torch.nn.functional.pad(raw, (0, -len(raw) % _ALIGN))
            pieces.append(raw)
            size += len(raw)
        sent = torch.cat(pieces)
        came = torch.empty(self.size * size, dtype=torch.uint8, device=sent.device)
        _all_gather_single(came, sent, group=self.group)
        self.received += size * (self.size - 1)
        table = came.view(self.size, size)
        return [
            table[:, begin:end].view(tensor.dtype).reshape(self.size, *tensor.shape)
            for tensor, (begin, end) in zip(tensors, places, strict=True)
        ]

    def _raise(self) -> None:
        """Tell each other the errors, and raise one of them: the same on every rank."""
        mine, self.error = self.error, None
        text = _packed(mine).to(self.device)
        told = [_unpacked(row) for row in self._all_gather([text])[0].cpu()]
        failed = [(rank, said) for rank, said in enumerate(told) if said is not None]
        rank, (kind, late, message) = failed[0]
        if len(failed) < self.size or len({said for _, said in failed}) > 1:
            message = f"rank {rank}: {message}"
        if mine is not None and not isinstance(mine, MicrotomeError):
            raise mine  # its own kind tells more than ours, and its traceback is here
        error = kind(message)
        error.late, error.agreed = late, True
        raise error from mine


def _packed(error: Exception | None) -> Tensor:
    """An error as bytes: no pickle goes from rank to rank."""
    out = torch.zeros(_TEXT, dtype=torch.uint8)
    if error is not None:
        known = isinstance(error, MicrotomeError)
        kind = type(error).__name__ if known else DistributedError.__name__
        message = str(error) if known else f"{type(error).__name__}: {error}"
        late = "late" if getattr(error, "late", False) else ""
        raw = "\0".join((kind, late, message)).encode()[:_TEXT]
        out[: len(raw)] = torch.frombuffer(bytearray(raw), dtype=torch.uint8)
    return out


def _unpacked(row: Tensor) -> tuple[type[MicrotomeError], bool, str] | None:
    raw = bytes(row.tolist()).rstrip(b"\0")
    if not raw:
        return None
    kind, late, message = raw.decode(errors="replace").split("\0", 2)
    found: Any = getattr(errors, kind, None)
    known = isinstance(found, type) and issubclass(found, MicrotomeError)
    return found if known else DistributedError, bool(late), message
