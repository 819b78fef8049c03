"""Canonical names of the places in a transformer, found in a model."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from operator import attrgetter

from torch import nn

from microtome.errors import ArgumentError, SiteError
from microtome.models.families import FAMILIES, KINDS, Family, Place, family_of
from microtome.models.pattern import can_watch


@dataclass(frozen=True)
class Site:
    """One resolved site.

    Attributes:
        name: as the user wrote it.
        path: the module it lies at.
        at_input: at the module's input instead of its output.
        kind: one of KINDS, or None for a module path.
        layer: the block it lies in, or None.
        heads: how the heads lie in the module's tensor: see `families.Place`.
        d_head: the width of a head where the tensor has to be split into heads, or None.
        skip: for a residual stream that reads off a norm's input, (block, module whose output the
            block adds to it): the stream also bypasses the norm, so that replacing it takes all
            three.
    """

    name: str
    path: str
    at_input: bool = False
    kind: str | None = None
    layer: int | None = None
    heads: str = ""
    d_head: int | None = None
    skip: tuple[str, str] | None = None


def sites(model: nn.Module) -> list[str]:
    """List the canonical sites that a model has.

    For each layer L:

    - `resid_pre.L`, `resid_mid.L`, `resid_post.L`: the residual stream entering the block, between
      attention and MLP, leaving the block, [b, t, d];
    - `attn_out.L`, `mlp_out.L`: what each adds to the stream, [b, t, d];
    - `q.L`, `k.L`, `v.L`: the heads' queries, keys and values, [b, t, h, d_head], before rotary
      embedding and after the norm that Qwen 3 and Gemma 3 give queries and keys; k and v have the
      key-value heads;
    - `pattern.L`: the attention pattern after the softmax, [b, h, destination, source];
    - `z.L`: the heads' outputs before the output projection, [b, t, h, d_head];
    - `neurons.L`: the MLP's hidden activations, after nonlinearity and gate, [b, t, d_mlp].

    Models whose attention and MLP run in parallel have no resid_mid. In BERT, whose norms come
    last, resid_mid and resid_post are the normalised stream. While a pattern is read or replaced,
    the whole model computes attention in plain steps: other sites then differ by rounding from what
    they are under fused attention. Attention that cannot be exchanged has no pattern.

    Args:
        model: a Hugging Face GPT-2, Llama, SmolLM, Mistral, Qwen 2/3, Gemma 1/2/3, GPT-NeoX or
            BERT, or the toy model.

    Returns:
        Names grouped by kind, in the order above. Any module path works in `capture` and `splice`
        too.

    Raises:
        SiteError: the architecture is unknown, or the model has no blocks.
        ArgumentError: the model is no nn.Module.
    """
    return list(canonical("sites", model))


def canonical(op: str, model: nn.Module) -> dict[str, Site]:
    """Every canonical site by name; SiteError if the architecture is unknown or has no blocks."""
    _check_model(op, model)
    family = family_of(model)
    if family is None:
        msg = f"{op}: {_unknown(model)}"
        raise SiteError(msg)
    at, blocks = _blocks(op, model, family)
    table: dict[str, Site] = {}
    for kind in KINDS:
        for layer, block in enumerate(blocks):
            if kind == "resid_mid" and _parallel(block):
                continue
            if kind == "pattern" and not can_watch(block.get_submodule(family.attention)):
                continue
            site = _site(kind, layer, f"{at}.{layer}", block, family)
            table[site.name] = site
    return table


def resolve(op: str, model: nn.Module, names: str | Iterable[str]) -> list[Site]:
    """Find the sites a user named, canonical or by module path, each once and in the order given.

    Raises:
        ArgumentError: no name was given, or one is no string; or the model is no nn.Module.
        SiteError: a name matches nothing; the message lists what the model has.
    """
    _check_model(op, model)
    listed = isinstance(names, Iterable) and not isinstance(names, str)
    wanted: list[str] = list(names) if listed else [names]  # type: ignore[list-item]
    if not wanted or not all(isinstance(name, str) for name in wanted):
        msg = f"{op}: sites must be a name or a list of names such as 'resid_pre.0', got {names!r}."
        raise ArgumentError(msg)
    known = canonical(op, model) if family_of(model) is not None else {}
    modules = {path for path, _ in model.named_modules() if path}
    found: dict[str, Site] = {}
    for name in wanted:
        path, _, side = name.partition(":")
        if name in known:
            found[name] = known[name]
        elif path in modules and side in ("", "in"):
            found[name] = Site(name, path, at_input=side == "in")
        else:
            raise SiteError(_no_match(op, model, name, list(known), modules))
    return list(found.values())


def _check_model(op: str, model: object) -> None:
    if not isinstance(model, nn.Module):
        msg = f"{op}: model must be an nn.Module, got {model!r:.60}. Load it first, for example "
        msg += "with transformers' from_pretrained or microtome.models.load."
        raise ArgumentError(msg)


def _site(kind: str, layer: int, at: str, block: nn.Module, family: Family) -> Site:
    """The site of one kind in one block, `block`, which lies at `at`."""
    name = f"{kind}.{layer}"
    if kind in ("resid_pre", "resid_post"):
        return Site(name, at, kind == "resid_pre", kind, layer)
    if kind == "pattern":
        return Site(name, f"{at}.{family.attention}", kind=kind, layer=layer)
    place: Place = getattr(family, kind)
    bypassed = kind == "resid_mid" and place.at_input
    return Site(
        name,
        f"{at}.{place.path}",
        place.at_input,
        kind,
        layer,
        heads=place.heads,
        d_head=int(attrgetter(family.d_head)(block)) if place.heads else None,
        skip=(at, f"{at}.{family.mlp_out.path}") if bypassed else None,
    )


def _blocks(op: str, model: nn.Module, family: Family) -> tuple[str, nn.ModuleList]:
    """The list of blocks and its path."""
    for path, module in model.named_modules():
        listed = isinstance(module, nn.ModuleList) and len(module) > 0
        if listed and f".{path}".endswith(f".{family.blocks}"):
            return path, module
    msg = (
        f"{op}: {type(model).__name__} has no blocks: no list of modules ends in "
        f"'{family.blocks}', where {family.name} keeps them. Pass the whole model, or name module "
        "paths."
    )
    raise SiteError(msg)


def _parallel(block: nn.Module) -> bool:
    """True if attention and MLP read the same stream."""
    return bool(getattr(block, "use_parallel_residual", False))


def _unknown(model: nn.Module) -> str:
    """What to say of a model without canonical sites."""
    families = "; ".join(dict.fromkeys(family.name for family in FAMILIES))
    path = next((path for path, _ in model.named_modules() if path), None)
    hint = "it has no submodules" if path is None else f"{path!r} (output) or '{path}:in' (input)"
    return (
        f"{type(model).__name__} is no architecture with canonical sites ({families}). "
        f"Name module paths instead: {hint}."
    )


def _no_match(op: str, model: nn.Module, name: str, known: list[str], modules: set[str]) -> str:
    """The message for a name that matches nothing."""
    if not known:
        close = difflib.get_close_matches(name, sorted(modules), 1, 0.0)
        hint = f" Closest: {close[0]!r}." if close else ""
        return f"{op}: no site matches {name!r}; {_unknown(model)}{hint}"
    kind, _, layer = name.partition(".")
    spans = {k: [site for site in known if site.startswith(f"{k}.")] for k in KINDS}
    if spans.get(kind):
        beyond = layer.isdigit()  # known layers count up from 0, so the last one is the nearest
        near = [spans[kind][-1]] if beyond else difflib.get_close_matches(name, spans[kind], 1, 0.0)
        has = _span(spans[kind])
    else:
        near = difflib.get_close_matches(name, [*known, *sorted(modules)], 1, 0.0)
        has = ", ".join(_span(names) for names in spans.values() if names) + " and module paths"
    why = ""
    if kind == "resid_mid" and not spans["resid_mid"]:
        why = " (attention and MLP run in parallel, so no stream lies between them)"
    if kind == "pattern" and not spans["pattern"]:
        why = (
            " (its attention does not go through the attention functions of transformers, so the "
            "pattern is out of reach; a newer transformers may help)"
        )
    return f"{op}: no site matches {name!r}{why}; the model has {has}. Closest: {near[0]!r}."


def _span(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} ... {names[-1]}"
