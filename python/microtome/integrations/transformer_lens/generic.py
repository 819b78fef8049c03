"""generic_activation_patch: one patched run for each cell of a sweep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from microtome import _check
from microtome.errors import ArgumentError
from microtome.integrations.transformer_lens import cells as grids
from microtome.integrations.transformer_lens.fast import try_fast
from microtome.integrations.transformer_lens.hooked import HookedModel
from microtome.integrations.transformer_lens.metrics import Metric, metrics_of
from microtome.integrations.transformer_lens.request import PatchRequest
from microtome.integrations.transformer_lens.result import PatchingResult
from microtome.integrations.transformer_lens.rows import eval_mode, run_rows, say_once
from microtome.integrations.transformer_lens.setters import (
    PatchSetter,
    stock_setter,
)
from microtome.models.capture import check_tokens

_OP = "generic_activation_patch"


def generic_activation_patch(
    model: Any,
    corrupted_tokens: Tensor,
    clean_cache: Any,
    patching_metric: Metric | Mapping[str, Metric],
    patch_setter: PatchSetter,
    activation_name: str,
    index_axis_names: Sequence[str] | None = None,
    index_df: Any = None,
    return_index_df: bool = False,
    *,
    reduce: str = "scalar",
    baseline: bool = False,
    attention_mask: Tensor | None = None,
    cells_per_forward: int | None = None,
    progress: bool = True,
) -> Any:
    """Patch a corrupted run with a clean run's activations, one cell at a time, and score each run.

        scores[cell] = metric(logits of the corrupted run with the cell's activation from the clean)

    A high score says that this activation carries what the metric measures from the clean run to
    the output. It does not follow that the site is necessary.

    Cells are independent, so they run as rows of one batch, or on the fast path where the setter is
    a stock one. Either way the numbers are those of one forward for each cell, up to float32
    rounding.

    Args:
        model: a Hugging Face model, the toy model, a HookedModel, or a TransformerLens
            HookedTransformer or TransformerBridge. It runs in eval mode without gradients and is
            left as it was.
        corrupted_tokens: [b, t] int64.
        clean_cache: the clean run's activations: what `run_with_cache` of this package or of
            TransformerLens returns, a dict by hook name, or `Activations` of `capture`. One row
            serves every corrupted row.
        patching_metric: maps logits [b, t, v] to one number; or a mapping of names to such
            functions.
        patch_setter: (corrupted activation [b, ...], index, clean activation) -> patched
            activation. It may write in place.
        activation_name: "resid_pre", "z", "pattern", ...
        index_axis_names: the axes to sweep, "layer" first: "pos", "head" or "head_index",
            "dest_pos", "src_pos".
        index_df: instead of axes, a pandas DataFrame with one row for each cell, or a list of index
            tuples; the layer first.
        return_index_df: return the cells as a DataFrame too.
        reduce: "scalar", or for metrics that return one value per prompt, "mean" over prompts or
            "none" to keep them.
        baseline: also score the unpatched corrupted run.
        attention_mask: [b, t], 1 where a token counts.
        cells_per_forward: cells that share a forward, where forwards run; None picks it from the
            size of the input.
        progress: show a progress bar.

    Returns:
        [sizes of the axes], or [cells] for index_df, in the default float dtype on the model's
        device; (that, index_df) with return_index_df; a PatchingResult for reduce="none",
        baseline=True or a mapping of metrics.

    Raises:
        SiteError: no such hook in the model, or the clean cache lacks it.
        ShapeError: clean and corrupted differ in length or rows; the setter or metric returned
            another shape.
        ArgumentError: axes, indices or options outside what is allowed.
        NonFiniteError: the metric returned NaN.

    Warns:
        UserWarning: once in a process, that a setter or metric is unknown to the fast path.

    Source: Meng et al. 2022, arXiv:2202.05262; the interface is TransformerLens's.

    Example:
        >>> import torch
        >>> from microtome.integrations.transformer_lens import HookedModel, get_act_patch_resid_pre
        >>> from microtome.models import ToyModel
        >>> model = HookedModel(ToyModel())
        >>> clean, corrupted = torch.tensor([[1, 2, 3]]), torch.tensor([[1, 5, 3]])
        >>> _, cache = model.run_with_cache(clean)
        >>> scores = get_act_patch_resid_pre(
        ...     model, corrupted, cache, lambda logits: logits[0, -1, 7], progress=False
        ... )
        >>> scores.shape
        torch.Size([4, 3])
    """
    result = sweep(
        model, corrupted_tokens, clean_cache, patching_metric, patch_setter, activation_name,
        index_axis_names, index_df, reduce=reduce, baseline=baseline,
        attention_mask=attention_mask, cells_per_forward=cells_per_forward, progress=progress,
    )  # fmt: skip
    several = isinstance(patching_metric, Mapping) or reduce == "none" or baseline
    if not return_index_df:
        return result if several else result.values
    if several:
        msg = f"{_OP}: return_index_df goes with a tensor; the PatchingResult has .index_df."
        raise ArgumentError(msg)
    return result.values, result.index_df if index_df is None else index_df


def sweep(
    model: Any,
    tokens: Tensor,
    clean_cache: Any,
    patching_metric: Metric | Mapping[str, Metric],
    patch_setter: PatchSetter,
    activation_name: str,
    index_axis_names: Sequence[str] | None = None,
    index_df: Any = None,
    *,
    reduce: str = "scalar",
    baseline: bool = False,
    attention_mask: Tensor | None = None,
    cells_per_forward: int | None = None,
    progress: bool = True,
) -> PatchingResult:
    """`generic_activation_patch` with a PatchingResult whatever was asked for."""
    _check.one_of(_OP, "reduce", reduce, ("scalar", "mean", "none"))
    if cells_per_forward is not None:
        _check.between(_OP, "cells_per_forward", cells_per_forward, 1, 1 << 30)
    metrics = metrics_of(_OP, patching_metric, reduce != "scalar")
    model = hooked(model)
    _check.shapes(_OP, corrupted_tokens=(tokens, "b t"))
    if isinstance(model, HookedModel):
        check_tokens(_OP, model.model, tokens, attention_mask, 1)
    if (index_axis_names is None) == (index_df is None):
        msg = f"{_OP}: pass index_axis_names, such as ('layer', 'pos'), or index_df, and not both."
        raise ArgumentError(msg)
    axes = tuple(index_axis_names or ())
    if index_df is None:
        sizes = grids.axis_sizes(_OP, model.cfg, tokens.shape[-1], activation_name, axes)
        cells, columns = grids.grid(sizes), axes
    else:
        cells, columns = grids.rows_of(_OP, index_df)
        sizes = (len(cells),)
    hooks = grids.full_names(_OP, model, activation_name, [cell[0] for cell in cells])
    clean = {name: grids.clean_activation(_OP, clean_cache, name) for name in hooks.values()}
    stock = stock_setter(patch_setter)
    if stock is not None:
        cells = grids.check_stock(_OP, stock, tokens, cells, clean, hooks)
    request = PatchRequest(
        _OP, model, tokens, attention_mask, activation_name, patch_setter, stock, cells, hooks,
        clean, metrics,
    )  # fmt: skip
    with eval_mode(model):
        values = _run(request, cells_per_forward, progress)
        start = _baseline(request) if baseline else None
    if reduce == "mean":
        values, start = values.mean(-1), None if start is None else start.mean(-1)
    values = values.transpose(0, 1)
    values = values.reshape(values.shape[0], *sizes, *values.shape[2:])  # [m, *axes, b?]
    several = isinstance(patching_metric, Mapping)
    return PatchingResult(
        values if several else values[0],
        axes,
        tuple(cells),
        columns,
        tuple(metrics.by_name),
        reduce != "none",
        start if start is None or several else start[0],
        several,
    )


def _run(request: PatchRequest, cells_per_forward: int | None, progress: bool) -> Tensor:
    """The scores of every cell: fast where that is possible."""
    if request.stock is None:
        name = getattr(request.setter, "__name__", repr(request.setter))
        say_once(f"{request.op}: patch_setter {name!r} is no stock one")
    elif (values := try_fast(request, progress=progress)) is not None:
        return values
    return run_rows(request, cells_per_forward=cells_per_forward, progress=progress)


def _baseline(request: PatchRequest) -> Tensor:
    """The metrics on the unpatched corrupted run."""
    rows = {} if request.attention_mask is None else {"attention_mask": request.attention_mask}
    with torch.no_grad():
        logits = request.model.run_with_hooks(request.tokens, fwd_hooks=[], **rows)
    return request.metrics(logits, "the baseline")


def hooked(model: Any) -> Any:
    """A model with `run_with_hooks` as it is, a plain one as a HookedModel."""
    if hasattr(model, "run_with_hooks") and hasattr(model, "hook_dict"):
        return model
    if not isinstance(model, nn.Module):
        msg = (
            f"{_OP}: model must be a Hugging Face or TransformerLens model, got "
            f"{type(model).__name__}."
        )
        raise ArgumentError(msg)
    return HookedModel(model)
