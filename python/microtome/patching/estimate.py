"""Estimated sweeps, and how close an estimate comes to the exact sweep."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from microtome import _check
from microtome.errors import ArgumentError
from microtome.patching.result import Sweep


@dataclass(frozen=True)
class Faithfulness:
    """How close estimated effects come to exact ones, over the cells that were run exactly.

    An effect is a score less the unpatched run's, mean over prompts. Cells whose patch changes no
    bit are left out: there both are 0.

    Attributes:
        cells: how many are compared.
        pearson: correlation of the effects; NaN where one side does not vary.
        spearman: correlation of their ranks, ties sharing the mean rank.
        k: of `overlap`.
        overlap: share of the k largest exact effects, in absolute value, that are among the k
            largest estimated ones.
        max_error: largest |estimate - exact|, in the metric's unit.
        worst: the cells that err most: coordinates, estimate, exact, error.

    A high correlation says that the estimate ranks these cells well, not that single effects are
    right; and if the cells were chosen by a large estimate, cells with a small estimate and a large
    effect are missed.
    """

    cells: int
    pearson: float
    spearman: float
    k: int
    overlap: float
    max_error: float
    worst: tuple[dict[str, Any], ...] = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain Python values, ready for JSON."""
        return {**asdict(self), "worst": list(self.worst)}


@dataclass(frozen=True)
class Attribution(Sweep):
    """A sweep's scores as a gradient estimates them: metric of the base run + attribution.

    Attributes:
        steps: points on each line; 1 is the gradient at the base run.
        check: how the estimate compares with an exact sweep of some cells, if one was asked for.

    `effect()` is the attribution itself. All else is as in Sweep, to which it can be compared cell
    by cell: `against`. A large estimate is a reason to patch a cell, not the result of doing so.
    """

    steps: int = 1
    check: Faithfulness | None = None

    def against(self, exact: Sweep, *, k: int = 10) -> Faithfulness:
        """Compare with an exact sweep of the same cells; see `faithfulness`."""
        return faithfulness(self, exact, k=k)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain Python values, ready for JSON."""
        check = None if self.check is None else self.check.to_dict()
        return {**super().to_dict(), "steps": self.steps, "check": check}

    def __repr__(self) -> str:
        shape = " x ".join(f"{len(v)} {a}s" for a, v in zip(self.axes, self.values, strict=True))
        steps = "" if self.steps == 1 else f", {self.steps} steps"
        return f"Attribution({self.site}: {shape}, {self.metric}{steps})"


def faithfulness(estimate: Sweep, exact: Sweep, *, k: int = 10) -> Faithfulness:
    """Compare an estimated sweep with an exact one of the same cells.

    Args:
        estimate: from `attribute`.
        exact: from `sweep`, of the same site, axes, metric and direction.
        k: how many of the largest effects to match.

    Returns:
        Faithfulness, in float64.

    Raises:
        ArgumentError: they are not over the same cells, or no cell changes anything.
    """
    for name in ("site", "axes", "values", "metric", "base"):
        mine, other = getattr(estimate, name), getattr(exact, name)
        if mine != other:
            msg = (
                f"faithfulness: estimate and exact differ in {name}: {_short(mine)} and "
                f"{_short(other)}. Run both over the same cells, prompts and direction."
            )
            raise ArgumentError(msg)
    return compare(estimate, exact.effect(), exact.written > 0, k=k)


def compare(estimate: Sweep, exact: Tensor, where: Tensor, *, k: int) -> Faithfulness:
    """Compare estimated effects with exact ones.

    Args:
        estimate: the estimated sweep.
        exact: [*axes], effects.
        where: [*axes] bool, the cells that count.
        k: as in `faithfulness`.

    Raises:
        ArgumentError: no cell counts, or k is below 1.
    """
    _check.between("faithfulness", "k", k, 1, 1 << 30)
    cells = where.flatten().nonzero().flatten().cpu()
    if len(cells) == 0:
        msg = "faithfulness: no patch of these cells changes anything. Do the runs differ there?"
        raise ArgumentError(msg)
    guess, true = (x.flatten().double().cpu()[cells] for x in (estimate.effect(), exact))
    k = min(k, len(cells))
    best = [x.abs().argsort(descending=True, stable=True)[:k] for x in (guess, true)]
    error = guess - true
    worst = []
    for i in error.abs().argsort(descending=True, stable=True)[:5].tolist():
        at = torch.unravel_index(cells[i], where.shape)
        place = zip(estimate.axes, estimate.values, at, strict=True)
        numbers = {"estimate": guess[i], "exact": true[i], "error": error[i]}
        worst.append(
            {axis: values[int(j)] for axis, values, j in place}
            | {name: float(value) for name, value in numbers.items()}
        )
    return Faithfulness(
        cells=len(cells),
        pearson=_correlation(guess, true),
        spearman=_correlation(_ranks(guess), _ranks(true)),
        k=k,
        overlap=float(torch.isin(best[0], best[1]).double().mean()),
        max_error=float(error.abs().max()),
        worst=tuple(worst),
    )


def _correlation(x: Tensor, y: Tensor) -> float:
    """Pearson's, NaN where one side does not vary."""
    x, y = x - x.mean(), y - y.mean()
    size = x.norm() * y.norm()
    return float(((x * y).sum() / size).clamp(-1, 1)) if float(size) > 0 else float("nan")


def _ranks(x: Tensor) -> Tensor:
    """Ranks from 0; equal numbers share the mean of theirs."""
    _, group, count = x.unique(return_inverse=True, return_counts=True)
    last = count.cumsum(0).double()
    return (last - (count.double() + 1) / 2)[group]


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
