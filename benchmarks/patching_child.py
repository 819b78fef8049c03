"""Measure one contender's ways to sweep, in a process of its own, each beside a plain forward."""

from __future__ import annotations

import gc
import hashlib
import importlib
import json
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.patching_case import Contender, Question, Shape, Sweep, question
from benchmarks.resident import memory_mark, memory_peak
from microtome import ops

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
FORWARDS = 3  # timed before each sweep and after the last, beside those between layers


def seconds(function: Callable[[], object]) -> tuple[float, Any]:
    """How long it took, and what it returned."""
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, result


def build() -> str:
    """Which microtome this process measures: a digest of its sources and its extension."""
    import microtome

    folder = Path(str(microtome.__file__)).parent
    digest = hashlib.sha256()
    for file in sorted(p for p in folder.rglob("*") if p.suffix in (".py", ".so")):
        digest.update(str(file.relative_to(folder)).encode() + file.read_bytes())
    return digest.hexdigest()[:12]


class Beside:
    """Plain forwards of the model and products, timed before, within and after sweeps.

    Attributes:
        forward_ms: one a forward.
        product_gflops: the better of torch's product and ours each time. torch's alone is no
            ceiling: on some processors its library uses half of the vector width.
        paused: seconds spent in `between` since it was last set to zero.
    """

    def __init__(self, asked: Question) -> None:
        d = asked.sweep.shape.d
        self.asked = asked
        # [2048, d] x [d, 4 d], held throughout, so that it adds nothing to a sweep's peak.
        self.operands = torch.ones(2048, d), torch.ones(d, 4 * d), torch.zeros(2048, 4 * d)
        self.products = [lambda: torch.mm(*self.operands[:2], out=self.operands[2])]
        if hasattr(ops, "packed_linear"):
            packed = ops.pack_weights(self.operands[1].T.contiguous(), "fp32")
            self.products.append(lambda: ops.packed_linear(self.operands[0], packed, 4 * d))
        self.forward_ms: list[float] = []
        self.product_gflops: list[float] = []
        self.paused = 0.0

    def forward(self) -> object:
        """What a sweep is counted in."""
        return self.asked.model(self.asked.corrupted).logits

    def between(self, forwards: int = 1) -> None:
        """Time some forwards and the products."""
        start = time.perf_counter()
        self.forward_ms.extend(1e3 * seconds(self.forward)[0] for _ in range(forwards))
        took = min(seconds(product)[0] for product in self.products)
        self.product_gflops.append(
            2 * self.operands[0].numel() * self.operands[1].shape[1] / took / 1e9
        )
        self.paused += time.perf_counter() - start


def measure(
    prepare: Callable[[Question], Contender],
    asked: Question,
    *,
    reps: int,
    spend: float,
    most: int,
) -> tuple[Row, Tensor]:
    """Time sweeps, with plain forwards of the model before, between their layers, and after.

    Args:
        prepare: makes the contender.
        asked: what it is to answer.
        reps: how many sweeps at least.
        spend: more sweeps follow until this many seconds are spent on them.
        most: how many at most.

    Returns:
        The row: seconds (a sweep each, of the chosen columns), busy (processor time over elapsed
        time and threads, a sweep each; low where others had the processor or the process was
        stopped), forward_ms, product_gflops, first_seconds (the first sweep of a model, where the
        warm-up is one), setup_mib (held after the warm-up, by what `prepare` made and what was
        kept), working_mib (peak of the first timed sweep beyond what was held before it), about
        (the contender's own); and the grid of the last sweep.
    """
    beside = Beside(asked)
    beside.between()
    before = memory_mark()
    contender = prepare(replace(asked, between=beside.between))
    first = seconds(contender.warm or contender.run)[0]
    setup = memory_mark() - before
    beside.forward_ms.clear()
    beside.product_gflops.clear()
    # The collector stays on, for a sweep of minutes may need it, but need not visit the modules.
    gc.collect()
    gc.freeze()
    times: list[float] = []
    busy: list[float] = []
    held = peak = 0.0
    grid = torch.empty(0)
    while len(times) < reps or (sum(times) < spend and len(times) < most):
        beside.between(FORWARDS)
        if not times:
            held = memory_mark()
        beside.paused = 0.0
        cpu = time.process_time()
        took, grid = seconds(contender.run)
        if not times:
            peak = memory_peak()
        busy.append((time.process_time() - cpu) / took / torch.get_num_threads())
        times.append(took - beside.paused)
    beside.between(FORWARDS)
    gc.unfreeze()
    row = {
        "seconds": times,
        "busy": busy,
        "forward_ms": beside.forward_ms,
        "product_gflops": beside.product_gflops,
        "setup_mib": setup,
        "working_mib": peak - held,
        "first_seconds": None if contender.warm else first,
        "about": contender.about(),
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
    key["build"] = build()
    with torch.no_grad():
        for variant, prepare in variants.items():
            if request["variants"] and variant not in request["variants"]:
                continue
            row: Row = {**key, "variant": variant, "status": "ok"}
            stride = request["strides"].get(variant, 1)
            try:
                asked = question(sweep, Path(request["folder"]), stride=stride)
                limits = {name: request[name] for name in ("reps", "spend", "most")}
                figures, grid = measure(prepare, asked, **limits)
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
