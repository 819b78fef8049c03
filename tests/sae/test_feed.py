"""The way of a batch to the device, with a lane of paper in the place of a GPU's."""

import threading
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from microtome.sae.feed import AHEAD, Feed, GpuLane, Sent

CPU = torch.device("cpu")


class PaperLane:
    """Copies when received, and notes what was sent, and by which thread."""

    def __init__(self) -> None:
        self.sent: list[Tensor] = []
        self.threads: set[int] = set()
        self.enough = threading.Event()

    def send(self, x: Tensor) -> Sent:
        self.sent.append(x)
        self.threads.add(threading.get_ident())
        if len(self.sent) > AHEAD:
            self.enough.set()
        return Sent(x, None)

    def receive(self, sent: Sent) -> Tensor:
        return sent.batch.double()


class Numbers(Iterator[Tensor]):
    """Batches 0, 1, ... up to `last`, then an error."""

    def __init__(self, last: int = 10**6) -> None:
        self.next, self.last, self.closed = 0, last, False

    def __next__(self) -> Tensor:
        if self.next > self.last:
            msg = "shard 3 is damaged"
            raise OSError(msg)
        self.next += 1
        return torch.full((2, 3), float(self.next - 1))

    def close(self) -> None:
        self.closed = True


def test_batches_come_in_order_and_in_the_dtype_of_training():
    batches = Numbers()
    feed = Feed(batches, CPU, torch.float64)
    got = [next(feed) for _ in range(3)]
    assert [float(x[0, 0]) for x in got] == [0.0, 1.0, 2.0]
    assert got[0].dtype == torch.float64
    assert batches.next == 3  # a CPU reads nothing early: the source does
    feed.close()
    assert batches.closed


def test_another_thread_sends_so_many_ahead_and_no_more():
    lane = PaperLane()
    feed = Feed(Numbers(), CPU, torch.float64, lane)
    assert [float(next(feed)[0, 0]) for _ in range(2)] == [0.0, 1.0]
    assert lane.enough.wait(10)
    feed.close()
    assert threading.get_ident() not in lane.threads
    assert 2 < len(lane.sent) <= 2 + AHEAD


def test_an_error_of_the_source_comes_in_its_turn():
    feed = Feed(Numbers(last=1), CPU, torch.float64, PaperLane())
    assert [float(next(feed)[0, 0]) for _ in range(2)] == [0.0, 1.0]
    with pytest.raises(OSError, match="shard 3 is damaged"):
        next(feed)
    feed.close()


def test_closing_ends_the_thread_and_the_batches():
    batches = Numbers()
    feed = Feed(batches, CPU, torch.float64, PaperLane())
    next(feed)
    feed.close()
    assert batches.closed
    assert not [t for t in threading.enumerate() if t.name == "microtome-prefetch"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_gets_the_same_numbers_as_by_a_plain_copy():
    device = torch.device("cuda", torch.cuda.current_device())
    data = [torch.randn(512, 256) for _ in range(20)]
    feed = Feed(iter(data), device, torch.bfloat16, GpuLane(device, torch.bfloat16))
    for x in data:
        moved = next(feed)
        torch.ones(1 << 20, device=device).cumsum(0)  # something for the copy to overtake
        assert torch.equal(moved, x.to(device).bfloat16())
    feed.close()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_batch_that_a_gpu_is_still_making_is_not_overtaken_by_its_cast():
    device = torch.device("cuda", torch.cuda.current_device())

    def made() -> Iterator[Tensor]:
        for i in range(10):
            slow = torch.ones(1 << 22, device=device).cumsum(0)
            yield (slow[: 512 * 256] * 0 + i).view(512, 256)

    feed = Feed(made(), device, torch.bfloat16, GpuLane(device, torch.bfloat16))
    for i in range(10):
        assert bool((next(feed) == i).all())
    feed.close()
