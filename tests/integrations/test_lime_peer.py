"""Against lime: the same arguments and random state give the same samples and numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from microtome.integrations.lime import (
    LimeImageExplainer,
    LimeTabularExplainer,
    LimeTextExplainer,
    RecurrentTabularExplainer,
)

pytest.importorskip("lime", reason="lime is not installed")
theirs = pytest.importorskip("lime.lime_tabular", reason="lime cannot be imported")
explanation = pytest.importorskip("lime.explanation")
linear = pytest.importorskip("sklearn.linear_model")
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # lime leaves the file of its scripts open.
    pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

N = 400  # samples; few, as lime takes its time


def data(n: int = 200) -> np.ndarray:
    random = np.random.RandomState(0)
    rows = random.randn(n, 7) * [1, 10, 0.1, 1, 1, 1, 1] + [0, 5, 0, 0, 0, 0, 0]
    rows[:, 3] = random.randint(0, 3, n)
    rows[:, 4] = random.randint(0, 5, n)
    rows[:, 5] = 1.5  # constant
    rows[:, 6] = np.round(rows[:, 6])  # with repeated quartiles
    return rows


def score(rows: np.ndarray) -> np.ndarray:
    both = (
        np.sin(rows[:, 0]) + rows[:, 1] * (rows[:, 3] == 1) / 10 + np.tanh(rows[:, 2] * rows[:, 4])
    )
    return both + 0.3 * rows[:, 6] + 0.2 * rows[:, 5]


def proba(rows: np.ndarray) -> np.ndarray:
    p = 1 / (1 + np.exp(-score(rows)))
    return np.stack([0.7 * (1 - p), 0.3 * (1 - p), p], 1)


def same(mine: Any, other: Any) -> None:
    assert isinstance(mine, type(other)) or type(mine).__name__ == type(other).__name__
    assert list(mine.local_exp) == list(other.local_exp)
    for label, pairs in other.local_exp.items():
        held = dict(mine.local_exp[label])
        assert set(held) == {j for j, _ in pairs}
        wanted = dict(pairs)
        np.testing.assert_allclose(
            [held[j] for j in wanted], list(wanted.values()), rtol=1e-6, atol=1e-8
        )
        np.testing.assert_allclose(mine.intercept[label], other.intercept[label], rtol=1e-6)
    np.testing.assert_allclose(mine.score, other.score, rtol=1e-6)
    np.testing.assert_allclose(mine.local_pred, other.local_pred, rtol=1e-6)
    assert mine.local_pred.shape == other.local_pred.shape
    if hasattr(other, "top_labels"):
        assert mine.top_labels == other.top_labels


TABLES = {
    "quartile": {},
    "decile": {"discretizer": "decile"},
    "entropy": {"discretizer": "entropy", "training_labels": np.arange(200) % 3},
    "continuous": {"discretize_continuous": False},
    "around": {"discretize_continuous": False, "sample_around_instance": True},
    "categorical": {"categorical_features": [3, 4]},
    "mixed": {
        "categorical_features": [3, 4], "discretize_continuous": False,
        "categorical_names": {3: ["red", "green", "blue"]},
    },
    "kernel": {"kernel_width": 2.0, "kernel": lambda d, kernel_width: np.exp(-d / kernel_width)},
    "forward": {"feature_selection": "forward_selection"},
    "highest": {"feature_selection": "highest_weights"},
    "lasso": {"feature_selection": "lasso_path"},
    "none": {"feature_selection": "none", "discretize_continuous": False},
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Regressors in active set degenerate")
@pytest.mark.filterwarnings("ignore::scipy.linalg.LinAlgWarning")
@pytest.mark.parametrize("kind", TABLES)
def test_tables_get_limes_numbers(kind: str) -> None:
    names = list("abcdefg")
    options = {"feature_names": names, "random_state": 3} | TABLES[kind]
    mine = LimeTabularExplainer(data(), **options)
    other = theirs.LimeTabularExplainer(data(), **options)
    for call in ({"num_features": 4}, {"num_features": 7, "labels": (0, 2)}, {"top_labels": 2}):
        row = data()[11]
        found, wanted = (
            e.explain_instance(row, proba, num_samples=N, **call) for e in (mine, other)
        )
        same(found, wanted)
        for label in wanted.local_exp:
            names = [name for name, _ in wanted.as_list(label)]
            assert [name for name, _ in found.as_list(label)] == names
        np.testing.assert_array_equal(found.predict_proba, wanted.predict_proba)
    # Both have drawn the same numbers.
    assert mine.random_state.rand() == other.random_state.rand()


@pytest.mark.parametrize("discretize", [True, False])
def test_samples_are_limes_samples(discretize: bool) -> None:
    seen: list[np.ndarray] = []

    def f(rows: np.ndarray) -> np.ndarray:
        seen.append(rows.copy())
        return proba(rows)

    for made in (LimeTabularExplainer, theirs.LimeTabularExplainer):
        options = {"discretize_continuous": discretize, "categorical_features": [3]}
        made(data(), random_state=0, **options).explain_instance(data()[0], f, num_samples=N)
    np.testing.assert_allclose(seen[0], seen[1], rtol=1e-9, atol=1e-12)
    assert seen[0].flags.c_contiguous


def test_regression_fills_both_labels() -> None:
    options = {"mode": "regression", "random_state": 0}
    found, wanted = (
        made(data(), **options).explain_instance(data()[1], score, num_features=5, num_samples=N)
        for made in (LimeTabularExplainer, theirs.LimeTabularExplainer)
    )
    same(found, wanted)
    for name in ("predicted_value", "min_value", "max_value"):
        assert getattr(found, name) == pytest.approx(getattr(wanted, name))
    assert [w for _, w in found.local_exp[0]] == [-w for _, w in found.local_exp[1]]
    assert isinstance(found, explanation.Explanation)
    assert "lime.Explanation" in found.as_html()


def test_regressors_distances_and_discretizers_of_the_users_own_are_honoured() -> None:
    discretize = pytest.importorskip("lime.discretize")

    class Halves(discretize.BaseDiscretizer):
        def bins(self, rows: np.ndarray, labels: Any) -> list[np.ndarray]:
            return [np.array([np.median(rows[:, j])]) for j in self.to_discretize]

    results = []
    for made in (LimeTabularExplainer, theirs.LimeTabularExplainer):
        random = np.random.RandomState(0)
        cut = Halves(data(), [3], list("abcdefg"), random_state=random)
        explainer = made(
            data(), discretizer=cut, random_state=random, feature_names=list("abcdefg")
        )
        results.append(
            explainer.explain_instance(
                data()[2], proba, num_samples=N, distance_metric="cosine",
                model_regressor=linear.LinearRegression(),
            )
        )  # fmt: skip
    same(*results)
    assert results[0].as_list() == [
        (name, pytest.approx(value)) for name, value in results[1].as_list()
    ]
    metric = lambda a, b: np.abs(a - b).sum()  # noqa: E731
    plain, own = (
        LimeTabularExplainer(data(), random_state=0).explain_instance(
            data()[2], proba, num_samples=N, distance_metric=distance
        )
        for distance in ("cityblock", lambda z, origin: np.array([metric(r, origin) for r in z]))
    )
    same(own, plain)


def test_statistics_stand_in_for_training_data() -> None:
    cut = LimeTabularExplainer(data(), random_state=0)
    own = cut.discretizer
    stats = {
        "means": own.means, "stds": own.stds, "mins": own.mins, "maxs": own.maxs,
        "feature_values": cut.feature_values, "feature_frequencies": cut.feature_frequencies,
        "bins": {j: edges.tolist() for j, edges in own.edges.items()},
    }  # fmt: skip
    stats["feature_values"] = {j: [int(v) for v in own] for j, own in cut.feature_values.items()}
    stats["feature_frequencies"] = {j: f.tolist() for j, f in cut.feature_frequencies.items()}
    results = [
        made(np.zeros((1, 7)), training_data_stats=stats, random_state=0).explain_instance(
            data()[3], proba, num_samples=N
        )
        for made in (LimeTabularExplainer, theirs.LimeTabularExplainer)
    ]
    same(*results)


def test_sparse_rows_get_limes_samples_and_nearly_its_numbers() -> None:
    sparse = pytest.importorskip("scipy.sparse")
    random = np.random.RandomState(0)
    dense = random.rand(100, 30) * (random.rand(100, 30) < 0.3)
    seen, results = [], []

    def f(rows: Any) -> np.ndarray:
        seen.append(rows.toarray())
        p = 1 / (1 + np.exp(-seen[-1] @ np.linspace(-1, 1, 30)))
        return np.stack([1 - p, p], 1)

    for made in (LimeTabularExplainer, theirs.LimeTabularExplainer):
        explainer = made(
            sparse.csr_matrix(dense), random_state=0, feature_selection="highest_weights"
        )
        row = sparse.csr_matrix(dense[:1])
        results.append(explainer.explain_instance(row, f, num_samples=N, num_features=5))
    np.testing.assert_allclose(seen[0], seen[1])
    mine, other = (dict(found.local_exp[1]) for found in results)
    # lime solves sparse systems by iterations that stop at 1e-4.
    assert set(mine) == set(other)
    for j, weight in other.items():
        assert mine[j] == pytest.approx(weight, abs=2e-3)


def test_recurrent_rows_are_flattened_as_lime_does() -> None:
    rows = np.random.RandomState(0).randn(50, 4, 3)
    f = lambda a: np.stack([a[:, -1, 0], 1 - a[:, -1, 0]], 1)  # noqa: E731
    results = [
        made(rows, feature_names=list("abc"), random_state=0).explain_instance(
            rows[0], f, num_samples=N, num_features=3
        )
        for made in (RecurrentTabularExplainer, theirs.RecurrentTabularExplainer)
    ]
    same(*results)
    assert results[0].as_list()[0][0].startswith(results[1].as_list()[0][0])


TEXT = "It's a good film: a very good, long and well-told film, but not for everyone."


def polarity(texts: list[str]) -> np.ndarray:
    p = np.array(
        [0.2 + 0.3 * t.count("good") / 2 - 0.1 * ("not" in t) + len(t) / 400 for t in texts]
    )
    return np.stack([1 - p, p], 1)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bow": False},
        {"bow": False, "mask_string": "_", "kernel_width": 100},
        {"split_expression": lambda text: text.split()},
        {"char_level": True},
        {"feature_selection": "lasso_path"},
    ],
    ids=["words", "places", "masked", "tokens", "characters", "lasso"],
)
def test_texts_get_limes_numbers(options: dict[str, Any]) -> None:
    lime_text = pytest.importorskip("lime.lime_text")
    # Euclidean distances here are 100 and more: a narrow kernel would leave one sample.
    options = {"kernel_width": 200} | options
    for call in ({"num_features": 4}, {"top_labels": 2}, {"distance_metric": "euclidean"}):
        results = [
            made(random_state=1, **options).explain_instance(TEXT, polarity, num_samples=N, **call)
            for made in (LimeTextExplainer, lime_text.LimeTextExplainer)
        ]
        same(*results)
        found, wanted = results
        for label in wanted.local_exp:
            for positions in (False, True):
                lists = [r.as_list(label, positions=positions) for r in results]
                assert dict(lists[0]) == pytest.approx(dict(lists[1]), rel=1e-6, abs=1e-8)
    assert "show_raw_text" in found.as_html()


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("hide", [None, 0])
def test_images_get_limes_numbers(hide: Any, capsys: Any) -> None:
    lime_image = pytest.importorskip("lime.lime_image", reason="lime's image needs scikit-image")
    image = np.random.RandomState(0).rand(12, 12, 3)
    cut = np.arange(12)[:, None] // 4 * 3 + np.arange(12) // 4

    def f(pictures: np.ndarray) -> np.ndarray:
        assert len(pictures) <= 7
        p = pictures[:, :4, :4].max((1, 2, 3)) * pictures[:, 8:, 8:].max((1, 2, 3))
        return np.stack([p, 1 - p], 1)

    results = [
        made(random_state=0).explain_instance(
            image, f, hide_color=hide, num_samples=100, batch_size=7, top_labels=2,
            segmentation_fn=lambda picture: cut,
        )
        for made in (LimeImageExplainer, lime_image.LimeImageExplainer)
    ]  # fmt: skip
    same(*results)
    for options in ({}, {"positive_only": False}, {"hide_rest": True, "num_features": 2}):
        for mine, other in zip(*(r.get_image_and_mask(1, **options) for r in results), strict=True):
            np.testing.assert_array_equal(mine, other)


def test_the_default_segmentation_is_limes() -> None:
    lime_image = pytest.importorskip("lime.lime_image", reason="lime's image needs scikit-image")
    image = np.random.RandomState(0).rand(20, 20)  # grey
    f = lambda a: np.stack([a.mean((1, 2, 3)), a.max((1, 2, 3))], 1)  # noqa: E731
    results = [
        made(random_state=0).explain_instance(image, f, num_samples=20)
        for made in (LimeImageExplainer, lime_image.LimeImageExplainer)
    ]
    np.testing.assert_array_equal(results[0].segments, results[1].segments)
    same(*results)


def test_submodular_pick_takes_our_explainer() -> None:
    pick = pytest.importorskip("lime.submodular_pick")
    explainer = LimeTabularExplainer(data(), random_state=0)
    found = pick.SubmodularPick(
        explainer, data(), proba, sample_size=5, num_features=3, num_exps_desired=2, num_samples=50
    )
    assert len(found.sp_explanations) == 2
