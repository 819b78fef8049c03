"""Packed rows: which token of which prompt each line of a packed matrix is."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """r patched rows, each with the tokens start ... stop - 1 of its prompt, one after another.

    Attributes:
        ids: [r] int64, numbers of the rows in their plan.
        example: [r] int64, the prompt of the base run.
        start, stop: [r] int64.
        t: tokens of a prompt.
    """

    ids: Tensor
    example: Tensor
    start: Tensor
    stop: Tensor
    t: int

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def count(self) -> Tensor:
        """[r] tokens of each row."""
        return self.stop - self.start

    @cached_property
    def offset(self) -> Tensor:
        """[r] where each row's tokens begin."""
        return self.count.cumsum(0) - self.count

    @property
    def tokens(self) -> int:
        """T, tokens in all."""
        return int(self.position.numel())

    @cached_property
    def row(self) -> Tensor:
        """[T] int64, the row of each token, counted within these rows."""
        return torch.repeat_interleave(torch.arange(len(self), device=self.ids.device), self.count)

    @cached_property
    def position(self) -> Tensor:
        """[T] int32, the position of each token in its prompt."""
        shift = (self.start - self.offset)[self.row]
        return (torch.arange(len(self.row), device=self.ids.device) + shift).int()

    @cached_property
    def index(self) -> Tensor:
        """[T] int32, the token of the base run that each token stands on."""
        return (self.example[self.row] * self.t + self.position).int()

    @cached_property
    def keys(self) -> Tensor:
        """[T] int64, plan row * t + position: what a write finds its token by."""
        return self.ids[self.row] * self.t + self.position

    def cut(self) -> Tensor:
        """[r, 3] int32: example, start, stop, as `patch_rows` and `swap_key_attention` take it."""
        return torch.stack((self.example, self.start, self.stop), 1).int()

    def ragged(self, queries: Tensor | None = None) -> Tensor:
        """[r, 6] int32, as `cascade_attention` takes it.

        Args:
            queries: [q] int64, the tokens that ask, in order; all of them if None.
        """
        asked, at = self.count, self.offset
        if queries is not None:
            asked = torch.bincount(self.row[queries], minlength=len(self))
            at = asked.cumsum(0) - asked
        return torch.stack((self.example, self.start, self.offset, self.count, at, asked), 1).int()

    def of(self, n: int) -> Tensor:
        """[n] int64: plan row -> its place in here, or -1."""
        place = torch.full((n,), -1, device=self.ids.device)
        place[self.ids] = torch.arange(len(self), device=self.ids.device)
        return place

    def narrowed(self, start: Tensor) -> Rows:
        """The same rows from a later position on."""
        return Rows(self.ids, self.example, torch.maximum(self.start, start), self.stop, self.t)

    def take(self, which: Tensor) -> Rows:
        """Some of the rows."""
        return Rows(
            self.ids[which], self.example[which], self.start[which], self.stop[which], self.t
        )

    @staticmethod
    def cat(parts: list[Rows]) -> Rows:
        """Rows of several batches, one batch after another."""
        joined = (
            torch.cat([getattr(p, name) for p in parts])
            for name in ("ids", "example", "start", "stop")
        )
        return Rows(*joined, parts[0].t)
