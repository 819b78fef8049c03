"""RecurrentTabularExplainer: lime's call for rows of time steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from microtome.errors import ShapeError
from microtome.integrations.lime.tabular import LimeTabularExplainer


class RecurrentTabularExplainer(LimeTabularExplainer):
    """A tabular explainer for models that take [samples, time steps, features].

    Columns are a feature's time steps one after another, named feature_t-2, feature_t-1,
    feature_t-0.

    Args:
        training_data: [n, time steps, features].
        mode: as in LimeTabularExplainer, like all other arguments.
        training_labels: see there.
        feature_names: a name for each feature.
        **options: see there.
    """

    def __init__(
        self,
        training_data: np.ndarray,
        mode: str = "classification",
        training_labels: Any = None,
        feature_names: Any = None,
        **options: Any,
    ) -> None:
        training_data = np.asarray(training_data)
        if training_data.ndim != 3:
            msg = (
                f"RecurrentTabularExplainer: training_data must be [n, time steps, features], got "
                f"shape {list(training_data.shape)}."
            )
            raise ShapeError(msg)
        n, self.n_timesteps, self.n_features = training_data.shape
        steps = self.n_timesteps
        names = range(self.n_features) if feature_names is None else feature_names
        super().__init__(
            training_data.transpose(0, 2, 1).reshape(n, -1), mode, training_labels,
            [f"{name}_t-{steps - (t + 1)}" for name in names for t in range(steps)], **options,
        )  # fmt: skip

    def explain_instance(
        self, data_row: np.ndarray, classifier_fn: Callable[[Any], Any], **options: Any
    ) -> Any:
        """Explain [time steps, features]; the arguments are LimeTabularExplainer's."""

        def stepwise(rows: np.ndarray) -> Any:
            shape = (len(rows), self.n_features, self.n_timesteps)
            return classifier_fn(rows.reshape(shape).transpose(0, 2, 1))

        return super().explain_instance(np.asarray(data_row).T.reshape(-1), stepwise, **options)
