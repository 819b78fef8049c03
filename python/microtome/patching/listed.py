"""Cells given one by one: any writes together, and pairs of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from microtome import _check
from microtome.errors import ArgumentError
from microtome.patching.engine import MEMORY, engine_for
from microtome.patching.execute import Engine, Job, execute
from microtome.patching.listed_cells import ListedCells
from microtome.patching.metrics import Metric, as_metric
from microtome.patching.naive import Write
from microtome.patching.prompts import one, pair


@dataclass(frozen=True, eq=False)
class Pairs:
    """What some writes do alone and two by two.

    Attributes:
        alone: [k], the metric with one write, mean over prompts.
        together: [k, k], with two; the diagonal is `alone`.
        unpatched: the metric without any.
        metric: its name.
        written: [k, k] int64, how many writes changed a bit; where it is 0 the run is the unpatched
            one.

    `interaction` near zero says that two effects add up; it does not follow that the two are
    unconnected, since effects may also cancel elsewhere.
    """

    alone: Tensor
    together: Tensor
    unpatched: float
    metric: str
    written: Tensor

    @property
    def interaction(self) -> Tensor:
        """[k, k]: joint effect minus the sum of the single effects; zero on the diagonal."""
        single = self.alone - self.unpatched
        out = self.together - self.unpatched - single[:, None] - single[None, :]
        return out.fill_diagonal_(0.0)


def patch(
    model: nn.Module,
    base: Tensor,
    source: Tensor | None,
    metric: Metric | Callable[[Tensor], Tensor],
    cells: Sequence[Sequence[Write]],
    *,
    attention_mask: Tensor | None = None,
    precision: str = "fp32",
    memory: int = MEMORY,
    engine: str = "auto",
    progress: bool = False,
) -> Tensor:
    """Measure any patches: each cell is a list of writes that apply together.

    Args:
        model: as in `sweep`.
        base: [b, t] int64, the run that is patched.
        source: [b, t], the run that values come from, or None if no write reads it.
        metric: as in `sweep`. To `kl_divergence` the base run is "clean", the source "corrupted".
        cells: the writes of each cell, at any sites and layers. A cell without writes is the base
            run.
        attention_mask: [b, t] of both runs.
        precision: as in `sweep`, and so all that follows.
        memory: bytes.
        engine: "auto", "native", "blocks" or "forwards".
        progress: show a progress bar.

    Returns:
        [cells, b], the numbers `naive_sweep` gives with one forward a cell.

    Raises:
        ArgumentError, ShapeError, SiteError, NonFiniteError: as `sweep` and `Write`; or a write
            lies in padding in every prompt.

    Example:
        >>> from microtome.models import ToyModel
        >>> from microtome.patching import logit_difference
        >>> base, source = torch.tensor([[1, 2, 3]]), torch.tensor([[4, 5, 6]])
        >>> both = [Write("z.0", heads=1), Write("z.2", heads=3, positions=-1)]
        >>> patch(ToyModel(), base, source, logit_difference(7, 8), [both, []]).shape
        torch.Size([2, 1])
    """
    job, ready = _job(
        "patch", model, base, source, metric, cells, "clean", attention_mask, precision, memory,
        engine,
    )  # fmt: skip
    return execute("patch", ready, job, memory=memory, progress=progress, resume=None).scores


def pairs(
    model: nn.Module,
    clean: Tensor,
    corrupted: Tensor,
    metric: Metric | Callable[[Tensor], Tensor],
    writes: Sequence[Write],
    *,
    direction: str = "denoise",
    attention_mask: Tensor | None = None,
    precision: str = "fp32",
    memory: int = MEMORY,
    engine: str = "auto",
    progress: bool = True,
) -> Pairs:
    """Patch some places alone and every two of them together.

    Args:
        model: as in `sweep`.
        clean: [b, t] int64.
        corrupted: [b, t].
        metric: as in `sweep`.
        writes: k places.
        direction: as in `sweep`.
        attention_mask: [b, t] of both runs.
        precision: as in `sweep`, and so all that follows.
        memory: bytes.
        engine: "auto", "native", "blocks" or "forwards".
        progress: show a progress bar, over k (k + 1) / 2 cells.

    Returns:
        Pairs.

    Raises:
        ArgumentError, ShapeError, SiteError, NonFiniteError: as `sweep`.

    Example:
        >>> from microtome.models import ToyModel
        >>> from microtome.patching import logit_difference
        >>> clean, corrupted = torch.tensor([[4, 5, 6]]), torch.tensor([[1, 2, 3]])
        >>> heads = [Write("z.0", heads=1), Write("z.1", heads=2), Write("z.2", heads=0)]
        >>> metric = logit_difference(7, 8)
        >>> pairs(ToyModel(), clean, corrupted, metric, heads, progress=False).interaction.shape
        torch.Size([3, 3])
    """
    _check.one_of("pairs", "direction", direction, ("denoise", "noise"))
    clean, corrupted = pair("pairs", model, clean, corrupted, attention_mask)
    base, source, name = clean, corrupted, "clean"
    if direction == "denoise":
        base, source, name = corrupted, clean, "corrupted"
    k = len(writes)
    i, j = torch.triu_indices(k, k, 1)
    cells: list[list[Write]] = [[write] for write in writes]
    cells += [[writes[a], writes[c]] for a, c in zip(i.tolist(), j.tolist(), strict=True)]
    job, ready = _job(
        "pairs", model, base, source, metric, cells, name, attention_mask, precision, memory,
        engine,
    )  # fmt: skip
    found = execute("pairs", ready, job, memory=memory, progress=progress, resume=None)
    scores = found.scores.mean(1)
    together, written = torch.diag(scores[:k]), torch.diag(found.written[:k])
    together[i, j] = together[j, i] = scores[k:]
    written[i, j] = written[j, i] = found.written[k:]
    unpatched = found.corrupted if direction == "denoise" else found.clean
    return Pairs(scores[:k], together, float(unpatched.mean()), job.metric.name, written)


def _job(
    op: str,
    model: nn.Module,
    base: Tensor,
    source: Tensor | None,
    metric: Metric | Callable[[Tensor], Tensor],
    cells: Sequence[Sequence[Write]],
    name: str,
    mask: Tensor | None,
    precision: str,
    memory: int,
    engine: str,
) -> tuple[Job, Engine]:
    """Cells ready to run; `name` is what metrics call the base run, "clean" or "corrupted"."""
    for i, cell in enumerate(cells):
        if not isinstance(cell, Sequence) or not all(isinstance(write, Write) for write in cell):
            msg = f"{op}: each cell must be a list of Write, got {cell!r} as cell {i}."
            raise ArgumentError(msg)
    if source is None:
        base = one(op, model, base, mask)
        if any(write.reads_source for cell in cells for write in cell):
            msg = f"{op}: a write reads the source run, got source=None. Pass source, or a value."
            raise ArgumentError(msg)
    else:
        base, source = pair(op, model, base, source, mask)
    other = base[:0] if source is None else source
    ready = engine_for(
        op, model, base, other, mask, paired=source is not None, precision=precision,
        memory=memory, engine=engine, site="",
    )  # fmt: skip
    listed = ListedCells(op, ready, cells)
    return Job(listed, as_metric(op, metric), name, ablation=source is None), ready
