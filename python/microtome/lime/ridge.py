"""Ridge regression from normal equations, in batch, on all features or on the chosen ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from microtome.lime.equations import Equations


def ridge(gram: Tensor, moments: Tensor, alpha: float) -> Tensor:
    """Solve (gram + alpha I) b = moments for [..., p, p] and [..., p, o].

    Of a singular system the solution of least norm is taken.
    """
    system = gram.clone()
    system.diagonal(dim1=-2, dim2=-1).add_(alpha)
    factor, info = torch.linalg.cholesky_ex(system)
    if not bool(info.any()):
        pivots = factor.diagonal(dim1=-2, dim2=-1).square()
        # A pivot of the size of rounding means collinear features: what it divides is noise.
        if bool((pivots >= 1e-12 * system.diagonal(dim1=-2, dim2=-1)).all()):
            return torch.cholesky_solve(moments, factor)
    return torch.linalg.pinv(system, hermitian=True, rtol=1e-12) @ moments


@dataclass(frozen=True, eq=False)
class Fit:
    """Local linear models of e explicands with p features and o outputs, float64.

    Attributes:
        coefficients: [e, p, o], zero where a feature was not chosen.
        chosen: [e, p, o] bool.
        intercept: [e, o].
        local_prediction: [e, o], the model's value at the explicand.
        fidelity: [e, o], weighted R^2 on the samples.
        index, valid: as `select` gives them.
    """

    coefficients: Tensor
    chosen: Tensor
    intercept: Tensor
    local_prediction: Tensor
    fidelity: Tensor
    index: Tensor
    valid: Tensor | None


def fit(equations: Equations, index: Tensor, valid: Tensor | None, alpha: float) -> Fit:
    """Ridge regression with a free intercept on the chosen features.

    Args:
        equations: of e explicands.
        index: [e, o, k], the features.
        valid: [e, o, k] bool, which of them count; None for all.
        alpha: the penalty on the squared coefficients.
    """
    gram, moments = equations.gram, equations.moments
    e, p, o = moments.shape
    chosen = torch.zeros(e, o, p, dtype=torch.bool)
    if index.shape[-1] == p and valid is None:
        coefficients = ridge(gram, moments, alpha)
        chosen[:] = True
    else:
        coefficients = _on_chosen(gram, moments, index, valid, alpha)
        chosen.scatter_(2, index, True)
        if valid is not None:
            chosen = torch.zeros(e, o, p).scatter_add_(2, index, valid.float()) > 0
    intercept = equations.mean_y - torch.einsum("ep,epo->eo", equations.mean_z, coefficients)
    local = intercept + torch.einsum("ep,epo->eo", equations.origin, coefficients)
    left = (coefficients * (gram @ coefficients - 2 * moments)).sum(1)  # RSS - total
    flat = equations.total <= 0
    total = torch.where(flat, 1.0, equations.total)
    # Values without spread are met by the intercept alone.
    fidelity = torch.where(flat, 1.0, -left / total)
    return Fit(coefficients, chosen.mT.contiguous(), intercept, local, fidelity, index, valid)


def _on_chosen(
    gram: Tensor, moments: Tensor, index: Tensor, valid: Tensor | None, alpha: float
) -> Tensor:
    e, p, o = moments.shape
    k = index.shape[-1]
    explicand = torch.arange(e)[:, None, None, None]
    part = gram[explicand, index[..., :, None], index[..., None, :]]  # [e, o, k, k]
    right = moments.mT.gather(2, index)[..., None]  # [e, o, k, 1]
    if valid is not None:
        both = valid[..., :, None] & valid[..., None, :]
        part = torch.where(both, part, torch.eye(k, dtype=torch.float64))
        right = torch.where(valid[..., None], right, 0.0)
    found = ridge(part, right, alpha)[..., 0]
    out = torch.zeros(e, o, p, dtype=torch.float64)
    # Entries that do not count hold zero, so adding them changes nothing.
    return out.scatter_add_(2, index, found).mT.contiguous()
