"""Canonical names of the places in a transformer, and where each known architecture keeps them."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from operator import attrgetter

from torch import nn

from microtome.errors import ArgumentError, SiteError

KINDS = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "z")


@dataclass(frozen=True)
class Family:
    """Where a family of models keeps its sites, as paths below a block; ":in" is a module's input.

    Attributes:
        name: for messages.
        model_types: values of `model.config.model_type` that belong to the family.
        blocks: last part of the path of the list of blocks.
        resid_mid: the residual stream between attention and MLP.
        attn_out: what attention adds to the residual stream (after a post-norm, where there is
            one).
        mlp_out: what the MLP adds to it.
        z: the heads' outputs, i.e. the input of the attention's output projection.
        d_head: attribute that holds the width of a head.
        learned_positions: True if no sequence may exceed `config.max_position_embeddings`.
    """

    name: str
    model_types: tuple[str, ...]
    blocks: str
    resid_mid: str
    attn_out: str
    mlp_out: str
    z: str
    d_head: str
    learned_positions: bool = False


_GEMMA2 = Family(
    name="Gemma 2 and 3",
    model_types=("gemma2", "gemma3_text"),
    blocks="layers",
    resid_mid="pre_feedforward_layernorm:in",
    attn_out="post_attention_layernorm",
    mlp_out="post_feedforward_layernorm",
    z="self_attn.o_proj:in",
    d_head="self_attn.head_dim",
)
_GPT2 = Family(
    name="GPT-2",
    model_types=("gpt2",),
    blocks="h",
    resid_mid="ln_2:in",
    attn_out="attn",
    mlp_out="mlp",
    z="attn.c_proj:in",
    d_head="attn.head_dim",
    learned_positions=True,
)

FAMILIES = (
    _GPT2,
    dataclasses.replace(_GPT2, name="the toy model", model_types=("microtome_toy",)),
    Family(
        name="Llama, SmolLM, Mistral, Qwen 2 and 3, Gemma",
        model_types=("llama", "smollm3", "mistral", "qwen2", "qwen3", "gemma"),
        blocks="layers",
        resid_mid="post_attention_layernorm:in",
        attn_out="self_attn",
        mlp_out="mlp",
        z="self_attn.o_proj:in",
        d_head="self_attn.head_dim",
    ),
    _GEMMA2,
    # The language model inside the image-and-text Gemma 3; its vision tower has "layers" too.
    dataclasses.replace(_GEMMA2, model_types=("gemma3",), blocks="language_model.layers"),
    Family(
        name="GPT-NeoX",
        model_types=("gpt_neox",),
        blocks="layers",
        resid_mid="post_attention_layernorm:in",
        attn_out="post_attention_dropout",
        mlp_out="post_mlp_dropout",
        z="attention.dense:in",
        d_head="attention.head_size",
    ),
    # Post-norm: the stream a BERT block hands on is normalised, and so is resid_mid.
    Family(
        name="BERT",
        model_types=("bert",),
        blocks="encoder.layer",
        resid_mid="attention.output",
        attn_out="attention.output.dropout",
        mlp_out="output.dropout",
        z="attention.output.dense:in",
        d_head="attention.self.attention_head_size",
        learned_positions=True,
    ),
)


@dataclass(frozen=True)
class Site:
    """One resolved site.

    Attributes:
        name: as the user wrote it.
        path: the module it lies at.
        at_input: at the module's input instead of its output.
        d_head: split the last axis into heads of this width, or None.
        skip: for a residual stream that reads off a norm's input, (block, module whose output the
            block adds to it): the stream also bypasses the norm, so that replacing it takes all
            three.
    """

    name: str
    path: str
    at_input: bool = False
    d_head: int | None = None
    skip: tuple[str, str] | None = None


def family_of(model: nn.Module) -> Family | None:
    """The architecture of a model by its `config.model_type`, or None."""
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    return next((f for f in FAMILIES if model_type in f.model_types), None)


def sites(model: nn.Module) -> list[str]:
    """List the canonical sites that a model has.

    For each layer L: `resid_pre.L` (the residual stream entering the block), `resid_mid.L` (between
    attention and MLP), `resid_post.L` (leaving it), `attn_out.L` and `mlp_out.L` (what each adds to
    the stream), `z.L` (the heads' outputs before the output projection, [b, t, h, d_head]). Models
    whose attention and MLP run in parallel have no resid_mid. In BERT, whose norms come last,
    resid_mid and resid_post are the normalised stream.

    Args:
        model: a Hugging Face GPT-2, Llama, SmolLM, Mistral, Qwen 2/3, Gemma 1/2/3, GPT-NeoX or
            BERT, or the toy model.

    Returns:
        Names grouped by kind, in the order above. Any module path works in `capture` and `splice`
        too.

    Raises:
        SiteError: the architecture is unknown, or the model has no blocks.
    """
    return list(canonical("sites", model))


def canonical(op: str, model: nn.Module) -> dict[str, Site]:
    """Every canonical site by name; SiteError if the architecture is unknown or has no blocks."""
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
            name = f"{kind}.{layer}"
            table[name] = _site(name, kind, f"{at}.{layer}", block, family)
    return table


def resolve(op: str, model: nn.Module, names: str | Iterable[str]) -> list[Site]:
    """Find the sites a user named, canonical or by module path, each once and in the order given.

    Raises:
        ArgumentError: no name was given, or one is no string.
        SiteError: a name matches nothing; the message lists what the model has.
    """
    wanted = [names] if isinstance(names, str) else list(names)
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


def _site(name: str, kind: str, at: str, block: nn.Module, family: Family) -> Site:
    """The site of one kind in one block."""
    if kind in ("resid_pre", "resid_post"):
        return Site(name, at, at_input=kind == "resid_pre")
    path, _, side = str(getattr(family, kind)).partition(":")
    d_head = int(attrgetter(family.d_head)(block)) if kind == "z" else None
    skip = (at, f"{at}.{family.mlp_out}") if kind == "resid_mid" and side else None
    return Site(name, f"{at}.{path}", at_input=bool(side), d_head=d_head, skip=skip)


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
    return f"{op}: no site matches {name!r}{why}; the model has {has}. Closest: {near[0]!r}."


def _span(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} ... {names[-1]}"
