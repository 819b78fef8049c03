"""TransformerLens's hook names, and the sites of a plain model that they stand for."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

from torch import nn

from microtome.errors import SiteError
from microtome.models.sites import Site, canonical

# Kind of site -> its hook below a block, in the order in which a block fires them.
BLOCK_HOOKS = {
    "resid_pre": "hook_resid_pre",
    "q": "attn.hook_q",
    "k": "attn.hook_k",
    "v": "attn.hook_v",
    "pattern": "attn.hook_pattern",
    "z": "attn.hook_z",
    "attn_out": "hook_attn_out",
    "resid_mid": "hook_resid_mid",
    "neurons": "mlp.hook_post",
    "mlp_out": "hook_mlp_out",
    "resid_post": "hook_resid_post",
}
_KINDS = {hook: kind for kind, hook in BLOCK_HOOKS.items()}

_IN_ATTENTION = ("q", "k", "v", "z", "rot_q", "rot_k", "result", "pattern", "attn_scores")
_IN_MLP = ("pre", "post", "mid", "pre_linear")
_BY_HEAD = ("q", "k", "v", "z", "rot_q", "rot_k", "result")
_SPELLINGS = {
    "attn": "pattern",
    "attn_logits": "attn_scores",
    "query": "q",
    "key": "k",
    "value": "v",
    "mlp_pre": "pre",
    "mlp_mid": "mid",
    "mlp_post": "post",
    "neurons": "post",
}
_PARTS = {"a": "attn", "attention": "attn", "m": "mlp", "b": "", "block": "", "blocks": ""}


def get_act_name(name: str, layer: int | str | None = None, layer_type: str | None = None) -> str:
    """Spell out a short activation name.

    Args:
        name: "z", "resid_pre", "mlp_post", ...; with the layer and the part appended if one likes
            ("k6", "scale4ln1"), or a full hook name, which is returned as it is.
        layer: the block; None for names outside the blocks.
        layer_type: which of a block's modules, for names that occur in several ("ln1"); "a" and "m"
            stand for attn and mlp.

    Returns:
        The full hook name.

    Example:
        >>> get_act_name("z", 3), get_act_name("resid_pre", 0), get_act_name("embed")
        ('blocks.3.attn.hook_z', 'blocks.0.hook_resid_pre', 'hook_embed')
        >>> get_act_name("pre5"), get_act_name("scale4ln1"), get_act_name("normalized")
        ('blocks.5.mlp.hook_pre', 'blocks.4.ln1.hook_scale', 'ln_final.hook_normalized')
    """
    if layer is None and layer_type is None and ("." in name or name.startswith("hook_")):
        return name
    joined = re.fullmatch(r"([a-z_]+)(\d+)([a-z]?.*)", name)
    if joined is not None:
        name, layer, layer_type = joined[1], joined[2], joined[3] or layer_type
    name = _SPELLINGS.get(name, name)
    if name in _IN_ATTENTION:
        part = "attn"
    elif name in _IN_MLP:
        part = "mlp"
    else:
        part = _PARTS.get(layer_type or "", layer_type or "")
    if layer is None and name in ("scale", "normalized"):
        part = "ln_final"
    block = "" if layer is None else f"blocks.{layer}."
    return f"{block}{part}{'.' if part else ''}hook_{name}"


def hook_name(site: str) -> str | None:
    """The hook name of a canonical site: "z.3" -> "blocks.3.attn.hook_z"; None for another name."""
    kind, _, layer = site.partition(".")
    if kind not in BLOCK_HOOKS or not layer.isdigit():
        return None
    return f"blocks.{layer}.{BLOCK_HOOKS[kind]}"


def site_name(hook: str) -> str | None:
    """The canonical site of a hook name: "blocks.3.attn.hook_z" -> "z.3"; None for another name."""
    match = re.fullmatch(r"blocks\.(\d+)\.(.+)", hook)
    if match is None or match[2] not in _KINDS:
        return None
    return f"{_KINDS[match[2]]}.{match[1]}"


def kind_of(hook: str) -> str | None:
    """The kind of site of a hook name: "blocks.3.attn.hook_z" -> "z"; None for another name."""
    site = site_name(hook)
    return None if site is None else site.partition(".")[0]


def layer_of(hook: str) -> int | None:
    """The block a hook name lies in, or None."""
    match = re.match(r"blocks\.(\d+)\.", hook)
    return None if match is None else int(match[1])


def position_axis(hook: str) -> int:
    """Which axis of an activation counts positions, from the end; for a pattern the destination."""
    return -3 if hook.rpartition("hook_")[2] in _BY_HEAD else -2


def dimensions(hook: str) -> int:
    """How many axes an activation has, the batch among them."""
    short = hook.rpartition("hook_")[2]
    return 4 if short in _BY_HEAD or short in ("pattern", "attn_scores") else 3


def hook_table(op: str, model: nn.Module) -> dict[str, Site]:
    """Every hook name a plain model has, with its site, in the order of a forward.

    Raises:
        SiteError: the architecture is unknown, or the model has no blocks.
    """
    sites = canonical(op, model)
    layers = sorted({int(name.partition(".")[2]) for name in sites})
    table: dict[str, Site] = {}
    embeddings = getattr(model, "get_input_embeddings", lambda: None)()
    for path, module in model.named_modules():
        if module is embeddings and path:
            table["hook_embed"] = Site("hook_embed", path)
    for layer in layers:
        for kind, hook in BLOCK_HOOKS.items():
            site = sites.get(f"{kind}.{layer}")
            if site is not None:
                table[f"blocks.{layer}.{hook}"] = site
    return table


def no_hook(op: str, name: object, known: Iterable[str]) -> SiteError:
    """The error for a name that matches no hook, with what there is and the closest."""
    known = list(known)
    layers = [layer for layer in map(layer_of, known) if layer is not None]
    below = dict.fromkeys(re.sub(r"^blocks\.\d+\.", "blocks.{l}.", hook) for hook in known)
    span = f" with l from 0 to {max(layers)}" if layers else ""
    near = difflib.get_close_matches(str(name), known, 1, 0.0)
    hint = f" Closest: {near[0]!r}." if near else ""
    return SiteError(
        f"{op}: no hook matches {name!r}; the model has {', '.join(below)}{span}.{hint}"
    )
