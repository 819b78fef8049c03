"""Running a grid of cells on an engine, a group at a time, to be watched and resumed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from microtome.models.native.plan import Plan
from microtome.patching.cells import Grid, Shape, Values
from microtome.patching.metrics import Metric
from microtome.patching.partial import Partial
from microtome.patching.result import Sweep
from microtome.patching.traced import BeyondError, Logits, Reads, reads_of

WRITES = 1 << 18  # planned at a time
TOKENS = 1 << 16  # of whole prompts at a time: enough for products to run at full speed


class Engine(Protocol):
    """Runs patched rows; see NativeEngine, whose methods these are."""

    name: str
    note: str
    shape: Shape
    groups: int  # how much larger than elsewhere a group of cells is to be

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


class Cells(Protocol):
    """Some cells, each a change of every base prompt."""

    @property
    def count(self) -> int: ...
    @property
    def writes_a_cell(self) -> int: ...
    def plan(self, cells: Tensor) -> Plan:
        """Rows cells[i] * b + prompt, for cells [c] int64."""
        ...

    def describe(self) -> str:
        """Tells these cells from others."""
        ...

    def place(self, cell: int) -> str:
        """Where a cell lies, for messages."""
        ...


@dataclass(frozen=True)
class GridCells:
    """The cells of a grid.

    Attributes:
        grid: the cells.
        shape: of the run.
        values: layers -> where the written values come from.
    """

    grid: Grid
    shape: Shape
    values: Callable[[Sequence[int]], Values]

    @property
    def count(self) -> int:
        """How many there are."""
        return self.grid.cells

    @property
    def writes_a_cell(self) -> int:
        """At most."""
        return self.grid.writes_a_cell(self.shape)

    def plan(self, cells: Tensor) -> Plan:
        """Their writes."""
        layers = self.grid.coordinates(cells)["layer"].unique().tolist()
        values = self.values(layers)
        prompts = torch.arange(self.shape.b).repeat(len(cells))
        return Plan(prompts, self.grid.writes(cells, self.shape, values), values.sources)

    def place(self, cell: int) -> str:
        """Where a cell lies, for messages."""
        return self.grid.place(cell)

    def describe(self) -> str:
        """Site, axes and what is done there."""
        grid = self.grid
        return repr((grid.site, grid.axes, grid.values, grid.op, grid.factors))


@dataclass(frozen=True)
class Job:
    """What to run and how it is judged.

    Attributes:
        cells: the changes.
        metric: what is measured.
        base: "clean" or "corrupted", which prompts are patched.
        ablation: there are no other prompts.
        about: what else tells these values from others, for `resume`.
    """

    cells: Cells
    metric: Metric
    base: str
    ablation: bool = False
    about: str = ""


@dataclass(frozen=True)
class Outcome:
    """Numbers by cell.

    Attributes:
        scores: [cells, b].
        written: [cells] int64, (prompt, position) writes that changed a bit.
        clean, corrupted: [b], unpatched; corrupted is empty for an ablation.
    """

    scores: Tensor
    written: Tensor
    clean: Tensor
    corrupted: Tensor


@torch.no_grad()
def execute(
    op: str, engine: Engine, job: Job, *, memory: int, progress: bool, resume: str | Path | None
) -> Outcome:
    """Run every cell; what is finished is kept in `resume`, if given.

    Raises:
        ShapeError, NonFiniteError: of the metric, on the unpatched runs before any patched one.
        StoreError: `resume` holds another sweep, or cannot be written.
    """
    if job.metric.whole:
        with suppress(BeyondError):
            return _execute(op, engine, job, traced(engine, job.metric), memory, progress, resume)
    return _execute(op, engine, job, job.metric, memory, progress, resume)


def predictions(engine: Engine, prompts: Tensor, slots: Tensor, columns: Tensor | None) -> Tensor:
    """[b, m, c]: `engine.unpatched`, NaN at padding, for what stands there is no prediction."""
    logits = engine.unpatched(prompts, slots, columns)
    logits[engine.shape.padding(slots).to(logits.device)] = torch.nan
    return logits


def recorded(engine: Engine, measure: Callable[[Any], Any], like: Tensor) -> Reads:
    """What `measure` reads of the logits of the unpatched base prompts.

    Args:
        engine: knows them.
        measure: takes logits [b, t, vocabulary]; called once.
        like: a tensor with their dtype and device.
    """
    b = engine.shape.b

    def fetch(positions: Tensor, tokens: Tensor | None) -> Tensor:
        columns = None if tokens is None else tokens.expand(b, -1)
        return predictions(engine, torch.arange(b), positions.expand(b, -1), columns)

    return reads_of(measure, (b, engine.shape.t, engine.vocabulary), like, fetch)


def traced(engine: Engine, metric: Metric) -> Metric:
    """A metric that takes all logits as one that takes what it reads of the unpatched run."""
    zero = torch.zeros(1, 1, dtype=torch.int64)
    like = engine.unpatched(zero[0], zero, zero)
    measure = lambda logits: metric.measure(logits, logits)  # noqa: E731
    reads = recorded(engine, measure, like)
    whole = engine.shape.b, engine.shape.t, engine.vocabulary

    def measure_one(logits: Tensor, _: Tensor) -> Tensor:
        lazy = Logits(whole, logits, reads.table(logits))
        out = measure(lazy)
        lazy.check()
        return out

    tokens = None if reads.tokens is None else reads.tokens[None]
    return replace(metric, measure=measure_one, tokens=tokens, positions=reads.positions[None])


def _execute(
    op: str,
    engine: Engine,
    job: Job,
    metric: Metric,
    memory: int,
    progress: bool,
    resume: str | Path | None,
) -> Outcome:
    """`execute` with a metric that says what it reads."""
    cells, shape = job.cells, engine.shape
    b = shape.b
    slots = metric.slots(shape.first, shape.stop, shape.t)
    columns = metric.columns(b, engine.vocabulary)
    prompts = torch.arange(b)
    own = predictions(engine, prompts, slots, columns)
    other = own if job.ablation else predictions(engine, prompts + b, slots, columns)
    padding = shape.padding(slots).to(own.device)
    clean, corrupted = (own, other) if job.base == "clean" else (other, own)
    reference = corrupted if metric.reference == "corrupted" else clean
    runs = (("clean", clean), ("corrupted", corrupted))[: 1 if job.ablation else 2]
    # Of a copy, for a metric may write into what it is given and patched runs start from these.
    measured = [
        metric(logits[None].clone(), reference, lambda _, name=name: f"of the unpatched {name} run")
        for name, logits in runs
    ]
    unpatched = torch.cat(measured).to(own)  # [1 or 2, b]
    scores = torch.empty(cells.count, b, dtype=own.dtype)
    written = torch.zeros(cells.count, dtype=torch.int64)
    size = _group(cells, engine, own, memory)
    mark = "" if resume is None else _fingerprint(engine, job)
    partial = Partial(op, resume, mark, unpatched, scores, written)
    done = partial.load()
    partial.save(done)  # so that a place that cannot be written is known before the work
    with closing(_bar(op, cells.count, progress)) as bar:
        bar.update(done)
        for low in range(done, cells.count, size):
            some = torch.arange(low, min(low + size, cells.count))
            plan = engine.trimmed(cells.plan(some))
            written[some] = torch.bincount(plan.writes.row // b, minlength=len(some))
            logits = own.expand(len(some), *own.shape).clone()  # [cells, b, m, c]
            for row, slot, new in engine.patched(plan, slots, columns):
                logits[row // b, row % b, slot] = new
            logits[:, padding] = torch.nan
            where = lambda i, low=low: f"with the patch at {cells.place(low + i)}"  # noqa: E731
            scores[some] = metric(logits, reference, where).to(scores)
            partial.save(int(some[-1]) + 1)
            bar.update(len(some))
    return Outcome(scores, written, unpatched[0], unpatched[-1][: 0 if job.ablation else b])


def _group(cells: Cells, engine: Engine, logits: Tensor, memory: int) -> int:
    """Cells at a time: bounded by their writes, their tokens and the logits that are read of them.

    A group is what an interruption loses, and a step of the progress bar.
    """
    a_cell = 2 * logits.numel() * logits.element_size()
    fits = (
        WRITES // max(1, cells.writes_a_cell),
        engine.groups * TOKENS // (engine.shape.b * engine.shape.t),
        memory // max(1, a_cell),
    )
    return max(1, min(cells.count, *fits))


def sweep_of(
    op: str, engine: Engine, grid: Grid, job: Job, *, memory: int, progress: bool,
    resume: str | Path | None,
) -> Sweep:  # fmt: skip
    """Run the cells of a grid and lay the numbers out along its axes."""
    found = execute(op, engine, job, memory=memory, progress=progress, resume=resume)
    return laid_out(found, engine, job, site=grid.site, axes=grid.axes, values=grid.labels)


def laid_out(
    found: Outcome, engine: Engine, job: Job, *, site: str, axes: tuple[str, ...],
    values: tuple[tuple[float, ...], ...],
) -> Sweep:  # fmt: skip
    """Numbers by cell along axes that run over `values`, the last one fastest."""
    shape = [len(v) for v in values]
    by_prompt = found.scores.unflatten(0, shape)
    return Sweep(
        scores=by_prompt.mean(-1),
        by_prompt=by_prompt,
        axes=axes,
        values=values,
        site=site,
        metric=job.metric.name,
        clean=found.clean,
        corrupted=found.corrupted,
        base=job.base,
        written=found.written.unflatten(0, shape),
        engine=engine.name,
        note=engine.note,
    )


def _fingerprint(engine: Engine, job: Job) -> str:
    """Tells one sweep from another, but for what a metric measures: see `Partial`."""
    shape, metric = engine.shape, job.metric
    digest = hashlib.sha256(engine.fingerprint())
    parts = (job.cells.describe(), metric.name, metric.reference, job.base, job.about)
    digest.update(repr(parts).encode())
    for values in (shape.first, shape.stop, metric.tokens, metric.positions):
        digest.update(b"" if values is None else values.numpy().tobytes())
    return digest.hexdigest()


def _bar(op: str, cells: int, progress: bool):
    from tqdm import tqdm

    return tqdm(total=cells, desc=op, unit="cell", disable=not progress)
