"""What an op looks for in its inputs: NaN and infinity, indices out of range; now or later."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from microtome import _check, _memory
from microtome import _pending as pending
from microtome._csr import check_room
from microtome.errors import ArgumentError, MicrotomeError, NonFiniteError

_NORMS = "NaN, infinity or numbers whose squares overflow float32"


class Look:
    """Looks at the inputs of one call of an op, now or later.

    Args:
        op: the op's name.
        device: where its tensors are.
    """

    def __init__(self, op: str, device: torch.device) -> None:
        self.op, self.device = op, device
        self.now = pending.immediate(device)
        self._health: list[Tensor] = []  # a number a row; finite where the row is sound
        self._pieces: list[pending.Piece] = []

    def finite(self, name: str, tensor: Tensor | None, norms: Tensor | None = None) -> None:
        """Look for NaN and infinity.

        Args:
            name: of the input.
            tensor: [rows, columns], or [rows]; None is skipped.
            norms: [rows], the rows' norms where the call has them anyway: a later look then reads
                those and not the tensor, and finds rows whose squares overflow float32, too.

        Raises:
            NonFiniteError: now, where looks are made now.
        """
        if tensor is None or tensor.numel() == 0:
            return
        if self.now:
            _check.finite_rows(self.op, name, tensor if tensor.dim() == 2 else tensor[:, None])
            return
        if norms is not None:
            self._add(norms, name, NonFiniteError, f"{name} holds {_NORMS}")
            return
        if tensor.dim() == 2:
            tensor = torch.linalg.vector_norm(tensor, ord=float("inf"), dim=-1)  # [rows]
        self._add(tensor, name, NonFiniteError, f"{name} holds NaN or infinity")

    def indices(self, name: str, indices: Tensor, size: int, letter: str = "f") -> Tensor:
        """Look for indices outside [0, size).

        Returns:
            The indices, where looks are made later clamped into the range, so that no kernel reads
            outside.

        Raises:
            ArgumentError: now, where looks are made now.
        """
        if self.now:
            _check.index_range(self.op, indices, size, letter, name)
            return indices
        if indices.numel() == 0 or size == 0:
            return indices
        clamped = indices.clamp(0, size - 1)
        wrong = clamped != indices
        wrong = wrong.any(-1) if wrong.dim() == 2 else wrong
        self.wrong(name, [(wrong, f"{name} must lie in [0, {letter}={size}), and do not")])
        return clamped

    def wrong(self, name: str, problems: Sequence[tuple[Tensor, str]]) -> None:
        """Say of which rows something is wrong, only where looks are made later.

        Args:
            name: of the input.
            problems: masks [rows] of what is wrong, each with what it means. The rows of each are
                counted from 0; of several problems the first is told.
        """
        # One kernel for all of them: the masks of a table are many and short.
        bad = torch.cat([mask for mask, _ in problems])
        if bad.numel() == 0:
            return
        self._health.append(torch.where(bad, float("inf"), 0.0))
        self._pieces += [
            pending.Piece(name, mask.numel(), ArgumentError, what) for mask, what in problems
        ]

    def room(self, what: str, offsets: Tensor, room: int) -> None:
        """Look whether entries by row, offsets [n + 1], fit into the room there is for them.

        Raises:
            ArgumentError: now, where looks are made now.
        """
        if self.now:
            check_room(self.op, int(offsets[-1]), room, what)
            return
        too_small = f"capacity={room} must be larger, it has no room for all {what}"
        self.wrong("capacity", [(offsets[1:] > room, too_small)])

    def _add(self, health: Tensor, name: str, kind: type[MicrotomeError], what: str) -> None:
        self._health.append(health)
        self._pieces.append(pending.Piece(name, health.numel(), kind, what))

    def submit(self) -> Tensor | None:
        """Send the question off.

        Returns:
            A verdict [1] float32 on the device for kernels that must not write when something is
            wrong: 0, or NaN. None where all was looked at already. While a CUDA graph is captured
            the verdict is all there is: nothing is read back, and nothing raised.
        """
        if not self._health:
            return None
        health = torch.cat(self._health)  # of the widest dtype: no number overflows here
        # Zero where finite, else NaN, which max prefers; of several the first.
        value, place = torch.sub(health, health).max(0, keepdim=True)
        if pending.gpu.capturing():
            return value.float()
        copies, event = pending.gpu.fetch([value, place])
        pending.wait_for(pending.Check(self.op, self.device, tuple(self._pieces), copies, event))
        return value.float()


def look_after_writing(op: str, name: str, tensor: Tensor, norms: Tensor) -> None:
    """`Look.finite` at what an op has already written.

    Where memory is too short for the check it is not made: the state is whole, and an error would
    say otherwise.
    """
    try:
        look = Look(op, tensor.device)
        look.finite(name, tensor, norms)
        look.submit()
    except (RuntimeError, MemoryError) as error:
        if not _memory.ran_out(error):
            raise
