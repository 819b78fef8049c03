"""The cells of a sweep: from axis names or a table of indices."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from microtome.errors import ArgumentError, PackageError, ShapeError, SiteError
from microtome.integrations.transformer_lens import names
from microtome.integrations.transformer_lens.setters import StockSetter, check_index

AXES = ("layer", "pos", "head_index", "head", "src_pos", "dest_pos")


def axis_sizes(
    op: str, cfg: Any, t: int, activation: str, axis_names: Sequence[str]
) -> tuple[int, ...]:
    """How many entries each named axis has; keys and values count their own heads."""
    heads = cfg.n_heads
    if names.get_act_name(activation).removeprefix("attn.hook_") in ("k", "v"):
        heads = cfg.n_key_value_heads or heads
    size = {"layer": cfg.n_layers, "pos": t, "dest_pos": t, "src_pos": t}
    size |= {"head": heads, "head_index": heads}
    wrong = [name for name in axis_names if name not in size]
    if wrong:
        msg = (
            f"{op}: index_axis_names must be of {', '.join(map(repr, AXES))}, got {wrong[0]!r}. "
            "For other axes pass index_df."
        )
        raise ArgumentError(msg)
    if not axis_names or axis_names[0] != "layer":
        msg = f"{op}: the first axis must be 'layer', got {list(axis_names)!r}."
        raise ArgumentError(msg)
    return tuple(size[name] for name in axis_names)


def grid(sizes: Sequence[int]) -> list[tuple[int, ...]]:
    """Every index tuple, the last axis counting fastest."""
    return list(itertools.product(*map(range, sizes)))


def make_df_from_ranges(column_max_ranges: Sequence[int], column_names: Sequence[str]) -> Any:
    """Every index tuple below some sizes as a pandas DataFrame, the last column counting fastest.

    Args:
        column_max_ranges: the size of each column.
        column_names: their names.

    Raises:
        PackageError: pandas is not installed.
    """
    return data_frame("make_df_from_ranges", grid(column_max_ranges), column_names)


def rows_of(op: str, index_df: Any) -> tuple[list[tuple[int, ...]], tuple[str, ...]]:
    """The index tuples of a pandas DataFrame or a list, the layer first, and the columns' names."""
    if hasattr(index_df, "itertuples"):
        rows = [tuple(row) for row in index_df.itertuples(index=False, name=None)]
        return rows, tuple(map(str, index_df.columns))
    if isinstance(index_df, list) and all(isinstance(row, (list, tuple)) for row in index_df):
        width = max(map(len, index_df), default=1)
        return [tuple(row) for row in index_df], ("layer", *map(str, range(1, width)))
    msg = (
        f"{op}: index_df must be a pandas DataFrame whose first column is the layer, or a list of "
        f"index tuples, got {type(index_df).__name__}."
    )
    raise ArgumentError(msg)


def data_frame(op: str, cells: Sequence[Sequence[int]], axis_names: Sequence[str]) -> Any:
    """The index tuples as a pandas DataFrame; PackageError if pandas is not installed."""
    try:
        import pandas
    except ImportError:
        msg = f"{op}: index_df needs pandas. Install it: pip install pandas."
        raise PackageError(msg) from None
    return pandas.DataFrame(list(cells), columns=list(axis_names))


def full_names(op: str, model: Any, activation: str, layers: Sequence[int]) -> dict[int, str]:
    """The hook name of an activation in each layer; SiteError if the model has no such hook."""
    found = {layer: names.get_act_name(activation, layer) for layer in layers}
    known = model.hook_dict
    for name in found.values():
        if name not in known:
            raise names.no_hook(op, name, known)
    return found


def clean_activation(op: str, cache: Any, name: str) -> Tensor:
    """The clean run's activation, from a cache by hook name or `Activations` by site.

    Raises:
        SiteError: it holds no such activation.
    """
    for key in (name, names.site_name(name)):
        try:
            value: Tensor = cache[key]
        except (KeyError, TypeError):
            continue
        return value
    held = list(getattr(cache, "by_site", cache))
    shown = ", ".join(map(repr, held[:4])) + (f" and {len(held) - 4} more" if held[4:] else "")
    msg = (
        f"{op}: clean_cache lacks {name!r}; it holds {shown or 'nothing'}. Make it with "
        "run_with_cache(clean_tokens), whose names_filter, if given, must pick this name."
    )
    raise SiteError(msg)


def check_stock(
    op: str,
    stock: StockSetter,
    tokens: Tensor,
    cells: Sequence[Sequence[int]],
    clean: dict[str, Tensor],
    full: dict[int, str],
) -> list[tuple[int, ...]]:
    """Check cells and clean activations against a stock setter.

    Returns:
        The cells, with indices that counted from the end counted from the front.

    Raises:
        ShapeError: a clean activation has other axes, rows or positions than the corrupted run.
        ArgumentError: an index has too many or too few entries, or lies outside.
    """
    b, t = tokens.shape
    for name, value in clean.items():
        axis = names.position_axis(name)
        wants = names.dimensions(name)
        if value.dim() != wants:
            msg = (
                f"{op}: clean_cache[{name!r}] must have {wants} axes, got shape "
                f"{list(value.shape)}. Keep the batch axis (remove_batch_dim=False)."
            )
            raise ShapeError(msg)
        if value.shape[axis] != t:
            msg = (
                f"{op}: clean and corrupted must have the same length, got {value.shape[axis]} "
                f"positions in clean_cache[{name!r}] and {t} corrupted tokens. Align the prompts, "
                "or pass a patch_setter that maps positions."
            )
            raise ShapeError(msg)
        if value.shape[0] not in (1, b):
            msg = (
                f"{op}: clean and corrupted must have the same number of rows, got "
                f"{value.shape[0]} in clean_cache[{name!r}] and {b} rows of corrupted tokens."
            )
            raise ShapeError(msg)
    checked = []
    for cell in cells:
        check_index(stock, cell)
        shape = clean[full[cell[0]]].shape
        entries = [int(cell[0])]
        for (what, axis), i in zip(stock.axes, cell[1:], strict=True):
            if not -shape[axis] <= i < shape[axis]:
                msg = (
                    f"{op}: {what} must be below {shape[axis]}, got {what}={i} in the index "
                    f"{list(cell)!r}."
                )
                raise ArgumentError(msg)
            entries.append(int(i) % shape[axis])
        checked.append(tuple(entries))
    return checked
