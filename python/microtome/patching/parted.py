"""The fast engine for more prompts than the memory holds the runs of."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from microtome.models.native.base import BaseRun
from microtome.models.native.plan import Plan
from microtome.patching.held import Held
from microtome.patching.native import KnownModel, NativeEngine


class PartedEngine(KnownModel):
    """As NativeEngine, but the base runs come and go, as many prompts at a time as fit.

    What stays is every prompt's final stream and, in an eighth of the memory (or one place, where
    that is larger), the activations that were asked for last. So a group of cells costs a base run
    of the prompts on top, and cells come in larger groups than elsewhere. One prompt's run is the
    least memory that it takes.
    """

    groups = 16

    def _begin(self, memory: int) -> None:
        runner, t = self.runner, self.shape.t
        a_place = t * self.shape.d * runner.stack.unembed.weight.element_size()
        a_prompt = runner.bytes_a_token(differences=self.delta) * t
        # Beside the final stream; the rest is for patched rows, what is held, and what is joined.
        self.memory = max(memory // 2, memory - 2 * len(self.tokens) * a_place)
        self.at_once = max(1, self.memory * 3 // 8 // a_prompt)
        self.final = torch.cat([run.final for run in self._runs(self.shape.layers)])
        self._held = Held(self.shape.layers, self._size, self.memory // 8, self._read)
        self._part: tuple[int, NativeEngine] | None = None

    def activation(self, layer: int, stage: str) -> Tensor:
        """[(b + s) * t, w]: what base and source prompts have at a stage."""
        return self.final if layer == self.shape.layers else self._held(layer, stage)

    def patched(
        self, plan: Plan, slots: Tensor, columns: Tensor | None
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Run the rows of a trimmed plan; see NativeEngine.patched."""
        written = torch.zeros(len(plan.example), dtype=torch.bool)
        written[plan.writes.row] = True
        for low in range(0, self.shape.b, self.at_once):
            inside = (plan.example >= low) & (plan.example < low + self.at_once)
            rows = (inside & written).nonzero().flatten()
            if len(rows) == 0:
                continue
            some = plan.take(rows)
            some = replace(some, example=some.example - low)
            own = None if columns is None else columns[low : low + self.at_once]
            part = self._engine(low)
            for row, slot, new in part.patched(some, slots[low : low + self.at_once], own):
                yield rows[row], slot, new

    def _engine(self, low: int) -> NativeEngine:
        """The engine of the base prompts from `low` on, kept until another part is asked for."""
        if self._part is None or self._part[0] != low:
            self._part = None  # freed before the next one is made
            part = slice(low, min(low + self.at_once, self.shape.b))
            nobody = self.tokens[:0], self.first[:0]
            self._part = (
                low,
                NativeEngine(
                    self.model,
                    self.runner,
                    self.tokens[part],
                    nobody[0],
                    (self.first[part], nobody[1]),
                    self.shape.stop[part],
                    delta=self.delta,
                    memory=self.memory * 9 // 16,
                ),
            )
        return self._part[1]

    def _size(self, stage: str) -> int:
        """Bytes of one layer's activation, all prompts."""
        return len(self.final) * self.shape.width(stage) * self.final.element_size()

    def _read(self, layers: range, stage: str) -> list[Tensor]:
        """A place at some layers, of all prompts."""
        self._part = None  # freed before others are made
        width = self.shape.width(stage)
        out = [self.final.new_empty(len(self.final), width) for _ in layers]
        low = 0
        for run in self._runs(layers[-1] + 1):
            for layer, held in zip(layers, out, strict=True):
                held[low : low + len(run.final)] = run.site(layer, stage)
            low += len(run.final)
        return out

    def _runs(self, layers: int) -> Iterator[BaseRun]:
        """Base runs of all prompts through the first layers, some prompts at a time."""
        stack = self.runner.stack
        runner = replace(self.runner, stack=replace(stack, blocks=stack.blocks[:layers]))
        for some, first in zip(
            self.tokens.split(self.at_once), self.first.split(self.at_once), strict=True
        ):
            yield runner.base(self.model, some, first.int())
