"""What a hook function is given, and the list of the hooks a model carries."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from microtome.errors import ArgumentError, DtypeError, ShapeError
from microtome.integrations.transformer_lens.names import layer_of

# fn(activation, hook=point) -> a replacement of the same shape, or None to leave it.
HookFunction = Callable[..., "Tensor | None"]
Picks = str | Callable[[str], bool]
Named = tuple[Picks, HookFunction]


@dataclass(eq=False)
class HookPoint:
    """The place a hook function was called at.

    Attributes:
        name: the full hook name.
        ctx: free for hook functions to keep things in, from one call to the next.
    """

    name: str
    ctx: dict[Any, Any] = field(default_factory=dict)

    def layer(self) -> int:
        """The block this place lies in; ArgumentError if it lies in none."""
        layer = layer_of(self.name)
        if layer is None:
            msg = f"HookPoint.layer: {self.name!r} lies in no block."
            raise ArgumentError(msg)
        return layer

    def clear_context(self) -> None:
        """Forget what hook functions kept in `ctx`."""
        self.ctx.clear()


@dataclass(eq=False)
class Hook:
    """One function at one place.

    Attributes:
        name: the full hook name, or what else the model resolves.
        function: see `HookFunction`.
        backward: call it on the gradient instead of the activation.
        permanent: `reset_hooks` keeps it unless told otherwise.
        level: how many `hooks` contexts were open when it was added.
        reads: it never replaces the activation.
    """

    name: str
    function: HookFunction
    backward: bool = False
    permanent: bool = False
    level: int = 0
    reads: bool = False


def apply(op: str, hooks: Sequence[Hook], point: HookPoint, activation: Tensor) -> Tensor:
    """Pass an activation through hook functions in order; the gradient hooks are set on the result.

    Raises:
        DtypeError: a function returned something else than a tensor or None.
        ShapeError: it returned another shape.
    """
    now = activation
    for hook in hooks:
        if not hook.backward:
            now = _changed(op, point, now, hook.function(now, hook=point))
    for hook in hooks:
        if hook.backward and now.requires_grad:
            now.register_hook(_on_gradient(op, hook, point))
    return now


def _on_gradient(op: str, hook: Hook, point: HookPoint) -> Callable[[Tensor], Tensor | None]:
    def visit(gradient: Tensor) -> Tensor | None:
        new: Any = hook.function(gradient, hook=point)
        if isinstance(new, tuple) and len(new) == 1:
            (new,) = new
        return None if new is None else _changed(op, point, gradient, new)

    return visit


def _changed(op: str, point: HookPoint, old: Tensor, new: Tensor | None) -> Tensor:
    if new is None or new is old:
        return old
    if not isinstance(new, Tensor):
        msg = (
            f"{op}: the hook at {point.name!r} must return a tensor or None, got "
            f"{type(new).__name__}."
        )
        raise DtypeError(msg)
    if new.shape != old.shape:
        msg = (
            f"{op}: the hook at {point.name!r} must return shape {list(old.shape)}, got "
            f"{list(new.shape)}."
        )
        raise ShapeError(msg)
    return new.to(old)
