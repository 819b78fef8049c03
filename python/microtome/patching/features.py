"""Sweeps over the features of a sparse autoencoder, and over what it leaves out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from microtome import _check
from microtome.errors import ArgumentError, ShapeError, SiteError
from microtome.models.native.plan import STAGES, Plan, Writes
from microtome.ops import ADD
from microtome.patching.cells import Shape
from microtome.patching.engine import engine_for
from microtome.patching.execute import Engine, Job, execute
from microtome.patching.metrics import Metric, as_metric
from microtome.patching.prompts import one, pair
from microtome.patching.result import Sweep

OPS = ("replace", "zero", "scale", "add")
STREAMS = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")


@dataclass(frozen=True)
class FeatureCells:
    """One cell for each feature, or for each position and feature.

    A feature f is changed by adding (a'_f - a_f) W_dec[f], so the rest of the code and the
    autoencoder's error stay as they are.

    Attributes:
        shape: of the run.
        at: layer and stage of the activation.
        features: ids, one a column of `change`.
        change: [b, t, features], a' - a.
        W_dec: [features, d].
        positions: positions that are cells of their own, or None for all in one cell.
    """

    shape: Shape
    at: tuple[int, str]
    features: Tensor
    change: Tensor
    W_dec: Tensor
    positions: Tensor | None

    @property
    def count(self) -> int:
        """How many there are."""
        return len(self.features) * (1 if self.positions is None else len(self.positions))

    @property
    def writes_a_cell(self) -> int:
        """At most."""
        return self.shape.b * (self.shape.t if self.positions is None else 1)

    def place(self, cell: int) -> str:
        """Where a cell lies, for messages."""
        feature = f"feature {int(self.features[cell % len(self.features)])}"
        if self.positions is None:
            return feature
        return f"{feature}, position {int(self.positions[cell // len(self.features)])}"

    def describe(self) -> str:
        """Place, features and what is done to them."""
        total = float(self.change.double().sum())
        positions = None if self.positions is None else self.positions.tolist()
        return repr((self.at, self.features.tolist(), positions, total))

    def plan(self, cells: Tensor) -> Plan:
        """Their writes."""
        b, t, n = self.shape.b, self.shape.t, len(self.features)
        column = cells % n
        row = torch.arange(len(cells) * b)
        if self.positions is None:
            row = row.repeat_interleave(t)
            position = torch.arange(t).repeat(len(cells) * b)
        else:
            position = self.positions[cells // n].repeat_interleave(b)
        prompt, feature = row % b, column[row // b]
        full = lambda value: torch.full_like(row, value)  # noqa: E731
        writes = Writes(
            row, full(self.at[0]), full(STAGES.index(self.at[1])), position, full(0),
            full(self.W_dec.shape[1]), full(ADD), feature,
            self.change[prompt, position, feature].double().cpu(),
        )  # fmt: skip
        counts = (position >= self.shape.first[prompt]) & (position < self.shape.stop[prompt])
        sources = {self.at: self.W_dec}
        return Plan(torch.arange(b).repeat(len(cells)), writes.select(counts), sources)


@dataclass(frozen=True)
class ErrorCells:
    """One cell for each position, to which a vector of its own is added.

    Attributes:
        shape: of the run.
        at: layer and stage of the activation.
        change: [b * t, d].
    """

    shape: Shape
    at: tuple[int, str]
    change: Tensor

    @property
    def count(self) -> int:
        """How many there are."""
        return self.shape.t

    @property
    def writes_a_cell(self) -> int:
        """At most."""
        return self.shape.b

    def place(self, cell: int) -> str:
        """Where a cell lies, for messages."""
        return f"position {cell}"

    def describe(self) -> str:
        """Place and what is added."""
        return repr((self.at, float(self.change.double().sum())))

    def plan(self, cells: Tensor) -> Plan:
        """Their writes."""
        b = self.shape.b
        row = torch.arange(len(cells) * b)
        prompt, position = row % b, cells[row // b]
        token = prompt * self.shape.t + position
        moved = self.change.ne(0).any(1).cpu()[token]
        full = lambda value: torch.full_like(row, value)  # noqa: E731
        writes = Writes(
            row, full(self.at[0]), full(STAGES.index(self.at[1])), position, full(0),
            full(self.change.shape[1]), full(ADD), token, moved.double(),
        )  # fmt: skip
        counts = (position >= self.shape.first[prompt]) & (position < self.shape.stop[prompt])
        return Plan(prompt, writes.select(counts), {self.at: self.change})


def sweep_features(
    model: nn.Module,
    sae: Any,
    at: str,
    clean: Tensor,
    corrupted: Tensor | None,
    metric: Metric | Callable[[Tensor], Tensor],
    *,
    op: str = "replace",
    factor: float = 0.0,
    features: Sequence[int] | None = None,
    positions: Sequence[int] | None = None,
    axes: Sequence[str] = ("feature",),
    direction: str = "denoise",
    attention_mask: Tensor | None = None,
    precision: str = "fp32",
    memory: int = 1 << 30,
    engine: str = "auto",
    progress: bool = True,
    resume: str | Path | None = None,
) -> Sweep:
    """Patch features of a sparse autoencoder one at a time, and measure.

        x <- x + (a'_f - a_f) W_dec[f]

    where a is the code of the base run and a' is the source run's ("replace"), 0 ("zero"),
    factor * a ("scale") or a + factor ("add"). The error of the autoencoder is kept.

    Args:
        model: as in `sweep`.
        sae: an autoencoder with `encode(x)`, whose result is dense [n, f] or has `.to_dense()`, and
            with W_dec [f, d].
        at: the site it was trained on: "resid_pre.10", or resid_mid, resid_post, attn_out, mlp_out.
        clean: [b, t] int64 prompts.
        corrupted: [b, t], needed by "replace"; None takes the clean prompts as the base run.
        metric: as in `sweep`.
        op: see above.
        factor: of "scale" and "add".
        features: ids; None takes every feature that changes anywhere.
        positions: restricts the axis.
        axes: ("feature",), all positions at once, or ("position", "feature").
        direction: as in `sweep`.
        attention_mask: [b, t] of both runs.
        precision: as in `sweep`, and so all that follows.
        memory: bytes.
        engine: "auto", "native", "blocks" or "forwards".
        progress: show a progress bar.
        resume: a file to keep finished cells in.

    Returns:
        Sweep over those axes; `values` holds the feature ids.

    Raises:
        ShapeError: the autoencoder's width is not the site's.
        ArgumentError: an option is not one of the above, or no feature changes.

    Effects of features found one at a time do not add up where they interact; and a feature that
    changes the metric is one direction of this dictionary, not the only cause.
    """
    _check.one_of("sweep_features", "op", op, OPS)
    if tuple(axes) not in (("feature",), ("position", "feature")):
        msg = (
            "sweep_features: axes must be ('feature',) or ('position', 'feature'), got "
            f"{tuple(axes)}."
        )
        raise ArgumentError(msg)
    ready, place, base_name, x = _ready(
        "sweep_features", model, sae.W_dec.shape[1], at, clean, corrupted, direction,
        attention_mask, precision, memory, engine, needs_both=op == "replace",
    )  # fmt: skip
    shape = ready.shape
    own, other = _code(sae, x[: shape.b * shape.t]), None
    if op == "replace":
        other = _code(sae, x[shape.b * shape.t :])
    new = {"replace": other, "zero": 0.0 * own, "scale": factor * own, "add": own + factor}[op]
    assert new is not None
    change = (new - own).unflatten(0, (shape.b, shape.t))  # [b, t, f]
    if features is None:
        ids = change.flatten(0, 1).ne(0).any(0).nonzero().flatten()
        if len(ids) == 0:
            msg = "sweep_features: no feature changes anywhere. Do both runs differ at this site?"
            raise ArgumentError(msg)
    else:
        ids = torch.as_tensor(features)
        _check.index_range("sweep_features", ids, change.shape[2], "n_features")
    by_position = "position" in axes
    chosen = torch.arange(shape.t) if positions is None else torch.as_tensor(positions)
    _check.index_range("sweep_features", chosen, shape.t, "t")
    if positions is not None and not by_position:
        mask = torch.zeros(shape.t, dtype=torch.bool)
        mask[chosen] = True
        change = change * mask[:, None].to(change)
    cells = FeatureCells(
        shape, place, ids, change[..., ids], sae.W_dec.detach()[ids].to(x.dtype),
        chosen if by_position else None,
    )  # fmt: skip
    job = Job(cells, as_metric("sweep_features", metric), base_name, ablation=corrupted is None)
    found = execute("sweep_features", ready, job, memory=memory, progress=progress, resume=resume)
    grid = (len(chosen), len(ids)) if by_position else (len(ids),)
    by_prompt = found.scores.unflatten(0, grid)
    labels = tuple(ids.tolist())
    return Sweep(
        scores=by_prompt.mean(-1),
        by_prompt=by_prompt,
        axes=tuple(axes),
        values=(tuple(chosen.tolist()), labels) if by_position else (labels,),
        site=f"features of {at}",
        metric=job.metric.name,
        clean=found.clean,
        corrupted=found.corrupted,
        base=base_name,
        written=found.written.unflatten(0, grid),
        engine=ready.name,
        note=ready.note,
    )


def sweep_error(
    model: nn.Module,
    sae: Any,
    at: str,
    clean: Tensor,
    corrupted: Tensor,
    metric: Metric | Callable[[Tensor], Tensor],
    *,
    direction: str = "denoise",
    attention_mask: Tensor | None = None,
    precision: str = "fp32",
    memory: int = 1 << 30,
    engine: str = "auto",
    progress: bool = True,
) -> Sweep:
    """Patch what a sparse autoencoder leaves out, one position at a time, and measure.

        x <- x + (error of the source run - error of the base run),  error = x - decode(encode(x))

    Args:
        model: as in `sweep`.
        sae: as in `sweep_features`, with `decode` for what `encode` gives.
        at: the site it was trained on.
        clean: [b, t] int64 prompts.
        corrupted: [b, t].
        metric: as in `sweep`.
        direction: as in `sweep`, and so all that follows.
        attention_mask: [b, t] of both runs.
        precision: "fp32" or "delta-bf16".
        memory: bytes.
        engine: "auto", "native", "blocks" or "forwards".
        progress: show a progress bar.

    Returns:
        Sweep over positions.

    Raises:
        ShapeError, ArgumentError: as `sweep_features`.

    A large score says that the features alone do not carry what the metric reads.
    """
    ready, place, base_name, x = _ready(
        "sweep_error", model, sae.W_dec.shape[1], at, clean, corrupted, direction,
        attention_mask, precision, memory, engine, needs_both=True,
    )  # fmt: skip
    shape = ready.shape
    with torch.no_grad():
        error = x - sae.decode(sae.encode(x)).to(x)
    own, other = error.split(shape.b * shape.t)
    job = Job(ErrorCells(shape, place, other - own), as_metric("sweep_error", metric), base_name)
    found = execute("sweep_error", ready, job, memory=memory, progress=progress, resume=None)
    return Sweep(
        scores=found.scores.mean(-1),
        by_prompt=found.scores,
        axes=("position",),
        values=(tuple(range(shape.t)),),
        site=f"error of {at}",
        metric=job.metric.name,
        clean=found.clean,
        corrupted=found.corrupted,
        base=base_name,
        written=found.written,
        engine=ready.name,
        note=ready.note,
    )


def _ready(
    op: str,
    model: nn.Module,
    width: int,
    at: str,
    clean: Tensor,
    corrupted: Tensor | None,
    direction: str,
    mask: Tensor | None,
    precision: str,
    memory: int,
    engine: str,
    *,
    needs_both: bool,
) -> tuple[Engine, tuple[int, str], str, Tensor]:
    """An engine, the place in the model, the name of the base run, and x of all its prompts.

    Raises:
        ArgumentError: `at` is no site of a stream, or a run is missing.
        ShapeError: the autoencoder has another width.
    """
    _check.one_of(op, "direction", direction, ("denoise", "noise"))
    kind, _, layer = at.partition(".")
    _check.one_of(op, "site", kind, STREAMS)
    if corrupted is None:
        if needs_both:
            msg = f"{op}: values come from the other run, got corrupted=None. Pass both runs."
            raise ArgumentError(msg)
        base = one(op, model, clean, mask)
        source, base_name = base[:0], "clean"
    else:
        clean, corrupted = pair(op, model, clean, corrupted, mask)
        base, source = (corrupted, clean) if direction == "denoise" else (clean, corrupted)
        base_name = "corrupted" if direction == "denoise" else "clean"
    ready = engine_for(
        op, model, base, source, mask, paired=corrupted is not None, precision=precision,
        memory=memory, engine=engine, site=kind,
    )  # fmt: skip
    layers = ready.shape.layers
    if not layer.isdigit() or int(layer) >= layers:
        msg = f"{op}: no site {at!r}; the model has {kind}.0 ... {kind}.{layers - 1}."
        raise SiteError(msg)
    place = ready.shape.stage(kind, int(layer))
    x = ready.activation(*place)
    if x.shape[1] != width:
        msg = f"{op}: the autoencoder has d={width}, but {at} has d={x.shape[1]}."
        raise ShapeError(msg)
    return ready, place, base_name, x


def _code(sae: Any, x: Tensor) -> Tensor:
    """[n, f], dense, in x's dtype."""
    with torch.no_grad():
        code = sae.encode(x)
    dense: Tensor = code if isinstance(code, Tensor) else code.to_dense()
    return dense.to(x.dtype)
