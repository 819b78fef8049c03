"""Reading and replacing one site of a model through forward hooks."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from microtome.errors import SiteError
from microtome.models.pattern import Watch
from microtome.models.sites import Site

# Reads the activation; returns a replacement of the same shape, or None to leave it.
Visit = Callable[[Tensor], Tensor | None]


class Handle(Protocol):
    """What `attach` opened; `remove` closes it."""

    def remove(self) -> None: ...


def attach(op: str, model: nn.Module, site: Site, visit: Visit, *, replace: bool) -> list[Handle]:
    """Call `visit` on the activation at `site` in every forward.

    Args:
        op: name for messages.
        model: the model that holds `site`.
        site: from `sites.resolve`.
        visit: called with the activation, [b, t, h, d_head] where the site has heads, [b, h, t, t]
            for a pattern.
        replace: whether `visit` may return a replacement.

    Returns:
        Handles; the caller removes every one.
    """
    module = model.get_submodule(site.path)
    if site.kind == "pattern":
        return [Watch(module, visit)]
    visit = _by_head(site, visit)
    if replace and site.skip is not None:
        return [_StreamHandle(_Stream.at(op, model, site), visit)]
    if site.at_input:

        def before(
            _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> tuple[Any, Any] | None:
            new = visit(_input(op, site, args, kwargs))
            return None if new is None else _with_input(args, kwargs, new)

        return [module.register_forward_pre_hook(before, with_kwargs=True)]

    def after(_: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        new = visit(_output(op, site.path, output))
        return None if new is None else _with_output(output, new)

    return [module.register_forward_hook(after)]


class _Stream:
    """Replaces a residual stream that is read both by a norm and by the addition after it.

    The block computes stream + added; with the stream replaced at the norm's input, its output
    becomes new stream + added: the same sum in the same precision, so that the identity changes no
    bit. `added` is what every other hook made of the MLP's output, and hooks on the block's output
    get the new sum, whichever was opened first; hence one object for all visits of a stream.
    """

    open: ClassVar[dict[nn.Module, _Stream]] = {}

    def __init__(self, op: str, model: nn.Module, site: Site) -> None:
        assert site.skip is not None
        block, self.adds = site.skip
        self.op, self.site = op, site
        self.norm, self.mlp = model.get_submodule(site.path), model.get_submodule(self.adds)
        self.visits: list[_StreamHandle] = []
        self.held: dict[str, Tensor] = {}
        self.handles: list[Handle] = [
            self.norm.register_forward_pre_hook(self._before, with_kwargs=True),
            model.get_submodule(block).register_forward_hook(self._after, prepend=True),
            self.mlp.register_forward_hook(self._added),
        ]

    @classmethod
    def at(cls, op: str, model: nn.Module, site: Site) -> _Stream:
        """The one stream that is open at a site, or a new one."""
        norm = model.get_submodule(site.path)
        if norm not in cls.open:
            cls.open[norm] = cls(op, model, site)
        return cls.open[norm]

    def close(self) -> None:
        del self.open[self.norm]
        for handle in self.handles:
            handle.remove()

    def _before(
        self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, Any]:
        stream = _input(self.op, self.site, args, kwargs)
        for opened in tuple(self.visits):
            new = opened.visit(stream)
            stream = stream if new is None else new
        self.held["stream"] = stream
        # The MLP has not run yet: register again, to come after every hook that is on it by now.
        self.handles.pop().remove()
        self.handles.append(self.mlp.register_forward_hook(self._added))
        return _with_input(args, kwargs, stream)

    def _added(self, _: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.held["added"] = _output(self.op, self.adds, output)

    def _after(self, _: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return _with_output(output, self.held.pop("stream") + self.held.pop("added"))


class _StreamHandle:
    """One visit of a stream."""

    def __init__(self, stream: _Stream, visit: Visit) -> None:
        self.stream, self.visit = stream, visit
        stream.visits.append(self)

    def remove(self) -> None:
        self.stream.visits.remove(self)
        if not self.stream.visits:
            self.stream.close()


def _by_head(site: Site, visit: Visit) -> Visit:
    """Wrap `visit` so that it sees [b, t, h, d_head], however the module's tensor keeps it."""
    if not site.heads:
        return visit

    def visit_heads(whole: Tensor) -> Tensor | None:
        new = visit(heads_of(site, whole))
        return None if new is None else _with_heads(site, whole, new)

    return visit_heads


def heads_of(site: Site, whole: Tensor) -> Tensor:
    """The [b, t, h, d_head] of `site` in a module's tensor, or in its gradient; a view."""
    if not site.heads:
        return whole
    assert site.d_head is not None
    assert site.kind is not None
    if site.heads == "first":
        return whole.transpose(1, 2)
    if site.heads == "stacked":
        whole = whole.chunk(3, dim=-1)["qkv".index(site.kind)]
    if site.heads == "interleaved":
        return whole.unflatten(-1, (-1, 3, site.d_head))[..., "qkv".index(site.kind), :]
    return whole.unflatten(-1, (-1, site.d_head))


def _with_heads(site: Site, whole: Tensor, new: Tensor) -> Tensor:
    """The module's tensor with `new` in the place of what `heads_of` read."""
    assert site.d_head is not None
    assert site.kind is not None
    if site.heads == "first":
        # In the strides of the original: what multiplies it next then rounds as it would have.
        return torch.empty_like(whole).copy_(new.transpose(1, 2))
    if site.heads == "stacked":
        parts = list(whole.chunk(3, dim=-1))
        parts["qkv".index(site.kind)] = new.flatten(-2)
        return torch.cat(parts, dim=-1)
    if site.heads == "interleaved":
        parts = list(whole.unflatten(-1, (-1, 3, site.d_head)).unbind(-2))
        parts["qkv".index(site.kind)] = new
        return torch.stack(parts, dim=-2).flatten(-3)
    return new.flatten(-2)


def _input(op: str, site: Site, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The first tensor a module was called with."""
    found = next((v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)), None)
    if found is None:
        msg = (
            f"{op}: the input of {site.path!r} holds no tensor. Name a module that is called with "
            "one."
        )
        raise SiteError(msg)
    return found


def _with_input(args: tuple[Any, ...], kwargs: dict[str, Any], new: Tensor) -> tuple[Any, Any]:
    """The arguments with their first tensor replaced."""
    for i, value in enumerate(args):
        if isinstance(value, Tensor):
            return (*args[:i], new, *args[i + 1 :]), kwargs
    key = next(k for k, v in kwargs.items() if isinstance(v, Tensor))
    return args, {**kwargs, key: new}


def _output(op: str, path: str, output: Any) -> Tensor:
    """A module's output, or the first entry of a tuple or mapping."""
    first = output
    if isinstance(output, Mapping):
        first = next(iter(output.values()), None)
    elif isinstance(output, (tuple, list)):
        first = output[0] if output else None
    if not isinstance(first, Tensor):
        msg = (
            f"{op}: the output of {path!r} is a {type(output).__name__} that does not begin with "
            "a tensor. Name a module inside it."
        )
        raise SiteError(msg)
    return first


def _with_output(output: Any, new: Tensor) -> Any:
    """A module's output with its (first) tensor replaced."""
    if isinstance(output, Tensor):
        return new
    if isinstance(output, Mapping):
        changed: Any = copy.copy(output)
        changed[next(iter(output))] = new
        return changed
    if isinstance(output, tuple) and hasattr(output, "_fields"):
        return type(output)(new, *output[1:])
    return type(output)((new, *output[1:]))
