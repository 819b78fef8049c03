"""What the explainers share: random states, kernels, and fits in lime's form."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from microtome import _heap
from microtome.errors import ArgumentError, NonFiniteError, ShapeError
from microtome.lime.equations import Equations, from_coalitions
from microtome.lime.kernels import weights_of
from microtome.lime.ridge import fit
from microtome.lime.selection import check_selection, select
from microtome.shapley.coalitions import pack

Pairs = list[tuple[Any, Any]]


def random_state_of(op: str, random_state: Any) -> np.random.RandomState:
    """A RandomState from a seed, from itself, or numpy's global one from None, as lime does."""
    if random_state is None or random_state is np.random:
        found: np.random.RandomState = np.random.mtrand._rand
        return found
    if isinstance(random_state, np.random.RandomState):
        return random_state
    if isinstance(random_state, (int, np.integer)):
        return np.random.RandomState(random_state)
    msg = (
        f"{op}: random_state must be None, an integer or a numpy RandomState, got "
        f"{type(random_state).__name__}."
    )
    raise ArgumentError(msg)


def exponential(d: np.ndarray, kernel_width: float) -> np.ndarray:
    """lime's default kernel, sqrt(exp(-d^2 / width^2))."""
    return np.sqrt(np.exp(-(d**2) / kernel_width**2))


class Local:
    """Local models in lime's form.

    Args:
        op: name for messages.
        kernel: takes distances and kernel_width; None for the exponential one.
        kernel_width: its width.
        feature_selection: "auto", "forward_selection", "highest_weights", "lasso_path" or "none".
        verbose: print the fit, as lime does.
    """

    def __init__(
        self,
        op: str,
        kernel: Callable[..., Any] | None,
        kernel_width: float,
        feature_selection: str,
        verbose: bool,
    ) -> None:
        self.op, self.verbose = op, verbose
        self.kernel_fn = partial(kernel or exponential, kernel_width=float(kernel_width))
        self.selection = feature_selection.removesuffix("_selection")
        check_selection(op, self.selection)
        _heap.keep_freed()

    def weights(self, distances: np.ndarray) -> np.ndarray:
        return weights_of(self.op, self.kernel_fn, distances)

    def explain(
        self,
        equations: Equations,
        data: Callable[[], np.ndarray],
        weights: np.ndarray,
        values: np.ndarray,
        num_features: int,
        model_regressor: Any = None,
        names: np.ndarray | None = None,
    ) -> list[tuple[Any, Pairs, Any, np.ndarray]]:
        """(intercept, [(feature, weight)], R^2, local prediction) of each column of values.

        Args:
            equations: of the samples; one explicand.
            data: makes the samples' features [K, p], which only a regressor of the user's needs.
            weights: [K].
            values: [K, o].
            num_features: most features.
            model_regressor: fitted to the chosen features instead of a ridge regression.
            names: [p], the features' numbers; 0, 1, ... if None.
        """
        if num_features < 1:
            msg = f"{self.op}: num_features must be at least 1, got num_features={num_features}."
            raise ArgumentError(msg)
        index, valid = select(self.op, equations, num_features, self.selection)
        found = fit(equations, index, valid, 1.0) if model_regressor is None else None
        out = []
        for c in range(values.shape[1]):
            used = index[0, c] if valid is None else index[0, c][valid[0, c]]
            kept = used.numpy()
            if found is not None:
                coefficients = found.coefficients[0, used, c].numpy()
                intercept, score = found.intercept[0, c].item(), found.fidelity[0, c].item()
                local = found.local_prediction[0, c : c + 1].numpy()
            else:
                part, y = data()[:, kept], values[:, c]
                model_regressor.fit(part, y, sample_weight=weights)
                coefficients, intercept = model_regressor.coef_, model_regressor.intercept_
                score = model_regressor.score(part, y, sample_weight=weights)
                local = model_regressor.predict(part[:1])
            labels = kept if names is None else names[kept]
            order = np.argsort(-np.abs(coefficients), kind="stable")
            pairs = [(labels[j], coefficients[j]) for j in order]
            if self.verbose:
                print("Intercept", intercept)
                print("Prediction_local", local)
                print("Right:", values[0, c])
            out.append((intercept, pairs, score, local))
        return out

    def fill(
        self,
        found: Any,
        labels: Sequence[Any],
        on: np.ndarray,
        weights: np.ndarray,
        values: np.ndarray,
        num_features: int,
        model_regressor: Any,
    ) -> None:
        """Fit each label's values [K, labels] to who is `on` [K, p] bool, into the explanation."""
        equations = from_coalitions(
            pack(torch.from_numpy(on)),
            torch.from_numpy(weights),
            torch.from_numpy(values),
            on.shape[1],
        )
        fits = self.explain(
            equations, lambda: on.astype(float), weights, values, num_features, model_regressor
        )
        put(found, labels, fits)


def put(
    found: Any, labels: Sequence[Any], fits: Sequence[tuple[Any, Pairs, Any, np.ndarray]]
) -> None:
    """The fit of each label into an explanation; the last one's score and prediction stay."""
    for label, one in zip(labels, fits, strict=True):
        found.intercept[label], found.local_exp[label], found.score, found.local_pred = one


def answers(op: str, out: Any, count: int, what: str) -> np.ndarray:
    """What the user's model returned for `count` inputs, as float64 [count, ...].

    Raises:
        ShapeError: something else than numbers for each input.
        NonFiniteError: an answer is NaN or infinite.
    """
    if isinstance(out, torch.Tensor):
        out = out.detach().cpu().numpy()
    try:
        out = np.asarray(out, dtype=np.float64)
    except (TypeError, ValueError) as error:
        msg = f"{op}: {what} must return numbers for each input, got {type(out).__name__}."
        raise ShapeError(msg) from error
    if out.ndim == 0 or len(out) != count:
        msg = (
            f"{op}: {what} was called with {count} inputs and returned shape {list(out.shape)}. It "
            f"must return one row for each: [{count}, classes]."
        )
        raise ShapeError(msg)
    if not np.isfinite(out.sum()) and not np.isfinite(out).all():
        bad = np.flatnonzero(~np.isfinite(out).reshape(count, -1).all(1))
        first = ", ".join(map(str, bad[:5]))
        msg = (
            f"{op}: {what} returned NaN or infinity for {len(bad)} of {count} samples (sample "
            f"{first}). Check that it takes perturbed inputs."
        )
        raise NonFiniteError(msg)
    return out


def classes(op: str, values: np.ndarray, what: str) -> np.ndarray:
    """Probabilities [K, classes].

    Raises:
        ShapeError: they have another number of dimensions.
    """
    if values.ndim == 2:
        return values
    msg = (
        f"{op}: {what} must return the probabilities of all classes, [samples, classes], got shape "
        f"{list(values.shape)}. Use predict_proba, or for a score of its own "
        "lambda inputs: np.stack([1 - p(inputs), p(inputs)], 1)."
    )
    raise ShapeError(msg)


def labels_of(
    op: str, first: np.ndarray, labels: Sequence[int], top_labels: int | None
) -> tuple[list[Any], list[Any] | None]:
    """Which labels to explain, in lime's order, and top_labels, the most probable first.

    Raises:
        ArgumentError: there is no such label.
    """
    if top_labels:
        chosen = list(np.argsort(first)[-top_labels:])
        return chosen, chosen[::-1]
    chosen = list(labels)
    bad = [label for label in chosen if not -len(first) <= label < len(first)]
    if bad:
        msg = (
            f"{op}: labels must lie in [0, {len(first)}), the number of classes, got {bad[0]}. "
            "Pass labels=(0,) or top_labels=1."
        )
        raise ArgumentError(msg)
    return chosen, None
