"""The hook functions that are set on a model: adding them, removing them, contexts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from microtome import _check
from microtome.integrations.transformer_lens import names
from microtome.integrations.transformer_lens.hook_points import (
    Hook,
    HookFunction,
    HookPoint,
    Named,
    Picks,
)


class HookList:
    """The hooks that a later run takes into account; it touches no model by itself."""

    def __init__(self, hook_dict: dict[str, HookPoint]) -> None:
        self.hook_dict = hook_dict
        self._hooks: list[Hook] = []
        self._level = 0

    def carries_hooks(self) -> bool:
        """Whether a later run has hooks that were set here."""
        return bool(self._hooks)

    @contextmanager
    def hooks(
        self,
        fwd_hooks: Iterable[Named] = (),
        bwd_hooks: Iterable[Named] = (),
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
        *,
        op: str = "hooks",
    ) -> Iterator[Any]:
        """Set hooks while the context is open.

        Args:
            fwd_hooks: pairs of a name, or a function that picks names, and fn(activation, hook).
            bwd_hooks: the same, called on gradients.
            reset_hooks_end: False keeps them after the context, until `reset_hooks`.
            clear_contexts: empty every `hook.ctx` at the end.
            op: name for messages.

        Yields:
            This object.

        Raises:
            SiteError: a name matches no hook; none of them is set then.
        """
        self._level += 1
        try:
            for pairs, direction in ((fwd_hooks, "fwd"), (bwd_hooks, "bwd")):
                for name, function in pairs:
                    self._add(op, name, function, direction, level=self._level)
            yield self
        finally:
            if reset_hooks_end:
                self._hooks = [h for h in self._hooks if h.level != self._level or h.permanent]
            if clear_contexts:
                self.clear_contexts()
            self._level -= 1

    def add_hook(
        self,
        name: Picks,
        hook: HookFunction,
        dir: str = "fwd",
        is_permanent: bool = False,
        level: int | None = None,
        prepend: bool = False,
    ) -> None:
        """Set a hook for every later run, until `reset_hooks`.

        Args:
            name: a hook name, or a function that picks names.
            hook: fn(activation, hook), or fn(gradient, hook) for dir="bwd".
            dir: "fwd" or "bwd".
            is_permanent: `reset_hooks()` keeps it.
            level: a label by which `reset_hooks` can pick it; by default the number of open
                contexts.
            prepend: run it before the hooks already there.

        Raises:
            SiteError: the name matches no hook.
        """
        level = self._level if level is None else level
        self._add("add_hook", name, hook, dir, is_permanent, level, prepend)

    def add_perma_hook(self, name: Picks, hook: HookFunction, dir: str = "fwd") -> None:
        """`add_hook` with is_permanent=True."""
        self.add_hook(name, hook, dir, is_permanent=True)

    def reset_hooks(
        self,
        clear_contexts: bool = True,
        direction: str = "both",
        including_permanent: bool = False,
        level: int | None = None,
    ) -> None:
        """Remove hooks.

        Args:
            clear_contexts: empty every `hook.ctx` too.
            direction: "fwd", "bwd" or "both".
            including_permanent: remove permanent ones too.
            level: only those of this level.
        """
        _check.one_of("reset_hooks", "direction", direction, ("fwd", "bwd", "both"))

        def stays(hook: Hook) -> bool:
            kept = hook.permanent and not including_permanent
            other_way = direction == ("fwd" if hook.backward else "bwd")
            return kept or other_way or (level is not None and hook.level != level)

        self._hooks = [hook for hook in self._hooks if stays(hook)]
        if clear_contexts:
            self.clear_contexts()

    def clear_contexts(self) -> None:
        """Empty every `hook.ctx`."""
        for point in self.hook_dict.values():
            point.ctx.clear()

    def _add(
        self,
        op: str,
        name: Picks,
        function: HookFunction,
        direction: str,
        permanent: bool = False,
        level: int = 0,
        prepend: bool = False,
    ) -> None:
        _check.one_of(op, "dir", direction, ("fwd", "bwd"))
        new = [
            Hook(full, function, direction == "bwd", permanent, level)
            for full in self._picked(op, name)
        ]
        self._hooks = [*new, *self._hooks] if prepend else [*self._hooks, *new]

    def _picked(self, op: str, name: Picks) -> list[str]:
        """The full names that one name or filter stands for; SiteError if there is none."""
        if not callable(name):
            return [self._full(op, name)]
        picked = [full for full in self.hook_dict if name(full)]
        if not picked:
            # A hook that hooks nothing is a patch that changes nothing.
            raise names.no_hook(op, getattr(name, "__name__", repr(name)), self.hook_dict)
        return picked

    def _full(self, op: str, name: str) -> str:
        """The full name of one place."""
        full: Callable[[str], str | None] = names.hook_name
        for candidate in (name, full(name)):
            if candidate in self.hook_dict:
                return str(candidate)
        raise names.no_hook(op, name, self.hook_dict)
