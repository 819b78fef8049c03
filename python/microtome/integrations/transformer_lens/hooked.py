"""A plain model under TransformerLens's hook names: run_with_cache, run_with_hooks, hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from microtome import _check
from microtome.errors import ArgumentError
from microtome.integrations.transformer_lens import names, plain
from microtome.integrations.transformer_lens.cache import (
    ActivationCache,
    one_row,
    slice_positions,
)
from microtome.integrations.transformer_lens.hook_list import HookList
from microtome.integrations.transformer_lens.hook_points import Hook, HookPoint, Named
from microtome.integrations.transformer_lens.places import Places
from microtome.models.capture import check_tokens
from microtome.models.sites import Site

NamesFilter = str | Sequence[str] | Callable[[str], bool] | None


class HookedModel(HookList):
    """A Hugging Face model or the toy model, with TransformerLens's names and calls.

    Hooks act in calls made through this object. The model itself carries a hook only while such a
    call runs, and none after it, also when it failed. Weights stay as they are: layer norms are not
    folded and nothing is centred, as in TransformerLens without weight processing.

    A hook's name is a TransformerLens name (`blocks.3.attn.hook_z`), a site of microtome (`z.3`) or
    the path of a module (its output; with ":in" appended, its input). Where several functions hook
    one place they run in the order in which they were added, each on what the one before returned.
    A function that returns None leaves the activation, which it may have changed in place.

    Args:
        model: a Hugging Face GPT-2, Llama, SmolLM, Mistral, Qwen 2/3, Gemma 1/2/3, GPT-NeoX or
            BERT, or the toy model.
        tokenizer: for text as input; a Hugging Face tokenizer or one with `encode`.

    Attributes:
        model: as given.
        cfg: n_layers, n_heads, n_key_value_heads, d_model, d_head, d_vocab, n_ctx, device.
        hook_dict: full hook name -> HookPoint, in the order of a forward.

    Raises:
        SiteError: the architecture is unknown, or the model has no blocks.

    Example:
        >>> import torch
        >>> from microtome.integrations.transformer_lens import HookedModel
        >>> from microtome.models import ToyModel
        >>> model, tokens = HookedModel(ToyModel()), torch.arange(5)
        >>> logits, cache = model.run_with_cache(tokens)
        >>> cache["z", 1].shape, cache["blocks.3.hook_resid_post"].shape
        (torch.Size([1, 5, 4, 16]), torch.Size([1, 5, 64]))
        >>> ablated = model.run_with_hooks(
        ...     tokens, fwd_hooks=[("blocks.0.hook_mlp_out", lambda act, hook: 0 * act)]
        ... )
    """

    def __init__(self, model: nn.Module, tokenizer: Any = None) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self._places = Places(model)
        super().__init__({name: HookPoint(name) for name in self._places.table})

    @property
    def sites(self) -> dict[str, Site]:
        """Full hook name -> the site of the plain model that it stands for."""
        return self._places.table

    @property
    def cfg(self) -> plain.Config:
        """Sizes and device, read from the model."""
        return plain.config_of(self.model)

    def __repr__(self) -> str:
        return f"HookedModel({type(self.model).__name__}, {len(self._hooks)} hooks)"

    def to_tokens(self, text: str | Sequence[str], prepend_bos: bool = True) -> Tensor:
        """Token ids [b, t] of text, with the tokenizer's first token in front if it has one."""
        return plain.tokenise("to_tokens", self.tokenizer, text, prepend_bos).to(self.cfg.device)

    def __call__(self, input: Tensor | str | Sequence[str], **kwargs: Any) -> Any:
        """As `run_with_hooks` without further hooks."""
        return self.run_with_hooks(input, **kwargs)

    def run_with_hooks(
        self,
        input: Tensor | str | Sequence[str],
        *,
        fwd_hooks: Iterable[Named] = (),
        bwd_hooks: Iterable[Named] = (),
        return_type: str | None = "logits",
        stop_at_layer: int | None = None,
        loss_per_token: bool = False,
        prepend_bos: bool = True,
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
        **model_kwargs: Any,
    ) -> Any:
        """Run the model with hooks, in its present mode; gradients flow.

        Args:
            input: [b, t] int64 token ids, [t] for one row, or text.
            fwd_hooks: pairs of a name, or a function that picks names, and fn(activation, hook).
                `hook` has `.name`, `.layer()` and `.ctx`.
            bwd_hooks: the same, called on gradients in a later backward pass.
            return_type: "logits", "loss" (mean next-token cross-entropy in nats), "both" or None.
            stop_at_layer: return the residual stream entering this layer and run nothing after it;
                negative counts from the end, n_layers gives the stream after the last one.
            loss_per_token: return the loss [b, t - 1] instead of its mean.
            prepend_bos: for text only.
            reset_hooks_end: False keeps these hooks for later calls, until `reset_hooks`.
            clear_contexts: empty every `hook.ctx` afterwards.
            **model_kwargs: passed on to the model, such as attention_mask [b, t].

        Returns:
            Logits [b, t, v], a loss, both as a pair, or None.

        Raises:
            SiteError: a name matches no hook, or nothing fired there.
            ShapeError, DtypeError, ArgumentError: the input is none the model takes, or a hook
                returned something else than an activation.
        """
        op = "run_with_hooks"
        with self.hooks(fwd_hooks, bwd_hooks, reset_hooks_end, clear_contexts, op=op):
            return self._run(
                op, self._hooks, input, return_type, stop_at_layer, loss_per_token, prepend_bos,
                model_kwargs,
            )  # fmt: skip

    def run_with_cache(
        self,
        input: Tensor | str | Sequence[str],
        *,
        return_cache_object: bool = True,
        remove_batch_dim: bool = False,
        names_filter: NamesFilter = None,
        device: torch.device | str | None = None,
        stop_at_layer: int | None = None,
        pos_slice: Any = None,
        incl_bwd: bool = False,
        return_type: str | None = "logits",
        loss_per_token: bool = False,
        prepend_bos: bool = True,
        **model_kwargs: Any,
    ) -> tuple[Any, Any]:
        """Run the model and keep activations.

        Args:
            input: as in `run_with_hooks`.
            return_cache_object: False gives a plain dict by full name.
            remove_batch_dim: drop the first axis of a batch of one row.
            names_filter: a name, a list of names, a function that picks names, or None for all. To
                keep a pattern the model has to compute attention in plain steps, which is slower
                and rounds differently.
            device: where to keep the activations; None for the model's.
            stop_at_layer: as in `run_with_hooks`; keeps what lies before it.
            pos_slice: positions to keep: an int, a slice, a tuple (start, stop, step) or a list.
            incl_bwd: run backward from the output, which must be one number
                (`return_type="loss"`), and keep each gradient under its name + "_grad".
            return_type: as in `run_with_hooks`.
            loss_per_token: as in `run_with_hooks`.
            prepend_bos: for text only.
            **model_kwargs: passed on to the model.

        Returns:
            (output, ActivationCache); the activations are copies.

        Raises:
            SiteError: names_filter names no hook.
            ShapeError: remove_batch_dim with more rows than one.
            ArgumentError: incl_bwd without a scalar output, pos_slice outside the input.
        """
        op = "run_with_cache"
        cache: dict[str, Tensor] = {}

        def keep(value: Tensor, hook: HookPoint, suffix: str = "") -> None:
            value = value.detach()
            if remove_batch_dim:
                one_row(op, hook.name, value)
            part = slice_positions(op, value, names.position_axis(hook.name), pos_slice)
            part = part.clone() if part is value else part
            cache[hook.name + suffix] = (part[0] if remove_batch_dim else part).to(device)

        def keep_gradient(value: Tensor, hook: HookPoint) -> None:
            keep(value, hook, "_grad")

        added = [Hook(name, keep, reads=True) for name in self._kept(op, names_filter)]
        if incl_bwd:
            added += [Hook(hook.name, keep_gradient, backward=True) for hook in added]
        out = self._run(
            op, [*self._hooks, *added], input, return_type, stop_at_layer, loss_per_token,
            prepend_bos, model_kwargs,
        )  # fmt: skip
        if incl_bwd:
            if not isinstance(out, Tensor) or out.numel() != 1:
                msg = f'{op}: incl_bwd needs one number to go back from. Pass return_type="loss".'
                raise ArgumentError(msg)
            out.backward()
        kept: Any = cache
        if return_cache_object:
            kept = ActivationCache(cache, self.cfg.n_layers, has_batch_dim=not remove_batch_dim)
        return out, kept

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own `generate` under the hooks that are set; [b, 1, ...] after the prompt."""
        with self._places.attached("generate", self._hooks, self.hook_dict):
            return self.model.generate(*args, **kwargs)  # type: ignore[operator]

    def _run(
        self,
        op: str,
        hooks: list[Hook],
        input: Tensor | str | Sequence[str],
        return_type: str | None,
        stop_at_layer: int | None,
        per_token: bool,
        prepend_bos: bool,
        kwargs: dict[str, Any],
    ) -> Any:
        """One forward under some hooks."""
        if return_type is not None:
            _check.one_of(op, "return_type", return_type, ("logits", "loss", "both"))
        if isinstance(input, Tensor):
            tokens = input[None] if input.dim() == 1 else input
        else:
            tokens = self.to_tokens(input, prepend_bos)
        mask = kwargs.get("attention_mask")
        check_tokens(op, self.model, tokens, mask, 1)
        stop = self._layer(op, stop_at_layer)
        if stop is not None:
            hooks = [h for h in hooks if (layer := names.layer_of(h.name)) is None or layer < stop]
        with self._places.attached(op, hooks, self.hook_dict, stop) as stopped:
            stopped.output = plain.forward(op, self.model, tokens, kwargs)
        if stop is not None:
            return stopped.residual
        if return_type is None:
            return None
        return plain.result(op, stopped.output, tokens, mask, return_type, per_token)

    def _full(self, op: str, name: str) -> str:
        """A hook name as it is, a site by its hook name, a module path as it is."""
        return name if self._places.is_path(name) else super()._full(op, name)

    def _layer(self, op: str, stop: int | None) -> int | None:
        """stop_at_layer counted from the front."""
        if stop is None:
            return None
        n = self.cfg.n_layers
        _check.between(op, "stop_at_layer", stop, -n, n, "n_layers")
        return stop + n if stop < 0 else stop

    def _kept(self, op: str, names_filter: NamesFilter) -> list[str]:
        """The names that a filter picks."""
        if names_filter is None:
            return list(self.hook_dict)
        if callable(names_filter):
            return [name for name in self.hook_dict if names_filter(name)]
        wanted = [names_filter] if isinstance(names_filter, str) else names_filter
        return list(dict.fromkeys(self._full(op, name) for name in wanted))
