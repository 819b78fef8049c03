"""Patching one cell at a time, one full forward each: the slow, clear twin of every sweep.

Every faster path gives these numbers, and is tested against them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from microtome import _check
from microtome.errors import ArgumentError, ShapeError
from microtome.models import capture, splice
from microtome.models.capture import call, check_tokens, evaluating, logits_of
from microtome.models.sites import Site, resolve

OPS = ("replace", "add", "zero", "scale", "mean")

Index = tuple[int | slice, ...]
Units = int | slice | list[int]


@dataclass(frozen=True, eq=False)
class Write:
    """One change of an activation, at some of its positions, heads and units.

    With x the chosen part and v the value:

        replace: v      add: x + factor * v      zero: 0      scale: factor * x
        mean: the source's x, averaged position by position over its rows whose token counts there

    Attributes:
        site: as in `splice`.
        positions: one position, negative from the end; None for all. At pattern, the destination.
        heads: one head, where the site has heads (k and v: a key-value head); None for all.
        units: one coordinate of the last axis, a slice or several of them; None for all. At
            pattern, the source positions.
        op: see above.
        value: v for replace and add, broadcast to the chosen part: [b, positions, heads, units]
            less the axes of which one entry was chosen. None for the source run's activation at
            the same place.
        factor: for add and scale.

    Raises:
        ArgumentError: op is unknown, or takes no value or factor and was given one; a position,
            head or value of another type.
    """

    site: str
    positions: int | None = None
    heads: int | None = None
    units: int | slice | Sequence[int] | None = None
    op: str = "replace"
    value: Tensor | float | None = None
    factor: float = 1.0

    def __post_init__(self) -> None:
        _check.one_of("Write", "op", self.op, OPS)
        for name, given in (("positions", self.positions), ("heads", self.heads)):
            if given is not None and not hasattr(given, "__index__"):
                msg = (
                    f"Write: {name} must be one number or None for all, got {given!r}. For "
                    "several, put a Write for each into the cell."
                )
                raise ArgumentError(msg)
        if not isinstance(self.value, (Tensor, float, int, type(None))):
            msg = f"Write: value must be a tensor or a number, got {type(self.value).__name__}."
            raise ArgumentError(msg)
        for name, given, ops in (
            ("value", self.value is not None, ("replace", "add")),
            ("factor", self.factor != 1.0, ("add", "scale")),
        ):
            if given and self.op not in ops:
                msg = (
                    f"Write: op {self.op!r} takes no {name}, got {name}={getattr(self, name)}. "
                    f"Leave it out, or use {' or '.join(map(repr, ops))}."
                )
                raise ArgumentError(msg)

    @property
    def reads_source(self) -> bool:
        """Whether it needs the source run."""
        return self.op == "mean" or (self.op in ("replace", "add") and self.value is None)


def run_patched(
    model: nn.Module,
    tokens: Tensor,
    patches: Iterable[tuple[str, Callable[[Tensor], Tensor]]],
    *,
    attention_mask: Tensor | None = None,
) -> Tensor:
    """Run a model once with functions applied to some of its activations.

    The model runs in eval mode and is afterwards as it was. Gradients flow where they are enabled.

    Args:
        model: as in `capture`; what it returns is a tensor or has one as `.logits`.
        tokens: [b, t] int64.
        patches: (site, function as in `splice`), all open in the same forward; those at one site
            apply in their order.
        attention_mask: [b, t], 1 where a token counts.

    Returns:
        logits [b, t, V], in the model's dtype and on its device.

    Raises:
        SiteError, ShapeError, DtypeError: as `capture` and `splice`.
        ArgumentError: the model returns no logits.
    """
    check_tokens("run_patched", model, tokens, attention_mask, 1)
    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        for site, function in patches:
            stack.enter_context(splice(model, site, function))
        out = call(model, tokens, attention_mask)
    return logits_of("run_patched", model, out)


def naive_sweep(
    model: nn.Module,
    base_tokens: Tensor,
    source_tokens: Tensor | None,
    metric: Callable[[Tensor], Tensor],
    cells: Sequence[Sequence[Write]],
    *,
    attention_mask: Tensor | None = None,
) -> Tensor:
    """Measure what each of many patches does: one full forward for each cell.

        out[c] = metric(logits of the base run with the writes of cells[c])

    Args:
        model: as in `run_patched`.
        base_tokens: [b, t] int64: the run that is patched.
        source_tokens: [b, t] int64: the run that values come from, row by row; None if no write
            reads it.
        metric: maps logits [b, t, V] to [b].
        cells: the writes of each forward, which apply together. Those at one site apply in their
            order, each with the value of the source run. A cell without writes is the base run.
        attention_mask: [b, t] of both runs.

    Returns:
        [cells, b], in the metric's dtype.

    Raises:
        ArgumentError: a position, head or unit is out of range, or a site has no heads.
        ShapeError: base and source differ in shape, or the metric gave another shape than [b].
        SiteError, DtypeError: as `capture` and `splice`.

    At pattern nothing is written where the attended position is padding: attention to it stays 0.
    Without gradients. Deterministic. Costs a forward for each cell and for each site that is read.

    Example:
        >>> from microtome.models import ToyModel
        >>> base, source = torch.tensor([[1, 2, 3]]), torch.tensor([[4, 5, 6]])
        >>> cells = [[Write("resid_pre.2", positions=p)] for p in range(3)]
        >>> metric = lambda logits: logits[:, -1, 7] - logits[:, -1, 8]
        >>> naive_sweep(ToyModel(), base, source, metric, cells).shape
        torch.Size([3, 1])
    """
    op = "naive_sweep"
    check_tokens(op, model, base_tokens, attention_mask, 1)
    writes = [write for cell in cells for write in cell]
    named = [write.site for write in writes]
    sites = {site.name: site for site in resolve(op, model, named)} if named else {}
    read = dict.fromkeys(write.site for write in writes if write.reads_source)
    b, source = len(base_tokens), {}
    if source_tokens is not None:
        if source_tokens.shape != base_tokens.shape:
            msg = (
                f"{op}: source_tokens must have the shape of base_tokens, "
                f"{list(base_tokens.shape)}, got {list(source_tokens.shape)}. Pad both to one "
                "length."
            )
            raise ShapeError(msg)
        for name in read:  # a run each: a watched pattern changes the rounding of what else is read
            source[name] = capture(
                model, name, source_tokens, attention_mask=attention_mask, batch_size=b
            )[name]
    elif read:
        msg = (
            f"{op}: the write at {next(iter(read))!r} takes its value from the source run, got "
            "source_tokens=None. Pass source_tokens, or a value in each write."
        )
        raise ArgumentError(msg)
    rows = []
    with torch.no_grad():
        for cell in cells:
            patches = [
                (w.site, partial(_written, w, sites[w.site], source, attention_mask)) for w in cell
            ]
            logits = run_patched(model, base_tokens, patches, attention_mask=attention_mask)
            rows.append(_measured(metric(logits), b))
    return torch.stack(rows) if rows else torch.empty(0, b)


def _written(
    write: Write,
    site: Site,
    source: dict[str, Tensor],
    mask: Tensor | None,
    activation: Tensor,
) -> Tensor:
    """A copy of `activation` with `write` done."""
    index, units = _index(write, site, activation)
    new = activation.clone()
    view = new[index]  # a view: `index` holds integers and slices only
    old = view[..., units]
    if write.op == "zero":
        view[..., units] = 0
    elif write.op == "scale":
        view[..., units] = write.factor * old
    else:
        value = _value(write, site, source, mask, index, units, old)
        view[..., units] = old + write.factor * value if write.op == "add" else value
    if mask is not None and site.kind == "pattern":
        new = new.masked_fill(~mask.bool().to(new.device)[:, None, None], 0.0)
    return new


def _value(
    write: Write,
    site: Site,
    source: dict[str, Tensor],
    mask: Tensor | None,
    index: Index,
    units: Units,
    old: Tensor,
) -> Tensor:
    """What replace, add and mean write, in the shape of `old`."""
    if write.op == "mean":
        held = source[write.site]
        if mask is None:
            mean = held.mean(0, keepdim=True)
        else:
            counts = mask.bool().to(held.device)  # [b, t]
            own = (None, slice(None)) if site.kind == "pattern" else (slice(None), None)
            counts = counts[(slice(None), *own, None)] if held.dim() == 4 else counts[..., None]
            some = counts.sum(0, keepdim=True).clamp_min(1)
            mean = torch.where(counts, held, 0.0).sum(0, keepdim=True) / some
        value = mean[index][..., units]
    elif write.value is None:
        value = source[write.site][index][..., units]
    else:
        value = torch.as_tensor(write.value).to(old)
    try:
        return value.expand_as(old)
    except RuntimeError:
        msg = (
            f"naive_sweep: the value for {write.site!r} must broadcast to {list(old.shape)}, got "
            f"shape {list(value.shape)}."
        )
        raise ShapeError(msg) from None


def _index(write: Write, site: Site, activation: Tensor) -> tuple[Index, Units]:
    """Index of all axes but the last, and of the last."""
    op, shape = f"naive_sweep at {site.name}", activation.shape
    axes = {"positions": 1, "heads": 2} if len(shape) == 4 else {"positions": 1}
    if site.kind == "pattern":
        axes = {"positions": 2, "heads": 1}
    index: list[int | slice] = [slice(None)] * (len(shape) - 1)
    for name, chosen in (("positions", write.positions), ("heads", write.heads)):
        if chosen is None:
            continue
        if name not in axes:
            msg = f"{op}: shape {list(shape)} has no heads, got heads={chosen}. Choose units."
            raise ArgumentError(msg)
        size = shape[axes[name]]
        _check.between(op, name, chosen, -size, size - 1)
        index[axes[name]] = chosen
    units = slice(None) if write.units is None else write.units
    if isinstance(units, slice):
        return tuple(index), units
    for unit in [units] if isinstance(units, int) else units:
        _check.between(op, "units", unit, -shape[-1], shape[-1] - 1)
    return tuple(index), units if isinstance(units, int) else list(units)


def _measured(measured: Tensor, b: int) -> Tensor:
    """The metric's result if it is one number for each row."""
    if not isinstance(measured, Tensor) or measured.shape != (b,):
        got = list(measured.shape) if isinstance(measured, Tensor) else type(measured).__name__
        msg = (
            f"naive_sweep: metric must map logits [b, t, V] to [b] with b={b}, got {got}. Return "
            "one number for each row."
        )
        raise ShapeError(msg)
    return measured
