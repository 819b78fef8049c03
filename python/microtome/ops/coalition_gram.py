"""The normal equations of a weighted regression on coalitions, straight from their bits."""

from __future__ import annotations

import torch
from torch import Tensor

from microtome import _check, _native
from microtome.errors import ShapeError
from microtome.ops._registry import Backend, Op, triton_backend, why_not_common

_BLOCK = 1024  # coalitions whose bits the reference spreads at a time
_MOST = 1 << 20  # players: beyond, the Gram matrix alone is 8 TB


def coalition_gram(
    coalitions: Tensor, weights: Tensor, values: Tensor, p: int
) -> tuple[Tensor, Tensor]:
    """Sum up what a weighted least-squares fit of values on coalitions needs.

        z[k] = (1, bit 0 of coalition k, ..., bit p - 1)                                   [p + 1]
        gram[i] = sum_k weights[i, k] z[k] z[k]^T
        moments[i] = sum_k weights[i, k] z[k] values[i, k]^T

    Args:
        coalitions: [K, w] int64, w = ceil(p / 64): bit j % 64 of word j // 64 is player j. Bits
            from p on are ignored.
        weights: [g, K] float64; g = 1 is one weighting for all explicands, else g = e.
        values: [e, K, o] float64: e explicands, o outputs.
        p: players, at least 1.

    Returns:
        gram [g, p + 1, p + 1] and moments [e, p + 1, o], float64; row and column 0 belong to the
        constant. gram is symmetric to the bit.

    Raises:
        ShapeError: the letters above do not agree.
        DtypeError, DeviceError: see above; all lie on one device.
        ArgumentError: p is below 1.
        BackendError: a demanded backend cannot run these inputs.

    Not differentiable. Deterministic: the same bits for any number of threads. Exact where weights
    (and values) are integers and no sum reaches 2^53. A value that is not finite reaches the
    players of its coalition and the constant, and may reach others. Never forms the design matrix
    [K, p].
    Source: Lundberg and Lee 2017, arXiv:1705.07874; Ribeiro et al. 2016, arXiv:1602.04938.

    Example:
        >>> import torch
        >>> coalitions = torch.tensor([[0b01], [0b11]])
        >>> weights, values = torch.tensor([[1.0, 2.0]]).double(), torch.tensor([[[5.0], [7.0]]])
        >>> gram, moments = coalition_gram(coalitions, weights, values.double(), p=2)
        >>> gram.tolist(), moments.flatten().tolist()
        ([[[3.0, 3.0, 2.0], [3.0, 3.0, 2.0], [2.0, 2.0, 2.0]]], [19.0, 19.0, 14.0])
    """
    op = "coalition_gram"
    _check.between(op, "p", p, 1, _MOST)
    sizes = _check.shapes(
        op, coalitions=(coalitions, "K w"), weights=(weights, "g K"), values=(values, "e K o")
    )
    words = (p + 63) // 64
    if sizes["w"] != words:
        msg = (
            f"{op}: coalitions must be [K, w] with w = ceil(p / 64) = {words} for p={p}, got shape "
            f"{list(coalitions.shape)}."
        )
        raise ShapeError(msg)
    if sizes["g"] not in (1, sizes["e"]):
        msg = (
            f"{op}: weights must be [1, K], or [e, K] with e={sizes['e']} as in values, got shape "
            f"{list(weights.shape)}."
        )
        raise ShapeError(msg)
    _check.dtype(op, (torch.int64,), coalitions=coalitions)
    _check.dtype(op, (torch.float64,), weights=weights, values=values)
    _check.device(op, coalitions=coalitions, weights=weights, values=values)
    gram, moments = _gram(coalitions, weights, values, p)
    return gram, moments


def coalition_gram_reference(
    coalitions: Tensor, weights: Tensor, values: Tensor, p: int
) -> tuple[Tensor, Tensor]:
    """Spread the bits of a block of coalitions, then multiply matrices."""
    g, (e, _, o) = weights.shape[0], values.shape
    gram = values.new_zeros(g, p + 1, p + 1)
    moments = values.new_zeros(e, p + 1, o)
    player = torch.arange(p, device=coalitions.device)
    blocks = (
        torch.split(coalitions, _BLOCK),
        torch.split(weights, _BLOCK, 1),
        torch.split(values, _BLOCK, 1),
    )
    for words, weight, value in zip(*blocks, strict=True):
        z = values.new_ones(words.shape[0], p + 1)  # [block, p + 1]
        z[:, 1:] = words[:, player // 64] >> (player % 64) & 1
        gram += (z * weight[..., None]).mT @ z
        moments += z.mT @ (weight[..., None] * value)
    return gram.tril() + gram.tril(-1).mT, moments


def _fake(coalitions: Tensor, weights: Tensor, values: Tensor, p: int) -> tuple[Tensor, Tensor]:
    e, _, o = values.shape
    return (
        values.new_empty(weights.shape[0], p + 1, p + 1),
        values.new_empty(e, p + 1, o),
    )


def _cpu_gram(coalitions: Tensor, weights: Tensor, values: Tensor, p: int) -> tuple[Tensor, Tensor]:
    (K, w), g, (e, _, o) = coalitions.shape, weights.shape[0], values.shape
    tensors = [t.contiguous() for t in (coalitions, weights, values)]
    gram = torch.empty(g, p + 1, p + 1, dtype=torch.float64)
    moments = torch.empty(e, p + 1, o, dtype=torch.float64)
    _native.module().coalition_gram(
        *(t.data_ptr() for t in tensors), K, w, g, e, o, p, gram.data_ptr(), moments.data_ptr(),
        _native.forced_isa(), _native.threads(),
    )  # fmt: skip
    return gram, moments


def _why_not_cpu(coalitions: Tensor, weights: Tensor, values: Tensor, p: int) -> str | None:
    return why_not_common("cpu", (coalitions, weights, values), (torch.float64,))


_gram = Op(
    coalition_gram_reference,
    fake=_fake,
    backends=[
        triton_backend("microtome.kernels.coalition_gram:launch", torch.float64),
        Backend("cpu", f"{__name__}:_cpu_gram", _why_not_cpu),
    ],
)
