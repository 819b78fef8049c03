"""The activations that were asked for last, as many as fit."""

from __future__ import annotations

from collections.abc import Callable
from weakref import WeakValueDictionary

from torch import Tensor

# (layers, stage) -> [r, w] of each layer, read in one pass
Read = Callable[[range, str], list[Tensor]]


class Held:
    """Activations by layer and stage, read when they are asked for and dropped when others come.

    Args:
        layers: how many there are.
        size: stage -> bytes of one layer's activation.
        memory: bytes to hold; one activation is held whatever it takes.
        read: reads the activations of some layers.
    """

    def __init__(self, layers: int, size: Callable[[str], int], memory: int, read: Read) -> None:
        self.layers, self.size, self.memory, self.read = layers, size, memory, read
        self.kept: dict[tuple[int, str], Tensor] = {}
        # With those that were dropped and are still in the hands of whoever asked.
        self.alive: WeakValueDictionary[tuple[int, str], Tensor] = WeakValueDictionary()

    def __call__(self, layer: int, stage: str) -> Tensor:
        """One activation; with it come those of later layers, as far as memory goes."""
        found = self.alive.get((layer, stage))
        if found is None:
            fits = max(1, self.memory // max(1, self.size(stage)))
            some = range(0 if fits >= self.layers else layer, self.layers)[:fits]
            self._make_room(len(some) * self.size(stage))
            for at, new in zip(some, self.read(some, stage), strict=True):
                self.kept[at, stage] = self.alive[at, stage] = new
            found = self.kept[layer, stage]
        return found

    def _make_room(self, wanted: int) -> None:
        """Drop the oldest until `wanted` bytes fit."""
        while self.kept and wanted + sum(x.nbytes for x in self.kept.values()) > self.memory:
            self.kept.pop(next(iter(self.kept)))
