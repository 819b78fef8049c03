"""LimeTabularExplainer: lime's call for rows of a table."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from microtome import _check
from microtome.errors import ArgumentError, ShapeError
from microtome.integrations.lime import sparse
from microtome.integrations.lime.base import (
    Local,
    answers,
    classes,
    labels_of,
    put,
    random_state_of,
)
from microtome.integrations.lime.discretizer import Discretizer, check_stats
from microtome.integrations.lime.explanation import Mapper, explanation, lime_class
from microtome.integrations.lime.sampling import Sample, TableSampler
from microtome.lime.equations import from_coalitions, from_rows
from microtome.lime.kernels import distances_of
from microtome.lime.masks import mask_distances
from microtome.shapley.coalitions import pack


class LimeTabularExplainer:
    """lime.lime_tabular.LimeTabularExplainer's arguments, samples and numbers.

    With the same random_state the perturbed samples are lime's, and coefficients agree to rounding.
    Kernels, discretizers, distances and regressors of the user's are honoured.

    Args:
        training_data: [n, m] array, or a scipy sparse matrix (then nothing is discretized).
        mode: "classification" or "regression".
        training_labels: [n], for discretizer="entropy".
        feature_names: m names.
        categorical_features: columns whose values are compared, not measured; whole numbers.
        categorical_names: column -> names of its values.
        kernel_width: 0.75 sqrt(m) unless given.
        kernel: a function of distances and kernel_width.
        verbose: print each fit.
        class_names: of the classifier.
        feature_selection: "auto", "forward_selection", "highest_weights", "lasso_path", "none".
        discretize_continuous: cut columns that are not categorical into bins.
        discretizer: "quartile", "decile", "entropy", or an object with discretize and undiscretize
            like lime's.
        sample_around_instance: draw columns without bins around the row.
        random_state: an integer or RandomState; None is numpy's global state, as for lime.
        training_data_stats: instead of measuring training_data; see lime.

    Raises:
        ArgumentError: missing values, or an option that is not there.
    """

    _op = "LimeTabularExplainer"

    def __init__(
        self,
        training_data: Any,
        mode: str = "classification",
        training_labels: Any = None,
        feature_names: Sequence[str] | None = None,
        categorical_features: Sequence[int] | None = None,
        categorical_names: Mapping[int, Sequence[str]] | None = None,
        kernel_width: float | None = None,
        kernel: Callable[..., Any] | None = None,
        verbose: bool = False,
        class_names: Sequence[str] | None = None,
        feature_selection: str = "auto",
        discretize_continuous: bool = True,
        discretizer: Any = "quartile",
        sample_around_instance: bool = False,
        random_state: Any = None,
        training_data_stats: Mapping[str, Any] | None = None,
    ) -> None:
        _check.one_of(self._op, "mode", mode, ("classification", "regression"))
        self.random_state = random_state_of(self._op, random_state)
        self.mode, self.class_names = mode, class_names
        self.categorical_names = categorical_names or {}
        self.sample_around_instance = sample_around_instance
        self.training_data_stats = training_data_stats
        if training_data_stats:
            check_stats(self._op, training_data_stats)
        self.categorical_features = list(categorical_features or [])
        is_sparse = sparse.is_sparse(training_data)
        if not is_sparse:
            training_data = self._complete(training_data, "training_data", 2)
        m = training_data.shape[1]
        self.feature_names = [str(j) for j in range(m)] if feature_names is None else None
        self.feature_names = self.feature_names or list(feature_names or [])
        self.feature_selection = feature_selection
        width = np.sqrt(m) * 0.75 if kernel_width is None else kernel_width
        self.base = Local(self._op, kernel, width, feature_selection, verbose)
        self.discretizer: Any = None
        if discretize_continuous and not is_sparse:
            self.discretizer = self._discretizer(discretizer, training_data, training_labels)
            self.categorical_features = list(range(m))
        mean, scale = sparse.mean_and_scale(training_data)
        mean[self.categorical_features], scale[self.categorical_features] = 0, 1
        self.scaler = SimpleNamespace(mean_=mean, scale_=scale)
        self._frequencies(training_data)
        self.sampler = TableSampler(self)

    def _discretizer(self, discretizer: Any, data: np.ndarray, labels: Any) -> Any:
        if hasattr(discretizer, "discretize") and hasattr(discretizer, "undiscretize"):
            return discretizer
        if not self.training_data_stats:
            if not isinstance(discretizer, str):
                discretizer = type(discretizer).__name__
            kinds = ("quartile", "decile", "entropy")
            _check.one_of(self._op, "discretizer", discretizer, kinds)
        return Discretizer(
            data, self.categorical_features, self.feature_names, discretizer, labels,
            self.random_state, self.training_data_stats or None,
        )  # fmt: skip

    def _frequencies(self, data: Any) -> None:
        """What values categorical and discretized columns take, and how often."""
        self.feature_values: dict[int, list[Any]] = {}
        self.feature_frequencies: dict[int, np.ndarray] = {}
        stats = self.training_data_stats
        coded = data if self.discretizer is None or stats else self.discretizer.discretize(data)
        for j in self.categorical_features:
            if stats:
                values, count = stats["feature_values"][j], stats["feature_frequencies"][j]
            else:
                column = sparse.column(coded, j)
                values, count = np.unique(column, return_counts=True)
                values = list(values)
            self.feature_values[j] = values
            self.feature_frequencies[j] = np.asarray(count) / float(sum(count))

    def _complete(self, rows: Any, name: str, dim: int) -> np.ndarray:
        try:
            found = np.asarray(rows, dtype=np.float64)
        except (TypeError, ValueError) as error:
            msg = (
                f"{self._op}: {name} must hold numbers ({error}). Encode categories as whole "
                "numbers and list them in categorical_features."
            )
            raise ArgumentError(msg) from error
        if found.ndim != dim:
            what = "[rows, columns]" if dim == 2 else "one row, [columns]"
            msg = f"{self._op}: {name} must be {what}, got shape {list(found.shape)}."
            raise ShapeError(msg)
        if not np.isfinite(found.sum()) and not np.isfinite(found).all():
            bad = np.flatnonzero(~np.isfinite(np.atleast_2d(found)).all(0))[:5]
            msg = (
                f"{self._op}: {name} has missing or infinite values in column "
                f"{', '.join(map(str, bad))}. Impute them, or drop those rows."
            )
            raise ArgumentError(msg)
        return found

    @staticmethod
    def convert_and_round(values: Any) -> list[str]:
        """Numbers as lime prints them."""
        return [f"{value:.2f}" for value in values]

    def explain_instance(
        self,
        data_row: Any,
        predict_fn: Callable[[Any], Any],
        labels: Sequence[int] = (1,),
        top_labels: int | None = None,
        num_features: int = 10,
        num_samples: int = 5000,
        distance_metric: Any = "euclidean",
        model_regressor: Any = None,
        sampling_method: str = "gaussian",
    ) -> Any:
        """Explain a row; see lime's documentation for the arguments.

        sampling_method is "gaussian", or "lhs" for a Latin hypercube.

        Raises:
            ArgumentError: missing values, or a label or option that is not there.
            ShapeError, NonFiniteError: predict_fn returns no finite number for each row and class.
        """
        if num_samples < 2:
            msg = f"{self._op}: num_samples must be at least 2, got num_samples={num_samples}."
            raise ArgumentError(msg)
        _check.one_of(self._op, "sampling_method", sampling_method, ("gaussian", "lhs"))
        if sparse.is_sparse(data_row):
            sample = sparse.sample(self, data_row, num_samples)
        else:
            data_row = self._complete(data_row, "data_row", 1)
            m = len(self.scaler.scale_)
            if len(data_row) != m:
                msg = f"{self._op}: data_row must have m={m} columns, got {len(data_row)}."
                raise ShapeError(msg)
            sample = self.sampler.draw(data_row, num_samples, sampling_method)
        values = answers(self._op, predict_fn(sample.inverse), num_samples, "predict_fn")
        values = self._checked(values)
        found = explanation(self._mapper(data_row, sample), self.mode, self.class_names)
        if self.mode == "classification":
            found.predict_proba = values[0]
            chosen, top = labels_of(self._op, values[0], labels, top_labels)
            if top is not None:
                found.top_labels = top
        else:
            chosen = [0]
            found.predicted_value = values[0, 0]
            found.min_value, found.max_value = values.min(), values.max()
        fits = self._fit(sample, values[:, chosen], num_features, distance_metric, model_regressor)
        put(found, chosen, fits)
        if self.mode == "regression":
            found.intercept[1] = found.intercept[0]
            found.local_exp[1] = list(found.local_exp[0])
            found.local_exp[0] = [(j, -1 * weight) for j, weight in found.local_exp[1]]
        return found

    def _fit(
        self, sample: Sample, values: np.ndarray, num_features: int, metric: Any, regressor: Any
    ) -> list[tuple[Any, Any, Any, Any]]:
        y = torch.from_numpy(values)
        if sample.on is not None:
            distances = mask_distances(self._op, sample.on, metric, 1.0)
            weights = self.base.weights(distances)
            words = pack(torch.from_numpy(sample.on))
            equations = from_coalitions(words, torch.from_numpy(weights), y, sample.on.shape[1])
        else:
            z = sample.data()
            weights = self.base.weights(distances_of(self._op, metric, z, z[0]))
            equations = from_rows(torch.from_numpy(z), torch.from_numpy(weights), y)
        fits = self.base.explain(
            equations, sample.data, weights, values, num_features, regressor, sample.columns
        )
        if sample.columns is not None:
            fits = sparse.padded(fits, num_features, len(self.scaler.scale_))
        return fits

    def _checked(self, values: np.ndarray) -> np.ndarray:
        """[K, classes], or [K, 1] for a regressor."""
        if self.mode == "classification":
            values = classes(self._op, values, "predict_fn")
            names = self.class_names
            self.class_names = list(map(str, range(values.shape[1]))) if names is None else names
            if not np.allclose(values.sum(1), 1.0):
                msg = f"{self._op}: the probabilities of predict_fn do not sum to 1."
                warnings.warn(msg, stacklevel=3)
            return values
        if values.ndim > 2:
            msg = (
                f"{self._op}: predict_fn must return one number for each row, got shape "
                f"{list(values.shape)}."
            )
            raise ShapeError(msg)
        return values[:, None] if values.ndim == 1 else values[:, :1]

    def _mapper(self, data_row: Any, sample: Sample) -> Any:
        names = copy.copy(self.feature_names)
        is_sparse = sample.columns is not None
        shown = self.convert_and_round(data_row.data if is_sparse else data_row)
        lambdas = {} if self.discretizer is None else self.discretizer.lambdas
        for j in self.categorical_features:
            if j in lambdas:
                continue
            value: Any = int(data_row[j])
            if j in self.categorical_names:
                value = self.categorical_names[j][value]
            names[j], shown[j] = f"{names[j]}={value}", "True"
        binned = None
        if self.discretizer is not None:
            binned = copy.copy(names)
            codes = self.discretizer.discretize(data_row)
            for j, says in self.discretizer.names.items():
                binned[j] = says[int(codes[j])]
        theirs = lime_class("lime_tabular", "TableDomainMapper")
        if theirs is None:
            return Mapper(binned or names)
        m = len(names)
        categorical = range(m) if self.discretizer is not None else self.categorical_features
        row = data_row if is_sparse else sample.first
        return theirs(
            names, shown, row, categorical_features=categorical, discretized_feature_names=binned,
            feature_indexes=sample.columns,
        )  # fmt: skip
