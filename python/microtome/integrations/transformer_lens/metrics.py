"""Calling a metric on the logits of one cell, and checking what it returns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from microtome.errors import ArgumentError, DtypeError, NonFiniteError, ShapeError

Metric = Callable[[Tensor], Any]


def metrics_of(op: str, metric: Metric | Mapping[str, Metric], per_example: bool) -> Metrics:
    """One metric, under the name "metric", or a mapping of them.

    Raises:
        ArgumentError: what was given cannot be called, or the mapping is empty.
    """
    by_name = dict(metric) if isinstance(metric, Mapping) else {"metric": metric}
    wrong = next((name for name, function in by_name.items() if not callable(function)), None)
    if wrong is not None or not by_name:
        what = "nothing" if wrong is None else f"{type(by_name[wrong]).__name__} for {wrong!r}"
        msg = (
            f"{op}: patching_metric must be a function of logits [b, t, v], or a mapping of names "
            f"to such functions, got {what}."
        )
        raise ArgumentError(msg)
    return Metrics(op, by_name, per_example)


@dataclass(frozen=True)
class Metrics:
    """One metric or several, and what each must return.

    Attributes:
        op: name for messages.
        by_name: metrics by name.
        per_example: one value for each row instead of one number.
    """

    op: str
    by_name: Mapping[str, Metric]
    per_example: bool

    def __call__(self, logits: Tensor, cell: str) -> Tensor:
        """Every metric on the logits [b, t, v] of one cell: [m], or [m, b] if per example.

        Args:
            logits: as the model gives them for the corrupted batch under one patch.
            cell: which, for messages.

        Raises:
            DtypeError: a metric returned no number.
            ShapeError: a metric returned another number of values.
            NonFiniteError: it returned NaN.
        """
        return torch.stack(
            [self._one(name, metric, logits, cell) for name, metric in self.by_name.items()]
        )

    def _one(self, name: str, metric: Metric, logits: Tensor, cell: str) -> Tensor:
        b = logits.shape[0]
        returned = metric(logits)
        if not isinstance(returned, (Tensor, float, int, list, tuple)):
            msg = (
                f"{self.op}: metric {name!r} must return a number, got "
                f"{type(returned).__name__}: {returned!r}."
            )
            raise DtypeError(msg)
        value = torch.as_tensor(returned).detach()
        if self.per_example:
            if value.shape != (b,):
                msg = (
                    f"{self.op}: metric {name!r} must return one value per row, [{b}], got shape "
                    f"{list(value.shape)}. For one number pass reduce='scalar'."
                )
                raise ShapeError(msg)
        elif value.numel() != 1:
            msg = (
                f"{self.op}: metric {name!r} must return one number, got shape "
                f"{list(value.shape)}. For one value per row pass reduce='mean' or reduce='none'."
            )
            raise ShapeError(msg)
        if bool(value.isnan().any()):
            msg = (
                f"{self.op}: metric {name!r} returned NaN at {cell}. Check the metric on the "
                "unpatched logits first."
            )
            raise NonFiniteError(msg)
        value = value.to(device=logits.device, dtype=torch.get_default_dtype())
        return value if self.per_example else value.reshape(())
