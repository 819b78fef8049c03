"""LIME for texts and images."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from microtome.errors import ArgumentError, NonFiniteError, PackageError, ShapeError
from microtome.lime import explain_image, explain_text
from microtome.lime.masks import first_of_equal
from microtome.lime.segments import Curtain, grid, hidden, segments_of
from microtome.lime.words import Words

TEXTS = ["a good film, a very good one", "not good", "bad"]


def mood(texts: list[str]) -> list[float]:
    return [2.0 * ("good" in text) - ("bad" in text) - 3 * ("not" in text) for text in texts]


def test_a_linear_function_of_words_returns_its_weights() -> None:
    found = explain_text(mood, TEXTS, num_samples=200, alpha=0.0)
    assert found.names == (("a", "good", "film", "very", "one"), ("not", "good"), ("bad",))
    wanted = [[0, 2, 0, 0, 0], [-3, 2, 0, 0, 0], [-1, 0, 0, 0, 0]]
    np.testing.assert_allclose(found.coefficients, wanted, atol=1e-9)
    np.testing.assert_allclose(found.local_prediction, mood(TEXTS), atol=1e-9)
    assert found.chosen.sum(1).tolist() == [5, 2, 1]
    alone = explain_text(mood, TEXTS[1], num_samples=200, alpha=0.0)
    torch.testing.assert_close(found.coefficients[1, :2], alone.coefficients[0])


def test_equal_texts_are_evaluated_once() -> None:
    called: list[str] = []

    def f(texts: list[str]) -> list[list[float]]:
        called.extend(texts)
        return [[len(text), 1.0] for text in texts]

    found = explain_text(f, "one two three", num_samples=500, check=False, batch=3)
    # The text itself, and the ways to remove 1, 2 or 3 of 3 words.
    assert len(called) == 1 + 7 == found.evaluations
    assert found.coefficients.shape == (1, 3, 2)


@pytest.mark.parametrize(
    ("options", "words", "without_first"),
    [
        ({}, ["It", "s", "so", "good"], "'s so, so good!"),
        ({"together": False}, ["It", "s", "so", "so", "good"], "UNKWORDZ's so, so good!"),
        ({"together": False, "mask": "_"}, ["It", "s", "so", "so", "good"], "_'s so, so good!"),
        ({"split": str.split}, ["It's", "so,", "so", "good!"], " so, so good!"),
        ({"characters": True}, list("It's o,gd!"), "t's so, so good!"),
    ],
)
def test_texts_are_cut_into_features(
    options: dict[str, Any], words: list[str], without_first: str
) -> None:
    cut = Words("It's so, so good!", **options)
    assert "".join(cut.pieces) == cut.text
    assert cut.words == words
    assert cut.without([0]) == without_first
    for word, at in zip(words, cut.positions, strict=True):
        assert all(cut.text[cut.start[i] :].startswith(word) for i in at)


def test_tokens_that_are_not_in_the_text_are_an_error() -> None:
    with pytest.raises(ArgumentError, match="'ok' does not follow after character 4"):
        explain_text(mood, "good", split=lambda text: ["good", "ok"])


@pytest.mark.parametrize(
    ("x", "f", "error", "message"),
    [
        ("", mood, ArgumentError, r"text 0 \(''\) has no words to switch off"),
        (["fine", " ?! "], mood, ArgumentError, r"text 1 \(' \?! '\) has no words"),
        ([], mood, ArgumentError, "x holds no texts"),
        ("a b", lambda texts: [float("nan")] * len(texts), NonFiniteError, "NaN or infinity"),
        ("a b", lambda texts: [1.0], ShapeError, r"called with 3 rows and returned shape \[1\]"),
    ],
)
def test_texts_that_cannot_be_explained_are_told_apart(
    x: Any, f: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        explain_text(f, x, num_samples=20)


def test_first_of_equal_keeps_the_order_of_rows() -> None:
    on = np.array([[1, 0], [0, 1], [1, 0], [0, 1], [0, 0]], dtype=bool)
    first, which = first_of_equal(on)
    assert first.tolist() == [0, 1, 4]
    assert which.tolist() == [0, 1, 0, 1, 2]


def images(dtype: Any = np.float32) -> np.ndarray:
    return (np.random.RandomState(0).rand(2, 8, 6, 3) * 255).astype(dtype)


def test_a_linear_function_of_segments_returns_its_weights() -> None:
    x = np.zeros((2, 8, 8, 1))
    x[0, :4, :4], x[1, 4:, 4:] = 1, 1
    weight = np.repeat(np.repeat([[1.0, 2], [3, 4]], 4, 0), 4, 1)[None, :, :, None] / 16
    f = lambda a: (a * weight).sum((1, 2, 3))  # noqa: E731
    found = explain_image(f, x, segments=4, color=0.0, num_samples=60, alpha=0.0)
    np.testing.assert_allclose(found.coefficients, [[1, 0, 0, 0], [0, 0, 0, 4]], atol=1e-9)
    assert found.view["segments"].shape == (2, 8, 8)
    assert found.evaluations <= 2 + 2 + 2 * 16


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float16, np.float32, np.float64])
def test_hidden_segments_show_what_is_behind(dtype: Any) -> None:
    image = images(dtype)[0]
    cut = grid(8, 6, 4)
    behind = hidden(image, cut, None)
    for j in range(int(cut.max()) + 1):
        mean = image[cut == j].astype(float).mean(0)
        np.testing.assert_allclose(behind[cut == j][0].astype(float), mean, rtol=1e-2, atol=1)
    on = np.random.RandomState(0).rand(5, int(cut.max()) + 1) < 0.5
    out = Curtain(image, behind, cut)(on)
    assert out.dtype == dtype
    for row, picture in zip(on, out, strict=True):
        np.testing.assert_array_equal(picture, np.where(row[cut][..., None], image, behind))


def test_images_come_in_the_layout_and_kind_of_x() -> None:
    seen = []

    def f(a: Any) -> Any:
        seen.append((type(a), a.shape[1:], a.dtype))
        return a.reshape(len(a), -1).sum(1)

    explain_image(f, images(), num_samples=20, segments=4)
    explain_image(f, torch.from_numpy(images()).permute(0, 3, 1, 2), num_samples=20, segments=4)
    assert set(seen) == {
        (np.ndarray, (8, 6, 3), np.dtype(np.float32)),
        (torch.Tensor, (3, 8, 6), torch.float32),
    }


def test_segments_come_from_numbers_functions_and_names(monkeypatch: Any) -> None:
    image = images()[0]
    own = np.repeat([[5], [9]], 4, 0) + np.zeros((8, 6))
    assert set(np.unique(segments_of("op", image, own))) == {0, 1}
    assert set(np.unique(segments_of("op", image, lambda a: own))) == {0, 1}
    with pytest.raises(ShapeError, match=r"segments must be \[8, 6\] like the image"):
        segments_of("op", image, own[:4])
    with pytest.raises(ArgumentError, match="segments must be a number of squares, 'quickshift'"):
        segments_of("op", image, "cells")
    with pytest.raises(ArgumentError, match="segments must be at least 1, got segments=0"):
        segments_of("op", image, 0)
    monkeypatch.setitem(__import__("sys").modules, "skimage", None)
    with pytest.raises(PackageError, match="pip install scikit-image"):
        segments_of("op", image, "slic")


def test_an_image_without_channels_is_an_error() -> None:
    with pytest.raises(ShapeError, match=r"x must be an image \[H, W, C\]"):
        explain_image(lambda a: a.sum((1, 2)), images()[0, :, :, 0])


def test_a_text_is_drawn_highlighted_and_an_image_with_its_segments(tmp_path: Any) -> None:
    from microtome.lime.plot import _as_values
    from microtome.shapley.plots.written import text_html

    words = explain_text(mood, TEXTS, num_samples=100, alpha=0.0, progress=False)
    seen = _as_values(words, 1, 0)
    assert seen.players.view["pieces"] == (("not", 0), (" ", -1), ("good", 1))
    seen.check_additivity(1e-6)
    assert "intercept 0.00  →  local model \u22121.00" in text_html(seen)
    assert words.plot(tmp_path / "words.png", row=1).stat().st_size > 1000
    assert words.plot(tmp_path / "bars.png", "bar", row=1).stat().st_size > 1000
    parts = explain_image(lambda a: a[:, 0].mean((1, 2)), torch.rand(2, 3, 8, 8), segments=4)
    assert parts.plot(tmp_path / "parts.png", row=1).stat().st_size > 1000
    with pytest.raises(ArgumentError, match=r"players are image, not pieces of a text"):
        parts.plot(tmp_path / "no.png", "text")
    with pytest.raises(ArgumentError, match=r"plot: row must be between 0 and 1, got row=2"):
        parts.plot(tmp_path / "no.png", row=2)


def test_a_word_that_occurs_twice_is_highlighted_twice() -> None:
    words = Words("a good, good film")
    assert words.labelled()[2:5] == (("good", 1), (", ", -1), ("good", 1))


def test_a_pipeline_of_texts_is_explained_with_all_its_labels() -> None:
    class Pipeline:
        task, tokenizer = "text-classification", None

        class model:
            class config:
                id2label = {0: "bad", 1: "good"}  # noqa: RUF012

        def __call__(self, texts: list[str], top_k: None, batch_size: int) -> list[Any]:
            score = [0.9 if "good" in text else 0.2 for text in texts]
            return [
                [{"label": "good", "score": s}, {"label": "bad", "score": 1 - s}] for s in score
            ]

    found = explain_text(Pipeline(), "a good film", num_samples=50, alpha=0.0, progress=False)
    assert found.coefficients.shape == (1, 3, 2)
    np.testing.assert_allclose(found.coefficients[0, :, 1], [0, 0.7, 0], atol=1e-9)


def test_a_model_that_works_in_place_changes_no_image() -> None:
    image = np.full((8, 8, 1), 0.5)

    def doubled(images: np.ndarray) -> np.ndarray:
        images *= 2
        return images[:, 0, 0, 0]

    found = explain_image(doubled, image, segments=4, color=0.0, num_samples=50)
    assert found.prediction.item() == 1
    assert bool((image == 0.5).all())


class Impatient:
    """A function of texts or images after so many of which the user loses patience."""

    def __init__(self, patience: float, value: Any) -> None:
        self.patience, self.value = patience, value

    def __call__(self, inputs: Any) -> Any:
        self.patience -= len(inputs)
        if self.patience < 0:
            raise KeyboardInterrupt
        return self.value(inputs)


TALES = ["a good film and a long one", "not a bad one", "good, good"]


def lengths(texts: list[str]) -> list[float]:
    return [len(text) + 3.0 * text.count("good") for text in texts]


def test_an_interrupt_keeps_the_texts_that_were_begun() -> None:
    options: dict[str, Any] = {"num_samples": 100, "batch": 8, "progress": False}
    whole = explain_text(lengths, TALES, **options)
    first = explain_text(lengths, TALES[:1], **options).evaluations - 2
    found = explain_text(Impatient(6 + first, lengths), TALES, **options)
    assert found.interrupted
    assert found.note == "ended early; 1 of 3 rows were begun"
    done = explain_text(Impatient(6 + first + 8, lengths), TALES, **options)
    assert done.note == "ended early; 2 of 3 rows were begun"
    assert torch.equal(done.coefficients[0], whole.coefficients[0])
    assert done.coefficients[2].isnan().all()
    assert done.fidelity[:2].isfinite().all()
    assert not done.chosen[2].any()
    assert done.to_dict()["interrupted"]
    assert done.top(2)[0]["feature"] == whole.top(2)[0]["feature"]


def test_an_interrupt_of_a_later_run_keeps_the_runs_before() -> None:
    options: dict[str, Any] = {"num_samples": 50, "batch": 8, "progress": False}
    once = explain_text(lengths, TALES[:1], **options)
    found = explain_text(Impatient(once.evaluations + 20, lengths), TALES[:1], repeats=5, **options)
    assert found.note == "ended early, after 1 of 5 runs"
    assert torch.equal(found.coefficients, once.coefficients)
    assert found.stability is None


def test_an_interrupt_before_anything_is_known_is_passed_on() -> None:
    for patience in (0, 4):
        with pytest.raises(KeyboardInterrupt):
            explain_text(Impatient(patience, lengths), TALES, batch=8, progress=False)


def test_an_interrupt_keeps_what_was_seen_of_an_image() -> None:
    image = np.zeros((8, 8, 1))
    image[:4, :4] = 1
    value = Impatient(2 + 40, lambda a: a[:, 0, 0, 0])
    found = explain_image(
        value, [image, image], segments=16, color=0.0, memory=512 * 10, progress=False
    )
    assert found.interrupted
    assert found.coefficients[1].isnan().all()
    assert found.fidelity[0] > 0.9
