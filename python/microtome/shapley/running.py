"""Running moments of sampled marginals, and when to stop sampling."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from microtome.errors import ArgumentError

# Evaluations after which something is known that Ctrl-C can keep, one row's at the least: more rows
# are not begun at once. Beside a function of half a microsecond a row, what a part costs is 1%.
KEPT = 1 << 16


class Moments:
    """Mean and spread of unit means, by explicand, stratum and player, merged round by round.

    With S strata of U units each, the estimate is the mean over strata of the strata's means, and
    its variance (1 / S^2) sum_s var_s / U with the unbiased variance of the U units of a stratum.
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean: Tensor | None = None  # [e, S, p, o]
        self.m2: Tensor | None = None

    def add(self, mean: Tensor, m2: Tensor, units: int) -> None:
        """Merge a round of `units` units in each stratum (Chan et al. 1979)."""
        if self.mean is None or self.m2 is None:
            self.count, self.mean, self.m2 = units, mean, m2
            return
        total = self.count + units
        apart = mean - self.mean
        self.m2 = self.m2 + m2 + apart * apart * (self.count * units / total)
        self.mean = self.mean + apart * (units / total)
        self.count = total

    def estimate(self) -> tuple[Tensor, Tensor]:
        """Values and standard errors, [e, p, o].

        With one unit a stratum there is no spread within it. Then the spread between strata stands
        in, which is too large on average where strata differ; with one stratum too there is none,
        and the standard error is NaN.
        """
        if self.mean is None or self.m2 is None:
            msg = "Moments: no round has been added."
            raise ArgumentError(msg)
        S = self.mean.shape[1]
        values = self.mean.mean(1)
        if self.count > 1:
            variance = self.m2.sum(1) / (self.count * (self.count - 1) * S * S)
        elif S > 1:
            variance = self.mean.var(1) / S
        else:
            variance = torch.full_like(values, math.nan)
        return values, variance.sqrt()


@dataclass
class Stop:
    """When to stop: a target error, a number of seconds, or neither.

    Args:
        op: name for messages.
        target_error: RMS standard error over players, as a fraction of the RMS value; reached by
            an explicand when its worst output is there.
        seconds: wall time from now.
    """

    op: str
    target_error: float | None = None
    seconds: float | None = None
    started: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        for name in ("target_error", "seconds"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                msg = f"{self.op}: {name} must be positive, got {name}={value}."
                raise ArgumentError(msg)

    @property
    def asked(self) -> bool:
        return self.target_error is not None or self.seconds is not None

    def share(self, part: float) -> float:
        """When a part of the time that is left will be over, on the monotonic clock."""
        if self.seconds is None:
            return math.inf
        now = time.monotonic()
        return now + (self.started + self.seconds - now) * part

    def late(self, until: float | None = None) -> bool:
        """Whether the time is over, or that until `until`."""
        if self.seconds is None:
            return False
        return time.monotonic() > (self.started + self.seconds if until is None else until)

    def ends_late(self, began: float, took: int, following: int, until: float) -> bool:
        """Whether a step of so many units would end after `until`, by what the last one took.

        Args:
            began: when the last step began, on the monotonic clock.
            took: its units.
            following: those of the step to come.
            until: the time.
        """
        if self.seconds is None:
            return False
        now = time.monotonic()
        return now + (now - began) / max(1, took) * following > until

    def reached(self, values: Tensor, stderr: Tensor) -> Tensor:
        """[e] bool: whose error is small enough."""
        if self.target_error is None:
            return torch.zeros(len(values), dtype=torch.bool)
        error = relative_error(values, stderr)
        return (error <= self.target_error).all(-1)


def rounds(
    total: int, least: int, most: int, stop: Stop, until: float
) -> Iterator[tuple[int, int]]:
    """Rounds of units, from small to large: the first unit of each, and how many.

    Without a time limit they depend on the arguments alone, and so do the draws in them. With one,
    no round takes more than half of the time that the rounds before say is left.

    Args:
        total: units in all.
        least: of the first round.
        most: of a round.
        stop: whether there is a time limit.
        until: when it is reached.
    """
    first, units = 0, min(least, most)
    while first < total:
        units = min(units, total - first)
        began = time.monotonic()
        yield first, units
        first += units
        grown = min(most, 2 * units)
        if stop.seconds is not None:
            now = time.monotonic()
            fits = (until - now) / 2 * units / max(now - began, 1e-9)
            grown = max(1, min(grown, int(max(fits, 0.0))))
        units = grown


def relative_error(values: Tensor, stderr: Tensor) -> Tensor:
    """[e, o]: RMS standard error over players by RMS value over players; 0 where both are 0."""
    size, error = (a.square().mean(1).sqrt() for a in (values, stderr))
    return torch.where(error == 0, error, error / size)


def bar(total: int, what: str, unit: str, progress: bool) -> Any:
    """A progress bar for what takes longer than a second, or none at all."""
    return tqdm(total=total, desc=what, unit=unit, delay=1.0, disable=not progress)
