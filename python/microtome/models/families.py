"""Where each known architecture keeps its sites."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from torch import nn

# In the order of a block's computation, the residual stream first.
KINDS = (
    "resid_pre",
    "resid_mid",
    "resid_post",
    "attn_out",
    "mlp_out",
    "q",
    "k",
    "v",
    "pattern",
    "z",
    "neurons",
)


@dataclass(frozen=True)
class Place:
    """A tensor in a block, and how the heads lie in it.

    Attributes:
        path: a module below the block.
        at_input: the module's input instead of its output.
        heads: "" if the tensor is read as it is; "flat" for [b, t, h * d_head]; "first" for
            [b, h, t, d_head]; "stacked" for [b, t, 3 * h * d_head], all queries before all keys
            before all values; "interleaved" for the same with head by head its query, key, value.
    """

    path: str
    at_input: bool = False
    heads: str = ""


def _output(path: str, heads: str = "") -> Place:
    return Place(path, heads=heads)


def _input(path: str, heads: str = "") -> Place:
    return Place(path, at_input=True, heads=heads)


@dataclass(frozen=True)
class Family:
    """Where a family of models keeps its sites; paths lie below a block.

    Attributes:
        name: for messages.
        model_types: values of `model.config.model_type` that belong to the family.
        blocks: last part of the path of the list of blocks.
        resid_mid: the residual stream between attention and MLP.
        attn_out: what attention adds to the residual stream (after a post-norm, where there is
            one).
        mlp_out: what the MLP adds to it.
        q: the heads' queries, before rotary embedding and after a norm of their own.
        k: the keys, likewise.
        v: the values.
        z: the heads' outputs, i.e. the input of the attention's output projection.
        neurons: the MLP's hidden activations, i.e. the input of its down projection.
        attention: the module that forms the attention pattern.
        d_head: attribute that holds the width of a head.
        learned_positions: True if no sequence may exceed `config.max_position_embeddings`.
    """

    name: str
    model_types: tuple[str, ...]
    blocks: str
    resid_mid: Place
    attn_out: Place
    mlp_out: Place
    q: Place
    k: Place
    v: Place
    z: Place
    neurons: Place
    attention: str
    d_head: str
    learned_positions: bool = False


_GPT2 = Family(
    name="GPT-2",
    model_types=("gpt2",),
    blocks="h",
    resid_mid=_input("ln_2"),
    attn_out=_output("attn"),
    mlp_out=_output("mlp"),
    q=_output("attn.c_attn", "stacked"),
    k=_output("attn.c_attn", "stacked"),
    v=_output("attn.c_attn", "stacked"),
    z=_input("attn.c_proj", "flat"),
    neurons=_input("mlp.c_proj"),
    attention="attn",
    d_head="attn.head_dim",
    learned_positions=True,
)
_LLAMA = Family(
    name="Llama, SmolLM, Mistral, Qwen 2 and 3, Gemma",
    model_types=("llama", "smollm3", "mistral", "qwen2", "gemma"),
    blocks="layers",
    resid_mid=_input("post_attention_layernorm"),
    attn_out=_output("self_attn"),
    mlp_out=_output("mlp"),
    q=_output("self_attn.q_proj", "flat"),
    k=_output("self_attn.k_proj", "flat"),
    v=_output("self_attn.v_proj", "flat"),
    z=_input("self_attn.o_proj", "flat"),
    neurons=_input("mlp.down_proj"),
    attention="self_attn",
    d_head="self_attn.head_dim",
)
_GEMMA2 = dataclasses.replace(
    _LLAMA,
    name="Gemma 2 and 3",
    model_types=("gemma2",),
    resid_mid=_input("pre_feedforward_layernorm"),
    attn_out=_output("post_attention_layernorm"),
    mlp_out=_output("post_feedforward_layernorm"),
)
# Gemma 3 norms its heads after the transposition to [b, h, t, d_head], Qwen 3 before it.
_GEMMA3 = dataclasses.replace(
    _GEMMA2,
    model_types=("gemma3_text",),
    q=_output("self_attn.q_norm", "first"),
    k=_output("self_attn.k_norm", "first"),
)

FAMILIES = (
    _GPT2,
    dataclasses.replace(
        _GPT2, name="the toy model", model_types=("microtome_toy",), neurons=_input("mlp.2")
    ),
    _LLAMA,
    dataclasses.replace(
        _LLAMA,
        model_types=("qwen3",),
        q=_output("self_attn.q_norm"),
        k=_output("self_attn.k_norm"),
    ),
    _GEMMA2,
    _GEMMA3,
    # The language model inside the image-and-text Gemma 3; its vision tower has "layers" too.
    dataclasses.replace(_GEMMA3, model_types=("gemma3",), blocks="language_model.layers"),
    Family(
        name="GPT-NeoX",
        model_types=("gpt_neox",),
        blocks="layers",
        resid_mid=_input("post_attention_layernorm"),
        attn_out=_output("post_attention_dropout"),
        mlp_out=_output("post_mlp_dropout"),
        q=_output("attention.query_key_value", "interleaved"),
        k=_output("attention.query_key_value", "interleaved"),
        v=_output("attention.query_key_value", "interleaved"),
        z=_input("attention.dense", "flat"),
        neurons=_input("mlp.dense_4h_to_h"),
        attention="attention",
        d_head="attention.head_size",
    ),
    # Post-norm: the stream a BERT block hands on is normalised, and so is resid_mid.
    Family(
        name="BERT",
        model_types=("bert",),
        blocks="encoder.layer",
        resid_mid=_output("attention.output"),
        attn_out=_output("attention.output.dropout"),
        mlp_out=_output("output.dropout"),
        q=_output("attention.self.query", "flat"),
        k=_output("attention.self.key", "flat"),
        v=_output("attention.self.value", "flat"),
        z=_input("attention.output.dense", "flat"),
        neurons=_input("output.dense"),
        attention="attention.self",
        d_head="attention.self.attention_head_size",
        learned_positions=True,
    ),
)


def family_of(model: nn.Module) -> Family | None:
    """The architecture of a model by its `config.model_type`, or None."""
    if hasattr(model, "hook_dict"):  # TransformerLens's, with the config of what it wraps
        return None
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    return next((f for f in FAMILIES if model_type in f.model_types), None)
