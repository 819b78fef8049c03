"""Links: the scale on which values are explained."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from microtome.errors import ArgumentError

Link = Callable[[Tensor], Tensor]


def link_of(op: str, link: str | Link) -> Link | None:
    """A link by name or by itself; None is the identity.

    Raises:
        ArgumentError: no such link.
    """
    if link == "identity":
        return None
    if link == "logit":
        return torch.logit
    if callable(link):
        return link
    msg = f"{op}: link must be 'identity', 'logit' or a function of tensors, got {link!r}."
    raise ArgumentError(msg)
