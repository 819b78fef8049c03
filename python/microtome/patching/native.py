"""The fast engine: patched rows through the model's own parts, many in one wave."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from microtome.models.native.plan import Plan
from microtome.models.native.runner import Runner
from microtome.patching.cells import Shape
from microtome.patching.hooked import fingerprint


class KnownModel:
    """What the engines of a known model share: its parts, its prompts and their final stream.

    Args:
        model: the model.
        runner: its verified parts.
        base: [b, t] int64, the prompts that are patched.
        source: [s, t] int64, prompts that values are read from; they are prompts b ... of the run.
        first: [b] and [s] int64, the first position that counts of each.
        stop: [b] int64, one past the last.
        delta: multiply differences in bf16.
        memory: bytes for all activations.

    Attributes:
        tokens: [b + s, t] int64, base prompts first, then source prompts.
        first: [b + s] int64.
        final: [(b + s) * t, d], their stream after the last block.
        shape: of the run.
    """

    name, note, groups = "native", "", 1
    final: Tensor

    def __init__(
        self,
        model: nn.Module,
        runner: Runner,
        base: Tensor,
        source: Tensor,
        first: tuple[Tensor, Tensor],
        stop: Tensor,
        *,
        delta: bool,
        memory: int,
    ) -> None:
        self.runner, self.delta, self.model = runner, delta, model
        self.tokens, self.first = torch.cat((base, source.to(base.device))), torch.cat(first)
        self.shape = self._sized(len(base), first[0], stop)
        self._begin(memory)

    def _begin(self, memory: int) -> None:
        """Run the prompts, and keep what fits."""
        raise NotImplementedError

    def _sized(self, b: int, first: Tensor, stop: Tensor) -> Shape:
        """The shape of a run of b base prompts whose positions first ... stop - 1 count."""
        blocks = self.runner.stack.blocks
        block = blocks[0]
        return Shape(
            layers=len(blocks),
            b=b,
            t=self.tokens.shape[1],
            first=first,
            stop=stop,
            heads=block.heads,
            kv_heads=block.kv_heads,
            d_head=block.d_head,
            d_mlp=block.mlp.width if block.mlp is not None else 0,
            d=block.out.out_features,
        )

    @property
    def vocabulary(self) -> int:
        """Token ids the model knows."""
        return self.runner.stack.unembed.out_features

    def lacks(self, site: str) -> str:
        """Why the model has no sites of this kind, or an empty string."""
        block, name = self.runner.stack.blocks[0], type(self.model).__name__
        if site in ("neurons", "mlp_out") and block.mlp is None:
            return f"{name} has no {site}: its blocks are attention alone"
        if site == "resid_mid" and block.parallel:
            return (
                f"{name} has no resid_mid: its attention and MLP run in parallel, so no stream "
                "lies between them"
            )
        return ""

    def fingerprint(self) -> bytes:
        """Of the prompts, the weights and the precision."""
        return fingerprint(self.model, self.tokens, f"{self.name} {self.delta}")

    def activation(self, layer: int, stage: str) -> Tensor:
        """[(b + s) * t, w]: what base and source prompts have at a stage."""
        raise NotImplementedError

    def trimmed(self, plan: Plan) -> Plan:
        """The plan without the writes that change no bit."""
        return plan.without_unchanged(self.activation, self.shape.t)

    def unpatched(self, prompts: Tensor, slots: Tensor, columns: Tensor | None) -> Tensor:
        """[p, m, c]: logits of some prompts of the run at positions slots [p, m]."""
        with torch.no_grad():
            at = prompts[:, None] * self.shape.t + slots  # [p, m]
            stream = self.final[at.to(self.final.device).flatten()]
            own = None if columns is None else columns.repeat_interleave(slots.shape[1], 0)
            return self.unembedded(stream, own).unflatten(0, tuple(slots.shape))

    def unembedded(self, stream: Tensor, columns: Tensor | None) -> Tensor:
        """[N, d] -> [N, c], each row its own columns [N, c]."""
        stack = self.runner.stack
        if columns is None:
            return stack.logits(stream)
        union, place = columns.to(stream.device).unique(return_inverse=True)
        return stack.logits(stream, union).gather(1, place)


class NativeEngine(KnownModel):
    """Runs plans over b base prompts, with the source prompts beside them in one run.

    An eighth of the memory is the least that patched rows get.
    """

    def _begin(self, memory: int) -> None:
        tokens, first = self.tokens, self.first.int()
        self.run = self.runner.base(self.model, tokens, first, differences=self.delta)
        self.final = self.run.final
        self.memory = max(memory // 8, memory - self.run.nbytes)

    def activation(self, layer: int, stage: str) -> Tensor:
        """[(b + s) * t, w]: what base and source prompts have at a stage."""
        return self.run.site(layer, stage)

    def patched(
        self, plan: Plan, slots: Tensor, columns: Tensor | None
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Run the rows of a trimmed plan.

        Args:
            plan: rows; their prompts are base prompts.
            slots: [b, m] int64, the positions read.
            columns: [b, c] int64 token ids, or None for the vocabulary.

        Yields:
            Row [N], slot [N] and logits [N, c] of what the writes reach; the rest is unpatched.
        """
        first, stop = self.shape.first[:, None], self.shape.stop[:, None]
        readout = torch.zeros(self.run.shape, dtype=torch.bool)
        readout[: self.shape.b].scatter_(1, slots, (slots >= first) & (slots < stop))
        waves = self.runner.waves(self.run, plan, readout, delta=self.delta, memory=self.memory)
        for rows, final in waves:
            row = rows[final.row.cpu()]
            prompt = plan.example[row]
            own = None if columns is None else columns[prompt]
            with torch.no_grad():
                logits = self.unembedded(final.stream, own)
            # A position may be read at several slots.
            at, slot = (final.position.cpu()[:, None] == slots[prompt]).nonzero(as_tuple=True)
            yield row[at], slot, logits[at.to(logits.device)]
