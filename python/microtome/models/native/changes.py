"""Where the rows of a plan join the wave, and what is written to them on the way."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from microtome.models.native.base import BaseRun
from microtome.models.native.plan import STAGES, Plan, Writes
from microtome.models.native.rows import Rows
from microtome.ops import patch_rows


class Changes:
    """A plan, sorted by layer and stage.

    Args:
        base: the base run.
        plan: rows and writes; every row has one.
        stop: [n] int64, one past the last position of each row.

    Attributes:
        rows: all rows, each from its first write on.
        writes: (layer, stage) -> its writes.
        swaps: [n] bool, rows that change one position of the stream and nothing else in the layer
            they join at.
    """

    def __init__(self, base: BaseRun, plan: Plan, stop: Tensor) -> None:
        self.base = base
        device = base.final.device
        self.plan = plan = replace(
            plan, example=plan.example.to(device), writes=plan.writes.to(device)
        )
        entry, start = plan.entries()
        self.layer, self.stage = entry // len(STAGES), entry % len(STAGES)
        n = len(plan.example)
        ids = torch.arange(n, device=device)
        self.rows = Rows(ids, plan.example, start, stop, base.shape[1])
        key = plan.writes.layer * len(STAGES) + plan.writes.stage
        self.writes = {
            (k // len(STAGES), STAGES[k % len(STAGES)]): plan.writes.select(key == k)
            for k in key.unique().tolist()
        }
        # A row that replaces one position of the stream and writes nothing else in that layer.
        here = plan.writes.layer == self.layer[plan.writes.row]
        alone = (plan.writes.stage == 0) & (plan.writes.position == start[plan.writes.row])
        others = torch.zeros(n, dtype=torch.bool, device=device)
        others[plan.writes.row[here & ~alone]] = True
        self.swaps = ~others & (self.stage == 0)

    def entering(
        self, layer: int, stage: str, swaps: Tensor | None = None, *, take: bool = True
    ) -> Rows | None:
        """The rows whose first write is here, those of the mask `swaps` alone or left out."""
        here = (self.layer == layer) & (self.stage == STAGES.index(stage))
        if swaps is not None:
            here = here & (swaps if take else ~swaps)
        which = here.nonzero().flatten()
        return self.rows.take(which) if len(which) else None

    def join(self, layer: int, stage: str, rows: Rows) -> Tensor:
        """[T, w]: the base activation of rows that join here, with their writes."""
        held = self.base.site(layer, stage).unflatten(0, self.base.shape)
        w = self.writes.get((layer, stage))
        if w is None:
            return held.flatten(0, 1)[rows.index]
        place = rows.of(len(self.plan.example))[w.row]
        inside = (place >= 0) & (w.position >= rows.start[place]) & (w.position < rows.stop[place])
        return self.patch(
            layer, stage, held, (rows.cut(), rows.tokens), w, place, w.position, inside
        )

    def write(self, layer: int, stage: str, keys: Tensor, x: Tensor) -> Tensor:
        """[T, w]: live tokens, known by their keys, with their writes; x itself without any."""
        w = self.writes.get((layer, stage))
        if w is None or len(keys) == 0:
            return x
        order = keys.argsort()
        wanted = w.row * self.base.shape[1] + w.position
        place = order[torch.searchsorted(keys[order], wanted).clamp_max(len(keys) - 1)]
        inside = keys[place] == wanted
        if not bool(inside.any()):
            return x
        whole = torch.tensor([[0, 0, len(x)]], dtype=torch.int32, device=x.device)
        zero = torch.zeros_like(place)
        return self.patch(layer, stage, x[None], (whole, len(x)), w, zero, place, inside)

    def patch(
        self,
        layer: int,
        stage: str,
        held: Tensor,
        cut: tuple[Tensor, int],
        w: Writes,
        row: Tensor,
        position: Tensor,
        inside: Tensor,
    ) -> Tensor:
        """`patch_rows` of rows (and how many tokens they have) with the writes that lie inside."""
        sources = self.plan.sources.get((layer, stage))
        if sources is None:
            sources = held.new_empty(0, held.shape[-1])
        table = torch.stack((row, position, w.lo, w.hi, w.source, w.op), 1)[inside].int()
        factor, (rows, total) = w.factor[inside].to(held.dtype), cut
        return patch_rows(held, sources, rows, table, factor, total)

    def wants(self, layer: int, stage: str, keys: Tensor) -> Tensor:
        """[T] bool, which of the tokens known by `keys` have a write at this stage."""
        w = self.writes.get((layer, stage))
        if w is None:
            return torch.zeros_like(keys, dtype=torch.bool)
        return torch.isin(keys, w.row * self.base.shape[1] + w.position)

    def touched(self, layer: int, stage: str, rows: Rows) -> bool:
        """Whether a row has a write at this stage."""
        w = self.writes.get((layer, stage))
        return w is not None and bool(torch.isin(w.row, rows.ids).any())
