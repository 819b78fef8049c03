"""Checkpoints of a run: folders, whole or absent, from which training goes on bit for bit."""

from __future__ import annotations

import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from microtome.errors import CheckpointError
from microtome.sae import files, saelens_layout, sharded_checkpoint
from microtome.sae.checkpoint_folder import (
    HASHES,
    STATE,
    Checkpoint,
    check_hash,
    numbered,
    put_in_place,
    remove_halves,
    remove_old,
)
from microtome.sae.sae import SAE
from microtome.sae.sharded import ShardedSAE

_TENSORS = "training.safetensors"


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
        hashes[STATE] = files.write_json(aside / STATE, {"step": step, "optimizer": described})
        files.write_json(aside / HASHES, hashes)
        put_in_place(aside, final)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    remove_old(folder, keep)
    return final


def load(path: Path, features: range | None = None) -> Checkpoint:
    """Read one checkpoint, whether one process wrote it or several ranks.

    Args:
        path: step_N.
        features: the features whose weights and state are wanted; None for all.

    Raises:
        CheckpointError: a file is missing, truncated or corrupt.
    """
    hashes = files.read_json(path / HASHES)
    if sharded_checkpoint.is_sharded(hashes):
        return sharded_checkpoint.load(path, hashes, features)
    names = {saelens_layout.CFG, saelens_layout.WEIGHTS, _TENSORS, STATE}
    if not isinstance(hashes, dict) or set(hashes) != names:
        msg = f"checkpoint {path}: {HASHES} does not name the four files of a checkpoint."
        raise CheckpointError(msg)
    for name in hashes:
        check_hash(path, name, hashes)
    state = files.read_json(path / STATE)
    tensors = files.read_safetensors(path / _TENSORS)
    found = Checkpoint(state["step"], saelens_layout.read(path), tensors, state["optimizer"])
    return found if features is None else found.part(features)


def newest(folder: Path) -> Checkpoint | None:
    """The newest whole checkpoint of a run, or None when there is no checkpoint.

    Half-written folders are removed. A damaged checkpoint is passed over with a warning.

    Raises:
        CheckpointError: there are checkpoints, and all of them are damaged.
    """
    if not folder.is_dir():
        return None
    remove_halves(folder)
    damaged = []
    for step in numbered(folder):
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


def newest_of_ranks(folder: Path, sae: ShardedSAE) -> Checkpoint | None:
    """The newest checkpoint that every rank can read its features from; None without any.

    Raises:
        CheckpointError: there are checkpoints, and all of them are damaged.
    """
    ranks, below, damaged = sae.ranks, None, ""
    if ranks.first:
        remove_halves(folder)
    while True:
        steps = [s for s in numbered(folder) if below is None or s < below]
        proposed = torch.tensor([steps[0] if steps else -1], device=ranks.device)
        heads, _ = ranks.gather(numbers=proposed)
        below = int(heads[0][0])
        if below < 0:
            break
        found, trouble = None, ""
        try:
            found = load(folder / f"step_{below}", sae.features)
        except CheckpointError as error:
            trouble = str(error)
            warnings.warn(f"{trouble} Trying the one before it.", stacklevel=2)
        whole = torch.tensor([found is not None], device=ranks.device)
        heads, _ = ranks.gather(numbers=whole)
        if all(head[0] for head in heads):
            return found
        damaged += trouble and trouble + " "
    with ranks.together():
        if damaged:
            msg = f"no whole checkpoint in {folder}: {damaged}Move the folder away to start again."
            raise CheckpointError(msg)
    return None
