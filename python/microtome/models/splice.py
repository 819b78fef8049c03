"""splice: replace the activation at one site while a context is open."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from microtome.errors import DtypeError, ShapeError, SiteError
from microtome.models import hooks
from microtome.models.sites import resolve


@contextmanager
def splice(model: nn.Module, site: str, function: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Replace the activation at `site` in every forward while the context is open.

        activation[site] <- function(activation[site])

    The replacement reaches everything that reads the activation: at resid_mid both the MLP and the
    skip connection around it. Gradients flow through. Splices nest, and a `capture` inside sees the
    replaced activation.

    Args:
        model: as in `capture`.
        site: one canonical name or module path.
        function: maps [b, t, d] ([b, t, h, d_head] for q, k, v, z; [b, h, destination, source] for
            pattern) to the same shape; its result is cast to the activation's dtype and device.

    Raises:
        SiteError: no such site, or the model ran and the site did not fire.
        ShapeError: the function returned another shape.
        DtypeError: it returned no tensor.

    Replacing by the identity changes no bit of the model's output; at pattern, none of what the
    model gives under `attn_implementation="eager"`, and rounding under fused attention.

    Example:
        >>> import torch
        >>> from microtome.models import ToyModel, splice
        >>> model, tokens = ToyModel(), torch.zeros(1, 3, dtype=torch.long)
        >>> with splice(model, "mlp_out.0", torch.zeros_like):
        ...     ablated = model(tokens).logits
    """
    (found,) = resolve("splice", model, [site])
    fired = ran = False  # not counts: a compiled graph would be compiled anew for each number

    def visit(activation: Tensor) -> Tensor:
        nonlocal fired
        fired = True
        new = function(activation)
        if not isinstance(new, Tensor):
            msg = (
                f"splice: the function for {site!r} must return a tensor, got {type(new).__name__}."
            )
            raise DtypeError(msg)
        if new.shape != activation.shape:
            msg = (
                f"splice: the function for {site!r} must return shape {list(activation.shape)}, "
                f"got {list(new.shape)}."
            )
            raise ShapeError(msg)
        return new.to(activation)

    def count(_: nn.Module, args: object) -> None:
        nonlocal ran
        ran = True

    handles: list[hooks.Handle] = []
    try:
        handles.append(model.register_forward_pre_hook(count))
        handles += hooks.attach("splice", model, found, visit, replace=True)
        yield
    finally:
        for handle in handles:
            handle.remove()
    if ran and not fired:
        msg = (
            f"splice: site {site!r} did not fire: the forward never called module {found.path!r}, "
            "so nothing was replaced. Name a module that runs."
        )
        raise SiteError(msg)
