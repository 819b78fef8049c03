"""Measure one contender's ways to sweep, in a process of its own, each beside a plain forward."""

from __future__ import annotations

import gc
import importlib
import json
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.patching_case import Contender, Question, Shape, Sweep, question
from benchmarks.resident import memory_mark, memory_peak

Row = dict[str, Any]
# Contender -> the module whose VARIANTS it offers, and what must be importable.
CONTENDERS = {
    "microtome": ("benchmarks.ops.bench_patching", "microtome.patching"),
    "transformer_lens": ("benchmarks.peers.bench_transformer_lens", "transformer_lens"),
    "nnsight": ("benchmarks.peers.bench_nnsight", "nnsight"),
    "pyvene": ("benchmarks.peers.bench_pyvene", "pyvene"),
    "torch": ("benchmarks.peers.bench_torch_hooks", "transformers"),
}
OURS, JUDGE = "microtome", "transformer_lens"
FORWARDS = 5  # timed before each sweep and after the last


def seconds(function: Callable[[], object]) -> tuple[float, Any]:
    """How long it took, and what it returned."""
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, result


def product_gflops(d: int) -> float:
    """Rate of a float32 product [2048, d] x [d, 4 d] now, into memory that is there."""
    x, weight, out = torch.ones(2048, d), torch.ones(4 * d, d), torch.empty(2048, 4 * d)
    torch.mm(x, weight.T, out=out)
    took, _ = seconds(lambda: torch.mm(x, weight.T, out=out))
    return 2 * 2048 * d * 4 * d / took / 1e9


def measure(
    contender: Contender, question: Question, *, reps: int, spend: float, most: int
) -> tuple[Row, Tensor]:
    """Time sweeps, with plain forwards of the model before each and after the last.

    Args:
        contender: what is measured.
        question: what it was prepared for.
        reps: how many sweeps at least.
        spend: more sweeps follow until this many seconds are spent on them.
        most: how many at most.

    Returns:
        The row: seconds (a sweep each, of the chosen columns), forward_ms, product_gflops,
        working_mib (peak of the first sweep beyond what was held before it); and the grid of the
        last sweep.
    """
    times: list[float] = []
    forwards: list[float] = []
    rates: list[float] = []

    def forward() -> object:
        return question.model(question.corrupted).logits

    def beside() -> None:
        forwards.extend(1e3 * seconds(forward)[0] for _ in range(FORWARDS))
        rates.append(product_gflops(question.sweep.shape.d))

    forward()
    contender.warm()
    # The collector stays on, for a sweep of minutes may need it, but need not visit the modules.
    gc.collect()
    gc.freeze()
    held = peak = 0.0
    grid = torch.empty(0)
    while len(times) < reps or (sum(times) < spend and len(times) < most):
        beside()
        if not times:
            held = memory_mark()
        took, grid = seconds(contender.run)
        if not times:
            peak = memory_peak()
        times.append(took)
    beside()
    gc.unfreeze()
    row = {
        "seconds": times,
        "forward_ms": forwards,
        "product_gflops": rates,
        "working_mib": peak - held,
    }
    return row, grid.detach().float().cpu()


def run_contender(request: Mapping[str, Any], report: Callable[[Row], None]) -> None:
    """Measure the variants of one contender on one sweep, reporting each as soon as it is there.

    Args:
        request: contender; sweep (fields of a Sweep); folder of the model; variants (names, or
            empty for all); strides (variant -> stride, 1 where absent); reps, spend, most as in
            `measure`; threads; grids, the folder that grids are saved to.
        report: called with every row; `grid` names the file of its grid [layers, columns].
    """
    torch.set_num_threads(request["threads"])
    name = request["contender"]
    fields = {**request["sweep"], "shape": Shape(**request["sweep"]["shape"])}
    sweep = Sweep(**fields)
    key = {"sweep": sweep.name, "contender": name}
    module, package = CONTENDERS[name]
    try:
        importlib.import_module(package)
    except ImportError as error:
        report({**key, "variant": "all", "status": f"not available ({error})"})
        return
    variants = importlib.import_module(module).VARIANTS
    with torch.no_grad():
        for variant, prepare in variants.items():
            if request["variants"] and variant not in request["variants"]:
                continue
            row: Row = {**key, "variant": variant, "status": "ok"}
            stride = request["strides"].get(variant, 1)
            try:
                asked = question(sweep, Path(request["folder"]), stride=stride)
                before = memory_mark()
                contender = prepare(asked)
                row["setup_mib"] = memory_mark() - before
                figures, grid = measure(
                    contender,
                    asked,
                    reps=request["reps"],
                    spend=request["spend"],
                    most=request["most"],
                )
                file = Path(request["grids"]) / f"{len(list(Path(request['grids']).iterdir()))}.pt"
                torch.save(grid, file)
                row.update(figures, stride=stride, columns=asked.columns, grid=str(file))
            except Exception as error:  # a contender that breaks is a row, not the end
                traceback.print_exc()
                row.update(status="FAILED", error=f"{type(error).__name__}: {error}")
            report(row)


def main(result_path: str, request: str) -> None:
    """Entry of the child process: `request` is JSON; rows go to `result_path`, JSON lines."""

    def report(row: Row) -> None:
        with Path(result_path).open("a") as file:
            file.write(json.dumps(row) + "\n")

    run_contender(json.loads(request), report)
