"""Numbers on their way from a device: asked for now, waited for where they are used."""

from __future__ import annotations

import torch
from torch import Tensor

from microtome import _pending as pending


class Reading:
    """A few numbers that a device has, or will have.

    Args:
        numbers: tensors of one element on one device.

    Attributes:
        late: the device may still be working on them, so that `read` may wait. False on a CPU.
    """

    def __init__(self, *numbers: Tensor) -> None:
        together = torch.stack([number.double() for number in numbers])
        self.late = pending.gpu.waits(together.device)
        self._event: pending.Event | None = None
        if self.late:
            (together,), self._event = pending.gpu.fetch([together])
        self._host = together

    def read(self) -> list[float]:
        """The numbers, in the order in which they were given."""
        if self._event is not None:
            self._event.synchronize()
            self._event = None
        return self._host.tolist()
