"""Cells: the grid of patches a sweep runs, and the writes each cell makes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from microtome import _check
from microtome.errors import ArgumentError
from microtome.models.native.plan import STAGES, Sources, Writes
from microtome.ops import ADD, REPLACE, SCALE, ZERO

OPS = {"replace": REPLACE, "add": ADD, "zero": ZERO, "scale": SCALE}
HEADED = ("q", "k", "v", "z", "pattern")
# The axes a site may be swept over, besides layers; the first set is the default.
AXES: dict[str, tuple[tuple[str, ...], ...]] = {
    **dict.fromkeys(
        ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out"), (("position",), ())
    ),
    **dict.fromkeys(("q", "k", "v", "z"), (("head",), ("position", "head"), ("position",), ())),
    "pattern": (("head",), ("position", "head"), ("head", "position", "source"), ()),
    "neurons": (("neuron",), ("position", "neuron"), ("position",), ()),
}


@dataclass(frozen=True)
class Shape:
    """Sizes of the run that cells are laid over.

    Attributes:
        layers, b, t: layers, prompts, positions.
        first, stop: [b] int64, the positions of each prompt that count are first ... stop - 1.
        heads, kv_heads, d_head, d_mlp, d: of the model.
        chained: each block reads what the one before it gave, and nothing else.
    """

    layers: int
    b: int
    t: int
    first: Tensor
    stop: Tensor
    heads: int
    kv_heads: int
    d_head: int
    d_mlp: int
    d: int
    chained: bool = True

    def stage(self, site: str, layer: int) -> tuple[int, str]:
        """Layer and stage of a site: in a chain resid_post of a layer is resid_pre of the next."""
        return (layer + 1, "resid_pre") if self.chained and site == "resid_post" else (layer, site)

    def padding(self, positions: Tensor) -> Tensor:
        """[b, m] bool: which of some positions [b, m] of the prompts are padding."""
        return (positions < self.first[:, None]) | (positions >= self.stop[:, None])

    def unit(self, site: str) -> int:
        """Columns of one head or neuron, or of a stream."""
        own = {"pattern": self.t, "neurons": 1}
        return own.get(site, self.d_head if site in HEADED else self.d)

    def units(self, site: str) -> int:
        """How many heads or neurons a site has; 1 for a stream."""
        counts = {"q": self.heads, "z": self.heads, "pattern": self.heads}
        counts |= {"k": self.kv_heads, "v": self.kv_heads, "neurons": self.d_mlp}
        return counts.get(site, 1)

    def width(self, site: str) -> int:
        """Columns of a site in all."""
        return self.units(site) * self.unit(site)


@dataclass(frozen=True)
class Values:
    """Where a write's value comes from: rows of a table by layer and stage.

    Attributes:
        kind: "run" (the other prompt at the same place), "resample" (another prompt's), "one"
            (the same row everywhere) or "none".
        sources: (layer, stage) -> [S, w]; filled for the sites that cells touch.
        partner: [b] int64, the prompt of the joint run that each prompt reads.
    """

    kind: str
    sources: Sources
    partner: Tensor


@dataclass(frozen=True)
class Grid:
    """Every combination of layers and of the other axes.

    Attributes:
        site: kind, such as "z".
        axes: names, "layer" first.
        values: for each axis, what it runs over.
        op: as in OPS.
        factors: of what is added or multiplied; more than one make an axis "factor", last, whose
            values count them.
    """

    site: str
    axes: tuple[str, ...]
    values: tuple[tuple[int, ...], ...]
    op: str = "replace"
    factors: tuple[float, ...] = (1.0,)

    @property
    def shape(self) -> tuple[int, ...]:
        """Cells along each axis."""
        return tuple(len(v) for v in self.values)

    @property
    def labels(self) -> tuple[tuple[float, ...], ...]:
        """What each axis runs over, factors by their value."""
        return (*self.values[:-1], self.factors) if self.axes[-1] == "factor" else self.values

    @property
    def cells(self) -> int:
        """How many there are."""
        return math.prod(self.shape)

    def place(self, cell: int) -> str:
        """Where a cell lies, in words."""
        where = self.coordinates(torch.tensor([cell]))
        return ", ".join(f"{axis} {int(value)}" for axis, value in where.items())

    def writes_a_cell(self, shape: Shape) -> int:
        """At most."""
        return shape.b * (1 if "position" in self.axes else shape.t)

    def coordinates(self, cells: Tensor) -> dict[str, Tensor]:
        """Axis -> [c], where some cells lie."""
        at = torch.unravel_index(cells, self.shape)
        return {
            axis: torch.tensor(values)[i]
            for axis, values, i in zip(self.axes, self.values, at, strict=True)
        }

    def writes(self, cells: Tensor, shape: Shape, values: Values) -> Writes:
        """The writes of some cells; row = place among `cells` * b + prompt.

        Args:
            cells: [c] int64, numbers in the flattened grid.
            shape: of the run.
            values: where the written values come from.
        """
        b, t = shape.b, shape.t
        where = self.coordinates(cells)
        c = len(cells)
        all_positions = torch.arange(t)
        if "position" in where:
            position = where["position"].repeat_interleave(b)  # [c * b]
            row = torch.arange(c * b)
        else:
            row = torch.arange(c * b).repeat_interleave(t)
            position = all_positions.repeat(c * b)
        prompt, cell = row % b, row // b
        above, stage = shape.stage(self.site, 0)
        layer = where["layer"][cell] + above
        unit = shape.unit(self.site)
        name = "neuron" if self.site == "neurons" else "head"
        if name in where:
            lo = where[name][cell] * unit
            hi = lo + unit
            if "source" in where:
                lo = lo + where["source"][cell]
                hi = lo + 1
        else:
            lo = torch.zeros_like(row)
            hi = torch.full_like(row, shape.width(self.site))
        source = torch.full_like(row, -1)
        if values.kind in ("run", "resample"):
            source = values.partner[prompt] * t + position
        elif values.kind == "one":
            source = torch.zeros_like(row)
        counts = (position >= shape.first[prompt]) & (position < shape.stop[prompt])
        code = OPS["zero" if values.kind == "none" and self.op == "replace" else self.op]
        out = Writes(
            row,
            layer,
            torch.full_like(row, STAGES.index(stage)),
            position,
            lo,
            hi,
            torch.full_like(row, code),
            source,
            torch.tensor(self.factors, dtype=torch.float64)[
                where.get("factor", torch.zeros_like(cells))[cell]
            ],
        )
        return clipped(out.select(counts), shape)


def clipped(writes: Writes, shape: Shape) -> Writes:
    """Writes to a pattern cut to the positions of their prompt, so that no head attends to padding.

    Args:
        writes: row = cell * b + prompt.
        shape: of the run.
    """
    first, stop = (x[writes.row % shape.b] for x in (shape.first, shape.stop))
    padded = (first > 0) | (stop < shape.t)
    padded &= writes.stage == STAGES.index("pattern")
    if not bool(padded.any()):
        return writes
    # Each one head by head, in place, so that writes keep their order.
    times = torch.where(padded, shape.heads, 1)
    each = torch.arange(len(writes)).repeat_interleave(times)
    head = torch.arange(len(each)) - (times.cumsum(0) - times)[each]
    out, inside = writes.select(each), padded[each]
    lo = torch.where(inside, torch.maximum(out.lo, head * shape.t + first[each]), out.lo)
    hi = torch.where(inside, torch.minimum(out.hi, head * shape.t + stop[each]), out.hi)
    return replace(out, lo=lo, hi=hi).select(lo < hi)


def make_grid(
    caller: str,
    site: str,
    shape: Shape,
    *,
    axes: Sequence[str] | None,
    layers: Sequence[int] | None,
    positions: Sequence[int] | None,
    heads: Sequence[int] | None,
    neurons: Sequence[int] | None,
    op: str = "replace",
    factor: float | Sequence[float] = 1.0,
) -> Grid:
    """A checked grid; `caller` is the name for messages.

    Raises:
        ArgumentError: the site has no such axis, or an axis no such place.
    """
    _check.one_of(caller, "site", site, tuple(AXES))
    _check.one_of(caller, "op", op, tuple(OPS))
    axes = (axes,) if isinstance(axes, str) else axes
    wanted = tuple(a for a in axes if a != "layer") if axes is not None else AXES[site][0]
    if sorted(wanted) not in [sorted(known) for known in AXES[site]]:
        has = "; ".join(", ".join(("layer", *known)) for known in AXES[site])
        msg = f"{caller}: site {site!r} is swept over one of: {has}. Got {', '.join(axes or ())}."
        raise ArgumentError(msg)
    sizes = {
        "layer": (layers, shape.layers),
        "position": (positions, shape.t),
        "head": (heads, shape.units(site)),
        "neuron": (neurons, shape.units(site)),
        "source": (None, shape.t),
    }
    for name, given in (("position", positions), ("head", heads), ("neuron", neurons)):
        if given is not None and name not in wanted:
            msg = (
                f"{caller}: {name}s were chosen, but the axes are {', '.join(('layer', *wanted))}. "
                f"Name {name!r} in axes."
            )
            raise ArgumentError(msg)
    values = []
    for axis in ("layer", *wanted):
        given, size = sizes[axis]
        if isinstance(given, (int, float, str)):
            msg = f"{caller}: {axis}s must be a list of numbers, got {given!r}. Pass [{given!r}]."
            raise ArgumentError(msg)
        chosen = tuple(range(size)) if given is None else tuple(int(i) for i in given)
        bad = [i for i in chosen if not 0 <= i < size]
        if bad or not chosen:
            what = f"got {bad[0]}" if bad else "none was given"
            msg = f"{caller}: {axis}s of {site!r} lie between 0 and {size - 1}, {what}."
            raise ArgumentError(msg)
        values.append(chosen)
    names: tuple[str, ...] = ("layer", *wanted)
    factor = factor.tolist() if isinstance(factor, Tensor) else factor
    if isinstance(factor, str):
        msg = f"{caller}: factor must be a number or a list of numbers, got {factor!r}."
        raise ArgumentError(msg)
    if not isinstance(factor, Sequence):
        return Grid(site, names, tuple(values), op, (float(factor),))
    if not factor:
        msg = "ablate: factor is an empty list. Name at least one."
        raise ArgumentError(msg)
    values.append(tuple(range(len(factor))))
    return Grid(site, (*names, "factor"), tuple(values), op, tuple(float(f) for f in factor))
