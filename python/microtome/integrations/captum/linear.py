"""Linear models of samples of present features."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import torch
from torch import Tensor

from microtome.errors import ArgumentError
from microtome.ops import coalition_gram
from microtome.shapley.coalitions import pack

_SWEEPS = 10_000
_CLOSE = 1e-9  # largest change of a coefficient, in units of the largest


class Lasso:
    """Least squares with an L1 penalty, from the products of the samples alone.

        min over b, c of  sum_k w_k (y_k - z_k b - c)^2 / (2 sum_k w_k) + alpha |b|_1

    by coordinate descent, for many rows at once.

    Args:
        alpha: weight of the penalty; 0 is least squares.
    """

    def __init__(self, alpha: float = 0.01) -> None:
        if not alpha >= 0:
            msg = f"Lasso: alpha must not be negative, got alpha={alpha}."
            raise ArgumentError(msg)
        self.alpha = alpha

    def fit_samples(self, inside: Tensor, values: Tensor, weights: Tensor) -> Tensor:
        """[e, p] coefficients for samples [K, p] bool, values [e, K] and weights [e, K]."""
        p = inside.shape[1]
        gram, moments = coalition_gram(pack(inside), weights, values[..., None], p)
        total = gram[:, :1, 0].clamp(min=1e-300)
        mean, mean_y = gram[:, 0, 1:] / total, moments[:, :1, 0] / total  # [e, p], [e, 1]
        products = gram[:, 1:, 1:] / total[..., None] - mean[:, :, None] * mean[:, None]
        with_y = moments[:, 1:, 0] / total - mean * mean_y
        if self.alpha == 0:
            return torch.linalg.lstsq(products, with_y[..., None], driver="gelsd").solution[..., 0]
        b = torch.zeros_like(with_y)
        rest = with_y.clone()  # products of each feature with what is not explained yet
        square = products.diagonal(dim1=1, dim2=2)
        for _ in range(_SWEEPS):
            moved = torch.zeros(len(b), dtype=torch.float64)
            for j in range(p):
                alone = rest[:, j] + square[:, j] * b[:, j]
                shrunk = alone.sign() * (alone.abs() - self.alpha).clamp(min=0.0)
                new = torch.where(square[:, j] > 0, shrunk / square[:, j], 0.0)
                step = new - b[:, j]
                rest -= products[:, j] * step[:, None]
                b[:, j] = new
                moved = torch.maximum(moved, step.abs())
            if bool((moved <= _CLOSE * b.abs().amax(1)).all()):
                break
        return b


def fit_by_rows(model: Any, inside: Tensor, values: Tensor, weights: Tensor) -> Tensor:
    """[e, p] coefficients of a linear model: our own, captum's or scikit-learn's.

    Raises:
        ArgumentError: the model is none of these.
    """
    if isinstance(model, Lasso):
        return model.fit_samples(inside, values, weights)
    rows = [_fit_one(model, inside, v, w) for v, w in zip(values, weights, strict=True)]
    return torch.stack(rows)


def _fit_one(model: Any, inside: Tensor, values: Tensor, weights: Tensor) -> Tensor:
    if hasattr(model, "representation"):  # captum's
        from torch.utils.data import DataLoader, TensorDataset

        samples = TensorDataset(inside.float(), values.float(), weights.float())
        model.fit(DataLoader(samples, batch_size=len(inside)))
        return model.representation().detach().double().cpu().reshape(-1)
    if not (hasattr(model, "fit") and "sample_weight" in inspect.signature(model.fit).parameters):
        msg = (
            "Lime: interpretable_model must be one of captum's linear models, or have fit(X, y, "
            f"sample_weight) and coef_ as scikit-learn's do, got {type(model).__name__}."
        )
        raise ArgumentError(msg)
    model.fit(inside.double().numpy(), values.numpy(), sample_weight=weights.numpy())
    return torch.from_numpy(np.asarray(model.coef_, dtype=np.float64).reshape(-1))
