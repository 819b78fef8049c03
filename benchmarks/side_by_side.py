"""Ops that are not about sparse codes: several ways to one answer, checked, then timed in turn."""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.checks import within
from benchmarks.harness import Subject, quartiles
from benchmarks.machine import describe, isa

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Contest:
    """One input and several ways to the same answer; the first is ours, and what ratios are to.

    Attributes:
        ways: name -> a call without arguments. All return the same.
        unit: what a way is a share of: its name and a call.
        plain: the answer's checked part by plain PyTorch in float32.
        exact: the same in float64.
        picked: from our answer, the part that is checked.
        figures: more numbers for the table, by name.
    """

    ways: Mapping[str, Callable[[], Any]]
    unit: tuple[str, Callable[[], Any]]
    plain: Tensor
    exact: Tensor
    picked: Callable[[Any], Tensor]
    figures: Mapping[str, float]


def subject(run: Callable[[], Any], contest: Callable[[], Contest]) -> Subject:
    """A row of the harness, its answer checked as the contest's is."""

    def check() -> dict[str, Any]:
        against = contest()  # not before memory has been read
        return within("answer", against.picked(run()), against.plain, against.exact)

    return Subject(run, check)


def measure(contest: Contest, reps: int) -> dict[str, Any]:
    """Check every way against float64, then time all in turn, `reps` times.

    Returns:
        unit_ms; for each way its errors, ms, and the quartiles of its ratio to the unit and of
        "beside_ours", its ratio to the first way in the same turn.
    """
    calls = {"unit": contest.unit[1], **contest.ways}
    # One thread is timed by its processor time, which a neighbour does not add to.
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    checks = {
        name: within(name, contest.picked(way()), contest.plain, contest.exact)
        for name, way in contest.ways.items()
    }
    contest.unit[1]()
    times: dict[str, list[float]] = {name: [] for name in calls}
    gc.collect()
    gc.disable()
    try:
        for _ in range(reps):
            for name, call in calls.items():
                start = clock()
                answer = call()
                times[name].append(clock() - start)
                del answer  # freed outside the clock, for all alike
    finally:
        gc.enable()
    ours = times[next(iter(contest.ways))]
    row: dict[str, Any] = {
        "unit": contest.unit[0],
        "unit_ms": 1e3 * statistics.median(times["unit"]),
    }
    row["figures"] = dict(contest.figures)
    row["ways"] = {
        name: {
            **checks[name],
            "ms": 1e3 * statistics.median(times[name]),
            "of_unit": statistics.median(times[name]) / statistics.median(times["unit"]),
            "of_unit_quartiles": quartiles(
                [t / u for t, u in zip(times[name], times["unit"], strict=True)]
            ),
            "beside_ours": statistics.median(times[name]) / statistics.median(ours),
            "beside_ours_quartiles": quartiles(
                [t / o for t, o in zip(times[name], ours, strict=True)]
            ),
        }
        for name in contest.ways
    }
    return row


def text(case: str, row: Mapping[str, Any]) -> str:
    """The row as lines for people."""
    figures = ", ".join(f"{name} {value:.4g}" for name, value in row["figures"].items())
    lines = [f"{case}: {figures}; {row['unit']} {row['unit_ms']:.2f} ms"]
    for name, way in row["ways"].items():
        low, high = way["beside_ours_quartiles"]
        lines.append(
            f"  {name:28} {way['ms']:9.3f} ms  {way['of_unit']:7.3f} of the unit  "
            f"{way['beside_ours']:6.2f} of ours ({low:.2f} - {high:.2f})"
        )
    return "\n".join(lines)


def main(op: str, cases: Mapping[str, Callable[[], Contest]]) -> None:
    """Measure the cases named, or all; print them and write <out>/<op>-<isa>.json."""
    parser = argparse.ArgumentParser(description=f"{op}, beside plain PyTorch.")
    parser.add_argument("cases", nargs="*", help=f"of {', '.join(cases)}; all by default")
    parser.add_argument("--reps", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "ops")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = {}
    with torch.no_grad():
        for name in options.cases or cases:
            rows[name] = measure(cases[name](), options.reps)
            print(text(name, rows[name]), flush=True)
    result = {"op": op, "machine": describe(options.threads), "reps": options.reps, "rows": rows}
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"{op}-{isa()}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
