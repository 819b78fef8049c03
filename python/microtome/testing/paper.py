"""A GPU of paper for late checks: events pass when a test says so, copies arrive with them."""

from __future__ import annotations

import torch
from torch import Tensor

from microtome import _pending


class PaperEvent:
    """Passes, with all before it, when the test lets it."""

    def __init__(self, gpu: PaperGpu, copies: list[tuple[Tensor, Tensor]]) -> None:
        self.gpu, self.copies, self.passed, self.waited = gpu, copies, False, 0

    def query(self) -> bool:
        return self.passed

    def synchronize(self) -> None:
        self.waited += 1
        self.arrive()

    def arrive(self) -> None:
        self.passed = True
        for host, device in self.copies:
            host.copy_(device)


class PaperGpu(_pending.Gpu):
    """Takes CPU tensors for those of a GPU; put it in the place of `_pending.gpu`."""

    def __init__(self) -> None:
        self.events: list[PaperEvent] = []
        self.captures = False

    def waits(self, device: torch.device) -> bool:
        return True

    def capturing(self) -> bool:
        return self.captures

    def fetch(self, tensors: list[Tensor]) -> tuple[list[Tensor], _pending.Event]:
        hosts = [torch.full_like(t, -7) for t in tensors]  # what nobody may read before the event
        self.events.append(PaperEvent(self, list(zip(hosts, tensors, strict=True))))
        return hosts, self.events[-1]

    def arrive(self) -> None:
        for event in self.events:
            event.arrive()
