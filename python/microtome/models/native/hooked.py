"""Reading TransformerLens models into plain parts; the package is not imported."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from microtome.models.native.block import Block, Map, Mlp, Stack
from microtome.models.native.families import Rotation
from microtome.models.native.linear import Linear

_ACTIVATIONS: dict[str, Map] = {
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_fast": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
    "solu": lambda x: x * x.softmax(-1),
    "solu_ln": lambda x: x * x.softmax(-1),
}


def is_hooked(model: nn.Module) -> bool:
    """Whether a model is a HookedTransformer or a TransformerBridge, known by its parts."""
    return all(hasattr(model, name) for name in ("cfg", "blocks", "unembed", "hook_dict"))


def hooks_set(model: Any) -> str:
    """Why a TransformerLens model runs something beside its parts, or an empty string.

    A bridge has torch hooks of its own on the modules it wraps; the user's are at hook points.
    """
    for name, point in model.hook_dict.items():
        if getattr(point, "fwd_hooks", None):
            return f"{name} carries a hook, which parts would not call"
    return ""


def padding_hidden(model: Any, tokens: Tensor) -> str:
    """Why a model hides tokens [b, t] that no mask was given for, or an empty string.

    A HookedTransformer whose tokenizer pads on the left masks the padding that a prompt begins
    with, but for its last token where that is the first of the text.
    """
    tokenizer = getattr(model, "tokenizer", None)
    if getattr(tokenizer, "padding_side", "right") != "left":
        return ""
    pad = getattr(tokenizer, "pad_token_id", None)
    if pad is None:
        return ""
    opens = pad == tokenizer.bos_token_id and getattr(model.cfg, "default_prepend_bos", True)
    hidden = (tokens == pad).long().cumprod(1).sum(1) > int(opens)
    if not bool(hidden.any()):
        return ""
    return (
        f"{type(model).__name__} hides the padding that prompt {int(hidden.nonzero()[0])} begins "
        "with, which parts would not"
    )


def read_hooked(model: Any, rotations: list[Rotation]) -> Stack:
    """The parts of a TransformerLens model; AttributeError or KeyError where one is missing.

    Args:
        model: a HookedTransformer or a TransformerBridge.
        rotations: what each block was called with; None where a block holds its own tables.
    """
    cfg = model.cfg
    return Stack(
        blocks=tuple(_block(b, cfg, r) for b, r in zip(model.blocks, rotations, strict=True)),
        norm=model.ln_final if hasattr(model, "ln_final") else nn.Identity(),
        unembed=Linear(model.unembed.W_U.T, model.unembed.b_U),
        softcap=max(getattr(cfg, "output_logits_soft_cap", 0.0) or 0.0, 0.0),
        entry="blocks.0",
    )


def _block(block: Any, cfg: Any, rotation: Rotation) -> Block:
    attn = block.attn
    if rotation is None and cfg.positional_embedding_type == "rotary":
        rotation = attn.rotary_cos, attn.rotary_sin
    cos, sin = rotation or (None, None)
    heads, d, width = attn.W_Q.shape
    W_K, W_V = (getattr(attn, f"_W_{x}", None) for x in "KV")  # the stored ones, where heads share
    b_K, b_V = (getattr(attn, f"_b_{x}", None) for x in "KV")
    W_K, W_V = (attn.W_K if W_K is None else W_K), (attn.W_V if W_V is None else W_V)
    b_K, b_V = (attn.b_K if b_K is None else b_K), (attn.b_V if b_V is None else b_V)
    weights = [W.transpose(1, 2).reshape(-1, d) for W in (attn.W_Q, W_K, W_V)]
    adjacent = bool(getattr(cfg, "rotary_adjacent_pairs", False))
    local = getattr(attn, "attn_type", "global") == "local"
    both = hasattr(block, "ln1_post")
    wrapped = getattr(attn, "original_component", None)  # of a bridge, whose cfg may not know
    scale = getattr(wrapped, "scaling", None) or 1.0 / float(
        getattr(attn, "attn_scale", width**0.5)
    )
    window = cfg.window_size if local else getattr(wrapped, "sliding_window", None)
    mlp = None if cfg.attn_only else _mlp(block.mlp, cfg)
    return Block(
        norm1=_row_norm(block.ln1) if hasattr(block, "ln1") else nn.Identity(),
        qkv=Linear(torch.cat(weights), _biases((attn.b_Q, b_K, b_V), weights)),
        heads=heads,
        kv_heads=W_K.shape[0],
        d_head=width,
        scale=scale,
        out=Linear(attn.W_O.reshape(-1, d).T, attn.b_O),
        norm2=None if mlp is None else _row_norm(block.ln2),
        mlp=mlp,
        norm_q=getattr(attn, "q_norm", None),
        norm_k=getattr(attn, "k_norm", None),
        cos=cos,
        sin=sin,
        interleaved=adjacent,
        softcap=max(getattr(cfg, "attn_scores_soft_cap", 0.0) or 0.0, 0.0),
        window=window or 0,
        post_attention=_row_norm(block.ln1_post) if both else None,
        post_mlp=_row_norm(block.ln2_post) if both and mlp is not None else None,
        parallel=bool(cfg.parallel_attn_mlp),
    )


def _biases(biases: Sequence[Tensor | None], weights: Sequence[Tensor]) -> Tensor | None:
    """[o] biases of several maps as one; None where none of them has any, as in a bridge."""
    if all(b is None for b in biases):
        return None
    zeros = (W.new_zeros(W.shape[0]) for W in weights)
    return torch.cat([o if b is None else b.flatten() for b, o in zip(biases, zeros, strict=True)])


def _row_norm(norm: nn.Module) -> Map:
    """The norm of a block takes [b, t, d]; packed rows are one batch."""

    def apply(x: Tensor) -> Tensor:
        out: Tensor = norm(x[None])[0]
        return out

    return apply


def _mlp(mlp: Any, cfg: Any) -> Mlp:
    act = _ACTIVATIONS[cfg.act_fn]
    if cfg.act_fn.endswith("_ln"):
        inner, norm = act, _row_norm(mlp.ln)
        act = lambda x: norm(inner(x))  # noqa: E731
    out = Linear(mlp.W_out.T, mlp.b_out)
    if cfg.gated_mlp:
        weight = torch.cat([mlp.W_gate.T, mlp.W_in.T])
        shift = None  # added after the gate
        if mlp.b_in is not None and bool(mlp.b_in.any()):
            shift = mlp.b_in.detach()
        return Mlp(Linear(weight, None), act, True, out, shift)
    return Mlp(Linear(mlp.W_in.T, mlp.b_in), act, False, out)
