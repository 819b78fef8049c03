"""From the equations of many explicands to their local linear models."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from microtome.errors import ArgumentError
from microtome.lime.equations import Equations, stack
from microtome.lime.model import Model
from microtome.lime.ridge import Fit, fit
from microtome.lime.selection import check_selection, select


@dataclass(frozen=True)
class Settings:
    """What every kind of explanation is asked for.

    Args:
        op: name for messages.
        num_features: features to keep at most.
        selection: how they are chosen (selection.py).
        alpha: the penalty on the squared coefficients.
        num_samples: samples of each explicand, itself the first.
        repeats: runs with other seeds, to see how stable the explanation is.

    Raises:
        ArgumentError: one of them is out of its range.
    """

    op: str
    num_features: int
    selection: str
    alpha: float
    num_samples: int
    repeats: int

    def __post_init__(self) -> None:
        check_selection(self.op, self.selection)
        for name, least in (("num_features", 1), ("num_samples", 2), ("repeats", 1)):
            value = getattr(self, name)
            if value < least:
                msg = f"{self.op}: {name} must be at least {least}, got {name}={value}."
                raise ArgumentError(msg)
        if not self.alpha >= 0:
            msg = f"{self.op}: alpha must be at least 0, got alpha={self.alpha}."
            raise ArgumentError(msg)

    def solve(self, systems: list[Equations]) -> Fit:
        """Select and fit, explicands with the same number of features at once; padded to the most.

        The index of the fit is left out where the numbers of features differ.
        """
        sizes = [system.gram.shape[-1] for system in systems]
        most, o = max(sizes), systems[0].moments.shape[-1]
        if min(sizes) == most:
            equations = stack(systems)
            index, valid = select(self.op, equations, self.num_features, self.selection)
            return fit(equations, index, valid, self.alpha)
        e = len(systems)
        out = Fit(
            torch.zeros(e, most, o, dtype=torch.float64),
            torch.zeros(e, most, o, dtype=torch.bool),
            *(torch.empty(e, o, dtype=torch.float64) for _ in range(3)),
            index=torch.empty(e, o, 0, dtype=torch.int64),
            valid=None,
        )
        for size in sorted(set(sizes)):
            who = [i for i, own in enumerate(sizes) if own == size]
            part = self.solve([systems[i] for i in who])
            out.coefficients[who, :size] = part.coefficients
            out.chosen[who, :size] = part.chosen
            for name in ("intercept", "local_prediction", "fidelity"):
                getattr(out, name)[who] = getattr(part, name)
        return out

    def run(
        self, model: Model, systems: Callable[[int], Iterator[Equations]], e: int
    ) -> tuple[list[Fit], str]:
        """The fits of all runs, and what the user left of them, in words.

        Args:
            model: which says whether the user came.
            systems: of a run, the equations of one explicand after another, as far as they go.
            e: explicands.

        Raises:
            KeyboardInterrupt: before there is anything to keep.
        """
        runs: list[Fit] = []
        for run in range(self.repeats):
            found: list[Equations] = []
            try:
                for system in systems(run):
                    found.append(system)
            except KeyboardInterrupt:
                model.interrupted = True
            if not model.interrupted:
                runs.append(self.solve(found))
                continue
            if runs:
                return runs, f"ended early, after {run} of {self.repeats} runs"
            if not found:
                raise KeyboardInterrupt
            return [self.solve(found)], f"ended early; {len(found)} of {e} rows were begun"
        return runs, ""
