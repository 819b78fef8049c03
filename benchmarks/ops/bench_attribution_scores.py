"""attribution_scores beside plain torch: `python benchmarks/ops/bench_attribution_scores.py`.

The cases are activations of a GPT-2-small layer, 64 prompts of 128 tokens, in units of a sweep's
cells; the floor is the three tensors read once, at the rate of torch's copy.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.checks import DisagreementError, within
from benchmarks.floors import ceilings
from benchmarks.machine import describe, isa
from microtome._seed import generator
from microtome.ops import attribution_scores

ROOT = Path(__file__).resolve().parents[2]
# Name -> (rows, units, columns of a unit).
CASES = {
    "stream": (8192, 1, 768),
    "heads": (8192, 12, 64),
    "pattern": (8192 * 12, 1, 128),
    "neurons": (2048, 3072, 1),
}
Outputs = tuple[Tensor, Tensor]


def plain(source: Tensor, base: Tensor, grad: Tensor, units: int) -> Outputs:
    """Both outputs, as one writes them in torch."""
    scores = ((source - base) * grad).unflatten(1, (units, -1)).sum(-1)
    return scores, (source != base).unflatten(1, (units, -1)).any(-1)


def plain_scores(source: Tensor, base: Tensor, grad: Tensor, units: int) -> Tensor:
    """The scores alone."""
    return ((source - base) * grad).unflatten(1, (units, -1)).sum(-1)


def measure(name: str, n: int, units: int, width: int, *, reps: int, gbs: float) -> dict[str, Any]:
    """One row: the check, then each contender in turn within a round, and the floor."""
    g = generator(0, "attribution_scores", name)
    tensors = [torch.randn(n, units * width, generator=g) for _ in range(3)]
    row: dict[str, Any] = {"case": name, "n": n, "units": units, "width": width}
    contenders: dict[str, Callable[[], object]] = {
        "attribution_scores": lambda: attribution_scores(*tensors, units),
        "torch": lambda: plain(*tensors, units),
        "torch, scores alone": lambda: plain_scores(*tensors, units),
    }
    usual, exact = plain(*tensors, units), plain(*(x.double() for x in tensors), units)
    scores, changed = attribution_scores(*tensors, units)
    try:
        row["check"] = within("scores", scores, usual[0], exact[0])
        if not torch.equal(changed, exact[1]):
            msg = "changed: not what the inputs say"
            raise DisagreementError(msg)
    except DisagreementError as error:
        return {**row, "status": "FAILED", "error": str(error)}
    times: dict[str, list[float]] = {contender: [] for contender in contenders}
    for rep in range(-1, reps):
        for contender, run in contenders.items():
            start = time.perf_counter()
            run()
            if rep >= 0:
                times[contender].append(1e3 * (time.perf_counter() - start))
    ours = times["attribution_scores"]
    moved = sum(4 * x.numel() for x in tensors) + 5 * n * units
    row.update(status="ok", reps=reps, bytes=moved, floor_ms=moved / gbs / 1e6)
    row["contenders"] = {
        contender: {
            "ms": statistics.median(taken),
            "ms_best": min(taken),
            "ratio": statistics.median(taken) / statistics.median(ours),
            "ratio_best": min(taken) / min(ours),
        }
        for contender, taken in times.items()
    }
    return row


def line(row: dict[str, Any]) -> str:
    """A row of the table: best milliseconds, and in units of ours."""
    start = f"| {row['case']} | {row['n']} x {row['units']} x {row['width']} |"
    if row["status"] != "ok":
        return f"{start} {row['status']}: {row['error']} |"
    parts = (f"{c['ms_best']:.2f} ({c['ratio_best']:.1f})" for c in row["contenders"].values())
    return f"{start} {' | '.join(parts)} | {row['floor_ms']:.2f} |"


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table and write it to <out>/attribution_scores-<isa>.json; 1 if a row FAILED."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a hundredth of the rows, 2 rounds")
    parser.add_argument("--reps", type=int, default=15, help="rounds (15)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "ops")
    options = parser.parse_args(arguments)
    before = torch.get_num_threads()
    torch.set_num_threads(options.threads)
    limits = ceilings(quick=options.quick)
    result: dict[str, Any] = {"op": "attribution_scores", "ceilings": limits, "rows": []}
    result["machine"] = describe(options.threads)
    try:
        for name, (n, units, width) in CASES.items():
            rows, reps = (n // 100, 2) if options.quick else (n, options.reps)
            row = measure(name, rows, units, width, reps=reps, gbs=limits["copy_gbs"])
            if not result["rows"] and row["status"] == "ok":
                print(f"| case | size | {' | '.join(row['contenders'])} | floor |")
            print(line(row), flush=True)
            result["rows"].append(row)
    finally:
        torch.set_num_threads(before)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"attribution_scores-{isa()}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    return int(any(row["status"] != "ok" for row in result["rows"]))


if __name__ == "__main__":
    sys.exit(main())
