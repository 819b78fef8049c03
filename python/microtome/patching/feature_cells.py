"""Cells that add a direction to a stream: a feature of an autoencoder, or what it leaves out."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from microtome.models.native.plan import STAGES, Plan, Writes
from microtome.ops import ADD
from microtome.patching.cells import Shape


@dataclass(frozen=True)
class FeatureCells:
    """One cell for each feature, or for each position and feature.

    A feature f is changed by adding (a'_f - a_f) W_dec[f], so the rest of the code and the
    autoencoder's error stay as they are.

    Attributes:
        shape: of the run.
        at: layer and stage of the activation.
        features: ids, one a column of `change`.
        change: [b, t, features], a' - a.
        W_dec: [features, d].
        positions: positions that are cells of their own, or None for all in one cell.
    """

    shape: Shape
    at: tuple[int, str]
    features: Tensor
    change: Tensor
    W_dec: Tensor
    positions: Tensor | None

    @property
    def count(self) -> int:
        """How many there are."""
        return len(self.features) * (1 if self.positions is None else len(self.positions))

    @property
    def writes_a_cell(self) -> int:
        """At most."""
        return self.shape.b * (self.shape.t if self.positions is None else 1)

    def place(self, cell: int) -> str:
        """Where a cell lies, for messages."""
        feature = f"feature {int(self.features[cell % len(self.features)])}"
        if self.positions is None:
            return feature
        return f"{feature}, position {int(self.positions[cell // len(self.features)])}"

    def describe(self) -> str:
        """Place and features; the sweep adds what is done to them."""
        positions = None if self.positions is None else self.positions.tolist()
        return repr((self.at, self.features.tolist(), positions))

    def plan(self, cells: Tensor) -> Plan:
        """Their writes."""
        b, t, n = self.shape.b, self.shape.t, len(self.features)
        column = cells % n
        row = torch.arange(len(cells) * b)
        if self.positions is None:
            row = row.repeat_interleave(t)
            position = torch.arange(t).repeat(len(cells) * b)
        else:
            position = self.positions[cells // n].repeat_interleave(b)
        prompt, feature = row % b, column[row // b]
        full = lambda value: torch.full_like(row, value)  # noqa: E731
        writes = Writes(
            row, full(self.at[0]), full(STAGES.index(self.at[1])), position, full(0),
            full(self.W_dec.shape[1]), full(ADD), feature,
            self.change[prompt, position, feature].double().cpu(),
        )  # fmt: skip
        counts = (position >= self.shape.first[prompt]) & (position < self.shape.stop[prompt])
        sources = {self.at: self.W_dec}
        return Plan(torch.arange(b).repeat(len(cells)), writes.select(counts), sources)


@dataclass(frozen=True)
class ErrorCells:
    """One cell for each position, to which a vector of its own is added.

    Attributes:
        shape: of the run.
        at: layer and stage of the activation.
        change: [b * t, d].
    """

    shape: Shape
    at: tuple[int, str]
    change: Tensor

    @property
    def count(self) -> int:
        """How many there are."""
        return self.shape.t

    @property
    def writes_a_cell(self) -> int:
        """At most."""
        return self.shape.b

    def place(self, cell: int) -> str:
        """Where a cell lies, for messages."""
        return f"position {cell}"

    def describe(self) -> str:
        """Place and what is added."""
        return repr((self.at, float(self.change.double().sum())))

    def plan(self, cells: Tensor) -> Plan:
        """Their writes."""
        b = self.shape.b
        row = torch.arange(len(cells) * b)
        prompt, position = row % b, cells[row // b]
        token = prompt * self.shape.t + position
        moved = self.change.ne(0).any(1).cpu()[token]
        full = lambda value: torch.full_like(row, value)  # noqa: E731
        writes = Writes(
            row, full(self.at[0]), full(STAGES.index(self.at[1])), position, full(0),
            full(self.change.shape[1]), full(ADD), token, moved.double(),
        )  # fmt: skip
        counts = (position >= self.shape.first[prompt]) & (position < self.shape.stop[prompt])
        return Plan(prompt, writes.select(counts), {self.at: self.change})
