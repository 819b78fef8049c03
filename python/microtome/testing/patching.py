"""The naive twin of a sweep: the same cells, one full forward each."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from microtome.patching import Sweep
from microtome.patching.naive import Write, naive_sweep

MetricFunction = Callable[[Tensor], Tensor]


def naive_twin(
    model: nn.Module,
    found: Sweep,
    base: Tensor,
    source: Tensor | None,
    metric: MetricFunction,
    *,
    attention_mask: Tensor | None = None,
    sites: Callable[[str], str] = str,
    **write: Any,
) -> Tensor:
    """What `found.by_prompt` has to be, by `naive_sweep`.

    Args:
        model: the model.
        found: says which cells.
        base: [b, t], the prompts that were patched.
        source: [b, t], the prompts that values came from, or None.
        metric: maps logits [b, t, V] to [b].
        attention_mask: [b, t].
        sites: maps "z.3" to what `capture` knows it by.
        **write: op, value and factor of every write.

    Returns:
        [*axes, b].
    """
    cells = []
    for cell in itertools.product(*found.values):
        at = dict(zip(found.axes, cell, strict=True))
        units = at.get("source", at.get("neuron"))
        name = sites(f"{found.site}.{at['layer']}")
        cells.append([Write(name, at.get("position"), at.get("head"), units, **write)])
    scores = naive_sweep(model, base, source, metric, cells, attention_mask=attention_mask)
    return scores.unflatten(0, [len(v) for v in found.values])


def apart(found: Sweep, wanted: Tensor) -> float:
    """The largest difference from the naive scores, over the largest of those."""
    return float((found.by_prompt - wanted).abs().max() / wanted.abs().max().clamp_min(1e-30))


def changed(tokens: Tensor, *where: tuple[int, int]) -> Tensor:
    """A copy of prompts with other tokens at some (prompt, position)."""
    out = tokens.clone()
    for prompt, position in where:
        out[prompt, position] = (out[prompt, position] + 3) % 40 + 1
    return out


def last_difference(logits: Tensor) -> Tensor:
    """logit[11] - logit[12] at the last position, as `logit_difference(11, 12)` measures it."""
    return logits[:, -1, 11] - logits[:, -1, 12]


def everything(logits: Tensor) -> Tensor:
    """A metric that every logit moves."""
    weights = torch.linspace(-1, 1, logits[0].numel(), dtype=logits.dtype).view(logits[0].shape)
    return (logits * weights).sum((1, 2))


def untouched(model: nn.Module) -> None:
    """No hook is left on any module, nor a forward of its own."""
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert "forward" not in module.__dict__
    assert torch.is_grad_enabled()
