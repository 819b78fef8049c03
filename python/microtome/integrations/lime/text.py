"""LimeTextExplainer: lime's call for texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from microtome.errors import ArgumentError
from microtome.integrations.lime.base import (
    Local,
    answers,
    classes,
    labels_of,
    random_state_of,
)
from microtome.integrations.lime.explanation import WordMapper, explanation, lime_class
from microtome.lime.masks import first_of_equal, mask_distances
from microtome.lime.words import Words


class IndexedWords(Words):
    """A text under the names lime's own mapper of features to words asks for."""

    def raw_string(self) -> str:
        return self.text

    def num_words(self) -> int:
        return len(self.words)

    def word(self, id_: int) -> str:
        return self.words[id_]

    def string_position(self, id_: int) -> np.ndarray:
        return self.start[self.positions[id_]]

    def inverse_removing(self, words_to_remove: Sequence[int]) -> str:
        return self.without(words_to_remove)


class LimeTextExplainer:
    """lime.lime_text.LimeTextExplainer's arguments, samples and numbers.

    Two samples that are the same text are sent to the classifier once. The kernel, regressors and
    distances of the user's are honoured.
    """

    _op = "LimeTextExplainer"

    def __init__(
        self,
        kernel_width: float = 25,
        kernel: Callable[..., Any] | None = None,
        verbose: bool = False,
        class_names: Sequence[str] | None = None,
        feature_selection: str = "auto",
        split_expression: Any = r"\W+",
        bow: bool = True,
        mask_string: str | None = None,
        random_state: Any = None,
        char_level: bool = False,
    ) -> None:
        self.random_state = random_state_of(self._op, random_state)
        self.base = Local(self._op, kernel, kernel_width, feature_selection, verbose)
        self.class_names, self.feature_selection = class_names, feature_selection
        self.vocabulary = None
        self.bow, self.mask_string = bow, mask_string
        self.split_expression, self.char_level = split_expression, char_level

    def explain_instance(
        self,
        text_instance: str,
        classifier_fn: Callable[[list[str]], Any],
        labels: Sequence[int] = (1,),
        top_labels: int | None = None,
        num_features: int = 10,
        num_samples: int = 5000,
        distance_metric: Any = "cosine",
        model_regressor: Any = None,
    ) -> Any:
        """Explain a text; see lime's documentation for the arguments.

        Raises:
            ArgumentError: the text has no words, or a label or option is not there.
            ShapeError, NonFiniteError: classifier_fn returns no finite probabilities.
        """
        words = IndexedWords(
            text_instance, self.split_expression, self.bow, self.mask_string, self.char_level
        )
        p = len(words.words)
        if p == 0:
            msg = (
                f"{self._op}: the text {text_instance[:40]!r} has no words to switch off. Leave it "
                "out, or pass another split_expression or char_level=True."
            )
            raise ArgumentError(msg)
        on = self._draw(p, num_samples)
        first, which = first_of_equal(on)
        texts = [words.without(np.flatnonzero(~row)) for row in on[first]]
        out = answers(self._op, classifier_fn(texts), len(texts), "classifier_fn")
        values = classes(self._op, out, "classifier_fn")[which]
        if self.class_names is None:
            self.class_names = [str(c) for c in range(values.shape[1])]
        mapper = (lime_class("lime_text", "TextDomainMapper") or WordMapper)(words)
        found = explanation(mapper, "classification", self.class_names, self.random_state)
        found.predict_proba = values[0]
        chosen, top = labels_of(self._op, values[0], labels, top_labels)
        if top is not None:
            found.top_labels = top
        weights = self.base.weights(mask_distances(self._op, on, distance_metric, 100.0))
        self.base.fill(found, chosen, on, weights, values[:, chosen], num_features, model_regressor)
        return found

    def _draw(self, p: int, num_samples: int) -> np.ndarray:
        """[K, p] bool in the order lime draws: all sizes first, then who is off in each sample."""
        if num_samples < 2:
            msg = f"{self._op}: num_samples must be at least 2, got num_samples={num_samples}."
            raise ArgumentError(msg)
        sizes = self.random_state.randint(1, p + 1, num_samples - 1)
        on = np.ones((num_samples, p), dtype=bool)
        for row, size in zip(on[1:], sizes.tolist(), strict=True):
            # What choice(range(p), size, replace=False) does, without its checks.
            row[self.random_state.permutation(p)[:size]] = False
        return on
