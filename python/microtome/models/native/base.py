"""The base run: one pass over whole prompts that keeps what patched rows stand on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from microtome.models.native.block import Block, Stack
from microtome.models.native.linear import Base
from microtome.models.native.rows import Rows
from microtome.ops import cascade_attention


@dataclass(frozen=True)
class Layer:
    """One layer of a base run of b prompts of t tokens, r = b * t tokens in all.

    Attributes:
        pre, mid: [r, d], the residual stream before attention and before the MLP.
        qkv: [r, *], the packed queries, keys and values as the projection gave them.
        q, k, v: [r, h, d_head] and [r, hk, d_head] before rotation.
        q_turned, k_turned: the same after it.
        z: [r, h * d_head], the heads' outputs; lse: [r, h], log of the softmax's sum.
        attn, mlp: [r, d], outputs of the two output projections.
        attn_out, mlp_out: the same after a post-norm: what is added to the stream.
        neurons: [r, d_mlp]; None in a model of attention alone, as mlp and mlp_out.
        normed1, normed2, hidden: inputs of qkv and of the MLP, and its first product; kept for
            differences only, else None.
    """

    pre: Tensor
    mid: Tensor
    qkv: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    q_turned: Tensor
    k_turned: Tensor
    z: Tensor
    lse: Tensor
    attn: Tensor
    attn_out: Tensor
    neurons: Tensor | None
    mlp: Tensor | None
    mlp_out: Tensor | None
    normed1: Tensor | None = None
    normed2: Tensor | None = None
    hidden: Tensor | None = None

    def site(self, stage: str) -> Tensor:
        """The [r, w] activation that a write at `stage` changes (not pattern, see `pattern`)."""
        name = {"resid_pre": "pre", "resid_mid": "mid"}.get(stage, stage)
        found: Tensor = getattr(self, name)
        return found.flatten(1)

    def qkv_base(self, index: Tensor, exact: Tensor) -> Base | None:
        """The base of the fused projection under rows that stand on tokens `index`."""
        return None if self.normed1 is None else Base(self.normed1, self.qkv, index, exact)

    def out_base(self, index: Tensor, exact: Tensor) -> Base | None:
        """The base of the attention's output projection."""
        return None if self.normed1 is None else Base(self.z, self.attn, index, exact)

    def mlp_bases(self, index: Tensor, exact: Tensor) -> tuple[Base | None, Base | None]:
        """The bases of the MLP's two products."""
        if self.normed2 is None or self.hidden is None:
            return None, None
        assert self.neurons is not None
        assert self.mlp is not None
        into = Base(self.normed2, self.hidden, index, exact)
        return into, Base(self.neurons, self.mlp, index, exact)


@dataclass(frozen=True)
class BaseRun:
    """A base run of several prompts.

    Attributes:
        stack: the model in parts.
        layers: in order.
        final: [r, d], the stream after the last block.
        shape: (b, t).
        first: [b] int32, the first position that counts (left padding lies before it).
    """

    stack: Stack
    layers: tuple[Layer, ...]
    final: Tensor
    shape: tuple[int, int]
    first: Tensor

    @property
    def nbytes(self) -> int:
        """Memory that the kept activations take; views of one tensor count once."""
        kept = {self.final.untyped_storage().data_ptr(): self.final.untyped_storage().nbytes()}
        for layer in self.layers:
            for value in vars(layer).values():
                if isinstance(value, Tensor):
                    storage = value.untyped_storage()
                    kept[storage.data_ptr()] = storage.nbytes()
        return sum(kept.values())

    def site(self, layer: int, stage: str) -> Tensor:
        """[r, w]: the activation at a stage; resid_pre of layer L is the final stream."""
        if layer == len(self.layers):
            return self.final
        if stage == "pattern":
            return self.pattern(layer).flatten(1)
        return self.layers[layer].site(stage)

    def pattern(self, layer: int) -> Tensor:
        """[r, h, t]: attention of each token's heads over the positions of its prompt."""
        block, kept, (b, t) = self.stack.blocks[layer], self.layers[layer], self.shape
        q = kept.q_turned.unflatten(0, (b, t)).transpose(1, 2)  # [b, h, t, d_head]
        k = kept.k_turned.unflatten(0, (b, t)).transpose(1, 2)
        position = torch.arange(t, device=q.device)
        return (
            softmax_scores(block, q, k, position, position, self.first)
            .transpose(1, 2)
            .flatten(0, 1)
        )


def softmax_scores(
    block: Block, q: Tensor, k: Tensor, q_position: Tensor, k_position: Tensor, first: Tensor
) -> Tensor:
    """Explicit attention pattern: q [b, h, m, d_head], k [b, hk, t, d_head] -> [b, h, m, t].

    A query without a key it may see gets zeros.
    """
    k = k.repeat_interleave(block.heads // block.kv_heads, dim=1)
    scores = block.scale * (q @ k.transpose(-1, -2))
    if block.softcap:
        scores = block.softcap * torch.tanh(scores / block.softcap)
    seen = k_position[None, :] <= q_position[:, None]
    if block.window:
        seen = seen & (k_position[None, :] > q_position[:, None] - block.window)
    allowed = seen[None] & (k_position[None, None, :] >= first[:, None, None])
    scores = scores.masked_fill(~allowed[:, None], -torch.inf)
    return torch.softmax(scores, -1).nan_to_num(0.0)


def attend(
    block: Block,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    base: tuple[Tensor, Tensor],
    rows: Tensor,
    positions: Tensor,
    first: Tensor,
) -> tuple[Tensor, Tensor]:
    """`cascade_attention` with a block's settings."""
    return cascade_attention(
        q, k, v, base[0], base[1], rows, positions, first, block.scale, block.softcap, block.window
    )


def project(
    base: BaseRun, layer: int, rows: Rows, x: Tensor, keep: Tensor | None, *, delta: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries of the tokens kept, keys and values of all, before rotation.

    Args:
        base: the base run that the rows differ from.
        layer: which.
        rows: whose tokens these are.
        x: [T, d], their stream.
        keep: [q] int64, the tokens that ask, or None for all.
        delta: multiply differences in bf16.
    """
    block, kept = base.stack.blocks[layer], base.layers[layer]
    hidden = block.norm1(x)
    under = kept.qkv_base(rows.index, rows.offset) if delta else None
    if keep is None:
        return block.split(block.qkv(hidden, base=under))
    cut, end = block.heads * block.d_head, block.qkv.out_features
    if under is not None:
        under = Base(under.x, under.y[:, cut:].contiguous(), under.index, under.exact)
    q = block.queries(block.qkv.columns(0, cut)(hidden[keep]))
    return q, *block.keys_values(block.qkv.columns(cut, end)(hidden, base=under))


def run_base(stack: Stack, entry: Tensor, first: Tensor, *, differences: bool) -> BaseRun:
    """Run prompts through the blocks and keep what patched rows read.

    Args:
        stack: the model in parts.
        entry: [b, t, d], the stream before the first block.
        first: [b] int32, the first position that counts.
        differences: keep the inputs of every product too, for the delta form.

    Returns:
        The kept run: about (10 d + 3 d_mlp) floats a token and layer, and with differences
        2 d + d_mlp more.
    """
    b, t, d = entry.shape
    x = entry.reshape(b * t, d)
    device = x.device
    positions = torch.arange(t, device=device, dtype=torch.int32).repeat(b)
    at = torch.arange(b, device=device, dtype=torch.int32)
    zero, full = torch.zeros_like(at), torch.full_like(at, t)
    rows = torch.stack((at, zero, at * t, full, at * t, full), 1)
    layers = []
    for block in stack.blocks:
        normed1 = block.norm1(x)
        qkv = block.qkv(normed1)
        q, k, v = block.split(qkv)
        q_turned, k_turned = block.rotate(q, positions), block.rotate(k, positions)
        none = k_turned.new_empty(b, 0, *k_turned.shape[1:]), v.new_empty(b, 0, *v.shape[1:])
        z, lse = attend(block, q_turned, k_turned, v, none, rows, positions, first)
        z = z.flatten(1)
        attn = block.out(z)
        attn_out = attn if block.post_attention is None else block.post_attention(attn)
        mid = x + attn_out
        neurons = mlp = mlp_out = normed2 = hidden = None
        post = mid
        if block.mlp is not None and block.norm2 is not None:
            normed2 = block.norm2(x if block.parallel else mid)
            hidden = block.mlp.into(normed2)
            neurons = block.mlp.neurons(hidden)
            mlp = block.mlp.out(neurons)
            mlp_out = mlp if block.post_mlp is None else block.post_mlp(mlp)
            post = mid + mlp_out
        kept = (normed1, normed2, hidden) if differences else (None, None, None)
        layers.append(
            Layer(
                x,
                mid,
                qkv,
                q,
                k,
                v,
                q_turned,
                k_turned,
                z,
                lse,
                attn,
                attn_out,
                neurons,
                mlp,
                mlp_out,
                *kept,
            )
        )
        x = post
    return BaseRun(stack, tuple(layers), x, (b, t), first)


def bytes_kept(stack: Stack, *, differences: bool) -> int:
    """Memory that a base run takes for one token, beside what one block needs for the moment."""
    floats = stack.blocks[0].out.out_features  # the stream after the last block
    for block in stack.blocks:
        d, heads = block.out.out_features, block.heads * block.d_head
        keys = block.kv_heads * block.d_head
        floats += 3 * d + block.qkv.out_features + heads + block.heads
        normed = heads * (block.norm_q is not None) + keys * (block.norm_k is not None)
        turned = (heads + keys) * (block.cos is not None)
        floats += normed + turned + d * (block.post_attention is not None)
        if block.mlp is not None:
            floats += block.mlp.width + d + d * (block.post_mlp is not None)
        if differences:
            floats += d + (0 if block.mlp is None else d + block.mlp.into.out_features)
    return floats * stack.unembed.weight.element_size()
