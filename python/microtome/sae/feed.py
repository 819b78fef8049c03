"""Batches where the SAE is: on a GPU the next ones are on their way while a step runs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from microtome.errors import ArgumentError
from microtome.models.batches import Prefetched

AHEAD = 2  # batches on their way; each takes its bytes of pinned memory and of the GPU's


class Sent(NamedTuple):
    """A batch whose copy has been asked for."""

    batch: Tensor
    done: torch.cuda.Event | None


class Lane(Protocol):
    """A way from the host to a device, used by one thread at each end."""

    def send(self, x: Tensor) -> Sent:
        """Ask for a copy of x in the dtype of training, and do not wait for it."""
        ...

    def receive(self, sent: Sent) -> Tensor:
        """The copy, which what is launched from now on may read."""
        ...


class GpuLane:
    """Through pinned memory, on a stream of its own.

    Args:
        device: a CUDA device.
        dtype: of the batches there.

    The host copies the whole batch into pinned memory, which belongs to another thread than the one
    that launches kernels. The bytes cross in the dtype they are read in.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self.stream = torch.cuda.Stream(device)

    def send(self, x: Tensor) -> Sent:
        """Ask for a copy of x in the dtype of training, and do not wait for it."""
        if x.is_cuda:  # made on this thread's stream, which the lane's would overtake
            batch = x.to(self.device, self.dtype)
            return Sent(batch, torch.cuda.current_stream(self.device).record_event())
        with torch.cuda.stream(self.stream):
            if x.device.type == "cpu":
                x = x.pin_memory()  # given back to torch's cache, which minds the stream
            batch = x.to(self.device, non_blocking=True).to(self.dtype)
            return Sent(batch, self.stream.record_event())

    def receive(self, sent: Sent) -> Tensor:
        """The copy, which what is launched from now on may read."""
        now = torch.cuda.current_stream(self.device)
        if sent.done is not None:
            now.wait_event(sent.done)
        sent.batch.record_stream(now)
        return sent.batch


class Feed(Iterator[Tensor]):
    """`batches`, moved to a device and a dtype; on a GPU up to AHEAD of them early.

    Args:
        batches: of a source; closed with this one where they can be.
        device: where the SAE is.
        dtype: of the batches there.
        lane: of a GPU; made here unless a test brings one.

    An exception of `batches` is raised by `next`, in its turn; that they end is one.
    """

    def __init__(
        self,
        batches: Iterator[Tensor],
        device: torch.device,
        dtype: torch.dtype,
        lane: Lane | None = None,
    ) -> None:
        self._batches, self._device, self._dtype = batches, device, dtype
        self._lane = GpuLane(device, dtype) if lane is None and device.type == "cuda" else lane
        self._early: Prefetched[Sent] | None = None
        if self._lane is not None:
            send = self._lane.send
            self._early = Prefetched(lambda _: send(self._read()), 0, AHEAD)

    def _read(self) -> Tensor:
        try:
            return next(self._batches)
        except StopIteration:
            msg = "train: activations.batches() ended before the training did. It must yield "
            msg += "batches without end: when all rows were used, start again in another order."
            raise ArgumentError(msg) from None

    def __next__(self) -> Tensor:
        if self._early is None or self._lane is None:
            return self._read().to(self._device, self._dtype)
        return self._lane.receive(next(self._early))

    def close(self) -> None:
        """End the thread, then the batches."""
        if self._early is not None:
            self._early.close()
        close = getattr(self._batches, "close", None)
        if close is not None:
            close()
