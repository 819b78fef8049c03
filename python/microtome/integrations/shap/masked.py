"""The game of a masker: it says what a model sees when features are hidden."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from microtome.errors import ArgumentError
from microtome.shapley.call import Outputs
from microtome.shapley.coalitions import MEAN, members
from microtome.shapley.players import Players

_TEXTS = 64  # masked texts in one call, unless the user says otherwise


class MaskerGame:
    """v(S) = mean over the rows that `masker(S, *args)` returns of the model: a Game of one row.

    Args:
        op: name for messages.
        function: the model, called with one array for each of its inputs.
        masker: called as masker(mask, *args) with a bool for each feature. Of shap's conventions it
            may follow any: `shape`, `mask_shapes`, `invariants`, `immutable_outputs`, ...
        args: the inputs of one row.
        batch: most masks in one call of the model, or None for as many as fit in `memory`.
        memory: bytes of masked inputs in one call.
        whole: let features play too that the masker never masks.

    Attributes:
        varying: [p], which of the masker's features play; masking the others changes nothing.
        features: how many the masker has.
    """

    rows_per_round = 1 << 10
    engine = "calls"
    explicands = 1

    def __init__(
        self,
        op: str,
        function: Callable[..., Any],
        masker: Callable[..., Any],
        args: tuple[Any, ...],
        batch: int | None,
        memory: int,
        whole: bool = False,
    ) -> None:
        self.op, self.function, self.masker, self.args = op, function, masker, args
        self.batch, self.memory = batch, memory
        shape = getattr(masker, "shape", None)
        shape = shape(*args) if callable(shape) else shape
        if shape is None:
            shape = (None, sum(math.prod(np.shape(a)) for a in args))
        self.features = int(shape[1])
        if self.features == 0:
            msg = f"{op}: the row {args!r} has no features to mask. Leave it out."
            raise ArgumentError(msg)
        invariants = getattr(masker, "invariants", None)
        varying = np.ones(self.features, dtype=bool)
        if callable(invariants) and not whole:
            varying = ~np.asarray(invariants(*args), dtype=bool).reshape(-1, self.features).all(0)
        self.varying = np.flatnonzero(varying)
        if not len(self.varying):
            self.varying = np.zeros(1, dtype=np.int64)
        self.players = Players(tuple(f"feature {j}" for j in self.varying))
        self.evaluations = 0
        self._answer = Outputs(f"{op}: the model", lambda inputs: function(*inputs))
        empty, full = self._rows(np.array([[False], [True]]).repeat(self.features, 1))
        self.backgrounds = len(empty)
        self._ends = empty[None], full.mean(0)[None]

    @property
    def scalar(self) -> bool:
        return self._answer.scalar

    def ends(self) -> tuple[Tensor, Tensor]:
        return self._ends

    def values(self, ranks: Tensor, spans: Tensor, who: Tensor) -> Tensor:
        if not len(spans):
            return torch.empty(1, 0, self._ends[1].shape[1], dtype=torch.float64)
        # The rows of a background are asked for one after another: mask once for all of them.
        distinct, at = torch.unique_consecutive(spans[:, 1:], dim=0, return_inverse=True)
        masks = np.zeros((len(distinct), self.features), dtype=bool)
        whole = torch.cat([torch.zeros(len(distinct), 1, dtype=spans.dtype), distinct], 1)
        masks[:, self.varying] = members(ranks, whole).numpy()
        found = self._rows(masks)
        single = self.backgrounds == 1
        each = [
            found[i].mean(0) if b == MEAN or single else found[i][b]
            for i, b in zip(at.tolist(), spans[:, 0].tolist(), strict=True)
        ]
        return torch.stack(each)[None]

    def _rows(self, masks: np.ndarray) -> list[Tensor]:
        """For each mask the model's answers to its rows, [n, o]."""
        out: list[Tensor] = []
        waiting: list[tuple[Any, ...]] = []
        size = 0
        for i, mask in enumerate(masks):
            masked = self.masker(mask, *self.args)
            masked = masked if isinstance(masked, tuple) else (masked,)
            if not getattr(self.masker, "immutable_outputs", False):
                masked = tuple(_copy(a) for a in masked)
            waiting.append(masked)
            size += sum(getattr(a, "nbytes", 0) for a in masked)
            texts = np.asarray(masked[0]).dtype.kind in "OUS"
            most = self.batch or (_TEXTS if texts else len(masks))
            if len(waiting) >= most or size >= self.memory or i + 1 == len(masks):
                out += self._call(waiting)
                waiting, size = [], 0
        return out

    def _call(self, waiting: list[tuple[Any, ...]]) -> list[Tensor]:
        counts = [len(masked[0]) for masked in waiting]
        inputs = tuple(_join(list(parts)) for parts in zip(*waiting, strict=True))
        self.evaluations += sum(counts)
        return list(self._answer(inputs, sum(counts)).split(counts))


def _copy(a: Any) -> Any:
    return a.copy() if hasattr(a, "copy") else a


def _join(parts: list[Any]) -> Any:
    if hasattr(parts[0], "iloc"):
        import pandas as pd

        return pd.concat(parts, ignore_index=True)
    if isinstance(parts[0], Tensor):
        return torch.cat(parts)
    return np.concatenate(parts)
