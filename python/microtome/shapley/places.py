"""What the absence of a model's parts does to an activation: columns mixed, features taken out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from microtome.ops import coalition_inputs

CODE = 1 << 24  # numbers of a dense code formed at a time


@dataclass(frozen=True)
class Mixed:
    """Columns of absent players are replaced by those of a source.

    Attributes:
        player: [w] int32, whose each column is, -1 for nobody's.
        source: [s, w], what absent columns hold.
        row: [r] int64, the row of `source` for each token of the base run.
    """

    player: Tensor
    source: Tensor
    row: Tensor

    @property
    def keeps(self) -> bool:
        """Whether there are columns of nobody."""
        return bool((self.player < 0).any())

    def __call__(
        self, own: Tensor, at: Tensor, present: Tensor, tokens: Tensor, *, joins: bool
    ) -> Tensor:
        """As tree.Change; members have rank 0, and a coalition is the span (0, 1)."""
        m, N, w = len(at), own.shape[1], own.shape[2]
        table = torch.zeros(m, N, 5, dtype=torch.int32, device=own.device)
        table[..., 0] = (at * N).to(own.device)[:, None] + torch.arange(N, device=own.device)
        table[..., 1] = self.row.to(own.device)[tokens]
        table[..., 2] = torch.arange(m, device=own.device)[:, None]
        table[..., 4] = 1
        ranks = (~present).to(own.device, torch.int32)
        out = coalition_inputs(
            own.reshape(-1, w), self.source, ranks, table.reshape(-1, 5), self.player
        )
        return out.reshape(m, N, w)


@dataclass(frozen=True)
class Coded:
    """Absent features of an autoencoder are set, along their directions; its error stays.

        x <- x + sum over absent f of (new_f - a_f(x)) W_dec[f]

    Attributes:
        code: [T, d] -> [T, p], the features' activations.
        known: [r, p], those of the base run.
        new: [s, p], what absent features are set to.
        row: [r] int64, the row of `new` for each token of the base run.
        W_dec: [p, d], their directions.
    """

    code: Callable[[Tensor], Tensor]
    known: Tensor
    new: Tensor
    row: Tensor
    W_dec: Tensor
    keeps = True

    def __call__(
        self, own: Tensor, at: Tensor, present: Tensor, tokens: Tensor, *, joins: bool
    ) -> Tensor:
        """As tree.Change."""
        n, N = own.shape[:2]
        if joins:
            active = self.known[tokens].expand(n, N, -1)
        else:
            active = self.code(own.reshape(n * N, -1)).unflatten(0, (n, N))
        change = self.new[self.row.to(own.device)[tokens]] - active  # [n, N, p]
        at = at.to(own.device)
        change = change[at] * (~present).to(change)[:, None]
        return own[at] + change @ self.W_dec
