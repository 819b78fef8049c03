"""lime's own result classes where lime is installed, light ones of the same face where not."""

from __future__ import annotations

import html
import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from microtome.errors import ArgumentError, PackageError
from microtome.lime.plot import draw_bars, figure


def lime_class(module: str, name: str) -> Any:
    """A class of lime's, or None where lime or what it needs is not installed."""
    try:
        return getattr(importlib.import_module(f"lime.{module}"), name)
    except ImportError:
        return None


def explanation(mapper: Any, mode: str, class_names: Any, random_state: Any = None) -> Any:
    """An empty explanation, to be filled by an explainer."""
    made = lime_class("explanation", "Explanation") or Explanation
    return made(mapper, mode=mode, class_names=class_names, random_state=random_state)


class Mapper:
    """Names for feature numbers."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = list(names)

    def map_exp_ids(self, exp: Any, **_: Any) -> list[tuple[str, Any]]:
        return [(self.names[j], value) for j, value in exp]


class WordMapper:
    """Words for feature numbers, with their places in the text if asked for."""

    def __init__(self, words: Any) -> None:
        self.indexed_string = words

    def map_exp_ids(self, exp: Any, positions: bool = False) -> list[tuple[str, Any]]:
        words = self.indexed_string
        if not positions:
            return [(words.word(j), value) for j, value in exp]
        where = ["-".join(map(str, words.string_position(j))) for j, _ in exp]
        return [(f"{words.word(j)}_{at}", v) for (j, v), at in zip(exp, where, strict=True)]


class Explanation:
    """An explanation with lime's attributes and methods.

    Attributes:
        local_exp: label -> [(feature number, weight)], largest first.
        intercept: label -> intercept. score, local_pred: of the last label.
        predict_proba, top_labels, class_names: of a classifier.
        predicted_value, min_value, max_value: of a regressor, whose label is 1.
    """

    def __init__(
        self,
        domain_mapper: Any,
        mode: str = "classification",
        class_names: Any = None,
        random_state: Any = None,
    ) -> None:
        self.domain_mapper, self.mode, self.random_state = domain_mapper, mode, random_state
        self.local_exp: dict[Any, Any] = {}
        self.intercept: dict[Any, Any] = {}
        self.score: Any = None
        self.local_pred: Any = None
        self.class_names, self.top_labels, self.predict_proba = class_names, None, None
        if mode == "regression":
            self.class_names = ["negative", "positive"]
            self.predicted_value, self.min_value, self.max_value = None, 0.0, 1.0
            self.dummy_label = 1

    def available_labels(self) -> list[Any]:
        """The labels that are explained."""
        return list(self.top_labels or self.local_exp)

    def _label(self, label: Any) -> Any:
        label = 1 if self.mode == "regression" else label
        if label not in self.local_exp:
            msg = f"Explanation: label {label} is not explained; there are {list(self.local_exp)}."
            raise ArgumentError(msg)
        return label

    def as_list(self, label: int = 1, **options: Any) -> list[tuple[str, float]]:
        """[(name, weight)] of a label, largest first."""
        pairs = self.domain_mapper.map_exp_ids(self.local_exp[self._label(label)], **options)
        return [(name, float(value)) for name, value in pairs]

    def as_map(self) -> dict[Any, Any]:
        """label -> [(feature number, weight)]."""
        return self.local_exp

    def as_pyplot_figure(self, label: int = 1, **options: Any) -> Any:
        """A matplotlib figure of the weights as bars."""
        pairs = self.as_list(label, **options)
        made = figure()((6.4, 1.2 + 0.3 * max(1, len(pairs))))
        title = "Local explanation"
        if self.mode == "classification" and self.class_names is not None:
            title += f" for class {self.class_names[label]}"
        draw_bars(made.subplots(), [name for name, _ in pairs], [v for _, v in pairs], title)
        return made

    def as_html(self, labels: Any = None, **_: Any) -> str:
        """A page with a table of weights for each label."""
        labels = self.available_labels() if labels is None else labels
        if self.mode == "regression":
            labels = [1]
        out = ["<!doctype html><meta charset='utf-8'><title>Explanation</title>"]
        for label in labels:
            name = self.class_names[label] if self.class_names is not None else label
            out.append(f"<h2>{html.escape(str(name))}</h2><table>")
            for feature, value in self.as_list(label):
                out.append(f"<tr><td>{html.escape(feature)}</td><td>{value:.4g}</td></tr>")
            out.append("</table>")
        return "\n".join(out)

    def save_to_file(self, file_path: str | Path, labels: Any = None, **options: Any) -> None:
        """Write `as_html` to a file."""
        Path(file_path).write_text(self.as_html(labels, **options), encoding="utf8")

    def show_in_notebook(self, labels: Any = None, **options: Any) -> None:
        """Show `as_html` in a notebook.

        Raises:
            PackageError: IPython is not installed.
        """
        try:
            display = importlib.import_module("IPython.display")
        except ImportError as error:
            msg = (
                f"show_in_notebook: IPython is not there ({error}). Install it: pip install ipython"
            )
            raise PackageError(msg) from error
        display.display(display.HTML(self.as_html(labels, **options)))


class ImageExplanation:
    """An explanation of an image with lime's attributes.

    Attributes:
        image: [H, W, C]. segments: [H, W], numbered 0, 1, ...
        local_exp, intercept, score, local_pred, top_labels: as in Explanation.
    """

    def __init__(self, image: np.ndarray, segments: np.ndarray) -> None:
        self.image, self.segments = image, segments
        self.local_exp: dict[Any, Any] = {}
        self.intercept: dict[Any, Any] = {}
        self.score: Any = None
        self.local_pred: Any = None
        self.top_labels: Any = None

    def get_image_and_mask(
        self,
        label: int,
        positive_only: bool = True,
        negative_only: bool = False,
        hide_rest: bool = False,
        num_features: int = 5,
        min_weight: float = 0.0,
    ) -> tuple[np.ndarray, np.ndarray]:
        """The image and a mask [H, W] of the segments that matter.

        Args:
            label: which label.
            positive_only: only segments with a positive weight.
            negative_only: only segments with a negative weight. With neither, segments are tinted
                in the image: green (channel 1) for positive weights, red (channel 0) for negative
                ones, and the mask holds 1 and -1.
            hide_rest: make the rest of the image black.
            num_features: most segments.
            min_weight: least weight of a segment.

        Raises:
            ArgumentError: the label is not explained, or both signs are asked for alone.
        """
        if label not in self.local_exp:
            known = list(self.local_exp)
            msg = f"get_image_and_mask: label {label} is not explained; there are {known}."
            raise ArgumentError(msg)
        if positive_only and negative_only:
            msg = "get_image_and_mask: positive_only and negative_only exclude each other."
            raise ArgumentError(msg)
        mask = np.zeros_like(self.segments)
        shown = np.zeros(self.image.shape) if hide_rest else self.image.copy()
        pairs = self.local_exp[label]
        if positive_only or negative_only:
            sign = 1 if positive_only else -1
            pairs = [(j, w) for j, w in pairs if sign * w > max(0, min_weight)]
        for j, weight in pairs[:num_features]:
            if abs(weight) < min_weight:
                continue
            where = self.segments == j
            shown[where] = self.image[where]
            if positive_only or negative_only:
                mask[where] = 1
                continue
            mask[where] = -1 if weight < 0 else 1
            shown[where, 0 if weight < 0 else 1] = self.image.max()
        return shown, mask
