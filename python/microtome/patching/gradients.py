"""Activations of one kind of site at every layer, and the gradient of a metric at them.

One backward pass serves all layers. The graph starts at the stream into the lowest layer that is
asked for, and no parameter takes part in it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from microtome.errors import ArgumentError, SiteError
from microtome.models import hooks
from microtome.models.capture import call, evaluating
from microtome.models.families import family_of
from microtome.models.sites import Site, canonical, resolve
from microtome.patching.hooked import find_blocks, site_name

Measure = Callable[[Tensor], Tensor]  # logits [n * b, t, vocabulary] -> [n, b]


@dataclass(frozen=True)
class Places:
    """Where a model keeps one kind of site.

    Attributes:
        op: name for messages.
        model: the model.
        kind: such as "z".
        sites: one for each layer.
        streams: the residual stream into each layer.
    """

    op: str
    model: nn.Module
    kind: str
    sites: list[Site]
    streams: list[Site]

    def read(
        self, tokens: Tensor, mask: Tensor | None, layers: Sequence[int]
    ) -> tuple[dict[int, Tensor], Tensor]:
        """The activations of a run at some layers, by layer, and its logits; without gradients."""
        kept: dict[int, Tensor] = {}

        def keep(layer: int) -> hooks.Visit:
            def visit(whole: Tensor) -> None:
                kept.setdefault(layer, self._copy(layer, whole))

            return visit

        visits = [(self._whole(layer), keep(layer), False) for layer in layers]
        with torch.no_grad():
            logits = self._run(tokens, mask, visits)
        self._fired(kept, layers)
        return kept, logits

    def differentiate(
        self, tokens: Tensor, mask: Tensor | None, layers: Sequence[int], measure: Measure
    ) -> tuple[dict[int, Tensor], dict[int, Tensor], Tensor]:
        """Run forward once and backward once.

        Args:
            tokens: [b, t] int64.
            mask: [b, t] or None.
            layers: which.
            measure: what is differentiated, summed over prompts; differentiable.

        Returns:
            Activations by layer; gradients by layer, laid out alike; what was measured, [1, b].

        Raises:
            SiteError: a site did not fire, or holds nothing that a gradient reaches.
            ArgumentError: what was measured has no gradient.
        """
        kept: dict[int, Tensor] = {}
        edges: dict[int, Any] = {}

        def keep(layer: int) -> hooks.Visit:
            def visit(whole: Tensor) -> None:
                if layer in kept:
                    return
                if not whole.requires_grad:
                    msg = (
                        f"{self.op}: no gradient reaches {self.sites[layer].name!r}: the model "
                        "computes it without gradients. Choose another site, or use sweep."
                    )
                    raise SiteError(msg)
                # The edge outlives a later module that writes into this tensor.
                edges[layer] = torch.autograd.graph.get_gradient_edge(whole)
                kept[layer] = self._copy(layer, whole)

            return visit

        start = (self.streams[min(layers)], lambda x: _root(x.detach()), True)
        visits = [start, *((self._whole(layer), keep(layer), False) for layer in layers)]
        with torch.enable_grad():
            measured = self._differentiable(measure(self._run(tokens, mask, visits)))
            self._fired(kept, layers)
            found = torch.autograd.grad(measured.sum(), list(edges.values()), allow_unused=True)
        grads = {}
        for layer, whole in zip(edges, found, strict=True):
            if whole is None:  # nothing that is measured reads it
                grads[layer] = torch.zeros_like(kept[layer])
            else:
                grads[layer] = hooks.heads_of(self.sites[layer], whole)
        return kept, grads, measured.detach()

    def differentiate_at(
        self, tokens: Tensor, mask: Tensor | None, layer: int, points: Tensor, measure: Measure
    ) -> Tensor:
        """The gradients at one layer's site where its activation is each of some points.

        Args:
            tokens: [b, t] int64.
            mask: [b, t] or None.
            layer: which.
            points: [n, b, ...] activations, which are put in, n * b prompts in one batch.
            measure: as in `differentiate`.

        Returns:
            [n, b, ...], laid out alike.
        """
        n = len(points)
        leaf = points.flatten(0, 1).detach().requires_grad_()
        rows = tokens.repeat(n, 1), None if mask is None else mask.repeat(n, 1)
        with torch.enable_grad():
            # A module may write into what it is given, which a leaf does not allow.
            logits = self._run(*rows, [(self.sites[layer], lambda _: leaf.clone(), True)])
            measured = self._differentiable(measure(logits))
            (found,) = torch.autograd.grad(measured.sum(), [leaf], allow_unused=True)
        return torch.zeros_like(points) if found is None else found.view_as(points)

    def _whole(self, layer: int) -> Site:
        """The site as the module's own tensor: heads cut from it would be another place."""
        return dataclasses.replace(self.sites[layer], heads="")

    def _copy(self, layer: int, whole: Tensor) -> Tensor:
        """[b, t, w], [b, t, h, d_head] or [b, h, t, t]; a later module may write into its own."""
        part = hooks.heads_of(self.sites[layer], whole.detach())
        return part.clone(memory_format=torch.contiguous_format)

    def _run(
        self, tokens: Tensor, mask: Tensor | None, visits: list[tuple[Site, hooks.Visit, bool]]
    ) -> Tensor:
        """Logits of a forward in eval mode; afterwards no hook is left."""
        with ExitStack() as stack:
            stack.enter_context(evaluating(self.model))
            for site, visit, replace in visits:
                for handle in hooks.attach(self.op, self.model, site, visit, replace=replace):
                    stack.callback(handle.remove)
            out = call(self.model, tokens, mask)
        logits = out if isinstance(out, Tensor) else getattr(out, "logits", None)
        if not isinstance(logits, Tensor):
            msg = (
                f"{self.op}: {type(self.model).__name__} returns a {type(out).__name__} without "
                "logits. Pass a model with a language-model head."
            )
            raise ArgumentError(msg)
        return logits

    def _fired(self, kept: dict[int, Tensor], layers: Sequence[int]) -> None:
        for site in [self.sites[layer] for layer in layers if layer not in kept]:
            msg = (
                f"{self.op}: site {site.name!r} did not fire: the forward never called module "
                f"{site.path!r}. Name a module that runs."
            )
            raise SiteError(msg)

    def _differentiable(self, measured: Tensor) -> Tensor:
        if not measured.requires_grad:
            msg = (
                f"{self.op}: the metric has no gradient with respect to the logits. Use one that "
                "is differentiable, such as logit_difference, or use sweep."
            )
            raise ArgumentError(msg)
        return measured


def _root(x: Tensor) -> Tensor:
    """The same numbers, with a gradient; no leaf, since a module may write into it."""
    return x.requires_grad_().clone()


def places_of(op: str, model: nn.Module, kind: str) -> Places:
    """Find one kind of site, and the streams, at every layer.

    Raises:
        SiteError: the model has none of that kind, or no list of blocks.
    """
    known = canonical(op, model) if family_of(model) is not None else {}
    path, blocks = find_blocks(op, model, known)
    named: dict[str, list[str]] = {}
    for each in (kind, "resid_pre"):
        names = [site_name(known, path, each, layer) for layer in range(len(blocks))]
        if None in names:
            has = dict.fromkeys(name.split(".")[0] for name in known) or ("resid_pre", "resid_post")
            msg = f"{op}: {type(model).__name__} has no {each}; it has {', '.join(has)}."
            raise SiteError(msg)
        named[each] = [name for name in names if name is not None]
    streams = resolve(op, model, named["resid_pre"])
    return Places(op, model, kind, resolve(op, model, named[kind]), streams)


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No parameter asks for a gradient while open; each that did asks again afterwards."""
    asking = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in asking:
            parameter.requires_grad_(False)
        # Gradients are taken even where the caller has switched them off.
        with torch.inference_mode(False):
            yield
    finally:
        for parameter in asking:
            parameter.requires_grad_(True)
