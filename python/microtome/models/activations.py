"""Activations: plain tensors by site, with the tokens they came from."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from microtome.errors import SiteError


@dataclass(frozen=True)
class Activations:
    """What `capture` returns. It keeps no model, hook or cache.

    Attributes:
        by_site: name as asked -> [b, t, ...] tensor on the model's device, in the model's dtype,
            without gradient.
        tokens: [b, t] int64, or the input tensor of a plain nn.Module.
        attention_mask: [b, t] as given, or None. Masked positions are in `by_site` too.
    """

    by_site: dict[str, Tensor]
    tokens: Tensor
    attention_mask: Tensor | None = None

    def __getitem__(self, site: str) -> Tensor:
        """The tensor of one site; SiteError if it was not captured."""
        if site not in self.by_site:
            msg = (
                f"Activations: {site!r} was not captured; there is "
                f"{', '.join(map(repr, self.by_site))}."
            )
            raise SiteError(msg)
        return self.by_site[site]

    def __repr__(self) -> str:
        shapes = ", ".join(f"{name}: {list(tensor.shape)}" for name, tensor in self.by_site.items())
        return f"Activations({shapes})"
