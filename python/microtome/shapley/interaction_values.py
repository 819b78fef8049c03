"""What `interactions` returns: a number for every small set of players."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from microtome import _check
from microtome.errors import ArgumentError
from microtome.shapley.players import Players
from microtome.shapley.result import additivity


@dataclass(frozen=True, eq=False)
class Interactions:
    """Interactions of sets of players in e rows.

    Attributes:
        values: [e, T] or [e, T, o] float64, in units of f; `sets` says of whom.
        stderr: like values: standard errors, 0 where the answer is exact.
        sets: T tuples of players' numbers, by size.
        index: "k-SII", "SII", "STII" or "FSII".
        order: size of the largest sets.
        base_values: [e] or [e, o], the value without any player.
        full_values: [e] or [e, o], the value with all of them.
        players: their names.
        method, engine, evaluations, exact, interrupted, note: as in ShapleyValues.
    """

    values: Tensor
    stderr: Tensor
    sets: tuple[tuple[int, ...], ...]
    index: str
    order: int
    base_values: Tensor
    full_values: Tensor
    players: Players
    method: str
    engine: str
    evaluations: int
    exact: bool = False
    interrupted: bool = False
    note: str = ""
    _at: dict[frozenset[int], int] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self._at.update({frozenset(T): at for at, T in enumerate(self.sets)})

    def __getitem__(self, players: Sequence[int | str] | frozenset[int | str]) -> Tensor:
        """The interaction of some players, by number or name: [e] or [e, o]."""
        names = self.players.names
        key = frozenset(names.index(j) if isinstance(j, str) and j in names else j for j in players)
        if key not in self._at:
            msg = (
                f"Interactions: there is no interaction of {tuple(players)}; there are those of 1 "
                f"to {self.order} of the players 0 ... {len(names) - 1} or their names."
            )
            raise ArgumentError(msg)
        return self.values[:, self._at[key]]

    def check_additivity(self, tolerance: float = 1e-4) -> Tensor:
        """The sum of a row's interactions less (full - base): [e] or [e, o].

        Args:
            tolerance: largest difference allowed, as a fraction of the largest value in sight.

        Rows that were not begun before an interruption give NaN, and no error.

        Raises:
            ArgumentError: it is larger; or the index is "SII", which does not sum to it.
        """
        if self.index == "SII":
            msg = (
                "check_additivity: the interactions of index='SII' do not sum to full - base; its "
                "single players' do. Take 'k-SII', 'STII' or 'FSII'."
            )
            raise ArgumentError(msg)
        return additivity(self.values, self.base_values, self.full_values, tolerance)

    def matrix(self) -> Tensor:
        """[e, p, p] or [e, p, p, o]: pairs beside the diagonal, single players on it."""
        p = len(self.players)
        out = self.values.new_zeros(len(self.values), p, p, *self.values.shape[2:])
        for at, T in enumerate(self.sets):
            if len(T) <= 2:
                out[:, T[0], T[-1]] = out[:, T[-1], T[0]] = self.values[:, at]
        return out

    def top(self, k: int = 10, row: int = 0, output: int = 0) -> list[dict[str, Any]]:
        """The k largest interactions of a row, largest first."""
        values, stderr = (
            a[row] if a.dim() == 2 else a[row, :, output] for a in (self.values, self.stderr)
        )
        return [
            {
                "players": tuple(self.players.names[j] for j in self.sets[at]),
                "value": float(values[at]),
                "stderr": float(stderr[at]),
            }
            for at in values.abs().argsort(descending=True)[:k].tolist()
        ]

    @property
    def names(self) -> tuple[str, ...]:
        """The players' names."""
        return self.players.names

    def plot(self, path: str | Path, kind: str = "heat", **options: Any) -> Path:
        """Draw the pairs of a row as a heat map; see `microtome.shapley.plots.heat`.

        Args:
            path: where to write the picture; its ending says the format.
            kind: "heat" (or "auto").
            **options: `row`, `output`, `limit`, `title`.

        Raises:
            PackageError: matplotlib is not installed.
        """
        from microtome.shapley.plots import heat

        _check.one_of("plot", "kind", kind, ("heat", "auto"))
        return heat(self, path, **options)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain Python values, ready for JSON."""
        tensors = ("values", "stderr", "base_values", "full_values")
        plain = ("index", "order", "method", "engine", "evaluations", "exact", "interrupted")
        return {
            "players": list(self.players.names),
            "sets": [list(T) for T in self.sets],
            **{name: getattr(self, name).tolist() for name in tensors},
            **{name: getattr(self, name) for name in (*plain, "note")},
        }

    def __repr__(self) -> str:
        shape = f"{len(self.values)} rows x {len(self.sets)} sets"
        how = "exact" if self.exact else "sampled"
        return f"Interactions({shape}, {self.index}, {how}, {self.evaluations} evaluations)"
