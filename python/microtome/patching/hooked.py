"""The general engine: any model, its own forward, many cells as rows of one batch.

Where the model is a list of blocks, those below the patch are not run: their place is taken by the
base run's stream. That this gives the model's own output is verified once, before it is used.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from microtome.errors import SiteError
from microtome.models.capture import call, capture
from microtome.models.families import family_of
from microtome.models.native.plan import STAGES, Plan
from microtome.models.sites import canonical
from microtome.models.splice import splice
from microtome.ops import patch_rows
from microtome.patching.cells import HEADED, Shape

TOLERANCE = 1e-4  # of the largest logit


class HookEngine:
    """Runs plans through a model's own forward.

    Args:
        op: name for messages.
        model: any nn.Module with a list of blocks.
        base, source: [b, t] and [s, t] int64.
        span: first and one past the last position that counts, each [b].
        mask: [b, t] or None, of both.
        memory: bytes for the activations of a batch.
        skip: try to leave out the blocks below a patch.

    Raises:
        SiteError: the model has no list of blocks.
    """

    def __init__(
        self,
        op: str,
        model: nn.Module,
        base: Tensor,
        source: Tensor,
        span: tuple[Tensor, Tensor],
        mask: Tensor | None,
        *,
        memory: int,
        skip: bool,
    ) -> None:
        self.op, self.model, self.memory = op, model, memory
        self.tokens = torch.cat((base, source.to(base.device)))
        same = mask is not None and len(source) == len(base)
        self.mask = mask
        if mask is not None:
            self.mask = torch.cat((mask, mask if same else torch.ones_like(source).to(mask)))
        self.path, self.blocks = find_blocks(op, model)
        self.known = set(canonical(op, model)) if family_of(model) is not None else set()
        self._held: dict[str, list[Tensor]] = {}
        self.shape = self._shape(len(base), span)
        self.note = ""
        self.name = "forwards"
        if skip:
            self.note = self._why_not_skip()
            self.name = "forwards" if self.note else "blocks"

    @property
    def vocabulary(self) -> int:
        """Token ids the model knows."""
        return int(self.unpatched(torch.zeros(1).long(), torch.zeros(1, 1).long(), None).shape[-1])

    def has(self, site: str) -> bool:
        """Whether the model has sites of this kind."""
        return self._name(site, 0) is not None

    def fingerprint(self) -> bytes:
        """Of the prompts and the weights."""
        return fingerprint(self.model, self.tokens, self.name)

    def activation(self, layer: int, stage: str) -> Tensor:
        """[(b + s) * t, w]: what base and source prompts have at a stage."""
        if layer == self.shape.layers:
            layer, stage = layer - 1, "resid_post"
        if stage not in self._held:
            names = [self._site(stage, at) for at in range(self.shape.layers)]
            found = capture(self.model, names, self.tokens, attention_mask=self.mask)
            self._held[stage] = [packed(stage, found[name]) for name in names]
        return self._held[stage][layer]

    def trimmed(self, plan: Plan) -> Plan:
        """The plan without the writes that change no bit."""
        return plan.without_unchanged(self.activation, self.shape.t)

    def unpatched(self, prompts: Tensor, slots: Tensor, columns: Tensor | None) -> Tensor:
        """[p, m, c]: logits of some prompts of the run at positions slots [p, m]."""
        parts = []
        for some in prompts.split(self._rows()):
            logits = self._logits(some)
            parts.append(
                chosen(
                    logits, slots[: len(some)], None if columns is None else columns[: len(some)]
                )
            )
            slots, columns = slots[len(some) :], None if columns is None else columns[len(some) :]
        return torch.cat(parts)

    def patched(
        self, plan: Plan, slots: Tensor, columns: Tensor | None
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Run the rows of a trimmed plan; see NativeEngine.patched."""
        entry, _ = plan.entries()
        layer = torch.where(entry < 0, -1, entry // len(STAGES))
        for at in layer[layer >= 0].unique().tolist():
            for rows in (layer == at).nonzero().flatten().split(self._rows()):
                logits = self._run(plan.take(rows), min(at, self.shape.layers - 1))
                prompt = plan.example[rows]
                own = None if columns is None else columns[prompt]
                m = slots.shape[1]
                new = chosen(logits, slots[prompt], own)
                yield (
                    rows.repeat_interleave(m),
                    torch.arange(m).repeat(len(rows)),
                    new.flatten(0, 1),
                )

    def _run(self, plan: Plan, start: int) -> Tensor:
        """[r, t, vocabulary]: a forward with one row for each row of the plan."""
        keys = plan.writes.layer * len(STAGES) + plan.writes.stage
        with ExitStack() as stack:
            if self.name == "blocks" and start > 0:
                stream = self.activation(start, "resid_pre").unflatten(0, (-1, self.shape.t))
                stack.enter_context(self._skipped(start, stream[plan.example]))
            for key in keys.unique().tolist():
                at, stage = key // len(STAGES), STAGES[key % len(STAGES)]
                writes = plan.writes.select(keys == key)
                name = (
                    self._site(stage, at)
                    if at < self.shape.layers
                    else self._site("resid_post", at - 1)
                )
                sources = plan.sources.get((at, stage))

                def visit(
                    x: Tensor, w: Any = writes, stage: str = stage, s: Any = sources
                ) -> Tensor:
                    held = packed(stage, x).unflatten(0, (len(x), -1))  # [r, t, w]
                    table = torch.stack((w.row, w.position, w.lo, w.hi, w.source, w.op), 1)
                    cut = torch.arange(len(x))[:, None] * torch.tensor([1, 0, 0])
                    cut[:, 2] = held.shape[1]
                    s = held.new_empty(0, held.shape[2]) if s is None else s
                    new = patch_rows(
                        held.float() if held.dtype != torch.float64 else held,
                        s.to(held.dtype).float() if held.dtype != torch.float64 else s,
                        cut.int().to(x.device),
                        table.int().to(x.device),
                        w.factor.to(
                            x.device,
                            torch.float64 if held.dtype == torch.float64 else torch.float32,
                        ),
                    )
                    return unpacked(stage, new.to(x.dtype), x)

                stack.enter_context(splice(self.model, name, visit))
            return self._logits(plan.example)

    def _logits(self, prompts: Tensor) -> Tensor:
        """[p, t, vocabulary] in eval mode, without gradients."""
        mask = None if self.mask is None else self.mask[prompts]
        training = [module for module in self.model.modules() if module.training]
        self.model.eval()
        try:
            with torch.no_grad():
                out = call(self.model, self.tokens[prompts.to(self.tokens.device)], mask)
        finally:
            for module in training:
                module.training = True
        return out if isinstance(out, Tensor) else out.logits

    @contextmanager
    def _skipped(self, start: int, stream: Tensor) -> Iterator[None]:
        """Blocks below `start` hand on the base run's stream instead of running."""
        below = list(self.blocks)[:start]
        try:
            for block in below:
                block.forward = lambda *_, **__: stream if self._bare else (stream, *self._rest)
            yield
        finally:
            for block in below:
                block.__dict__.pop("forward", None)

    def _why_not_skip(self) -> str:
        """An empty string when blocks can be left out, after comparing with the model's output."""
        outputs: list[Any] = []
        keep = lambda _, args, output: outputs.append(output)  # noqa: E731
        handles = [block.register_forward_hook(keep) for block in self.blocks]
        try:
            plain = self._logits(torch.zeros(1).long())
        finally:
            for handle in handles:
                handle.remove()
        self._bare = all(isinstance(output, Tensor) for output in outputs)
        if not self._bare:
            rest = [output[1:] if isinstance(output, tuple) else (0,) for output in outputs]
            if any(part is not None for parts in rest for part in parts):
                return "its blocks hand on more than the residual stream"
            self._rest = rest[0]
        for start in {max(1, self.shape.layers // 2), self.shape.layers - 1} - {0}:
            stream = self.activation(start, "resid_pre").unflatten(0, (-1, self.shape.t))
            with self._skipped(start, stream[:1]):
                again = self._logits(torch.zeros(1).long())
            apart = (again - plain).abs().max() / plain.abs().max().clamp_min(1e-30)
            if not float(apart) <= TOLERANCE:
                return (
                    f"the blocks from {start} on, run from its stream, give other logits than the "
                    f"whole forward (off by {float(apart):.1e} of the largest)"
                )
        return ""

    def _rows(self) -> int:
        """Rows in one forward, by the memory of a block's widest activation and the logits."""
        floats = self.shape.t * (16 * self.shape.d + self.shape.heads * self.shape.t)
        return max(1, self.memory // (4 * max(1, floats) * 2))

    def _shape(self, b: int, span: tuple[Tensor, Tensor]) -> Shape:
        """Sizes, read off one captured prompt."""
        kinds = [kind for kind in ("resid_pre", "q", "z", "k", "neurons") if self._name(kind, 0)]
        names = {kind: self._site(kind, 0) for kind in kinds}
        mask = None if self.mask is None else self.mask[:1]
        seen = capture(self.model, list(names.values()), self.tokens[:1], attention_mask=mask)
        sizes = {kind: seen[name].shape for kind, name in names.items()}
        heads, d_head = sizes.get("q", sizes.get("z", (0, 0, 0, 0)))[2:]
        return Shape(
            layers=len(self.blocks),
            b=b,
            t=self.tokens.shape[1],
            first=span[0],
            stop=span[1],
            heads=heads,
            kv_heads=sizes["k"][2] if "k" in sizes else heads,
            d_head=d_head,
            d_mlp=sizes["neurons"][-1] if "neurons" in sizes else 0,
            d=sizes["resid_pre"][-1],
        )

    def _name(self, kind: str, layer: int) -> str | None:
        """What `capture` and `splice` call a site, or None where the model has none."""
        return site_name(self.known, self.path, kind, layer)

    def _site(self, kind: str, layer: int) -> str:
        name = self._name(kind, layer)
        if name is None:
            has = "resid_pre, resid_post" if not self.known else "no such site"
            msg = f"{self.op}: {type(self.model).__name__} has no {kind}.{layer} ({has})."
            raise SiteError(msg)
        return name


def find_blocks(op: str, model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The list of blocks: the ModuleList of one class that holds most parameters, and its path.

    Raises:
        SiteError: there is none.
    """
    lists = [
        (sum(p.numel() for p in module.parameters()), path, module)
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) > 0
        and len({type(child) for child in module}) == 1
    ]
    if not lists:
        msg = (
            f"{op}: {type(model).__name__} has no blocks: no nn.ModuleList holds modules of one "
            "class. Keep the blocks in an nn.ModuleList, each mapping [b, t, d] to [b, t, d]."
        )
        raise SiteError(msg)
    _, path, blocks = max(lists, key=lambda found: found[0])
    return path, blocks


def site_name(known: Collection[str], path: str, kind: str, layer: int) -> str | None:
    """What `capture` calls a site, or None where the model has none.

    Args:
        known: the model's canonical sites, empty for an unknown architecture.
        path: of its list of blocks.
        kind: such as "z".
        layer: counted from 0.
    """
    name = f"{kind}.{layer}"
    if name in known:
        return name
    if known or kind not in ("resid_pre", "resid_post"):
        return None
    return f"{path}.{layer}" + (":in" if kind == "resid_pre" else "")


def packed(stage: str, x: Tensor) -> Tensor:
    """[b * t, w] of an activation as `capture` gives it."""
    if stage == "pattern":
        return x.transpose(1, 2).flatten(2).flatten(0, 1)
    return (x.flatten(2) if stage in HEADED else x).flatten(0, 1)


def unpacked(stage: str, new: Tensor, like: Tensor) -> Tensor:
    """The inverse of `packed`."""
    if stage == "pattern":
        b, h, dest, source = like.shape
        return new.reshape(b, dest, h, source).transpose(1, 2)
    return new.reshape(like.shape)


def chosen(logits: Tensor, slots: Tensor, columns: Tensor | None) -> Tensor:
    """[p, m, c] of [p, t, vocabulary]."""
    at = logits[torch.arange(len(logits))[:, None], slots]
    if columns is None:
        return at
    return at.gather(2, columns.to(at.device)[:, None].expand(-1, slots.shape[1], -1))


def fingerprint(model: nn.Module, tokens: Tensor, name: str) -> bytes:
    """Bytes that another model, other weights or other prompts change."""
    sums = [float(p.detach().double().sum()) for p in model.parameters()]
    shapes = [tuple(p.shape) for p in model.parameters()]
    return repr((name, tokens.tolist(), sums, shapes)).encode()
