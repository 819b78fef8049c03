"""Running coalitions of a model's parts: as a tree of forks, or as rows of the model's own forward.

Both give, for coalitions low ... high - 1 of a tree, the logits of what differs from the base run.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from microtome.models.native.forks import Forks
from microtome.models.native.runner import bytes_a_token
from microtome.models.native.tree import Place, Tree
from microtome.patching.hooked import HookEngine, chosen
from microtome.patching.native import NativeEngine

# Row (coalition - low) * b + prompt [N], slot [N], logits [N, c].
Part = tuple[Tensor, Tensor, Tensor]


class ForkedRuns:
    """By the parts of a known model: what coalitions share is computed once.

    Args:
        engine: ready, with the base run.
        places: that players hold.
        start: [b] int64, the first position of each prompt that a coalition can change; t for none.
        slots: [b, m] int64, the positions read.
        columns: [b, c] int64 token ids, or None for the vocabulary.
    """

    def __init__(
        self,
        engine: NativeEngine,
        places: tuple[Place, ...],
        start: Tensor,
        slots: Tensor,
        columns: Tensor | None,
    ) -> None:
        self.engine, self.slots, self.columns = engine, slots, columns
        first, stop = engine.shape.first[:, None], engine.shape.stop[:, None]
        self.readout = torch.zeros(engine.run.shape, dtype=torch.bool)
        self.readout[: engine.shape.b].scatter_(1, slots, (slots >= first) & (slots < stop))
        at = torch.arange(1, engine.shape.t + 1)
        self.stop = (self.readout[: engine.shape.b] * at).amax(1)  # one past what is read
        self.start = torch.minimum(start, self.stop)
        each = bytes_a_token(engine.run)
        if any(place.stage == "neurons" for place in places):
            each += 3 * engine.shape.d_mlp * engine.run.final.element_size()
        tokens = max(1, int((self.stop - self.start).sum()))
        self.at_once = max(1, engine.memory // (each * tokens))

    def __call__(self, tree: Tree, low: int, high: int, prompts: Tensor) -> Iterator[Part]:
        """Run some coalitions on some prompts [b'] int64."""
        engine, b, t = self.engine, self.engine.shape.b, self.engine.shape.t
        prompts = prompts[self.start[prompts] < self.stop[prompts]]
        if len(prompts) == 0:
            return
        with torch.no_grad():
            forks = Forks(
                engine.run, tree.levels(low, high), prompts, self.start[prompts],
                self.stop[prompts], self.readout, delta=engine.delta,
            )  # fmt: skip
            nodes, stream, tokens = forks.run()
            tokens = tokens.cpu()
            n = len(stream)
            row = (nodes[:, None] * b + tokens // t).flatten()  # [n * N]
            position = (tokens % t).repeat(n)
            own = None if self.columns is None else self.columns[row % b]
            logits = engine.unembedded(stream.flatten(0, 1), own)
        # A position may be read at several slots.
        at, slot = (position[:, None] == self.slots[row % b]).nonzero(as_tuple=True)
        yield row[at], slot, logits[at.to(logits.device)]


class HookedRuns:
    """By a model's own forward, coalitions as rows of a batch; arguments as of ForkedRuns."""

    def __init__(self, engine: HookEngine, slots: Tensor, columns: Tensor | None) -> None:
        self.engine, self.slots, self.columns = engine, slots, columns
        self.at_once = engine.rows_at_once()

    def __call__(self, tree: Tree, low: int, high: int, prompts: Tensor) -> Iterator[Part]:
        """Run some coalitions on some prompts [b'] int64."""
        shape, m = self.engine.shape, self.slots.shape[1]
        entry = tree.entries()[low:high]
        for layer in entry[entry >= 0].unique().tolist():
            runs = (entry == layer).nonzero().flatten()
            for prompt in prompts.tolist():
                same = torch.full((len(runs),), prompt)
                visits = [
                    (place.layer, place.stage, partial(
                        self._visit, place, tree.present[low:high][runs][:, place.players], prompt,
                    ))
                    for place in tree.places
                    if place.layer >= layer
                ]  # fmt: skip
                logits = self.engine.forward(same, min(layer, shape.layers - 1), visits)
                own = None if self.columns is None else self.columns[same]
                new = chosen(logits, self.slots[same], own)
                row = (runs * shape.b + prompt).repeat_interleave(m)
                yield row, torch.arange(m).repeat(len(runs)), new.flatten(0, 1)

    def _visit(self, place: Place, present: Tensor, prompt: int, x: Tensor) -> Tensor:
        """The activation [r, t, w] of runs of one prompt, padding left as it is."""
        shape = self.engine.shape
        position = torch.arange(shape.t)
        counts = (position >= shape.first[prompt]) & (position < shape.stop[prompt])
        at, tokens = torch.arange(len(x)), prompt * shape.t + position
        new = place.change(x, at, present, tokens.to(x.device), joins=False)
        return torch.where(counts.to(x.device)[:, None], new, x)
