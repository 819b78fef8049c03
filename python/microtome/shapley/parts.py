"""A language model's own parts as players: attention heads, neurons, blocks, features.

Each function makes a game that every estimator takes in place of a function:

    game = parts.heads(model, clean, corrupted, metric)
    permutation(game, n_permutations=16).values  # [b, heads], one game a prompt

A coalition is the clean run with every absent player's activation replaced. Every layer reads what
the patched layers below it give, so that effects through other parts count.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from microtome import _check
from microtome.errors import ArgumentError
from microtome.models.native.tree import Place
from microtome.patching.engine import MEMORY
from microtome.shapley.parts_features import features
from microtome.shapley.parts_game import PartsGame
from microtome.shapley.parts_start import AnyMetric, Start, start
from microtome.shapley.places import Mixed
from microtome.shapley.players import Players

__all__ = ["features", "heads", "layers", "neurons"]

Units = Sequence[int] | Sequence[tuple[int, int]]
KINDS = {"attn_out": ("attn_out",), "mlp_out": ("mlp_out",), "both": ("attn_out", "mlp_out")}


def heads(
    model: nn.Module,
    clean: Tensor,
    corrupted: Tensor | None,
    metric: AnyMetric,
    *,
    layers: Sequence[int] | None = None,
    heads: Units | None = None,
    absent: str = "resample",
    attention_mask: Tensor | None = None,
    precision: str = "fp32",
    memory: int = MEMORY,
    engine: str = "auto",
) -> PartsGame:
    """Attention heads as players.

    Args:
        model: a causal language model, as in `patching.sweep`.
        clean: [b, t] int64 prompts; each is a game of its own.
        corrupted: [b, t], where absent players' values come from; None for zeros, or means over
            the clean prompts themselves.
        metric: a `patching` metric, or a function of logits [b, t, vocabulary] to [b].
        layers: which layers' heads; all if None.
        heads: which heads of each of these, or pairs (layer, head) instead of `layers`.
        absent: what an absent head's output z is: "resample", the corrupted run's at the same
            position; "zero"; "mean" over all positions of the corrupted prompts, or of the clean
            ones without them; "mean-position", over prompts at the same position.
        attention_mask: [b, t] of both runs.
        precision: "fp32", or "delta-bf16" as in `patching.sweep`.
        memory: bytes for all activations.
        engine: "auto", "native", "blocks" or "forwards".

    Returns:
        A game of p heads with b explicands, for any estimator of `microtome.shapley`.

    Raises:
        ArgumentError: no such head, layer or option, or "resample" without a corrupted run.
        ShapeError, SiteError, NonFiniteError: as `patching.sweep`.

    A head's value is its average effect over all sets of other heads that are left in; a head that
    only backs up another has a value where ablating it alone does nothing. Values hold between
    these prompts and for this replacement.

    Example:
        >>> import torch
        >>> from microtome.models import ToyModel
        >>> from microtome.patching import logit_difference
        >>> from microtome.shapley import parts, permutation
        >>> clean = torch.arange(8)[None]
        >>> corrupted = clean.clone(); corrupted[0, 3] = 99
        >>> game = parts.heads(ToyModel(), clean, corrupted, logit_difference(11, 12))
        >>> permutation(game, n_permutations=2).values.shape
        torch.Size([1, 16])
    """
    begun = start(
        "heads", model, clean, corrupted, absent, attention_mask, precision, memory, engine, ("z",)
    )
    chosen = _chosen("heads", "head", begun, layers, heads, begun.shape.heads)
    names = [f"L{layer}H{head}" for layer, head in chosen]
    return _columns(begun, "z", chosen, names, metric)


def neurons(
    model: nn.Module,
    clean: Tensor,
    corrupted: Tensor | None,
    metric: AnyMetric,
    *,
    layers: Sequence[int] | None = None,
    neurons: Units | None = None,
    absent: str = "resample",
    attention_mask: Tensor | None = None,
    precision: str = "fp32",
    memory: int = MEMORY,
    engine: str = "auto",
) -> PartsGame:
    """Neurons of MLPs as players, at their output (after the gate, where there is one).

    Args:
        model: as in `heads`, and so all that follows but `neurons`.
        clean: [b, t] int64.
        corrupted: [b, t] or None.
        metric: what is measured.
        layers: which layers' neurons.
        neurons: which neurons of each of these, or pairs (layer, neuron).
        absent: what absent neurons are.
        attention_mask: [b, t].
        precision: "fp32" or "delta-bf16".
        memory: bytes.
        engine: "auto", "native", "blocks" or "forwards".

    Returns:
        A game of p neurons. Thousands of players want `adaptive`.

    Raises:
        ArgumentError, ShapeError, SiteError, NonFiniteError: as `heads`.

    Example:
        >>> import torch
        >>> from microtome.models import ToyModel
        >>> from microtome.patching import logit_difference
        >>> from microtome.shapley import parts
        >>> clean = torch.arange(8)[None]
        >>> game = parts.neurons(
        ...     ToyModel(), clean, None, logit_difference(11, 12), layers=[2], absent="zero"
        ... )
        >>> len(game.players)
        256
    """
    begun = start(
        "neurons", model, clean, corrupted, absent, attention_mask, precision, memory, engine,
        ("neurons",),
    )  # fmt: skip
    chosen = _chosen("neurons", "neuron", begun, layers, neurons, begun.shape.d_mlp)
    names = [f"L{layer}N{neuron}" for layer, neuron in chosen]
    return _columns(begun, "neurons", chosen, names, metric)


def layers(
    model: nn.Module,
    clean: Tensor,
    corrupted: Tensor | None,
    metric: AnyMetric,
    *,
    kind: str = "both",
    layers: Sequence[int] | None = None,
    absent: str = "resample",
    attention_mask: Tensor | None = None,
    precision: str = "fp32",
    memory: int = MEMORY,
    engine: str = "auto",
) -> PartsGame:
    """Attention and MLP blocks as players: what each adds to the residual stream.

    Args:
        model: as in `heads`, and so all that follows but `kind`.
        clean: [b, t] int64.
        corrupted: [b, t] or None.
        metric: what is measured.
        kind: "attn_out", "mlp_out" or "both", each block a player of its own.
        layers: which layers.
        absent: what an absent block adds.
        attention_mask: [b, t].
        precision: "fp32" or "delta-bf16".
        memory: bytes.
        engine: "auto", "native", "blocks" or "forwards".

    Returns:
        A game of one or two players a layer.

    Raises:
        ArgumentError, ShapeError, SiteError, NonFiniteError: as `heads`.

    Example:
        >>> import torch
        >>> from microtome.models import ToyModel
        >>> from microtome.patching import logit_difference
        >>> from microtome.shapley import parts
        >>> clean = torch.arange(8)[None]
        >>> game = parts.layers(ToyModel(), clean, None, logit_difference(11, 12), absent="mean")
        >>> game.players.names[:3]
        ('attn_out.0', 'mlp_out.0', 'attn_out.1')
    """
    _check.one_of("layers", "kind", kind, tuple(KINDS))
    begun = start(
        "layers", model, clean, corrupted, absent, attention_mask, precision, memory, engine,
        KINDS[kind],
    )  # fmt: skip
    which = _layers("layers", begun, layers)
    names, places = [], []
    for layer in which:
        for site in KINDS[kind]:
            player = torch.zeros(begun.shape.d, dtype=torch.int32)
            places.append(_mixed(begun, site, layer, player, torch.tensor([len(names)])))
            names.append(f"{site}.{layer}")
    view = {"site": kind, "layer": tuple(which)}
    return begun.game(places, Players(tuple(names), "parts", view=view), metric)


def _columns(
    begun: Start, site: str, chosen: list[tuple[int, int]], names: list[str], metric: AnyMetric
) -> PartsGame:
    """A game of columns of one kind of site: one player for each (layer, unit)."""
    shape, places = begun.shape, []
    for layer in sorted({layer for layer, _ in chosen}):
        here = [(j, unit) for j, (at, unit) in enumerate(chosen) if at == layer]
        player = torch.full((shape.units(site),), -1, dtype=torch.int32)
        player[[unit for _, unit in here]] = torch.arange(len(here), dtype=torch.int32)
        player = player.repeat_interleave(shape.unit(site))
        places.append(_mixed(begun, site, layer, player, torch.tensor([j for j, _ in here])))
    view = {"site": site, "layer": [a for a, _ in chosen], "unit": [u for _, u in chosen]}
    return begun.game(places, Players(tuple(names), "parts", view=view), metric)


def _mixed(begun: Start, site: str, layer: int, player: Tensor, players: Tensor) -> Place:
    """A place where players hold columns."""
    layer, stage = begun.shape.stage(site, layer)
    source, row = begun.replaced(layer, stage)
    return Place(layer, stage, players, Mixed(player.to(source.device), source, row))


def _layers(op: str, begun: Start, layers: Sequence[int] | None) -> list[int]:
    """Layers asked for, in order, or all."""
    if layers is None:
        return list(range(begun.shape.layers))
    return [_unit(op, "layer", layer, begun.shape.layers) for layer in _some(op, "layers", layers)]


def _chosen(
    op: str, name: str, begun: Start, layers: Sequence[int] | None, units: Units | None, size: int
) -> list[tuple[int, int]]:
    """Pairs (layer, unit), each once.

    Raises:
        ArgumentError: no such layer or unit, one twice, none at all, or pairs beside layers.
    """
    units = list(range(size)) if units is None else _some(op, f"{name}s", units)
    if any(isinstance(unit, Sequence) for unit in units):
        if layers is not None or not all(isinstance(u, Sequence) and len(u) == 2 for u in units):
            msg = (
                f"{op}: {name}s are numbers, of each of the layers, or pairs (layer, {name}). Pass "
                "numbers, with or without layers=, or pairs without it."
            )
            raise ArgumentError(msg)
        pairs: list[Any] = list(units)
    else:
        pairs = [(layer, unit) for layer in _layers(op, begun, layers) for unit in units]
    out = [
        (_unit(op, "layer", layer, begun.shape.layers), _unit(op, name, unit, size))
        for layer, unit in pairs
    ]
    twice = next((pair for pair in out if out.count(pair) > 1), None) if len(out) < 4096 else None
    if twice or len(set(out)) != len(out):
        msg = f"{op}: a {name} was named twice{f', {twice}' if twice else ''}. Name each once."
        raise ArgumentError(msg)
    return out


def _some(op: str, name: str, given: Sequence[Any]) -> list[Any]:
    """A list that is not empty."""
    out: list[Any] = list(given)
    if not out:
        msg = f"{op}: {name} is an empty list. Name at least one, or leave it out for all."
        raise ArgumentError(msg)
    return out


def _unit(op: str, name: str, number: Any, size: int) -> int:
    """A number from 0 on, checked."""
    if isinstance(number, bool) or not 0 <= int(number) < size:
        msg = f"{op}: {name}s lie between 0 and {size - 1}, got {name} {number}."
        raise ArgumentError(msg)
    return int(number)
