"""Reading a known model into plain parts; `runner` verifies them against the model's output."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from microtome.models.native.block import Block, Map, Mlp, Stack
from microtome.models.native.linear import Linear

# The rotation tables a block was called with: (cos, sin), each [t, r], or None.
Rotation = tuple[Tensor, Tensor] | None


def linear(module: nn.Module) -> Linear:
    """An nn.Linear, or the transposed Conv1D of GPT-2."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    bias: Tensor | None = getattr(module, "bias", None)
    return Linear(weight.T if type(module).__name__ == "Conv1D" else weight, bias)


def joined(*modules: nn.Module) -> Linear:
    """Several maps of the same input as one."""
    parts = [linear(module) for module in modules]
    biases = [part.bias for part in parts]
    bias = None
    if any(b is not None for b in biases):
        bias = torch.cat(
            [
                part.weight.new_zeros(part.out_features) if b is None else b
                for part, b in zip(parts, biases, strict=True)
            ]
        )
    return Linear(torch.cat([part.weight for part in parts]), bias)


def activation(module: Any) -> Map:
    """The nonlinearity by one call of torch where it is a known one, else itself."""
    name = type(module).__name__
    if name in ("NewGELUActivation", "GELUTanh", "FastGELUActivation", "PytorchGELUTanh"):
        return lambda x: F.gelu(x, approximate="tanh")
    if name in ("GELUActivation", "GELU") and getattr(module, "approximate", "none") == "none":
        return F.gelu
    if name in ("SiLUActivation", "SiLU"):
        return F.silu
    return module  # type: ignore[no-any-return]


def gpt2_block(block: Any, rotation: Rotation) -> Block:
    """GPT-2, and the toy model, whose MLP is a sequence."""
    attn, mlp = block.attn, block.mlp
    parts = (
        (mlp[0], mlp[1], mlp[2])
        if isinstance(mlp, nn.Sequential)
        else (mlp.c_fc, mlp.act, mlp.c_proj)
    )
    qkv = linear(attn.c_attn)
    heads = qkv.weight.shape[1] // attn.head_dim
    return Block(
        norm1=block.ln_1,
        qkv=qkv,
        heads=heads,
        kv_heads=heads,
        d_head=attn.head_dim,
        scale=getattr(attn, "scaling", attn.head_dim**-0.5),
        out=linear(attn.c_proj),
        norm2=block.ln_2,
        mlp=Mlp(linear(parts[0]), activation(parts[1]), False, linear(parts[2])),
    )


def llama_block(block: Any, rotation: Rotation) -> Block:
    """Llama, SmolLM, Mistral, Qwen 2 and 3, Gemma 1 to 3."""
    attn, mlp = block.self_attn, block.mlp
    four_norms = hasattr(block, "pre_feedforward_layernorm")
    window = getattr(attn, "sliding_window", None)
    if window is None and attn.config.model_type == "mistral":
        window = attn.config.sliding_window
    turns = rotation is not None and getattr(attn, "use_rope", True)
    cos, sin = rotation if rotation is not None and turns else (None, None)
    return Block(
        norm1=block.input_layernorm,
        qkv=joined(attn.q_proj, attn.k_proj, attn.v_proj),
        heads=attn.q_proj.out_features // attn.head_dim,
        kv_heads=attn.k_proj.out_features // attn.head_dim,
        d_head=attn.head_dim,
        scale=attn.scaling,
        out=linear(attn.o_proj),
        norm2=block.pre_feedforward_layernorm if four_norms else block.post_attention_layernorm,
        mlp=Mlp(
            joined(mlp.gate_proj, mlp.up_proj), activation(mlp.act_fn), True, linear(mlp.down_proj)
        ),
        norm_q=getattr(attn, "q_norm", None),
        norm_k=getattr(attn, "k_norm", None),
        cos=cos,
        sin=sin,
        softcap=getattr(attn, "attn_logit_softcapping", None) or 0.0,
        window=window or 0,
        post_attention=block.post_attention_layernorm if four_norms else None,
        post_mlp=block.post_feedforward_layernorm if four_norms else None,
    )


def neox_block(block: Any, rotation: Rotation) -> Block:
    """GPT-NeoX: heads interleave their queries, keys and values, and rotate a part of each."""
    attn, mlp = block.attention, block.mlp
    together = linear(attn.query_key_value)
    w = attn.head_size
    apart = lambda x: x.unflatten(0, (-1, 3, w)).transpose(0, 1).flatten(0, 2)  # noqa: E731
    cos, sin = rotation or (None, None)
    heads = together.weight.shape[1] // w
    return Block(
        norm1=block.input_layernorm,
        qkv=Linear(apart(together.weight), None if together.bias is None else apart(together.bias)),
        heads=heads,
        kv_heads=heads,
        d_head=w,
        scale=attn.scaling,
        out=linear(attn.dense),
        norm2=block.post_attention_layernorm,
        mlp=Mlp(linear(mlp.dense_h_to_4h), activation(mlp.act), False, linear(mlp.dense_4h_to_h)),
        cos=cos,
        sin=sin,
        parallel=block.use_parallel_residual,
    )


# model_type -> (path of the blocks, path of the final norm, how to read a block)
READERS: dict[str, tuple[str, str, Callable[[Any, Rotation], Block]]] = {
    "gpt2": ("transformer.h", "transformer.ln_f", gpt2_block),
    "microtome_toy": ("h", "ln_f", gpt2_block),
    "gpt_neox": ("gpt_neox.layers", "gpt_neox.final_layer_norm", neox_block),
    **dict.fromkeys(
        ("llama", "smollm3", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text"),
        ("model.layers", "model.norm", llama_block),
    ),
    "gemma3": ("model.language_model.layers", "model.language_model.norm", llama_block),
}


def read(model: nn.Module, rotations: list[Rotation]) -> Stack:
    """The parts of a known model; AttributeError where it is built in another way.

    Args:
        model: of a `model_type` in READERS.
        rotations: what each block was called with.
    """
    config: Any = model.config
    blocks_at, norm_at, reader = READERS[config.model_type]
    text = getattr(config, "text_config", None) or config
    blocks = model.get_submodule(blocks_at)
    lm_head: Any = model.get_submodule("lm_head")
    return Stack(
        blocks=tuple(reader(b, r) for b, r in zip(blocks, rotations, strict=True)),
        norm=model.get_submodule(norm_at),
        unembed=linear(lm_head),
        softcap=getattr(text, "final_logit_softcapping", None) or 0.0,
        entry=f"{blocks_at}.0",
    )


def turned(stack: Stack, rotations: list[Rotation]) -> Stack:
    """The same parts with the rotation tables of another length of prompt."""
    blocks = (
        replace(block, cos=rotation[0], sin=rotation[1])
        if rotation is not None and block.cos is not None
        else block
        for block, rotation in zip(stack.blocks, rotations, strict=True)
    )
    return replace(stack, blocks=tuple(blocks))
