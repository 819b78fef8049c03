"""What LIME returns: local linear models, how well they fit, and how stable they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from microtome.lime.ridge import Fit


@dataclass(frozen=True, eq=False)
class Stability:
    """How much an explanation changes from one seed to the next.

    Attributes:
        seeds: how many runs were compared.
        jaccard: [e] or [e, o], the mean over pairs of runs of the overlap of the chosen features,
            |both| / |either|; 1 if every run chose the same.
        spread: [e, p] or [e, p, o], the standard deviation of each coefficient over the runs.
    """

    seeds: int
    jaccard: Tensor
    spread: Tensor

    def to_dict(self) -> dict[str, Any]:
        return {
            "seeds": self.seeds, "jaccard": self.jaccard.tolist(), "spread": self.spread.tolist()
        }  # fmt: skip


@dataclass(frozen=True, eq=False)
class LimeExplanation:
    """Local linear models of e explicands. It keeps no model and no samples.

    A function with one number a row has no axis o. Explicands with fewer than p features (shorter
    texts) have zeros at the end, and names tell how many are theirs.

    Attributes:
        coefficients: [e, p] or [e, p, o] float64, in units of f: the effect of the feature being
            as it is in the explicand (in its bin or category, the word or the segment present), or
            of one standard deviation of a column that is not discretised. Zero if not chosen.
        chosen: like coefficients, bool.
        intercept: [e] or [e, o].
        local_prediction: [e] or [e, o], the linear model at the explicand.
        prediction: [e] or [e, o], f at the explicand.
        fidelity: [e] or [e, o], the weighted R^2 on the samples: 1 if the linear model repeats f.
        names: for each explicand the names of its features.
        kind: "table", "text" or "image".
        view: what a plot needs besides: texts and their pieces (letters, feature or -1); or images
            [H, W, 1 or 3] in [0, 1] and segments [e, H, W].
        evaluations: rows f was called with.
        note: what else to know, or an empty string.
        stability: over seeds, if repeats were asked for.
        interrupted: whether the user ended the sampling early: rows that were not begun are NaN,
            and the last that was has fewer samples.

    A coefficient says how a linear model of f changes near the explicand, as the kernel and the
    samples define near. Where fidelity is low it says little of f.
    """

    coefficients: Tensor
    chosen: Tensor
    intercept: Tensor
    local_prediction: Tensor
    prediction: Tensor
    fidelity: Tensor
    names: tuple[tuple[str, ...], ...]
    kind: str
    view: Mapping[str, Any] = field(default_factory=dict)
    evaluations: int = 0
    note: str = ""
    stability: Stability | None = None
    interrupted: bool = False

    def top(self, k: int = 10, row: int = 0, output: int = 0) -> list[dict[str, Any]]:
        """The k chosen features of a row with the largest coefficients, largest first."""
        picked = [a[row] if a.dim() == 2 else a[row, :, output] for a in self._both()]
        values, chosen = picked
        order = values.abs().argsort(descending=True, stable=True).tolist()
        return [
            {"feature": self.names[row][j], "value": float(values[j])}
            for j in order
            if bool(chosen[j])
        ][:k]

    def _both(self) -> tuple[Tensor, Tensor]:
        return self.coefficients, self.chosen

    def to_dict(self) -> dict[str, Any]:
        """Everything but the view as plain Python values, ready for JSON."""
        tensors = (
            "coefficients", "chosen", "intercept", "local_prediction", "prediction", "fidelity",
        )  # fmt: skip
        return {
            "names": [list(names) for names in self.names],
            **{name: getattr(self, name).tolist() for name in tensors},
            **{
                name: getattr(self, name) for name in ("kind", "evaluations", "note", "interrupted")
            },
            "stability": self.stability and self.stability.to_dict(),
        }

    def plot(
        self, path: str | Path, kind: str = "auto", *, row: int = 0, output: int = 0,
        limit: int = 10,
    ) -> Path:  # fmt: skip
        """Draw the largest coefficients of a row.

        Args:
            path: where to write the picture; its ending says the format.
            kind: "bar", "text" (the words highlighted), "image" (the segments over the image) or
                "auto": what suits the features.
            row: which explicand.
            output: which output.
            limit: the most features drawn.

        Raises:
            ArgumentError: an unknown kind, or one that does not suit the features.
            PackageError: matplotlib is not installed.
        """
        from microtome.lime.plot import draw

        return draw(self, path, kind, row=row, output=output, limit=limit)

    def __repr__(self) -> str:
        e, p = self.coefficients.shape[:2]
        worst = float(self.fidelity.min()) if self.fidelity.numel() else float("nan")
        return (
            f"LimeExplanation({e} rows x {p} features, {self.kind}, least R^2 {worst:.3g}, "
            f"{self.evaluations} evaluations)"
        )


def finish(
    runs: list[Fit],
    prediction: Tensor,
    scalar: bool,
    names: tuple[tuple[str, ...], ...],
    **rest: Any,
) -> LimeExplanation:
    """The result of one run, or of several with other seeds: the first, and how they differ."""
    first = _whole(runs[0], len(names), max(map(len, names)))
    parts = [
        first.coefficients, first.chosen, first.intercept, first.local_prediction, prediction,
        first.fidelity,
    ]  # fmt: skip
    steady = _compare(runs) if len(runs) > 1 else None
    if scalar:
        parts = [part[..., 0] for part in parts]
        if steady is not None:
            steady = Stability(steady.seeds, steady.jaccard[..., 0], steady.spread[..., 0])
    return LimeExplanation(*parts, names, **rest, stability=steady)


def _whole(run: Fit, e: int, p: int) -> Fit:
    """A fit of the first rows as one of all e, NaN for those that were not begun."""
    begun, own, o = run.coefficients.shape
    if begun == e:
        return run
    coefficients = torch.full((e, p, o), torch.nan, dtype=torch.float64)
    coefficients[:begun] = 0.0
    coefficients[:begun, :own] = run.coefficients
    chosen = torch.zeros(e, p, o, dtype=torch.bool)
    chosen[:begun, :own] = run.chosen
    rest = torch.full((e - begun, o), torch.nan, dtype=torch.float64)
    parts = (torch.cat([a, rest]) for a in (run.intercept, run.local_prediction, run.fidelity))
    return Fit(coefficients, chosen, *parts, run.index, run.valid)


def _compare(runs: list[Fit]) -> Stability:
    chosen = torch.stack([run.chosen for run in runs]).double()  # [S, e, p, o]
    both = torch.einsum("sepo,tepo->steo", chosen, chosen)
    size = chosen.sum(2)
    either = size[:, None] + size[None] - both
    overlap = torch.where(either > 0, both / either.clamp(min=1), 1.0)
    s, t = torch.triu_indices(len(runs), len(runs), 1)
    spread = torch.stack([run.coefficients for run in runs]).std(0)
    return Stability(len(runs), overlap[s, t].mean(0), spread)
