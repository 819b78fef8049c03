"""What a gradient says a change of activations does: (source - base) * grad, summed by unit."""

from __future__ import annotations

import torch
from torch import Tensor

from microtome import _check, _native
from microtome.errors import ShapeError
from microtome.ops._registry import Backend, Op, triton_backend, why_not_common

_FLOATS = (torch.float32, torch.bfloat16)


def attribution_scores(
    source: Tensor, base: Tensor, grad: Tensor, units: int = 1
) -> tuple[Tensor, Tensor]:
    """Multiply what differs from a base run by a gradient, and sum over the columns of each unit.

        scores[i, u]  = sum over the columns c of unit u of (source[i, c] - base[i, c]) * grad[i, c]
        changed[i, u] = whether source[i, c] != base[i, c] for one of them

    Unit u is columns u * w / units ... (u + 1) * w / units - 1: a head of a site with heads, a
    neuron where units = w, the whole row where units = 1.

    Args:
        source: [n, w] float32, bfloat16, float16 or float64: the activations that would be put in.
        base: [n, w], dtype of source: those that are there.
        grad: [n, w], dtype of source: the gradient of a metric with respect to base.
        units: how many, at least 1; divides w.

    Returns:
        scores [n, units] in float32 (float64 for float64), each difference and sum in it;
        changed [n, units] bool.

    Raises:
        ShapeError: the letters above do not agree, or units does not divide w.
        DtypeError, DeviceError: the tensors differ in dtype or device.
        ArgumentError: units is below 1.
        BackendError: a demanded backend cannot run these inputs.

    Not differentiable. Deterministic: the same bits for any number of threads, and at the levels
    avx2 and above. NaN and infinity pass through. Reads each tensor once, rows in place where their
    elements are neighbours; neither the difference nor the product is stored.
    Source: Nanda 2023, attribution patching; Kramar et al. 2024, arXiv:2403.00745.

    Example:
        >>> import torch
        >>> source = torch.tensor([[1.0, 2.0, 5.0, 5.0]])
        >>> base = torch.tensor([[1.0, 2.0, 2.0, 1.0]])
        >>> scores, changed = attribution_scores(source, base, torch.full((1, 4), 10.0), units=2)
        >>> scores.tolist(), changed.tolist()
        ([[0.0, 70.0]], [[False, True]])
    """
    op = "attribution_scores"
    sizes = _check.shapes(op, source=(source, "n w"), base=(base, "n w"), grad=(grad, "n w"))
    _check.between(op, "units", units, 1, 1 << 62)
    if sizes["w"] % units:
        msg = f"{op}: units must divide the width w={sizes['w']}, got units={units}."
        raise ShapeError(msg)
    _check.dtype(op, _check.FLOATS, source=source)
    _check.same_dtype(op, source=source, base=base, grad=grad)
    _check.device(op, source=source, base=base, grad=grad)
    scores, changed = _scores(source, base, grad, units)
    return scores, changed


def attribution_scores_reference(
    source: Tensor, base: Tensor, grad: Tensor, units: int
) -> tuple[Tensor, Tensor]:
    """The formulas above, each step a tensor of its own."""
    wide = torch.float64 if source.dtype == torch.float64 else torch.float32
    shape = (source.shape[0], units, source.shape[1] // units)
    product = (source.to(wide) - base.to(wide)) * grad.to(wide)  # [n, w]
    return product.reshape(shape).sum(-1), (source != base).reshape(shape).any(-1)


def _fake(source: Tensor, base: Tensor, grad: Tensor, units: int) -> tuple[Tensor, Tensor]:
    wide = torch.float64 if source.dtype == torch.float64 else torch.float32
    shape = (source.shape[0], units)
    return source.new_empty(shape, dtype=wide), source.new_empty(shape, dtype=torch.bool)


def _cpu_scores(source: Tensor, base: Tensor, grad: Tensor, units: int) -> tuple[Tensor, Tensor]:
    n, w = source.shape
    tensors = [_native.rows(tensor) for tensor in (source, base, grad)]
    scores = torch.empty(n, units, dtype=torch.float32)
    changed = torch.empty(n, units, dtype=torch.bool)
    places = [number for t in tensors for number in (_native.address(t), t.stride(0))]
    _native.module().attribution_scores(
        source.dtype == torch.bfloat16,
        *places,
        _native.address(scores),
        _native.address(changed),
        n,
        units,
        w // units,
        _native.isa(),
        _native.threads(),
    )
    return scores, changed


def _why_not_cpu(source: Tensor, base: Tensor, grad: Tensor, units: int) -> str | None:
    return why_not_common("cpu", (source, base, grad), _FLOATS)


_scores = Op(
    attribution_scores_reference,
    fake=_fake,
    backends=[
        triton_backend("microtome.kernels.attribution_scores:launch", *_FLOATS, torch.float16),
        Backend("cpu", f"{__name__}:_cpu_scores", _why_not_cpu),
    ],
)
