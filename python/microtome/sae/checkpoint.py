"""Checkpoints of a run: folders, whole or absent, from which training goes on bit for bit."""

from __future__ import annotations

import os
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from microtome.errors import CheckpointError
from microtome.sae import files, saelens_layout
from microtome.sae.sae import SAE

_TENSORS, _STATE, _HASHES = "training.safetensors", "training.json", "sha256.json"


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


def save(
    folder: Path, step: int, sae: SAE, tensors: dict[str, Tensor], described: Any, keep: int
) -> Path:
    """Write `folder`/step_N, then drop all but the `keep` newest.

    The files go to a temporary folder; they and the folder are flushed to the disk before it gets
    its name, so a folder called step_N is whole even after a power cut. It is also an SAE folder in
    the SAELens layout.

    Raises:
        CheckpointError: it cannot be written (a full disk, say); earlier checkpoints are intact.
    """
    files.make_folder(folder)
    final, aside = folder / f"step_{step}", folder / f".step_{step}.{os.getpid()}.part"
    try:
        files.make_folder(aside)
        metadata = {"step": step}
        k, center = sae.activation.k, sae.center
        hashes = saelens_layout.write(aside, sae.parameters_in_order, k, center, metadata)
        hashes[_TENSORS] = files.write_safetensors(aside / _TENSORS, tensors)
        hashes[_STATE] = files.write_json(aside / _STATE, {"step": step, "optimizer": described})
        files.write_json(aside / _HASHES, hashes)
        with files.disk_errors(final):
            if final.exists():  # damaged, or it would have been resumed from
                shutil.rmtree(final)
            aside.rename(final)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    files.sync_folder(folder)
    for old in _numbered(folder)[keep:]:
        shutil.rmtree(folder / f"step_{old}", ignore_errors=True)
    return final


def load(path: Path) -> Checkpoint:
    """Read one checkpoint.

    Raises:
        CheckpointError: a file is missing, truncated or corrupt.
    """
    hashes = files.read_json(path / _HASHES)
    names = {saelens_layout.CFG, saelens_layout.WEIGHTS, _TENSORS, _STATE}
    if not isinstance(hashes, dict) or set(hashes) != names:
        msg = f"checkpoint {path}: {_HASHES} does not name the four files of a checkpoint."
        raise CheckpointError(msg)
    for name, digest in hashes.items():
        if files.sha256(path / name) != digest:
            msg = f"checkpoint {path}: {name} is truncated or corrupt (its sha256 differs)."
            raise CheckpointError(msg)
    state = files.read_json(path / _STATE)
    tensors = files.read_safetensors(path / _TENSORS)
    return Checkpoint(state["step"], saelens_layout.read(path), tensors, state["optimizer"])


def newest(folder: Path) -> Checkpoint | None:
    """The newest whole checkpoint of a run, or None when there is no checkpoint.

    Half-written folders are removed. A damaged checkpoint is passed over with a warning.

    Raises:
        CheckpointError: there are checkpoints, and all of them are damaged.
    """
    if not folder.is_dir():
        return None
    for left in folder.glob(".step_*.part"):
        shutil.rmtree(left, ignore_errors=True)
    damaged = []
    for step in _numbered(folder):
        try:
            return load(folder / f"step_{step}")
        except CheckpointError as error:
            damaged.append(str(error))
            warnings.warn(f"{error} Trying the one before it.", stacklevel=2)
    if damaged:
        msg = f"no whole checkpoint in {folder}: {' '.join(damaged)} Move the folder away to "
        msg += "start again."
        raise CheckpointError(msg)
    return None


def _numbered(folder: Path) -> list[int]:
    """Steps of the checkpoints present, newest first."""
    names = (path.name.removeprefix("step_") for path in folder.glob("step_*"))
    return sorted((int(name) for name in names if name.isdecimal()), reverse=True)
