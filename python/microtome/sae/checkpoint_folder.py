"""What checkpoints of one process and of several ranks have in common."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from microtome.errors import CheckpointError
from microtome.sae import files, saelens_layout

STATE, HASHES = "training.json", "sha256.json"
WHOLE = ("b_dec", "m.b_dec", "v.b_dec")  # tensors without a row for each feature


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint folder held, checked against its hashes.

    Attributes:
        step: steps taken.
        saved: the SAE's weights.
        tensors: the optimizer's state and the dead-latent counts.
        described: the rest of the optimizer's state.
    """

    step: int
    saved: saelens_layout.Saved
    tensors: dict[str, Tensor]
    described: Any

    def part(self, features: range) -> Checkpoint:
        """The same of some features."""
        rows = slice(features.start, features.stop)
        W_enc, b_enc, W_dec = (
            t[rows] for t in (self.saved.W_enc, self.saved.b_enc, self.saved.W_dec)
        )
        saved = replace(self.saved, W_enc=W_enc, b_enc=b_enc, W_dec=W_dec)
        tensors = {n: t if n in WHOLE else t[rows] for n, t in self.tensors.items()}
        return replace(self, saved=saved, tensors=tensors)


def check_hash(path: Path, name: str, hashes: dict[str, str]) -> None:
    """Raise CheckpointError unless a file of a checkpoint is the one that was written."""
    if files.sha256(path / name) != hashes.get(name):
        msg = f"checkpoint {path}: {name} is truncated or corrupt (its sha256 differs)."
        raise CheckpointError(msg)


def put_in_place(aside: Path, final: Path) -> None:
    """Give a folder that is whole its name."""
    with files.disk_errors(final):
        if final.exists():  # damaged, or it would have been resumed from
            shutil.rmtree(final)
        aside.rename(final)


def remove_old(folder: Path, keep: int) -> None:
    """Flush the folder's names to the disk, then drop all but the `keep` newest checkpoints."""
    files.sync_folder(folder)
    for old in numbered(folder)[keep:]:
        shutil.rmtree(folder / f"step_{old}", ignore_errors=True)


def remove_halves(folder: Path) -> None:
    """Remove what a run that was killed had begun to write."""
    for left in folder.glob(".step_*.part"):
        shutil.rmtree(left, ignore_errors=True)


def numbered(folder: Path) -> list[int]:
    """Steps of the checkpoints present, newest first."""
    names = (path.name.removeprefix("step_") for path in folder.glob("step_*"))
    return sorted((int(name) for name in names if name.isdecimal()), reverse=True)
