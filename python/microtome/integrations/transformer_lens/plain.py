"""Sizes, text, forward and loss of a plain model, as TransformerLens presents them."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from microtome import _check
from microtome.errors import ArgumentError, ShapeError


@dataclass(frozen=True)
class Config:
    """The sizes of a model under TransformerLens's names.

    Attributes:
        n_layers: blocks.
        n_heads: query heads in a block.
        n_key_value_heads: key and value heads in a block; None where there are as many as n_heads.
        d_model: width of the residual stream.
        d_head: width of a head.
        d_vocab: token ids.
        n_ctx: the longest sequence, or None.
        device: where the weights lie.
        model_name: the model's class.
    """

    n_layers: int
    n_heads: int
    n_key_value_heads: int | None
    d_model: int
    d_head: int
    d_vocab: int
    n_ctx: int | None
    device: torch.device
    model_name: str


def config_of(model: nn.Module) -> Config:
    """Read the sizes off a Hugging Face or toy model's config."""
    config: Any = model.config
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    heads = int(config.num_attention_heads)
    by_key = getattr(config, "num_key_value_heads", None)
    parameter = next(model.parameters(), None)
    return Config(
        n_layers=int(config.num_hidden_layers),
        n_heads=heads,
        n_key_value_heads=None if by_key in (None, heads) else int(by_key),
        d_model=int(config.hidden_size),
        d_head=int(getattr(config, "head_dim", None) or config.hidden_size // heads),
        d_vocab=int(config.vocab_size),
        n_ctx=getattr(config, "max_position_embeddings", None),
        device=torch.device("cpu") if parameter is None else parameter.device,
        model_name=type(model).__name__,
    )


def tokenise(op: str, tokenizer: Any, text: str | Sequence[str], prepend_bos: bool) -> Tensor:
    """Token ids [b, t] of one text or several of the same number of tokens.

    Raises:
        ArgumentError: there is no tokenizer.
        ShapeError: the texts differ in their number of tokens.
    """
    if tokenizer is None:
        msg = f"{op}: text needs a tokenizer. Pass HookedModel(model, tokenizer), or token ids."
        raise ArgumentError(msg)
    texts = [text] if isinstance(text, str) else list(text)
    first = getattr(tokenizer, "bos_token_id", None) if prepend_bos else None
    front = [] if first is None else [int(first)]
    rows = [front + list(tokenizer.encode(t, add_special_tokens=False)) for t in texts]
    lengths = sorted({len(row) for row in rows})
    if len(lengths) != 1:
        msg = (
            f"{op}: all texts must have the same number of tokens, got {lengths}. Pad token ids "
            "yourself and pass attention_mask."
        )
        raise ShapeError(msg)
    return torch.tensor(rows, dtype=torch.int64)


def forward(op: str, model: nn.Module, tokens: Tensor, kwargs: dict[str, Any]) -> Any:
    """Call a model on its own device, without a cache of keys unless one was asked for."""
    takes = inspect.signature(model.forward).parameters
    parameter = next(model.parameters(), None)
    place = tokens.device if parameter is None else parameter.device
    kwargs = {k: v.to(place) if isinstance(v, Tensor) else v for k, v in kwargs.items()}
    anything = any(p.kind is p.VAR_KEYWORD for p in takes.values())
    unknown = [name for name in kwargs if name not in takes and not anything]
    if unknown:
        msg = (
            f"{op}: {type(model).__name__} takes no argument {unknown[0]!r}; it takes "
            f"{', '.join(takes)}."
        )
        raise ArgumentError(msg)
    if "use_cache" in takes:
        kwargs.setdefault("use_cache", False)
    if "input_ids" in takes:
        return model(input_ids=tokens.to(place), **kwargs)
    return model(tokens.to(place), **kwargs)


def collects(model: nn.Module) -> bool:
    """True if the model gathers its own hidden states or attention patterns."""
    config = getattr(model, "config", None)
    return any(getattr(config, f"output_{w}", False) for w in ("hidden_states", "attentions"))


def result(
    op: str, output: Any, tokens: Tensor, mask: Tensor | None, return_type: str, per_token: bool
) -> Any:
    """What a run returns: logits, loss, or both."""
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if logits is None:
        msg = (
            f"{op}: the model gives a {type(output).__name__} without logits. Pass a model with a "
            "language-model head, or return_type=None."
        )
        raise ArgumentError(msg)
    if return_type == "logits":
        return logits
    value = loss(op, logits, tokens.to(logits.device), mask, per_token)
    return value if return_type == "loss" else (logits, value)


def loss(
    op: str, logits: Tensor, tokens: Tensor, mask: Tensor | None = None, per_token: bool = False
) -> Tensor:
    """Cross-entropy of the next token, in nats: mean over predictions, or [b, t - 1] per token.

    Args:
        op: name for messages.
        logits: [b, t, v].
        tokens: [b, t] int64.
        mask: [b, t], 1 where a token counts; a prediction counts if both its tokens do.
        per_token: return every prediction's loss, zero where it does not count.
    """
    _check.shapes(
        op, logits=(logits, "b t v"), tokens=(tokens, "b t"), attention_mask=(mask, "b t")
    )
    losses = F.cross_entropy(
        logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="none"
    )
    losses = losses.view(tokens.shape[0], -1)
    if mask is None:
        return losses if per_token else losses.mean()
    counts = (mask[:, :-1].bool() & mask[:, 1:].bool()).to(losses.device)
    losses = losses.masked_fill(~counts, 0.0)
    return losses if per_token else losses.sum() / counts.sum()
