"""Run items in processes that may die: a fault of one item costs that item, never the part.

A worker writes a line when it begins an item, and one with the item's rows. What it had begun when
it died, or ran too long, becomes a row that says so, and a new worker goes on with the rest.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.on_gpu.item import Context, Item, guarded

Row = dict[str, Any]
Report = Callable[[str, list[Row], float], None]  # item's key, its rows, seconds
SLACK = 3.0  # an item is killed after so many times what it was said to take, and
LEAST = 60.0  # not before so many seconds: a first compile is slow
UNHEALTHY = 3  # exit code of a worker whose card no longer answers
STARTS = 2  # workers in a row that may die without having begun an item


def skipped(item: Item, why: str) -> Row:
    """The row of an item that was not begun."""
    return {
        "part": item.part,
        "item": item.name,
        "shape": item.shape,
        "status": "skipped",
        "note": why,
    }


def in_turn(
    items: Sequence[Item],
    context: Context,
    deadline: float,
    report: Report,
    begin: Callable[[str], None] = lambda key: None,
    clock: Callable[[], float] = time.time,
) -> int:
    """Run items one after another in this process.

    Args:
        items: what to run.
        context: device and ceilings.
        deadline: by `clock`; an item that would end after it is skipped, by name.
        report: called with every item's rows.
        begin: called before every item.
        clock: seconds.

    Returns:
        0, or UNHEALTHY if the card stopped answering and the rest is left.
    """
    for item in items:
        left = deadline - clock()
        if left < item.seconds:
            why = f"{max(left, 0):.0f} s of the budget left, takes about {item.seconds:.0f} s"
            report(item.key, [skipped(item, why)], 0.0)
            continue
        begin(item.key)
        start = clock()
        rows = guarded(item, context)
        report(item.key, rows, clock() - start)
        context.device.free()
        failed = any(row["status"] == "FAILED" for row in rows)
        if failed and not context.device.healthy():
            return UNHEALTHY
    return 0


def work(request: dict[str, Any], items: Sequence[Item], context: Context) -> int:
    """A worker's whole life: the items that the request names, in its order."""
    by_key = {item.key: item for item in items}
    path = Path(request["lines"])

    def line(**what: Any) -> None:
        with path.open("a") as file:
            file.write(json.dumps(what, default=str) + "\n")

    return in_turn(
        [by_key[key] for key in request["keys"]],
        context,
        request["deadline"],
        lambda key, rows, seconds: line(end=key, rows=rows, seconds=seconds),
        lambda key: line(begin=key),
    )


@dataclass
class Lane:
    """One process at a time, and the items that are left for it."""

    name: str
    left: list[Item]
    process: subprocess.Popen[bytes] | None = None
    lines: Path = Path()
    output: Path = Path()
    read: int = 0
    current: Item | None = None
    since: float = 0.0
    idle_deaths: int = 0
    starts: int = field(default=0)


class Supervisor:
    """Starts workers, reads what they write, and outlives them.

    Args:
        command: the command of a worker, given the path of its request.
        folder: for requests, lines and logs.
        request: what every worker is told beside its items.
        report: called with every item's rows.
    """

    def __init__(
        self,
        command: Callable[[Path], list[str]],
        folder: Path,
        request: dict[str, Any],
        report: Report,
    ) -> None:
        self.command, self.folder, self.report = command, folder, report
        self.request = request
        folder.mkdir(parents=True, exist_ok=True)

    def run(self, lanes: Sequence[Sequence[Item]], deadline: float, name: str) -> None:
        """Run each lane's items in a process of its own, all lanes beside each other.

        Args:
            lanes: items of each lane, in order.
            deadline: by time.time(); then workers are ended and what is left is skipped.
            name: of files in the folder.
        """
        running = [Lane(f"{name}{i}", list(items)) for i, items in enumerate(lanes) if items]
        try:
            while running:
                for lane in list(running):
                    if not self._turn(lane, deadline):
                        running.remove(lane)
                time.sleep(0.05)
        finally:
            for lane in running:
                self._end(lane)

    def _turn(self, lane: Lane, deadline: float) -> bool:
        """Read, judge, restart; False when the lane is done."""
        if time.time() > deadline:
            self._end(lane)
            self._lines(lane)
            if lane.current is not None:
                self._dead(lane, "the budget ended while it ran", "skipped")
            for item in lane.left:
                self.report(item.key, [skipped(item, "the budget ended before it began")], 0.0)
            return False
        if lane.process is None:
            if not lane.left:
                return False
            self._start(lane, deadline)
        assert lane.process is not None
        code = lane.process.poll()
        self._lines(lane)
        item = lane.current
        if item is not None and code is None:
            most = max(SLACK * item.seconds, LEAST)
            if time.time() - lane.since > most:
                self._end(lane)
                self._lines(lane)
                if lane.current is not None:
                    self._dead(lane, f"ran past {most:.0f} s")
            return True
        if code is None:
            return True
        lane.process = None
        if lane.current is not None:
            lane.idle_deaths = 0
            self._dead(lane, f"exit code {code}. {self._tail(lane)}")
        elif lane.left and code != UNHEALTHY:
            lane.idle_deaths += 1
            if lane.idle_deaths >= STARTS:
                for item in lane.left:
                    note = f"the worker does not start: exit code {code}. {self._tail(lane)}"
                    self.report(item.key, [{**skipped(item, note), "status": "DIED"}], 0.0)
                return False
        return bool(lane.left)

    def _start(self, lane: Lane, deadline: float) -> None:
        lane.starts += 1
        stem = f"{lane.name}-{lane.starts}"
        lane.lines, lane.output = self.folder / f"{stem}.jsonl", self.folder / f"{stem}.log"
        lane.lines.write_text("")
        lane.read = 0
        request = {
            **self.request,
            "keys": [item.key for item in lane.left],
            "deadline": deadline,
            "lines": str(lane.lines),
        }
        path = self.folder / f"{stem}.json"
        path.write_text(json.dumps(request))
        with lane.output.open("wb") as log:
            lane.process = subprocess.Popen(
                self.command(path),
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _lines(self, lane: Lane) -> None:
        """Take in the lines that the worker has finished writing."""
        data = lane.lines.read_bytes() if lane.lines.exists() else b""
        end = data.rfind(b"\n") + 1
        fresh, lane.read = data[lane.read : end], max(end, lane.read)
        for text in fresh.splitlines():
            line = json.loads(text)
            if "begin" in line:
                lane.current = next(item for item in lane.left if item.key == line["begin"])
                lane.since = time.time()
                continue
            lane.left = [item for item in lane.left if item.key != line["end"]]
            lane.current = None
            lane.idle_deaths = 0
            self.report(line["end"], line["rows"], line["seconds"])

    def _dead(self, lane: Lane, note: str, status: str = "DIED") -> None:
        item, lane.current = lane.current, None
        assert item is not None
        lane.left = [other for other in lane.left if other.key != item.key]
        row = {**skipped(item, note), "status": status}
        self.report(item.key, [row], time.time() - lane.since)

    def _tail(self, lane: Lane) -> str:
        text = lane.output.read_text(errors="replace") if lane.output.exists() else ""
        return " ".join(text.split())[-300:]

    def _end(self, lane: Lane) -> None:
        """End the worker and what it started; they are a session of their own."""
        process, lane.process = lane.process, None
        if process is None or process.poll() is not None:
            return
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
