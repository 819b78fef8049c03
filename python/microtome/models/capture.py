"""capture: run a model and keep the activations at some sites."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from microtome import _check
from microtome.errors import ArgumentError, DtypeError, ShapeError, SiteError
from microtome.models import hooks
from microtome.models.activations import Activations
from microtome.models.families import family_of
from microtome.models.sites import Site, resolve


class _ForwardDone(BaseException):
    """Ends a forward after the last site; no `except Exception` of a model swallows it."""


def capture(
    model: nn.Module,
    sites: str | Iterable[str],
    tokens: Tensor,
    *,
    attention_mask: Tensor | None = None,
    batch_size: int = 8,
    stop_early: bool = True,
    progress: bool = False,
) -> Activations:
    """Run a model on tokens and keep the activations at some sites.

    The model runs in eval mode without gradients; afterwards it is as it was: hooks are removed and
    training mode is restored, also after an exception. A module that one forward calls several
    times gives its first call.

    Args:
        model: a Hugging Face model, the toy model, or any nn.Module.
        sites: canonical names ("resid_pre.3", "z.0": see `sites`) or module paths:
            "transformer.h.3.mlp" for the module's output, "transformer.h.3.mlp:in" for its input.
        tokens: [b, t] int64 token ids; for an nn.Module that takes no ids, its input, [b, ...] of
            any dtype.
        attention_mask: [b, t], 1 where a token counts, passed on to the model.
        batch_size: rows in one forward.
        stop_early: end each forward after the last site that was asked for.
        progress: show a progress bar, counted in rows.

    Returns:
        Activations, with [b, t, d] by site ([b, t, h, d_head] for q, k, v, z; [b, h, destination,
        source] for pattern), in the model's dtype and on its device.

    Raises:
        SiteError: a site matches nothing, did not fire, or holds no tensor.
        ShapeError, DtypeError, ArgumentError: the tokens are no [b, t] int64 ids that the model
            knows.

    Deterministic. Costs the forward up to the last site plus one copy of what is kept.

    Example:
        >>> from microtome.models import ToyModel, capture
        >>> acts = capture(ToyModel(), ["resid_pre.1", "z.0"], torch.zeros(2, 5, dtype=torch.long))
        >>> acts
        Activations(resid_pre.1: [2, 5, 64], z.0: [2, 5, 4, 16])
    """
    found = resolve("capture", model, sites)
    check_tokens("capture", model, tokens, attention_mask, batch_size)
    b = tokens.shape[0]
    kept: dict[str, Tensor] = {}
    with Recorder("capture", model, found, stop_early=stop_early) as recorder:
        for rows in batch_slices(b, batch_size, "capture" if progress else None):
            mask = None if attention_mask is None else attention_mask[rows]
            for name, part in recorder.run(tokens[rows], mask).items():
                if part.dim() == 0 or (b > batch_size and part.shape[0] != len(tokens[rows])):
                    raise ShapeError(_not_batched(name, part, len(tokens[rows]), b))
                if name not in kept:
                    shape = part.shape[1:]
                    kept[name] = part.new_empty((b if b > batch_size else part.shape[0], *shape))
                kept[name][rows if b > batch_size else slice(None)] = part
    return Activations({site.name: kept[site.name] for site in found}, tokens, attention_mask)


class Recorder:
    """The hooks of one capture, open as a context: `run` one batch, get the activations it made.

    What `run` returns may share memory with the model's own tensors: copy it before the next use of
    the model.
    """

    def __init__(self, op: str, model: nn.Module, sites: list[Site], *, stop_early: bool) -> None:
        self.op, self.model, self.sites = op, model, sites
        # A model that collects its own hidden states swaps methods while it runs: let it finish.
        config = getattr(model, "config", None)
        collects = any(
            getattr(config, f"output_{what}", False) for what in ("hidden_states", "attentions")
        )
        self.stop_early = stop_early and not collects
        self.seen: dict[str, Tensor] = {}
        self.handles: list[hooks.Handle] = []
        self.mode = evaluating(model)

    def __enter__(self) -> Recorder:
        try:
            for site in self.sites:
                visit = self._keep(site.name)
                self.handles += hooks.attach(self.op, self.model, site, visit, replace=False)
        except BaseException:
            self._remove()
            raise
        self.mode.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._remove()
        self.mode.__exit__(None, None, None)

    def run(self, tokens: Tensor, attention_mask: Tensor | None) -> dict[str, Tensor]:
        """One forward; SiteError if a site did not fire."""
        self.seen = {}
        with torch.no_grad(), suppress(_ForwardDone):
            call(self.model, tokens, attention_mask)
        for site in self.sites:
            if site.name not in self.seen:
                msg = (
                    f"{self.op}: site {site.name!r} did not fire: the forward never called module "
                    f"{site.path!r}. Name a module that runs."
                )
                raise SiteError(msg)
        seen, self.seen = self.seen, {}
        return seen

    def _keep(self, name: str) -> hooks.Visit:
        def visit(activation: Tensor) -> None:
            if name not in self.seen:
                # A later module may write into this tensor; only a forward that ends here cannot.
                last = self.stop_early and len(self.seen) == len(self.sites) - 1
                self.seen[name] = activation if last else activation.clone()
            if self.stop_early and len(self.seen) == len(self.sites):
                raise _ForwardDone

        return visit

    def _remove(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles = []


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode while open; each module that was in training mode comes back to it."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def call(model: nn.Module, tokens: Tensor, attention_mask: Tensor | None) -> Any:
    """Call a model on its own device, without a cache if it has one."""
    takes = inspect.signature(model.forward).parameters
    parameter = next(model.parameters(), None)
    place = tokens.device if parameter is None else parameter.device
    kwargs: dict[str, Any] = {"use_cache": False} if "use_cache" in takes else {}
    if attention_mask is not None:
        kwargs["attention_mask"] = attention_mask.to(place)
    if "input_ids" in takes:
        return model(input_ids=tokens.to(place), **kwargs)
    return model(tokens.to(place), **kwargs)


def takes_mask(model: nn.Module) -> bool:
    """Whether `call` may pass a model an attention mask."""
    takes = inspect.signature(model.forward).parameters
    return "attention_mask" in takes or any(p.kind is p.VAR_KEYWORD for p in takes.values())


def logits_of(op: str, model: nn.Module, out: Any) -> Tensor:
    """The logits in what a model returned; ArgumentError where there are none."""
    logits = out if isinstance(out, Tensor) else getattr(out, "logits", None)
    if not isinstance(logits, Tensor):
        msg = (
            f"{op}: {type(model).__name__} returns a {type(out).__name__} without logits. "
            "Pass a model with a language-model head."
        )
        raise ArgumentError(msg)
    return logits


def check_tokens(
    op: str, model: nn.Module, tokens: Tensor, attention_mask: Tensor | None, batch_size: int
) -> None:
    """Raise unless `tokens` is an input the model can take."""
    if not isinstance(tokens, Tensor):
        msg = (
            f"{op}: tokens must be a tensor, got {type(tokens).__name__}. See "
            "microtome.models.tokenise."
        )
        raise DtypeError(msg)
    if tokens.numel() == 0:
        msg = (
            f"{op}: tokens is empty, got shape {list(tokens.shape)}. Pass at least one row of one "
            "token."
        )
        raise ArgumentError(msg)
    _check.between(op, "batch_size", batch_size, 1, 1 << 30)
    vocabulary = _vocabulary(model)
    if vocabulary is not None:
        _check.shapes(op, tokens=(tokens, "b t"), attention_mask=(attention_mask, "b t"))
        _check.dtype(op, (torch.int64,), tokens=tokens)
        _check.index_range(op, tokens, vocabulary, "vocabulary", "tokens")
        family, config = family_of(model), getattr(model, "config", None)
        limit = getattr(config, "max_position_embeddings", None)
        if family is not None and family.learned_positions and limit is not None:
            _check.between(
                op, "context length", tokens.shape[1], 1, limit, "max_position_embeddings"
            )


def batch_slices(
    rows: int, batch_size: int, progress: str | None, unit: str = "row"
) -> Iterator[slice]:
    """Slices of at most `batch_size` rows, behind a progress bar of that name if there is one."""
    slices = [slice(i, min(i + batch_size, rows)) for i in range(0, rows, batch_size)]
    if progress is None:
        yield from slices
        return
    from tqdm import tqdm

    with closing(tqdm(total=rows, desc=progress, unit=unit)) as bar:
        for part in slices:
            yield part
            bar.update(part.stop - part.start)


def _vocabulary(model: nn.Module) -> int | None:
    """How many token ids a model knows, or None if it takes no ids."""
    embeddings = getattr(model, "get_input_embeddings", None)
    if embeddings is None or "input_ids" not in inspect.signature(model.forward).parameters:
        return None
    return getattr(embeddings(), "num_embeddings", None)


def _not_batched(name: str, part: Tensor, rows: int, b: int) -> str:
    return (
        f"capture: site {name!r} has shape {list(part.shape)} in a batch of {rows}: its first "
        f"axis is not the batch, so batches cannot be joined. Pass batch_size={b} or name another "
        "site."
    )
