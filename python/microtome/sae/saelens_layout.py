"""SAELens's folder for one SAE: cfg.json and sae_weights.safetensors, oriented as it does."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from microtome.errors import CheckpointError, NonFiniteError
from microtome.sae import files

CFG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
# SAELens takes a cfg without a version for one of before 6.0, and drops its metadata.
_LAYOUT_VERSION = "6.0.0"
_NAMES = ("W_enc", "b_enc", "W_dec", "b_dec")


@dataclass(frozen=True)
class Saved:
    """What a folder held, feature-major."""

    W_enc: Tensor  # [f, d]
    b_enc: Tensor  # [f]
    W_dec: Tensor  # [f, d]
    b_dec: Tensor  # [d]
    k: int
    center: bool
    metadata: dict[str, Any]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """W_enc, b_enc, W_dec, b_dec."""
        return self.W_enc, self.b_enc, self.W_dec, self.b_dec


def write(
    path: Path, parameters: tuple[Tensor, ...], k: int, center: bool, metadata: dict[str, Any]
) -> dict[str, str]:
    """Write the two files, each replaced in one motion, and return their sha256 by name."""
    tensors = {n: p.detach() for n, p in zip(_NAMES, parameters, strict=True)}
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            msg = f"save_pretrained: {name} holds NaN or infinity; nothing was written to {path}."
            raise NonFiniteError(msg)
    f, d = tensors["W_enc"].shape
    stored = {**tensors, "W_enc": tensors["W_enc"].t().contiguous()}  # [d, f], as SAELens has it
    cfg = {
        "architecture": "topk",
        "k": k,
        "rescale_acts_by_decoder_norm": False,
        "d_in": d,
        "d_sae": f,
        "dtype": str(tensors["W_enc"].dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": center,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {"sae_lens_version": _LAYOUT_VERSION, **metadata},
    }
    try:
        json.dumps(cfg)
    except (TypeError, ValueError) as error:
        msg = f"save_pretrained: metadata must be JSON values: {error}."
        raise CheckpointError(msg) from None
    files.make_folder(path)
    weights = files.write_safetensors(path / WEIGHTS, stored)
    # SAELens ignores keys it does not know; this one shows a new cfg beside old weights at load.
    return {
        WEIGHTS: weights,
        CFG: files.write_json(path / CFG, {**cfg, "weights_sha256": weights}),
    }


def read(path: Path) -> Saved:
    """Read and check the two files."""
    if not path.is_dir():
        msg = f"from_pretrained: no folder {path}; it must hold {CFG} and {WEIGHTS}."
        raise CheckpointError(msg)
    cfg = files.read_json(path / CFG)
    _check_cfg(path / CFG, cfg)
    digest = cfg.get("weights_sha256")
    if digest is not None and files.sha256(path / WEIGHTS) != digest:
        msg = f"from_pretrained: {path / WEIGHTS} is not the file that {CFG} was written with "
        msg += "(sha256 differs): it is truncated, corrupt or of another save."
        raise CheckpointError(msg)
    stored = files.read_safetensors(path / WEIGHTS)
    tensors = _check_tensors(path / WEIGHTS, stored, cfg["d_in"], cfg["d_sae"])
    W_enc, b_enc, W_dec, b_dec = tensors
    if cfg.get("rescale_acts_by_decoder_norm", False):
        norms = W_dec.norm(dim=1)
        if not bool((norms > 0).all()):
            msg = f"from_pretrained: {path / WEIGHTS} has a decoder row of length 0, which cannot "
            msg += "be rescaled."
            raise CheckpointError(msg)
        W_enc, b_enc, W_dec = W_enc * norms[:, None], b_enc * norms, W_dec / norms[:, None]
    center = bool(cfg.get("apply_b_dec_to_input", True))
    return Saved(W_enc, b_enc, W_dec, b_dec, cfg["k"], center, cfg.get("metadata") or {})


def _check_cfg(path: Path, cfg: Any) -> None:
    if not isinstance(cfg, dict):
        msg = f"from_pretrained: {path} must hold a JSON object, holds {type(cfg).__name__}."
        raise CheckpointError(msg)
    architecture = cfg.get("architecture")
    if architecture != "topk":
        msg = f"from_pretrained: {path} has architecture {architecture!r}; only 'topk' can be read."
        raise CheckpointError(msg)
    for name in ("d_in", "d_sae", "k"):
        value = cfg.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            msg = f"from_pretrained: {path} must have {name} as a whole number above 0, got "
            msg += f"{value!r}."
            raise CheckpointError(msg)
    if cfg["k"] > cfg["d_sae"]:
        msg = f"from_pretrained: {path} has k={cfg['k']} above d_sae={cfg['d_sae']}."
        raise CheckpointError(msg)
    for name in ("apply_b_dec_to_input", "rescale_acts_by_decoder_norm"):
        if not isinstance(cfg.get(name, False), bool):
            msg = f"from_pretrained: {path} must have {name} as true or false, got {cfg[name]!r}."
            raise CheckpointError(msg)
    for name in ("normalize_activations", "reshape_activations"):
        if cfg.get(name, "none") not in ("none", None):
            msg = f"from_pretrained: {path} has {name}={cfg[name]!r}; only 'none' can be read. "
            msg += "Fold it into the weights with sae-lens first."
            raise CheckpointError(msg)


def _check_tensors(path: Path, stored: dict[str, Tensor], d: int, f: int) -> tuple[Tensor, ...]:
    shapes = {"W_enc": (d, f), "b_enc": (f,), "W_dec": (f, d), "b_dec": (d,)}
    if set(stored) != set(shapes):
        msg = f"from_pretrained: {path} must hold {', '.join(_NAMES)}, holds "
        msg += f"{', '.join(sorted(stored))}."
        raise CheckpointError(msg)
    for name, shape in shapes.items():
        tensor = stored[name]
        if tuple(tensor.shape) != shape or not tensor.is_floating_point():
            msg = (
                f"from_pretrained: {name} in {path} must be {list(shape)} of floats as {CFG} says, "
            )
            msg += f"is {list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}."
            raise CheckpointError(msg)
        if not bool(torch.isfinite(tensor).all()):
            msg = f"from_pretrained: {name} in {path} holds NaN or infinity."
            raise CheckpointError(msg)
    wide = {name: tensor.float() for name, tensor in stored.items()}
    return wide["W_enc"].t().contiguous(), wide["b_enc"], wide["W_dec"], wide["b_dec"]
