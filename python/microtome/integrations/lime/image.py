"""LimeImageExplainer: lime's call for images."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from microtome.errors import ArgumentError, PackageError
from microtome.integrations.lime.base import Local, answers, classes, labels_of, random_state_of
from microtome.integrations.lime.explanation import ImageExplanation, lime_class
from microtome.lime.masks import first_of_equal, mask_distances
from microtome.lime.segments import Curtain, hidden, segments_of


class LimeImageExplainer:
    """lime.lime_image.LimeImageExplainer's arguments, samples and numbers.

    Segments are numbered 0, 1, ... whatever numbers segmentation_fn gives them (lime hides the
    wrong ones where they begin at 1), in the explanation too. Equal samples are sent to the
    classifier once.
    """

    _op = "LimeImageExplainer"

    def __init__(
        self,
        kernel_width: float = 0.25,
        kernel: Callable[..., Any] | None = None,
        verbose: bool = False,
        feature_selection: str = "auto",
        random_state: Any = None,
    ) -> None:
        self.random_state = random_state_of(self._op, random_state)
        self.feature_selection = feature_selection
        self.base = Local(self._op, kernel, kernel_width, feature_selection, verbose)

    def explain_instance(
        self,
        image: np.ndarray,
        classifier_fn: Callable[[np.ndarray], Any],
        labels: Sequence[int] = (1,),
        hide_color: Any = None,
        top_labels: int | None = 5,
        num_features: int = 100000,
        num_samples: int = 1000,
        batch_size: int = 10,
        segmentation_fn: Callable[[np.ndarray], np.ndarray] | None = None,
        distance_metric: Any = "cosine",
        model_regressor: Any = None,
        random_seed: int | None = None,
        progress_bar: bool = False,
    ) -> Any:
        """Explain an image; see lime's documentation for the arguments.

        Raises:
            ArgumentError: a label or option is not there.
            ShapeError, NonFiniteError: classifier_fn returns no finite probabilities.
            PackageError: no segmentation_fn is given and scikit-image is not installed.
        """
        for name, value, least in (("num_samples", num_samples, 2), ("batch_size", batch_size, 1)):
            if value < least:
                msg = f"{self._op}: {name} must be at least {least}, got {name}={value}."
                raise ArgumentError(msg)
        image = np.asarray(image)
        if image.ndim == 2:
            image = np.repeat(image[:, :, None], 3, 2)
        if random_seed is None:
            random_seed = self.random_state.randint(0, high=1000)
        cut = segments_of(self._op, image, segmentation_fn or _quickshift(self._op, random_seed))
        p = int(cut.max()) + 1
        on = self.random_state.randint(0, 2, num_samples * p).reshape(num_samples, p) > 0
        on[0] = True
        curtain = Curtain(image, hidden(image, cut, hide_color), cut)
        values = self._values(classifier_fn, curtain, on, batch_size, progress_bar)
        found = (lime_class("lime_image", "ImageExplanation") or ImageExplanation)(image, cut)
        chosen, top = labels_of(self._op, values[0], labels, top_labels)
        if top is not None:
            found.top_labels = top
        weights = self.base.weights(mask_distances(self._op, on, distance_metric, 1.0))
        self.base.fill(found, chosen, on, weights, values[:, chosen], num_features, model_regressor)
        return found

    def _values(
        self,
        classifier_fn: Callable[[np.ndarray], Any],
        curtain: Curtain,
        on: np.ndarray,
        batch: int,
        progress: bool,
    ) -> np.ndarray:
        first, which = first_of_equal(on)
        once = on[first]
        parts = []
        for at in tqdm(range(0, len(once), batch), disable=not progress):
            masks = once[at : at + batch]
            out = classifier_fn(curtain(masks))
            parts.append(answers(self._op, out, len(masks), "classifier_fn"))
        return classes(self._op, np.concatenate(parts), "classifier_fn")[which]


def _quickshift(op: str, seed: int) -> Callable[[np.ndarray], np.ndarray]:
    """The segmentation lime uses unless told otherwise."""
    try:
        from skimage.segmentation import quickshift
    except ImportError as error:
        msg = (
            f"{op}: the default segmentation comes from scikit-image, which is not there ({error})."
            " Install it (pip install scikit-image) or pass segmentation_fn."
        )
        raise PackageError(msg) from error
    # Newer versions renamed the argument, and lime then leaves it at its default.
    old = "random_seed" in inspect.signature(quickshift).parameters
    more = {"random_seed": seed} if old else {}
    return lambda image: quickshift(image, kernel_size=4, max_dist=200, ratio=0.2, **more)
