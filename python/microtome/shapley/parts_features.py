"""Features of sparse autoencoders as players."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from microtome import _check
from microtome.errors import ArgumentError, ShapeError, SiteError
from microtome.models.native.tree import Place
from microtome.patching.engine import MEMORY
from microtome.patching.features import STREAMS, dense_code
from microtome.shapley.parts_game import PartsGame
from microtome.shapley.parts_start import AnyMetric, Start, start
from microtome.shapley.places import CODE, Coded
from microtome.shapley.players import Players


def features(
    model: nn.Module,
    sae: Any,
    at: str | Sequence[str],
    clean: Tensor,
    corrupted: Tensor | None,
    metric: AnyMetric,
    *,
    features: Sequence[int] | Sequence[Sequence[int]] | None = None,
    top: int = 32,
    absent: str = "resample",
    attention_mask: Tensor | None = None,
    precision: str = "fp32",
    memory: int = MEMORY,
    engine: str = "auto",
) -> PartsGame:
    """Features of sparse autoencoders as players.

        x <- x + sum over absent f of (a'_f - a_f(x)) W_dec[f]

    where a(x) is the code of the run itself, changes at earlier places included, and a' what an
    absent feature is. What the autoencoder leaves out stays.

    Args:
        model: as in `heads`.
        sae: an autoencoder as in `patching.sweep_features`; or one for each site.
        at: the site it was trained on, "resid_pre.10", or resid_mid, resid_post, attn_out, mlp_out;
            or a list of sites.
        clean: [b, t] int64.
        corrupted: [b, t] or None.
        metric: as in `heads`.
        features: ids (a list of them for each site, where there are several sites); None takes the
            `top` of each site that move the stream most when they are all taken out.
        top: how many, where `features` is None.
        absent: what a' is: "resample", "zero", "mean" or "mean-position", as in `heads`.
        attention_mask: [b, t].
        precision: "fp32" or "delta-bf16".
        memory: bytes.
        engine: "auto", "native", "blocks" or "forwards".

    Returns:
        A game of p features.

    Raises:
        ArgumentError: no such feature or site, or no feature changes.
        ShapeError: an autoencoder's width is not its site's.
        SiteError, NonFiniteError: as `heads`.

    A feature's value says what its direction carries given this dictionary; another dictionary cuts
    the same stream into other features.

    Example:
        >>> import torch, microtome as mt
        >>> from microtome.models import ToyModel
        >>> from microtome.patching import logit_difference
        >>> from microtome.shapley import parts
        >>> sae, clean = mt.SAE(64, 128, mt.TopK(8)), torch.arange(8)[None]
        >>> metric = logit_difference(11, 12)
        >>> game = parts.features(
        ...     ToyModel(), sae, "resid_pre.2", clean, None, metric, absent="zero", top=5
        ... )
        >>> len(game.players)
        5
    """
    op = "features"
    several = not isinstance(at, str)
    sites = [at] if isinstance(at, str) else list(at)
    saes = list(sae) if several else [sae]
    wanted: Any = features if several else (None if features is None else [features])
    wanted = [None] * len(sites) if wanted is None else list(wanted)
    if not len(sites) == len(saes) == len(wanted) or len(set(sites)) < len(sites) or not sites:
        msg = (
            f"{op}: {len(sites)} sites, {len(saes)} autoencoders and {len(wanted)} lists of "
            "features. Pass one of each for each site, and each site once."
        )
        raise ArgumentError(msg)
    kinds = [site.partition(".")[0] for site in sites]
    for kind in kinds:
        _check.one_of(op, "site", kind, STREAMS)
    begun = start(
        op, model, clean, corrupted, absent, attention_mask, precision, memory, engine, kinds
    )
    places: list[Place] = []
    names: list[str] = []
    begin = torch.full((begun.shape.b,), begun.shape.t)
    for site, one, ids in zip(sites, saes, wanted, strict=True):
        found, change, changed = _coded(begun, site, one, ids, top)
        layer, stage = _place(begun, site)
        players = torch.arange(len(found)) + len(names)
        places.append(Place(layer, stage, players, change))
        names += [f"{site} f{j}" if several else f"f{j}" for j in found.tolist()]
        begin = torch.minimum(begin, changed)
    view = {"site": sites[0] if not several else tuple(sites)}
    return begun.game(places, Players(tuple(names), "parts", view=view), metric, begin)


def _place(begun: Start, site: str) -> tuple[int, str]:
    """Layer and stage of a site.

    Raises:
        SiteError: no such layer.
    """
    kind, _, layer = site.partition(".")
    if not layer.isdigit() or int(layer) >= begun.shape.layers:
        last = begun.shape.layers - 1
        msg = f"features: no site {site!r}; the model has {kind}.0 ... {kind}.{last}."
        raise SiteError(msg)
    return begun.shape.stage(kind, int(layer))


def _coded(
    begun: Start, site: str, sae: Any, wanted: Sequence[int] | None, top: int
) -> tuple[Tensor, Coded, Tensor]:
    """Ids [p], their change, and [b] the first position where it does something (t for none)."""
    shape = begun.shape
    x = begun.engine.activation(*_place(begun, site))  # [(b + s) * t, d]
    W_dec = sae.W_dec.detach().to(x)
    if W_dec.shape[1] != x.shape[1]:
        msg = f"features: the autoencoder has d={W_dec.shape[1]}, but {site} has d={x.shape[1]}."
        raise ShapeError(msg)
    b, t, count = shape.b, shape.t, len(W_dec)
    counts = ~shape.padding(torch.arange(t).expand(b, -1)).flatten().to(x.device)  # [b * t]
    if wanted is None:
        _check.between("features", "top", top, 1, 1 << 30)
        code = _columns(sae, torch.arange(count), x)
        new, row = begun.filled(code)
        moved = (new[row.to(x.device)] - code[: b * t])[counts].abs().sum(0)
        moved = (moved * W_dec.norm(dim=1)).cpu()
        ids = moved.argsort(descending=True, stable=True)[: min(top, int(moved.gt(0).sum()))]
        if len(ids) == 0:
            msg = (
                f"features: no feature of {site} changes when it is absent. Do both runs differ "
                "there, and is any feature active? Or name the features."
            )
            raise ArgumentError(msg)
        ids = ids.sort().values
        known, new = code[:, ids], new[:, ids]
    else:
        ids = torch.as_tensor(list(wanted), dtype=torch.int64)
        if len(ids) == 0 or len(ids.unique()) < len(ids):
            msg = f"features: name at least one feature of {site}, and each once, got {wanted}."
            raise ArgumentError(msg)
        _check.index_range("features", ids, count, "n_features")
        known = _columns(sae, ids, x)
        new, row = begun.filled(known)
    apart = (new[row.to(x.device)] != known[: b * t]).any(1) & counts
    apart = apart.unflatten(0, (b, t)).cpu()
    begin = torch.where(apart.any(1), apart.int().argmax(1), t)
    change = Coded(partial(_columns, sae, ids), known, new, row, W_dec[ids])
    return ids, change, begin


def _columns(sae: Any, ids: Tensor, x: Tensor) -> Tensor:
    """[T, p]: the code of x [T, d] at some features, the dense code formed a piece at a time."""
    step = max(1, CODE // len(sae.W_dec))
    parts = [dense_code(sae, part)[:, ids.to(part.device)] for part in x.split(step)]
    return torch.cat(parts) if parts else x.new_empty(0, len(ids))
