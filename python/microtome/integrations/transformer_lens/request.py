"""A sweep as data: what the fast path and the row-batched forwards are given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from microtome.integrations.transformer_lens.metrics import Metric, Metrics
from microtome.integrations.transformer_lens.setters import PatchSetter, StockSetter


@dataclass(frozen=True)
class PatchRequest:
    """A sweep, checked: one patched run for each cell.

    Attributes:
        op: name for messages.
        model: a HookedModel, whose `.model` is the plain model, or a TransformerLens model. In eval
            mode.
        tokens: [b, t] int64, the corrupted run's.
        attention_mask: [b, t] or None.
        activation: the short name as given ("resid_pre", "z", "pattern", ...).
        setter: (activation [b, ...], index, clean activation) -> activation, or None after a change
            in place.
        stock: what `setter` does, if it is a stock one: `stock.where(cell)` is the part of the
            activation that a cell copies.
        cells: index tuples, the layer first; for a stock setter none is negative and all are in
            range.
        hooks: layer -> full hook name, for every layer in `cells`.
        clean: full hook name -> the clean run's activation, [b or 1, t, ...]; for a pattern
            [b or 1, h, t, t]. Unchecked where the setter is no stock one.
        metrics: called as `metrics(logits [b, t, v], description of the cell)`, it checks and
            returns [m], or [m, b] if `metrics.per_example`.
    """

    op: str
    model: Any
    tokens: Tensor
    attention_mask: Tensor | None
    activation: str
    setter: PatchSetter
    stock: StockSetter | None
    cells: Sequence[tuple[int, ...]]
    hooks: Mapping[int, str]
    clean: Mapping[str, Tensor]
    metrics: Metrics

    @property
    def metric(self) -> Metric | None:
        """The metric if there is just one and it gives one number, or None."""
        if len(self.metrics.by_name) != 1 or self.metrics.per_example:
            return None
        return next(iter(self.metrics.by_name.values()))
