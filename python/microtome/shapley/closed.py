"""Models whose Shapley values are known in closed form: linear ones, and trees through shap."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from microtome.errors import ArgumentError
from microtome.shapley._start import as_game
from microtome.shapley.game import MEMORY, Game
from microtome.shapley.inputs import InputGame
from microtome.shapley.mlp import changed, flat
from microtome.shapley.result import ShapleyValues, finish

Rows = tuple[Tensor, Tensor]  # x [e, m] and background [n, m], float64

_TOLERANCE = 1e-4  # of the largest answer: how well a closed form has to repeat f on the rows given
_BY_COLUMN = (  # steps of a pipeline after which a column is still that column
    "StandardScaler", "MinMaxScaler", "MaxAbsScaler", "RobustScaler", "PowerTransformer",
    "QuantileTransformer",
)  # fmt: skip
_FORESTS = (
    "DecisionTree", "ExtraTree", "ExtraTrees", "RandomForest", "GradientBoosting",
    "HistGradientBoosting", "IsolationForest", "XGB", "XGBRF", "LGBM",
)  # fmt: skip


def closed(
    f: Any,
    x: Any = None,
    background: Any = None,
    *,
    groups: Mapping[str, Sequence[int | str]] | Sequence[int] | Tensor | None = None,
    memory: int = MEMORY,
    check: bool = True,
) -> ShapleyValues:
    """Shapley values of a linear model or of trees, without sampling.

        linear: phi_j = sum over the columns c of player j of W_c (x_c - mean of b_c)
        trees:  shap's TreeExplainer, interventional, of the raw output, on the same background rows

    A linear model is an nn.Linear, an nn.Sequential of Linear layers without activations, or a
    fitted scikit-learn model with coef_ whose predict or decision_function is linear; trees are
    scikit-learn's forests and boosted trees, xgboost's and lightgbm's, where shap is installed. A
    scikit-learn pipeline may scale or transform each column before either. A closed form counts
    only if it repeats f's answers on the rows given.

    Args:
        f: the model, or its bound method: model.decision_function, model.predict_proba, ...
        x: [e, m] rows to explain ([m] for one).
        background: [n, m] rows that absent players are drawn from.
        groups: players that are groups of columns, as in `permutation`; not for trees.
        memory: bytes of rows in one call of f.
        check: call f twice on x to find out whether it is deterministic.

    Returns:
        ShapleyValues with exact=True and standard errors of zero; `method` is "linear (closed
        form)" or "TreeSHAP (shap)".

    Raises:
        ArgumentError: there is no closed form; the message says why.

    Deterministic. Source: Lundberg and Lee 2017 (arXiv:1705.07874), corollary 1; Lundberg et al.
    2020 (Nature Machine Intelligence 2).

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> _ = torch.nn.init.ones_(model.weight)
        >>> found = closed(model, torch.tensor([[1.0, 2.0]]), torch.zeros(1, 2))
        >>> found.values[..., 0], found.method
        (tensor([[1., 2.]], dtype=torch.float64), 'linear (closed form)')
    """
    op = "closed"
    game = as_game(op, f, x, background, groups=groups, memory=memory, check=check)
    found = closed_form(game)
    if isinstance(found, str):
        msg = f"{op}: there is no closed form: {found}. Use explain(), exact() or permutation()."
        raise ArgumentError(msg)
    return found


def closed_form(game: Game) -> ShapleyValues | str:
    """The values of a game in closed form, or why there are none."""
    if not isinstance(game, InputGame):
        return "the game is not one of a model's inputs"
    model, method = _owner(game.f)
    rows: Callable[[], Rows | None] = partial(_numbers, game)
    if type(model).__module__ == "sklearn.pipeline" and type(model).__name__ == "Pipeline":
        steps = [step for _, step in model.steps]
        other = [type(step).__name__ for step in steps[:-1] if not _keeps_columns(step)]
        if other:
            return f"{', '.join(other)} in the pipeline may mix columns"
        rows = partial(_transformed, game, model)
        model = steps[-1]
    weight = linear_of(game.f if isinstance(game.f, nn.Module) else getattr(model, method, None))
    if weight is not None:
        return _linear(game, weight, rows())
    name = type(model).__name__.removesuffix("Classifier").removesuffix("Regressor")
    home = type(model).__module__.split(".")[0]
    if home in ("sklearn", "xgboost", "lightgbm") and name in _FORESTS:
        return _trees(game, model, method, rows())
    return f"{type(model).__name__} is neither a linear model nor trees"


def linear_of(f: Any) -> Tensor | None:
    """[o, m] float64 weights of a model that looks linear, or None."""
    if isinstance(f, nn.Module):
        return _layers(f)
    model, method = _owner(f)
    if method not in ("predict", "decision_function") or not hasattr(model, "coef_"):
        return None
    coefficients = model.coef_
    if hasattr(coefficients, "toarray"):  # sparse
        coefficients = coefficients.toarray()
    return torch.tensor(np.atleast_2d(np.asarray(coefficients, dtype=np.float64)))


def _layers(f: nn.Module) -> Tensor | None:
    """The product of the Linear layers of a module that has no others."""
    if not isinstance(f, nn.Sequential | nn.Linear):
        return None
    if changed(f):
        return None
    weight = None
    for module in flat(f if isinstance(f, nn.Sequential) else nn.Sequential(f)):
        if type(module) is nn.Linear:
            here = module.weight.detach().double()
            weight = here if weight is None else here @ weight
        elif type(module) not in (nn.Identity, nn.Flatten):
            return None
    return None if weight is None else weight.cpu()


def _owner(f: Any) -> tuple[Any, str]:
    """The model behind f and the method that is called."""
    if hasattr(f, "fit"):
        return f, "predict_proba" if hasattr(f, "predict_proba") else "predict"
    return getattr(f, "__self__", f), getattr(f, "__name__", "")


def _keeps_columns(step: Any) -> bool:
    return step == "passthrough" or (
        type(step).__module__.startswith("sklearn.preprocessing.")
        and type(step).__name__ in _BY_COLUMN
    )


def _transformed(game: InputGame, pipeline: Any) -> Rows | None:
    """x and background as the last step of a pipeline sees them."""
    back = game.rows.back
    both = (pipeline[:-1].transform(back(a)) for a in (game.rows.x, game.rows.background))
    x, background = (torch.from_numpy(np.array(a, dtype=np.float64)) for a in both)
    return x, background


def _linear(game: InputGame, weight: Tensor, rows: Rows | None) -> ShapleyValues | str:
    if rows is None:
        return "x holds other things than numbers"
    x, background = rows
    if weight.shape[1] != x.shape[1]:
        return f"the weights are for {weight.shape[1]} columns, x has {x.shape[1]}"
    empty, full = game.ends()
    if weight.shape[0] != full.shape[1]:
        return "f has another number of outputs than its weights"
    always = torch.zeros(x.shape[1], dtype=torch.bool)
    player = torch.arange(x.shape[1])
    if game.player is not None:
        player = game.player.cpu().long()
        always = player < 0
    # f on all rows against the weights, up to one constant: is it really linear?
    without = torch.where(always, x[:, None], background) @ weight.T  # [e, n, o]
    apart = torch.cat([(full - x @ weight.T)[:, None], empty - without], 1)
    if not _same(apart, apart[:1, :1], torch.cat([full[:, None], empty.expand_as(without)], 1)):
        return "f is not linear in its columns: it does not repeat its weights' answers"
    each = weight.T[None] * (x - background.mean(0))[:, :, None]  # [e, m, o]
    values = torch.zeros(len(x), len(game.players), each.shape[2], dtype=torch.float64)
    values.index_add_(1, player[~always], each[:, ~always])
    return finish(game, values, None, "linear (closed form)", exact=True, engine="weights")


def _trees(game: InputGame, model: Any, method: str, rows: Rows | None) -> ShapleyValues | str:
    if game.player is not None:
        return "shap's TreeExplainer takes no groups of columns"
    if importlib.util.find_spec("shap") is None:
        return "trees take the package shap, which is not installed (pip install shap)"
    if rows is None:
        return "x holds other things than numbers"
    import shap

    x, background = (a.numpy() for a in rows)
    # Of an array of more than 100 rows shap takes 100.
    behind = shap.maskers.Independent(background, max_samples=len(background))
    empty, full = game.ends()
    # Not model_output="probability": shap then scales the values of the raw output for each
    # background row, which sums up but is no Shapley value (0.03 off exact() on 6 columns).
    try:
        explainer = shap.TreeExplainer(
            model, data=behind, feature_perturbation="interventional", model_output="raw"
        )
        values = explainer.shap_values(x, check_additivity=False)
    except (ValueError, NotImplementedError, TypeError, AssertionError) as error:
        return f"shap's TreeExplainer cannot explain it ({error})"
    found = torch.tensor(np.asarray(values, dtype=np.float64))
    found = found[:, :, None] if found.dim() == 2 else found
    if found.shape[2] == full.shape[1] and _same(
        found.sum(1), full - empty.mean(1), torch.cat([full, empty[0]])
    ):
        return finish(game, found, None, "TreeSHAP (shap)", exact=True, engine="shap")
    return f"shap's TreeExplainer does not explain the {method} of {type(model).__name__}"


def _numbers(game: InputGame) -> Rows | None:
    """x and background as float64, or None if they are not numbers."""
    rows = game.rows
    if rows._pools is None:
        return rows.x.cpu().double(), rows.background.cpu().double()
    try:
        both = torch.from_numpy(rows._pools.astype(np.float64))
    except (TypeError, ValueError):
        return None
    return both[: len(rows.x)], both[len(rows.x) :]


def _same(a: Tensor, b: Tensor, scale: Tensor) -> bool:
    if a.numel() == 0:
        return True
    return bool((a - b).abs().max() <= _TOLERANCE * scale.abs().max().clamp(min=1e-30))
