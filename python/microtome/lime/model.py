"""The user's model: called a bounded number of rows at a time, its answers checked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from microtome.errors import ArgumentError
from microtome.shapley.call import Outputs, check_deterministic


class Model:
    """f on blocks of rows, as float64, only the outputs that are explained.

    Args:
        op: name for messages.
        function: takes what `rows` returns.
        outputs: which of f's outputs to explain; None for all.
        per_call: rows in one call.

    Attributes:
        evaluations: rows f was called with.
        scalar: whether f returns one number a row; known after the first call.
        interrupted: whether the user came between two calls.
    """

    def __init__(
        self,
        op: str,
        function: Callable[[Any], Any],
        outputs: Sequence[int] | None,
        per_call: int,
    ) -> None:
        self.op, self.per_call = op, max(1, per_call)
        self.evaluations, self.interrupted = 0, False
        self._outputs = outputs
        rows = "Samples differ from the input in some of its features"
        self._call = Outputs(f"{op}: f", function, rows=rows)

    @property
    def scalar(self) -> bool:
        return self._call.scalar

    def __call__(self, rows: Callable[[int, int], Any], count: int) -> Tensor:
        """[count, o] float64; `rows(start, stop)` makes the rows of one call.

        After an interruption there are only the answers that had come.

        Raises:
            KeyboardInterrupt: none had come.
        """
        parts: list[Tensor] = []
        for start in range(0, count, self.per_call):
            stop = min(start + self.per_call, count)
            try:
                parts.append(self._call(rows(start, stop), stop - start))
            except KeyboardInterrupt:
                self.interrupted = True
                if not parts:
                    raise
                break
            self.evaluations += stop - start
        out = parts[0] if len(parts) == 1 else torch.cat(parts)
        return out if self._outputs is None else out[:, self._wanted(out.shape[1])]

    def explicands(self, rows: Callable[[int, int], Any], count: int, check: bool) -> Tensor:
        """[e, o]: f on the explicands, called twice to see whether f is deterministic."""
        first = self(rows, count)
        again = self(rows, count) if check and not self.interrupted else first
        if self.interrupted:
            raise KeyboardInterrupt
        check_deterministic(self.op, first, again)
        return first

    def _wanted(self, o: int) -> list[int]:
        wanted = list(self._outputs or ())
        bad = [c for c in wanted if not -o <= c < o]
        if bad or not wanted:
            got = f"outputs={wanted}"
            msg = f"{self.op}: outputs must be numbers in [0, {o}), f has {o} outputs; got {got}."
            raise ArgumentError(msg)
        return wanted
