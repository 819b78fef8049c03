"""Direct path patching: one head's write as one later head's queries, keys or values see it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from microtome import _check
from microtome.errors import ArgumentError
from microtome.integrations.transformer_lens import cells, names
from microtome.integrations.transformer_lens.generic import hooked, sweep
from microtome.integrations.transformer_lens.hooked import HookedModel
from microtome.integrations.transformer_lens.metrics import Metric
from microtome.integrations.transformer_lens.rows import eval_mode
from microtome.integrations.transformer_lens.setters import layer_head_vector_patch_setter


def get_act_patch_direct_path(
    model: Any,
    corrupted_tokens: Tensor,
    clean_cache: Any,
    corrupted_cache: Any,
    patching_metric: Metric,
    src_layer: int,
    src_head: int,
    component: str = "q",
    verbose: bool = True,
) -> Tensor:
    """Patch the path from one head into the queries, keys or values of each later head.

        x_dst = resid_pre[dst] + (z_clean - z_corrupted)[src_head] W_O[src_head]
        component[dst_head] <- component of dst_head computed from x_dst; everything else corrupted

    The destination's layer norm is recomputed on x_dst, so the intervention on the edge is exact.
    Source's later effects on other heads stay those of the corrupted run.

    Args:
        model: as in `generic_activation_patch`.
        corrupted_tokens: [b, t] int64.
        clean_cache: the clean run's activations; holds z of src_layer.
        corrupted_cache: the same of the corrupted run.
        patching_metric: maps logits [b, t, v] to one number.
        src_layer: layer of the source head.
        src_head: the source head.
        component: what the destination reads: "q", "k" or "v".
        verbose: show a progress bar.

    Returns:
        [n_layers, n_heads] metric with the path into that head patched; zero in layers up to
        src_layer, where there is no path.

    Raises:
        ArgumentError: src_layer, src_head or component outside what is allowed; keys or values that
            several heads share; an architecture that normalises a head's write before adding it.
        SiteError: the model lacks the component's hook, or a cache lacks z.

    Costs one forward for every later layer and one for every later head, many in a batch.
    Source: Wang et al. 2022, arXiv:2211.00593; the interface is TransformerLens 4's.
    """
    op = "get_act_patch_direct_path"
    model = hooked(model)
    cfg = model.cfg
    _check.shapes(op, corrupted_tokens=(corrupted_tokens, "b t"))
    _check.one_of(op, "component", component, ("q", "k", "v"))
    _check.between(op, "src_layer", src_layer, 0, cfg.n_layers - 1, "n_layers - 1")
    _check.between(op, "src_head", src_head, 0, cfg.n_heads - 1, "n_heads - 1")
    shared = getattr(cfg, "n_key_value_heads", None)
    if component != "q" and shared not in (None, cfg.n_heads):
        msg = (
            f"{op}: component={component!r} has no head of its own for each of the {cfg.n_heads} "
            f"heads: they share n_key_value_heads={shared}. component='q' is available."
        )
        raise ArgumentError(msg)
    results = torch.zeros(cfg.n_layers, cfg.n_heads, device=cfg.device)
    later = range(src_layer + 1, cfg.n_layers)
    if not later:
        return results
    z_name = cells.full_names(op, model, "z", [src_layer])[src_layer]
    z_clean, z_corrupted = (
        cells.clean_activation(op, cache, z_name) for cache in (clean_cache, corrupted_cache)
    )
    with eval_mode(model), torch.no_grad():
        delta = _write(op, model, src_layer, src_head, (z_clean - z_corrupted)[:, :, src_head])
        patched = _components(op, model, corrupted_tokens, delta, later, component)
    scores = sweep(
        model,
        corrupted_tokens,
        patched,
        patching_metric,
        layer_head_vector_patch_setter,
        component,
        index_df=[(layer, head) for layer in later for head in range(cfg.n_heads)],
        progress=verbose,
    )
    results[src_layer + 1 :] = scores.values.view(len(later), cfg.n_heads)
    return results


def get_act_patch_direct_path_all_sources(
    model: Any,
    corrupted_tokens: Tensor,
    clean_cache: Any,
    corrupted_cache: Any,
    patching_metric: Metric,
    component: str = "q",
    verbose: bool = True,
) -> Tensor:
    """`get_act_patch_direct_path` from every head.

    Args:
        model: as in `get_act_patch_direct_path`, like the other arguments.
        corrupted_tokens: [b, t] int64.
        clean_cache: holds z of every layer.
        corrupted_cache: the same of the corrupted run.
        patching_metric: maps logits [b, t, v] to one number.
        component: "q", "k" or "v".
        verbose: show a progress bar, counted in sources.

    Returns:
        [n_layers, n_heads, n_layers, n_heads]: source, then destination; zero where the destination
        is not later.
    """
    from tqdm import tqdm

    model = hooked(model)
    n, h = model.cfg.n_layers, model.cfg.n_heads
    results = torch.zeros(n, h, n, h, device=model.cfg.device)
    sources = cells.grid((n, h))
    for layer, head in tqdm(sources, desc="direct paths", unit="head", disable=not verbose):
        results[layer, head] = get_act_patch_direct_path(
            model,
            corrupted_tokens,
            clean_cache,
            corrupted_cache,
            patching_metric,
            layer,
            head,
            component,
            verbose=False,
        )
    return results


def _write(op: str, model: Any, layer: int, head: int, z: Tensor) -> Tensor:
    """What a head adds to the stream for an output z [b, t, d_head]: z W_O, [b, t, d]."""
    if not isinstance(model, HookedModel):
        if getattr(model.cfg, "use_normalization_before_and_after", False):
            raise ArgumentError(_normalised(op, type(model).__name__))
        weight: Tensor = model.blocks[layer].attn.W_O[head]
        return z.to(weight) @ weight
    table = model.sites
    site, added = table[f"blocks.{layer}.attn.hook_z"], table[f"blocks.{layer}.hook_attn_out"]
    after = table.get(f"blocks.{layer}.hook_resid_mid")
    untouched = site.path.startswith(f"{added.path}.") or isinstance(
        model.model.get_submodule(added.path), nn.Dropout
    )
    if not untouched or (after is not None and not after.at_input):
        raise ArgumentError(_normalised(op, type(model.model).__name__))
    project = model.model.get_submodule(site.path)
    heads = z.new_zeros(*z.shape[:2], model.cfg.n_heads, z.shape[-1])
    heads[:, :, head] = z
    flat = heads.flatten(-2)
    # Linear or Conv1D, with or without a bias, which falls out of the difference.
    out: Tensor = project(flat) - project(torch.zeros_like(flat))
    return out


def _normalised(op: str, model: str) -> str:
    return (
        f"{op}: {model} normalises what attention adds to the stream, so a head's write is not "
        "z W_O. Use a model without a norm between attention and the addition."
    )


def _components(
    op: str, model: Any, tokens: Tensor, delta: Tensor, layers: Sequence[int], component: str
) -> dict[str, Tensor]:
    """Queries, keys or values of some layers, each computed from its own stream plus delta."""
    b = tokens.shape[0]
    reads = cells.full_names(op, model, component, layers)
    streams = cells.full_names(op, model, "resid_pre", layers)
    found: dict[str, Tensor] = {}

    def shift(rows: slice, activation: Tensor, hook: Any) -> Tensor:
        del hook
        activation = activation.clone()
        activation[rows] += delta
        return activation

    def keep(rows: slice, name: str, activation: Tensor, hook: Any) -> None:
        del hook
        found[name] = activation[rows].clone()

    hooks: list[tuple[str, Any]] = []
    for i, layer in enumerate(layers):
        rows = slice(i * b, (i + 1) * b)
        hooks.append((streams[layer], partial(shift, rows)))
        hooks.append((reads[layer], partial(keep, rows, reads[layer])))
    model.run_with_hooks(tokens.repeat(len(layers), 1), fwd_hooks=hooks)
    missing = [name for name in reads.values() if name not in found]
    if missing:
        raise names.no_hook(op, missing[0], found)
    return found
