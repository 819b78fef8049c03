"""LIME for texts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from microtome._seed import generator
from microtome.errors import ArgumentError
from microtome.lime.equations import Equations
from microtome.lime.kernels import Distance, Kernel, kernel_of
from microtome.lime.local import Settings
from microtome.lime.masks import answered, equations_of, first_of_equal
from microtome.lime.model import Model
from microtome.lime.result import LimeExplanation, finish
from microtome.lime.words import Split, Words
from microtome.shapley import running
from microtome.shapley.call import of_texts


def explain_text(
    f: Any,
    x: str | Sequence[str],
    *,
    split: Split = r"\W+",
    together: bool = True,
    mask: str | None = None,
    characters: bool = False,
    num_samples: int = 5000,
    num_features: int = 10,
    selection: str = "auto",
    kernel: Kernel | None = None,
    kernel_width: float | None = None,
    distance: Distance = "cosine",
    alpha: float = 1.0,
    outputs: Sequence[int] | None = None,
    repeats: int = 1,
    seed: int = 0,
    batch: int = 1024,
    check: bool = True,
    progress: bool = True,
) -> LimeExplanation:
    """Explain texts by the words whose removal changes f.

    Of every sample a random number of words, 1 to all, is switched off. Samples that are the same
    text are evaluated once.

    Args:
        f: a function from a list of strings to numbers [R] or [R, o], a scikit-learn pipeline, or a
            Hugging Face text-classification pipeline (its labels become named outputs).
        x: a text, or several.
        split: a regular expression of what separates words, or a function from a text to tokens.
        together: all occurrences of a word are one feature, which is removed; else each occurrence
            is one, replaced by `mask`.
        mask: "UNKWORDZ" (or a zero character for characters) unless given.
        characters: features are characters.
        num_samples: samples of each text, itself among them.
        num_features: words to keep at most.
        selection: "auto", "forward", "highest_weights", "lasso_path" or "none" (selection.py).
        kernel: a function from distances [K] to weights [K]; by default exponential(kernel_width).
        kernel_width: by default 25.
        distance: "cosine", "euclidean", a metric of scikit-learn or a function, of what words are
            present; it is multiplied by 100.
        alpha: the ridge penalty.
        outputs: which of f's outputs to explain; all by default.
        repeats: run with so many seeds and report how much the explanations differ.
        seed: of the samples. A text's explanation does not depend on the other texts.
        batch: texts in one call of f.
        check: call f twice on x to find out whether it is deterministic.
        progress: show a progress bar over the texts.

    Returns:
        LimeExplanation, [e, p] or [e, p, o], p the most words of any text.

    Raises:
        ArgumentError: a text without words, unknown options, a function that is not deterministic.
        ShapeError, NonFiniteError: f returns something else than numbers for each text.

    Ctrl-C returns what can be said with the answers that had come (`interrupted`).

    Example:
        >>> found = explain_text(lambda texts: [float("good" in t) for t in texts], "a good film")
        >>> found.top(1)[0]["feature"]
        'good'
    """
    op = "explain_text"
    settings = Settings(op, num_features, selection, alpha, num_samples, repeats)
    kernel = kernel_of(op, kernel, kernel_width, 25.0)
    texts = [x] if isinstance(x, str) else list(x)
    cut = [Words(text, split, together, mask, characters) for text in texts]
    for at, words in enumerate(cut):
        if not words.words:
            msg = (
                f"{op}: text {at} ({words.text[:40]!r}) has no words to switch off. Leave it out, "
                "or split it another way (split=..., characters=True)."
            )
            raise ArgumentError(msg)
    if not cut:
        msg = f"{op}: x holds no texts."
        raise ArgumentError(msg)
    function, labels = of_texts(op, f, batch)
    model = Model(op, function, outputs, batch)
    prediction = model.explicands(lambda a, b: texts[a:b], len(texts), check)
    bar = running.bar(len(cut) * repeats, op, "text", progress)

    def systems(run: int) -> Iterator[Equations]:
        for i, words in enumerate(cut):
            on = _draw(len(words.words), num_samples - 1, seed + run)
            values = _values(model, words, on)
            every = torch.cat([prediction[i : i + 1], values])
            yield equations_of(op, on[: len(values)], every, kernel, distance, 100.0)
            bar.update()
            if model.interrupted:
                return

    with bar:
        runs, note = settings.run(model, systems, len(cut))
    names = tuple(tuple(words.words) for words in cut)
    return finish(
        runs, prediction, model.scalar, names, kind="text", evaluations=model.evaluations,
        view={
            "texts": tuple(texts), "pieces": tuple(words.labelled() for words in cut),
            "outputs": (labels,) * len(cut),
        },
        note=note, interrupted=model.interrupted,
    )  # fmt: skip


def _draw(p: int, K: int, seed: int) -> np.ndarray:
    """[K, p] bool: which words are on; 1 to p of them are off, as many as not."""
    random = generator(seed, "lime", "text")
    off = torch.randint(1, p + 1, (K, 1), generator=random)
    rank = torch.rand(K, p, generator=random).argsort(1).argsort(1)
    return (rank >= off).numpy()


def _values(model: Model, words: Words, on: np.ndarray) -> Tensor:
    """[K, o] values of the texts with some words off; equal texts are evaluated once."""
    first, which = first_of_equal(on)
    texts = [words.without(np.flatnonzero(~row)) for row in on[first]]
    values = model(lambda a, b: texts[a:b], len(texts))
    return values[answered(which, len(values))]
