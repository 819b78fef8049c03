"""What the ranks of a sharded SAE agree on: errors, interrupts, numbers that all must see."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

from microtome import errors
from microtome.errors import DistributedError, MicrotomeError
from microtome.sae.exchange import Line

T = TypeVar("T")
_TEXT, _END = 2048, b"\1"  # bytes of an error's message, and its last one


class Alone:
    """A run of one process: errors are raised where they happen."""

    number, first = 0, True
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
    """The ranks that hold one SAE between them: a row of them, or several rows that hold it each.

    All ranks call `gather`, `together` and `copy_from_first_` in the same order. An error of one
    rank is held until the next `gather` that is read, which raises it on all of them with the same
    message: so no rank waits for one that has given up.

    Args:
        features: the ranks of this row, which share the features out.
        rows: the ranks that hold the same features, which share the batch out; None for one row.
        everyone: all ranks, row after row; `features` itself for one row.
        device: where the tensors are.

    Attributes:
        rank, size: this rank's number in its row, and how many a row has.
        number: this rank's number among all.
        error: this rank's error that the others have not been told of.
        agreed: whether an interrupt is one that every rank knows of.
    """

    def __init__(
        self, features: Line, rows: Line | None, everyone: Line, device: torch.device
    ) -> None:
        self.features, self.rows, self.everyone, self.device = features, rows, everyone, device
        self.rank, self.size, self.number = features.rank, features.size, everyone.rank
        self.error: Exception | None = None
        self.agreed = False
        self._interrupted: Callable[[], bool] = lambda: False

    @property
    def first(self) -> bool:
        """Whether this rank logs, shows the bar and writes what is written once."""
        return self.number == 0

    @property
    def in_first_row(self) -> bool:
        """Whether this rank writes its features."""
        return self.rows is None or self.rows.rank == 0

    @property
    def received(self) -> int:
        """Bytes that came from other ranks so far."""
        lines = {id(line): line for line in (self.features, self.rows, self.everyone) if line}
        return sum(line.received for line in lines.values())

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
        self, *tensors: Tensor, numbers: Tensor | None = None
    ) -> tuple[list[list[float]], list[Tensor]]:
        """The tensors of this row, and the numbers of all ranks; errors are raised.

        One message where there is one row. The host reads it: on a GPU that waits for it.

        Args:
            *tensors: of the same shapes and dtypes on every rank of the row.
            numbers: [h] float64 that the host is to know.

        Returns:
            numbers by rank, row after row, [ranks][h]; and for each tensor [size, *shape].

        Raises:
            MicrotomeError: a rank held an error; the same on every rank.
        """
        flags = torch.tensor(
            [self.error is not None, self._interrupted()], dtype=torch.float64, device=self.device
        )
        head = flags if numbers is None else torch.cat([flags, numbers.double()])
        if self.everyone is self.features:
            table, *stacked = self.features.gather(head, *tensors)
        else:
            stacked = self.features.gather(*tensors) if tensors else []
            (table,) = self.everyone.gather(head)
        heads = table.tolist()
        if any(row[0] for row in heads):
            self._raise()
        self.agreed = self.agreed or any(row[1] for row in heads)
        return [row[2:] for row in heads], stacked

    def copy_from_first_(self, tensor: Tensor) -> None:
        """Give every rank the first rank's numbers, in place."""
        self.everyone.copy_from_first_(tensor)

    def _raise(self) -> None:
        """Tell each other the errors, and raise one of them: the same on every rank."""
        mine, self.error = self.error, None
        text = _packed(mine).to(self.device)
        told = [_unpacked(row) for row in self.everyone.gather(text)[0].cpu()]
        failed = [(rank, said) for rank, said in enumerate(told) if said is not None]
        rank, (kind, late, message) = failed[0]
        if len(failed) < len(told) or len({said for _, said in failed}) > 1:
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
        raw = "\0".join((kind, late, message)).encode()[: _TEXT - 1] + _END
        out[: len(raw)] = torch.frombuffer(bytearray(raw), dtype=torch.uint8)
    return out


def _unpacked(row: Tensor) -> tuple[type[MicrotomeError], bool, str] | None:
    raw = bytes(row.tolist()).rstrip(b"\0")
    if not raw:
        return None
    kind, late, message = raw.removesuffix(_END).decode(errors="replace").split("\0", 2)
    found: Any = getattr(errors, kind, None)
    known = isinstance(found, type) and issubclass(found, MicrotomeError)
    return found if known else DistributedError, bool(late), message


def fingerprint(x: Tensor) -> Tensor:
    """A float64 made of all bits of x, whatever the order in which they are added up."""
    words = {8: torch.int64, 4: torch.int32, 2: torch.int16}[x.element_size()]
    total = x.contiguous().view(words).sum(dtype=torch.int64)
    return total.remainder(2**52).double()


def same_rows(op: str, seen: list[float]) -> None:
    """Raise unless all ranks were given the same rows."""
    for rank, one in enumerate(seen):
        if one != seen[0]:
            msg = f"{op}: rank {rank} was given other rows than rank 0. Every rank reads every "
            msg += "batch: use the same activations and seed."
            raise DistributedError(msg)
