"""The settings of a training run."""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from microtome import _check
from microtome.errors import ArgumentError
from microtome.ops._sae_update_states import STATES
from microtome.ops.sae_update import OPTIMIZERS, UpdateRule

PRECISIONS = ("float32", "bfloat16")
# Settings that change what is written, not what is computed: a resumed run may differ in them.
_REPORTING = (
    "log_every",
    "eval_every",
    "checkpoint_every",
    "keep_checkpoints",
    "wandb",
    "tensorboard",
)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How to train an SAE. Give `steps` or `tokens`.

    Attributes:
        steps: optimizer steps.
        tokens: rows to train on; rounded down to whole batches. In place of `steps`.
        batch_size: rows a step.
        lr: peak learning rate. None: 2e-4 / sqrt(f / 16384) for the fused optimizers (Gao et al.'s
            scaling), the optimizer's own for a callable.
        warmup_steps: the learning rate rises linearly from lr / warmup_steps to lr over so many
            steps.
        decay: "linear" to zero over the last `decay_fraction` of the steps, or "constant".
        decay_fraction: see decay.
        optimizer: "adam", "adamw", "sgd" or "signsgd", fused into one pass over the parameters; or
            a callable that takes the list of parameters and returns a torch.optim.Optimizer, which
            runs on ordinary gradients.
        beta1: Adam's first decay, or the momentum.
        beta2: Adam's second decay.
        eps: Adam's epsilon.
        weight_decay: on W_enc and W_dec; see `UpdateRule`.
        rowsparse: leave untouched rows and their moments as they are: SparseAdam's semantics,
            another algorithm than Adam.
        moments: how the fused optimizers keep the moments of W_enc and W_dec: "float32", or to
            save memory "bfloat16" (2 bytes a number) or "int8" (1); rounded without bias, so
            that training runs as with float32.
        precision: in which the fused optimizers multiply: "float32", or "bfloat16": activations,
            copies of W_enc and W_dec and the gradients of codes and reconstructions in bfloat16,
            sums, parameters and what is saved in float32.
        max_grad_norm: clip the norm of all gradients together; for a callable optimizer only.
        auxk_coefficient: weight of the loss by which dead latents reconstruct the residual (AuxK);
            0 for none.
        k_aux: dead latents a row in AuxK; None for d / 2.
        dead_after_tokens: a latent that has not fired for so many rows is dead.
        b_dec_init: what b_dec starts from: "geometric_median" or "mean" of a sample of rows, or
            "keep". A b_dec that is not all zeros is always kept.
        init_rows: rows in that sample.
        log_every: steps between two lines of the log.
        eval_every: steps between two evaluations on the held-out rows; 0 for the end only.
        checkpoint_every: steps between two checkpoints; 0 for the end only.
        keep_checkpoints: how many of the newest checkpoints stay.
        seed: of the order of rows and of the sample for b_dec.
        wandb: project name for Weights & Biases, or None.
        tensorboard: folder for TensorBoard, or None.

    Raises:
        ArgumentError: a setting is out of its range; the message names it.

    Example:
        >>> TrainConfig(tokens=10_000, batch_size=1024).total_steps
        9
    """

    steps: int | None = None
    tokens: int | None = None
    batch_size: int = 1024
    lr: float | None = None
    warmup_steps: int = 50
    decay: str = "linear"
    decay_fraction: float = 0.2
    optimizer: str | Callable[[list[torch.Tensor]], torch.optim.Optimizer] = "adam"
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    rowsparse: bool = False
    moments: str = "float32"
    precision: str = "float32"
    max_grad_norm: float | None = None
    auxk_coefficient: float = 1 / 32
    k_aux: int | None = None
    dead_after_tokens: int = 10_000_000
    b_dec_init: str = "geometric_median"
    init_rows: int = 4096
    log_every: int = 10
    eval_every: int = 0
    checkpoint_every: int = 1000
    keep_checkpoints: int = 2
    seed: int = 0
    wandb: str | None = None
    tensorboard: str | None = None

    def __post_init__(self) -> None:
        op = "TrainConfig"
        if (self.steps is None) == (self.tokens is None):
            msg = f"TrainConfig: give steps or tokens, one of them; got steps={self.steps}, "
            msg += f"tokens={self.tokens}."
            raise ArgumentError(msg)
        for name in ("steps", "tokens", "batch_size", "warmup_steps", "k_aux", "init_rows",
                     "dead_after_tokens", "log_every", "eval_every", "checkpoint_every",
                     "keep_checkpoints", "seed"):  # fmt: skip
            if getattr(self, name) is not None:
                object.__setattr__(self, name, _check.whole(op, name, getattr(self, name)))
        for name in (
            "batch_size",
            "init_rows",
            "log_every",
            "keep_checkpoints",
            "dead_after_tokens",
        ):
            _check.between(op, name, getattr(self, name), 1, 2**62)
        for name in ("warmup_steps", "eval_every", "checkpoint_every"):
            _check.between(op, name, getattr(self, name), 0, 2**62)
        for name in ("steps", "k_aux"):
            if getattr(self, name) is not None:
                _check.between(op, name, getattr(self, name), 1, 2**62)
        if self.tokens is not None:
            _check.between(op, "tokens", self.tokens, self.batch_size, 2**62)
        _check.one_of(op, "decay", self.decay, ("linear", "constant"))
        _check.one_of(op, "b_dec_init", self.b_dec_init, ("geometric_median", "mean", "keep"))
        for name in ("wandb", "tensorboard"):
            if not isinstance(getattr(self, name), (str, type(None))):
                msg = f"TrainConfig: {name} must be a string or None, got {getattr(self, name)!r}."
                raise ArgumentError(msg)
        _check.one_of(op, "moments", self.moments, STATES)
        _check.one_of(op, "precision", self.precision, PRECISIONS)
        self._check_numbers()
        if not callable(self.optimizer):
            _check.one_of(op, "optimizer", self.optimizer, OPTIMIZERS)
            if self.max_grad_norm is not None:
                msg = "TrainConfig: max_grad_norm needs ordinary gradients, which the fused "
                msg += f"optimizer {self.optimizer!r} never forms. Pass a callable, such as "
                msg += "optimizer=torch.optim.Adam."
                raise ArgumentError(msg)
        else:
            for name, given in (
                ("rowsparse", self.rowsparse),
                ("moments", self.moments != "float32"),
                ("precision", self.precision != "float32"),
            ):
                if given:
                    msg = f"TrainConfig: {name} is of the fused optimizers; pass optimizer='adam' "
                    msg += f"or drop {name}."
                    raise ArgumentError(msg)

    def _check_numbers(self) -> None:
        ranges = {
            "lr": (self.lr, 0.0, float("inf"), False),
            "decay_fraction": (self.decay_fraction, 0.0, 1.0, True),
            "beta1": (self.beta1, 0.0, 1.0, False),
            "beta2": (self.beta2, 0.0, 1.0, False),
            "eps": (self.eps, 0.0, float("inf"), False),
            "weight_decay": (self.weight_decay, 0.0, float("inf"), False),
            "auxk_coefficient": (self.auxk_coefficient, 0.0, float("inf"), False),
            "max_grad_norm": (self.max_grad_norm, 0.0, float("inf"), False),
        }
        for name, (value, low, high, closed) in ranges.items():
            if value is None:
                continue
            if not isinstance(value, numbers.Real):
                msg = f"TrainConfig: {name} must be a number, got {name}={value!r}."
                raise ArgumentError(msg)
            if not isinstance(value, (int, float)):  # NumPy's, which JSON does not take
                object.__setattr__(self, name, float(value))
            if not (low <= value < high or (closed and value == high)):
                end = f"at most {high}" if closed else f"below {high}"
                msg = f"TrainConfig: {name} must be at least {low:g} and {end}, got {name}={value}."
                raise ArgumentError(msg)

    @property
    def total_steps(self) -> int:
        """How many steps the run takes."""
        return self.steps if self.steps is not None else (self.tokens or 0) // self.batch_size

    @property
    def fused(self) -> bool:
        """Whether the optimizer runs in the fused pass."""
        return isinstance(self.optimizer, str)

    def base_lr(self, n_features: int) -> float | None:
        """The peak learning rate for f features; None leaves it to the callable optimizer."""
        if self.lr is not None or not self.fused:
            return self.lr
        return 2e-4 / (n_features / 2**14) ** 0.5

    def rule(self, lr: float) -> UpdateRule:
        """The fused optimizer at one learning rate."""
        return UpdateRule(
            optimizer=str(self.optimizer),
            lr=lr,
            beta1=self.beta1,
            beta2=self.beta2,
            eps=self.eps,
            weight_decay=self.weight_decay,
            rowsparse=self.rowsparse,
        )

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON values; a callable optimizer as its name."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        if not self.fused:
            values["optimizer"] = {"callable": _name(self.optimizer)}
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainConfig:
        """The settings that `to_dict` gave.

        Raises:
            ArgumentError: an unknown setting, or an optimizer that was a callable, which a file
                cannot hold.
        """
        known = [f.name for f in dataclasses.fields(cls)]
        unknown = sorted(set(values) - set(known))
        if unknown:
            msg = f"TrainConfig: no setting {unknown[0]!r}; there are {', '.join(known)}."
            raise ArgumentError(msg)
        optimizer = values.get("optimizer", "adam")
        if isinstance(optimizer, Mapping):
            msg = f"TrainConfig: the optimizer was the callable {optimizer.get('callable')!r}, "
            msg += "which is not read from a file; build the TrainConfig with it."
            raise ArgumentError(msg)
        return cls(**values)

    def what_is_computed(self) -> dict[str, Any]:
        """The settings on which the trained weights depend.

        `moments` and `precision` are left out where they are float32, as in runs written before
        there was a choice.
        """
        computed = {k: v for k, v in self.to_dict().items() if k not in _REPORTING}
        for name in ("moments", "precision"):
            if computed[name] == "float32":
                del computed[name]
        return computed


def _name(function: Any) -> str:
    inner = getattr(function, "func", function)  # functools.partial
    name = f"{getattr(inner, '__module__', '?')}:{getattr(inner, '__qualname__', repr(inner))}"
    if inner is function:
        return name
    keywords = ", ".join(f"{k}={v!r}" for k, v in sorted(function.keywords.items()))
    return f"{name}({keywords})"
