"""Running a few cells of a grid exactly."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from microtome.models.native.plan import Plan
from microtome.patching.cells import Grid
from microtome.patching.execute import Engine, GridCells, Job, execute
from microtome.patching.metrics import Metric
from microtome.patching.values import run_values


@dataclass(frozen=True)
class _Chosen(GridCells):
    """Some cells of a grid; `numbers` [n] int64 are theirs in the whole grid."""

    numbers: Tensor

    @property
    def count(self) -> int:
        """How many there are."""
        return len(self.numbers)

    def plan(self, cells: Tensor) -> Plan:
        """Their writes."""
        return super().plan(self.numbers[cells])

    def place(self, cell: int) -> str:
        """Where a cell lies, for messages."""
        return super().place(int(self.numbers[cell]))

    def describe(self) -> str:
        """Tells these cells from others."""
        return repr((super().describe(), self.numbers.tolist()))


def run_chosen(
    op: str, engine: Engine, grid: Grid, numbers: Tensor, metric: Metric, base: str, *,
    memory: int, progress: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Patch some cells of a grid with the source run's activations, as `sweep` does.

    Args:
        op: name for messages.
        engine: with the base and source prompts.
        grid: the cells.
        numbers: [n] int64, which, in the flattened grid.
        metric: what is measured.
        base: "clean" or "corrupted", which prompts are patched.
        memory: bytes for logits.
        progress: show a bar.

    Returns:
        Scores [n, b], and the unpatched run's [b].
    """
    cells = _Chosen(grid, engine.shape, lambda layers: run_values(engine, grid, layers), numbers)
    job = Job(cells, metric, base)
    found = execute(op, engine, job, memory=memory, progress=progress, resume=None)
    return found.scores, found.clean if base == "clean" else found.corrupted
