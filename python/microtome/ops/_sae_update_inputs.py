"""What `sae_update` takes, and the checks that run before it changes anything."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor

from microtome import _autocast, _check
from microtome import _pending as pending
from microtome._look import Look
from microtome.errors import ArgumentError, DtypeError
from microtome.ops import _sae_update_states as states
from microtome.ops._registry import why_not_common
from microtome.ops.screen_weights import REFRESHED, Screen, stride

Params: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor]
_NAMES = ("W_enc", "b_enc", "W_dec", "b_dec")
OPTIMIZERS = ("adam", "adamw", "sgd", "signsgd")
# Places among the op's arguments: values, grad_values and grad_out of both codes and x; moments of
# the weights; the weights' copies.
_ROWS, _WEIGHT_MOMENTS, _COPIES = (1, 2, 3, 6, 7, 8, 10), (15, 16, 19, 20), (26, 27)


@dataclass(frozen=True)
class UpdateRule:
    """How parameters move, given their gradient.

    Attributes:
        optimizer: "adam", "adamw" (decoupled decay), "sgd" (momentum is beta1, 0 for none, as
            torch.optim.SGD) or "signsgd" (sign of the gradient, or of the momentum
            m = beta1 m + (1 - beta1) g when beta1 > 0).
        lr: step size.
        beta1: Adam's first decay, or the momentum.
        beta2: Adam's second decay.
        eps: Adam's epsilon.
        weight_decay: L2 for adam and sgd (added to the gradient), decoupled for adamw and signsgd.
            Acts on W_enc and W_dec, not on biases.
        rowsparse: leave rows that no code touched, and their moments, as they are
            (torch.optim.SparseAdam's semantics: another algorithm than Adam, opt-in).
        project: remove from each decoder row's gradient its component along the row.
        renorm: scale each decoder row to length 1 after the step.
    """

    optimizer: str = "adam"
    lr: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    rowsparse: bool = False
    project: bool = True
    renorm: bool = True


@dataclass
class Code:
    """One sparse code of a step with what its gradients need.

    Attributes:
        indices: [n, k] int32 or int64.
        values: [n, k] activations after the ReLU, in the dtype of x.
        grad_values: [n, k] gradient of the values, zero where the value is zero; likewise.
        grad_out: [n, d] gradient of this code's reconstruction; likewise.
        scale: every gradient of this code is multiplied by it (1 / total variance, say).
    """

    indices: Tensor
    values: Tensor
    grad_values: Tensor
    grad_out: Tensor
    scale: float = 1.0


@dataclass(frozen=True)
class RowGradients:
    """Gradients of some latents' rows, formed elsewhere, which `sae_update` adds to its own.

    Attributes:
        place: [f] int32: which of the m rows below is a latent's, each in [0, m); -1 for none.
        W_enc: [m, d], dtype of the parameters, as the two others.
        b_enc: [m].
        W_dec: [m, d].
    """

    place: Tensor
    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The four, in the order of the op."""
        return self.place, self.W_enc, self.b_enc, self.W_dec


def moments_for(
    params: Params, rule: UpdateRule, state: str = "float32", *, meta: bool = False
) -> list[Tensor | None]:
    """Zeroed optimizer state for `sae_update`: eight entries, None where the rule keeps none.

    Args:
        params: W_enc [f, d], b_enc [f], W_dec [f, d], b_dec [d].
        rule: the optimizer.
        state: how the moments of W_enc and W_dec are kept; those of the biases keep the
            parameters' dtype. "float32": in the parameters' dtype. "bfloat16": rounded
            stochastically, without bias. "int8": one byte a number and one for every 128
            neighbours of a row, their common power of two; [f, bytes of a row], so that one tensor
            is one moment (`_sae_update_states` has the layout).
        meta: on the meta device.

    A step reads and writes, a weight, with Adam and a bf16 screen or copy: 26, 18 or 14.03 bytes
    (14.25 at d = 64, 14.07 at d = 768).

    Raises:
        ArgumentError: an unknown state.
    """
    _check.one_of("moments_for", "state", state, states.STATES)
    adam = rule.optimizer in ("adam", "adamw")
    first, second = adam or rule.beta1 > 0, adam
    device = "meta" if meta else None
    return [
        states.zeros(p, state, device) if kept else None for p in params for kept in (first, second)
    ]


def check_shapes(
    code: Code, x: Tensor, params: Params, aux: Code | None, extra: RowGradients | None
) -> dict[str, int]:
    tensors = {
        "x": (x, "n d"),
        **{
            name: (p, shape)
            for name, p, shape in zip(_NAMES, params, ("f d", "f", "f d", "d"), strict=True)
        },
    }
    for prefix, c, k in (("", code, "k"), ("aux_", aux, "a")):
        if c is not None:
            tensors |= {
                f"{prefix}indices": (c.indices, f"n {k}"),
                f"{prefix}values": (c.values, f"n {k}"),
                f"{prefix}grad_values": (c.grad_values, f"n {k}"),
                f"{prefix}grad_out": (c.grad_out, "n d"),
            }
    if extra is not None:
        names, shapes = [f"extra_{name}" for name in _NAMES[:3]], ("m d", "m", "m d")
        tensors["extra_place"] = (extra.place, "f")
        tensors |= {n: (t, s) for n, t, s in zip(names, extra.tensors[1:], shapes, strict=True)}
    return _check.shapes("sae_update", **tensors)


def check_types(
    code: Code, x: Tensor, params: Params, aux: Code | None, extra: RowGradients | None
) -> None:
    op, weights = "sae_update", dict(zip(_NAMES, params, strict=True))
    if extra is not None:
        weights |= {f"extra_{name}": t for name, t in zip(_NAMES, extra.tensors[1:], strict=False)}
        _check.dtype(op, (torch.int32,), extra_place=extra.place)
        _check.device(op, x=x, extra_place=extra.place)
    rows, indices = {"x": x}, {"indices": code.indices}
    for prefix, c in (("", code), ("aux_", aux)):
        if c is not None:
            rows |= {f"{prefix}values": c.values, f"{prefix}grad_values": c.grad_values}
            rows[f"{prefix}grad_out"] = c.grad_out
            indices[f"{prefix}indices"] = c.indices
    _check.dtype(op, (torch.float32, torch.bfloat16, torch.float64), x=x)
    kinds = _autocast.dtypes(op, rows)
    if torch.bfloat16 not in kinds.values():
        _check.same_dtype(op, **rows, **weights)
    elif len(set(kinds.values())) > 1:
        got = ", ".join(f"{name} {_check.dtype_name(kind)}" for name, kind in kinds.items())
        msg = f"{op}: x and the codes must share one dtype, got {got}. Cast them with .to()."
        raise DtypeError(msg)
    else:
        _check.dtype(op, (torch.float32,), **weights)
    _check.dtype(op, _check.INDICES, **indices)
    _check.device(op, **rows, **weights, **indices)


def check_rule(rule: UpdateRule, step: int) -> None:
    op = "sae_update"
    _check.one_of(op, "optimizer", rule.optimizer, OPTIMIZERS)
    _check.between(op, "step", step, 1, 2**62)
    for name in ("lr", "eps", "weight_decay"):
        value = getattr(rule, name)
        if not 0 <= value < math.inf:
            msg = f"{op}: {name} must be a finite number of at least 0, got {name}={value}."
            raise ArgumentError(msg)
    for name in ("beta1", "beta2"):
        value = getattr(rule, name)
        if not 0 <= value < 1:
            msg = f"{op}: {name} must be at least 0 and below 1, got {name}={value}."
            raise ArgumentError(msg)


def check_state(
    params: Params,
    moments: list[Tensor | None],
    rule: UpdateRule,
    screen: Screen | None,
    copies: tuple[Tensor, Tensor] | None,
) -> None:
    """What is updated in place must be laid out as the kernels take it."""
    op = "sae_update"
    for name, p in zip(_NAMES, params, strict=True):
        if not p.is_contiguous():
            msg = (
                f"{op}: {name} is updated in place and must be contiguous; "
                f"pass {name}.contiguous()."
            )
            raise ArgumentError(msg)
    _check_moments(params, moments, rule)
    for name, p, copy in zip(("W_enc", "W_dec"), params[::2], copies or (), strict=False):
        like = torch.empty_like(p, dtype=torch.bfloat16, device="meta")
        _check_like(f"the copy of {name}", copy, like, p, f"make it with {name}.bfloat16().")
    if screen is not None:
        W_enc = params[0]
        f, d = W_enc.shape
        _check.one_of(op, "screen.kind", screen.kind, REFRESHED)
        _check.dtype(op, (torch.float32,), W_enc=W_enc)
        _check.device(op, W_enc=W_enc, shadow=screen.shadow, stats=screen.stats)
        shadow, stats = screen.shadow, screen.stats
        if (
            (shadow.shape, shadow.dtype, stats.shape, stats.dtype)
            != ((f, stride(d)), torch.int16, (f, 4), torch.float32)
            or not (shadow.is_contiguous() and stats.is_contiguous())
        ):  # fmt: skip
            msg = (
                f"{op}: screen does not belong to W_enc {list(W_enc.shape)}: shadow "
                f"{list(shadow.shape)}, stats {list(stats.shape)}. "
                "Make it with screen_weights(W_enc)."
            )
            raise ArgumentError(msg)


def _check_moments(params: Params, moments: list[Tensor | None], rule: UpdateRule) -> None:
    op, remedy = "sae_update", "make them with moments_for(params, rule, state)."
    expected = moments_for(params, rule, meta=True)
    kept = [e is not None for e in expected]
    if [m is not None for m in moments] != kept:
        msg = f"{op}: moments do not fit optimizer {rule.optimizer!r}; {remedy}"
        raise ArgumentError(msg)
    named = [(f"{m}_{name}", p) for name, p in zip(_NAMES, params, strict=True) for m in "mv"]
    weights = {
        name: m
        for (name, p), m in zip(named, moments, strict=True)
        if m is not None and p.dim() == 2
    }
    if not weights:
        return
    found = {m.dtype for m in weights.values()}
    by_dtype = {
        params[0].dtype: "float32", torch.bfloat16: "bfloat16", torch.int8: "int8",
    }  # fmt: skip
    state = by_dtype.get(found.pop()) if len(found) == 1 else None
    if state is None:
        got = ", ".join(f"{name} {_check.dtype_name(m.dtype)}" for name, m in weights.items())
        own = _check.dtype_name(params[0].dtype)
        msg = (
            f"{op}: moments of W_enc and W_dec must all be {own}, all bfloat16 or all int8, "
            f"got {got}; {remedy}"
        )
        raise DtypeError(msg)
    for (name, p), m, e in zip(named, moments, moments_for(params, rule, state, meta=True),
                               strict=True):  # fmt: skip
        if m is not None and e is not None:
            _check_like(name, m, e, p, remedy)


def _check_like(name: str, t: Tensor, like: Tensor, p: Tensor, remedy: str) -> None:
    """Raise unless t has the shape and dtype of `like`, is contiguous, and where p is."""
    if (t.shape, t.dtype, t.device) != (like.shape, like.dtype, p.device) or not t.is_contiguous():
        want, have = (
            f"{list(s.shape)} {_check.dtype_name(s.dtype)} on {where}"
            for s, where in ((like, p.device), (t, t.device))
        )
        strided = "" if t.is_contiguous() else ", not contiguous"
        msg = f"sae_update: {name} must be {want}, contiguous, got {have}{strided}; {remedy}"
        raise ArgumentError(msg)


def why_not(backend: str, args: Sequence[object], *, every_state: bool = False) -> str | None:
    """Why a native backend cannot take the op's arguments, as far as device and dtypes go.

    Rows may be bfloat16, parameters only float32; moments only float32 too, unless `every_state`.
    """
    kept = [m for i in _WEIGHT_MOMENTS if isinstance(m := args[i], Tensor)]
    narrow = [m.dtype for m in kept if m.dtype in (torch.bfloat16, torch.int8)]
    if narrow and not every_state:
        return f"moments in {_check.dtype_name(narrow[0])} (has float32)"
    may_be_narrow = (*_ROWS, *_WEIGHT_MOMENTS, *_COPIES)
    rest = [t for i, t in enumerate(args) if isinstance(t, Tensor) and i not in may_be_narrow]
    others = [t for i in may_be_narrow if isinstance(t := args[i], Tensor)]
    return why_not_common(backend, rest, (torch.float32,)) or why_not_common(
        backend, others, (torch.float32, torch.bfloat16)
    )


def check_contents(
    code: Code, x: Tensor, aux: Code | None, extra: RowGradients | None, f: int
) -> tuple[Code, Code | None, RowGradients | None, Tensor | None]:
    """Indices in range and numbers finite: one NaN here would spread over every parameter.

    Returns:
        The codes, the rows, and None. On a GPU nothing waits for the answer: indices and places
        are clamped into their range, and with them comes a verdict [1] float32 on the device, 0 or
        NaN, under which nothing may be written; a later call raises.
    """
    op = "sae_update"
    look = Look(op, x.device)
    look.finite("x", x)
    seen: list[Code | None] = []
    for prefix, c in (("", code), ("aux_", aux)):
        if c is not None:
            c = replace(c, indices=look.indices(f"{prefix}indices", c.indices, f))
            look.finite(f"{prefix}values", c.values)
            look.finite(f"{prefix}grad_values", c.grad_values)
            look.finite(f"{prefix}grad_out", c.grad_out)
            if not math.isfinite(c.scale):
                msg = f"{op}: scale must be finite, got scale={c.scale}."
                raise ArgumentError(msg)
        seen.append(c)
    checked, aux = seen
    assert checked is not None
    if extra is not None:
        m = len(extra.b_enc)
        place = look.indices("extra_place + 1", extra.place + 1, m + 1, "m + 1") - 1
        extra = replace(extra, place=place)
        for name, t in zip(_NAMES, extra.tensors[1:], strict=False):
            look.finite(f"extra_{name}", t)
    return checked, aux, extra, look.submit()


def refused(verdict: Tensor | None) -> bool:
    """Whether a verdict forbids to write, for a backend that cannot ask for it on the device: it
    waits. While a CUDA graph is captured it cannot, and False is all there is to say."""
    return verdict is not None and not pending.gpu.capturing() and float(verdict) != 0.0
