"""KernelSHAP over the features that a lasso selects, as shap offers it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from microtome.errors import ArgumentError, PackageError
from microtome.integrations.shap.solved import Solved
from microtome.shapley.coalitions import MEAN, spans
from microtome.shapley.game import Game
from microtome.shapley.link import Link
from microtome.shapley.subsets import Drawn, plan_of

_ENOUGH = 0.2  # of all coalitions: with so many "auto" selects nothing


def selected_fit(
    op: str, game: Game, nsamples: int, l1_reg: Any, link: Link | None, seed: int
) -> Solved:
    """Fit a row's values with the features that l1_reg selects; all others are zero.

    Raises:
        ArgumentError: an unknown l1_reg.
        PackageError: scikit-learn is not installed.
    """
    p = len(game.players)
    seen = min(1.0, nsamples / max(1.0, math.ldexp(1.0, min(p, 1000)) - 2))
    masks, weights, values = _sample(game, nsamples, seed)
    empty, full = game.ends()
    base = empty.mean(1).expand(len(full), -1)
    if link is not None:
        values, base, full = link(values), link(base), link(full)
    e, o = full.shape
    out = torch.zeros(e, p, o, dtype=torch.float64)
    z, w = masks.numpy().astype(np.float64), weights.numpy()
    for i in range(e):
        for j in range(o):
            target = (values[i, :, j] - base[i, j]).numpy()
            whole = float(full[i, j] - base[i, j])
            chosen = _chosen(op, z, w, target, whole, l1_reg, seen)
            out[i, chosen, j] = torch.from_numpy(_constrained(z[:, chosen], w, target, whole))
    error = torch.full_like(out, math.nan)  # a selection's own error is not estimated
    return Solved(out, base, full, game.scalar, error)


def _sample(
    game: Game, nsamples: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Coalitions [K, p] bool in pairs, their weights [K] and values [e, K, o]."""
    p = len(game.players)
    plan = plan_of(p, True, "leverage", min(nsamples, (1 << min(p, 62)) - 2) // 2)
    drawn = Drawn(0, 1, plan, seed)
    ranks, sizes = drawn.extend(plan)
    ranks, j = ranks[0], torch.arange(len(sizes))
    behind = torch.tensor(MEAN if game.backgrounds > 1 else 0)
    inside, outside = spans(behind, j, 0 * j, sizes), spans(behind, j, sizes, 0 * j + p)
    values = game.values(ranks, torch.cat([inside, outside]), torch.arange(game.explicands))
    first = ranks < sizes[:, None]
    weight = plan.weights(sizes)[0].repeat(2)
    # They sum to 1, as in shap: the weight of a lasso is on that scale.
    return torch.cat([first, ~first]), weight / weight.sum(), values


def _chosen(
    op: str, z: np.ndarray, w: np.ndarray, y: np.ndarray, whole: float, l1_reg: Any, seen: float
) -> np.ndarray:
    """Numbers of the features that are fitted."""
    p = z.shape[1]
    if l1_reg == "auto":
        if seen >= _ENOUGH:
            return np.arange(p)
        l1_reg = "aic"
    try:
        from sklearn.linear_model import Lasso, LassoLarsIC, lars_path
    except ImportError as error:
        msg = f"{op}: l1_reg={l1_reg!r} needs scikit-learn. Run pip install scikit-learn."
        raise PackageError(msg) from error
    # Each coalition counts for its features against none, and for its rest against all.
    size = z.sum(1)
    root = np.sqrt(np.concatenate([w * (p - size), w * size]))
    rows = np.concatenate([z, z - 1]) * root[:, None]
    target = np.concatenate([y, y - whole]) * root
    if isinstance(l1_reg, str) and l1_reg.startswith("num_features(") and l1_reg.endswith(")"):
        most = int(l1_reg[len("num_features(") : -1])
        found = lars_path(rows, target, max_iter=most)[1]
    elif l1_reg in ("aic", "bic"):
        scale = rows.std(0)
        scaled = rows / np.where(scale == 0, 1.0, scale)
        found = np.flatnonzero(LassoLarsIC(criterion=l1_reg).fit(scaled, target).coef_)
    elif isinstance(l1_reg, int | float) and l1_reg > 0:
        found = np.flatnonzero(Lasso(alpha=l1_reg).fit(rows, target).coef_)
    else:
        msg = (
            f"{op}: l1_reg must be False, 'num_features(k)', 'aic', 'bic', 'auto' or a positive "
            f"number, got {l1_reg!r}."
        )
        raise ArgumentError(msg)
    return np.sort(np.asarray(found, dtype=np.int64))


def _constrained(z: np.ndarray, w: np.ndarray, y: np.ndarray, whole: float) -> np.ndarray:
    """Weighted least squares with coefficients that sum to `whole`."""
    k = z.shape[1]
    if k == 0:
        return np.zeros(0)
    rest = z[:, :-1] - z[:, -1:]
    root = np.sqrt(w)
    fitted = np.linalg.lstsq(rest * root[:, None], (y - z[:, -1] * whole) * root, rcond=None)[0]
    return np.append(fitted, whole - fitted.sum())
