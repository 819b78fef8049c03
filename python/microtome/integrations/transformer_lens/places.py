"""Where in a plain model the hook names lie, and putting hooks there for one forward."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from microtome.errors import SiteError
from microtome.integrations.transformer_lens import names, plain
from microtome.integrations.transformer_lens.hook_points import Hook, HookPoint, apply
from microtome.models.hooks import Visit, attach
from microtome.models.sites import Site, resolve


class _Stop(BaseException):
    """Ends a forward before a layer; no `except Exception` of a model swallows it."""


class Run:
    """What one forward left: its output, or the residual stream it stopped at."""

    def __init__(self) -> None:
        self.output: Any = None
        self.residual: Tensor | None = None
        self.fired: set[str] = set()


class Places:
    """The sites of a model by hook name."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.table = names.hook_table("HookedModel", model)
        self.blocks = [s.path for name, s in self.table.items() if name.endswith("resid_post")]

    def is_path(self, name: Any) -> bool:
        """True if `name` is the path of a module, with or without ":in"."""
        if not isinstance(name, str):
            return False
        path, _, side = name.partition(":")
        return bool(path) and side in ("", "in") and path in dict(self.model.named_modules())

    @contextmanager
    def attached(
        self,
        op: str,
        hooks: Sequence[Hook],
        points: Mapping[str, HookPoint],
        stop: int | None = None,
    ) -> Iterator[Run]:
        """Put hooks on the model while the context is open.

        Args:
            op: name for messages.
            hooks: to call, in order; their names are full ones or module paths.
            points: what each hook function is given, by full name.
            stop: end the forward before this layer, n_layers for after the last.

        Yields:
            A Run; `residual` is set when the forward stopped.

        Raises:
            SiteError: a hook's place did not fire in a forward that came to its end.
        """
        at: dict[str, list[Hook]] = {}
        for hook in hooks:
            at.setdefault(hook.name, []).append(hook)
        run = Run()
        handles: list[Any] = []
        try:
            for name in sorted(at, key=self._turn):
                visit = _visit(op, points.get(name) or HookPoint(name), at[name], run)
                changes = not all(hook.reads for hook in at[name])
                handles += attach(op, self.model, self._site(name), visit, replace=changes)
            if stop is not None:
                handles += self._attach_stop(op, stop, run)
            yield run
        except _Stop:
            return
        finally:
            for handle in handles:
                handle.remove()
        self._check_fired(op, [name for name in at if stop is None or name in points], run)

    def _site(self, name: str) -> Site:
        return self.table.get(name) or resolve("HookedModel", self.model, name)[0]

    def _turn(self, name: str) -> int:
        """When to attach a hook, for hooks on one module run in the order they were attached in.

        Replacing resid_mid adds to it what the MLP gave, so hooks on the MLP's output come before;
        a block's output is that sum, so hooks on it come after.
        """
        site = self._site(name)
        if site.path in self.blocks and not site.at_input:
            return 2
        return 0 if site.skip is None else 1

    def _attach_stop(self, op: str, stop: int, run: Run) -> list[Any]:
        """Keep the stream before layer `stop` and end the forward there."""
        last = stop == len(self.blocks)
        name = f"blocks.{stop - 1}.hook_resid_post" if last else f"blocks.{stop}.hook_resid_pre"
        # A model that collects its own hidden states swaps methods while it runs: let it finish.
        finish = plain.collects(self.model)

        def visit(activation: Tensor) -> None:
            run.residual = activation
            if not finish:
                raise _Stop

        return attach(op, self.model, self.table[name], visit, replace=False)

    def _check_fired(self, op: str, wanted: list[str], run: Run) -> None:
        silent = next((name for name in wanted if name not in run.fired), None)
        if silent is not None:
            msg = (
                f"{op}: {silent!r} did not fire: the forward never called module "
                f"{self._site(silent).path!r}, so its hook had no effect. Name a module that runs."
            )
            raise SiteError(msg)


def _visit(op: str, point: HookPoint, hooks: list[Hook], run: Run) -> Visit:
    def visit(activation: Tensor) -> Tensor:
        run.fired.add(point.name)
        return apply(op, hooks, point, activation)

    return visit
