"""The same step by plain autograd, for any torch optimizer and for gradient clipping."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from microtome.errors import ArgumentError, CheckpointError, NonFiniteError
from microtome.ops import sae_loss, topk_encode
from microtome.sae.config import TrainConfig
from microtome.sae.loss import DeadSet, Losses, check_finite, dead_set, total_variance
from microtome.sae.sae import SAE


def losses(
    sae: SAE, x: Tensor, dead: DeadSet | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The loss of a batch as autograd sees it.

    Returns:
        sse [n] and AuxK's sse [n], both differentiable; values [n, k] after the ReLU and indices
        [n, k]; the total variance as a 0-d tensor.
    """
    W_enc, b_enc, W_dec, b_dec = sae.parameters_in_order
    centre = b_dec if sae.center else None
    values, indices, _ = topk_encode(
        x, W_enc, b_enc, centre, k=sae.activation.k, screen=sae.screen()
    )
    values = values.relu()
    sse, grad_out, _ = sae_loss(x, values, indices, W_dec, b_dec)
    aux_sse = sse.new_zeros(len(x))
    if dead is not None:
        rows = dead.latents
        dead_values, places, _ = topk_encode(x, W_enc[rows], b_enc[rows], centre, k=dead.k)
        residual = grad_out * -0.5  # 2 (x_hat - x), which carries no gradient
        aux_sse, _, _ = sae_loss(residual, dead_values.relu(), rows[places.long()], W_dec)
    variance = torch.tensor(total_variance(x.detach()), dtype=sse.dtype, device=sse.device)
    return sse, aux_sse, values, indices, variance


class UnfusedStep:
    """The loss of `FusedStep`, then backward, projection, clipping, optimizer, decoder renorm.

    Args:
        sae: updated in place; its gradients stay in `.grad` after a step.
        config: `optimizer` is a callable.

    Attributes:
        since_fired: [f] int64: rows seen since each latent last fired.
        optimizer: what the callable returned.
        settings: its defaults, as text.
    """

    def __init__(self, sae: SAE, config: TrainConfig) -> None:
        self.sae, self.config = sae, config
        make: Any = config.optimizer
        self.optimizer = make(list(sae.parameters_in_order))
        if not isinstance(self.optimizer, torch.optim.Optimizer):
            msg = "TrainConfig: optimizer must return a torch.optim.Optimizer, returned "
            msg += f"{type(self.optimizer).__name__}."
            raise ArgumentError(msg)
        _check_optimizer(self.optimizer)
        self.settings = {"optimizer_defaults": repr(self.optimizer.defaults)}
        self.peaks = [
            config.lr if config.lr is not None else float(group["lr"])
            for group in self.optimizer.param_groups
        ]
        self.since_fired = torch.zeros(sae.n_features, dtype=torch.int64, device=sae.W_enc.device)

    def take(self, x: Tensor, factor: float, step: int) -> Losses:
        """One step; arguments and errors as for `FusedStep.take`."""
        sae, config = self.sae, self.config
        dead = dead_set(self.since_fired, sae.d_model, config)
        with torch.enable_grad():
            sse, aux_sse, values, indices, variance = losses(sae, x, dead)
            fvu, auxk = sse.sum() / variance, aux_sse.sum() / variance
            loss = fvu + (dead.weight if dead else 0.0) * auxk
            check_finite(float(loss.detach()), sse.detach())
            self.optimizer.zero_grad()
            loss.backward()
        sae.project_decoder_gradient_()
        limit = float("inf") if config.max_grad_norm is None else config.max_grad_norm
        norm = float(torch.nn.utils.clip_grad_norm_(sae.parameters(), limit))
        if not math.isfinite(norm):
            msg = "the gradient overflows. Scale the activations down."
            raise NonFiniteError(msg)
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = peak * factor
        self.optimizer.step()
        sae.normalize_decoder_()
        active = values.detach() > 0
        self.since_fired += len(x)
        fired = torch.zeros(sae.n_features + 1, dtype=torch.bool, device=x.device)  # last: none
        fired[torch.where(active, indices, sae.n_features).long()] = True
        self.since_fired.masked_fill_(fired[:-1], 0)
        l0 = int(active.sum()) / max(1, len(x))
        numbers = (float(t.detach()) for t in (fvu, auxk, loss))
        dead_now = self.since_fired >= config.dead_after_tokens
        return Losses(*numbers, l0, dead_now, self.peaks[0] * factor)

    def state(self) -> tuple[dict[str, Tensor], Any]:
        """Tensors and JSON values from which `load` continues bit for bit."""
        tensors: dict[str, Tensor] = {}
        described = _flatten(self.optimizer.state_dict(), tensors, "optimizer")
        return {**tensors, "since_fired": self.since_fired}, described

    def load(self, tensors: dict[str, Tensor], described: Any) -> None:
        """Take over what `state` gave."""
        self.optimizer.load_state_dict(_unflatten(described, tensors))
        self.since_fired.copy_(tensors["since_fired"])


def _check_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """Refuse what cannot take one ordinary gradient a step."""
    name = type(optimizer).__name__
    why = None
    if isinstance(optimizer, torch.optim.LBFGS):
        why = "it evaluates the loss several times a step; pass one that takes a gradient a step"
    elif isinstance(optimizer, torch.optim.SparseAdam):
        why = "gradients are dense here; optimizer='adam' with rowsparse=True has its semantics"
    elif torch.is_inference_mode_enabled():
        why = "inside torch.inference_mode() there are no gradients; leave it, or use 'adam'"
    if why is not None:
        msg = f"TrainConfig: optimizer {name} cannot run here: {why}."
        raise ArgumentError(msg)


def _flatten(value: Any, tensors: dict[str, Tensor], path: str) -> Any:
    """JSON that stands for a nested state; its tensors go to `tensors` under their paths."""
    if isinstance(value, Tensor):
        tensors[path] = value
        return {"tensor": path}
    if isinstance(value, dict):
        items = [[k, _flatten(v, tensors, f"{path}.{k}")] for k, v in value.items()]
        if all(isinstance(k, (str, int)) for k in value):
            return {"dict": items}
    elif isinstance(value, (list, tuple)):
        items = [_flatten(v, tensors, f"{path}.{i}") for i, v in enumerate(value)]
        return {"tuple" if isinstance(value, tuple) else "list": items}
    elif value is None or isinstance(value, (bool, int, float, str)):
        return value
    msg = f"checkpoint: the optimizer's state holds {type(value).__name__} at {path}; only "
    msg += "tensors, numbers, strings, lists and dicts can be saved without pickle."
    raise CheckpointError(msg)


def _unflatten(value: Any, tensors: dict[str, Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, inner),) = value.items()
    if kind == "tensor":
        return tensors[inner]
    if kind == "dict":
        return {k: _unflatten(v, tensors) for k, v in inner}
    items = [_unflatten(v, tensors) for v in inner]
    return tuple(items) if kind == "tuple" else items
