"""The general engine: any model, its own forward, many cells as rows of one batch.

Where the model is a list of blocks, those below the patch are not run: their place is taken by the
base run's stream. That this gives the model's own output is verified once, before it is used.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from microtome.errors import SiteError
from microtome.models.capture import call, capture, evaluating, logits_of
from microtome.models.families import family_of
from microtome.models.native.plan import STAGES, Plan
from microtome.models.native.weights import weights_key
from microtome.models.sites import Site, canonical
from microtome.models.splice import splice
from microtome.ops import patch_rows
from microtome.patching.cells import HEADED, Shape
from microtome.patching.held import Held

TOLERANCE = 1e-4  # of the largest logit


class HookEngine:
    """Runs plans through a model's own forward.

    Args:
        op: name for messages.
        model: any nn.Module with a list of blocks.
        base, source: [b, t] and [s, t] int64.
        span: first and one past the last position that counts, each [b].
        mask: [b, t] or None, of `base`, and of `source` where `paired`.
        paired: `source` has a prompt for each of `base`, padded alike.
        memory: bytes for the activations of a batch.
        skip: try to leave out the blocks below a patch.

    Raises:
        SiteError: the model has no list of blocks.
        ArgumentError: it returns no logits.
    """

    groups = 1

    def __init__(
        self,
        op: str,
        model: nn.Module,
        base: Tensor,
        source: Tensor,
        span: tuple[Tensor, Tensor],
        mask: Tensor | None,
        *,
        paired: bool,
        memory: int,
        skip: bool,
    ) -> None:
        self.op, self.model, self.memory = op, model, memory
        self.tokens = torch.cat((base, source.to(base.device)))
        self.mask = mask
        if mask is not None:
            self.mask = torch.cat((mask, mask if paired else torch.ones_like(source).to(mask)))
        self.known = canonical(op, model) if family_of(model) is not None else {}
        self.path, self.blocks = find_blocks(op, model, self.known)
        logits = self._logits(torch.zeros(1).long())
        self.vocabulary, self._bytes = logits.shape[-1], logits.element_size()
        self.shape = self._shape(len(base), span)
        self._held = Held(self.shape.layers, self._size, memory // 4, self._read)
        self.note = ""
        self.name = "forwards"
        if skip:
            self.note = self._why_not_skip()
            self.name = "forwards" if self.note else "blocks"
        self.shape = replace(self.shape, chained=self.name == "blocks")

    def lacks(self, site: str) -> str:
        """Why the model has no sites of this kind, or an empty string."""
        if self._name(site, 0) is not None:
            return ""
        name = type(self.model).__name__
        if not self.known:
            return (
                f"{name} is no architecture with a known {site}; of its blocks, {self.path}, "
                "resid_pre and resid_post can be patched"
            )
        kinds = dict.fromkeys(known.partition(".")[0] for known in self.known)
        return f"{name} has no {site}; it has {', '.join(kinds)}"

    def fingerprint(self) -> bytes:
        """Of the prompts and the weights."""
        return fingerprint(self.model, self.tokens, self.name)

    def activation(self, layer: int, stage: str) -> Tensor:
        """[(b + s) * t, w]: what base and source prompts have at a stage."""
        if layer == self.shape.layers:
            layer, stage = layer - 1, "resid_post"
        return self._held(layer, stage)

    def _size(self, stage: str) -> int:
        """Bytes of one layer's activation, all prompts."""
        return self.tokens.numel() * self.shape.width(stage) * self._bytes

    def _read(self, layers: range, stage: str) -> list[Tensor]:
        """A place at some layers, of all prompts."""
        names = [self._site(stage, at) for at in layers]
        found = capture(
            self.model,
            names,
            self.tokens,
            attention_mask=self.mask,
            batch_size=min(self.rows_at_once(), len(self.tokens)),
        )
        return [packed(stage, found[name]) for name in names]

    def trimmed(self, plan: Plan) -> Plan:
        """The plan without the writes that change no bit."""
        return plan.without_unchanged(self.activation, self.shape.t)

    def unpatched(self, prompts: Tensor, slots: Tensor, columns: Tensor | None) -> Tensor:
        """[p, m, c]: logits of some prompts of the run at positions slots [p, m]."""
        parts = []
        for some in prompts.split(self.rows_at_once()):
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
            for rows in (layer == at).nonzero().flatten().split(self.rows_at_once()):
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
        visits: list[tuple[int, str, Callable[[Tensor], Tensor]]] = []
        for key in keys.unique().tolist():
            at, stage = key // len(STAGES), STAGES[key % len(STAGES)]
            writes = plan.writes.select(keys == key)
            sources = plan.sources.get((at, stage))

            def visit(x: Tensor, w: Any = writes, s: Any = sources) -> Tensor:
                table = torch.stack((w.row, w.position, w.lo, w.hi, w.source, w.op), 1)
                cut = torch.arange(len(x))[:, None] * torch.tensor([1, 0, 0])
                cut[:, 2] = x.shape[1]
                exact = torch.promote_types(x.dtype, torch.float32)
                s = x.new_empty(0, x.shape[2]) if s is None else s
                new = patch_rows(
                    x.to(exact),
                    s.to(exact),
                    cut.int().to(x.device),
                    table.int().to(x.device),
                    w.factor.to(x.device, exact),
                    total=x.shape[0] * x.shape[1],
                )
                return new.to(x.dtype)

            visits.append((at, stage, visit))
        return self.forward(plan.example, start, visits)

    def forward(
        self,
        prompts: Tensor,
        start: int,
        visits: Iterable[tuple[int, str, Callable[[Tensor], Tensor]]],
    ) -> Tensor:
        """[r, t, vocabulary]: one forward over some prompts with activations changed.

        Args:
            prompts: [r] int64, of the run, repeats welcome.
            start: no change lies below this block, so that those below it may be left out.
            visits: (layer, stage, function of [r, t, w]); layer L stands for the end of the last.
        """
        with ExitStack() as stack:
            if self.name == "blocks" and start > 0:
                stream = self.activation(start, "resid_pre").unflatten(0, (-1, self.shape.t))
                stack.enter_context(self._skipped(start, stream[prompts]))
            for at, stage, function in visits:
                inside = at < self.shape.layers
                name = self._site(stage, at) if inside else self._site("resid_post", at - 1)

                def visit(
                    x: Tensor, stage: str = stage, f: Callable[[Tensor], Tensor] = function
                ) -> Tensor:
                    held = packed(stage, x).unflatten(0, (len(x), -1))
                    return unpacked(stage, f(held), x)

                stack.enter_context(splice(self.model, name, visit))
            return self._logits(prompts)

    def _logits(self, prompts: Tensor) -> Tensor:
        """[p, t, vocabulary] in eval mode, without gradients."""
        mask = None if self.mask is None else self.mask[prompts.to(self.mask.device)]
        with evaluating(self.model), torch.no_grad():
            out = call(self.model, self.tokens[prompts.to(self.tokens.device)], mask)
        return logits_of(self.op, self.model, out)

    @contextmanager
    def _skipped(self, start: int, stream: Tensor) -> Iterator[None]:
        """Blocks below `start` hand on the base run's stream instead of running."""
        below = list(self.blocks)[:start]
        own = [block.__dict__.get("forward") for block in below]  # put there by somebody else
        hand_on = lambda *_, **__: stream if self._bare else (stream, *self._rest)  # noqa: E731
        try:
            for block in below:  # not by setattr, which a wrapper may pass on to what it wraps
                block.__dict__["forward"] = hand_on
            yield
        finally:
            for block, forward in zip(below, own, strict=True):
                block.__dict__.pop("forward", None)
                if forward is not None:
                    block.__dict__["forward"] = forward

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
        for start in range(1, self.shape.layers):
            stream = self.activation(start, "resid_pre").unflatten(0, (-1, self.shape.t))
            with self._skipped(start, stream[:1].clone()):  # a block may write into its input
                again = self._logits(torch.zeros(1).long())
            apart = (again - plain).abs().max() / plain.abs().max().clamp_min(1e-30)
            if not float(apart) <= TOLERANCE:
                return (
                    f"the blocks from {start} on, run from its stream, give other logits than the "
                    f"whole forward (off by {float(apart):.1e} of the largest)"
                )
        return ""

    def rows_at_once(self) -> int:
        """Rows in one forward, by the memory of a block's widest activation and the logits."""
        wide = 16 * self.shape.d + self.shape.heads * self.shape.t + self.vocabulary
        floats = self.shape.t * wide
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
        assert name is not None  # `lacks` was asked
        return name


def find_blocks(op: str, model: nn.Module, known: dict[str, Site]) -> tuple[str, nn.ModuleList]:
    """The list of blocks and its path.

    It is the one that sites lie in where the architecture is known, else of the ModuleLists whose
    modules have a class in common the one that holds most parameters.

    Raises:
        SiteError: there is none.
    """
    if known:
        path = known["resid_pre.0"].path.rpartition(".")[0]
        blocks = model.get_submodule(path)
        assert isinstance(blocks, nn.ModuleList)
        return path, blocks
    lists = [
        (sum(p.numel() for p in module.parameters()), path, module)
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and _alike(module)
    ]
    if not lists:
        msg = (
            f"{op}: {type(model).__name__} has no blocks: no nn.ModuleList holds modules of one "
            "class. Keep the blocks in an nn.ModuleList, each mapping [b, t, d] to [b, t, d]."
        )
        raise SiteError(msg)
    _, path, blocks = max(lists, key=lambda found: found[0])
    return path, blocks


def _alike(modules: nn.ModuleList) -> bool:
    """Whether all modules of a list have a class in common that not every module has."""
    classes = [set(type(module).__mro__) for module in modules]
    return bool(classes) and bool(set.intersection(*classes) - set(nn.Module.__mro__))


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
    """[p, m, c] of [p, t, vocabulary], in float32 at least."""
    at = logits[torch.arange(len(logits))[:, None], slots]
    at = at.to(torch.promote_types(at.dtype, torch.float32))
    if columns is None:
        return at
    return at.gather(2, columns.to(at.device)[:, None].expand(-1, slots.shape[1], -1))


def fingerprint(model: nn.Module, tokens: Tensor, name: str) -> bytes:
    """Bytes that another model, other weights or other prompts change."""
    return repr((name, tokens.tolist())).encode() + weights_key(model)
