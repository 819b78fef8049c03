"""Products with packed weights beside torch's own, on the shapes of a GPT-2-small layer.

`ops/bench_packed_linear.py` and `ops/bench_delta_linear.py` say what is compared; here are the
shapes, the check, the timing and the table.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.checks import DisagreementError
from benchmarks.machine import describe, isa

ROOT = Path(__file__).resolve().parent.parent
ROWS = (1, 16, 72, 256, 936, 2048)
LAYER = ((768, 2304), (768, 768), (768, 3072), (3072, 768))  # inputs, outputs
COLD_BYTES = 128 << 20  # more than a last-level cache holds


@dataclass
class Comparison:
    """One product, ready to be measured.

    Attributes:
        contenders: name -> (number of a copy of the weights) -> result. The first is ours.
        exact: the answer of the first contender in float64, with copy 0.
        plain: the same by plain PyTorch, whose error may be at most doubled.
    """

    contenders: dict[str, Callable[[int], Tensor]]
    exact: Tensor
    plain: Tensor


Prepare = Callable[[int, int, int, int], Comparison]  # (rows, inputs, outputs, copies)


def copies_of(weight: Tensor, count: int) -> list[Tensor]:
    """The weight and count - 1 clones."""
    return [weight, *(weight.clone() for _ in range(count - 1))]


def check(comparison: Comparison) -> dict[str, float]:
    """Compare the first contender with float64; raises DisagreementError."""
    exact = comparison.exact
    got = next(iter(comparison.contenders.values()))(0)
    error, usual = (float((t.double() - exact).abs().max()) for t in (got, comparison.plain))
    allowed = 2 * usual + float(exact.abs().max()) * torch.finfo(torch.float32).eps
    if not error <= allowed:
        msg = f"error {error:.3e} against float64, plain PyTorch allows {allowed:.3e}"
        raise DisagreementError(msg)
    return {"error": error, "plain_error": usual}


def seconds(
    contenders: dict[str, Callable[[int], Tensor]], copies: int, reps: int
) -> dict[str, list[float]]:
    """Times of each contender, one after another within a round, so that all see the same noise.

    One thread is timed by its processor time, which a neighbour does not add to.
    """
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for rep in range(-1, reps):
        for name, run in contenders.items():
            start = clock()
            run(rep % copies)
            if rep >= 0:
                times[name].append(clock() - start)
    return times


def measure(prepare: Prepare, T: int, i: int, o: int, *, cold: bool, reps: int) -> dict[str, Any]:
    """One row: rates and, for each contender, its time in units of ours."""
    row: dict[str, Any] = {"T": T, "i": i, "o": o, "weights": "cold" if cold else "warm"}
    copies = 1 + COLD_BYTES // (2 * i * o) if cold else 1
    comparison = prepare(T, i, o, copies)
    try:
        row["check"] = check(comparison)
    except DisagreementError as error:
        return {**row, "status": "FAILED", "error": str(error)}
    operations = 2 * T * i * o
    if not reps:
        reps = max(9, min(200, int(2e10 / operations)))
    times = seconds(comparison.contenders, copies, reps)
    ours = next(iter(times.values()))
    row.update(status="ok", reps=reps)
    row["contenders"] = {
        name: {
            "ratio": statistics.median(t) / statistics.median(ours),
            "ratio_best": min(t) / min(ours),
            "gflops": operations / statistics.median(t) / 1e9,
            "gflops_best": operations / min(t) / 1e9,
        }
        for name, t in times.items()
    }
    return row


def line(row: dict[str, Any]) -> str:
    """A row of the table."""
    start = f"| {row['T']} | {row['i']} | {row['o']} | {row['weights']} |"
    if row["status"] != "ok":
        return f"{start} {row['status']}: {row['error']} |"
    cells = (f"{c['gflops_best']:.0f} ({c['ratio_best']:.2f})" for c in row["contenders"].values())
    return f"{start} {' | '.join(cells)} |"


def main(op: str, prepare: Prepare, arguments: Sequence[str] | None = None) -> int:
    """Print the table and write it to <out>/<op>-<isa>.json; the exit code is 1 if a row FAILED."""
    parser = argparse.ArgumentParser(
        description=f"{op} beside torch: best GF/s, and its time in units of ours"
    )
    parser.add_argument("--rows", type=int, nargs="+", default=list(ROWS), metavar="T")
    parser.add_argument("--shapes", nargs="+", default=[f"{i}x{o}" for i, o in LAYER])
    parser.add_argument("--cold", action="store_true", help="weights that no cache holds")
    parser.add_argument("--reps", type=int, default=0, help="rounds a row (by the work)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "ops")
    options = parser.parse_args(arguments)
    before = torch.get_num_threads()
    torch.set_num_threads(options.threads)
    result: dict[str, Any] = {"op": op, "machine": describe(options.threads), "rows": []}
    try:
        for shape in options.shapes:
            i, o = map(int, shape.split("x"))
            for T in options.rows:
                row = measure(prepare, T, i, o, cold=options.cold, reps=options.reps)
                if not result["rows"] and row["status"] == "ok":
                    names = " | ".join(row["contenders"])
                    print(f"| T | i | o | weights | {names} |")
                print(line(row), flush=True)
                result["rows"].append(row)
    finally:
        torch.set_num_threads(before)
    options.out.mkdir(parents=True, exist_ok=True)
    name = f"{op}{'-cold' if options.cold else ''}-{isa()}.json"
    (options.out / name).write_text(json.dumps(result, indent=1) + "\n")
    return int(any(row["status"] != "ok" for row in result["rows"]))
