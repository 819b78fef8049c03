"""What the explainers return: shap's Explanation, or its likeness where shap is absent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np


@dataclass(frozen=True, eq=False)
class Explanation:
    """The parallel arrays of an explanation, under shap's names.

    Attributes:
        values: [rows, features] or [rows, features, outputs].
        base_values: [rows] or [rows, outputs], the value with every feature masked.
        data: the rows that were explained.
        display_data: unused; None.
        instance_names: unused; None.
        feature_names: one for each feature, or a list of them for each row.
        output_names: one for each output, or None.
        output_indexes: which outputs were kept, or None for all.
        lower_bounds: values less two standard errors, or None.
        upper_bounds: values and two standard errors, or None.
        error_std: like values, or None.
        main_effects: like values, or None.
        hierarchical_values: values of the inner nodes of a partition tree too, or None.
        clustering: the partition tree, or None.
        compute_time: seconds.

    Rows are picked by indexing: explanation[3], explanation[:10].
    """

    values: Any
    base_values: Any = None
    data: Any = None
    display_data: Any = None
    instance_names: Any = None
    feature_names: Any = None
    output_names: Any = None
    output_indexes: Any = None
    lower_bounds: Any = None
    upper_bounds: Any = None
    error_std: Any = None
    main_effects: Any = None
    hierarchical_values: Any = None
    clustering: Any = None
    compute_time: float | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(np.shape(self.values))

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, rows: Any) -> Explanation:
        by_row = (
            "values", "base_values", "data", "lower_bounds", "upper_bounds", "error_std",
            "main_effects", "hierarchical_values",
        )  # fmt: skip
        picked = {
            name: getattr(self, name)[rows] for name in by_row if getattr(self, name) is not None
        }
        return replace(self, **picked)


def explanation(**parts: Any) -> Any:
    """shap.Explanation of these parts if shap is installed, so that its plots take it."""
    try:
        import shap
    except ImportError:
        return Explanation(**parts)
    known = {field.name for field in fields(Explanation)}
    return shap.Explanation(**{name: part for name, part in parts.items() if name in known})


def pack(arrays: Sequence[Any]) -> Any:
    """One array of arrays of one shape, an array of objects where shapes differ, None of Nones."""
    if any(a is None for a in arrays):
        return None
    if len({np.shape(a) for a in arrays}) == 1:
        return np.array(arrays)
    out = np.empty(len(arrays), dtype=object)
    for i, a in enumerate(arrays):
        out[i] = a
    return out
