"""How benchmarks/on_gpu times a call on a card, with torch.cuda replaced by a stand-in."""

from __future__ import annotations

import contextlib
import importlib
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
# Only `benchmarks` is wanted from the root, so the root does not stay on the path.
sys.path.insert(0, str(ROOT))
importlib.import_module("benchmarks")
sys.path.remove(str(ROOT))

from benchmarks.on_gpu.device import Device, Timing  # noqa: E402


class Card:
    """torch.cuda as far as Device uses it, on the processor; a graph is a list of nothing.

    Like torch's, a capture that fails does not give back the stream that was current.
    """

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            self.at = 0.0

        def record(self) -> None:
            self.at = time.perf_counter()

        def synchronize(self) -> None:
            pass

        def elapsed_time(self, other: Card.Event) -> float:
            return 1e3 * (other.at - self.at)

    class Stream:
        def wait_stream(self, other: object) -> None:
            pass

    class CUDAGraph:
        def replay(self) -> None:
            pass

    def __init__(self, captures: bool = True) -> None:
        self.captures = captures
        self.synchronize = self.empty_cache = self.reset_peak_memory_stats = lambda: None
        self.stream_now, self.slept = Card.Stream(), []
        self.current_stream, self._sleep = lambda: self.stream_now, self.slept.append
        self.stream = lambda _: contextlib.nullcontext()
        self.memory_allocated, self.max_memory_allocated = lambda: 2**20, lambda: 3 * 2**20
        self.mem_get_info = lambda: (5 * 2**30, 80 * 2**30)

    def set_stream(self, stream: Card.Stream) -> None:
        self.stream_now = stream

    @contextlib.contextmanager
    def graph(self, _: object) -> Any:
        if not self.captures:
            self.stream_now = Card.Stream()
            msg = "operation not permitted when stream is capturing"
            raise RuntimeError(msg)
        yield

    def get_device_properties(self, _: int) -> Any:
        return SimpleNamespace(
            name="a card", major=9, minor=0, multi_processor_count=132, total_memory=80 * 2**30,
            L2_cache_size=50 * 2**20,
        )  # fmt: skip


@pytest.mark.parametrize("captures", [True, False])
def test_what_times_on_a_card_does_so(captures: bool, monkeypatch: Any) -> None:
    card = Card(captures)
    stream = card.stream_now
    monkeypatch.setattr(torch, "cuda", card)
    monkeypatch.setattr(Device, "torch", torch.device("cpu"))
    monkeypatch.setattr("benchmarks.on_gpu.device.FLUSH", 4096)
    device, calls = Device(dry=False), []
    timing = device.time(lambda: calls.append(1))
    assert len(timing.rounds) == 2
    # two to warm up, one to see how long it takes, three more, two rounds, the wall clock
    in_graph = 1 + (20 if captures else 0)
    assert len(calls) == 2 + 1 + 3 + 2 * 20 + 20 + in_graph
    assert timing.figures()["ms"] == timing.ms
    assert (timing.graph_ms is None) == (not captures)
    assert card.current_stream() is stream
    assert timing.graph_why == ("" if captures else f"RuntimeError: {'operation not permitted'}"
                                " when stream is capturing")  # fmt: skip
    assert device.peak(lambda: None) == 2.0
    assert (device.gib_free(), device.cache_bytes, device.healthy()) == (5.0, 50 * 2**20, True)
    assert device.describe()["name"] == "a card"


def test_the_card_waits_until_the_host_has_enqueued_a_call(monkeypatch: Any) -> None:
    card, device = Card(), Device(dry=False)
    monkeypatch.setattr(torch, "cuda", card)
    monkeypatch.setattr(Device, "torch", torch.device("cpu"))
    monkeypatch.setattr("benchmarks.on_gpu.device.FLUSH", 4096)
    device.time(lambda: time.sleep(0.004), most=3)
    assert min(card.slept) >= 1.5 * 4 * 2_000_000
    device.time(lambda: None, most=3)
    assert card.slept[-1] == 2_000_000


def test_rounds_that_are_far_apart_show_as_spread() -> None:
    timing = Timing([1.0, 1.5], [0.9, 1.6], 2.0)
    assert (timing.ms, timing.spread) == (1.25, 0.5)
