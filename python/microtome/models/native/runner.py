"""The native runner: a known model read into parts, verified once against its own output."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from microtome.errors import MicrotomeError
from microtome.models.capture import Recorder, call
from microtome.models.native.base import BaseRun, run_base
from microtome.models.native.block import Stack
from microtome.models.native.families import READERS, Rotation, read
from microtome.models.native.hooked import is_hooked, read_hooked
from microtome.models.native.plan import Plan
from microtome.models.native.wave import Final, Wave
from microtome.models.sites import Site

# Largest difference of logits over their largest size: 100 times what float32 products differ by;
# some models take the softmax in float32 whatever their weights are.
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-6}
_runners: weakref.WeakKeyDictionary[nn.Module, dict[Any, Runner | str]] = (
    weakref.WeakKeyDictionary()
)


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
        last = (readout * torch.arange(1, readout.shape[1] + 1)).amax(1)  # one past what is read
        writes = plan.writes.select(plan.writes.position < last[plan.example[plan.writes.row]])
        plan = Plan(plan.example, writes, plan.sources)
        entry, start = plan.entries()
        live = (entry >= 0).nonzero().flatten()
        # Long rows together and short ones together, so that a part is cut by tokens.
        live = live[torch.argsort(start[live], stable=True)]
        count = (last[plan.example[live]] - start[live]).cumsum(0)
        limit = max(1, memory // (bytes_a_token(base) or 1))
        part = torch.div(count - 1, limit, rounding_mode="floor")
        device = base.final.device
        for which in range(int(part.max()) + 1 if len(part) else 0):
            rows = live[part == which]
            if len(rows) == 0:
                continue
            with torch.no_grad():
                stop = last[plan.example[rows]]
                wave = Wave(base, plan.take(rows), stop, readout.to(device), delta=delta)
                yield rows, wave.run()


def bytes_a_token(base: BaseRun) -> int:
    """Memory that one packed token takes at its widest: stream, queries, keys, values, heads."""
    layer = base.layers[0]
    return base.final.element_size() * (4 * base.final.shape[1] + 2 * layer.qkv.shape[1])


def runner_of(model: nn.Module, tokens: Tensor, first: Tensor) -> Runner | str:
    """The verified runner of a model, or why there is none.

    A model is read and verified once for a length of prompt, and again after its weights changed.

    Args:
        model: any model.
        tokens: [b, t] int64, a prompt of the length to come.
        first: [b] int32, the first position that counts.
    """
    kept = _runners.setdefault(model, {})
    version = tuple((p.data_ptr(), p._version, p.dtype) for p in model.parameters())
    key = (tokens.shape[1], hash(version))
    if key not in kept:
        for stale in [old for old in kept if old[1] != key[1]]:
            del kept[stale]
        kept[key] = _read(model, tokens[:1], first[:1])
    return kept[key]


def _read(model: nn.Module, tokens: Tensor, first: Tensor) -> Runner | str:
    """Read and verify on one prompt."""
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if not is_hooked(model) and kind not in READERS:
        return f"{type(model).__name__} is not one of the architectures that are read into parts"
    dtypes = {p.dtype for p in model.parameters()}
    if len(dtypes) != 1 or dtypes & TOLERANCE.keys() != dtypes:
        has = ", ".join(sorted(str(d).removeprefix("torch.") for d in dtypes))
        return f"its weights are {has}, and parts are run in float32 or float64"
    mask = (torch.arange(tokens.shape[1])[None] >= first.cpu()[:, None]).long()
    with torch.no_grad():
        try:
            if is_hooked(model):
                logits, rotations = _recorded(model, tokens, None, "blocks")
                stack = read_hooked(model, rotations)
            else:
                path = READERS[str(kind)][0]
                logits, rotations = _recorded(
                    model, tokens, mask if (first > 0).any() else None, path
                )
                stack = read(model, rotations)
            base = run_base(
                stack,
                entry_of(model, tokens, stack.entry),
                first.to(logits.device),
                differences=False,
            )
            mine = stack.logits(base.final).unflatten(0, base.shape)
        except (AttributeError, KeyError, TypeError) as error:
            return f"its parts were not found where {kind or 'such models'} keep them ({error})"
        except (RuntimeError, MicrotomeError) as error:
            return f"its parts do not fit together ({error})"
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
) -> tuple[Tensor, list[Rotation]]:
    """A model's logits, and the rotation tables its blocks were called with."""
    rotations: list[Rotation] = []

    def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found = kwargs.get("position_embeddings")
        rotations.append(None if found is None else (found[0][0], found[1][0]))

    blocks: Any = model.get_submodule(path)
    handles = [block.register_forward_pre_hook(keep, with_kwargs=True) for block in blocks]
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            out = call(model, tokens, mask)
    finally:
        for handle in handles:
            handle.remove()
        for module in training:
            module.training = True
    return (out if isinstance(out, Tensor) else out.logits), rotations
