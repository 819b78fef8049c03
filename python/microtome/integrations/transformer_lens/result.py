"""Sweeps with one value per prompt, several metrics or a baseline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from microtome.errors import ArgumentError, ShapeError, SiteError
from microtome.integrations.transformer_lens.cells import data_frame


@dataclass(frozen=True)
class PatchingResult:
    """What a sweep returns for reduce="none", baseline=True or a mapping of metrics.

    A cell's value says what the metric becomes when this activation alone is the clean run's. That
    restoring a site restores the metric does not say that the site is necessary.

    Attributes:
        values: [metrics?, *axes, b?], or [metrics?, cells, b?] for index_df: the axis of metrics is
            there if a mapping was given, the axis of prompts unless the values were reduced.
        axis_names: the swept axes; empty for index_df.
        cells: the index tuples, in the order of `values`.
        column_names: what the entries of an index tuple count.
        metric_names: "metric" for a single function.
        reduced: True if there is no axis of prompts.
        baseline: the metric on the unpatched corrupted run, [metrics?, b?], or None.
        has_metric_axis: True if `values` begins with an axis of metrics.
        patch_type_names: what the axis "patch_type" of the `_every` functions counts, or None. Keys
            and values are padded with zeros to the number of heads.
    """

    values: Tensor
    axis_names: tuple[str, ...]
    cells: tuple[tuple[int, ...], ...]
    column_names: tuple[str, ...]
    metric_names: tuple[str, ...]
    reduced: bool
    baseline: Tensor | None = None
    has_metric_axis: bool = False
    patch_type_names: tuple[str, ...] | None = None

    @property
    def index_df(self) -> Any:
        """The index tuples as a pandas DataFrame."""
        return data_frame("PatchingResult", self.cells, self.column_names)

    def __getitem__(self, metric_name: str) -> PatchingResult:
        """One metric's result, without the axis of metrics."""
        if metric_name not in self.metric_names:
            msg = (
                f"PatchingResult: no metric {metric_name!r}; there is "
                f"{', '.join(map(repr, self.metric_names))}."
            )
            raise SiteError(msg)
        if not self.has_metric_axis:
            return self
        i = self.metric_names.index(metric_name)
        return PatchingResult(
            self.values[i],
            self.axis_names,
            self.cells,
            self.column_names,
            (metric_name,),
            self.reduced,
            None if self.baseline is None else self.baseline[i],
            patch_type_names=self.patch_type_names,
        )

    def mean(self) -> Tensor:
        """Mean over prompts of each cell."""
        return self.values if self.reduced else self.values.mean(dim=-1)

    def stderr(self) -> Tensor:
        """Standard error of that mean, from the sample deviation; NaN for one prompt."""
        if self.reduced:
            msg = "PatchingResult.stderr: needs one value per prompt. Sweep with reduce='none'."
            raise ArgumentError(msg)
        n = self.values.shape[-1]
        if n < 2:
            return torch.full_like(self.values[..., 0], torch.nan)
        return self.values.std(dim=-1) / n**0.5

    def effect(self) -> Tensor:
        """values - baseline: what each patch changes in the corrupted run."""
        return self.values - self._spread(self._baseline("effect"))

    def normalized(self, clean_baseline: Tensor) -> Tensor:
        """(values - corrupted) / (clean - corrupted): 0 is no effect, 1 the clean run's metric.

        Args:
            clean_baseline: the metric on the unpatched clean run, of the shape of `baseline`. Where
                it equals the corrupted run's there is nothing to restore: infinite or NaN.
        """
        corrupted = self._baseline("normalized")
        clean = torch.as_tensor(clean_baseline).to(self.values)
        if clean.shape != corrupted.shape:
            msg = (
                f"PatchingResult.normalized: clean_baseline must have the shape of baseline, "
                f"{list(corrupted.shape)}, got {list(clean.shape)}."
            )
            raise ShapeError(msg)
        low = self._spread(corrupted)
        return (self.values - low) / (self._spread(clean) - low)

    def _baseline(self, what: str) -> Tensor:
        if self.baseline is None:
            msg = f"PatchingResult.{what}: needs a baseline. Sweep with baseline=True."
            raise ArgumentError(msg)
        return self.baseline

    def _spread(self, baseline: Tensor) -> Tensor:
        """The baseline with an axis of one entry for each swept axis."""
        lead = int(self.has_metric_axis)
        swept = self.values.dim() - lead - int(not self.reduced)
        shape = (*baseline.shape[:lead], *[1] * swept, *baseline.shape[lead:])
        return baseline.reshape(shape)


def stack_types(
    results: list[PatchingResult], axis_names: tuple[str, ...], type_names: tuple[str, ...]
) -> PatchingResult:
    """Stack sweeps of several activations on a leading axis "patch_type".

    Args:
        results: with the axes of `axis_names` in any order; their heads may differ in number.
        axis_names: the order of axes in the result.
        type_names: one for each sweep.
    """
    first = results[0]
    lead = int(first.has_metric_axis)
    spelled = {"head_index": "head", "dest_pos": "pos"}
    parts = []
    for result in results:
        have = [spelled.get(name, name) for name in result.axis_names]
        order = [lead + have.index(name) for name in axis_names]
        rest = range(lead + len(have), result.values.dim())
        parts.append(result.values.permute(*range(lead), *order, *rest))
    sizes = [max(part.shape[i] for part in parts) for i in range(parts[0].dim())]
    stacked = parts[0].new_zeros([len(parts), *sizes])
    for i, part in enumerate(parts):
        stacked[i][tuple(slice(0, n) for n in part.shape)] = part
    cell_sizes = (len(parts), *sizes[lead : lead + len(axis_names)])
    names = ("patch_type", *axis_names)
    return PatchingResult(
        stacked.transpose(0, 1) if first.has_metric_axis else stacked,
        names,
        tuple(map(tuple, torch.cartesian_prod(*map(torch.arange, cell_sizes)).tolist())),
        names,
        first.metric_names,
        first.reduced,
        first.baseline,
        first.has_metric_axis,
        type_names,
    )
