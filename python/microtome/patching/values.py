"""Where the values come from that a sweep writes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor

from microtome._seed import generator
from microtome.errors import ArgumentError, ShapeError
from microtome.patching.cells import Grid, Shape, Values, at_stage


class Activations(Protocol):
    """What an engine knows of its unpatched runs."""

    shape: Shape

    def activation(self, layer: int, stage: str) -> Tensor:
        """[(b + s) * t, w]: base prompts first, then the source prompts."""
        ...


def run_values(engine: Activations, grid: Grid, layers: Iterable[int]) -> Values:
    """The source prompts' own activations at the same place."""
    places = [at_stage(grid.site, layer) for layer in layers]
    sources = {place: engine.activation(*place) for place in places}
    return Values("run", sources, torch.arange(engine.shape.b) + engine.shape.b)


def ablation_values(
    engine: Activations, grid: Grid, layers: Iterable[int], value: str | Tensor, *, seed: int
) -> Values:
    """Zeros, means, another prompt's activations, or one given vector.

    Raises:
        ArgumentError: there is no other prompt to resample from.
        ShapeError: the given vector fits neither the site nor one head of it.
    """
    shape = engine.shape
    b, t = shape.b, shape.t
    nobody = torch.zeros(b, dtype=torch.int64)
    if grid.op == "scale" or (isinstance(value, str) and value == "zero"):
        return Values("none", {}, nobody)
    places = [at_stage(grid.site, layer) for layer in layers]
    if isinstance(value, Tensor):
        width, unit = shape.width(grid.site), shape.unit(grid.site)
        if value.dim() != 1 or value.numel() not in (width, unit):
            msg = (
                f"ablate: value must be a vector of {width} numbers (or {unit}, one head), got "
                f"shape {list(value.shape)}."
            )
            raise ShapeError(msg)
        like = engine.activation(*places[0])
        return Values("one", {place: value.to(like)[None] for place in places}, nobody)
    held = {place: engine.activation(*place) for place in places}
    total = next(iter(held.values())).shape[0] // t
    among = torch.arange(b, total) if total > b else torch.arange(b)
    if value == "resample":
        own = total == b
        if len(among) < (2 if own else 1):
            msg = (
                "ablate: resampling needs another prompt to draw from, but there is one. Pass "
                "several prompts, or reference."
            )
            raise ArgumentError(msg)
        shift = torch.randint(
            1 if own else 0, len(among), (b,), generator=generator(seed, "resample")
        )
        return Values("resample", held, among[(torch.arange(b) + shift) % len(among)])
    tokens = {place: kept.unflatten(0, (total, t))[among] for place, kept in held.items()}
    if value == "mean":
        return Values("one", {p: x.flatten(0, 1).mean(0)[None] for p, x in tokens.items()}, nobody)
    # One row a position: every prompt reads prompt 0 of the table.
    return Values("resample", {p: x.mean(0) for p, x in tokens.items()}, nobody)
