"""The wavefront: many patched runs in one pass, each computed only where it differs from the base.

A row joins the packed batch at the layer of its first write and carries the positions from its
first write on; earlier keys and values are the base run's, shared by all rows. In the last block
only the positions that are read ask and go on. Every product, norm and softmax is the one the full
forward computes; rows before the write, and layers below it, are the base run's own. In the delta
form the first token of each row, which differs most, and the positions that are read in the last
block keep float32 products.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from microtome.models.native.base import BaseRun, Layer, attend, project
from microtome.models.native.block import Block
from microtome.models.native.changes import Changes
from microtome.models.native.patterned import patterned
from microtome.models.native.plan import STAGES, Plan
from microtome.models.native.rows import Rows
from microtome.ops import swap_key_attention

MLP_TOKENS = 1024  # taken through the MLP at a time, so that its hidden layer stays in cache


@dataclass(frozen=True)
class Final:
    """The final stream of the rows where it is read.

    Attributes:
        stream: [N, d].
        row: [N] int64, plan row.
        position: [N] int64.
    """

    stream: Tensor
    row: Tensor
    position: Tensor


class Wave:
    """One pass over a plan's rows.

    Args:
        base: the base run they stand on.
        plan: the rows, none of them without a write.
        stop: [n] int64, one past the last position that is read of each row's prompt.
        readout: [b, t] bool, the positions that are read.
        delta: multiply differences in bf16 (needs a base run with differences).
    """

    def __init__(
        self, base: BaseRun, plan: Plan, stop: Tensor, readout: Tensor, *, delta: bool
    ) -> None:
        self.base, self.readout, self.delta = base, readout, delta
        self.at = Changes(base, plan, stop.to(base.final.device))

    def run(self) -> Final:
        """The final stream of every row at the positions that are read."""
        blocks = self.base.stack.blocks
        live: Rows | None = None
        x = self.base.final.new_empty(0, self.base.final.shape[1])
        parts: list[tuple[Rows, Tensor, Tensor]] = []  # of the last block
        for layer, block in enumerate(blocks):
            last = layer == len(blocks) - 1
            swaps = not block.parallel
            mids: list[tuple[Rows, Tensor, Tensor]] = []  # rows, their kept tokens, stream
            posts: list[tuple[Rows, Tensor, Tensor]] = []
            if live is not None:
                x = self.at.write(layer, "resid_pre", live.keys, x)
            joining = self.at.entering(
                layer, "resid_pre", self.at.swaps if swaps else None, take=False
            )
            if joining is not None:
                joined = self.at.join(layer, "resid_pre", joining)
                live = joining if live is None else Rows.cat([live, joining])
                x = torch.cat((x, joined))
            if live is not None:
                mids.append(self.attention(layer, live, "resid_pre", x, last))
            joining = (
                self.at.entering(layer, "resid_pre", self.at.swaps, take=True) if swaps else None
            )
            if joining is not None:
                mids.append(self.swapped(layer, joining, last))
            for stage in STAGES[1:7]:
                joining = self.at.entering(layer, stage)
                if joining is not None:
                    part = self.attention(layer, joining, stage, None, last)
                    if block.parallel:
                        posts.append(self.with_mlp(layer, *part))
                    else:
                        mids.append(part)
            # Before those join that a write to resid_mid brings: theirs is done by joining.
            mids = [
                (rows, keep, self.at.write(layer, "resid_mid", rows.keys[keep], stream))
                for rows, keep, stream in mids
            ]
            joining = self.at.entering(layer, "resid_mid")
            if joining is not None:
                joining = self.late(joining, last)
                mids.append(self.kept(joining, self.at.join(layer, "resid_mid", joining), last))
            for stage in ("neurons", "mlp_out"):
                joining = self.at.entering(layer, stage)
                if joining is not None:
                    joining = self.late(joining, last)
                    posts.append(self.kept(joining, self.from_mlp(layer, joining, stage), last))
            if mids:
                keys, index = tokens_of(mids)
                mid = torch.cat([stream for _, _, stream in mids])
                exact = first_tokens(mids) if self.delta and not last else None
                pre = mid
                if block.parallel:
                    pre = x[mids[0][1]] if last else x
                x = self.mlp(layer, pre, mid, keys, index, exact)
            parts = mids + posts
            if parts:
                live = Rows.cat([rows for rows, _, _ in parts])
                x = torch.cat(([x] if mids else []) + [stream for _, _, stream in posts])
        keys = torch.empty(0, dtype=torch.int64, device=x.device)
        return self.end(x, tokens_of(parts)[0] if parts else keys)

    def end(self, x: Tensor, keys: Tensor) -> Final:
        """Writes past the last block, and the rows that have no other."""
        depth, t = len(self.base.layers), self.base.shape[1]
        x = self.at.write(depth, "resid_pre", keys, x)
        joining = self.at.entering(depth, "resid_pre")
        if joining is not None:
            rows, kept, stream = self.kept(joining, self.at.join(depth, "resid_pre", joining), True)
            x, keys = torch.cat((x, stream)), torch.cat((keys, rows.keys[kept]))
        return Final(x, keys // t, keys % t)

    # Which tokens go on

    def late(self, rows: Rows, last: bool) -> Rows:
        """In the last block, rows from their first position that is read on."""
        if not last:
            return rows
        t = self.base.shape[1]
        position = torch.arange(t, device=rows.start.device)
        read = self.readout[rows.example] & (position >= rows.start[:, None])
        first = torch.where(read.any(1), read.int().argmax(1), rows.stop)
        return rows.narrowed(first)

    def kept(self, rows: Rows, stream: Tensor, last: bool) -> tuple[Rows, Tensor, Tensor]:
        """Rows, the tokens that go on, and their stream."""
        keep = self.reading(rows) if last else torch.arange(rows.tokens, device=stream.device)
        return rows, keep, stream[keep] if last else stream

    def reading(self, rows: Rows) -> Tensor:
        """[q] int64, the tokens at positions that are read."""
        return self.readout[rows.example[rows.row], rows.position.long()].nonzero().flatten()

    # The halves of a block

    def attention(
        self, layer: int, rows: Rows, enter: str, x: Tensor | None, last: bool
    ) -> tuple[Rows, Tensor, Tensor]:
        """Rows through the attention of a block.

        Args:
            layer: which.
            rows: either live ones (enter = "resid_pre", x their stream) or rows that join at a
                stage within attention, whose earlier activations are the base run's.
            enter: the stage they come from.
            x: [T, d] or None.
            last: keep only the tokens that are read.

        Returns:
            The rows, the tokens kept, and the stream after attention [kept, d].
        """
        block, kept = self.base.stack.blocks[layer], self.base.layers[layer]
        if x is None and enter in ("z", "attn_out"):
            rows = self.late(rows, last)
        keep = self.reading(rows) if last else None
        stream = kept.pre[rows.index] if x is None else x
        stream = stream if keep is None else stream[keep]
        index = rows.index if keep is None else rows.index[keep]
        keys = rows.keys if keep is None else rows.keys[keep]
        every = torch.arange(rows.tokens, device=stream.device) if keep is None else keep
        if enter == "attn_out":
            joined = self.at.join(layer, "attn_out", rows)
            return rows, every, stream + (joined if keep is None else joined[keep])
        if enter == "z":
            z = self.at.join(layer, "z", rows)
            z = z if keep is None else z[keep]
        else:
            z = self.heads(layer, rows, enter, x, keep)
            z = self.at.write(layer, "z", keys, z)
        base = kept.out_base(index, rows.offset) if self.delta and keep is None else None
        if block.post_attention is None and not self.at.touched(layer, "attn_out", rows):
            return rows, every, block.out(z, add=stream, base=base)
        out = block.out(z, base=base)
        out = out if block.post_attention is None else block.post_attention(out)
        return rows, every, stream + self.at.write(layer, "attn_out", keys, out)

    def heads(
        self, layer: int, rows: Rows, enter: str, x: Tensor | None, keep: Tensor | None
    ) -> Tensor:
        """[T or kept, h * d_head]: what the heads give, before the output projection."""
        block, kept = self.base.stack.blocks[layer], self.base.layers[layer]
        asking = rows.index if keep is None else rows.index[keep]
        if enter == "pattern":
            z = kept.z[asking]
            return patterned(self.base, self.at, layer, rows, keep, z, None)
        if x is not None:
            q, k, v = project(self.base, layer, rows, x, keep, delta=self.delta)
        else:
            q, k, v = (
                self.at.join(layer, stage, rows).unflatten(-1, (-1, block.d_head))
                for stage in "qkv"
            )
            q = q if keep is None else q[keep]
        if x is not None:
            keys = rows.keys if keep is None else rows.keys[keep]
            q, k, v = (
                self.at.write(layer, stage, at, y.flatten(1)).unflatten(-1, (-1, block.d_head))
                if self.at.touched(layer, stage, rows)
                else y
                for stage, at, y in (("q", keys, q), ("k", rows.keys, k), ("v", rows.keys, v))
            )
        positions = rows.position if keep is None else rows.position[keep]
        q, k = block.rotate(q, positions), block.rotate(k, rows.position)
        shared = tuple(y.unflatten(0, self.base.shape) for y in (kept.k_turned, kept.v))
        z, _ = attend(
            block, q, k, v, (shared[0], shared[1]), rows.ragged(keep), positions, self.base.first
        )
        z = z.flatten(1)
        if self.at.touched(layer, "pattern", rows):
            z = patterned(self.base, self.at, layer, rows, keep, z, (q, k, v))
        return z

    def swapped(self, layer: int, rows: Rows, last: bool) -> tuple[Rows, Tensor, Tensor]:
        """Rows that replace one position of the stream: of every softmax one key changes."""
        block, kept = self.base.stack.blocks[layer], self.base.layers[layer]
        stream = self.at.join(layer, "resid_pre", rows)
        q, k, v = block.split(block.qkv(block.norm1(stream[rows.offset])))
        q, k = block.rotate(q, rows.start), block.rotate(k, rows.start)
        held = (
            kept.z.unflatten(-1, (block.heads, -1)),
            kept.lse,
            kept.q_turned,
            kept.k_turned,
            kept.v,
        )
        z = swap_key_attention(
            *(y.unflatten(0, self.base.shape) for y in held),
            q.contiguous(),
            k.contiguous(),
            v.contiguous(),
            rows.cut(),
            self.base.first,
            block.scale,
            block.softcap,
            block.window,
            total=rows.tokens,
        ).flatten(1)
        keep = self.reading(rows) if last else torch.arange(rows.tokens, device=z.device)
        if last:
            z, stream = z[keep], stream[keep]
        out = kept.out_base(rows.index, rows.offset) if self.delta and not last else None
        if block.post_attention is None:
            return rows, keep, block.out(z, add=stream, base=out)
        return rows, keep, stream + block.post_attention(block.out(z, base=out))

    def mlp(
        self,
        layer: int,
        x: Tensor,
        add: Tensor,
        keys: Tensor,
        index: Tensor,
        exact: Tensor | None,
    ) -> Tensor:
        """add + MLP(norm2(x)) of live tokens, with their writes to neurons and mlp_out.

        In the delta form `exact` [T] bool are the tokens in float32; None is all of them.
        """
        block, kept = self.base.stack.blocks[layer], self.base.layers[layer]
        if block.mlp is None or block.norm2 is None:
            return add
        plain = block.post_mlp is None and (layer, "mlp_out") not in self.at.writes
        out = torch.empty_like(add)
        for low in range(0, len(x), MLP_TOKENS):
            part = slice(low, low + MLP_TOKENS)
            first = second = None
            if exact is not None:
                own = exact[part].nonzero().flatten()
                first, second = kept.mlp_bases(index[part], own)
            hidden = block.mlp.into(block.norm2(x[part]), base=first)
            neurons = self.at.write(layer, "neurons", keys[part], block.mlp.neurons(hidden))
            if plain:
                out[part] = block.mlp.out(neurons, add=add[part], base=second)
            else:
                more = self.after_mlp(block, block.mlp.out(neurons, base=second))
                out[part] = add[part] + self.at.write(layer, "mlp_out", keys[part], more)
        return out

    def from_mlp(self, layer: int, rows: Rows, stage: str) -> Tensor:
        """[T, d]: the stream after a block of rows whose first write is to its MLP."""
        block, kept = self.base.stack.blocks[layer], self.base.layers[layer]
        return kept.mid[rows.index] + self.mlp_of(block, kept, layer, rows, stage)

    def mlp_of(self, block: Block, kept: Layer, layer: int, rows: Rows, stage: str) -> Tensor:
        """[T, d]: what the MLP adds to rows that changed nothing of it but by writes."""
        if stage == "mlp_out":
            return self.at.join(layer, "mlp_out", rows)
        assert block.mlp is not None
        delta = self.delta and layer < len(self.base.layers) - 1
        second = kept.mlp_bases(rows.index, rows.offset)[1] if delta else None
        out = block.mlp.out(self.at.join(layer, "neurons", rows), base=second)
        return self.at.write(layer, "mlp_out", rows.keys, self.after_mlp(block, out))

    @staticmethod
    def after_mlp(block: Block, out: Tensor) -> Tensor:
        """The post-norm, where there is one."""
        return out if block.post_mlp is None else block.post_mlp(out)

    def with_mlp(
        self, layer: int, rows: Rows, keep: Tensor, stream: Tensor
    ) -> tuple[Rows, Tensor, Tensor]:
        """In a parallel block: rows that joined within attention, and the MLP beside it."""
        block, kept = self.base.stack.blocks[layer], self.base.layers[layer]
        if block.mlp is None:
            return rows, keep, stream
        stage = "neurons" if self.at.touched(layer, "neurons", rows) else "mlp_out"
        return rows, keep, stream + self.mlp_of(block, kept, layer, rows, stage)[keep]


def first_tokens(parts: list[tuple[Rows, Tensor, Tensor]]) -> Tensor:
    """[T] bool, the first token of each row, of parts that kept all tokens."""
    out = []
    for rows, _, _ in parts:
        first = torch.zeros(rows.tokens, dtype=torch.bool, device=rows.ids.device)
        first[rows.offset] = True
        out.append(first)
    return torch.cat(out)


def tokens_of(parts: list[tuple[Rows, Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Keys and base tokens of what each part kept, one part after another."""
    keys = torch.cat([rows.keys[keep] for rows, keep, _ in parts])
    return keys, torch.cat([rows.index[keep] for rows, keep, _ in parts])
