"""Time the contenders of one case in one process, taking turns, and judge what they answer."""

from __future__ import annotations

import gc
import importlib
import json
import statistics
import time
import traceback
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.resident import memory_mark, memory_peak
from benchmarks.shapley_case import CASES, Contender, Question, question

Row = dict[str, Any]
OURS, PEERS = "benchmarks.ops.bench_shapley", "benchmarks.peers.bench_shapley_peers"
PACKAGES = {"shap": "shap", "captum": "captum", "shapiq": "shapiq", "lime": "lime"}


def ways(name: str) -> dict[str, Any]:
    """The contenders of a case, by label; ours first."""
    case = CASES[name]
    ours, peers = importlib.import_module(OURS), importlib.import_module(PEERS)
    if case.what != "shapley":
        kind = case.what.upper()
        return {**getattr(ours, kind), **getattr(peers, kind)}
    if case.backgrounds == 1:
        return {**ours.ONE, **peers.SHAPLEY}
    if case.explicands > 50:
        return {**ours.MANY, **peers.MANY}
    return {**ours.SHAPLEY, **peers.SHAPLEY}


def relative_error(found: Tensor, reference: Tensor) -> float:
    """RMS difference by RMS value, all explicands together."""
    apart = (found.double().reshape(reference.shape) - reference).square().mean().sqrt()
    return float(apart / reference.square().mean().sqrt())


def prepared(asked: Question, name: str, prepare: Any) -> tuple[Contender | None, Row]:
    """A contender and its first, cold run, or why there is none."""
    key = {"case": asked.case.name, "contender": name, "threads": torch.get_num_threads()}
    package = PACKAGES.get(name.split()[0])
    if package and prepare.__module__ == PEERS:
        try:
            importlib.import_module(package)
        except ImportError as error:
            return None, {**key, "status": f"not installed ({error})"}
    try:
        contender = prepare(asked)
        start = time.perf_counter()
        contender.run(0)
        first = time.perf_counter() - start
    except Exception as error:  # a contender that breaks is a row of the table, not the end of it
        traceback.print_exc()
        return None, {**key, "status": "FAILED", "error": f"{type(error).__name__}: {error}"}
    return contender, {**key, "status": "ok", "first_ms": 1e3 * first / len(asked.x)}


def measure(asked: Question, contenders: dict[str, tuple[Contender, Row]], spend: float) -> None:
    """Fill in the rows: turns of one timed run each, until each had its seconds, at most 25.

    An untimed run of the same contender comes first in its turn: after a peer's run the threads of
    another pool still spin, and after a pause those of one's own sleep, which costs any two-thread
    call milliseconds (`torch.mm` of 512 rows 0.1 ms, and 10 after a pause).
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}
    found: dict[str, list[float]] = {name: [] for name in contenders}
    gc.collect()
    gc.freeze()
    for turn in range(25):
        for name, (contender, _) in contenders.items():
            spent = sum(times[name])
            if turn >= 3 and spent > spend:
                continue
            contender.run(turn + 101)
            gc.disable()
            start = time.perf_counter()
            values = contender.run(turn + 1)
            times[name].append((time.perf_counter() - start) / len(asked.x))
            gc.enable()
            if values is not None and asked.reference.numel():
                found[name].append(relative_error(values, asked.reference))
    gc.unfreeze()
    for name, (contender, row) in contenders.items():
        ms = sorted(1e3 * t for t in times[name])
        figures = {"ms": statistics.median(ms), "ms_least": ms[0], "ms_most": ms[-1]}
        planned = {"turns": len(ms), "evaluations": contender.evaluations}
        row.update({**figures, **planned, **contender.about()})
        if found[name]:
            row["error"] = statistics.fmean(e * e for e in found[name]) ** 0.5
            # Sampling error falls with the square root of the work.
            row["ms_for_3_percent"] = row["ms"] * (row["error"] / 0.03) ** 2


def memory(asked: Question, name: str, prepare: Any) -> Row:
    """Peak memory of one run beyond what was held before it."""
    contender = prepare(asked)
    before = memory_mark()
    start = time.perf_counter()
    contender.run(1)
    took = time.perf_counter() - start
    return {"case": asked.case.name, "contender": name, "threads": torch.get_num_threads(),
            "status": "ok", "working_mib": memory_peak() - before, "ms": 1e3 * took,
            "evaluations": contender.evaluations}  # fmt: skip


def main(result_path: str, request: str) -> None:
    """Entry of the child: `request` is JSON; rows go to `result_path`, JSON lines."""
    asked_for = json.loads(request)
    torch.set_num_threads(asked_for["threads"])
    torch.set_grad_enabled(False)
    case = CASES[asked_for["case"]]
    asked = question(case, Path(asked_for["cache"]))
    chosen = {k: v for k, v in ways(case.name).items() if asked_for["only"] in ("", k)}
    rows: list[Row] = []
    if case.what == "memory":
        rows = [memory(asked, name, prepare) for name, prepare in chosen.items()]
    else:
        ready: dict[str, tuple[Contender, Row]] = {}
        for name, prepare in chosen.items():
            contender, row = prepared(asked, name, prepare)
            rows.append(row)
            if contender is not None:
                ready[name] = contender, row
        measure(asked, ready, asked_for["spend"])
    with Path(result_path).open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
