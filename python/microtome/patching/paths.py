"""Path patching: what flows from a sender to a receiver directly, with all the rest frozen.

Step one writes the source run's output of the sender into the base run and follows it, through the
residual stream alone (and the MLPs, if they are not frozen), to the receiver's input. Step two runs
the base with the receiver as that input makes it, and everything after it as it will.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from microtome import _check
from microtome.errors import ArgumentError
from microtome.models.native.base import BaseRun
from microtome.models.native.block import Block
from microtome.models.native.plan import STAGES, Plan, Sources, Writes
from microtome.ops import ADD, REPLACE
from microtome.patching.engine import MEMORY, engine_for
from microtome.patching.execute import Job, execute
from microtome.patching.metrics import Metric, as_metric
from microtome.patching.native import NativeEngine
from microtome.patching.prompts import pair

SENDERS = ("embed", "z", "attn_out", "mlp_out")
RECEIVERS = ("q", "k", "v", "mlp", "out")


@dataclass(frozen=True)
class Node:
    """One end of a path.

    Attributes:
        site: a sender is "z" (what a head adds to the stream), "attn_out", "mlp_out" or "embed"
            (the stream before the first block); a receiver is "q", "k" or "v" of a head, "mlp" (an
            MLP's input) or "out" (the final stream).
        layer: which; of no meaning for "embed" and "out".
        head: of "z", "q", "k", "v"; a key-value head for k and v; None for all heads.
    """

    site: str
    layer: int = 0
    head: int | None = None

    def __str__(self) -> str:
        if self.site in ("embed", "out"):
            return self.site
        return f"{self.site}.{self.layer}" + ("" if self.head is None else f".{self.head}")


@dataclass(frozen=True, eq=False)
class Paths:
    """The metric by sender and receiver.

    Attributes:
        scores: [senders, receivers], mean over prompts; the unpatched metric where a sender lies
            after the receiver.
        by_prompt: [senders, receivers, b].
        senders, receivers: what the axes run over; a receiver is a group of nodes patched together.
        written: [senders, receivers] int64, values of the receivers that changed a bit.
        metric: its name.
        clean, corrupted: [b], unpatched.
        base: "clean" or "corrupted", the run that was patched.

    A score says what this one path carries with everything beside it held fixed; paths through
    other components, which may carry more, are not in it.
    """

    scores: Tensor
    by_prompt: Tensor
    senders: tuple[Node, ...]
    receivers: tuple[tuple[Node, ...], ...]
    written: Tensor
    metric: str
    clean: Tensor
    corrupted: Tensor
    base: str

    def effect(self) -> Tensor:
        """[senders, receivers]: score minus the unpatched run's."""
        unpatched = self.corrupted if self.base == "corrupted" else self.clean
        return (self.by_prompt - unpatched).mean(-1)


def path_patch(
    model: nn.Module,
    clean: Tensor,
    corrupted: Tensor,
    metric: Metric | Callable[[Tensor], Tensor],
    senders: Node | Sequence[Node],
    receivers: Node | Sequence[Node | Sequence[Node]],
    *,
    freeze_mlps: bool = True,
    direction: str = "denoise",
    attention_mask: Tensor | None = None,
    precision: str = "fp32",
    memory: int = MEMORY,
    progress: bool = True,
) -> Paths:
    """Patch the direct path from every sender to every receiver, and measure.

    Args:
        model: a model that runs natively (see `sweep`).
        clean: [b, t] int64 prompts.
        corrupted: [b, t].
        metric: as in `sweep`.
        senders: nodes whose output the source run gives; one alone may come without a list.
        receivers: nodes, likewise; a list within it is one receiver whose nodes are patched
            together.
        freeze_mlps: hold the MLPs between sender and receiver at the base run too; False lets them
            answer, as Wang et al. do. Attention is always frozen.
        direction: "denoise" sends clean outputs in the corrupted run, "noise" the other way round.
        attention_mask: [b, t] of both runs.
        precision: as in `sweep`, of what comes after the receiver.
        memory: bytes; the runs of all prompts are held at once, whatever they take.
        progress: show a progress bar, over pairs.

    Returns:
        Paths.

    Raises:
        ArgumentError: a node is none of the above, or the model does not run natively.
        ShapeError, NonFiniteError: as `sweep`.

    Each pair is one row of the wave, joining at the receiver. Source: Goldowsky-Dill et al. 2023,
    arXiv:2304.05969; Wang et al. 2022, arXiv:2211.00593.

    Example:
        >>> import torch, microtome as mt
        >>> from microtome.models import ToyModel
        >>> from microtome.patching import Node, path_patch
        >>> clean = torch.arange(8)[None]
        >>> corrupted = clean.clone(); corrupted[0, 3] = 99
        >>> metric = mt.patching.logit_difference(11, 12)
        >>> senders, receivers = [Node("z", 0, 1), Node("embed")], [Node("k", 2, 0), Node("out")]
        >>> path_patch(
        ...     ToyModel(), clean, corrupted, metric, senders, receivers, progress=False
        ... ).scores.shape
        torch.Size([2, 2])
    """
    _check.one_of("path_patch", "direction", direction, ("denoise", "noise"))
    clean, corrupted = pair("path_patch", model, clean, corrupted, attention_mask)
    base, source = (corrupted, clean) if direction == "denoise" else (clean, corrupted)
    engine = engine_for(
        "path_patch", model, base, source, attention_mask, paired=True, precision=precision,
        memory=memory, engine="native", site="", advice="Paths are followed through its parts.",
        whole=True,
    )  # fmt: skip
    assert isinstance(engine, NativeEngine)
    senders = _listed("senders", senders)
    groups = tuple(
        (r,) if isinstance(r, Node) else _listed("receivers", r)
        for r in _listed("receivers", receivers)
    )
    for nodes, allowed, what in (
        (senders, SENDERS, "sender"),
        ([node for group in groups for node in group], RECEIVERS, "receiver"),
    ):
        if not nodes:
            msg = f"path_patch: no {what} was named. Pass at least one Node."
            raise ArgumentError(msg)
        for node in nodes:
            if not isinstance(node, Node):
                msg = f"path_patch: a {what} must be a Node, such as Node('z', 3, 1), got {node!r}."
                raise ArgumentError(msg)
            _check_node(node, allowed, what, engine)
    cells = PathCells(engine, tuple(senders), groups, freeze_mlps)
    base_name = "corrupted" if direction == "denoise" else "clean"
    job = Job(cells, as_metric("path_patch", metric), base_name)
    found = execute("path_patch", engine, job, memory=memory, progress=progress, resume=None)
    grid = (len(groups), len(senders))
    by_prompt = found.scores.unflatten(0, grid).transpose(0, 1)
    return Paths(
        scores=by_prompt.mean(-1),
        by_prompt=by_prompt,
        senders=tuple(senders),
        receivers=groups,
        written=found.written.unflatten(0, grid).T,
        metric=job.metric.name,
        clean=found.clean,
        corrupted=found.corrupted,
        base=base_name,
    )


def _listed(name: str, given: Any) -> tuple[Any, ...]:
    """Nodes as a tuple; one alone may come without a list."""
    if isinstance(given, Node):
        return (given,)
    if isinstance(given, (list, tuple)):
        return tuple(given)
    msg = f"path_patch: {name} must be a Node or a list of them, got {given!r}."
    raise ArgumentError(msg)


@dataclass(frozen=True)
class PathCells:
    """One cell for each receiver (slow) and sender (fast).

    Attributes:
        engine: holds the base and the source run.
        senders: nodes.
        receivers: groups of nodes.
        freeze_mlps: see `path_patch`.
    """

    engine: NativeEngine
    senders: tuple[Node, ...]
    receivers: tuple[tuple[Node, ...], ...]
    freeze_mlps: bool

    @property
    def count(self) -> int:
        """Pairs."""
        return len(self.senders) * len(self.receivers)

    @property
    def writes_a_cell(self) -> int:
        """At most; each reads a row of its own, as wide as the stream, so few go at a time."""
        nodes = max(len(group) for group in self.receivers)
        shape = self.engine.shape
        return nodes * shape.b * shape.t * max(1, (shape.d_mlp or shape.d) // 64)

    def place(self, cell: int) -> str:
        """Where a cell lies, for messages."""
        receivers = self.receivers[cell // len(self.senders)]
        return f"{self.senders[cell % len(self.senders)]} -> {', '.join(map(str, receivers))}"

    def describe(self) -> str:
        """The nodes."""
        return repr((self.senders, self.receivers, self.freeze_mlps))

    def plan(self, cells: Tensor) -> Plan:
        """What each receiver becomes when its sender's change reaches it."""
        shape = self.engine.shape
        b, t = shape.b, shape.t
        parts: list[Writes] = []
        sources: dict[tuple[int, str], list[Tensor]] = {}
        prompt, position = torch.arange(b).repeat_interleave(t), torch.arange(t).repeat(b)
        counts = (position >= shape.first[prompt]) & (position < shape.stop[prompt])
        for i, cell in enumerate(cells.tolist()):
            sender = self.senders[cell % len(self.senders)]
            for node in self.receivers[cell // len(self.senders)]:
                if not _reaches(sender, node, self.engine.run.stack.blocks):
                    continue
                place, lo, hi, code, values = self._received(sender, node)
                table = sources.setdefault(place, [])
                at = sum(len(part) for part in table)
                table.append(values)
                full = lambda value: torch.full_like(prompt, value)  # noqa: E731
                writes = Writes(
                    i * b + prompt, full(place[0]), full(STAGES.index(place[1])), position,
                    full(lo), full(hi), full(code), at + torch.arange(b * t),
                    torch.ones(b * t, dtype=torch.float64),
                )  # fmt: skip
                parts.append(writes.select(counts))
        tables: Sources = {place: torch.cat(rows) for place, rows in sources.items()}
        if not parts:
            none = torch.zeros(0, dtype=torch.int64)
            parts = [Writes(*(none for _ in range(8)), none.double())]
        return Plan(torch.arange(b).repeat(len(cells)), Writes.cat(parts), tables)

    def _received(self, sender: Node, node: Node) -> tuple[tuple[int, str], int, int, int, Tensor]:
        """Place, columns, op and the values [b * t, w] that a receiver takes."""
        run, tokens = self.engine.run, self.engine.shape.b * self.engine.shape.t
        with torch.no_grad():
            if node.site == "out":
                change = self._arriving(sender, len(run.layers))
                return (len(run.layers), "resid_pre"), 0, change.shape[1], ADD, change
            block, kept = run.stack.blocks[node.layer], run.layers[node.layer]
            if node.site == "mlp":
                x = (kept.pre if block.parallel else kept.mid)[:tokens]
                out = mlp_out(block, x + self._arriving(sender, node.layer))
                return (node.layer, "mlp_out"), 0, out.shape[1], REPLACE, out
            x = kept.pre[:tokens] + self._arriving(sender, node.layer)
            q, k, v = block.split(block.qkv(block.norm1(x)))
            values = {"q": q, "k": k, "v": v}[node.site].flatten(1)
        lo, hi = 0, values.shape[1]
        if node.head is not None:
            lo, hi = node.head * block.d_head, (node.head + 1) * block.d_head
        return (node.layer, node.site), lo, hi, REPLACE, values

    def _arriving(self, sender: Node, layer: int) -> Tensor:
        """[b * t, d]: how a sender changes the stream that a receiver in `layer` reads."""
        run, tokens = self.engine.run, self.engine.shape.b * self.engine.shape.t
        change = sent(run, sender, tokens)
        if self.freeze_mlps:
            return change
        for at, middle in _mlps_between(run, sender, layer):
            block, kept = run.stack.blocks[at], run.layers[at]
            assert kept.mlp_out is not None
            x = (kept.mid if middle else kept.pre)[:tokens]
            change = change + mlp_out(block, x + change) - kept.mlp_out[:tokens]
        return change


def sent(run: BaseRun, sender: Node, tokens: int) -> Tensor:
    """[tokens, d]: what the source run's output of a sender adds to the base run's stream."""
    if sender.site == "embed":
        return _apart(run.layers[0].pre, tokens)
    block, kept = run.stack.blocks[sender.layer], run.layers[sender.layer]
    if sender.site == "mlp_out":
        assert kept.mlp_out is not None
        return _apart(kept.mlp_out, tokens)
    if sender.site == "attn_out" or sender.head is None:
        return _apart(kept.attn_out, tokens)
    lo, hi = sender.head * block.d_head, (sender.head + 1) * block.d_head
    if block.post_attention is None:
        return _apart(kept.z[:, lo:hi], tokens) @ block.out.weight[:, lo:hi].T
    z = kept.z[:tokens].clone()
    z[:, lo:hi] = kept.z[tokens:, lo:hi]
    return block.post_attention(block.out(z)) - kept.attn_out[:tokens]


def mlp_out(block: Block, x: Tensor) -> Tensor:
    """What an MLP adds to the stream x [n, d]."""
    assert block.mlp is not None
    assert block.norm2 is not None
    out = block.mlp.out(block.mlp.neurons(block.mlp.into(block.norm2(x))))
    return out if block.post_mlp is None else block.post_mlp(out)


def _apart(x: Tensor, tokens: int) -> Tensor:
    """Source minus base; the source prompts lie behind the base prompts."""
    return x[tokens:] - x[:tokens]


def _order(node: Node, blocks: Sequence[Block]) -> tuple[int, int]:
    """When a node stands in a forward: its layer, then its place in it."""
    if node.site in ("embed", "out"):
        return (-1, 0) if node.site == "embed" else (len(blocks), 0)
    part = {"z": 1, "attn_out": 1, "mlp": 2, "mlp_out": 3}.get(node.site, 0)
    if node.site == "mlp" and blocks[node.layer].parallel:
        part = 0  # it reads the stream that attention reads
    return node.layer, part


def _reaches(sender: Node, receiver: Node, blocks: Sequence[Block]) -> bool:
    """Whether the stream goes from one to the other."""
    return _order(sender, blocks) < _order(receiver, blocks)


def _mlps_between(run: BaseRun, sender: Node, layer: int) -> Iterator[tuple[int, bool]]:
    """MLPs that a change meets before `layer` (its own excluded), and whether they read mid."""
    first = -1 if sender.site == "embed" else sender.layer
    for at in range(max(first, 0), layer):
        block = run.stack.blocks[at]
        own = at == first and (sender.site == "mlp_out" or block.parallel)
        if block.mlp is not None and not own:
            yield at, not block.parallel


def _check_node(node: Node, allowed: Sequence[str], what: str, engine: NativeEngine) -> None:
    """Raise ArgumentError unless the model has such a node."""
    _check.one_of("path_patch", f"{what}'s site", node.site, allowed)
    if node.site in ("embed", "out"):
        return
    shape = engine.shape
    _check.between("path_patch", f"{what}'s layer", node.layer, 0, shape.layers - 1)
    if node.site in ("mlp", "mlp_out") and engine.lacks("mlp_out"):
        msg = f"path_patch: {what} {node} is an MLP, and the model has none."
        raise ArgumentError(msg)
    if node.head is not None:
        heads = shape.units(node.site) if node.site in ("q", "k", "v", "z") else 0
        if not 0 <= node.head < heads:
            msg = f"path_patch: {what} {node} has no head {node.head}; there are {heads}."
            raise ArgumentError(msg)
