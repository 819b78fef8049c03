"""Checks whose answer is still on its way from the GPU: nobody waits for it where it is asked for.

A `_look.Look` reduces what an op was given to a place on the device: where the first number is that
is not finite, or the first index out of range. The place is copied to pinned host memory behind an
event. Whoever comes by next looks at the events that have passed: the next op on that device,
`synchronize`, and the interpreter's end, which only warns. On the CPU, in Triton's interpreter,
inside `check_now` and with MICROTOME_SYNC_CHECKS=1 every check is made at once and raises there.
"""

from __future__ import annotations

import atexit
import os
import threading
import warnings
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from microtome.errors import MicrotomeError

LIMIT = 256  # checks that may wait for one device; beyond, the oldest is waited for


class Event(Protocol):
    """What is needed of torch.cuda.Event."""

    def query(self) -> bool:
        """Whether the device has passed it."""

    def synchronize(self) -> None:
        """Wait until it has."""


class Gpu:
    """All that a later check needs of a device; tests put another in its place."""

    def waits(self, device: torch.device) -> bool:
        """Whether reading a number back from this device would wait."""
        return device.type == "cuda"

    def capturing(self) -> bool:
        """Whether a CUDA graph is being captured, in which nothing can be read back."""
        return torch.cuda.is_current_stream_capturing()

    def fetch(self, tensors: list[Tensor]) -> tuple[list[Tensor], Event]:
        """Start copies to the host, and record an event after them."""
        device = tensors[0].device
        with torch.cuda.device(device):
            copies = [
                torch.empty(t.shape, dtype=t.dtype, pin_memory=True).copy_(t, non_blocking=True)
                for t in tensors
            ]
            event: Event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(torch.cuda.current_stream(device))  # type: ignore[attr-defined]
        return copies, event


class Piece(NamedTuple):
    """What one input's rows were looked at for."""

    name: str
    rows: int
    kind: type[MicrotomeError]
    what: str  # "x holds NaN or infinity"


class Check(NamedTuple):
    """A question on its way: the first bad row of all, if there is one.

    Attributes:
        op: the op's name.
        device: where it ran.
        pieces: its inputs; their rows are counted through.
        answer: [1] 0 or NaN, and [1] the row where it is NaN, once the event has passed.
        event: comes after the answer.
    """

    op: str
    device: torch.device
    pieces: tuple[Piece, ...]
    answer: list[Tensor]
    event: Event

    def error(self) -> MicrotomeError | None:
        """The error that the answer stands for; only once the event has passed."""
        value, place = self.answer
        if float(value) == 0.0:
            return None
        row = int(place)
        for piece in self.pieces:
            if row < piece.rows:
                break
            row -= piece.rows
        msg = (
            f"{self.op}: {piece.what} in row {row}, the first such row, in an earlier call on "
            f"{self.device}: what it returned, and what was made of it, is not to be trusted. Use "
            "microtome.check_now() or MICROTOME_SYNC_CHECKS=1 to raise in the call itself."
        )
        error = piece.kind(msg)
        error.late = True
        return error


gpu = Gpu()
_lock = threading.Lock()
_waiting: dict[torch.device, deque[Check]] = {}
_now: list[None] = []  # process-wide, as use_backend


def immediate(device: torch.device) -> bool:
    """Whether a check of tensors of this device is to be made at once."""
    demanded = bool(_now) or os.environ.get("MICROTOME_SYNC_CHECKS", "") not in ("", "0")
    return not gpu.waits(device) or (demanded and not gpu.capturing())


def wait_for(check: Check) -> None:
    """Put a check among those that wait for their answer."""
    with _lock:
        queue = _waiting.setdefault(check.device, deque())
        queue.append(check)
        oldest = queue[0] if len(queue) > LIMIT else None
    if oldest is not None:
        oldest.event.synchronize()
        raise_finished(check.device)


def raise_finished(device: torch.device) -> None:
    """Raise the first error among the checks of a device that have been answered.

    The answered ones are forgotten. Every op comes by here first, so it must cost next to nothing.
    """
    if not _waiting.get(device) or gpu.capturing():
        return
    first, others = None, 0
    for error in _answered(device):
        first, others = (error, others) if first is None else (first, others + 1)
    if first is None:
        return
    if others:
        first.args = (f"{first} {others} later calls were wrong, too.",)
    raise first


def _answered(device: torch.device) -> list[MicrotomeError]:
    """Errors of the checks that were answered, oldest first; they are forgotten."""
    errors: list[MicrotomeError] = []
    while True:
        with _lock:  # another thread's op may be looking, too
            queue = _waiting.get(device)
            if not queue or not queue[0].event.query():
                return errors
            check = queue.popleft()
        error = check.error()
        if error is not None:
            errors.append(error)


def synchronize(device: torch.device | str | None = None) -> None:
    """Wait for all checks that are on their way from a GPU, and raise what they found.

    Args:
        device: the device, or None for all.

    Raises:
        NonFiniteError, ArgumentError: an earlier op was given NaN, infinity, or an index out of
            range; the message names the op, the input and the row.

    Example:
        >>> import microtome as mt
        >>> mt.synchronize()  # on a CPU nothing is ever on its way
    """
    for one in list(_waiting):
        if device is not None and not _same(torch.device(device), one):
            continue
        with _lock:
            last = list(_waiting.get(one, ()))
        for check in last:
            check.event.synchronize()
        raise_finished(one)


def _same(asked: torch.device, device: torch.device) -> bool:
    """Whether a device is the one asked for; "cuda" asks for all of them."""
    return asked.type == device.type and asked.index in (None, device.index)


@contextmanager
def check_now() -> Iterator[None]:
    """Inside the block every op checks its inputs before it returns, on a GPU as on a CPU.

    Costs a wait for the GPU at every op: for finding which call went wrong. MICROTOME_SYNC_CHECKS=1
    in the environment does the same everywhere. Process-wide, like `use_backend`.

    Example:
        >>> import microtome as mt
        >>> with mt.check_now():
        ...     pass
    """
    _now.append(None)
    try:
        yield
    finally:
        _now.pop()


def _warn_at_exit() -> None:
    """What nobody came by to raise."""
    for device in list(_waiting):
        for error in _answered(device):
            warnings.warn(str(error), RuntimeWarning, stacklevel=2)


atexit.register(_warn_at_exit)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_waiting.clear)  # the parent's GPU is not the child's
