"""Attributions by unit, from two activations and a gradient, and by cell, from those."""

from __future__ import annotations

import torch
from torch import Tensor

from microtome.ops import attribution_scores
from microtome.patching.cells import Grid, Shape

Parts = dict[int, Tensor]  # layer -> [b, t, units, entries of a unit]


def by_unit(
    grid: Grid, shape: Shape, source: Tensor, base: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor]:
    """Attributions and what changes, of one layer.

    Args:
        grid: whose axes say what stays apart.
        shape: of the run.
        source: [b, t, w], [b, t, h, d_head], or [b, h, t, t] of a pattern.
        base: likewise.
        grad: likewise.

    Returns:
        Scores in float32 or wider and changes bool, both [b, t, units, entries]: 1 unit where heads
        or neurons are no axis, 1 entry where the source position of a pattern is none.
    """
    b, t = shape.b, shape.t
    apart = "head" in grid.axes or "neuron" in grid.axes
    if grid.site == "pattern":
        entries = t if "source" in grid.axes else 1
        rows = [x.reshape(-1, t) for x in (source, base, grad)]  # [b * h * t, t]
        scores, changed = (
            x.view(b, -1, t, entries).transpose(1, 2) for x in attribution_scores(*rows, entries)
        )
        if not apart:
            scores, changed = scores.sum(2, keepdim=True), changed.any(2, keepdim=True)
        return scores, changed
    rows = [x.reshape(b * t, -1) for x in (source, base, grad)]
    units = shape.units(grid.site) if apart else 1
    scores, changed = attribution_scores(*rows, units)
    return scores.view(b, t, units, 1), changed.view(b, t, units, 1)


def by_cell(grid: Grid, shape: Shape, parts: Parts) -> Tensor:
    """[*axes, b] on the CPU: positions that count, summed over what is not an axis."""
    where = dict(zip(grid.axes, grid.values, strict=True))
    unit = "neuron" if grid.site == "neurons" else "head"
    counts = counted(shape)[:, :, None, None]
    laid = {}
    for layer, part in parts.items():
        x = part.masked_fill(~counts.to(part.device), 0)
        x = x[:, list(where["position"])] if "position" in where else x.sum(1, keepdim=True)
        laid[layer] = x[:, :, list(where[unit])] if unit in where else x
    x = torch.stack([laid[layer] for layer in where["layer"]]).cpu()  # layers before [b, t, ...]
    x = x.long() if x.dtype == torch.bool else x
    dims = {"layer": 0, "position": 2, unit: 3, "source": 4}
    order = [dims[axis] for axis in grid.axes]
    x = x.permute(*order, *({0, 2, 3, 4} - set(order)), 1)
    return x.reshape(*grid.shape, shape.b)


def counted(shape: Shape) -> Tensor:
    """[b, t] bool, the positions that count."""
    at = torch.arange(shape.t)
    return (at >= shape.first[:, None]) & (at < shape.stop[:, None])
