"""The seam between the benchmark and the machine: a CUDA card, or a dry run on the processor.

A dry run takes every path at tiny sizes, so that nothing runs for the first time on a card that is
there for minutes. Its times are those of an interpreter, and are thrown away when rows are written.
"""

from __future__ import annotations

import gc
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from microtome import ops

Run = Callable[[], object]
FLUSH = 256 * 2**20  # bytes written between timed calls, so that none starts with a warm cache
CYCLES = 2_000_000  # of the card, in a millisecond at least
LEAST_AHEAD, MOST_AHEAD = 1.0, 20.0  # ms that the card waits while the host enqueues the timed call
SHORT_MS = 0.3  # below this a graph of calls is timed too


def wait_for_checks() -> None:
    """Raise what ops looked for without waiting, in builds that look so."""
    late = getattr(ops, "synchronize", None)
    if late is not None:
        late()


@dataclass(frozen=True)
class Timing:
    """One function's time.

    Attributes:
        rounds: medians of the rounds, in ms, on the device: the host is ahead where it can be.
        quartiles: first and third quartile of all calls, in ms.
        wall_ms: host clock of calls back to back, per call: what a loop in Python pays.
        graph_ms: per call in a replayed CUDA graph of calls with a warm cache; None where the call
            is long, or cannot be captured (`graph_why`).
    """

    rounds: list[float]
    quartiles: list[float]
    wall_ms: float
    graph_ms: float | None = None
    graph_why: str = ""

    @property
    def ms(self) -> float:
        """Median of the rounds' medians."""
        return statistics.median(self.rounds)

    @property
    def spread(self) -> float:
        """How far the rounds are apart, as a fraction of the quickest: less is noise."""
        return (max(self.rounds) - min(self.rounds)) / max(min(self.rounds), 1e-12)

    def figures(self) -> dict[str, Any]:
        """For the JSON."""
        return {
            "ms": self.ms,
            "spread": self.spread,
            "rounds": self.rounds,
            "quartiles": self.quartiles,
            "wall_ms": self.wall_ms,
            "graph_ms": self.graph_ms,
            "graph_why": self.graph_why,
        }


@dataclass
class Device:
    """A card, or the processor standing in for one.

    Attributes:
        dry: run on the processor, Triton interpreted, sizes tiny.
        spend: seconds that one round of one function should take.
    """

    dry: bool
    spend: float = 0.25
    _flush: Tensor | None = field(default=None, repr=False)

    @property
    def torch(self) -> torch.device:
        """Where tensors lie."""
        return torch.device("cpu" if self.dry else "cuda")

    def synchronise(self) -> None:
        """Wait for the card; raises what a kernel did wrong, and what an op found out late."""
        if not self.dry:
            torch.cuda.synchronize()
            wait_for_checks()

    def free(self) -> None:
        """Give back what Python and the caching allocator hold."""
        if not self.dry:
            gc.collect()
            torch.cuda.empty_cache()

    @property
    def cache_bytes(self) -> int:
        """Second-level cache."""
        return 0 if self.dry else torch.cuda.get_device_properties(0).L2_cache_size

    def gib_free(self) -> float:
        """Memory that can be had now."""
        return float("inf") if self.dry else torch.cuda.mem_get_info()[0] / 2**30

    def healthy(self) -> bool:
        """Whether the card still answers: after an illegal access nothing does, in this process."""
        try:
            self.synchronise()
            torch.ones(1, device=self.torch).sum().item()
        except RuntimeError:
            return False
        return True

    def time(self, run: Run, *, rounds: int = 2, most: int = 20) -> Timing:
        """Warm up, then time calls one by one in rounds.

        Args:
            run: what to time.
            rounds: how often the whole is done again.
            most: calls in a round, fewer where they are long, never below three.
        """
        if self.dry:
            ms = self._clock(run)
            return Timing([ms, ms], [ms, ms], ms, None, "a dry run")
        run()
        self.synchronise()
        ahead = self._ahead(run)
        first = max(self._event(run, ahead), 1e-3)
        count = int(min(max(self.spend * 1e3 / first, 3), most))
        for _ in range(min(3, count)):
            run()
        calls = [[self._event(run, ahead) for _ in range(count)] for _ in range(rounds)]
        flat = sorted(ms for part in calls for ms in part)
        quarter = (len(flat) - 1) / 4
        quartiles = [flat[round(quarter)], flat[round(3 * quarter)]]
        medians = [statistics.median(part) for part in calls]
        wall = self._wall(run, count)
        graph, why = self._graph(run) if statistics.median(medians) < SHORT_MS else (None, "long")
        return Timing(medians, quartiles, wall, graph, why)

    def _clock(self, run: Run) -> float:
        start = time.perf_counter()
        run()
        return 1e3 * (time.perf_counter() - start)

    def _ahead(self, run: Run) -> int:
        """Cycles for which the card must wait to find the whole call enqueued.

        A call of many launches takes the host longer than a millisecond, and would be timed as
        that.
        """
        ms = self._clock(run)
        self.synchronise()
        return int(CYCLES * min(max(1.5 * ms, LEAST_AHEAD), MOST_AHEAD))

    def _event(self, run: Run, ahead: int) -> float:
        if self._flush is None:
            self._flush = torch.empty(FLUSH // 4, dtype=torch.int32, device=self.torch)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flush.fill_(1)
        torch.cuda._sleep(ahead)
        start.record()
        run()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end))

    def _wall(self, run: Run, count: int) -> float:
        self.synchronise()
        start = time.perf_counter()
        for _ in range(count):
            run()
        self.synchronise()
        return 1e3 * (time.perf_counter() - start) / count

    def _graph(self, run: Run, calls: int = 20) -> tuple[float | None, str]:
        """Time of a call in a replayed graph, or why there is none."""
        before = torch.cuda.current_stream()
        try:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                run()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                for _ in range(calls):
                    run()
            graph.replay()
            self.synchronise()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(5):
                graph.replay()
            end.record()
            end.synchronize()
        except Exception as error:  # a call that reads back cannot be captured: that is a finding
            # A capture that fails leaves its own stream the current one.
            torch.cuda.set_stream(before)
            self.free()
            return None, f"{type(error).__name__}: {error}".splitlines()[0][:200]
        return float(start.elapsed_time(end)) / (5 * calls), ""

    def peak(self, run: Run) -> float | None:
        """MiB beyond what is held before that a call needs at most; None on the processor."""
        if self.dry:
            return None
        self.free()
        self.synchronise()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        kept = run()
        self.synchronise()
        del kept
        return float(torch.cuda.max_memory_allocated() - before) / 2**20

    def describe(self) -> dict[str, Any]:
        """The card as it was found: name, sizes, driver, clocks."""
        if self.dry:
            return {"name": "none: a dry run", "dry": True}
        card = torch.cuda.get_device_properties(0)
        return {
            "name": card.name,
            "capability": f"{card.major}.{card.minor}",
            "multiprocessors": card.multi_processor_count,
            "memory_gib": round(card.total_memory / 2**30, 1),
            "l2_mib": round(card.L2_cache_size / 2**20, 1),
            "smi": smi(),
            "dry": False,
        }


QUERY = (
    "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.draw,power.limit,"
    "temperature.gpu,mig.mode.current"
)


def smi() -> str:
    """What nvidia-smi says of driver, clocks and power now; it only reads."""
    try:
        done = subprocess.run(
            ["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=20,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"nvidia-smi: {type(error).__name__}"
    return (done.stdout or done.stderr).strip()[:300]
