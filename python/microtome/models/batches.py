"""Shuffled batches of a store: an order that only the seed decides, read ahead by a thread."""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

import torch
from torch import Tensor

from microtome._seed import generator

T = TypeVar("T")


class RowOrder:
    """The order in which rows are visited: each epoch a fresh permutation.

    The rows are cut into blocks of neighbours (the shards); an epoch takes the blocks in random
    order, joins them into windows of about `window_rows` rows, and permutes the rows of each
    window. Where all rows fit one window that is a permutation of everything.

    Args:
        blocks: (start, stop) of each block, in rows.
        seed: the user's seed.
        window_rows: rows shuffled together; a window holds at least one block.
    """

    def __init__(self, blocks: list[tuple[int, int]], seed: int, window_rows: int) -> None:
        self.blocks, self.seed, self.window_rows = blocks, seed, window_rows
        self.n = sum(stop - start for start, stop in blocks)
        self._held: tuple[int, int, Tensor] | None = None

    def batch(self, i: int, size: int) -> Tensor:
        """Row numbers [size] of batch i, from entry i * size on of the epochs laid end to end."""
        position, left, parts = i * size, size, []
        while left:
            epoch, offset = divmod(position, self.n)
            part = self._from(epoch, offset)[:left]
            parts.append(part)
            position, left = position + len(part), left - len(part)
        return torch.cat(parts)

    def _from(self, epoch: int, offset: int) -> Tensor:
        """The rest of the window that covers entry `offset` of an epoch, from there on."""
        start = 0
        for w, window in enumerate(self._windows(epoch)):
            length = sum(b - a for a, b in window)
            if offset < start + length:
                return self._permuted(epoch, w, window)[offset - start :]
            start += length
        raise IndexError(offset)

    def _windows(self, epoch: int) -> Iterator[list[tuple[int, int]]]:
        shuffled = torch.randperm(
            len(self.blocks), generator=generator(self.seed, "blocks", epoch)
        ).tolist()
        window: list[tuple[int, int]] = []
        held = 0
        for b in shuffled:
            start, stop = self.blocks[b]
            if window and held + stop - start > self.window_rows:
                yield window
                window, held = [], 0
            window.append((start, stop))
            held += stop - start
        yield window

    def _permuted(self, epoch: int, w: int, window: list[tuple[int, int]]) -> Tensor:
        if self._held is None or self._held[:2] != (epoch, w):
            rows = torch.cat([torch.arange(start, stop) for start, stop in window])
            mixed = torch.randperm(len(rows), generator=generator(self.seed, "rows", epoch, w))
            self._held = (epoch, w, rows[mixed])
        return self._held[2]


class Prefetched(Iterator[T], Generic[T]):
    """Endless `make(start), make(start + 1), ...`, computed by a thread up to `ahead` items early.

    An exception in the thread is raised by `next`. The thread ends when the iterator is closed or
    collected: it holds no reference to it. With ahead=0 there is no thread.
    """

    def __init__(self, make: Callable[[int], T], start: int, ahead: int) -> None:
        self._make, self._next = make, start
        self._error: BaseException | None = None
        self._closed = False
        self._thread: threading.Thread | None = None
        if ahead:
            self._ready: queue.SimpleQueue[T | BaseException] = queue.SimpleQueue()
            self._room = threading.Semaphore(ahead)
            stop = threading.Event()
            arguments = (make, start, self._ready, self._room, stop)
            self._thread = threading.Thread(
                target=_produce, args=arguments, name="microtome-prefetch", daemon=True
            )
            self._end = weakref.finalize(self, _end, stop, self._room)
            self._thread.start()

    def __iter__(self) -> Prefetched[T]:
        return self

    def __next__(self) -> T:
        if self._error is not None:
            raise self._error
        if self._closed:
            raise StopIteration
        if self._thread is None:
            self._next += 1
            return self._make(self._next - 1)
        item = self._ready.get()
        if isinstance(item, BaseException):
            self._error = item
            raise item
        self._room.release()
        return item

    def close(self) -> None:
        """End the thread and wait for it; `next` then stops."""
        self._closed = True
        if self._thread is not None:
            self._end()
            self._thread.join()


def _produce(
    make: Callable[[int], T],
    i: int,
    ready: queue.SimpleQueue[T | BaseException],
    room: threading.Semaphore,
    stop: threading.Event,
) -> None:
    while True:
        room.acquire()
        if stop.is_set():
            return
        try:
            ready.put(make(i))
        except BaseException as error:  # handed to the consumer, which raises it
            ready.put(error)
            return
        i += 1


def _end(stop: threading.Event, room: threading.Semaphore) -> None:
    stop.set()
    room.release()
