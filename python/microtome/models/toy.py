"""A small GPT-like model and a byte tokenizer, so that everything runs with no package at all."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from microtome import _check
from microtome._seed import generator
from microtome.models.pattern import attention, is_watched


@dataclass(frozen=True)
class ToyConfig:
    """Sizes of a ToyModel; the names are those of a Hugging Face config."""

    vocab_size: int = 256
    hidden_size: int = 64
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    max_position_embeddings: int = 256
    model_type: str = "microtome_toy"


@dataclass(frozen=True)
class ToyOutput:
    """What a ToyModel returns: logits [b, t, vocab_size]."""

    logits: Tensor


class _Attention(nn.Module):
    """Causal attention over h heads."""

    is_causal = True
    asks_is_watched = True  # for models.pattern

    def __init__(self, d: int, h: int) -> None:
        super().__init__()
        self.head_dim = d // h
        self.c_attn = nn.Linear(d, 3 * d)
        self.c_proj = nn.Linear(d, d)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for part in self.c_attn(x).chunk(3, dim=-1)
        )  # [b, h, t, d_head]
        if is_watched(self):
            z, _ = attention(self, q, k, v, None)  # [b, t, h, d_head]
        else:
            z = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
        out: Tensor = self.c_proj(z.flatten(-2))
        return out


class _Block(nn.Module):
    """Pre-norm attention and MLP, named as in GPT-2."""

    def __init__(self, d: int, h: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(d)
        self.attn = _Attention(d, h)
        self.ln_2 = nn.LayerNorm(d)
        self.mlp = nn.Sequential(nn.Linear(d, 4 * d), nn.GELU(), nn.Linear(4 * d, d))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        out: Tensor = x + self.mlp(self.ln_2(x))
        return out


class ToyModel(nn.Module):
    """A GPT-like language model over bytes: the same seed gives the same weights everywhere.

    The weights are random: it exercises every path, and its numbers say nothing about language.

    Args:
        config: sizes.
        seed: of the weights; the global random state is neither read nor moved.

    Raises:
        ArgumentError: hidden_size is no multiple of num_attention_heads, or a size is below 1.
    """

    def __init__(self, config: ToyConfig | None = None, *, seed: int = 0) -> None:
        super().__init__()
        self.config = config = config or ToyConfig()
        d, h = config.hidden_size, config.num_attention_heads
        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "max_position_embeddings"):
            _check.between("ToyModel", name, getattr(config, name), 1, 1 << 30)
        _check.between("ToyModel", "num_attention_heads", h, 1, d, "hidden_size")
        _check.between("ToyModel", "hidden_size modulo num_attention_heads", d % h, 0, 0)
        # Made on the meta device: nn.Linear would draw its weights from the global random state.
        with torch.device("meta"):
            self.wte = nn.Embedding(config.vocab_size, d)
            self.wpe = nn.Embedding(config.max_position_embeddings, d)
            self.h = nn.ModuleList(_Block(d, h) for _ in range(config.num_hidden_layers))
            self.ln_f = nn.LayerNorm(d)
            self.lm_head = nn.Linear(d, config.vocab_size, bias=False)
        self.to_empty(device="cpu")
        self._draw(seed)

    def _draw(self, seed: int) -> None:
        """Matrices from N(0, 1 / inputs), embeddings from N(0, 1), norms one, biases zero."""
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if parameter.dim() == 2:
                    scale = 1.0 if name.startswith("w") else parameter.shape[1] ** -0.5
                    parameter.normal_(0.0, scale, generator=generator(seed, "toy", name))
                else:
                    parameter.fill_(1.0 if name.endswith("weight") else 0.0)

    def get_input_embeddings(self) -> nn.Embedding:
        """The token embedding, by its Hugging Face name."""
        return self.wte

    def forward(self, input_ids: Tensor) -> ToyOutput:
        """Next-token logits of [b, t] int64 ids, t at most config.max_position_embeddings."""
        x = self.wte(input_ids) + self.wpe(
            torch.arange(input_ids.shape[1], device=input_ids.device)
        )
        for block in self.h:
            x = block(x)
        return ToyOutput(self.lm_head(self.ln_f(x)))


class ByteTokenizer:
    """UTF-8 bytes as tokens; the calls used here are those of a Hugging Face tokenizer."""

    vocab_size = 256

    def encode(
        self, text: str, *, add_special_tokens: bool = False, verbose: bool = False
    ) -> list[int]:
        """The bytes of `text`; there are no special tokens."""
        del add_special_tokens, verbose
        return list(text.encode("utf-8"))

    def decode(self, ids: list[int] | Tensor) -> str:
        """Text of some bytes; a character cut in two becomes the replacement character."""
        return bytes(int(i) for i in ids).decode("utf-8", errors="replace")
