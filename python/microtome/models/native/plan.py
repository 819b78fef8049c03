"""What a sweep changes: rows, each the base run of one prompt with some writes, as tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from microtome.ops.patch_rows import ADD, REPLACE, ZERO

# The stages of a layer in the order a forward passes them. In a chain of blocks resid_post of layer
# l is resid_pre of l + 1, and resid_pre of layer L, past the last block, is the final stream; parts
# know no resid_post.
STAGES = (
    "resid_pre",
    "q",
    "k",
    "v",
    "pattern",
    "z",
    "attn_out",
    "resid_mid",
    "neurons",
    "mlp_out",
    "resid_post",
)
Sources = dict[tuple[int, str], Tensor]
Site = Callable[[int, str], Tensor]


@dataclass(frozen=True)
class Writes:
    """m changes, each to columns lo ... hi - 1 of one position of one row at one stage.

    Attributes:
        row, layer, stage, position, lo, hi: [m] int64; stage indexes STAGES.
        op: [m], REPLACE, ADD, ZERO or SCALE of `patch_rows`.
        source: [m], row of the sources of its (layer, stage); -1 for ZERO and SCALE.
        factor: [m] float64.
    """

    row: Tensor
    layer: Tensor
    stage: Tensor
    position: Tensor
    lo: Tensor
    hi: Tensor
    op: Tensor
    source: Tensor
    factor: Tensor

    def __len__(self) -> int:
        return len(self.row)

    def select(self, which: Tensor) -> Writes:
        """The writes at a mask or index."""
        return Writes(*(getattr(self, name)[which] for name in self.__dataclass_fields__))

    def to(self, device: torch.device) -> Writes:
        """The writes on a device."""
        return Writes(*(getattr(self, name).to(device) for name in self.__dataclass_fields__))

    @staticmethod
    def cat(parts: list[Writes]) -> Writes:
        """One after the other."""
        names = Writes.__dataclass_fields__
        return Writes(*(torch.cat([getattr(part, name) for part in parts]) for name in names))


@dataclass(frozen=True)
class Plan:
    """n rows and their writes.

    Attributes:
        example: [n] int64, the prompt of the base run that a row starts from.
        writes: of all rows.
        sources: (layer, stage) -> [S, w] values that writes read.
    """

    example: Tensor
    writes: Writes
    sources: Sources

    def without_unchanged(self, site: Site, t: int) -> Plan:
        """Drop writes that put back what is there, compared bit by bit.

        A write is kept if an earlier write of its row remains at an earlier stage or at the same
        place, since it then meets another activation than the base run's.

        Args:
            site: (layer, stage) -> [r, w], the base run's activations.
            t: tokens of a prompt.
        """
        if len(self.writes) == 0:
            return self
        moves = torch.zeros(len(self.writes), dtype=torch.bool)
        keys = self.writes.layer * len(STAGES) + self.writes.stage
        for key in keys.unique().tolist():
            at = (keys == key).nonzero().flatten()
            moves[at] = self._moves(site, t, key // len(STAGES), STAGES[key % len(STAGES)], at)
        n = len(self.example)
        first = torch.full((n,), keys.max() + 1).scatter_reduce(
            0, self.writes.row[moves], keys[moves], "amin"
        )
        stays = moves | (keys >= first[self.writes.row])
        # Within the first stage itself, writes to positions that no write moves may still go.
        same = stays & ~moves & (keys == first[self.writes.row])
        moved = (self.writes.row * t + self.writes.position)[
            moves & (keys == first[self.writes.row])
        ]
        touched = torch.isin(self.writes.row * t + self.writes.position, moved)
        return replace(self, writes=self.writes.select(stays & (~same | touched)))

    def _moves(self, site: Site, t: int, layer: int, stage: str, at: Tensor) -> Tensor:
        """Whether each of the writes `at` changes a bit of the base activation."""
        held, sources = site(layer, stage), self.sources.get((layer, stage))
        w = self.writes.select(at).to(held.device)
        token = self.example.to(held.device)[w.row] * t + w.position
        out = torch.zeros(len(at), dtype=torch.bool, device=held.device)
        exact = torch.promote_types(held.dtype, torch.float32)  # as the writes are done
        bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[held.element_size()]
        for op, width in torch.stack((w.op, w.hi - w.lo), 1).unique(dim=0).tolist():
            some = ((w.op == op) & (w.hi - w.lo == width)).nonzero().flatten()
            for part in some.split(max(1, (1 << 22) // max(width, 1))):
                columns = w.lo[part, None] + torch.arange(width, device=held.device)
                old = held[token[part, None], columns]
                new = old.to(exact)
                if op in (REPLACE, ADD):
                    assert sources is not None
                    offset = 0 if sources.shape[1] == held.shape[1] else w.lo[part, None]
                    new = sources[w.source[part, None], columns - offset].to(exact)
                new = new * w.factor[part, None].to(exact)
                if op == ADD:
                    new = old.to(exact) + new
                elif op == ZERO:
                    new.zero_()
                out[part] = (new.to(old).view(bits) != old.view(bits)).any(1)
        return out.cpu()

    def looking_ahead(self, t: int) -> Tensor:
        """[n] bool, rows with an attention pattern that may read positions after its own.

        Args:
            t: tokens of a prompt.
        """
        out = torch.zeros(len(self.example), dtype=torch.bool)
        for (layer, stage), table in self.sources.items():
            if stage == "pattern":
                w = self.writes.select(
                    (self.writes.layer == layer)
                    & (self.writes.stage == STAGES.index(stage))
                    & (self.writes.source >= 0)
                )
                seen = (table.unflatten(1, (-1, t)) != 0).any(1).cpu()  # [S, t]
                reach = (seen * torch.arange(t)).amax(1)
                out[w.row[reach[w.source] > w.position]] = True
        return out

    def entries(self) -> tuple[Tensor, Tensor]:
        """[n] first (layer * stages + stage) a row writes (-1: none), and its first position."""
        n, key = len(self.example), self.writes.layer * len(STAGES) + self.writes.stage
        big = int(key.max()) + 1 if len(key) else 1
        entry = torch.full((n,), big).scatter_reduce(0, self.writes.row, key, "amin")
        start = torch.full((n,), 1 << 30).scatter_reduce(
            0, self.writes.row, self.writes.position, "amin"
        )
        return torch.where(entry == big, -1, entry), start

    def take(self, rows: Tensor) -> Plan:
        """The plan of some rows alone, renumbered in the order given."""
        number = torch.full((len(self.example),), -1)
        number[rows] = torch.arange(len(rows))
        mine = self.writes.select(number[self.writes.row] >= 0)
        return Plan(self.example[rows], replace(mine, row=number[mine.row]), self.sources)
