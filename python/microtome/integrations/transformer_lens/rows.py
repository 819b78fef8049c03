"""Row-batched full forwards: many patched runs as rows of one batch, for any setter and metric."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from microtome.errors import DtypeError, ShapeError
from microtome.integrations.transformer_lens.request import PatchRequest
from microtome.models.capture import batch_slices

# One forward holds at most so many tokens and so many bytes of float32 logits.
_TOKENS = 2048
_LOGITS = 1 << 28

_said = False


def say_once(reason: str) -> None:
    """Warn, once in a process, that sweeps run as row-batched full forwards."""
    global _said
    if not _said:
        _said = True
        msg = (
            f"{reason}: this sweep runs as full forwards with many cells as rows of a batch, which "
            "gives the same numbers more slowly. Said once."
        )
        level, frame = 1, sys._getframe()
        while frame.f_back and frame.f_globals.get("__name__", "").startswith("microtome."):
            level, frame = level + 1, frame.f_back
        warnings.warn(msg, UserWarning, stacklevel=level)  # at the line of the user's call


def run_rows(
    request: PatchRequest, *, cells_per_forward: int | None = None, progress: bool = False
) -> Tensor:
    """Run one patched run for each cell, many of them in each forward.

    Row r * b + i of a batch is prompt i under the patch of the batch's cell r. The setter is called
    on each cell's rows alone, [b, ...], and the metric on each cell's logits, [b, t, v], so that
    both see what they would see if the cell ran by itself. Cells of different layers share a
    forward.

    Args:
        request: the sweep.
        cells_per_forward: how many cells share a forward; None picks it from the size of the input.
        progress: show a progress bar, counted in cells.

    Returns:
        [cells, m], or [cells, m, b] if `request.metrics.per_example`.

    Raises:
        ShapeError, DtypeError: the setter returned something else than the activation.
    """
    op, model, tokens, metrics = request.op, request.model, request.tokens, request.metrics
    b, t = tokens.shape
    if cells_per_forward is None:
        by_tokens = _TOKENS // (b * t)
        by_logits = _LOGITS // (4 * b * t * int(model.cfg.d_vocab))
        cells_per_forward = max(1, min(by_tokens, by_logits))
    values: list[Tensor] = []
    with torch.no_grad():
        for part in batch_slices(len(request.cells), cells_per_forward, op if progress else None):
            cells = request.cells[part]
            rows = {"attention_mask": request.attention_mask}
            rows = {k: v.repeat(len(cells), 1) for k, v in rows.items() if v is not None}
            patches = _patches(request, cells)
            logits = model.run_with_hooks(tokens.repeat(len(cells), 1), fwd_hooks=patches, **rows)
            for r, cell in enumerate(cells):
                values.append(metrics(logits[r * b : (r + 1) * b], f"index {list(cell)}"))
    if values:
        return torch.stack(values)
    each = (len(metrics.by_name), b) if metrics.per_example else (len(metrics.by_name),)
    return torch.zeros(0, *each, device=model.cfg.device)


def _patches(
    request: PatchRequest, cells: Sequence[tuple[int, ...]]
) -> list[tuple[str, Callable[..., Tensor]]]:
    """For each hook that a batch's cells lie at, a function that patches their rows."""
    at: dict[str, list[tuple[int, tuple[int, ...]]]] = {}
    for r, cell in enumerate(cells):
        at.setdefault(request.hooks[cell[0]], []).append((r, cell))
    return [(name, partial(_patch, request, here, name)) for name, here in at.items()]


def _patch(
    request: PatchRequest,
    cells: Sequence[tuple[int, tuple[int, ...]]],
    name: str,
    activation: Tensor,
    hook: Any,
) -> Tensor:
    """Patch the rows of the cells at one hook; a cell comes with its place in the batch."""
    del hook  # a TransformerLens bridge may give it another name than the one asked for
    op, b = request.op, request.tokens.shape[0]
    # A copy, for setters write in place and what they are given may be part of a larger tensor.
    patched = activation.clone()
    for r, cell in cells:
        rows = patched[r * b : (r + 1) * b]
        new = request.setter(rows, list(cell), request.clean[name])
        if new is None or new is rows:
            continue
        if not isinstance(new, Tensor):
            msg = f"{op}: patch_setter must return the activation, got {type(new).__name__}."
            raise DtypeError(msg)
        if new.shape != rows.shape:
            msg = (
                f"{op}: patch_setter must return shape {list(rows.shape)} at {name!r}, got "
                f"{list(new.shape)}."
            )
            raise ShapeError(msg)
        rows.copy_(new)
    return patched


@contextmanager
def eval_mode(model: Any) -> Iterator[None]:
    """Put a model in eval mode while the context is open; each module's mode is restored."""
    module: nn.Module = model if isinstance(model, nn.Module) else getattr(model, "model", model)
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True
