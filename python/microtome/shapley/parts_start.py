"""What the games of a model's parts have in common: checked prompts and an engine ready to run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from microtome import _check
from microtome.errors import ArgumentError, SiteError
from microtome.models.native.tree import Place
from microtome.patching.cells import Shape
from microtome.patching.engine import engine_for
from microtome.patching.execute import Engine
from microtome.patching.metrics import Metric
from microtome.patching.prompts import one, pair
from microtome.shapley.parts_game import PartsGame
from microtome.shapley.players import Players

ABSENT = ("resample", "zero", "mean", "mean-position")
AnyMetric = Metric | Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Start:
    """Prompts and the engine that runs them.

    Attributes:
        op: name for messages.
        engine: its base run holds the clean prompts, and the corrupted ones after them if paired.
        clean: [b, t] int64.
        corrupted: [b, t] or None.
        absent: one of ABSENT.
        memory: bytes.
    """

    op: str
    engine: Engine
    clean: Tensor
    corrupted: Tensor | None
    absent: str
    memory: int

    @property
    def shape(self) -> Shape:
        """Of the run."""
        return self.engine.shape

    def replaced(self, layer: int, stage: str) -> tuple[Tensor, Tensor]:
        """What absent players have at a place; see `filled`."""
        return self.filled(self.engine.activation(layer, stage))

    def filled(self, held: Tensor) -> tuple[Tensor, Tensor]:
        """What stands in for values that are absent.

        Args:
            held: [(b + s) * t, w], of the clean prompts, then of the corrupted ones.

        Returns:
            source [s, w], and [b * t] int64, the row of it for each token of the clean prompts.
        """
        b, t = self.shape.b, self.shape.t
        nowhere = torch.zeros(b * t, dtype=torch.int64)
        if self.absent == "zero":
            return held.new_zeros(1, held.shape[1]), nowhere
        if self.absent == "resample":
            return held, torch.arange(b * t) + b * t
        values = held.unflatten(0, (-1, t))[0 if self.corrupted is None else b :]  # [b, t, w]
        counts = ~self.shape.padding(torch.arange(t).expand(b, -1)).to(held.device)
        if self.absent == "mean":
            return values[counts].mean(0)[None], nowhere
        total = torch.where(counts[..., None], values, 0.0).sum(0)
        number = counts.sum(0).clamp_min(1).to(held)  # a position of padding alone is not read
        return total / number[:, None], torch.arange(t).repeat(b)

    def differing(self) -> Tensor:
        """[b] int64, the first position that a coalition can change; t for none.

        Of a causal model: resampled activations are the run's own until the prompts differ.
        """
        if self.absent != "resample" or self.corrupted is None:
            return self.shape.first
        apart = (self.clean.cpu() != self.corrupted.cpu()) & ~self.shape.padding(
            torch.arange(self.shape.t).expand(self.shape.b, -1)
        )
        return torch.where(apart.any(1), apart.int().argmax(1), self.shape.t)

    def game(
        self,
        places: list[Place],
        players: Players,
        metric: AnyMetric,
        begin: Tensor | None = None,
    ) -> PartsGame:
        """The game; `begin` [b] in place of `differing`."""
        return PartsGame(
            self.op, self.engine, places, players, metric,
            self.differing() if begin is None else begin,
            paired=self.corrupted is not None, memory=self.memory,
        )  # fmt: skip


def start(
    op: str,
    model: nn.Module,
    clean: Tensor,
    corrupted: Tensor | None,
    absent: str,
    mask: Tensor | None,
    precision: str,
    memory: int,
    engine: str,
    sites: Sequence[str],
) -> Start:
    """Check prompts and options, and run the prompts once.

    Raises:
        ArgumentError: an unknown option, or "resample" without a corrupted run.
        ShapeError: the prompts do not correspond.
        SiteError: the model has no sites of such a kind.
    """
    _check.one_of(op, "absent", absent, ABSENT)
    if corrupted is None:
        if absent == "resample":
            msg = (
                f"{op}: absent='resample' takes values from the corrupted run, got corrupted=None. "
                "Pass corrupted prompts, or absent='zero', 'mean' or 'mean-position'."
            )
            raise ArgumentError(msg)
        clean = one(op, model, clean, mask)
        source = clean[:0]
    else:
        clean, corrupted = pair(op, model, clean, corrupted, mask)
        source = corrupted
    ready = engine_for(
        op, model, clean, source, mask, paired=corrupted is not None, precision=precision,
        memory=memory, engine=engine, site="", whole=True,
    )  # fmt: skip
    for site in sites:
        if why := ready.lacks(site):
            msg = f"{op}: {why}. Choose other players."
            raise SiteError(msg)
    return Start(op, ready, clean, corrupted, absent, memory)
