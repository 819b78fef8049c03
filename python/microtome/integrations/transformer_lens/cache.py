"""The activations of one run, by TransformerLens's hook names."""

from __future__ import annotations

import difflib
from collections.abc import ItemsView, Iterator, KeysView, Sequence, ValuesView
from typing import Any

import torch
from torch import Tensor

from microtome.errors import ArgumentError, ShapeError, SiteError
from microtome.integrations.transformer_lens.names import get_act_name

Key = str | tuple[Any, ...]


class ActivationCache:
    """What `run_with_cache` returns beside the model's output: plain tensors by hook name.

    A key is a full name (`cache["blocks.3.attn.hook_z"]`), a short one (`cache["embed"]`,
    `cache["z3"]`) or a tuple of a short name, a layer and, where a block has several, the module
    (`cache["z", 3]`, `cache["resid_pre", -1]`, `cache["scale", 2, "ln1"]`). The tensors are copies
    without gradient: writing into them changes no model. The cache keeps no model.

    Args:
        cache_dict: full hook name -> [b, t, ...] tensor.
        n_layers: the model's number of blocks, for negative layers.
        has_batch_dim: False if the tensors lack their first axis.
    """

    def __init__(
        self, cache_dict: dict[str, Tensor], n_layers: int, has_batch_dim: bool = True
    ) -> None:
        self.cache_dict = cache_dict
        self.n_layers = n_layers
        self.has_batch_dim = has_batch_dim

    def __getitem__(self, key: Key) -> Tensor:
        """The activation at a key; SiteError if it was not kept."""
        name = self._full(key)
        if name not in self.cache_dict:
            near = difflib.get_close_matches(name, list(self.cache_dict), 1, 0.0)
            closest = f" Closest: {near[0]!r}." if near else ""
            msg = (
                f"ActivationCache: holds no {name!r}; it holds {len(self)} activations.{closest} "
                "names_filter of run_with_cache decides what is kept."
            )
            raise SiteError(msg)
        return self.cache_dict[name]

    def __contains__(self, key: Key) -> bool:
        return self._full(key) in self.cache_dict

    def _full(self, key: Key) -> str:
        if isinstance(key, str):
            return key if key in self.cache_dict else get_act_name(key)
        name, *rest = key
        if rest and isinstance(rest[0], int) and rest[0] < 0:
            rest[0] += self.n_layers
        return get_act_name(name, *rest)

    def __len__(self) -> int:
        return len(self.cache_dict)

    def __iter__(self) -> Iterator[str]:
        return iter(self.cache_dict)

    def __repr__(self) -> str:
        return f"ActivationCache with keys {list(self.cache_dict)}"

    def keys(self) -> KeysView[str]:
        """The full hook names."""
        return self.cache_dict.keys()

    def values(self) -> ValuesView[Tensor]:
        """The activations."""
        return self.cache_dict.values()

    def items(self) -> ItemsView[str, Tensor]:
        """Pairs of full hook name and activation."""
        return self.cache_dict.items()

    def to(self, device: torch.device | str) -> ActivationCache:
        """Move every activation to a device, in place; returns the cache."""
        self.cache_dict = {name: value.to(device) for name, value in self.cache_dict.items()}
        return self

    def remove_batch_dim(self) -> ActivationCache:
        """Drop the first axis of every activation, in place; ShapeError unless it has one row."""
        if self.has_batch_dim:
            for name, value in self.cache_dict.items():
                one_row("remove_batch_dim", name, value)
            self.cache_dict = {name: value[0] for name, value in self.cache_dict.items()}
            self.has_batch_dim = False
        return self

    def stack_activation(self, activation_name: str, layer: int = -1) -> Tensor:
        """One activation of the layers below `layer` (-1: of all), stacked: [layers, b, t, ...]."""
        layers = range(self.n_layers if layer == -1 else layer)
        return torch.stack([self[activation_name, i] for i in layers])


def one_row(op: str, name: str, value: Tensor) -> None:
    """Raise ShapeError unless the batch has one row."""
    if value.shape[0] != 1:
        msg = (
            f"{op}: removing the batch axis takes a batch of one row, got {value.shape[0]} rows in "
            f"{name!r}."
        )
        raise ShapeError(msg)


def slice_positions(op: str, value: Tensor, axis: int, positions: Any) -> Tensor:
    """Keep some positions of an activation.

    Args:
        op: name for messages.
        value: [..., t, ...].
        axis: the axis of positions.
        positions: None for all, an int for one (the axis stays), a slice, a tuple (the arguments of
            a slice), or a list or tensor of positions.
    """
    if positions is None:
        return value
    if isinstance(positions, tuple):
        positions = slice(*positions)
    if isinstance(positions, int):
        positions = [positions]
    if isinstance(positions, slice):
        kept: Sequence[int] = range(value.shape[axis])[positions]
    else:
        kept = [int(p) for p in positions]
    t = value.shape[axis]
    outside = [p for p in kept if not -t <= p < t]
    if outside:
        msg = f"{op}: pos_slice names position {outside[0]}, the input has {t} positions."
        raise ArgumentError(msg)
    return value.index_select(axis, torch.tensor(kept, dtype=torch.long, device=value.device) % t)
