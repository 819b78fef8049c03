"""Cells as lists of writes, each of any site, position, head and unit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from microtome import _check
from microtome.errors import ArgumentError, ShapeError, SiteError
from microtome.models.native.plan import STAGES, Plan, Sources, Writes
from microtome.ops import ADD, REPLACE, SCALE, ZERO
from microtome.patching.cells import HEADED, Shape, clipped
from microtome.patching.execute import Engine
from microtome.patching.naive import Write

CODES = {"replace": REPLACE, "mean": REPLACE, "add": ADD, "zero": ZERO, "scale": SCALE}


@dataclass
class _Rows:
    """Columns of the tables of writes, as they are collected."""

    columns: dict[str, list[Tensor]] = field(default_factory=dict)

    def add(self, **named: Tensor) -> None:
        """One batch of equally long columns."""
        for name, value in named.items():
            self.columns.setdefault(name, []).append(value)


@dataclass(frozen=True)
class ListedCells:
    """Cells as lists of `Write`.

    Attributes:
        op: name for messages.
        engine: that will run them; prompts b ... of its run are the source prompts.
        writes: of each cell.
    """

    op: str
    engine: Engine
    writes: Sequence[Sequence[Write]]

    @property
    def count(self) -> int:
        """How many there are."""
        return len(self.writes)

    @property
    def writes_a_cell(self) -> int:
        """At most."""
        shape = self.engine.shape
        return shape.b * shape.t * max((len(cell) for cell in self.writes), default=1)

    def place(self, cell: int) -> str:
        """Where a cell lies, for messages."""
        return ", ".join(write.site for write in self.writes[cell]) or "no site"

    def describe(self) -> str:
        """The writes, values by their sums."""
        plain = lambda w: (  # noqa: E731
            w.site, w.positions, w.heads, str(w.units), w.op, w.factor,
            None if w.value is None else float(torch.as_tensor(w.value).double().sum()),
        )  # fmt: skip
        return repr([[plain(write) for write in cell] for cell in self.writes])

    def plan(self, cells: Tensor) -> Plan:
        """Their writes, in the order given."""
        shape = self.engine.shape
        tables: dict[tuple[int, str], list[Tensor]] = {}
        found = _Rows()
        for i, cell in enumerate(cells.tolist()):
            # Where a block's output is the next one's input, a forward passes the output first.
            for write in sorted(self.writes[cell], key=lambda w: w.site.startswith("resid_pre")):
                self._add(write, i, tables, found)
        names = ("row", "layer", "stage", "position", "lo", "hi", "op", "source", "factor")
        if not found.columns:
            empty = torch.zeros(0, dtype=torch.int64)
            writes = Writes(*(empty for _ in names[:-1]), empty.double())
        else:
            writes = Writes(*(torch.cat(found.columns[name]) for name in names))
        sources: Sources = {place: torch.cat(parts) for place, parts in tables.items()}
        return Plan(torch.arange(shape.b).repeat(len(cells)), clipped(writes, shape), sources)

    def _add(
        self, write: Write, cell: int, tables: dict[tuple[int, str], list[Tensor]], found: _Rows
    ) -> None:
        """The rows of one write of one cell."""
        shape = self.engine.shape
        site, layer = _place(self.op, write.site, self.engine)
        place = shape.stage(site, layer)
        b, t = shape.b, shape.t
        position = torch.arange(t)
        if write.positions is not None:
            _check.between(self.op, "position", write.positions, -t, t - 1)
            position = torch.tensor([write.positions % t])
        prompt = torch.arange(b).repeat_interleave(len(position))
        at = position.repeat(b)
        counts = (at >= shape.first[prompt]) & (at < shape.stop[prompt])
        if not bool(counts.any()):
            first, last = int(shape.first.min()), int(shape.stop.max()) - 1
            msg = (
                f"{self.op}: the write at {write.site!r} changes nothing: position "
                f"{write.positions} is padding in every prompt. Their tokens stand at {first} ... "
                f"{last}."
            )
            raise ArgumentError(msg)
        code = CODES[write.op]
        for lo, hi in _ranges(self.op, write, site, shape):
            n = len(at)
            source = torch.full((n,), -1)
            if code in (REPLACE, ADD):
                if place not in tables:  # a pattern is formed anew each time it is asked for
                    tables[place] = [self.engine.activation(*place)]
                table = tables[place]
                if write.reads_source and write.op != "mean":
                    source = (prompt + b) * t + at
                else:
                    source = sum(len(part) for part in table) + torch.arange(n)
                    table.append(self._values(write, place, site, (lo, hi), prompt, at, table[0]))
            full = lambda value: torch.full((n,), value)  # noqa: B023, E731
            rows = {
                "row": cell * b + prompt,
                "layer": full(place[0]),
                "stage": full(STAGES.index(place[1])),
                "position": at,
                "lo": full(lo),
                "hi": full(hi),
                "op": full(code),
                "source": source,
                "factor": torch.full((n,), float(write.factor), dtype=torch.float64),
            }
            found.add(**{name: value[counts] for name, value in rows.items()})

    def _values(
        self,
        write: Write,
        place: tuple[int, str],
        site: str,
        columns: tuple[int, int],
        prompt: Tensor,
        at: Tensor,
        like: Tensor,
    ) -> Tensor:
        """[n, w] rows that hold a given value, or the source's mean, in the columns written."""
        shape = self.engine.shape
        out = like.new_zeros(len(at), like.shape[1])
        lo, hi = columns
        if write.op == "mean":
            held = like.unflatten(0, (-1, shape.t))[shape.b :]
            padding = shape.padding(torch.arange(shape.t)[None]).to(held.device)[..., None]
            some = (~padding).sum(0).clamp_min(1)  # [t, 1]
            mean = held.masked_fill(padding, 0.0).sum(0) / some
            out[:, lo:hi] = mean[at.to(held.device)][:, lo:hi]
            return out
        value = torch.as_tensor(write.value).to(like)
        positions = shape.t if write.positions is None else 1
        whole = torch.zeros(shape.b, positions, *_split(site, shape)).to(like)
        index = (slice(None), slice(None), *_index(write, site))
        whole[index] = _aligned(self.op, value, write, site, whole[index])
        out[:, lo:hi] = whole.flatten(2).flatten(0, 1)[:, lo:hi]
        return out


def _place(op: str, name: str, engine: Engine) -> tuple[str, int]:
    """Kind and layer of a site."""
    kind, _, layer = name.partition(".")
    layers = engine.shape.layers
    if kind not in STAGES or not layer.isdigit() or int(layer) >= layers:
        has = ", ".join(STAGES)
        msg = f"{op}: no site {name!r}; there are {has}, each with a layer, .0 to .{layers - 1}."
        raise SiteError(msg)
    if why := engine.lacks(kind):
        msg = f"{op}: {why}. Choose another site."
        raise SiteError(msg)
    return kind, int(layer)


def _split(site: str, shape: Shape) -> tuple[int, ...]:
    """How the columns of a site are laid out: heads and units, or units."""
    width, units = shape.width(site), shape.units(site)
    return (units, width // units) if site in HEADED else (width,)


def _index(write: Write, site: str) -> tuple[Any, ...]:
    """What of one token's activation a write touches."""
    units: Any = slice(None) if write.units is None else write.units
    units = list(units) if isinstance(units, Sequence) else units
    if site not in HEADED:
        return (units,)
    return (slice(None) if write.heads is None else write.heads, units)


def _ranges(op: str, write: Write, site: str, shape: Shape) -> list[tuple[int, int]]:
    """Runs of neighbouring columns that a write touches, in order."""
    layout = _split(site, shape)
    if write.heads is not None:
        if site not in HEADED:
            msg = f"{op}: {write.site} has no heads, got heads={write.heads}. Leave heads out."
            raise ArgumentError(msg)
        _check.between(op, "head", write.heads, -layout[0], layout[0] - 1)
    width = layout[-1]
    if isinstance(write.units, int):
        _check.between(op, "unit", write.units, -width, width - 1)
    try:
        touched = torch.zeros(layout, dtype=torch.bool)
        touched[_index(write, site)] = True
    except IndexError as error:
        has = f"units of {write.site} lie between {-width} and {width - 1}"
        msg = f"{op}: {has}, got {write.units}."
        raise ArgumentError(msg) from error
    at = touched.flatten().nonzero().flatten()
    if len(at) == 0:
        return []
    breaks = (at.diff() != 1).nonzero().flatten() + 1
    return [(int(run[0]), int(run[-1]) + 1) for run in at.tensor_split(breaks.tolist())]


def _aligned(op: str, value: Tensor, write: Write, site: str, part: Tensor) -> Tensor:
    """A value broadcast to [b, positions, heads, units], less the axes an int chose from.

    Raises:
        ShapeError: it does not broadcast.
    """
    shape = list(part.shape)  # [b, positions, ...]
    if write.positions is not None:
        shape.pop(1)
    over_heads = site == "pattern" and write.positions is None and write.heads is None
    if over_heads:  # [b, h, destination, source], as `capture` gives it
        shape[1], shape[2] = shape[2], shape[1]
    try:
        value = value.expand(shape)
    except RuntimeError:
        msg = (
            f"{op}: the value for {write.site!r} must broadcast to {shape}, got shape "
            f"{list(value.shape)}."
        )
        raise ShapeError(msg) from None
    if over_heads:
        value = value.transpose(1, 2)
    return value.unsqueeze(1) if write.positions is not None else value
