"""Running a few cells of a grid exactly."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from microtome.patching.cells import Grid
from microtome.patching.execute import Engine, Job, execute
from microtome.patching.metrics import Metric
from microtome.patching.values import run_values


@dataclass(frozen=True)
class _Chosen(Grid):
    """Some cells of a grid in a row; `numbers` [n] int64 are theirs in the whole grid."""

    whole: Grid | None = None
    numbers: Tensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """One axis."""
        assert self.numbers is not None
        return (len(self.numbers),)

    def coordinates(self, cells: Tensor) -> dict[str, Tensor]:
        """Where they lie in the whole grid."""
        assert self.whole is not None
        assert self.numbers is not None
        return self.whole.coordinates(self.numbers[cells])


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
    some = _Chosen(grid.site, grid.axes, grid.values, whole=grid, numbers=numbers)
    job = Job(some, lambda layers: run_values(engine, grid, layers), metric, base)
    found = execute(op, engine, job, memory=memory, progress=progress, resume=None)
    return found.by_prompt, found.unpatched
