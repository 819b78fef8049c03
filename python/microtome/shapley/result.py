"""What an estimator returns: a number for every player, its error, and how it was had."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from microtome.errors import ArgumentError
from microtome.shapley.players import Players


@dataclass(frozen=True, eq=False)
class ShapleyValues:
    """Shapley values of e rows. It keeps no model and no background.

    Attributes:
        values: [e, p], or [e, p, o] for a function with several outputs; float64, in units of f.
        stderr: like values: standard errors. Zero where the answer is exact; NaN where one sample
            tells nothing of its spread.
        base_values: [e] or [e, o], the value without any player.
        full_values: [e] or [e, o], the value with all of them: the model's own output.
        players: names, and what a plot shows beside them.
        method: "permutation", "kernel", "exact", "linear", ...
        engine: what computed the values of coalitions.
        evaluations: model rows computed in all.
        exact: whether there is no sampling error.
        interrupted: whether the user, or the clock, ended the sampling early.
        note: what else to know, or an empty string.

    A player's value is its average effect on f over all ways to add it; it does not follow that
    changing that feature in the world changes the outcome, nor that the model uses it alone.
    """

    values: Tensor
    stderr: Tensor
    base_values: Tensor
    full_values: Tensor
    players: Players
    method: str
    engine: str
    evaluations: int
    exact: bool = False
    interrupted: bool = False
    note: str = ""

    @property
    def names(self) -> tuple[str, ...]:
        return self.players.names

    def check_additivity(self, tolerance: float = 1e-4) -> Tensor:
        """The sum of a row's values less (full - base): [e] or [e, o].

        Args:
            tolerance: largest difference allowed, as a fraction of the largest value in sight.

        Rows that were not begun before an interruption give NaN, and no error.

        Raises:
            ArgumentError: it is larger; the message names the row.
        """
        return additivity(self.values, self.base_values, self.full_values, tolerance)

    def top(self, k: int = 10, row: int = 0, output: int = 0) -> list[dict[str, Any]]:
        """The k players of a row with the largest values, largest first."""
        both = (self.values, self.stderr)
        values, stderr = (a[row] if a.dim() == 2 else a[row, :, output] for a in both)
        order = values.abs().argsort(descending=True)[:k].tolist()
        return [
            {"player": self.names[j], "value": float(values[j]), "stderr": float(stderr[j])}
            for j in order
        ]

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain Python values, ready for JSON."""
        tensors = ("values", "stderr", "base_values", "full_values")
        plain = ("method", "engine", "evaluations", "exact", "interrupted", "note")
        return {
            "players": list(self.names),
            **{name: getattr(self, name).tolist() for name in tensors},
            **{name: getattr(self, name) for name in plain},
        }

    def plot(self, path: str | Path, kind: str = "auto", **options: Any) -> Path:
        """Draw the values; see `microtome.shapley.plots` for the kinds and their options.

        Args:
            path: where to write the picture; its ending says the format.
            kind: "bar", "beeswarm", "waterfall", "text", "image", "series" or "auto": what suits
                the players.
            **options: as the kind's function takes: `row`, `output`, `limit`, ...
        """
        from microtome.shapley.plots import draw

        return draw(self, path, kind, **options)

    def __repr__(self) -> str:
        error = "exact" if self.exact else f"RMS stderr {_rms(self.stderr):.3g}"
        shape = f"{self.values.shape[0]} rows x {self.values.shape[1]} players"
        return f"ShapleyValues({shape}, {self.method}, {error}, {self.evaluations} evaluations)"


def additivity(values: Tensor, base: Tensor, full: Tensor, tolerance: float) -> Tensor:
    """What values [e, p, ...] miss of full - base; see ShapleyValues.check_additivity."""
    apart = values.sum(1) - (full - base)
    if apart.numel() == 0:
        return apart
    scale = torch.stack([a.abs().nan_to_num(0.0).max() for a in (full, base, values)]).max()
    worst = apart.abs().nan_to_num(0.0).reshape(len(apart), -1).amax(1)  # NaN: not begun
    if bool((worst > tolerance * scale).any()):
        row = int(worst.argmax())
        msg = (
            f"check_additivity: the values of row {row} miss full - base by "
            f"{float(worst[row]):.3g}, more than {tolerance:g} of {float(scale):.3g}."
        )
        raise ArgumentError(msg)
    return apart


def _rms(a: Tensor) -> float:
    return float(a.square().mean().sqrt())


def finish(
    game: Any,
    values: Tensor,
    stderr: Tensor | None,
    method: str,
    *,
    exact: bool = False,
    interrupted: bool = False,
    note: str = "",
    engine: str = "",
    link: Any = None,
) -> ShapleyValues:
    """The result of a game: values and stderr [e, p, o] (None: zero), ends from the game.

    `link` maps [.., o] values of v to the scale that is explained, if not the identity.
    """
    empty, full = game.ends()
    base = empty.mean(1).expand(game.explicands, -1)
    if link is not None:
        base, full = link(base), link(full)
    stderr = torch.zeros_like(values) if stderr is None else stderr
    if game.scalar:
        values, stderr, base, full = values[..., 0], stderr[..., 0], base[..., 0], full[..., 0]
    return ShapleyValues(
        values, stderr, base.clone(), full.clone(), game.players, method, engine or game.engine,
        game.evaluations, exact, interrupted, note,
    )  # fmt: skip
