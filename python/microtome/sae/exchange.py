"""Collectives on a line of ranks: rows, and sums in a fixed order."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

_ALIGN = 8  # bytes: every piece of a message begins where any dtype may
# Renamed in torch 2.13, where the old name warns; a torch without torch.distributed has neither.
_all_gather = getattr(dist, "all_gather_single", getattr(dist, "all_gather_into_tensor", None))


class Line:
    """Ranks in a fixed order. Every method is a collective but `rows_of`.

    Args:
        group: their process group.

    Attributes:
        rank, size: this rank's place in the line, and how many there are.
        received: bytes that came from the others so far.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.received = 0

    def gather(self, *tensors: Tensor) -> list[Tensor]:
        """Every rank's tensors in one message: for each [size, *shape].

        Shapes and dtypes are the same on every rank.
        """
        pieces, places, size = [], [], 0
        for tensor in tensors:
            raw = tensor.contiguous().flatten().view(torch.uint8)
            places.append((size, size + len(raw)))
            raw = torch.nn.functional.pad(raw, (0, -len(raw) % _ALIGN))
            pieces.append(raw)
            size += len(raw)
        if size == 0:  # no rows on any rank
            return [t.new_empty(self.size, *t.shape) for t in tensors]
        sent = torch.cat(pieces)
        came = torch.empty(self.size * size, dtype=torch.uint8, device=sent.device)
        assert _all_gather is not None  # there is a group
        _all_gather(came, sent, group=self.group)
        self.received += size * (self.size - 1)
        table = came.view(self.size, size)
        return [
            table[:, begin:end].view(tensor.dtype).reshape(self.size, *tensor.shape)
            for tensor, (begin, end) in zip(tensors, places, strict=True)
        ]

    def sum_rows(self, partial: Tensor) -> Tensor:
        """This rank's rows of the sum of all ranks' [n, d], added in the order of the line.

        Returns:
            [rows of this rank, d], see `rows_of`; its bits do not depend on which rank adds.
        """
        n, d = partial.shape
        each = -(-n // self.size)
        sent = torch.nn.functional.pad(partial, (0, 0, 0, each * self.size - n)).contiguous()
        parts = torch.empty_like(sent)
        dist.all_to_all_single(parts, sent, group=self.group)
        self.received += parts.nbytes // self.size * (self.size - 1)
        total, *others = parts.view(self.size, each, d)
        for part in others:
            total += part
        rows = self.rows_of(n)
        return total[: rows.stop - rows.start]

    def all_rows(self, n: int, *blocks: Tensor) -> list[Tensor]:
        """[n, columns] of the ranks' blocks of rows [rows of this rank, columns]."""
        padded = [self.padded(block, n) for block in blocks]
        return [self.joined(stacked, n) for stacked in self.gather(*padded)]

    def padded(self, block: Tensor, n: int) -> Tensor:
        """A block as long as the longest, for `gather`."""
        return torch.nn.functional.pad(block, (0, 0, 0, -(-n // self.size) - len(block)))

    def joined(self, stacked: Tensor, n: int) -> Tensor:
        """[n, columns] of padded blocks that were gathered."""
        size, each, columns = stacked.shape
        return stacked.reshape(size * each, columns)[:n]

    def rows_of(self, n: int) -> slice:
        """Which of n rows are this rank's: blocks of n / size, rounded up, in order."""
        each = -(-n // self.size)
        return slice(min(n, self.rank * each), min(n, (self.rank + 1) * each))

    def collect(self, tensor: Tensor, counts: list[int]) -> Tensor | None:
        """All ranks' rows [counts[rank], ...] below each other on the first rank; else None."""
        sent = torch.cat([tensor, tensor.new_zeros(max(counts) - len(tensor), *tensor.shape[1:])])
        parts = [torch.empty_like(sent) for _ in counts] if self.rank == 0 else None
        dist.gather(sent, parts, dst=dist.get_global_rank(self.group, 0), group=self.group)
        if parts is None:
            return None
        self.received += sent.nbytes * (self.size - 1)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    def copy_from_first_(self, tensor: Tensor) -> None:
        """Give every rank the first rank's numbers, in place."""
        dist.broadcast(tensor, dist.get_global_rank(self.group, 0), group=self.group)
