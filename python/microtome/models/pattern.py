"""The attention pattern, formed in the open while somebody watches it.

Fused attention never forms the pattern. While one is watched, the model computes attention in
plain steps instead: a Hugging Face model through the registry of attention functions of
transformers, under the name NAME, the toy model by asking `is_watched`.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, ClassVar
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from microtome.models.hooks import Visit

NAME = "microtome_pattern"

_WATCHES: WeakKeyDictionary[nn.Module, list[Watch]] = WeakKeyDictionary()


class Watch:
    """Calls `visit` on the pattern of one attention module in every forward, until `remove`.

    Where the module takes its attention function from a Hugging Face config, the config asks for
    ours meanwhile, in every layer of the model. What it asked for before comes back when the last
    watch on the config is removed.

    Args:
        module: an attention module for which `can_watch` holds.
        visit: called with the pattern [b, h, destination, source] after the softmax and before
            dropout; may return a replacement.
    """

    def __init__(self, module: nn.Module, visit: Visit) -> None:
        self.module, self.visit = module, visit
        self.config = None if _asks(module) else module.config
        if self.config is not None:
            _Switch.on(self.config)
        _WATCHES.setdefault(module, []).append(self)

    def remove(self) -> None:
        watches = _WATCHES[self.module]
        watches.remove(self)
        if not watches:
            del _WATCHES[self.module]
        if self.config is not None:
            _Switch.off(self.config)


class _Switch:
    """What a config asked for before the first watch, and how many watches there are."""

    open: ClassVar[dict[int, _Switch]] = {}  # by id: a config has no hash

    def __init__(self, config: Any) -> None:
        self.config, self.before, self.watches = config, config._attn_implementation, 0

    @classmethod
    def on(cls, config: Any) -> None:
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.masking_utils import eager_mask

        AttentionInterface.register(NAME, attention)
        AttentionMaskInterface.register(NAME, eager_mask)  # else there would be no mask at all
        switch = cls.open.setdefault(id(config), cls(config))
        switch.watches += 1
        config._attn_implementation = NAME

    @classmethod
    def off(cls, config: Any) -> None:
        switch = cls.open[id(config)]
        switch.watches -= 1
        if not switch.watches:
            del cls.open[id(config)]
            if config._attn_implementation == NAME:  # else somebody asked for another meanwhile
                config._attn_implementation = switch.before


def can_watch(module: nn.Module) -> bool:
    """True if the pattern of an attention module is within reach of a Watch."""
    if _asks(module):
        return True
    looks_up = any(
        hasattr(sys.modules.get(base.__module__), "ALL_ATTENTION_FUNCTIONS")
        for base in type(module).__mro__
    )
    return looks_up and hasattr(getattr(module, "config", None), "_attn_implementation")


def is_watched(module: nn.Module) -> bool:
    """True if an attention module has to form its pattern with `attention`."""
    return module in _WATCHES


def _asks(module: nn.Module) -> bool:
    """True for modules of our own, which ask `is_watched`."""
    return bool(getattr(module, "asks_is_watched", False))


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Attention in plain steps, which shows the pattern to whoever watches `module`.

        pattern = softmax(cap(scaling * query key^T) + attention_mask)

    with cap(s) = softcap * tanh(s / softcap), in the order and precision of transformers' eager
    attention: the softmax in float32 (float64 for float64), the rest in the dtype of `query`.

    Args:
        module: the attention module.
        query: [b, h, t, d_head].
        key: [b, key-value heads, s, d_head].
        value: as key.
        attention_mask: what is added to the scores, broadcast to [b, h, t, s] (it holds causality,
            padding and the sliding window); or bool, True where a query may look; or None: causal
            if `is_causal` or else the module says so.
        scaling: None for d_head ** -0.5.
        softcap: None for no cap.
        dropout: probability, applied to what the watchers leave.
        is_causal: see attention_mask.

    Returns:
        (z [b, t, h, d_head], pattern [b, h, t, s]).
    """
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (part.repeat_interleave(groups, dim=1) for part in (key, value))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = torch.matmul(query, key.transpose(2, 3)) * scale  # [b, h, t, s]
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    causal = getattr(module, "is_causal", False) if is_causal is None else is_causal
    if attention_mask is None and causal:
        t, s = scores.shape[2:]
        attention_mask = torch.ones(t, s, dtype=torch.bool, device=scores.device).tril(s - t)
    if attention_mask is not None:
        attention_mask = attention_mask[..., : scores.shape[3]]
        if attention_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
        else:
            scores = scores + attention_mask
    exact = torch.promote_types(scores.dtype, torch.float32)
    pattern = scores.softmax(dim=-1, dtype=exact).to(query.dtype)
    for watch in tuple(_WATCHES.get(module, ())):
        new = watch.visit(pattern)
        pattern = pattern if new is None else new
    pattern = F.dropout(pattern, p=dropout, training=module.training)
    z = torch.matmul(pattern, value)
    return z.transpose(1, 2).contiguous(), pattern
