"""From the values of rows to an Explanation for each input of the model."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from microtome.integrations.shap.explanation import explanation, pack
from microtome.integrations.shap.solved import Asked, Solved


@dataclass(frozen=True)
class Layout:
    """How the features of a row lie in the inputs of the model.

    Attributes:
        data: the rows as they are shown, for each input.
        shapes: for each row, the shape of the features of each input.
        names: names of the features, for each input.
    """

    data: list[Any]
    shapes: list[list[tuple[int, ...]]]
    names: list[Any]


def masker_layout(masker: Any, args: Sequence[Any], feature_names: Any) -> Layout:
    """The layout that a masker asks for, by shap's conventions."""
    rows = list(zip(*args, strict=True))
    if callable(getattr(masker, "mask_shapes", None)):
        shapes = [[tuple(s) for s in masker.mask_shapes(*row)] for row in rows]
    else:
        shapes = [[tuple(np.shape(a)) for a in row] for row in rows]
    data: list[Any] = list(args)
    if hasattr(masker, "data_transform"):
        parts = [list(masker.data_transform(*row)) for row in rows]
        data = [pack([np.asarray(p[j]) for p in parts]) for j in range(len(args))]
    named = getattr(masker, "feature_names", None)
    names: list[Any] = [feature_names] * len(args)
    if callable(named):
        each = [named(*row) for row in rows]
        names = [[row[j] for row in each] for j in range(len(args))]
    elif feature_names is None:
        names = [
            [f"Feature {i}" for i in range(shapes[0][j][0])] if rows and len(shapes[0][j]) else None
            for j in range(len(args))
        ]
    return Layout(data, shapes, names)


def assemble(
    parts: list[Solved],
    layout: Layout,
    asked: Asked,
    labels: Sequence[str] | None,
    start: float,
    keeps_axis: bool = False,
) -> Any:
    """An Explanation for each input; alone if there is one.

    Args:
        parts: each row's values.
        layout: see `Layout`.
        asked: the call's arguments.
        labels: names of the outputs, or None.
        start: time.monotonic() when the call began.
        keeps_axis: whether the only one of several outputs, or of [rows, 1], has an axis.
    """
    kept = [part.keep(asked.outputs) for part in parts]
    parts = [part for part, _ in kept]
    numbers = [at for _, at in kept]
    base = pack([_flat(part.base[0].numpy(), part.scalar) for part in parts])
    names = _output_names(parts, numbers, labels)
    out = []
    for j, data in enumerate(layout.data):
        split = [
            _input(part, shapes, j, keeps_axis)
            for part, shapes in zip(parts, layout.shapes, strict=True)
        ]
        fields = {name: pack([s[name] for s in split]) for name in split[0]} if split else {}
        if asked.error_bounds and asked.error_kind == "standard":
            fields["lower_bounds"] = fields["values"] - 2 * fields["error_std"]
            fields["upper_bounds"] = fields["values"] + 2 * fields["error_std"]
        if not asked.error_bounds:
            fields["error_std"] = None
        trees = [part.tree for part in parts]
        nodes = [None if p.nodes is None else _flat(p.nodes[0].numpy(), p.scalar) for p in parts]
        out.append(
            explanation(
                base_values=base, data=data, feature_names=layout.names[j], output_names=names,
                output_indexes=None, clustering=pack(trees), hierarchical_values=pack(nodes),
                compute_time=time.monotonic() - start, **fields,
            )
        )  # fmt: skip
    return out[0] if len(out) == 1 else out


def _flat(a: np.ndarray, scalar: bool) -> Any:
    """Without the axis of outputs where the model has none."""
    return a[..., 0] if scalar else a


def _input(part: Solved, shapes: list[tuple[int, ...]], j: int, keeps_axis: bool) -> dict[str, Any]:
    """One input's share of a row's values."""
    sizes = [math.prod(shape) for shape in shapes]
    at = slice(sum(sizes[:j]), sum(sizes[: j + 1]))
    single = part.scalar if keeps_axis else part.values.shape[-1] == 1

    def share(a: Any) -> Any:
        if a is None:
            return None
        mine = a[0, at].numpy()
        if mine.ndim == 3:  # interactions: a row for each feature
            return mine[..., 0] if single else mine
        return mine.reshape(shapes[j] if single else (*shapes[j], -1))

    return {
        "values": share(part.values),
        "error_std": share(part.error),
        "main_effects": share(part.main_effects),
    }


def _output_names(parts: list[Solved], numbers: list[Any], labels: Sequence[str] | None) -> Any:
    if not parts or parts[0].scalar:
        return None if labels is None or len(labels) != 1 else labels[0]
    if labels is None:
        return None
    named = [np.asarray(labels)[slice(None) if at is None else at].tolist() for at in numbers]
    return named[0] if all(n == named[0] for n in named) else named
