"""Choosing what runs a sweep: the fastest engine that gives the model's own output."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

from microtome import _check
from microtome.errors import ArgumentError
from microtome.models.native.runner import runner_of
from microtome.patching.execute import Engine
from microtome.patching.hooked import HookEngine
from microtome.patching.native import NativeEngine
from microtome.patching.prompts import spans

ENGINES = ("auto", "native", "blocks", "forwards")
PRECISIONS = ("fp32", "delta-bf16")


def engine_for(
    op: str,
    model: nn.Module,
    base: Tensor,
    source: Tensor,
    mask: Tensor | None,
    precision: str,
    memory: int,
    engine: str,
    site: str,
) -> Engine:
    """An engine ready to patch `base` with activations of `source`.

    Args:
        op: name for messages.
        model: the model.
        base: [b, t] int64.
        source: [s, t] int64, s = 0 for none.
        mask: [b, t] or None, of both.
        precision: "fp32" or "delta-bf16".
        memory: bytes.
        engine: one of ENGINES.
        site: the kind of site, for messages.

    Raises:
        ArgumentError: an option is none of the above, or the demanded engine cannot run.
    """
    _check.one_of(op, "engine", engine, ENGINES)
    _check.one_of(op, "precision", precision, PRECISIONS)
    _check.between(op, "memory", memory, 1 << 20, 1 << 50)
    first, stop = spans(op, base, mask)
    sources = (
        first if mask is not None and len(source) == len(base) else torch.zeros(len(source)).long()
    )
    delta = precision == "delta-bf16"
    if engine in ("auto", "native"):
        runner = runner_of(model, base, first.int())
        if not isinstance(runner, str):
            return NativeEngine(
                model, runner, base, source, (first, sources), stop, delta=delta, memory=memory
            )
        if engine == "native":
            msg = f"{op}: engine 'native' cannot run this model: {runner}. Use engine='auto'."
            raise ArgumentError(msg)
        why = runner
    else:
        why = f"engine {engine!r} was asked for"
    if delta:
        msg = f"{op}: precision 'delta-bf16' needs the native engine, but {why}. Use 'fp32'."
        raise ArgumentError(msg)
    found = HookEngine(
        op, model, base, source, (first, stop), mask, memory=memory, skip=engine != "forwards"
    )
    found.note = why if not found.note else f"{why}; {found.note}"
    if engine == "auto":
        how = "block by block" if found.name == "blocks" else "by full forwards"
        warnings.warn(f"{op}: {site} patches run {how}, since {found.note}.", stacklevel=4)
    return found
