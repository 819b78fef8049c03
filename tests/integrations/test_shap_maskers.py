"""Maskers of any kind, plots, and what is returned where shap is absent."""

from __future__ import annotations

import sys
from typing import Any, ClassVar

import numpy as np
import pytest

from microtome.errors import ArgumentError, ShapeError
from microtome.integrations import shap as ours

theirs = pytest.importorskip("shap", reason="shap is not installed")
pytestmark = pytest.mark.usefixtures("one_thread")
TEXTS = ["this is not good at all", "a good one, is it"]


def score(texts: Any) -> np.ndarray:
    return np.array([len(t) * (1.0 + ("good" in t)) + 3.0 * ("not good" in t) for t in texts])


def test_texts_are_masked_word_by_word_as_by_shap() -> None:
    masker = theirs.maskers.Text(r"\W+")
    masker.clustering = None  # without it, no hierarchy of words
    peer, our = (
        package.ExactExplainer(score, masker)(TEXTS, silent=True) for package in (theirs, ours)
    )
    for a, b in zip(our.values, peer.values, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-9)
    np.testing.assert_allclose(our.base_values, peer.base_values)
    assert our.feature_names == peer.feature_names
    assert [list(d) for d in our.data] == [list(d) for d in peer.data]


def test_texts_go_to_the_model_in_batches_of_the_size_asked_for() -> None:
    sizes: list[int] = []

    def counted(texts: Any) -> np.ndarray:
        sizes.append(len(texts))
        return score(texts)

    masker = theirs.maskers.Text(r"\W+")
    masker.clustering = None
    ours.PermutationExplainer(counted, masker)(TEXTS[:1], batch_size=7)
    assert max(sizes) == 7


def test_a_masking_function_gets_the_rows_of_a_frame_and_not_its_columns() -> None:
    pandas = pytest.importorskip("pandas", reason="pandas is not installed")
    frame = pandas.DataFrame([[1.0, 2.0, 3.0], [0.5, -1.0, 2.0]], columns=["u", "v", "w"])

    def masker(mask: np.ndarray, x: np.ndarray) -> np.ndarray:
        return np.where(mask, x, 0.0)[None]

    peer, our = (
        package.ExactExplainer(lambda x: x[:, 0] * x[:, 1] + x[:, 2], masker)(frame, silent=True)
        for package in (theirs, ours)
    )
    np.testing.assert_allclose(our.values, peer.values, atol=1e-12)
    assert our.feature_names == peer.feature_names == ["u", "v", "w"]


def test_a_function_may_mask_with_several_rows() -> None:
    background = np.arange(6.0).reshape(2, 3)

    def masker(mask: np.ndarray, x: np.ndarray) -> tuple[np.ndarray]:
        return (np.where(mask, x, background),)

    def f(x: np.ndarray) -> np.ndarray:
        return x[:, 0] * x[:, 1] + x[:, 2]

    x = np.array([[1.0, 2.0, 3.0], [0.5, -1.0, 2.0]])
    table = ours.ExactExplainer(f, background)(x)
    for explainer in (ours.ExactExplainer, ours.PermutationExplainer, ours.KernelExplainer):
        found = explainer(f, masker)(x)
        np.testing.assert_allclose(found.values, table.values, atol=1e-9)
        np.testing.assert_allclose(found.base_values, table.base_values)


def test_sampled_values_of_a_masker_have_standard_errors() -> None:
    draw = np.random.default_rng(0)
    background, weights = draw.normal(size=(3, 10)), draw.normal(size=(10, 4))
    x = draw.normal(size=(1, 10))

    def f(x: np.ndarray) -> np.ndarray:
        return np.tanh(x @ weights).sum(1)

    def masker(mask: np.ndarray, x: np.ndarray) -> tuple[np.ndarray]:
        return (np.where(mask, x, background),)

    exact = ours.ExactExplainer(f, background)(x).values
    found = ours.PermutationExplainer(f, masker)(x, error_bounds=True)
    assert np.abs(found.values - exact).max() < 4 * found.error_std.max()
    np.testing.assert_allclose(found.values.sum() + found.base_values, f(x))


def test_a_composite_masker_explains_one_input_and_keeps_another() -> None:
    words = theirs.maskers.Text(r"\W+")
    masker = theirs.maskers.Composite(words, theirs.maskers.Fixed())
    masker.clustering = words.clustering = None

    def f(texts: Any, factors: Any) -> np.ndarray:
        return score(texts) * np.asarray(factors, dtype=float)

    found = ours.ExactExplainer(f, masker)(TEXTS, [2.0, -1.0])
    alone = ours.ExactExplainer(score, words)(TEXTS)
    for values, single, factor in zip(found[0].values, alone.values, (2.0, -1.0), strict=True):
        np.testing.assert_allclose(values, factor * single, atol=1e-9)
    assert found[1].values.shape == (2, 0)


def test_images_are_masked_by_a_value() -> None:
    image = np.arange(1.0, 13.0).reshape(1, 2, 2, 3)
    masker = theirs.maskers.Image(np.zeros((2, 2, 3)))

    def f(images: Any) -> np.ndarray:
        flat = np.asarray(images).reshape(len(images), -1)
        return np.stack([flat @ np.arange(12.0), flat.sum(1)], 1)

    masker.clustering = None
    found = ours.PermutationExplainer(f, masker)(image, outputs=[0])
    assert found.values.shape == (1, 2, 2, 3)
    np.testing.assert_allclose(found.values.ravel(), image.ravel() * np.arange(12))


class Pipeline:
    """What the explainers read of a Hugging Face text classification pipeline."""

    task, preprocess = "text-classification", None

    class model:
        class config:
            id2label: ClassVar = {0: "BAD", 1: "GOOD"}

    def __call__(self, texts: list[str], top_k: Any) -> list[list[dict[str, Any]]]:
        scores = [float(t.count("good")) / 2 for t in texts]
        return [[{"label": "GOOD", "score": s}, {"label": "BAD", "score": 1 - s}] for s in scores]


def test_a_pipeline_is_a_model_whose_labels_name_the_outputs() -> None:
    masker = theirs.maskers.Text(r"\W+")
    masker.clustering = None
    found = ours.PermutationExplainer(Pipeline(), masker)(["all good here"])
    np.testing.assert_allclose(found.values[0], [[0, 0], [-0.5, 0.5], [0, 0]], atol=1e-9)
    assert list(found.output_names) == ["BAD", "GOOD"]


def test_shaps_plots_take_the_result() -> None:
    plot = pytest.importorskip("matplotlib.pyplot", reason="matplotlib is not installed")
    plot.switch_backend("agg")
    x = np.random.default_rng(0).normal(size=(6, 4))
    found = ours.PermutationExplainer(lambda x: x[:, 0] * x[:, 1] + x[:, 2], np.zeros((1, 4)))(
        x, error_bounds=True
    )
    theirs.plots.bar(found, show=False)
    theirs.plots.beeswarm(found, show=False, color_bar=False)
    theirs.plots.waterfall(found[0], show=False)
    theirs.plots.bar(found.abs.mean(0), show=False)
    plot.close("all")


def test_without_shap_a_likeness_of_its_explanation_comes_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "shap", None)
    x = np.arange(6.0).reshape(2, 3)
    found = ours.KernelExplainer(lambda x: x.prod(1), np.ones((1, 3)), feature_names=list("abc"))(
        x, error_bounds=True
    )
    assert type(found) is ours.Explanation
    assert found.shape == (2, 3)
    assert len(found[:1]) == 1
    np.testing.assert_allclose(found.values.sum(1) + found.base_values, x.prod(1))
    np.testing.assert_array_equal(found.error_std, np.zeros((2, 3)))
    assert found.feature_names == ["a", "b", "c"]


F = {"f": lambda x: x.sum(1), "background": np.zeros((2, 30))}


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (
            lambda: ours.PermutationExplainer(F["f"], F["background"])(
                np.ones((1, 30)), max_evals=60
            ),
            r"PermutationExplainer: max_evals=60 is too low, it must be at least 2 \* features \+ 1"
            r" = 61 for 30 features",
        ),
        (
            lambda: ours.ExactExplainer(F["f"], F["background"])(np.ones((1, 30))),
            r"ExactExplainer: p=30 features .* take 2\^30 evaluations, but max_evals=100000",
        ),
        (
            lambda: ours.KernelExplainer(F["f"], F["background"]).shap_values(
                np.ones((1, 30)), nsamples=30
            ),
            r"KernelExplainer: nsamples=30 is too low, it must be at least features \+ 1 = 31",
        ),
        (
            lambda: ours.KernelExplainer(F["f"], F["background"])(np.ones((1, 30)), l1_reg="most"),
            r"l1_reg must be False, 'num_features\(k\)', 'aic', 'bic', 'auto' or a positive",
        ),
        (
            lambda: ours.SamplingExplainer(F["f"], F["background"])(np.ones((1, 30)), nsamples=20),
            r"SamplingExplainer: nsamples=20 is too low, it must be at least features - 1 = 29",
        ),
        (
            lambda: ours.SamplingExplainer(F["f"], F["background"], link="logit"),
            r"SamplingExplainer: link must be 'identity', got 'logit'",
        ),
        (
            lambda: ours.PermutationExplainer(F["f"], F["background"])(np.ones((1, 30)), evals=9),
            r"PermutationExplainer: no call takes evals. Allowed are max_evals,",
        ),
        (
            lambda: ours.PermutationExplainer(F["f"], F["background"])(
                np.ones((1, 30)), error_kind="both"
            ),
            r"error_kind must be one of 'standard', 'marginal', got 'both'",
        ),
        (
            lambda: ours.PermutationExplainer(F["f"], 3),
            r"masker must be a background table, one of shap's maskers or a function .*got int",
        ),
    ],
)
def test_what_cannot_be_done_is_said(run: Any, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        run()


def test_rows_have_the_backgrounds_columns() -> None:
    with pytest.raises(
        ShapeError, match=r"X must be \[rows, 30\] as the background data.*\[1, 7\]"
    ):
        ours.PermutationExplainer(F["f"], F["background"])(np.ones((1, 7)))
