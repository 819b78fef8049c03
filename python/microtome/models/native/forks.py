"""Many runs that part from each other: every stretch that some of them share is computed once.

A wave's rows each stand on the base run alone. Here a run stands on the base run up to the first
place where a player is absent, and from there on with all runs that agree with it; it is computed
by itself only after the place where it parts from the last of them. All runs carry the same
positions of each prompt, so that the runs are [n, N, d], N tokens of the prompts one after another.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from microtome.models.native.base import BaseRun, attend, project
from microtome.models.native.block import Block
from microtome.models.native.linear import Base, Linear
from microtome.models.native.rows import Rows
from microtome.models.native.tree import Level
from microtome.models.native.wave import MLP_TOKENS

# (token of the base run that each packed one stands on, those to multiply in float32)
Under = Callable[[Tensor, Tensor], Base | None]


class Forks:
    """Runs of a tree of coalitions on some prompts.

    Args:
        base: the base run.
        levels: of the tree, at least one.
        prompts: [b'] int64, which prompts of the base run.
        start, stop: [b'] int64, the positions of each that are carried, at least one.
        readout: [b, t] bool, the positions that are read.
        delta: multiply differences in bf16 (needs a base run with differences).
    """

    def __init__(
        self,
        base: BaseRun,
        levels: list[Level],
        prompts: Tensor,
        start: Tensor,
        stop: Tensor,
        readout: Tensor,
        *,
        delta: bool,
    ) -> None:
        self.base, self.delta = base, delta
        self.device = base.final.device
        self.levels = {(level.place.layer, level.place.stage): level for level in levels}
        self.prompts, self.start, self.stop = prompts, start, stop
        one = self.rows(1)
        self.tokens = one.index.long()  # [N], of the base run
        self.reads = readout.to(self.device).flatten()[self.tokens].nonzero().flatten()
        self.nodes = torch.empty(0, dtype=torch.int64)  # live ones, in order
        self.where = torch.full((1,), -1)  # node -> its place among the live ones

    def rows(self, n: int) -> Rows:
        """The packed tokens of n runs."""
        parts = (part.repeat(n).to(self.device) for part in (self.prompts, self.start, self.stop))
        prompts, start, stop = parts
        ids = torch.arange(len(prompts), device=self.device)
        return Rows(ids, prompts, start, stop, self.base.shape[1])

    def run(self) -> tuple[Tensor, Tensor, Tensor]:
        """Run everything.

        Returns:
            nodes [n] int64 of the last level that differ from the base run; their final stream
            [n, N', d] at the positions that are read; and [N'] int64, these tokens of the base run.
        """
        blocks = self.base.stack.blocks
        x = self.base.final.new_empty(0, len(self.tokens), self.base.final.shape[1])
        for layer, block in enumerate(blocks):
            last = layer == len(blocks) - 1
            x = self.stream(layer, "resid_pre", x)
            x, pre = self.attention(layer, block, x, last)
            x = self.stream(layer, "resid_mid", x)
            x = self.mlp(layer, block, x, pre, last)
        x = self.stream(len(blocks), "resid_pre", x)
        return self.nodes, x, self.tokens

    # Forking

    def stream(self, layer: int, stage: str, x: Tensor) -> Tensor:
        """The stream, forked if players lie there."""
        if (layer, stage) not in self.levels:
            return x
        return self.fork(layer, stage, x, None, {})[0]

    def fork(
        self, layer: int, stage: str, own: Tensor, at: Tensor | None, carried: dict[str, Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """Let the live runs part at a place, and those join that leave the base run there.

        Args:
            layer: of the place.
            stage: likewise.
            own: [c, N, w], the activation there of some live runs.
            at: [n] int64, which of these a run has; None for each its own.
            carried: other tensors of the live runs [n, N, w'], by the stage they are at.

        Returns:
            The activation of the runs after the place, and what is carried, in their order.
        """
        level = self.levels[layer, stage]
        kids = level.touched.nonzero().flatten()
        parent = self.where[level.parent[kids]]
        # Those that join first.
        order = torch.cat(((parent < 0).nonzero().flatten(), (parent >= 0).nonzero().flatten()))
        kids, parent = kids[order], parent[order]
        joins = int((parent < 0).sum())
        change, present = level.place.change, level.present[kids]
        base = self.base.site(layer, stage)[self.tokens][None]
        parts = []
        if joins:
            zero = torch.zeros(joins, dtype=torch.int64)
            parts.append(change(base, zero, present[:joins], self.tokens, joins=True))
        if joins < len(kids):
            of = parent[joins:] if at is None else at[parent[joins:]]
            own = own if len(own) else base  # nothing of it is kept then
            parts.append(change(own, of, present[joins:], self.tokens, joins=False))
        if not parts:  # everybody is in so far
            parts.append(base[:0])
        new = torch.cat(parts) if len(parts) > 1 else parts[0]
        moved = [
            self._spread(x, self.base.site(layer, name), parent[joins:], joins)
            for name, x in carried.items()
        ]
        self.nodes = kids
        self.where = torch.full((len(level.parent),), -1)
        self.where[kids] = torch.arange(len(kids))
        return new, moved

    def _spread(self, x: Tensor, base: Tensor, parent: Tensor, joins: int) -> Tensor:
        """[m, N, w]: the base run's rows for those that join, then each one's parent's."""
        out = x.new_empty(joins + len(parent), *x.shape[1:])
        out[:joins] = base[self.tokens]
        if len(parent):
            torch.index_select(x, 0, parent.to(x.device), out=out[joins:])
        return out

    def asked(self, layer: int, stage: str) -> tuple[Tensor, Tensor]:
        """Which live runs need their own activation at a place, and where it then is.

        One whose every fork replaces it whole does not.

        Returns:
            [c] int64 live runs, and [n] int64 the place of each live run among them (0 for none).
        """
        n = len(self.nodes)
        level = self.levels[layer, stage]
        wants = torch.ones(n, dtype=torch.bool)
        if not level.place.change.keeps:
            nodes = torch.zeros(len(self.where), dtype=torch.bool)
            nodes[level.parent[level.present.any(1)]] = True
            wants = nodes[self.nodes]
        return wants.nonzero().flatten(), (wants.cumsum(0) - 1).clamp_min(0)

    # The halves of a block

    def attention(
        self, layer: int, block: Block, x: Tensor, last: bool
    ) -> tuple[Tensor, Tensor | None]:
        """The stream after attention, and before it where a parallel MLP reads that.

        In the last block only the tokens that are read go on.
        """
        stage = next((s for s in ("z", "attn_out") if (layer, s) in self.levels), None)
        reads = self.reads if last else None
        if stage is None:
            some, at = torch.arange(len(x)), torch.arange(len(x))
        else:
            some, at = self.asked(layer, stage)
        z = self.heads(layer, block, x if len(some) == len(x) else x[some.to(x.device)], reads)
        if last:
            x = x[:, self.reads]
            self.tokens = self.tokens[self.reads]
        pre = x if block.parallel else None
        if stage == "z":
            z, (x,) = self.fork(layer, "z", z, at, {"resid_pre": x})
            pre, at = x if block.parallel else None, torch.arange(len(x))
        under = None if last else self.base.layers[layer].out_base
        if (layer, "attn_out") not in self.levels and block.post_attention is None:
            return self.apply(block.out, z, under, add=x), pre
        out = self.apply(block.out, z, under)
        if block.post_attention is not None:
            out = block.post_attention(out)
        if (layer, "attn_out") in self.levels:
            out, (x,) = self.fork(layer, "attn_out", out, at, {"resid_pre": x})
            pre = x if block.parallel else None
        return x + out, pre

    def heads(self, layer: int, block: Block, x: Tensor, reads: Tensor | None) -> Tensor:
        """[c, N or reads, h * d_head]: what the heads give, before the output projection."""
        c, N = x.shape[:2]
        width = block.heads * block.d_head
        asking = N if reads is None else len(reads)
        if c == 0 or asking == 0:
            return x.new_empty(c, asking, width)
        rows, kept = self.rows(c), self.base.layers[layer]
        keep = None
        if reads is not None:
            keep = (torch.arange(c, device=x.device)[:, None] * N + reads).flatten()
        q, k, v = project(self.base, layer, rows, x.flatten(0, 1), keep, delta=self.delta)
        positions = rows.position if keep is None else rows.position[keep]
        q, k = block.rotate(q, positions), block.rotate(k, rows.position)
        shared = tuple(y.unflatten(0, self.base.shape) for y in (kept.k_turned, kept.v))
        z, _ = attend(
            block, q, k, v, (shared[0], shared[1]), rows.ragged(keep), positions, self.base.first
        )
        return z.reshape(c, asking, width)

    def mlp(self, layer: int, block: Block, mid: Tensor, pre: Tensor | None, last: bool) -> Tensor:
        """The stream after the MLP, which reads `pre` if it is given, else mid."""
        if block.mlp is None or block.norm2 is None:
            return mid
        stage = next((s for s in ("neurons", "mlp_out") if (layer, s) in self.levels), None)
        x = mid if pre is None else pre
        if stage is None:
            return self.through(layer, block, x, mid, last)
        some, at = self.asked(layer, stage)
        x = x[some.to(x.device)]
        if stage == "mlp_out":
            out = self.through(layer, block, x, None, last)
        else:
            neurons = self.neurons(layer, block, x, last)
            neurons, (mid,) = self.fork(layer, "neurons", neurons, at, {"resid_mid": mid})
            at = torch.arange(len(neurons))
            out = self.down(layer, block, neurons, None, last)
        if (layer, "mlp_out") in self.levels:
            out, (mid,) = self.fork(layer, "mlp_out", out, at, {"resid_mid": mid})
        return mid + out

    def through(
        self, layer: int, block: Block, x: Tensor, add: Tensor | None, last: bool
    ) -> Tensor:
        """(add +) MLP(norm2(x)), [n, N, d], a piece at a time that stays in the cache."""
        out = torch.empty_like(x)
        step = max(1, MLP_TOKENS // x.shape[1])
        for low in range(0, len(x), step):
            part = slice(low, low + step)
            neurons = self.neurons(layer, block, x[part], last)
            out[part] = self.down(layer, block, neurons, None if add is None else add[part], last)
        return out

    def neurons(self, layer: int, block: Block, x: Tensor, last: bool) -> Tensor:
        """[n, N, d_mlp] of the stream that the MLP reads."""
        assert block.mlp is not None
        assert block.norm2 is not None
        kept = self.base.layers[layer]
        under = None if last else lambda *where: kept.mlp_bases(*where)[0]
        return block.mlp.neurons(self.apply(block.mlp.into, block.norm2(x), under))

    def down(
        self, layer: int, block: Block, neurons: Tensor, add: Tensor | None, last: bool
    ) -> Tensor:
        """(add +) what the MLP makes of its neurons."""
        assert block.mlp is not None
        kept = self.base.layers[layer]
        under = None if last else lambda *where: kept.mlp_bases(*where)[1]
        if block.post_mlp is None:
            return self.apply(block.mlp.out, neurons, under, add=add)
        out = block.post_mlp(self.apply(block.mlp.out, neurons, under))
        return out if add is None else add + out

    def apply(
        self, linear: Linear, x: Tensor, under: Under | None, *, add: Tensor | None = None
    ) -> Tensor:
        """linear(x) (+ add) of [n, N, w]; `under` makes the base of the delta form."""
        n, N = x.shape[:2]
        if n == 0:
            return x.new_empty(0, N, linear.out_features)
        base = None
        if self.delta and under is not None:
            rows = self.rows(n)
            base = under(rows.index, rows.offset)
        flat = None if add is None else add.flatten(0, 1)
        return linear(x.flatten(0, 1), add=flat, base=base).unflatten(0, (n, N))
