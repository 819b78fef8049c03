"""The game of a model's own parts: what a metric loses when some of them are taken out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from microtome.errors import ArgumentError, NonFiniteError
from microtome.models.native.tree import Place, tree
from microtome.patching.execute import Engine, predictions, traced
from microtome.patching.hooked import HookEngine
from microtome.patching.metrics import Metric, as_metric
from microtome.patching.native import NativeEngine
from microtome.patching.traced import BeyondError
from microtome.shapley.coalitions import members
from microtome.shapley.parts_runs import ForkedRuns, HookedRuns
from microtome.shapley.players import Players

ROWS = 1 << 11  # patched prompts between two looks at the clock


class PartsGame:
    """v(S) = the metric of the clean run with every part outside S replaced; one game a prompt.

    Args:
        op: name for messages.
        engine: ready to patch; its base run is the clean one.
        places: where the players lie, in any order.
        players: their names.
        metric: what is measured; one number for each prompt.
        start: [b] int64, the first position of each prompt that a coalition can change; t for none.
        paired: the engine has a corrupted prompt beside each clean one.
        memory: bytes.

    Raises:
        ShapeError, NonFiniteError: the metric of the unpatched runs is none.
    """

    backgrounds = 1
    scalar = True

    def __init__(
        self,
        op: str,
        engine: Engine,
        places: list[Place],
        players: Players,
        metric: Metric | Callable[[Tensor], Tensor],
        start: Tensor,
        *,
        paired: bool,
        memory: int,
    ) -> None:
        self.op, self.players, self.paired, self.memory = op, players, paired, memory
        self._engine = engine
        self.places = tuple(sorted(places, key=lambda place: place.key))
        self.explicands = engine.shape.b
        self.rows_per_round = max(1, ROWS // engine.shape.b)
        self.evaluations = 0
        self.engine, self.note = engine.name, engine.note
        self._start = start
        self._metric = as_metric(op, metric)
        self._ready(traced(engine, self._metric) if self._metric.whole else self._metric)
        self.unpatched, again = (
            self._measure(self._own[None].clone(), lambda _: "of the clean run")[0]
            for _ in range(2)
        )
        if not bool((self.unpatched - again).abs().max() <= 1e-4 * again.abs().max()):
            msg = (
                f"{op}: the metric gives different answers to the same logits, "
                f"{self.unpatched.tolist()[:3]} and {again.tolist()[:3]}. Take one that draws "
                "nothing at random."
            )
            raise ArgumentError(msg)
        self._ends: tuple[Tensor, Tensor] | None = None

    def _ready(self, metric: Metric) -> None:
        """Read the unpatched logits that a metric wants."""
        engine, shape = self._engine, self._engine.shape
        b = shape.b
        self.metric = metric
        slots = metric.slots(shape.first, shape.stop, shape.t)
        columns = metric.columns(b, engine.vocabulary)
        prompts = torch.arange(b)
        self._own = self._reference = predictions(engine, prompts, slots, columns)  # [b, m, c]
        if metric.reference == "corrupted" and self.paired:
            self._reference = predictions(engine, prompts + b, slots, columns)
        self._padding = shape.padding(slots).to(self._own.device)
        self._runs: Any
        if isinstance(engine, NativeEngine):
            self._runs = ForkedRuns(engine, self.places, self._start, slots, columns)
        else:
            assert isinstance(engine, HookEngine)
            self._runs = HookedRuns(engine, slots, columns)

    def ends(self) -> tuple[Tensor, Tensor]:
        """The empty coalition [e, 1, 1] and the full one, the clean run itself, [e, 1]."""
        if self._ends is None:
            nobody = torch.zeros(1, len(self.players), dtype=torch.bool)
            empty = self.value(nobody, torch.arange(self.explicands))
            self._ends = empty, self.unpatched.cpu().double()[:, None]
        return self._ends

    def values(self, ranks: Tensor, spans: Tensor, who: Tensor) -> Tensor:
        return self.value(members(ranks, spans), who)

    def value(self, present: Tensor, who: Tensor) -> Tensor:
        """[e', K, 1] float64 for coalitions [K, p] bool.

        Raises:
            NonFiniteError: the metric is NaN or infinite for a coalition.
        """
        self.evaluations += len(present) * len(who)
        if len(present) == 0 or len(who) == 0:
            return torch.empty(len(who), len(present), 1, dtype=torch.float64)
        try:
            return self._value(present, who)
        except BeyondError:  # the metric reads more of this run than of the clean one
            self._ready(self._metric)
            return self._value(present, who)

    @torch.no_grad()
    def _value(self, present: Tensor, who: Tensor) -> Tensor:
        some, which = tree(present, self.places)
        b, found = self.explicands, []
        a_run = max(1, 2 * self._own.numel() * self._own.element_size())  # 0: it reads no logit
        size = max(1, min(self._runs.at_once, self.memory // a_run))
        for low in range(0, len(some.present), size):
            high = min(low + size, len(some.present))
            logits = self._own.expand(high - low, *self._own.shape).clone()  # [U, b, m, c]
            for row, slot, new in self._runs(some, low, high, who):
                logits[row // b, row % b, slot] = new
            logits[:, self._padding] = torch.nan
            where = lambda i, low=low: self._where(some.present[low + i])  # noqa: E731
            found.append(self._measure(logits, where)[:, who.to(logits.device)])
        return torch.cat(found).cpu().double()[which].T[..., None]

    def _measure(self, logits: Tensor, where: Callable[[int], str]) -> Tensor:
        """[U, b] of logits [U, b, m, c]."""
        out = self.metric(logits, self._reference, where)
        if not bool(out.isfinite().all()):
            run, prompt = (int(i) for i in (~out.isfinite()).nonzero()[0])
            msg = (
                f"{self.op}: the metric is infinite for prompt {prompt} {where(run)}, so that no "
                "difference can be taken. Choose one that stays finite, such as a logit difference."
            )
            raise NonFiniteError(msg)
        return out

    def _where(self, present: Tensor) -> str:
        """Which coalition, for messages."""
        absent = (~present).nonzero().flatten().tolist()
        names = ", ".join(self.players.names[j] for j in absent[:3])
        return f"with {len(absent)} of {len(present)} players absent ({names}, ...)"
