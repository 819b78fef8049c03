"""The game of a model's inputs: absent players take their values from background rows."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from microtome.errors import ArgumentError
from microtome.ops import coalition_inputs
from microtome.shapley.call import (
    Outputs,
    as_function,
    check_deterministic,
    parameter_of,
    takes_real,
)
from microtome.shapley.coalitions import MEAN
from microtome.shapley.game import MEMORY, rows_a_call
from microtome.shapley.players import Players, column_players
from microtome.shapley.rows import Rows


class InputGame:
    """v(S) = mean over background rows b of f(x_S, b_rest), for each of e rows x.

    Args:
        f: a function of rows, a torch module, or a scikit-learn estimator (call.as_function). It
            gets rows of the kind, shape and dtype of `x`.
        x: [e, ...] rows to explain; [m] for one row of a table.
        background: [n, ...] rows that absent players are drawn from.
        groups: as in players.column_players, over the flattened columns. Or (Players, [m] int32).
        memory: bytes of rows in one call of f, at most.
        check: call f twice on the rows to explain, to find out whether it is deterministic.
        op: name for messages.

    Raises:
        ArgumentError, ShapeError: x, background and groups do not agree, or f is not deterministic.
    """

    rows_per_round = 1 << 13
    engine = "calls"

    def __init__(
        self,
        f: Any,
        x: Any,
        background: Any,
        *,
        groups: Mapping[str, Sequence[int | str]] | Sequence[int] | Tensor | None = None,
        memory: int = MEMORY,
        check: bool = True,
        op: str = "InputGame",
    ) -> None:
        self.f, self.op, self.check = f, op, check
        function, wants = as_function(op, f)
        self.rows = Rows(op, x, background, wants, parameter_of(f), real=takes_real(f))
        if isinstance(groups, tuple) and len(groups) == 2 and isinstance(groups[0], Players):
            self.players, self.player = groups
        else:
            self.players, self.player = column_players(op, self.rows.columns, groups)
        if len(self.players) == 0:
            msg = f"{op}: x has no columns, so there are no players. Pass [e, m] with m >= 1."
            raise ArgumentError(msg)
        if self.player is None:
            self.players = replace(self.players, shown=self.rows.shown())
        else:
            self.player = self.player.to(self.rows.x.device)
        self.explicands, self.backgrounds = len(self.rows.x), len(self.rows.background)
        self.evaluations = 0
        self.per_call = rows_a_call(
            memory, self.rows.row_bytes, self.rows.x.device, self.rows.torch
        )
        self._call = Outputs(f"{op}: f", function, self._hint)
        self._ends: tuple[Tensor, Tensor] | None = None

    @property
    def scalar(self) -> bool:
        return self._call.scalar

    def _hint(self) -> str:
        missing = self.rows.missing()
        if not missing:
            return ""
        names = ", ".join(missing[:5]) + (" ..." if len(missing) > 5 else "")
        return f"There are missing values in column {names}: impute them. "

    def with_background(self, rows: Tensor) -> InputGame:
        """The same game with some of its background rows; what is known of the ends is kept."""
        some = copy.copy(self)
        some.rows = copy.copy(self.rows)
        some.rows.background = self.rows.background[rows]
        some.backgrounds = len(rows)
        empty, full = self.ends()
        some._ends = empty[:, rows.to(empty.device)], full
        return some

    def call(self, rows: Tensor) -> Tensor:
        """[R, o] float64 for rows [R, m] of any number, a bounded number of bytes at a time."""
        self.evaluations += len(rows)
        parts = rows.split(self.per_call) if len(rows) else [rows]
        out = [self._call(self.rows.back(part), len(part)) for part in parts]
        return out[0] if len(out) == 1 else torch.cat(out)

    def ends(self) -> tuple[Tensor, Tensor]:
        """The empty coalition [1, n, o] or [e, n, o], and the full one [e, o]."""
        if self._ends is None:
            x, absent, e = self.rows.x, self.rows.background, self.explicands
            if self.player is not None and bool((self.player < 0).any()):
                always = (self.player < 0)[None, None]  # columns that no player holds
                absent = torch.where(always, x[:, None], absent).flatten(0, 1)
            full, empty = self.call(torch.cat([x, absent])).split([e, len(absent)])
            if self.check and e:  # in a call of its own: other rows must not change the answers
                # f may work in place (ReLU(inplace=True)), and x can be the user's own memory.
                check_deterministic(self.op, full, self.call(x.clone()), empty)
            self._ends = empty.reshape(-1, self.backgrounds, full.shape[1]), full
        return self._ends

    def values(self, ranks: Tensor, spans: Tensor, who: Tensor) -> Tensor:
        n, K = self.backgrounds, len(spans)
        device = self.rows.x.device
        ranks, spans = ranks.to(device), spans.to(device)
        mean = bool((spans[:, 0] == MEAN).any()) and n > 1
        if mean and bool((spans[:, 0] != MEAN).any()):
            msg = f"{self.op}: spans ask for single background rows and for their mean at once."
            raise ArgumentError(msg)
        each = n if mean else 1
        total = len(who) * K * each
        who32 = who.to(device, torch.int32)
        # Into one tensor: answers kept one by one lie between the blocks of rows, which then cannot
        # be used again (784 columns, 100 background rows: 390 MB instead of 99).
        out = torch.empty(total, self.ends()[1].shape[1], dtype=torch.float64)
        for at in range(0, max(total, 1), self.per_call):
            flat = torch.arange(at, min(at + self.per_call, total), device=device)
            table = self._table(flat, who32, spans, each)
            rows = coalition_inputs(self.rows.x, self.rows.background, ranks, table, self.player)
            out[at : at + len(rows)] = self.call(rows)
        out = out.reshape(len(who), K, each, -1)
        return out.mean(2) if each > 1 else out[:, :, 0]

    def _table(self, flat: Tensor, who: Tensor, spans: Tensor, each: int) -> Tensor:
        """Rows of coalition_inputs for entries of [explicand, coalition, background]."""
        K = len(spans)
        table = torch.empty(len(flat), 5, dtype=torch.int32, device=flat.device)
        coalition = flat // each if each > 1 else flat
        if len(who) > 1:
            explicand = coalition // K
            coalition = coalition - explicand * K
            table[:, 0] = who[explicand]
        else:
            table[:, 0] = who
        chosen = spans if each == 1 and len(flat) == K else spans[coalition]
        table[:, 2:] = chosen[:, 1:]
        table[:, 1] = flat % each if each > 1 else chosen[:, 0].clamp(min=0)
        return table
