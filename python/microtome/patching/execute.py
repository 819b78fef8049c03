"""Running a grid of cells on an engine, a group at a time, to be watched and resumed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from microtome.models.native.plan import Plan
from microtome.patching.cells import Grid, Shape, Values
from microtome.patching.metrics import Metric
from microtome.patching.partial import Partial
from microtome.patching.result import Sweep

WRITES = 1 << 18  # planned at a time
TOKENS = 1 << 14  # of whole prompts at a time: enough for products to run at full speed


class Engine(Protocol):
    """Runs patched rows; see NativeEngine, whose methods these are."""

    name: str
    note: str
    shape: Shape

    @property
    def vocabulary(self) -> int: ...
    def lacks(self, site: str) -> str: ...
    def fingerprint(self) -> bytes: ...
    def activation(self, layer: int, stage: str) -> Tensor: ...
    def trimmed(self, plan: Plan) -> Plan: ...
    def unpatched(self, prompts: Tensor, slots: Tensor, columns: Tensor | None) -> Tensor: ...
    def patched(
        self, plan: Plan, slots: Tensor, columns: Tensor | None
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]: ...


@dataclass(frozen=True)
class Job:
    """What to run.

    Attributes:
        grid: the cells.
        values: layers -> where the written values come from.
        metric: what is measured.
        base: "clean" or "corrupted", which prompts are patched.
        ablation: there are no other prompts.
        about: what else tells these values from others, for `resume`.
    """

    grid: Grid
    values: Callable[[Sequence[int]], Values]
    metric: Metric
    base: str
    ablation: bool = False
    about: str = ""


@torch.no_grad()
def execute(
    op: str, engine: Engine, job: Job, *, memory: int, progress: bool, resume: str | Path | None
) -> Sweep:
    """Run every cell; what is finished is kept in `resume`, if given.

    Raises:
        ShapeError, NonFiniteError: of the metric, on the unpatched runs before any patched one.
        StoreError: `resume` holds another sweep, or cannot be written.
    """
    grid, shape, metric = job.grid, engine.shape, job.metric
    b = shape.b
    slots = metric.slots(shape.first, shape.stop, shape.t)
    columns = metric.columns(b, engine.vocabulary)
    prompts = torch.arange(b)
    own = engine.unpatched(prompts, slots, columns)
    other = own if job.ablation else engine.unpatched(prompts + b, slots, columns)
    padding = ((slots < shape.first[:, None]) | (slots >= shape.stop[:, None])).to(own.device)
    for logits in (own, other):
        logits[padding] = torch.nan  # what stands there is no prediction
    clean, corrupted = (own, other) if job.base == "clean" else (other, own)
    reference = corrupted if metric.reference == "corrupted" else clean
    unpatched = [
        metric(logits[None], reference, lambda _, name=name: f"of the unpatched {name} run")[0]
        for name, logits in (("clean", clean), ("corrupted", corrupted))[: 1 + (not job.ablation)]
    ]
    scores = torch.empty(grid.cells, b, dtype=own.dtype)
    unpatched = torch.stack(unpatched).to(scores)  # [1 or 2, b]
    written = torch.zeros(grid.cells, dtype=torch.int64)
    size = _group(grid, shape, own, memory)
    mark = "" if resume is None else _fingerprint(engine, job)
    partial = Partial(op, resume, mark, unpatched, scores, written)
    done = partial.load()
    partial.save(done)  # so that a place that cannot be written is known before the work
    with closing(_bar(op, grid.cells, progress)) as bar:
        bar.update(done)
        for low in range(done, grid.cells, size):
            cells = torch.arange(low, min(low + size, grid.cells))
            layers = grid.coordinates(cells)["layer"].unique().tolist()
            values = job.values(layers)
            writes = grid.writes(cells, shape, values)
            plan = Plan(prompts.repeat(len(cells)), writes, values.sources)
            plan = engine.trimmed(plan)
            written[cells] = torch.bincount(plan.writes.row // b, minlength=len(cells))
            logits = own.expand(len(cells), *own.shape).clone()  # [cells, b, m, c]
            for row, slot, new in engine.patched(plan, slots, columns):
                logits[row // b, row % b, slot] = new
            logits[:, padding] = torch.nan
            where = lambda i, low=low: f"with the patch at {grid.place(low + i)}"  # noqa: E731
            scores[cells] = metric(logits, reference, where).to(scores)
            partial.save(int(cells[-1]) + 1)
            bar.update(len(cells))
    by_prompt = scores.unflatten(0, grid.shape)
    return Sweep(
        scores=by_prompt.mean(-1),
        by_prompt=by_prompt,
        axes=grid.axes,
        values=grid.values,
        site=grid.site,
        metric=metric.name,
        clean=unpatched[0],
        corrupted=unpatched[0, :0] if job.ablation else unpatched[1],
        base=job.base,
        written=written.unflatten(0, grid.shape),
        engine=engine.name,
        note=engine.note,
    )


def _group(grid: Grid, shape: Shape, logits: Tensor, memory: int) -> int:
    """Cells at a time: bounded by their writes, their tokens and the logits that are read of them.

    A group is what an interruption loses, and a step of the progress bar.
    """
    a_cell = 2 * logits.numel() * logits.element_size()
    fits = (
        WRITES // max(1, grid.writes_a_cell(shape)),
        TOKENS // (shape.b * shape.t),
        memory // max(1, a_cell),
    )
    return max(1, min(grid.cells, *fits))


def _fingerprint(engine: Engine, job: Job) -> str:
    """Tells one sweep from another, but for what a metric measures: see `Partial`."""
    grid, shape, metric = job.grid, engine.shape, job.metric
    digest = hashlib.sha256(engine.fingerprint())
    parts = (grid.site, grid.axes, grid.values, grid.op, grid.factor, metric.name, job.base)
    digest.update(repr((*parts, metric.reference, job.about)).encode())
    for values in (shape.first, shape.stop, metric.tokens, metric.positions):
        digest.update(b"" if values is None else values.numpy().tobytes())
    return digest.hexdigest()


def _bar(op: str, cells: int, progress: bool):
    from tqdm import tqdm

    return tqdm(total=cells, desc=op, unit="cell", disable=not progress)
