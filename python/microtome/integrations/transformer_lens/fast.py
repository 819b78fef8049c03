"""The one door to the fast path: a stock sweep as a plan for the native engine."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from microtome.errors import NonFiniteError
from microtome.integrations.transformer_lens import names
from microtome.integrations.transformer_lens.hooked import HookedModel
from microtome.integrations.transformer_lens.request import PatchRequest
from microtome.integrations.transformer_lens.rows import say_once
from microtome.models.capture import batch_slices
from microtome.models.native.plan import STAGES, Plan, Writes
from microtome.models.native.runner import runner_of
from microtome.ops import REPLACE
from microtome.patching.cells import HEADED
from microtome.patching.engine import MEMORY, fitting
from microtome.patching.execute import TOKENS, predictions, recorded
from microtome.patching.hooked import packed
from microtome.patching.native import KnownModel
from microtome.patching.prompts import spans
from microtome.patching.traced import BeyondError, Logits, Reads


def try_fast(request: PatchRequest, *, progress: bool = False) -> Tensor | None:
    """Run a sweep without a full forward for each cell.

    Args:
        request: the sweep; its setter is a stock one.
        progress: show a progress bar, counted in cells.

    Returns:
        [cells, m], or [cells, m, b] if `request.metrics.per_example`, with the numbers of
        `rows.run_rows`; or None if this sweep must go that way, which the user is told through
        `rows.say_once`.
    """
    kinds = {names.kind_of(hook) for hook in request.hooks.values()}
    if not kinds:
        return None
    why = _why_not(request, kinds)
    if why:
        say_once(f"{request.op}: {why}")
        return None
    kind = kinds.pop()
    model = request.model.model if isinstance(request.model, HookedModel) else request.model
    first, stop = spans(request.op, request.tokens, request.attention_mask)
    with torch.no_grad():
        runner = runner_of(model, request.tokens, first.int())
        if isinstance(runner, str):
            say_once(f"{request.op}: {runner}")
            return None
        none = request.tokens[:0], torch.zeros(0, dtype=torch.int64)
        engine = fitting(runner, request.tokens.numel(), False, MEMORY)(
            model,
            runner,
            request.tokens,
            none[0],
            (first, none[1]),
            stop,
            delta=False,
            memory=MEMORY,
        )
        if why := engine.lacks(kind) or _unlike(request, kind, engine):
            say_once(f"{request.op}: {why}")
            return None
        plan = _plan(request, kind, engine)
        plan = plan.without_unchanged(_own(request, kind, engine), engine.shape.t)
        try:
            try:
                metrics = lambda logits: request.metrics(logits, "the unpatched run")  # noqa: E731
                reads = recorded(engine, metrics, engine.final)
                return _scores(request, engine, plan, reads, progress)
            except BeyondError:
                return _scores(request, engine, plan, None, progress)
        except NonFiniteError:  # forwards have logits at padding, and say which cell it was
            if request.attention_mask is not None:
                say_once(f"{request.op}: a metric is NaN without the logits at padding")
            return None


def _why_not(request: PatchRequest, kinds: set[str | None]) -> str:
    """Why a sweep must run as forwards, or an empty string."""
    model: Any = request.model
    if len(kinds) != 1 or None in kinds:
        return f"activation {request.activation!r} is none that the fast path patches"
    stock, layout = request.stock, {"pos": 1}
    if kinds <= {*HEADED}:
        layout = {"pos": 1, "head": 2}
    if kinds == {"pattern"}:
        layout = {"head": 1, "dest_pos": 2, "src_pos": 3}
    if stock is not None and not set(stock.axes) <= set(layout.items()):
        return f"{stock.name} is made for other axes than those of {request.activation!r}"
    if isinstance(model, HookedModel):
        return "the model carries hooks of its own" if model.carries_hooks() else ""
    if any(point.fwd_hooks for point in model.hook_dict.values()):
        return "the model carries hooks of its own"
    if request.attention_mask is not None:
        return "a TransformerLens model shifts positions by its attention_mask"
    bridge = not hasattr(model, "W_E") or type(model).__name__ == "TransformerBridge"
    if bridge and kinds == {"resid_mid"}:
        return "a bridge's hook_resid_mid leaves the skip connection as it is"
    return ""


def _unlike(request: PatchRequest, kind: str, engine: KnownModel) -> str:
    """Why the clean run's activations are not those of this model, or an empty string."""
    width, dtype = engine.shape.width(kind), engine.final.dtype
    for hook, clean in request.clean.items():
        if clean.dtype != dtype:
            has, wants = (str(d).removeprefix("torch.") for d in (clean.dtype, dtype))
            return f"clean_cache[{hook!r}] is {has} and the model {wants}"
        if packed(kind, clean).shape[1] != width:
            return f"clean_cache[{hook!r}] has another width than the model's"
    return ""


def _plan(request: PatchRequest, kind: str, engine: KnownModel) -> Plan:
    """The writes of the cells, row cell * b + prompt."""
    assert request.stock is not None
    shape, device = engine.shape, engine.final.device
    b, t = shape.b, shape.t
    sources = {}
    for layer, hook in request.hooks.items():
        clean = request.clean[hook].to(device)
        clean = _in_parts(request, kind, engine, layer, clean)
        sources[shape.stage(kind, layer)] = packed(kind, clean.expand(b, *clean.shape[1:]))
    count = len(request.cells)
    cells = torch.tensor(request.cells, dtype=torch.int64).reshape(count, -1)
    where = {axis: cells[:, 1 + i] for i, (axis, _) in enumerate(request.stock.axes)}
    dest = where.get("pos", where.get("dest_pos"))
    rows = torch.arange(count * b)
    if dest is None:
        rows = rows.repeat_interleave(t)
        position = torch.arange(t).repeat(count * b)
    else:
        position = dest.repeat_interleave(b)
    cell, prompt = rows // b, rows % b
    unit = shape.unit(kind)
    lo, hi = torch.zeros_like(rows), torch.full_like(rows, shape.width(kind))
    if "head" in where:
        lo = where["head"][cell] * unit
        hi = lo + unit
    if "src_pos" in where:
        lo = lo + where["src_pos"][cell]
        hi = lo + 1
    place = [shape.stage(kind, layer) for layer in cells[:, 0].tolist()]
    layer = torch.tensor([at for at, _ in place], dtype=torch.int64)[cell]
    stage = STAGES.index(place[0][1] if place else "resid_pre")
    full = lambda value: torch.full_like(rows, value)  # noqa: E731
    writes = Writes(
        rows, layer, full(stage), position, lo, hi, full(REPLACE), prompt * t + position,
        torch.ones(len(rows), dtype=torch.float64),
    )  # fmt: skip
    counts = (position >= shape.first[prompt]) & (position < shape.stop[prompt])
    return Plan(torch.arange(b).repeat(count), writes.select(counts), sources)


def _in_parts(
    request: PatchRequest, kind: str, engine: KnownModel, layer: int, x: Tensor
) -> Tensor:
    """What the parts hold where a hook gives x [b, t, ...].

    A TransformerLens model hooks queries and keys before the norm that some architectures give
    each head; the parts are written to after it, which for whole heads is the same patch.
    """
    block = engine.runner.stack.blocks[layer]
    norm = {"q": block.norm_q, "k": block.norm_k}.get(kind)
    if norm is None or isinstance(request.model, HookedModel):
        return x
    return norm(x.flatten(0, 1)).view_as(x)


def _own(request: PatchRequest, kind: str, engine: KnownModel) -> Any:
    """(layer, stage) -> the corrupted run's activations by the model's own forward.

    A clean cache holds what the model's forward gave, so a patch that changes nothing is told by
    comparing with the same forward; the parts of the native engine round in another way.
    """
    rows = {} if request.attention_mask is None else {"attention_mask": request.attention_mask}
    wanted = list(dict.fromkeys(request.hooks.values()))
    _, cache = request.model.run_with_cache(
        request.tokens, names_filter=lambda name: name in wanted, **rows
    )
    held = {
        engine.shape.stage(kind, at): packed(
            kind, _in_parts(request, kind, engine, at, cache[hook])
        )
        for at, hook in request.hooks.items()
    }
    return lambda layer, stage: held[layer, stage]


def _scores(
    request: PatchRequest, engine: KnownModel, plan: Plan, reads: Reads | None, progress: bool
) -> Tensor:
    """The metrics of every cell, from a table of the logits they read, or from all of them."""
    b, t = engine.shape.b, engine.shape.t
    slots = (torch.arange(t) if reads is None else reads.positions).expand(b, -1)
    columns = None if reads is None or reads.tokens is None else reads.tokens.expand(b, -1)
    own = predictions(engine, torch.arange(b), slots, columns)
    by_logits = MEMORY // max(1, 2 * own.numel() * own.element_size())
    size = max(1, min(by_logits, engine.groups * TOKENS // (b * t)))
    scores = []
    for part in batch_slices(len(request.cells), size, request.op if progress else None, "cell"):
        cells = torch.arange(part.start, part.stop)
        rows = (cells[:, None] * b + torch.arange(b)).flatten()
        logits = own.expand(len(cells), *own.shape).clone()
        for row, slot, new in engine.patched(plan.take(rows), slots, columns):
            logits[row // b, row % b, slot] = new
        for cell, some in zip(cells.tolist(), logits, strict=True):
            where = f"index {list(request.cells[cell])}"
            if reads is None:
                scores.append(request.metrics(some, where))
                continue
            lazy = Logits((b, t, engine.vocabulary), own, reads.table(some))
            scores.append(request.metrics(lazy, where))
            lazy.check()
    return torch.stack(scores)
