"""Activation patching under TransformerLens's names, signatures, axes and result shapes.

A drop-in for `transformer_lens.patching`: import this module in its place.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor

from microtome.integrations.transformer_lens.cells import make_df_from_ranges
from microtome.integrations.transformer_lens.direct_path import (
    get_act_patch_direct_path,
    get_act_patch_direct_path_all_sources,
)
from microtome.integrations.transformer_lens.generic import generic_activation_patch, sweep
from microtome.integrations.transformer_lens.metrics import Metric
from microtome.integrations.transformer_lens.result import PatchingResult, stack_types
from microtome.integrations.transformer_lens.setters import (
    PatchSetter,
    layer_head_dest_src_pos_pattern_patch_setter,
    layer_head_pattern_patch_setter,
    layer_head_pos_pattern_patch_setter,
    layer_head_vector_patch_setter,
    layer_pos_head_vector_patch_setter,
    layer_pos_patch_setter,
)

__all__ = [
    "PatchingResult",
    "generic_activation_patch",
    "get_act_patch_attn_head_all_pos_every",
    "get_act_patch_attn_head_by_pos_every",
    "get_act_patch_attn_head_k_all_pos",
    "get_act_patch_attn_head_k_by_pos",
    "get_act_patch_attn_head_out_all_pos",
    "get_act_patch_attn_head_out_by_pos",
    "get_act_patch_attn_head_pattern_all_pos",
    "get_act_patch_attn_head_pattern_by_pos",
    "get_act_patch_attn_head_pattern_dest_src_pos",
    "get_act_patch_attn_head_q_all_pos",
    "get_act_patch_attn_head_q_by_pos",
    "get_act_patch_attn_head_v_all_pos",
    "get_act_patch_attn_head_v_by_pos",
    "get_act_patch_attn_out",
    "get_act_patch_block_every",
    "get_act_patch_direct_path",
    "get_act_patch_direct_path_all_sources",
    "get_act_patch_mlp_out",
    "get_act_patch_resid_mid",
    "get_act_patch_resid_pre",
    "layer_head_dest_src_pos_pattern_patch_setter",
    "layer_head_pattern_patch_setter",
    "layer_head_pos_pattern_patch_setter",
    "layer_head_vector_patch_setter",
    "layer_pos_head_vector_patch_setter",
    "layer_pos_patch_setter",
    "make_df_from_ranges",
]


def _stock(setter: PatchSetter, activation: str, axes: str, what: str, shape: str) -> partial[Any]:
    """A sweep with its setter, activation and axes filled in."""
    function = partial(
        generic_activation_patch,
        patch_setter=setter,
        activation_name=activation,
        index_axis_names=tuple(axes.split()),
    )
    function.__doc__ = (
        f"Patch {what}. Returns [{shape}].\n\n"
        "Called as (model, corrupted_tokens, clean_cache, patching_metric), with the keywords of\n"
        "generic_activation_patch."
    )
    return function


_position = partial(_stock, layer_pos_patch_setter, axes="layer pos", shape="n_layers, pos")
get_act_patch_resid_pre = _position("resid_pre", what="the stream entering a block, by position")
get_act_patch_resid_mid = _position("resid_mid", what="the stream before the MLP, by position")
get_act_patch_attn_out = _position("attn_out", what="what attention adds, by position")
get_act_patch_mlp_out = _position("mlp_out", what="what the MLP adds, by position")

_head = partial(_stock, layer_head_vector_patch_setter, axes="layer head")
_HEADS, _KV_HEADS = "n_layers, n_heads", "n_layers, n_key_value_heads"
get_act_patch_attn_head_out_all_pos = _head("z", what="a head's output", shape=_HEADS)
get_act_patch_attn_head_q_all_pos = _head("q", what="a head's queries", shape=_HEADS)
get_act_patch_attn_head_k_all_pos = _head("k", what="a head's keys", shape=_KV_HEADS)
get_act_patch_attn_head_v_all_pos = _head("v", what="a head's values", shape=_KV_HEADS)

_head_by_pos = partial(_stock, layer_pos_head_vector_patch_setter, axes="layer pos head")
_HEADS, _KV_HEADS = "n_layers, pos, n_heads", "n_layers, pos, n_key_value_heads"
get_act_patch_attn_head_out_by_pos = _head_by_pos(
    "z", what="a head's output at one position", shape=_HEADS
)
get_act_patch_attn_head_q_by_pos = _head_by_pos(
    "q", what="a head's query at one position", shape=_HEADS
)
get_act_patch_attn_head_k_by_pos = _head_by_pos(
    "k", what="a head's key at one position", shape=_KV_HEADS
)
get_act_patch_attn_head_v_by_pos = _head_by_pos(
    "v", what="a head's value at one position", shape=_KV_HEADS
)

get_act_patch_attn_head_pattern_all_pos = _stock(
    layer_head_pattern_patch_setter,
    "pattern",
    "layer head_index",
    "a head's attention pattern",
    "n_layers, n_heads",
)
get_act_patch_attn_head_pattern_by_pos = _stock(
    layer_head_pos_pattern_patch_setter,
    "pattern",
    "layer head_index dest_pos",
    "a head's attention from one destination",
    "n_layers, n_heads, dest_pos",
)
get_act_patch_attn_head_pattern_dest_src_pos = _stock(
    layer_head_dest_src_pos_pattern_patch_setter,
    "pattern",
    "layer head_index dest_pos src_pos",
    "one entry of a head's attention pattern",
    "n_layers, n_heads, dest_pos, src_pos",
)

_HEAD_TYPES = ("out", "q", "k", "v", "pattern")


def get_act_patch_attn_head_all_pos_every(
    model: Any,
    corrupted_tokens: Tensor,
    clean_cache: Any,
    metric: Metric | Mapping[str, Metric],
    **kwargs: Any,
) -> Tensor | PatchingResult:
    """Patch each head's output, queries, keys, values and pattern.

    Args:
        model: as in `generic_activation_patch`, like the other arguments.
        corrupted_tokens: [b, t].
        clean_cache: the clean run's activations.
        metric: maps logits to a number.
        **kwargs: keywords of `generic_activation_patch`.

    Returns:
        [5, n_layers, n_heads]; keys and values that heads share are padded with zeros.
    """
    sweeps = (
        get_act_patch_attn_head_out_all_pos,
        get_act_patch_attn_head_q_all_pos,
        get_act_patch_attn_head_k_all_pos,
        get_act_patch_attn_head_v_all_pos,
        get_act_patch_attn_head_pattern_all_pos,
    )
    given = (model, corrupted_tokens, clean_cache, metric)
    return _every(sweeps, ("layer", "head"), _HEAD_TYPES, given, kwargs)


def get_act_patch_attn_head_by_pos_every(
    model: Any,
    corrupted_tokens: Tensor,
    clean_cache: Any,
    metric: Metric | Mapping[str, Metric],
    **kwargs: Any,
) -> Tensor | PatchingResult:
    """Patch each head's output, query, key, value and row of the pattern at each position.

    Args:
        model: as in `generic_activation_patch`, like the other arguments.
        corrupted_tokens: [b, t].
        clean_cache: the clean run's activations.
        metric: maps logits to a number.
        **kwargs: keywords of `generic_activation_patch`.

    Returns:
        [5, n_layers, pos, n_heads]; keys and values that heads share are padded with zeros.
    """
    sweeps = (
        get_act_patch_attn_head_out_by_pos,
        get_act_patch_attn_head_q_by_pos,
        get_act_patch_attn_head_k_by_pos,
        get_act_patch_attn_head_v_by_pos,
        get_act_patch_attn_head_pattern_by_pos,
    )
    given = (model, corrupted_tokens, clean_cache, metric)
    return _every(sweeps, ("layer", "pos", "head"), _HEAD_TYPES, given, kwargs)


def get_act_patch_block_every(
    model: Any,
    corrupted_tokens: Tensor,
    clean_cache: Any,
    metric: Metric | Mapping[str, Metric],
    **kwargs: Any,
) -> Tensor | PatchingResult:
    """Patch the stream entering each block, what attention adds and what the MLP adds.

    Args:
        model: as in `generic_activation_patch`, like the other arguments.
        corrupted_tokens: [b, t].
        clean_cache: the clean run's activations.
        metric: maps logits to a number.
        **kwargs: keywords of `generic_activation_patch`.

    Returns:
        [3, n_layers, pos].
    """
    sweeps = (get_act_patch_resid_pre, get_act_patch_attn_out, get_act_patch_mlp_out)
    given = (model, corrupted_tokens, clean_cache, metric)
    return _every(sweeps, ("layer", "pos"), ("resid_pre", "attn_out", "mlp_out"), given, kwargs)


def _every(
    sweeps: tuple[partial[Any], ...],
    axes: tuple[str, ...],
    types: tuple[str, ...],
    given: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Tensor | PatchingResult:
    """Run sweeps and stack them; the baseline is computed once."""
    wants_baseline = bool(kwargs.pop("baseline", False))
    results = [
        sweep(*given, **{**stock.keywords, **kwargs, "baseline": wants_baseline and i == 0})
        for i, stock in enumerate(sweeps)
    ]
    stacked = stack_types(results, axes, types)
    typed = wants_baseline or isinstance(given[3], Mapping) or kwargs.get("reduce") == "none"
    return stacked if typed else stacked.values
