"""Sweeps over the features of a sparse autoencoder, and over what it leaves out."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from microtome import _check
from microtome.errors import ArgumentError, ShapeError, SiteError
from microtome.models.native.weights import weights_key
from microtome.patching.engine import MEMORY, engine_for
from microtome.patching.execute import Engine, Job, execute, laid_out
from microtome.patching.feature_cells import ErrorCells, FeatureCells
from microtome.patching.metrics import Metric, as_metric
from microtome.patching.prompts import one, pair
from microtome.patching.result import Sweep

OPS = ("replace", "zero", "scale", "add")
STREAMS = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")


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
    memory: int = MEMORY,
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
        features: ids; None takes every feature that changes at a position that is patched.
        positions: restricts the axis, or what is patched at once.
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
        StoreError: `resume` holds another sweep, or cannot be written.

    Effects of features found one at a time do not add up where they interact; and a feature that
    changes the metric is one direction of this dictionary, not the only cause.

    Example:
        >>> import torch, microtome as mt
        >>> from microtome.models import ToyModel
        >>> clean = torch.arange(8)[None]
        >>> sae, metric = mt.SAE(64, 128, mt.TopK(8)), mt.patching.logit_difference(11, 12)
        >>> mt.patching.sweep_features(
        ...     ToyModel(), sae, "resid_pre.2", clean, None, metric, op="zero", features=[3, 5],
        ...     progress=False,
        ... )
        Sweep(features of resid_pre.2: 2 features, logit difference, engine native)
    """
    _check.one_of("sweep_features", "op", op, OPS)
    if tuple(axes) not in (("feature",), ("position", "feature")):
        msg = (
            "sweep_features: axes must be ('feature',) or ('position', 'feature'), got "
            f"{tuple(axes)}."
        )
        raise ArgumentError(msg)
    if factor != 0.0 and op in ("replace", "zero"):
        msg = f"sweep_features: op {op!r} takes no factor, got {factor}. Use 'scale' or 'add'."
        raise ArgumentError(msg)
    ready, place, base_name, x = _ready(
        "sweep_features", model, _width("sweep_features", sae), at, clean, corrupted, direction,
        attention_mask, precision, memory, engine, needs_both=op == "replace",
    )  # fmt: skip
    shape = ready.shape
    own, other = dense_code(sae, x[: shape.b * shape.t]), None
    if op == "replace":
        other = dense_code(sae, x[shape.b * shape.t :])
    new = {"replace": other, "zero": 0.0 * own, "scale": factor * own, "add": own + factor}[op]
    assert new is not None
    change = (new - own).unflatten(0, (shape.b, shape.t))  # [b, t, f]
    chosen = torch.arange(shape.t) if positions is None else _indices("positions", positions)
    _check.index_range("sweep_features", chosen, shape.t, "t")
    at_once = torch.zeros(shape.t, dtype=torch.bool)
    at_once[chosen] = True
    counts = ~shape.padding(torch.arange(shape.t)[None]) & at_once
    change = change * counts[..., None].to(change)
    if features is None:
        ids = change.flatten(0, 1).ne(0).any(0).nonzero().flatten().cpu()
        if len(ids) == 0:
            why = f"Op {op!r} with factor={factor} leaves the code as it is."
            why = "Do both runs differ at this site?" if op == "replace" else why
            msg = f"sweep_features: no feature changes anywhere. {why}"
            raise ArgumentError(msg)
    else:
        ids = _indices("features", features)
        _check.index_range("sweep_features", ids, change.shape[2], "n_features")
    by_position = "position" in axes
    cells = FeatureCells(
        shape, place, ids, change[..., ids], sae.W_dec.detach()[ids].to(x.dtype),
        chosen if by_position else None,
    )  # fmt: skip
    about = "" if resume is None else repr((op, factor, chosen.tolist(), _digest(sae)))
    job = Job(
        cells, as_metric("sweep_features", metric), base_name, corrupted is None, about
    )  # fmt: skip
    found = execute("sweep_features", ready, job, memory=memory, progress=progress, resume=resume)
    labels = tuple(ids.tolist())
    values = (tuple(chosen.tolist()), labels) if by_position else (labels,)
    return laid_out(found, ready, job, site=f"features of {at}", axes=tuple(axes), values=values)


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
    memory: int = MEMORY,
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

    Example:
        >>> import torch, microtome as mt
        >>> from microtome.models import ToyModel
        >>> clean = torch.arange(8)[None]
        >>> corrupted = clean.clone(); corrupted[0, 3] = 99
        >>> sae, metric = mt.SAE(64, 128, mt.TopK(8)), mt.patching.logit_difference(11, 12)
        >>> mt.patching.sweep_error(
        ...     ToyModel(), sae, "mlp_out.1", clean, corrupted, metric, progress=False
        ... ).scores.shape
        torch.Size([8])
    """
    ready, place, base_name, x = _ready(
        "sweep_error", model, _width("sweep_error", sae), at, clean, corrupted, direction,
        attention_mask, precision, memory, engine, needs_both=True,
    )  # fmt: skip
    shape = ready.shape
    with torch.no_grad():
        error = x - sae.decode(sae.encode(x)).to(x)
    own, other = error.split(shape.b * shape.t)
    job = Job(ErrorCells(shape, place, other - own), as_metric("sweep_error", metric), base_name)
    found = execute("sweep_error", ready, job, memory=memory, progress=progress, resume=None)
    values = (tuple(range(shape.t)),)
    return laid_out(found, ready, job, site=f"error of {at}", axes=("position",), values=values)


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


def _width(op: str, sae: Any) -> int:
    """d of an autoencoder; ArgumentError for what is none."""
    W_dec = getattr(sae, "W_dec", None)
    if not isinstance(W_dec, Tensor) or W_dec.dim() != 2 or not callable(getattr(sae, "encode", 0)):
        msg = (
            f"{op}: sae must have encode(x) and W_dec [f, d], got {type(sae).__name__}. See "
            "microtome.SAE."
        )
        raise ArgumentError(msg)
    return int(W_dec.shape[1])


def _indices(name: str, given: Sequence[int]) -> Tensor:
    """[n] int64; ArgumentError for none."""
    out = torch.as_tensor(given)
    if out.numel() == 0:
        msg = f"sweep_features: {name} is an empty list. Name at least one, or leave it out."
        raise ArgumentError(msg)
    return out.long()


def _digest(sae: Any) -> str:
    """Tells one autoencoder from another, by its weights or at least by its decoder."""
    if isinstance(sae, nn.Module):
        return weights_key(sae).hex()
    raw = sae.W_dec.detach().cpu().contiguous().view(torch.uint8).numpy()
    return hashlib.sha256(raw).hexdigest()


def dense_code(sae: Any, x: Tensor) -> Tensor:
    """[n, f], what an autoencoder makes of x [n, d], dense, in x's dtype."""
    with torch.no_grad():
        code = sae.encode(x)
    dense: Tensor = code if isinstance(code, Tensor) else code.to_dense()
    return dense.to(x.dtype)
