"""Tiny models of every known family, random weights from a config: nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from microtome.models import pattern

VOCABULARY = 50


def _llama_like(config: str, model: str) -> Callable[..., nn.Module]:
    def make(**extra: Any) -> nn.Module:
        import transformers

        settings = {
            "vocab_size": VOCABULARY,
            "hidden_size": 24,
            "intermediate_size": 40,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "pad_token_id": 0,
            **extra,
        }
        return getattr(transformers, model)(getattr(transformers, config)(**settings))

    return make


def _gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCABULARY, n_embd=24, n_layer=3, n_head=4, n_positions=16)
    )


def _gpt_neox(parallel: bool) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

        return GPTNeoXForCausalLM(
            GPTNeoXConfig(
                vocab_size=VOCABULARY,
                hidden_size=24,
                num_hidden_layers=3,
                num_attention_heads=4,
                intermediate_size=40,
                use_parallel_residual=parallel,
            )
        )

    return make


def _bert() -> nn.Module:
    from transformers import BertConfig, BertForMaskedLM

    return BertForMaskedLM(
        BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=24,
            num_hidden_layers=3,
            num_attention_heads=4,
            intermediate_size=40,
            max_position_embeddings=16,
        )
    )


def _gemma3_with_images() -> nn.Module:
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    text = {
        "vocab_size": VOCABULARY,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
    }
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    tokens = {"image_token_index": 49, "boi_token_index": 47, "eoi_token_index": 48}
    return Gemma3ForConditionalGeneration(
        Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, **tokens)
    )


MODELS: dict[str, Callable[..., nn.Module]] = {
    "gpt2": _gpt2,
    "llama": _llama_like("LlamaConfig", "LlamaForCausalLM"),
    "mistral": _llama_like("MistralConfig", "MistralForCausalLM"),
    "smollm3": _llama_like("SmolLM3Config", "SmolLM3ForCausalLM"),
    "qwen2": _llama_like("Qwen2Config", "Qwen2ForCausalLM"),
    "qwen3": _llama_like("Qwen3Config", "Qwen3ForCausalLM"),
    "gemma": _llama_like("GemmaConfig", "GemmaForCausalLM"),
    "gemma2": _llama_like("Gemma2Config", "Gemma2ForCausalLM"),
    "gemma3": _llama_like("Gemma3TextConfig", "Gemma3ForCausalLM"),
    "gemma3_with_images": _gemma3_with_images,
    "gpt_neox": _gpt_neox(parallel=True),
    "gpt_neox_sequential": _gpt_neox(parallel=False),
    "bert": _bert,
}
LAYERS, WIDTH, HEADS = 3, 24, 4


def build(name: str, **settings: Any) -> nn.Module:
    """The model in eval mode, with norms and biases away from their neutral start.

    Args:
        name: a key of MODELS.
        **settings: of the config, for the families that are built like Llama.
    """
    torch.manual_seed(0)
    model = MODELS[name](**settings).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
            else:
                parameter.mul_(5.0)
    return model


def in_float64(name: str, **settings: Any) -> nn.Module:
    """The model in float64 throughout.

    Plain attention of transformers takes its softmax in float32 whatever the weights are; models
    that use it get ours, which does not.
    """
    model = build(name, **settings).double()
    for module in model.modules():
        config = getattr(module, "config", None)
        if getattr(config, "_attn_implementation", None) == "eager":
            from transformers import AttentionInterface, AttentionMaskInterface
            from transformers.masking_utils import eager_mask

            AttentionInterface.register(pattern.NAME, pattern.attention)
            AttentionMaskInterface.register(pattern.NAME, eager_mask)
            config._attn_implementation = pattern.NAME
    return model


def tokens(b: int = 3, t: int = 7) -> Tensor:
    """[b, t] ids from 1 on: 0 is padding."""
    return torch.randint(1, VOCABULARY - 4, (b, t), generator=torch.Generator().manual_seed(1))


def hooked_transformer(**sizes: Any) -> Any:
    """A tiny HookedTransformer with grouped key-value heads; skips the test where there is none."""
    package = pytest.importorskip("transformer_lens", reason="transformer-lens is not installed")
    if not hasattr(package, "HookedTransformer"):
        pytest.skip("this transformer-lens has no HookedTransformer")
    settings = {
        "n_layers": 2, "d_model": 16, "n_ctx": 8, "d_head": 4, "n_heads": 4, "d_mlp": 32,
        "d_vocab": VOCABULARY, "act_fn": "gelu_new", "normalization_type": "LN",
        "seed": 0, "device": "cpu", "n_key_value_heads": 2,
    }  # fmt: skip
    return package.HookedTransformer(package.HookedTransformerConfig(**settings | sizes))


def bridge(folder: str) -> Any:
    """TransformerLens's bridge over the tiny GPT-2, which is saved in `folder` for it."""
    package = pytest.importorskip("transformer_lens.model_bridge")
    build("gpt2").save_pretrained(folder)
    return package.TransformerBridge.boot_transformers(folder, hf_model=build("gpt2"), device="cpu")
