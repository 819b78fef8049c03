"""Where the values come from that a sweep writes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor

from microtome import _check
from microtome._seed import generator
from microtome.errors import ArgumentError, ShapeError
from microtome.patching.cells import Grid, Shape, Values


class Activations(Protocol):
    """What an engine knows of its unpatched runs."""

    shape: Shape

    def activation(self, layer: int, stage: str) -> Tensor:
        """[(b + s) * t, w]: base prompts first, then the source prompts."""
        ...


def run_values(engine: Activations, grid: Grid, layers: Iterable[int]) -> Values:
    """The source prompts' own activations at the same place."""
    places = [engine.shape.stage(grid.site, layer) for layer in layers]
    sources = {place: engine.activation(*place) for place in places}
    return Values("run", sources, torch.arange(engine.shape.b) + engine.shape.b)


def check_operation(op: str, value: str | Tensor, factor: float) -> None:
    """Raise ArgumentError for a value or factor that the operation would not use."""
    _check.one_of("ablate", "op", op, ("replace", "add", "scale"))
    if not isinstance(value, Tensor):
        _check.one_of("ablate", "value", value, ("zero", "mean", "mean-position", "resample"))
    zero = isinstance(value, str) and value == "zero"
    if op == "add" and zero:
        msg = "ablate: op 'add' needs something to add, got value='zero'. Pass another value."
        raise ArgumentError(msg)
    if op == "scale" and not zero:
        given = "a tensor" if isinstance(value, Tensor) else repr(value)
        msg = f"ablate: op 'scale' takes no value, got {given}. Leave it out, or use 'add'."
        raise ArgumentError(msg)
    if op == "replace" and factor != 1.0:
        msg = f"ablate: op 'replace' takes no factor, got {factor}. Use 'add' or 'scale'."
        raise ArgumentError(msg)


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
    places = [shape.stage(grid.site, layer) for layer in layers]
    if isinstance(value, Tensor):
        width, unit = shape.width(grid.site), shape.unit(grid.site)
        if value.dim() != 1 or value.numel() not in (width, unit):
            part = "neuron" if grid.site == "neurons" else "head"
            or_one = "" if unit == width else f" (or {unit}, one {part})"
            msg = (
                f"ablate: value must be a vector of {width} numbers{or_one}, got shape "
                f"{list(value.shape)}."
            )
            raise ShapeError(msg)
        like = engine.activation(*places[0])
        table = value.to(like).repeat(width // value.numel())[None]
        return Values("one", dict.fromkeys(places, table), nobody)
    held = {place: engine.activation(*place) for place in places}
    total = next(iter(held.values())).shape[0] // t
    own = total == b  # values come from the prompts themselves, whose padding is left out
    among = torch.arange(b) if own else torch.arange(b, total)
    position = torch.arange(t)
    counts = torch.ones(len(among), t, dtype=torch.bool)
    if own:
        counts = (position >= shape.first[:, None]) & (position < shape.stop[:, None])
    if value == "resample":
        return Values("resample", held, _partners(shape, among, counts, own, seed))
    tokens = {place: kept.unflatten(0, (total, t))[among] for place, kept in held.items()}
    if value == "mean":
        return Values("one", {p: x[counts].mean(0)[None] for p, x in tokens.items()}, nobody)
    weight = counts[..., None]  # [s, t, 1]; no write reads a position where no prompt counts
    tables = {
        p: torch.where(weight.to(x.device), x, 0.0).sum(0) / weight.sum(0).clamp_min(1).to(x)
        for p, x in tokens.items()
    }
    # One row a position: every prompt reads prompt 0 of the table.
    return Values("resample", tables, nobody)


def _partners(shape: Shape, among: Tensor, counts: Tensor, own: bool, seed: int) -> Tensor:
    """[b] the prompt that each prompt draws its values from.

    Raises:
        ArgumentError: there is no other prompt, or a prompt would read another's padding.
    """
    if len(among) < (2 if own else 1):
        msg = (
            "ablate: resampling needs another prompt to draw from, but there is one. Pass "
            "several prompts, or reference."
        )
        raise ArgumentError(msg)
    b = shape.b
    shift = torch.randint(1 if own else 0, len(among), (b,), generator=generator(seed, "resample"))
    place = (torch.arange(b) + shift) % len(among)
    position = torch.arange(shape.t)
    mine = (position >= shape.first[:, None]) & (position < shape.stop[:, None])
    lacking = (mine & ~counts[place]).any(1)
    if bool(lacking.any()):
        i = int(lacking.nonzero()[0])
        msg = (
            f"ablate: prompt {i} would be resampled from prompt {int(place[i])} of `tokens`, which "
            "has padding where it has none. Pass reference, prompts without padding."
        )
        raise ArgumentError(msg)
    return among[place]
