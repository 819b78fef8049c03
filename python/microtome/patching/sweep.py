"""Sweeps: patch every cell of a grid, and ask a metric what changed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from torch import Tensor, nn

from microtome import _check
from microtome.errors import ArgumentError
from microtome.patching.cells import AXES, make_grid
from microtome.patching.engine import MEMORY, engine_for
from microtome.patching.execute import GridCells, Job, sweep_of
from microtome.patching.metrics import Metric, as_metric
from microtome.patching.prompts import one, pair
from microtome.patching.result import Sweep
from microtome.patching.values import ablation_values, check_operation, run_values


def sweep(
    model: nn.Module,
    clean: Tensor,
    corrupted: Tensor,
    metric: Metric | Callable[[Tensor], Tensor],
    site: str = "resid_pre",
    *,
    axes: Sequence[str] | None = None,
    layers: Sequence[int] | None = None,
    positions: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    neurons: Sequence[int] | None = None,
    direction: str = "denoise",
    attention_mask: Tensor | None = None,
    precision: str = "fp32",
    memory: int = MEMORY,
    engine: str = "auto",
    progress: bool = True,
    resume: str | Path | None = None,
) -> Sweep:
    """Copy activations of one run into another, one cell of a grid at a time, and measure.

        scores[cell] = metric(run of the base prompts with the cell's activations replaced)

    Nothing that a patch cannot change is computed: a cell joins at its own layer from the base run,
    carries the positions from the patched one on, shares earlier keys and values with all other
    cells, and is answered from the base run where it changes no bit.

    Args:
        model: a Hugging Face causal language model, a TransformerLens HookedTransformer, the toy
            model, or any nn.Module with a list of blocks.
        clean: [b, t] int64 prompts (or [t]).
        corrupted: [b, t], the same prompts with what matters changed; positions correspond.
        metric: of `microtome.patching.metrics`, or a callable that maps logits [b, t, vocabulary]
            to [b]. A metric that says what it reads saves unembedding the rest.
        site: "resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "q", "k", "v", "z",
            "pattern" or "neurons".
        axes: what to sweep over besides layers: by default positions of a stream, heads of q, k, v,
            z and pattern, neurons; or ("layer", "position", "head"), or ("layer", "head",
            "position", "source") for single entries of a pattern, or ("layer",). Without "position"
            a cell patches all positions.
        layers: restricts the axis; all by default.
        positions: likewise.
        heads: likewise.
        neurons: likewise.
        direction: "denoise" writes clean activations into the corrupted run, "noise" corrupted ones
            into the clean run.
        attention_mask: [b, t], one for both runs, padding on one or both ends.
        precision: "fp32", or "delta-bf16": differences from the base run are multiplied in bf16 and
            added to its float32 products, so that rounding scales with a patch's effect.
        memory: bytes for all activations, the unpatched runs included; splits the work, prompts
            too where their runs do not fit together. One place of all prompts and the run of one
            are the least. Packed weights are kept with the model beside it.
        engine: "auto" takes the fastest that is verified against the model's own output: "native"
            (known architectures), "blocks" (blocks are run from the patched layer on), "forwards"
            (full forwards, many cells as rows of a batch).
        progress: show a progress bar, counted in cells.
        resume: a file to keep finished cells in; the same sweep, interrupted, goes on from it.

    Returns:
        Sweep with scores [layers, ...]. In float32 they differ from the patched forward's by
        rounding (1e-6 of the logits).

    Raises:
        ShapeError: prompts do not correspond, or the metric gives no number for each of them.
        ArgumentError: an axis or option is not one of the above.
        SiteError: the model has no such site.
        NonFiniteError: the metric is NaN.

    Deterministic. Source: Vig et al. 2020, arXiv:2004.12265; Meng et al. 2022, arXiv:2202.05262.

    Example:
        >>> import torch, microtome as mt
        >>> from microtome.models import ToyModel
        >>> clean = torch.arange(8)[None]
        >>> corrupted = clean.clone(); corrupted[0, 3] = 99
        >>> metric = mt.patching.logit_difference(11, 12)
        >>> found = mt.patching.sweep(ToyModel(), clean, corrupted, metric, progress=False)
        >>> found.scores.shape, int((found.written > 0).sum())
        (torch.Size([4, 8]), 16)
    """
    _check.one_of("sweep", "direction", direction, ("denoise", "noise"))
    _check.one_of("sweep", "site", site, tuple(AXES))
    metric = as_metric("sweep", metric)
    clean, corrupted = pair("sweep", model, clean, corrupted, attention_mask)
    base, source = (corrupted, clean) if direction == "denoise" else (clean, corrupted)
    ready = engine_for(
        "sweep",
        model,
        base,
        source,
        attention_mask,
        paired=True,
        precision=precision,
        memory=memory,
        engine=engine,
        site=site,
    )
    grid = make_grid(
        "sweep",
        site,
        ready.shape,
        axes=axes,
        layers=layers,
        positions=positions,
        heads=heads,
        neurons=neurons,
    )
    cells = GridCells(grid, ready.shape, lambda layers: run_values(ready, grid, layers))
    job = Job(cells, metric, "corrupted" if direction == "denoise" else "clean")
    return sweep_of("sweep", ready, grid, job, memory=memory, progress=progress, resume=resume)


def ablate(
    model: nn.Module,
    tokens: Tensor,
    metric: Metric | Callable[[Tensor], Tensor],
    site: str = "z",
    *,
    value: str | Tensor = "zero",
    op: str = "replace",
    factor: float | Sequence[float] = 1.0,
    reference: Tensor | None = None,
    seed: int = 0,
    axes: Sequence[str] | None = None,
    layers: Sequence[int] | None = None,
    positions: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    neurons: Sequence[int] | None = None,
    attention_mask: Tensor | None = None,
    precision: str = "fp32",
    memory: int = MEMORY,
    engine: str = "auto",
    progress: bool = True,
    resume: str | Path | None = None,
) -> Sweep:
    """Take activations out of a run, one cell of a grid at a time, or add to or scale them.

    Args:
        model: as in `sweep`.
        tokens: [b, t] int64 prompts (or [t]).
        metric: as in `sweep`.
        site: as in `sweep`.
        value: "zero"; "mean", over all positions of `reference`; "mean-position", over its prompts
            at the same position; "resample", the same position of another prompt drawn from it; or
            a tensor, [w] or the width of one head, which then goes to each head.
        op: "replace"; "add" adds factor * value; "scale" multiplies by factor.
        factor: of "add" and "scale"; a list of them makes an axis "factor", as in a sweep over
            coefficients.
        reference: [s, t] prompts without padding for the means and for resampling; `tokens`, less
            their padding, if None.
        seed: of resampling.
        axes: as in `sweep`, and so all that follows.
        layers: restricts the axis.
        positions: likewise.
        heads: likewise.
        neurons: likewise.
        attention_mask: [b, t].
        precision: "fp32" or "delta-bf16".
        memory: bytes for all activations.
        engine: "auto", "native", "blocks" or "forwards".
        progress: show a progress bar.
        resume: a file to keep finished cells in.

    Returns:
        Sweep; `clean` is the metric of the untouched prompts, `corrupted` is empty.

    Raises:
        ArgumentError: no such value or op, or no prompts to resample from.
        ShapeError, SiteError, NonFiniteError: as `sweep`.

    Deterministic given the seed. Source: Wang et al. 2022, arXiv:2211.00593 (mean ablation); Chan
    et al. 2022, causal scrubbing (resample ablation).

    Example:
        >>> import torch, microtome as mt
        >>> from microtome.models import ToyModel
        >>> metric = mt.patching.log_probability(9)
        >>> mt.patching.ablate(ToyModel(), torch.arange(8)[None], metric, progress=False)
        Sweep(z: 4 layers x 4 heads, log probability, engine native)
    """
    _check.one_of("ablate", "site", site, tuple(AXES))
    check_operation(op, value, factor)
    metric = as_metric("ablate", metric)
    tokens = one("ablate", model, tokens, attention_mask)
    given = reference is not None
    source = tokens[:0]
    if value in ("mean", "mean-position", "resample") if isinstance(value, str) else False:
        source = one("ablate", model, reference, None) if reference is not None else tokens
        if source.shape[1] != tokens.shape[1]:
            msg = (
                f"ablate: reference has {source.shape[1]} tokens a prompt and tokens "
                f"{tokens.shape[1]}. Make them equally long."
            )
            raise ArgumentError(msg)
    ready = engine_for(
        "ablate",
        model,
        tokens,
        source if given else source[:0],
        attention_mask,
        paired=False,
        precision=precision,
        memory=memory,
        engine=engine,
        site=site,
    )
    grid = make_grid(
        "ablate",
        site,
        ready.shape,
        axes=axes,
        layers=layers,
        positions=positions,
        heads=heads,
        neurons=neurons,
        op=op,
        factor=factor,
    )
    values = partial(ablation_values, ready, grid, value=value, seed=seed)
    about = repr((value.tolist() if isinstance(value, Tensor) else value, seed))
    job = Job(GridCells(grid, ready.shape, values), metric, "clean", ablation=True, about=about)
    return sweep_of("ablate", ready, grid, job, memory=memory, progress=progress, resume=resume)
