"""Choosing what runs a sweep: the fastest engine that gives the model's own output."""

from __future__ import annotations

import warnings
from typing import TypeVar

import torch
from torch import Tensor, nn

from microtome import _check
from microtome.errors import ArgumentError, SiteError
from microtome.models.capture import takes_mask
from microtome.models.native.runner import Runner, runner_of
from microtome.patching.execute import Engine
from microtome.patching.hooked import HookEngine
from microtome.patching.native import NativeEngine
from microtome.patching.parted import PartedEngine
from microtome.patching.prompts import spans

ENGINES = ("auto", "native", "blocks", "forwards")
PRECISIONS = ("fp32", "delta-bf16")
MEMORY = 1 << 30  # bytes, unless a caller says otherwise
AnyEngine = TypeVar("AnyEngine", bound=Engine)


def engine_for(
    op: str,
    model: nn.Module,
    base: Tensor,
    source: Tensor,
    mask: Tensor | None,
    *,
    paired: bool,
    precision: str,
    memory: int,
    engine: str,
    site: str,
    advice: str = "Use engine='auto'.",
    whole: bool = False,
) -> Engine:
    """An engine ready to patch `base` with activations of `source`.

    Args:
        op: name for messages.
        model: the model.
        base: [b, t] int64.
        source: [s, t] int64, s = 0 for none.
        mask: [b, t] or None, of `base`, and of `source` where `paired`.
        paired: `source` has a prompt for each of `base`, padded alike.
        precision: "fp32" or "delta-bf16".
        memory: bytes.
        engine: one of ENGINES.
        site: the kind of site that is patched, or "" for several kinds, checked by the caller.
        advice: what to do where the native engine is demanded and cannot run.
        whole: the caller reads the native engine's run, which then holds all prompts at once.

    Raises:
        ArgumentError: an option is none of the above, the demanded engine cannot run, or there is
            padding and the model takes no mask.
        SiteError: the model has no such site, or no blocks.
    """
    model = getattr(model, "_orig_mod", model)  # a compiled model keeps the plain one
    _check.one_of(op, "engine", engine, ENGINES)
    _check.one_of(op, "precision", precision, PRECISIONS)
    _check.between(op, "memory", memory, 1 << 20, 1 << 50)
    first, stop = spans(op, base, mask)
    if mask is not None and bool(mask.all()):
        mask = None
    hides = mask is None or takes_mask(model)
    if not hides and bool((first > 0).any()):  # padding after a prompt is hidden by causality
        raise ArgumentError(no_mask(op, model))
    sources = first if paired else torch.zeros(len(source)).long()
    delta = precision == "delta-bf16"
    why = f"engine {engine!r} was asked for"
    if engine in ("auto", "native"):
        both = torch.cat((base, source.to(base.device)))
        runner = runner_of(model, both, first.int())
        if not isinstance(runner, str):
            prompts = base, source, (first, sources), stop
            fast = (
                NativeEngine if whole else fitting(runner, len(both) * both.shape[1], delta, memory)
            )
            return _with_site(op, site, fast(model, runner, *prompts, delta=delta, memory=memory))
        why = runner
        if engine == "native":
            msg = f"{op}: engine 'native' cannot run this model: {why}. {advice}"
            raise ArgumentError(msg)
    if delta:
        msg = f"{op}: precision 'delta-bf16' needs the native engine, but {why}. Use 'fp32'."
        raise ArgumentError(msg)
    if not hides:
        raise ArgumentError(no_mask(op, model))
    found = HookEngine(
        op,
        model,
        base,
        source,
        (first, stop),
        mask,
        paired=paired,
        memory=memory,
        skip=engine != "forwards",
    )
    found = _with_site(op, site, found)
    found.note = why if not found.note else f"{why}; {found.note}"
    if engine == "auto":
        how = "block by block" if found.name == "blocks" else "by full forwards"
        what = f"{site} patches" if site else "patches"
        warnings.warn(f"{op}: {what} run {how}, since {found.note}.", stacklevel=3)
    return found


def fitting(
    runner: Runner, tokens: int, delta: bool, memory: int
) -> type[NativeEngine | PartedEngine]:
    """The native engine for so many tokens, base and source: runs in parts if they are too many."""
    wanted = tokens * runner.bytes_a_token(differences=delta)
    return PartedEngine if wanted > memory - memory // 8 else NativeEngine


def _with_site(op: str, site: str, engine: AnyEngine) -> AnyEngine:
    """The engine, if its model has the site."""
    if site and (why := engine.lacks(site)):
        msg = f"{op}: {why}. Choose another site."
        raise SiteError(msg)
    return engine


def no_mask(op: str, model: nn.Module) -> str:
    """What to say of a model that cannot leave padding out."""
    return (
        f"{op}: {type(model).__name__}.forward takes no attention_mask, so it cannot leave padding "
        "out. Pass prompts of one length without padding."
    )
