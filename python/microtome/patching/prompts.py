"""The two sets of prompts of a sweep, checked."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from microtome import _check
from microtome.errors import ArgumentError, DtypeError, ShapeError
from microtome.models.capture import check_tokens


def pair(
    op: str, model: nn.Module, clean: Tensor, corrupted: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Clean and corrupted prompts as [b, t], checked to correspond position by position.

    Raises:
        ShapeError: they differ in length or number.
        ArgumentError: they are no prompts of the model.
        DtypeError: a model, prompts or mask of another type.
    """
    clean, corrupted = one(op, model, clean, mask), one(op, model, corrupted, mask)
    if clean.shape[1] != corrupted.shape[1]:
        msg = (
            f"{op}: clean has {clean.shape[1]} tokens and corrupted {corrupted.shape[1]}, but a "
            "position is patched by the same position. Make the prompts equally long, or pad both "
            "on the same side and pass attention_mask."
        )
        raise ShapeError(msg)
    if clean.shape[0] != corrupted.shape[0]:
        msg = (
            f"{op}: {clean.shape[0]} clean and {corrupted.shape[0]} corrupted prompts. Pass one "
            "corrupted prompt for each clean one."
        )
        raise ShapeError(msg)
    return clean, corrupted


def one(op: str, model: nn.Module, tokens: Tensor, mask: Tensor | None) -> Tensor:
    """Prompts as [b, t]; a single one may come as [t]."""
    if not isinstance(model, nn.Module):
        inner = (
            " Its .model is one." if isinstance(getattr(model, "model", None), nn.Module) else ""
        )
        msg = f"{op}: model must be a torch.nn.Module, got {type(model).__name__}.{inner}"
        raise DtypeError(msg)
    if mask is not None and not isinstance(mask, Tensor):
        msg = f"{op}: attention_mask must be a tensor [b, t], got {type(mask).__name__}."
        raise DtypeError(msg)
    if isinstance(tokens, Tensor) and tokens.dim() == 1:
        tokens = tokens[None]
    check_tokens(op, model, tokens, mask, 1)
    _check.shapes(op, tokens=(tokens, "b t"), attention_mask=(mask, "b t"))
    return tokens


def spans(op: str, tokens: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """First position that counts and one past the last, each [b] int64.

    Raises:
        ArgumentError: a mask has a hole, or leaves nothing.
    """
    b, t = tokens.shape
    if mask is None:
        return torch.zeros(b, dtype=torch.int64), torch.full((b,), t)
    kept = mask.bool().cpu()
    first = kept.int().argmax(1)
    stop = t - kept.flip(1).int().argmax(1)
    holes = (kept.sum(1) != stop - first) | ~kept.any(1)
    if bool(holes.any()):
        msg = (
            f"{op}: attention_mask of prompt {int(holes.nonzero()[0])} must be one run of ones, "
            "with padding before or after it."
        )
        raise ArgumentError(msg)
    return first, stop
