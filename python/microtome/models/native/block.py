"""A causal transformer in plain parts: what a sweep needs to run a block on packed rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from microtome.models.native.linear import Linear

Map = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Mlp:
    """neurons = act(x W_in), or act(first half) * second half + shift; out = neurons W_out.

    Attributes:
        into: [d] -> [d_mlp], or [2 d_mlp] with the gate first.
        act: the nonlinearity.
        gated: whether `into` holds a gate.
        out: [d_mlp] -> [d].
        shift: [d_mlp], added to gated neurons, or None.
    """

    into: Linear
    act: Map
    gated: bool
    out: Linear
    shift: Tensor | None = None

    @property
    def width(self) -> int:
        """Neurons."""
        return self.into.out_features // (2 if self.gated else 1)

    def neurons(self, hidden: Tensor) -> Tensor:
        """[T, d_mlp] activations of the [T, *] outputs of `into`."""
        if not self.gated:
            return self.act(hidden)
        gate, up = hidden.chunk(2, dim=-1)
        out = self.act(gate) * up
        return out if self.shift is None else out + self.shift


@dataclass(frozen=True)
class Block:
    """One block: mid = pre + post_attention(attention(norm1(pre))); post = mid + MLP likewise.

    Attributes:
        norm1: before attention.
        qkv: [d] -> queries of all heads, then keys, then values.
        heads, kv_heads, d_head: sizes; query head j reads key head j // (heads / kv_heads).
        scale: of the scores.
        out: [heads * d_head] -> [d].
        norm2, mlp: None in a model of attention alone.
        norm_q, norm_k: over a head's width, before the rotation, or None.
        cos, sin: [t, r] rotation tables of this layer by position, or None.
        interleaved: rotate neighbours (GPT-J) instead of halves.
        softcap: of the scores, 0 for none.
        window: how many positions a query sees, 0 for all.
        post_attention, post_mlp: norms over what is added to the stream, or None.
        parallel: attention and MLP read the same stream.
    """

    norm1: Map
    qkv: Linear
    heads: int
    kv_heads: int
    d_head: int
    scale: float
    out: Linear
    norm2: Map | None
    mlp: Mlp | None
    norm_q: Map | None = None
    norm_k: Map | None = None
    cos: Tensor | None = None
    sin: Tensor | None = None
    interleaved: bool = False
    softcap: float = 0.0
    window: int = 0
    post_attention: Map | None = None
    post_mlp: Map | None = None
    parallel: bool = False

    def split(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[T, *] -> queries [T, h, d_head], keys and values [T, hk, d_head], before rotation."""
        queries = self.heads * self.d_head
        return self.queries(qkv[:, :queries]), *self.keys_values(qkv[:, queries:])

    def queries(self, flat: Tensor) -> Tensor:
        """[T, h * d_head] -> [T, h, d_head]."""
        q = flat.unflatten(-1, (self.heads, self.d_head))
        return q if self.norm_q is None else self.norm_q(q)

    def keys_values(self, flat: Tensor) -> tuple[Tensor, Tensor]:
        """[T, 2 * hk * d_head] -> keys and values, each [T, hk, d_head]."""
        k, v = flat.unflatten(-1, (2, self.kv_heads, self.d_head)).unbind(1)
        return (k if self.norm_k is None else self.norm_k(k)), v

    def rotate(self, x: Tensor, position: Tensor) -> Tensor:
        """Rotate queries or keys [T, h, d_head] to their positions [T], if the model rotates."""
        if self.cos is None or self.sin is None:
            return x
        cos, sin = self.cos[position][:, None], self.sin[position][:, None]  # [T, 1, r]
        r = cos.shape[-1]
        turned = x[..., :r]
        if self.interleaved:
            flipped = torch.stack((-turned[..., 1::2], turned[..., ::2]), -1).flatten(-2)
        else:
            flipped = torch.cat((-turned[..., r // 2 :], turned[..., : r // 2]), -1)
        out = turned * cos + flipped * sin
        return out if r == x.shape[-1] else torch.cat((out, x[..., r:]), -1)


@dataclass(frozen=True)
class Stack:
    """All the blocks and what stands after them.

    Attributes:
        blocks: in order.
        norm: the final norm.
        unembed: [d] -> [vocabulary].
        softcap: of the logits, 0 for none.
        entry: path of the module whose input is the stream before the first block.
    """

    blocks: tuple[Block, ...]
    norm: Map
    unembed: Linear
    softcap: float
    entry: str

    def logits(self, stream: Tensor, columns: Tensor | None = None) -> Tensor:
        """Logits of the final stream.

        Args:
            stream: [T, d].
            columns: [c] int64 token ids to unembed, or None for the whole vocabulary.

        Returns:
            [T, c] or [T, vocabulary].
        """
        hidden = self.norm(stream)
        if columns is None:
            out = self.unembed(hidden)
        else:
            bias = self.unembed.bias
            bias = None if bias is None else bias[columns]
            out = torch.nn.functional.linear(hidden, self.unembed.weight[columns], bias)
        return out if not self.softcap else self.softcap * torch.tanh(out / self.softcap)
