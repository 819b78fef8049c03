"""The native runner: a known model read into parts, verified once against its own output."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from microtome.errors import BackendError
from microtome.models.capture import Recorder, call, evaluating
from microtome.models.native.base import BaseRun, bytes_kept, run_base
from microtome.models.native.block import Stack
from microtome.models.native.families import READERS, Rotation, read, turned
from microtome.models.native.hooked import (
    hooks_set,
    is_hooked,
    padding_hidden,
    read_hooked,
)
from microtome.models.native.plan import Plan
from microtome.models.native.wave import Final, Wave
from microtome.models.native.weights import altered, weights_key
from microtome.models.sites import Site

# Largest difference of logits over their largest size: 100 times what float32 products differ by;
# some models take the softmax in float32 whatever their weights are.
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-6}
# model -> (its weights, {(length, padded): its runner, or why it has none})
_runners: weakref.WeakKeyDictionary[
    nn.Module, tuple[bytes, dict[tuple[int, bool], Runner | str]]
] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class Runner:
    """A model in parts, known to give the model's own logits.

    Attributes:
        stack: the parts.
        error: largest difference from the model's own logits when it was verified, over their
            largest size.
    """

    stack: Stack
    error: float

    def base(
        self, model: nn.Module, tokens: Tensor, first: Tensor, *, differences: bool = False
    ) -> BaseRun:
        """Run whole prompts and keep what patched rows stand on.

        Args:
            model: the model that was read.
            tokens: [b, t] int64.
            first: [b] int32, first position that counts.
            differences: keep what `delta` needs.
        """
        with torch.no_grad():
            entry = entry_of(model, tokens, self.stack.entry)
            return run_base(self.stack, entry, first.to(entry.device), differences=differences)

    def bytes_a_token(self, *, differences: bool) -> int:
        """Memory that a base run takes for one token."""
        return bytes_kept(self.stack, differences=differences)

    def waves(
        self, base: BaseRun, plan: Plan, readout: Tensor, *, delta: bool, memory: int
    ) -> Iterator[tuple[Tensor, Final]]:
        """Run a plan's rows, as many at a time as `memory` allows.

        Args:
            base: of `base`.
            plan: rows; those without a write, or whose writes come after all that is read, are the
                base run itself and do not appear.
            readout: [b, t] bool, the positions that are read.
            delta: multiply differences in bf16.
            memory: bytes for the rows' own activations.

        Yields:
            Row numbers, and their final stream where it is read (rows counted within the part).
        """
        t = readout.shape[1]
        last = (readout * torch.arange(1, t + 1)).amax(1)[plan.example]  # one past what is read
        if bool((last < t).any()):
            last[plan.looking_ahead(t)] = t
        plan = replace(
            plan, writes=plan.writes.select(plan.writes.position < last[plan.writes.row])
        )
        entry, start = plan.entries()
        live = (entry >= 0).nonzero().flatten()
        # Long rows together and short ones together, so that a part is cut by tokens.
        live = live[torch.argsort(start[live], stable=True)]
        count = (last[live] - start[live]).cumsum(0)
        limit = max(1, memory // (bytes_a_token(base) or 1))
        part = torch.div(count - 1, limit, rounding_mode="floor")
        device = base.final.device
        for which in range(int(part.max()) + 1 if len(part) else 0):
            rows = live[part == which]
            if len(rows) == 0:
                continue
            with torch.no_grad():  # closed before the yield: it would reach into the caller
                wave = Wave(base, plan.take(rows), last[rows], readout.to(device), delta=delta)
                final = wave.run()
            yield rows, final


def bytes_a_token(base: BaseRun) -> int:
    """Memory that one packed token takes at its widest: stream, queries, keys, values, heads."""
    layer = base.layers[0]
    return base.final.element_size() * (4 * base.final.shape[1] + 2 * layer.qkv.shape[1])


def runner_of(model: nn.Module, tokens: Tensor, first: Tensor) -> Runner | str:
    """The verified runner of a model, or why there is none.

    A model is read once for its weights as they are. It is verified on one prompt for each length,
    with and without padding before it, and again after its weights changed.

    Args:
        model: any model.
        tokens: [n, t] int64, the prompts to come.
        first: [b] int32, the first position that counts of the first b of them.
    """
    kind = getattr(getattr(model, "config", None), "model_type", None)
    hooked = is_hooked(model)
    if not hooked and kind not in READERS:
        return f"{type(model).__name__} is not one of the architectures that are read into parts"
    if why := hooks_set(model) or padding_hidden(model, tokens) if hooked else altered(model):
        return why
    weights = weights_key(model)
    kept = _runners.get(model)
    if kept is None or kept[0] != weights:
        kept = _runners[model] = (weights, {})
    padded = int(first.argmax())  # the prompt with most padding before it
    key = (tokens.shape[1], bool(first[padded] > 0))
    if key not in kept[1]:
        like = next((r.stack for r in kept[1].values() if isinstance(r, Runner)), None)
        one = slice(padded, padded + 1)
        kept[1][key] = _read(model, str(kind), tokens[one], first[one], like)
    return kept[1][key]


def _read(
    model: nn.Module, kind: str, tokens: Tensor, first: Tensor, like: Stack | None
) -> Runner | str:
    """Read, with the weights of `like` if given, and verify on one prompt."""
    dtypes = {p.dtype for p in model.parameters()}
    if len(dtypes) != 1 or dtypes & TOLERANCE.keys() != dtypes:
        has = ", ".join(sorted(str(d).removeprefix("torch.") for d in dtypes))
        wants = "parts are run in float32 or float64 (model.float() converts it)"
        return f"its weights are {has}, and {wants}"
    mask = (torch.arange(tokens.shape[1])[None] >= first.cpu()[:, None]).long()
    hooked = is_hooked(model)
    path = "blocks" if hooked else READERS[kind][0]
    try:
        model.get_submodule(path)
    except AttributeError as missing:
        return f"its parts were not found where {kind} keeps them ({missing})"
    logits, rotations = _recorded(model, tokens, mask if bool((first > 0).any()) else None, path)
    if not isinstance(logits, Tensor):
        return f"{type(model).__name__} returns no logits"
    try:
        if like is not None:
            stack = turned(like, rotations)
        else:
            stack = read_hooked(model, rotations) if hooked else read(model, rotations)
        with torch.no_grad():
            entry = entry_of(model, tokens, stack.entry)
            base = run_base(stack, entry, first.to(entry.device), differences=False)
            mine = stack.logits(base.final).unflatten(0, base.shape)
    except (BackendError, torch.OutOfMemoryError):  # these say nothing of the model
        raise
    except (AttributeError, LookupError, TypeError, ValueError, RuntimeError) as missing:
        name = type(model).__name__ if hooked else kind
        return f"its parts were not found where {name} keeps them ({missing})"
    counts = mask.bool().to(logits.device)
    apart = (mine - logits)[counts].abs().max() / logits[counts].abs().max().clamp_min(1e-30)
    if not float(apart) <= TOLERANCE[logits.dtype]:
        size = f"{float(apart):.1e} of the largest"
        return f"its parts give other logits than the model does (off by {size})"
    return Runner(stack, float(apart))


def entry_of(model: nn.Module, tokens: Tensor, path: str) -> Tensor:
    """[b, t, d]: the stream before the first block; the model stops there."""
    site = Site("entry", path, at_input=True)
    with Recorder("patching", model, [site], stop_early=True) as recorder:
        return recorder.run(tokens, None)["entry"]


def _recorded(
    model: nn.Module, tokens: Tensor, mask: Tensor | None, path: str
) -> tuple[Tensor | None, list[Rotation]]:
    """A model's logits, and the rotation tables its blocks were called with."""
    rotations: list[Rotation] = []

    def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found = kwargs.get("position_embeddings")
        rotations.append(None if found is None else (found[0][0], found[1][0]))

    blocks: Any = model.get_submodule(path)
    handles = [block.register_forward_pre_hook(keep, with_kwargs=True) for block in blocks]
    try:
        with evaluating(model), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            out = call(model, tokens, mask)
    finally:
        for handle in handles:
            handle.remove()
    return (out if isinstance(out, Tensor) else getattr(out, "logits", None)), rotations
