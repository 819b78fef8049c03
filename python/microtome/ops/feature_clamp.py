"""Steer activations by SAE features without running the SAE: x + (a' - a) W_dec[f].

There is no C++: on a CPU the reference answers, by torch's products with a few decoder rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from microtome import _check
from microtome.errors import ArgumentError
from microtome.ops._registry import Backend, Op, why_not_common

MODES = ("set", "add", "scale")
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_WIDEST = 16384  # a program holds a row


def feature_clamp(
    x: Tensor,
    features: Tensor,
    targets: Tensor,
    W_enc: Tensor | None,
    b_enc: Tensor | None,
    b_dec: Tensor | None,
    W_dec: Tensor,
    *,
    threshold: Tensor | None = None,
    current: Tensor | None = None,
    mode: str = "set",
) -> Tensor:
    """Move activations along decoder rows until features have the activations asked for.

        z[i, j] = <x[i] - b_dec, W_enc[features[j]]> + b_enc[features[j]]
        a[i, j] = z[i, j] if z[i, j] > threshold[features[j]] else 0        (or current[i, j])
        a'      = targets (set), a + targets (add), a * targets (scale)
        out[i]  = x[i] + sum_j (a'[i, j] - a[i, j]) W_dec[features[j]]

    What the SAE does not explain of x, its error, stays as it is: it cancels. Only the m rows of
    the features are read, which is right where a feature's activation depends on its own
    pre-activation alone (ReLU, JumpReLU, gated by the same number). Of a TopK or BatchTopK SAE pass
    `current`, from the whole code: whether a feature is active there depends on all others. A row
    in which every a' equals a comes back as it was.

    Args:
        x: [n, d] float32, bfloat16, float16 or float64. Activations.
        features: [m] int32 or int64 in [0, f), no number twice.
        targets: [m] or [n, m], dtype of x: the activations wanted, or what to add, or factors.
        W_enc: [f, d], dtype of x; None where `current` is given.
        b_enc: [f], or None for zero.
        b_dec: [d] subtracted before the encoder, where the SAE does that; else None. (What the
            decoder adds cancels.)
        W_dec: [f, d], dtype of x.
        threshold: [f], JumpReLU's; None for ReLU's zero.
        current: [n, m], dtype of x: the activations a, where they are known already.
        mode: "set", "add" or "scale".

    Returns:
        [n, d] in x's dtype, computed in float32 (float64 for float64).

    Raises:
        ShapeError, DtypeError, DeviceError: the letters, dtypes or devices do not agree.
        ArgumentError: an unknown mode, a feature outside [0, f) or named twice, no W_enc and no
            current. On a GPU a later call raises for a feature outside; one named twice moves a
            row twice there.
        BackendError: a demanded backend cannot run these inputs.

    Differentiable in x, targets, W_enc, b_enc, b_dec, W_dec and current; the threshold is a step,
    so it gets no gradient. Deterministic. Cost: 4 n m d operations, where encoding and decoding
    takes 4 n f d; reads x once.
    Source: Templeton et al. 2024, "Scaling Monosemanticity", section on feature steering.

    Example:
        >>> import torch
        >>> W = torch.eye(3)
        >>> x = torch.tensor([[2.0, 0.5, -1.0]])
        >>> feature_clamp(x, torch.tensor([0]), torch.tensor([5.0]), W, None, None, W)
        tensor([[ 5.0000,  0.5000, -1.0000]])
    """
    op = "feature_clamp"
    letters = "m" if targets.dim() == 1 else "n m"
    sizes = _check.shapes(
        op, x=(x, "n d"), features=(features, "m"), targets=(targets, letters),
        W_enc=(W_enc, "f d"), b_enc=(b_enc, "f"), b_dec=(b_dec, "d"), W_dec=(W_dec, "f d"),
        threshold=(threshold, "f"), current=(current, "n m"),
    )  # fmt: skip
    floats = {
        "x": x, "targets": targets, "W_enc": W_enc, "b_enc": b_enc, "b_dec": b_dec, "W_dec": W_dec,
        "threshold": threshold, "current": current,
    }  # fmt: skip
    _check.dtype(op, _check.FLOATS, x=x)
    _check.dtype(op, _check.INDICES, features=features)
    _check.same_dtype(op, **floats)
    _check.device(op, features=features, **floats)
    _check.one_of(op, "mode", mode, MODES)
    if W_enc is None and current is None:
        msg = (
            f"{op}: W_enc is None and so is current. Pass W_enc, from which the activations of "
            "the features follow, or the activations themselves as current=[n, m]."
        )
        raise ArgumentError(msg)
    if _check.readable(features):
        _check.index_range(op, features, sizes["f"], name="features")
        if len(set(features.tolist())) < features.numel():
            msg = f"{op}: features must hold no number twice, got {features.tolist()[:10]}."
            raise ArgumentError(msg)
    if current is not None:
        W_enc = b_enc = b_dec = threshold = None
    out: Tensor = _clamp(x, features, targets, W_enc, b_enc, b_dec, W_dec, threshold, current, mode)
    return out


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _activations(
    x: Tensor, features: Tensor, W_enc: Tensor | None, b_enc: Tensor | None, b_dec: Tensor | None,
    threshold: Tensor | None, current: Tensor | None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """a [n, m], and where the features are active, if that was found out here."""
    if current is not None:
        return _wide(current), None
    assert W_enc is not None
    at = features.long()
    centred = _wide(x) if b_dec is None else _wide(x) - _wide(b_dec)
    z = centred @ _wide(W_enc[at]).T
    if b_enc is not None:
        z = z + _wide(b_enc[at])
    active = z > (0.0 if threshold is None else _wide(threshold[at]))
    return torch.where(active, z, 0.0), active


def _change(a: Tensor, targets: Tensor, mode: str) -> Tensor:
    """a' - a, [n, m]."""
    t = _wide(targets).expand(a.shape)
    return {"set": lambda: t - a, "add": lambda: t, "scale": lambda: a * t - a}[mode]()


def feature_clamp_reference(
    x: Tensor, features: Tensor, targets: Tensor, W_enc: Tensor | None, b_enc: Tensor | None,
    b_dec: Tensor | None, W_dec: Tensor, threshold: Tensor | None, current: Tensor | None,
    mode: str,
) -> Tensor:  # fmt: skip
    """The formulas above."""
    a, _ = _activations(x, features, W_enc, b_enc, b_dec, threshold, current)
    change = _change(a, targets, mode)
    moved = _wide(x) + change @ _wide(W_dec[features.long()])
    return torch.where((change != 0).any(-1, keepdim=True), moved.to(x.dtype), x).contiguous()


def _fake(x: Tensor, *_: object) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _setup_context(
    ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Any, ...], output: Tensor
) -> None:
    ctx.save_for_backward(*inputs[:9])
    ctx.mode = inputs[9]  # type: ignore[attr-defined]


def _backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # type: ignore[attr-defined]
    x, features, targets, W_enc, b_enc, b_dec, W_dec, threshold, current = saved
    mode: str = ctx.mode  # type: ignore[attr-defined]
    a, active = _activations(x, features, W_enc, b_enc, b_dec, threshold, current)
    at, g, t = features.long(), _wide(grad), _wide(targets)
    along = g @ _wide(W_dec[at]).T  # [n, m], of the change
    of_targets = along * a if mode == "scale" else along
    if targets.dim() == 1:
        of_targets = of_targets.sum(0)
    of_a = along * (t - 1.0) if mode == "scale" else along * (-1.0 if mode == "set" else 0.0)

    def into(like: Tensor, part: Tensor) -> Tensor:
        return torch.zeros_like(_wide(like)).index_copy(0, at, part).to(like.dtype)

    of_W_dec = into(W_dec, _change(a, targets, mode).T @ g)
    if active is None:
        none = (None,) * 3
        return (
            grad, None, of_targets.to(x.dtype), *none, of_W_dec, None, of_a.to(x.dtype), None,
        )  # fmt: skip
    of_z = torch.where(active, of_a, 0.0)
    of_centred = of_z @ _wide(W_enc[at])
    centred = _wide(x) if b_dec is None else _wide(x) - _wide(b_dec)
    return (
        (g + of_centred).to(x.dtype), None, of_targets.to(x.dtype),
        into(W_enc, of_z.T @ centred), None if b_enc is None else into(b_enc, of_z.sum(0)),
        None if b_dec is None else -of_centred.sum(0).to(x.dtype), of_W_dec, None, None, None,
    )  # fmt: skip


def _why_not_triton(*args: Tensor | None) -> str | None:
    x = args[0]
    if isinstance(x, Tensor) and x.shape[1] > _WIDEST:
        return f"d={x.shape[1]} (a program holds a row of up to {_WIDEST})"
    return why_not_common("triton", args[:9], _FLOATS)


_clamp = Op(
    feature_clamp_reference,
    fake=_fake,
    backends=[Backend("triton", "microtome.kernels.feature_clamp:launch", _why_not_triton)],
    backward=_backward,
    setup_context=_setup_context,
    gathers={"features": ("W_dec", "f")},
)
