"""What a sweep returns: numbers by cell, and what was really changed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from microtome.errors import ArgumentError, PackageError


@dataclass(frozen=True, eq=False)
class Sweep:
    """Metric by cell. It keeps no model, hook or cache.

    Attributes:
        scores: [*axes], the metric of the patched run, mean over prompts.
        by_prompt: [*axes, b], the same for each prompt.
        axes: names, such as ("layer", "position").
        values: for each axis, what it runs over.
        site: kind, such as "resid_pre".
        metric: its name.
        clean, corrupted: [b], the metric of the unpatched runs; corrupted is empty for an ablation.
        base: "corrupted" if clean activations were written into the corrupted run (denoising),
            "clean" if the other way round (noising) or in an ablation.
        written: [*axes] int64, how many (prompt, position) writes of a cell changed a bit. Where it
            is 0 the patch is the run itself, and the score is the unpatched one.
        engine: what ran: "native", "blocks" or "forwards".
        note: why no faster engine could, or an empty string.

    A large score says that the site, at this place, carries what the metric reads. It does not
    follow that the site is necessary, nor that no other carries the same.
    """

    scores: Tensor
    by_prompt: Tensor
    axes: tuple[str, ...]
    values: tuple[tuple[float, ...], ...]
    site: str
    metric: str
    clean: Tensor
    corrupted: Tensor
    base: str
    written: Tensor
    engine: str
    note: str = ""

    @property
    def unpatched(self) -> Tensor:
        """[b], the metric of the run that was patched."""
        return self.corrupted if self.base == "corrupted" else self.clean

    def effect(self) -> Tensor:
        """[*axes]: score minus the unpatched run's, mean over prompts."""
        return (self.by_prompt - self.unpatched).mean(-1)

    def restored(self) -> Tensor:
        """[*axes]: 0 where a patch leaves the corrupted metric, 1 where it gives the clean one.

        Raises:
            ArgumentError: there is no corrupted run, or both runs have the same metric.
        """
        if self.corrupted.numel() == 0:
            msg = "Sweep.restored: an ablation has no corrupted run. Use .effect()."
            raise ArgumentError(msg)
        apart = self.clean.mean() - self.corrupted.mean()
        if float(apart) == 0.0:
            msg = (
                f"Sweep.restored: clean and corrupted have the same {self.metric}, "
                f"{float(self.clean.mean()):.4g}. Choose prompts that the metric tells apart."
            )
            raise ArgumentError(msg)
        return (self.scores - self.corrupted.mean()) / apart

    def top(self, k: int = 10) -> list[dict[str, Any]]:
        """The k cells with the largest effects: coordinates, score, effect, writes."""
        effect = self.effect()
        order = effect.abs().flatten().argsort(descending=True)[:k]
        out = []
        for i in order.tolist():
            at = torch.unravel_index(torch.tensor(i), effect.shape)
            place = {a: v[int(j)] for a, v, j in zip(self.axes, self.values, at, strict=True)}
            numbers = {"score": self.scores[at], "effect": effect[at], "written": self.written[at]}
            out.append({**place, **{name: value.item() for name, value in numbers.items()}})
        return out

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain Python values, ready for JSON."""
        tensors = ("scores", "by_prompt", "clean", "corrupted", "written")
        plain = ("site", "metric", "base", "engine", "note")
        return {
            "axes": list(self.axes),
            "values": [list(v) for v in self.values],
            **{name: getattr(self, name).tolist() for name in tensors},
            **{name: getattr(self, name) for name in plain},
        }

    def plot(self, path: str | Path, *, tokens: Sequence[str] | None = None) -> Path:
        """Draw a heat map: layers down, the second axis across; more axes are averaged.

        Args:
            path: where to write the picture; its ending says the format.
            tokens: the prompt's tokens, to label positions.

        Raises:
            ArgumentError: there are fewer tokens than positions.
            PackageError: matplotlib is not installed.
        """
        by_position = self.axes[1:2] == ("position",)
        if tokens is not None and by_position and len(tokens) <= max(self.values[1]):
            msg = (
                f"Sweep.plot: tokens has {len(tokens)} entries, but position {max(self.values[1])} "
                "is drawn. Pass all tokens of the prompt."
            )
            raise ArgumentError(msg)
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            msg = "Sweep.plot: matplotlib is not installed. Install microtome[plot]."
            raise PackageError(msg) from error
        effect = self.effect()
        grid = effect.flatten(2).mean(-1) if effect.dim() > 2 else effect
        grid = grid[:, None] if grid.dim() == 1 else grid
        rows, columns = grid.shape
        figure = Figure(figsize=(min(16, 2.5 + 0.32 * columns), min(12, 1.6 + 0.28 * rows)))
        axes = figure.add_subplot()
        limit = float(grid.abs().max()) or 1.0
        image = axes.imshow(
            grid.cpu().numpy(), cmap="RdBu", vmin=-limit, vmax=limit, aspect="auto", origin="lower"
        )
        axes.set_ylabel(self.axes[0])
        axes.set_yticks(range(rows), [str(v) for v in self.values[0]])
        if len(self.axes) > 1:
            axes.set_xlabel(self.axes[1])
            labels = [str(v) for v in self.values[1]]
            if tokens is not None and by_position:
                labels = [f"{tokens[int(v)]} {v}" for v in self.values[1]]
            step = max(1, columns // 48)
            axes.set_xticks(
                range(0, columns, step), labels[::step], rotation=90, fontsize=7, parse_math=False
            )
        else:
            axes.set_xticks([])
        verb = "clean into corrupted" if self.base == "corrupted" else "corrupted into clean"
        verb = verb if self.corrupted.numel() else "ablated"
        axes.set_title(f"{self.site}, {verb}: change of {self.metric}", fontsize=9)
        figure.colorbar(image, ax=axes, fraction=0.05)
        figure.tight_layout()
        figure.savefig(path, dpi=140)
        return Path(path)

    def __repr__(self) -> str:
        shape = " x ".join(f"{len(v)} {a}s" for a, v in zip(self.axes, self.values, strict=True))
        return f"Sweep({self.site}: {shape}, {self.metric}, engine {self.engine})"
