"""The game of a forward function: every example has its own baseline."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from microtome.errors import ArgumentError, ShapeError
from microtome.integrations.captum.arguments import Request
from microtome.integrations.captum.targets import as_output, for_rows, selected
from microtome.ops import coalition_inputs
from microtome.shapley.call import Outputs
from microtome.shapley.game import MEMORY, rows_a_call
from microtome.shapley.players import Players


class ForwardGame:
    """v(S) = forward(x_S, baseline_rest) of each example: a Game with one background row.

    A forward function that answers a call of R rows with R entries is asked for many coalitions of
    all examples at once. Any other (one number for the whole batch, one batch size only) gets the
    examples once for each coalition, and the batch is then the one explicand (`whole`).

    Args:
        forward: the model or function, called with the inputs and the additional arguments.
        asked: the checked arguments.
        perturbations: most coalitions of all examples in one call; None for as many as fit.
        memory: bytes of inputs, and of outputs, in one call.
    """

    rows_per_round = 1 << 13
    engine = "calls"
    backgrounds = 1
    scalar = False

    def __init__(
        self,
        forward: Callable[..., Any],
        asked: Request,
        perturbations: int | None,
        memory: int = MEMORY,
    ) -> None:
        self.forward, self.asked, self.memory = forward, asked, memory
        if perturbations is not None and (not isinstance(perturbations, int) or perturbations < 1):
            msg = (
                f"{asked.op}: perturbations_per_eval must be a positive integer or None, got "
                f"{perturbations!r}."
            )
            raise ArgumentError(msg)
        self.players = Players(tuple(f"feature {j}" for j in asked.features.tolist()))
        self.evaluations = 0
        self.shapes = [tuple(x.shape[1:]) for x in asked.inputs]
        self.x = [x.reshape(len(x), -1) for x in asked.inputs]
        self.base = [b.reshape(len(b), -1) for b in asked.baselines]
        self.held = [p.to(torch.int32) for p in asked.players]
        self.perturbations = perturbations
        self.output_shape: tuple[int, ...] = ()
        self.whole = False
        self._answer = Outputs(f"{asked.op}: forward_func", lambda out: out)
        self._ends = self._open()

    @property
    def explicands(self) -> int:
        return 1 if self.whole else self.asked.rows

    def ends(self) -> tuple[Tensor, Tensor]:
        return self._ends

    def values(self, ranks: Tensor, spans: Tensor, who: Tensor) -> Tensor:
        K, e = len(spans), self.asked.rows
        if self.whole:
            everyone = torch.arange(e, dtype=torch.int32)
            out = [self._whole(ranks, self._table(everyone, span)) for span in spans]
            return torch.stack(out, 1) if out else torch.empty(1, 0, self._ends[1].shape[1])
        who32 = who.to(torch.int32)
        out = torch.empty(len(who) * K, self._ends[1].shape[1], dtype=torch.float64)
        for at in range(0, len(out), self.per_call):
            flat = torch.arange(at, min(at + self.per_call, len(out)))
            table = self._table(who32[flat // K], spans[flat % K])
            out[at : at + len(flat)] = self._stacked(ranks, table)
        return out.reshape(len(who), K, -1)

    def _open(self) -> tuple[Tensor, Tensor]:
        """The ends; and how the forward function takes more rows than there are examples."""
        e, p = self.asked.rows, len(self.players)
        ranks = torch.arange(p, dtype=torch.int32)[None]
        row_bytes = sum(x.shape[1] * x.element_size() for x in self.x)
        self.per_call = max(2, rows_a_call(self.memory, row_bytes, self.x[0].device, tensors=True))
        if self.perturbations is not None:
            self.per_call = min(self.per_call, self.perturbations * e)
        two = torch.tensor([[0, 0, 0, 0], [0, 0, 0, p]])
        who = torch.arange(e, dtype=torch.int32)
        if self.perturbations != 1:
            count = min(2 * e, self.per_call)
            flat = torch.arange(2 * e)
            table = self._table(who[flat // 2], two[flat % 2])
            first = self._call(ranks, table[:count])
            if first.shape[0] == count:
                size = first.numel() * first.element_size() / count
                self.per_call = max(1, min(self.per_call, int(self.memory / max(1.0, size))))
                self.output_shape = (e, *first.shape[1:])
                out = [self._answer(first.reshape(count, -1), count)]
                rest = table[count:].split(self.per_call) if count < 2 * e else ()
                out += [self._stacked(ranks, part) for part in rest]
                both = torch.cat(out).reshape(e, 2, -1)
                return both[:, :1], both[:, 1]
            if self.perturbations is not None:
                msg = (
                    f"{self.asked.op}: forward_func was called with {count} rows and returned "
                    f"shape {list(first.shape)}. perturbations_per_eval > 1 needs one entry for "
                    "each row. Pass perturbations_per_eval=1 for a function of the whole batch."
                )
                raise ShapeError(msg)
        out = self._call(ranks, self._table(who, two[0]))
        self.output_shape = tuple(out.shape)
        self.whole = True
        if any(len(held) > 1 for held in self.held) and out.shape[0] != e:
            msg = (
                f"{self.asked.op}: feature_mask differs between examples, but forward_func returns "
                f"shape {list(out.shape)} for all {e} of them. Pass masks with 1 in place of the "
                "number of examples."
            )
            raise ShapeError(msg)
        empty = self._answer(out.reshape(1, -1), 1)
        return empty[None], self._whole(ranks, self._table(who, two[1]))

    def _table(self, who: Tensor, spans: Tensor) -> Tensor:
        """Rows of coalition_inputs: spans [R, 4] or [4] of examples who [R]."""
        table = torch.empty(len(who), 5, dtype=torch.int32)
        table[:, 0] = who
        table[:, 1] = who
        table[:, 2:] = spans[..., 1:]
        return table

    def _stacked(self, ranks: Tensor, table: Tensor) -> Tensor:
        out = self._call(ranks, table)
        return self._answer(out.reshape(out.shape[0], -1), len(table))

    def _whole(self, ranks: Tensor, table: Tensor) -> Tensor:
        out = self._call(ranks, table)
        if tuple(out.shape) != self.output_shape:
            msg = (
                f"{self.asked.op}: forward_func returned shape {list(out.shape)} and, for other "
                f"values of the same inputs, {list(self.output_shape)}. It must return the same."
            )
            raise ShapeError(msg)
        return self._answer(out.reshape(1, -1), 1)

    def _call(self, ranks: Tensor, table: Tensor) -> Tensor:
        """What the forward function returns for rows of coalition_inputs."""
        self.evaluations += len(table)
        asked, who = self.asked, table[:, 0].long()
        rows = [
            self._inputs(i, ranks, table).reshape(len(table), *shape)
            for i, shape in enumerate(self.shapes)
        ]
        with torch.no_grad():
            out = self.forward(*rows, *for_rows(asked.extra, who, asked.rows))
        out = as_output(asked.op, out)
        chosen = selected(asked.op, out, asked.target, who, asked.rows)
        self.dtype = chosen.dtype
        return chosen.reshape(1) if chosen.dim() == 0 else chosen

    def _inputs(self, i: int, ranks: Tensor, table: Tensor) -> Tensor:
        x, base, held = self.x[i], self.base[i], self.held[i]
        device = x.device
        if len(base) == 1:
            table = table.clone()
            table[:, 1] = 0
        ranks, table, held = ranks.to(device), table.to(device), held.to(device)
        if len(held) == 1:
            alone = x.shape[1] == len(self.players) and len(self.x) == 1 and self._plain
            return coalition_inputs(x, base, ranks, table, None if alone else held[0])
        out = x.new_empty(len(table), x.shape[1])
        for example in table[:, 0].unique().tolist():
            at = (table[:, 0] == example).nonzero().flatten()
            out[at] = coalition_inputs(x, base, ranks, table[at], held[example])
        return out

    @property
    def _plain(self) -> bool:
        held = self.held[0][0]
        return bool((held == torch.arange(len(held), dtype=torch.int32)).all())

    def spread(self, values: Tensor, dtype: torch.dtype) -> Tensor | tuple[Tensor, ...]:
        """Values [explicands, p, o] laid out as captum does: [*output, *input] for each input.

        Every column gets its player's value.
        """
        parts = []
        for x, shape, held in zip(self.x, self.shapes, self.asked.players, strict=True):
            if self.whole and len(held) > 1:
                by_row = values[0].T.reshape(self.output_shape[0], -1, len(self.players))
            elif self.whole:
                by_row = values.transpose(1, 2)
            else:
                by_row = values.transpose(1, 2)  # [e, o, p]
            at = held[:, None].expand(len(by_row), by_row.shape[1], -1)
            out = by_row.gather(2, at).to(x.device, dtype)
            parts.append(out.reshape(*self.output_shape, *shape))
        return self.asked.back(parts)


def calls_wanted(forward: Any, perturbations: int | None) -> int | None:
    """captum's LLMAttribution has a forward function that takes one row at a time."""
    owner = type(getattr(forward, "__self__", None))
    if perturbations is None and owner.__module__.startswith("captum.attr._core.llm_attr"):
        return 1
    return perturbations
