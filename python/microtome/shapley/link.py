"""Links: the scale on which values are explained."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from microtome.errors import ArgumentError, NonFiniteError

Link = Callable[[Tensor], Tensor]


def link_of(op: str, link: str | Link) -> Link | None:
    """A link by name or by itself; None is the identity.

    Raises:
        ArgumentError: no such link.

    What is returned raises NonFiniteError for a value that has no finite image.
    """
    if link == "identity":
        return None
    function = torch.logit if link == "logit" else link
    if callable(function):
        return _finite(op, function, link)
    msg = f"{op}: link must be 'identity', 'logit' or a function of tensors, got {link!r}."
    raise ArgumentError(msg)


def _finite(op: str, function: Link, link: str | Link) -> Link:
    def linked(values: Tensor) -> Tensor:
        found = function(values)
        bad = ~torch.isfinite(found)
        if bool(bad.any()):
            value = float(values[bad][0]) if bad.shape == values.shape else float("nan")
            clip = " Clip f's answers: 0.001 to 0.999." if link == "logit" else ""
            msg = (
                f"{op}: link={link!r} is infinite or not a number at a coalition's value, {value:g}"
                f".{clip or ' Keep f where the link is finite.'}"
            )
            raise NonFiniteError(msg)
        return found

    return linked
