"""Checkpoints of a sharded run: each rank writes its features, any number of ranks reads them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from microtome.errors import CheckpointError, NonFiniteError
from microtome.sae import files, saelens_layout
from microtome.sae.checkpoint_folder import (
    HASHES,
    STATE,
    WHOLE,
    Checkpoint,
    check_hash,
    put_in_place,
    remove_old,
)

if TYPE_CHECKING:
    from microtome.sae.sharded import ShardedSAE

_PARAMETERS = ("W_enc", "b_enc", "W_dec", "b_dec")


def save(
    folder: Path, step: int, sae: ShardedSAE, tensors: dict[str, Tensor], described: Any, keep: int
) -> Path:
    """Write `folder`/step_N, every rank its features; then drop all but the `keep` newest.

        shard_R.safetensors  weights, moments and counts of rank R's features; of b_dec in shard_0
        training.json        step, shape, and which features each shard holds
        sha256.json          hashes of all files

    The first rank names the folder once all have flushed their files to the disk: step_N is whole
    or absent. All ranks must see the same folder.

    Raises:
        CheckpointError: a rank cannot write; the same error on every rank, and earlier checkpoints
            are intact.
        NonFiniteError: the weights hold NaN or infinity; nothing was written.
    """
    ranks = sae.ranks
    final, aside = folder / f"step_{step}", folder / f".step_{step}.shards.part"
    try:
        with ranks.together():
            if ranks.first:
                files.make_folder(folder)
                if aside.exists():
                    shutil.rmtree(aside)
                files.make_folder(aside)
        digest = "00" * 32
        if ranks.in_first_row:  # the others hold the same
            digest = ranks.attempt(lambda: _write_shard(aside, sae, tensors), lambda: digest)
        mine = torch.frombuffer(bytearray.fromhex(digest), dtype=torch.uint8)
        _, (digests,) = ranks.gather(mine.to(ranks.device))
        with ranks.together():
            if ranks.first:
                hashes = {_name(r): bytes(row.tolist()).hex() for r, row in enumerate(digests)}
                _finish(final, aside, step, sae, described, hashes)
    except BaseException:
        if ranks.first:
            shutil.rmtree(aside, ignore_errors=True)
        raise
    with ranks.hold():
        if ranks.first:
            remove_old(folder, keep)
    return final


def _name(rank: int) -> str:
    return f"shard_{rank}.safetensors"


def _write_shard(aside: Path, sae: ShardedSAE, tensors: dict[str, Tensor]) -> str:
    named = dict(zip(_PARAMETERS, sae.parameters_in_order, strict=True))
    for name, tensor in named.items():
        if not bool(torch.isfinite(tensor).all()):
            msg = f"checkpoint: {name} holds NaN or infinity; nothing was written to "
            msg += f"{aside.parent}."
            raise NonFiniteError(msg)
    held = {**named, **tensors}
    if sae.ranks.rank:
        held = {name: tensor for name, tensor in held.items() if name not in WHOLE}
    return files.write_safetensors(aside / _name(sae.ranks.rank), held)


def _finish(
    final: Path, aside: Path, step: int, sae: ShardedSAE, described: Any, hashes: dict[str, str]
) -> None:
    """The two lists, then the name."""
    state = {
        "step": step,
        "optimizer": described,
        "sae": {"k": sae.activation.k, "center": sae.center},
        "shards": sae.counts,
    }
    hashes[STATE] = files.write_json(aside / STATE, state)
    files.write_json(aside / HASHES, hashes)
    put_in_place(aside, final)


def is_sharded(hashes: Any) -> bool:
    """Whether a sha256.json is one of shards."""
    return isinstance(hashes, dict) and _name(0) in hashes


def load(path: Path, hashes: dict[str, str], features: range | None) -> Checkpoint:
    """Read some features of a checkpoint that any number of ranks wrote.

    Args:
        path: step_N.
        hashes: its sha256.json.
        features: which; None for all.

    Raises:
        CheckpointError: a file that is needed is missing, truncated or corrupt.
    """
    check_hash(path, STATE, hashes)
    state = files.read_json(path / STATE)
    counts = state["shards"]
    if set(hashes) != {STATE, *map(_name, range(len(counts)))}:
        msg = f"checkpoint {path}: {HASHES} does not name the {len(counts)} shards of {STATE}."
        raise CheckpointError(msg)
    wanted = range(sum(counts)) if features is None else features
    pieces: dict[str, list[Tensor]] = {}
    start = 0
    for rank, count in enumerate(counts):
        low, high = max(wanted.start, start), min(wanted.stop, start + count)
        if low < high or rank == 0:
            check_hash(path, _name(rank), hashes)
            for name, piece in _read(path / _name(rank), low - start, high - start).items():
                pieces.setdefault(name, []).append(piece)
        start += count
    tensors = {name: torch.cat(found) for name, found in pieces.items()}
    W_enc, b_enc, W_dec, b_dec = (tensors.pop(name) for name in _PARAMETERS)
    about = state["sae"]
    saved = saelens_layout.Saved(W_enc, b_enc, W_dec, b_dec, about["k"], about["center"], {})
    return Checkpoint(state["step"], saved, tensors, state["optimizer"])


def _read(path: Path, low: int, high: int) -> dict[str, Tensor]:
    """Rows low to high of each tensor of a shard, without reading the others."""
    try:
        with safe_open(path, framework="pt") as file:
            return {
                name: file.get_tensor(name)
                if name in WHOLE
                else file.get_slice(name)[low : max(low, high)]
                for name in file.keys()  # noqa: SIM118
            }
    except (SafetensorError, OSError, ValueError) as error:
        msg = f"cannot read {path}: it is not a whole safetensors file ({error})."
        raise CheckpointError(msg) from error
