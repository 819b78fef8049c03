"""Measure one contender in a process of its own: memory, then correctness, then time beside G32.

`run.py` starts a child with `main` once per contender and case, so every contender sees the same
layout: imports, inputs, baseline, then its ops one after another.
"""

from __future__ import annotations

import gc
import importlib
import json
import statistics
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import inputs as inputs_module
from benchmarks.checks import DisagreementError
from benchmarks.inputs import Inputs
from benchmarks.resident import memory_mark, memory_peak
from microtome.testing import Case

# Contender -> the modules whose OPS it offers, and the package that must be importable.
CONTENDERS: dict[str, tuple[str | None, tuple[str, ...]]] = {
    "microtome": (
        None,
        (
            "benchmarks.ops.bench_topk_encode",
            "benchmarks.ops.bench_batch_topk_encode",
            "benchmarks.ops.bench_threshold_encode",
            "benchmarks.ops.bench_sparse_decode",
            "benchmarks.ops.bench_sparse_decode_csr",
            "benchmarks.ops.bench_sae_loss",
            "benchmarks.ops.bench_sae_update",
            "benchmarks.ops.bench_screen_weights",
            "benchmarks.step",
        ),
    ),
    "torch": (None, ("benchmarks.peers.torch_reference",)),
    "sparsify": ("sparsify", ("benchmarks.peers.bench_sparsify",)),
    "sae_lens": ("sae_lens", ("benchmarks.peers.bench_sae_lens",)),
    "dictionary_learning": ("dictionary_learning", ("benchmarks.peers.bench_dictionary_learning",)),
}


TINY = inputs_module.gaussian(Case("tiny", 8, 16, 64, 4))


@dataclass
class Subject:
    """One op of one contender, ready to be measured.

    Attributes:
        run: what is timed; takes no argument.
        check: compares with float64 on this very input; returns figures for the JSON, raises
            DisagreementError. None for a peer's training step, which is judged by its FVU instead.
        figures: more numbers for the JSON, called after the timing.
        train: (steps) -> weights W_enc, b_enc, W_dec, b_dec after that many steps from
            `Inputs.initial`, for the FVU.
    """

    run: Callable[[], object]
    check: Callable[[], dict[str, Any]] | None = None
    figures: Callable[[], dict[str, Any]] = field(default=dict)
    train: Callable[[int], tuple[Tensor, Tensor, Tensor, Tensor]] | None = None


def _seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    result = function()
    elapsed = time.perf_counter() - start
    del result  # freed outside the clock, for both sides alike
    return elapsed


def measure(
    run: Callable[[], object], unit: Callable[[], object], *, reps: int, warmup: int = 1
) -> dict[str, Any]:
    """Time `run` interleaved with `unit`, which is G32: the fp32 product x W_enc^T by torch.

    Args:
        run: the op.
        unit: the unit, timed right before every rep in this process.
        reps: how many pairs.
        warmup: how many pairs go before, untimed.

    Returns:
        ratio: median(run) / median(unit). ratio_quartiles: quartiles of the pairwise ratios, so
        that a disturbance that slows both is not taken for spread. ms, ms_quartiles, unit_ms,
        unit_ms_quartiles, reps.
    """
    for _ in range(warmup):
        unit()
        run()
    times: list[float] = []
    units: list[float] = []
    gc.collect()
    gc.disable()
    try:
        for _ in range(reps):
            units.append(_seconds(unit))
            times.append(_seconds(run))
    finally:
        gc.enable()
    return {
        "ratio": statistics.median(times) / statistics.median(units),
        "ratio_quartiles": quartiles([t / u for t, u in zip(times, units, strict=True)]),
        "ms": 1e3 * statistics.median(times),
        "ms_quartiles": quartiles([1e3 * t for t in times]),
        "unit_ms": 1e3 * statistics.median(units),
        "unit_ms_quartiles": quartiles([1e3 * u for u in units]),
        "reps": reps,
    }


def quartiles(values: list[float]) -> list[float]:
    """First and third quartile, by interpolation."""
    data = torch.tensor(sorted(values), dtype=torch.float64)
    return [float(data.quantile(q)) for q in (0.25, 0.75)]


def measure_op(
    prepare: Callable[[Inputs], Subject], inputs: Inputs, *, reps: int, steps: int
) -> dict[str, Any]:
    """One op: memory of two runs, the check, the time beside G32, then what the op has to add.

    Args:
        prepare: builds the subject; its memory counts as held.
        inputs: what it is measured on.
        reps: timed pairs.
        steps: training steps for the FVU; 0 for none.

    Returns:
        A JSON-ready row: status "ok", "FAILED" (with `error`), and the figures. No time stands
        beside a FAILED.
    """
    try:
        prepare(TINY).run()  # what is imported or allocated once per process belongs to nobody's op
        before = memory_mark()
        subject = prepare(inputs)
        held = memory_mark()
        subject.run()
        subject.run()
        peak = memory_peak()
        row: dict[str, Any] = {
            "status": "ok",
            "peak_mib": peak - before,  # beyond the inputs: setup, outputs and working memory
            "working_mib": peak - held,  # beyond inputs and setup: outputs and working memory
            "check": subject.check() if subject.check else None,
        }
        unit = lambda: torch.nn.functional.linear(inputs.x, inputs.W_enc)  # noqa: E731
        row.update(measure(subject.run, unit, reps=reps))
        row.update(subject.figures())
        if subject.train and steps:
            row["fvu"] = inputs_module.held_out_fvu(inputs, subject.train(steps))
            row["fvu_steps"] = steps
    except DisagreementError as error:
        return {"status": "FAILED", "error": f"disagrees with float64: {error}"}
    except Exception as error:  # a contender that breaks is a row of the table, not the end of it
        traceback.print_exc()
        return {"status": "FAILED", "error": f"{type(error).__name__}: {error}"}
    return row


def offered(contender: str) -> dict[str, Callable[[Inputs], Subject]]:
    """The ops a contender offers, by name; importing its package on the way."""
    ops: dict[str, Callable[[Inputs], Subject]] = {}
    for module in CONTENDERS[contender][1]:
        ops.update(importlib.import_module(module).OPS)
    return ops


def missing(contender: str) -> str | None:
    """None, or why the contender cannot be imported here."""
    package = CONTENDERS[contender][0]
    if package is None:
        return None
    try:
        importlib.import_module(package)
    except ImportError as error:
        return f"not installed ({error})"
    return None


def run_contender(request: Mapping[str, Any], report: Callable[[dict[str, Any]], None]) -> None:
    """Measure the ops of one contender on one case, reporting each row as soon as it is there.

    Args:
        request: contender, case (fields of a Case), input ("gaussian" or the path of a file that
            `inputs.save` wrote), ops (names, or empty for all), reps, steps, threads.
        report: called with every row.
    """
    torch.set_num_threads(request["threads"])
    contender, case = request["contender"], Case(**request["case"])
    key = {"case": case.name, "contender": contender}
    reason = missing(contender)
    if reason:
        report({**key, "op": "all", "status": reason})
        return
    ops = offered(contender)
    path = request["input"]
    inputs = (
        inputs_module.gaussian(case) if path == "gaussian" else inputs_module.load(Path(path), case)
    )
    torch.nn.functional.linear(
        inputs.x[:8], inputs.W_enc[:64]
    )  # loads the BLAS before the baseline
    for name, prepare in ops.items():
        if not request["ops"] or name in request["ops"]:
            row = measure_op(prepare, inputs, reps=request["reps"], steps=request["steps"])
            report({**key, "op": name, **row})


def main(result_path: str, request: str) -> None:
    """Entry of the child process: `request` is JSON; rows go to `result_path`, JSON lines."""

    def report(row: dict[str, Any]) -> None:
        with Path(result_path).open("a") as file:
            file.write(json.dumps(row) + "\n")

    run_contender(json.loads(request), report)
