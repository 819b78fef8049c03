"""Which features an explanation keeps, decided from the normal equations alone."""

from __future__ import annotations

import torch
from torch import Tensor

from microtome.errors import ArgumentError, PackageError
from microtome.lime.equations import Equations
from microtome.lime.ridge import ridge

SELECTIONS = ("auto", "forward", "highest_weights", "lasso_path", "none")
_TIE = 1e-10  # gains this close, as a fraction of the largest, are the same
_FEW = 6  # "auto" goes forward up to so many features, as lime does


def check_selection(op: str, selection: str) -> None:
    """Raise ArgumentError unless there is such a selection."""
    if selection not in SELECTIONS:
        known = ", ".join(map(repr, SELECTIONS))
        msg = f"{op}: selection must be one of {known}, got {selection!r}."
        raise ArgumentError(msg)


def select(
    op: str, equations: Equations, num_features: int, selection: str
) -> tuple[Tensor, Tensor | None]:
    """The features to keep, by explicand and output.

    Args:
        op: name for messages.
        equations: of e explicands.
        num_features: how many to keep at most; more than p keeps p.
        selection: "forward" adds, one by one, the feature with which a least-squares fit has the
            largest R^2; "highest_weights" takes those whose ridge coefficient (alpha = 0.01) times
            the explicand's own value is largest; "lasso_path" goes back from the end of the lasso
            path to the last model that is small enough; "none" keeps all; "auto" is "forward" up
            to 6 features and "highest_weights" beyond.

    Returns:
        index [e, o, k] int64, in the order in which they were chosen; and valid [e, o, k] bool, or
        None if every entry is.

    Raises:
        PackageError: "lasso_path" without scikit-learn.
    """
    e, p, o = equations.moments.shape
    if selection == "none":
        return torch.arange(p).expand(e, o, p), None
    if selection == "lasso_path":
        return _lasso_path(op, equations, num_features)
    k = min(num_features, p)
    if selection == "forward" or (selection == "auto" and num_features <= _FEW):
        return forward(equations, k), None
    coefficients = ridge(equations.gram, equations.moments, 0.01)
    size = (coefficients * equations.origin[:, :, None]).abs().mT  # [e, o, p]
    return size.argsort(dim=-1, descending=True, stable=True)[..., :k], None


def forward(equations: Equations, k: int) -> Tensor:
    """[e, o, k]: greedy least squares by a pivoted Cholesky factorisation of the Gram matrix.

    What is left of a candidate's variance (d) and of its covariance with the values (r) after the
    features chosen so far gives its gain r^2 / d in the explained sum of squares. A candidate that
    depends linearly on those chosen gains nothing. Ties go to the lower number.
    """
    e, p, o = equations.moments.shape
    gram = equations.gram[:, None].expand(e, o, p, p).reshape(e * o, p, p)
    r = equations.moments.mT.reshape(e * o, p).clone()
    d = gram.diagonal(dim1=1, dim2=2).clone()
    least = d * 1e-12  # rounding of the Gram matrix, with room
    L = torch.zeros(e * o, k, p, dtype=torch.float64)
    chosen = torch.empty(e * o, k, dtype=torch.int64)
    free = torch.ones(e * o, p, dtype=torch.bool)
    row = torch.arange(e * o)
    for t in range(k):
        lives = d > least
        gain = torch.where(lives, r.square() / torch.where(lives, d, 1.0), 0.0)
        gain.masked_fill_(~free, -1.0)
        # Equal columns differ by rounding; the first of those that tie wins.
        j = (gain >= gain.amax(1, keepdim=True) * (1 - _TIE)).byte().argmax(1)
        chosen[:, t] = j
        free[row, j] = False
        root = torch.where(lives[row, j], d[row, j].clamp(min=0).sqrt(), torch.inf)
        left = gram[row, j] - torch.einsum("btp,bt->bp", L[:, :t], L[row, :t, j])
        L[:, t] = left / root[:, None]
        r -= L[:, t] * (r[row, j] / root)[:, None]
        d -= L[:, t].square()
    return chosen.reshape(e, o, k)


def _lasso_path(op: str, equations: Equations, k: int) -> tuple[Tensor, Tensor | None]:
    """The last model of the lasso path with at most k features, each explicand and output."""
    try:
        from sklearn.linear_model import lars_path_gram
    except ImportError as error:
        msg = (
            f"{op}: selection='lasso_path' is computed by scikit-learn, which is not installed "
            f"({error}). Install it (pip install scikit-learn) or choose another selection."
        )
        raise PackageError(msg) from error
    e, p, o = equations.moments.shape
    found = []
    for i in range(e):
        gram = equations.gram[i].numpy()
        for c in range(o):
            moments = equations.moments[i, :, c].numpy()
            _, _, path = lars_path_gram(moments, gram, n_samples=1, method="lasso")
            kept = torch.arange(p)
            for step in range(path.shape[1] - 1, 0, -1):
                kept = torch.from_numpy(path[:, step].nonzero()[0])
                if len(kept) <= k:
                    break
            found.append(kept)
    most = max(1, *map(len, found)) if found else 1
    index = torch.zeros(e * o, most, dtype=torch.int64)
    valid = torch.zeros(e * o, most, dtype=torch.bool)
    for at, kept in enumerate(found):
        index[at, : len(kept)] = kept
        valid[at, : len(kept)] = True
    return index.reshape(e, o, most), None if bool(valid.all()) else valid.reshape(e, o, most)
