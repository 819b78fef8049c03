"""lime's calls without lime: our own result classes, and what is said of bad input."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest

from microtome.errors import ArgumentError, NonFiniteError, PackageError, ShapeError
from microtome.integrations.lime import (
    LimeImageExplainer,
    LimeTabularExplainer,
    LimeTextExplainer,
    RecurrentTabularExplainer,
)
from microtome.integrations.lime.explanation import Explanation, ImageExplanation

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def _no_lime(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("explanation", "lime_tabular", "lime_text", "lime_image"):
        monkeypatch.setitem(sys.modules, f"lime.{module}", None)


def rows() -> np.ndarray:
    return np.random.RandomState(0).randn(100, 3)


def proba(a: np.ndarray) -> np.ndarray:
    p = 1 / (1 + np.exp(-a[:, 0]))
    return np.stack([1 - p, p], 1)


@pytest.mark.usefixtures("_no_lime")
def test_tables_are_explained_without_lime(tmp_path: Any) -> None:
    explainer = LimeTabularExplainer(
        rows(), feature_names=["age", "<b>", "c"], class_names=["no", "yes"], random_state=0
    )
    found = explainer.explain_instance(rows()[0], proba, num_samples=200, top_labels=1)
    assert type(found) is Explanation
    label = found.available_labels()[0]
    assert "age" in found.as_list(label)[0][0]
    assert found.as_map()[label][0][0] == 0
    found.save_to_file(tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert f"<h2>{['no', 'yes'][label]}</h2>" in page
    assert "&lt;b&gt;" in page
    with pytest.raises(ArgumentError, match="label 7 is not explained; there are"):
        found.as_list(7)
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    assert found.as_pyplot_figure(label).axes[0].get_title() == (
        f"Local explanation for class {['no', 'yes'][label]}"
    )


@pytest.mark.usefixtures("_no_lime")
def test_regressions_and_texts_are_explained_without_lime() -> None:
    explainer = LimeTabularExplainer(rows(), mode="regression", random_state=0)
    found = explainer.explain_instance(rows()[0], lambda a: a[:, 1], num_samples=200)
    assert found.as_list(5) == found.as_list()
    assert "<h2>positive</h2>" in found.as_html()
    text = LimeTextExplainer(random_state=0).explain_instance(
        "so so good", lambda texts: [[0.2, 0.8 * ("good" in t)] for t in texts], num_samples=50
    )
    assert text.as_list()[0][0] == "good"
    assert text.as_list(positions=True)[0][0] == "good_6"
    assert text.as_list(positions=True)[1][0] == "so_0-3"


@pytest.mark.usefixtures("_no_lime")
def test_images_are_explained_without_lime() -> None:
    image = np.random.RandomState(0).rand(8, 8, 3)
    cut = np.arange(8)[:, None] // 4 * 2 + np.arange(8) // 4 + 1  # numbered from 1
    f = lambda a: np.stack([a[:, 0, 0, 0], 1 - a[:, 7, 7, 0]], 1)  # noqa: E731
    explainer = LimeImageExplainer(random_state=0)
    found = explainer.explain_instance(
        image, f, num_samples=60, segmentation_fn=lambda a: cut, hide_color=0, top_labels=2
    )
    assert type(found) is ImageExplanation
    assert found.segments.min() == 0
    assert found.local_exp[0][0][0] == 0
    assert found.local_exp[1][0][0] == 3
    shown, mask = found.get_image_and_mask(
        1, positive_only=False, negative_only=True, num_features=1
    )
    assert (mask == (found.segments == 3)).all()
    shown, mask = found.get_image_and_mask(0, hide_rest=True, num_features=1)
    np.testing.assert_array_equal(shown[:4, :4], image[:4, :4])
    assert not shown[4:].any()
    with pytest.raises(ArgumentError, match="label 9 is not explained"):
        found.get_image_and_mask(9)
    with pytest.raises(ArgumentError, match="exclude each other"):
        found.get_image_and_mask(0, negative_only=True)


def test_the_default_segmentation_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "skimage.segmentation", None)
    with pytest.raises(PackageError, match="pip install scikit-image"):
        LimeImageExplainer().explain_instance(np.zeros((4, 4, 3)), lambda a: a)


def test_a_seed_leaves_numpys_global_state_alone() -> None:
    own = np.random.mtrand._rand
    before = own.get_state()[1].copy()
    explainer = LimeTabularExplainer(rows(), random_state=0)
    explainer.explain_instance(rows()[0], proba, num_samples=50, sampling_method="lhs")
    LimeTextExplainer(random_state=0).explain_instance(
        "a b c", lambda texts: [[0.5, 0.5]] * len(texts), num_samples=20
    )
    assert (own.get_state()[1] == before).all()


def test_latin_hypercubes_spread_the_samples_evenly() -> None:
    seen = []
    explainer = LimeTabularExplainer(rows(), discretize_continuous=False, random_state=0)
    explainer.explain_instance(
        rows()[0], lambda a: seen.append(a) or proba(a), num_samples=101, sampling_method="lhs"
    )
    scaled = (seen[0] - rows().mean(0)) / rows().std(0)
    quarter = np.quantile(scaled[1:], 0.25, axis=0)
    np.testing.assert_allclose(quarter, -0.6745, atol=0.06)


def test_fits_are_printed_on_demand(capsys: Any) -> None:
    explainer = LimeTabularExplainer(rows(), verbose=True, random_state=0)
    explainer.explain_instance(rows()[0], proba, num_samples=50)
    assert capsys.readouterr().out.startswith("Intercept")


def nan_row() -> np.ndarray:
    row = rows()[0]
    row[1] = np.nan
    return row


@pytest.mark.parametrize(
    ("options", "call", "error", "message"),
    [
        ({"training_data": rows() * np.nan}, {}, ArgumentError, "training_data has missing or inf"),
        (
            {"training_data": [["a", 1.0, 2.0]]},
            {},
            ArgumentError,
            "training_data must hold numbers",
        ),
        ({"training_data": rows()[0]}, {}, ShapeError, r"training_data must be \[rows, columns\]"),
        ({"mode": "ranking"}, {}, ArgumentError, "mode must be one of 'classification'"),
        ({"discretizer": "thirds"}, {}, ArgumentError, "discretizer must be one of 'quartile'"),
        ({"discretizer": "entropy"}, {}, ArgumentError, "needs the labels of the 100 background"),
        ({"feature_selection": "best"}, {}, ArgumentError, "selection must be one of 'auto'"),
        ({"random_state": "x"}, {}, ArgumentError, "random_state must be None, an integer"),
        ({"training_data_stats": {"means": 1}}, {}, ArgumentError, "missing: .*'mins'"),
        ({}, {"data_row": nan_row()}, ArgumentError, "data_row has missing .* column 1"),
        ({}, {"data_row": rows()}, ShapeError, r"data_row must be one row, \[columns\]"),
        ({}, {"data_row": rows()[0, :2]}, ShapeError, "data_row must have m=3 columns, got 2"),
        ({}, {"num_samples": 1}, ArgumentError, "num_samples must be at least 2"),
        ({}, {"num_features": 0}, ArgumentError, "num_features must be at least 1"),
        ({}, {"labels": (2,)}, ArgumentError, r"labels must lie in \[0, 2\), .* got 2"),
        ({}, {"predict_fn": lambda a: a[:, 0]}, ShapeError, "probabilities of all classes"),
        (
            {},
            {"predict_fn": lambda a: proba(a)[:5]},
            ShapeError,
            r"50 inputs and returned shape \[5",
        ),
        ({}, {"predict_fn": lambda a: proba(a) * np.nan}, NonFiniteError, "NaN or infinity for 50"),
        ({}, {"predict_fn": lambda a: "no"}, ShapeError, "must return numbers for each input"),
    ],
)
def test_tables_say_what_they_allow(
    options: dict[str, Any], call: dict[str, Any], error: type[Exception], message: str
) -> None:
    options = {"training_data": rows(), "random_state": 0} | options
    call = {"data_row": rows()[0], "predict_fn": proba, "num_samples": 50} | call
    with pytest.raises(error, match=message):
        LimeTabularExplainer(**options).explain_instance(**call)


def test_texts_images_and_steps_say_what_they_allow() -> None:
    with pytest.raises(ArgumentError, match="has no words to switch off"):
        LimeTextExplainer().explain_instance(" ", lambda texts: texts)
    with pytest.raises(ArgumentError, match="num_samples must be at least 2"):
        LimeTextExplainer().explain_instance("a b", lambda texts: texts, num_samples=1)
    with pytest.raises(ArgumentError, match="batch_size must be at least 1"):
        LimeImageExplainer().explain_instance(np.zeros((4, 4)), lambda a: a, batch_size=0)
    with pytest.raises(ShapeError, match=r"must be \[n, time steps, features\]"):
        RecurrentTabularExplainer(rows())


def test_probabilities_that_do_not_sum_to_one_are_warned_of() -> None:
    explainer = LimeTabularExplainer(rows(), random_state=0)
    with pytest.warns(UserWarning, match="do not sum to 1"):
        explainer.explain_instance(rows()[0], lambda a: 2 * proba(a), num_samples=50)


def test_sparse_rows_say_what_they_do_not_take() -> None:
    sparse = pytest.importorskip("scipy.sparse", reason="scipy is not installed")
    with pytest.raises(ArgumentError, match="neither a discretizer nor categorical_features"):
        LimeTabularExplainer(rows()).explain_instance(sparse.csr_matrix(rows()[:1]), proba)
    explainer = LimeTabularExplainer(sparse.csr_matrix(rows()))
    with pytest.raises(ArgumentError, match="holds nothing but zeros"):
        explainer.explain_instance(sparse.csr_matrix((1, 3)), proba)
