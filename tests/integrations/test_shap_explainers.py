"""Explainers under shap's names, against shap."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from microtome.errors import ArgumentError
from microtome.integrations import shap as ours

theirs = pytest.importorskip("shap", reason="shap is not installed")
pytestmark = pytest.mark.usefixtures("one_thread")
DRAW = np.random.default_rng(0)
WEIGHTS, OUT = DRAW.normal(size=(12, 8)), DRAW.normal(size=8)
X, BACKGROUND = DRAW.normal(size=(4, 12)), DRAW.normal(size=(9, 12))
FEW = slice(0, 5)  # columns of a small game


def f(x: Any) -> np.ndarray:
    x = np.asarray(x)
    return np.tanh(x @ WEIGHTS[: x.shape[1]]) @ OUT


def probabilities(x: Any) -> np.ndarray:
    return 1 / (1 + np.exp(-np.stack([f(x), f(x) / 2 - 1], 1)))


@pytest.fixture(scope="module")
def exact() -> np.ndarray:
    return ours.ExactExplainer(f, BACKGROUND)(X).values


def rms(a: Any) -> float:
    return float(np.sqrt(np.square(a).mean()))


def test_exact_values_are_shaps() -> None:
    peer = theirs.ExactExplainer(f, BACKGROUND[:, FEW])(X[:, FEW], silent=True)
    our = ours.ExactExplainer(f, BACKGROUND[:, FEW])(X[:, FEW])
    assert type(our) is type(peer)
    np.testing.assert_allclose(our.values, peer.values, atol=1e-9)
    np.testing.assert_allclose(our.base_values, peer.base_values, atol=1e-9)
    np.testing.assert_array_equal(our.data, peer.data)
    assert list(our.feature_names) == list(peer.feature_names)


@pytest.mark.parametrize("linearize", [True, False])
def test_links_and_several_outputs_are_shaps(linearize: bool) -> None:
    options = {"link": theirs.links.logit, "linearize_link": linearize}
    peer, our = (
        package.ExactExplainer(probabilities, BACKGROUND[:, FEW], **options)(X[:, FEW])
        for package in (theirs, ours)
    )
    assert our.shape == peer.shape == (4, 5, 2)
    np.testing.assert_allclose(our.values, peer.values, atol=1e-9)
    np.testing.assert_allclose(our.base_values, peer.base_values, atol=1e-9)
    assert our.output_names == peer.output_names


def test_one_output_in_a_column_has_the_shapes_of_shap() -> None:
    peer, our = (
        package.ExactExplainer(lambda x: f(x)[:, None], BACKGROUND[:, FEW])(X[:, FEW])
        for package in (theirs, ours)
    )
    assert our.values.shape == peer.values.shape == (4, 5)
    assert our.base_values.shape == peer.base_values.shape == (4, 1)


def test_features_that_equal_the_background_take_no_evaluations() -> None:
    x, background = X.copy(), BACKGROUND.copy()
    background[:, 3:] = 0.5
    x[:2, 3:] = 0.5  # three features vary in these rows, all in the others
    seen = 0

    def counted(rows: np.ndarray) -> np.ndarray:
        nonlocal seen
        seen += len(rows)
        return f(rows)

    found = ours.ExactExplainer(counted, background)(x[:2])
    assert seen <= (2 * 8 + 2) * 9
    assert bool((found.values[:, 3:] == 0).all())
    whole = ours.ExactExplainer(f, background)(x)
    np.testing.assert_allclose(whole.values[:2], found.values, atol=1e-12)


def test_permutations_are_nearer_than_shaps_at_the_same_evaluations(exact: np.ndarray) -> None:
    ours_of, theirs_of = (
        [
            package.PermutationExplainer(f, BACKGROUND, seed=seed)(
                X, max_evals=500, silent=True, error_bounds=True
            )
            for seed in range(4)
        ]
        for package in (ours, theirs)
    )
    our, peer = ours_of[0], theirs_of[0]
    error, of_peer = (
        rms(np.stack([found.values - exact for found in each])) for each in (ours_of, theirs_of)
    )
    assert error < 0.85 * of_peer  # 0.036 and 0.045, of values of 0.8
    assert 0.6 < error / rms(our.error_std) < 1.6
    np.testing.assert_allclose(our.base_values, peer.base_values, atol=1e-9)
    np.testing.assert_allclose(our.values.sum(1) + our.base_values, f(X), atol=1e-9)
    bounds = our.lower_bounds, our.upper_bounds
    assert float(((bounds[0] < exact) & (exact < bounds[1])).mean()) > 0.9


def test_the_old_meaning_of_error_std_is_there_by_name() -> None:
    our = ours.PermutationExplainer(f, BACKGROUND)(
        X, max_evals=2000, error_bounds=True, error_kind="marginal"
    )
    peer = theirs.PermutationExplainer(f, BACKGROUND, seed=0)(
        X, max_evals=2000, error_bounds=True, silent=True
    )
    assert our.lower_bounds is None
    np.testing.assert_allclose(our.error_std, peer.error_std, rtol=0.3)
    np.testing.assert_allclose(our.values.sum(1) + our.base_values, f(X), atol=1e-9)


def test_permutations_of_few_features_are_exact() -> None:
    our = ours.PermutationExplainer(f, BACKGROUND[:, FEW])(X[:, FEW])
    peer = ours.ExactExplainer(f, BACKGROUND[:, FEW])(X[:, FEW])
    np.testing.assert_array_equal(our.values, peer.values)


@pytest.mark.parametrize("linearize", [True, False])
def test_sampled_values_behind_a_link_tend_to_the_exact_ones(linearize: bool) -> None:
    options: dict[str, Any] = {"link": "logit", "linearize_link": linearize}
    exact = ours.ExactExplainer(probabilities, BACKGROUND, **options)(X)
    our = ours.PermutationExplainer(probabilities, BACKGROUND, **options)(
        X, max_evals=1500, error_bounds=True
    )
    assert 0.6 < rms(our.values - exact.values) / rms(our.error_std) < 1.6


def test_kernel_values_are_nearer_than_shaps_at_the_same_evaluations(exact: np.ndarray) -> None:
    explainer = ours.KernelExplainer(f, BACKGROUND)
    our = explainer(X, nsamples=300, error_bounds=True)
    state = np.random.get_state()  # noqa: NPY002 - shap draws from it
    np.random.seed(0)  # noqa: NPY002
    peer = theirs.KernelExplainer(f, BACKGROUND).shap_values(
        X, nsamples=300, l1_reg=False, silent=True
    )
    np.random.set_state(state)  # noqa: NPY002
    assert rms(our.values - exact) < rms(peer - exact)
    assert explainer.expected_value == pytest.approx(f(BACKGROUND).mean())
    np.testing.assert_allclose(our.values.sum(1) + our.base_values, f(X), atol=1e-9)


def test_kernel_values_of_all_coalitions_are_shaps_with_weighted_backgrounds() -> None:
    few = theirs.kmeans(BACKGROUND[:, FEW], 3)
    peer = theirs.KernelExplainer(f, few).shap_values(X[:, FEW], l1_reg=False, silent=True)
    np.testing.assert_allclose(ours.KernelExplainer(f, few).shap_values(X[:, FEW]), peer, atol=1e-7)


def test_the_kernel_explainer_has_shaps_groups_and_logit_link() -> None:
    groups = [np.array([0, 1]), np.array([2]), np.array([3, 4])]
    data = theirs.utils._legacy.DenseData(BACKGROUND[:, FEW].copy(), ["a", "b", "c"], groups)
    peer, our = (
        package.KernelExplainer(probabilities, data, link="logit").shap_values(
            X[:, FEW], l1_reg=False, silent=True
        )
        for package in (theirs, ours)
    )
    assert our.shape == (4, 3, 2)
    np.testing.assert_allclose(our, peer, atol=1e-7)


@pytest.mark.parametrize("l1_reg", ["num_features(3)", "aic", "bic", 0.002])
def test_selection_is_shaps_where_all_coalitions_are_seen(l1_reg: Any) -> None:
    peer, our = (
        package.KernelExplainer(f, BACKGROUND[:, FEW]).shap_values(
            X[:, FEW], nsamples=30, l1_reg=l1_reg, silent=True
        )
        for package in (theirs, ours)
    )
    np.testing.assert_array_equal(our != 0, peer != 0)
    np.testing.assert_allclose(our, peer, atol=1e-7)


def test_nothing_is_selected_unless_it_is_asked_for() -> None:
    found = ours.KernelExplainer(f, BACKGROUND).shap_values(X, nsamples=200)
    assert bool((found != 0).all())
    some = ours.KernelExplainer(f, BACKGROUND).shap_values(
        X, nsamples=200, l1_reg="num_features(4)"
    )
    assert bool(((some != 0).sum(1) == 4).all())


def test_sampling_takes_part_of_a_large_background_and_sums_to_all_of_it() -> None:
    background = np.random.default_rng(1).normal(size=(300, 12))
    explainer = ours.SamplingExplainer(f, background)
    assert explainer.shap_values(X[0], nsamples=400).shape == (12,)
    our = explainer(X, nsamples=600, error_bounds=True)
    np.testing.assert_allclose(our.values.sum(1) + f(background).mean(), f(X), atol=1e-9)
    assert explainer.expected_value == pytest.approx(f(background).mean())
    many = ours.PermutationExplainer(f, theirs.maskers.Independent(background, max_samples=300))
    near = many(X, max_evals=500).values
    assert rms(our.values - near) < 2 * rms(our.error_std)


def test_sampling_is_nearer_than_shaps(exact: np.ndarray) -> None:
    our = ours.SamplingExplainer(f, BACKGROUND)(X, nsamples=3000)
    state = np.random.get_state()  # noqa: NPY002
    np.random.seed(0)  # noqa: NPY002
    peer = theirs.SamplingExplainer(f, BACKGROUND).shap_values(X, nsamples=3000, silent=True)
    np.random.set_state(state)  # noqa: NPY002
    assert rms(our.values - exact) < 0.7 * rms(peer - exact)


@pytest.mark.parametrize("name", ["PermutationExplainer", "KernelExplainer", "SamplingExplainer"])
def test_a_seed_is_the_explainers_own(name: str) -> None:
    before = np.random.get_state()[1].copy(), torch.get_rng_state()  # noqa: NPY002
    kind = getattr(ours, name)
    found = [kind(f, BACKGROUND, seed=seed)(X).values for seed in (3, 3, 4)]
    np.testing.assert_array_equal(found[0], found[1])
    assert not np.array_equal(found[0], found[2])
    np.testing.assert_array_equal(before[0], np.random.get_state()[1])  # noqa: NPY002
    assert torch.equal(before[1], torch.get_rng_state())


def test_main_effects_are_those_of_a_feature_alone() -> None:
    found = ours.PermutationExplainer(f, BACKGROUND)(X, main_effects=True)
    alone = BACKGROUND.copy()
    alone[:, 2] = X[1, 2]
    expected = f(alone).mean() - f(BACKGROUND).mean()
    assert found.main_effects[1, 2] == pytest.approx(expected)


def test_old_calls_give_values_and_an_expected_value() -> None:
    explainer = ours.PermutationExplainer(f, BACKGROUND)
    found = explainer.shap_values(X, npermutations=5)
    np.testing.assert_array_equal(found, explainer(X, max_evals=5 * 25).values)
    assert explainer.expected_value == pytest.approx(f(BACKGROUND).mean())


@pytest.mark.parametrize("name", ["KernelExplainer", "SamplingExplainer"])
def test_the_expected_value_is_there_before_the_first_call(name: str) -> None:
    table = theirs.kmeans(BACKGROUND, 3) if name == "KernelExplainer" else BACKGROUND
    our, peer = (getattr(package, name)(f, table) for package in (ours, theirs))
    assert our.expected_value == pytest.approx(float(peer.expected_value))
    odds = {"link": "logit"} if name == "KernelExplainer" else {}

    def both(x: Any) -> np.ndarray:
        p = 1 / (1 + np.exp(-f(x)))
        return np.stack([p, 1 - p], 1)

    our, peer = (getattr(package, name)(both, BACKGROUND, **odds) for package in (ours, theirs))
    np.testing.assert_allclose(our.expected_value, peer.expected_value, atol=1e-12)


def test_whatever_else_shap_has_is_found_under_our_name() -> None:
    assert ours.maskers is theirs.maskers
    assert ours.links is theirs.links
    assert ours.models is theirs.models
    assert ours.plots.waterfall is theirs.plots.waterfall
    assert ours.KernelExplainer is not theirs.KernelExplainer
    with pytest.raises(AttributeError, match=r"neither microtome.integrations.shap nor shap has"):
        _ = ours.maskars


def test_the_constructor_sets_defaults_of_calls() -> None:
    explainer = ours.PermutationExplainer(f, BACKGROUND, max_evals=60, error_bounds=True)
    few = explainer(X)
    assert few.error_std is not None
    np.testing.assert_array_equal(
        few.values, ours.PermutationExplainer(f, BACKGROUND)(X, max_evals=60).values
    )


def test_outputs_are_kept_by_number_and_by_shaps_chains() -> None:
    explainer = ours.PermutationExplainer(probabilities, BACKGROUND, output_names=["yes", "no"])
    whole = explainer(X)
    some = explainer(X, outputs=[1])
    assert some.shape == (4, 12)
    np.testing.assert_array_equal(some.values, whole.values[:, :, 1])
    largest = explainer(X, outputs=theirs.Explanation.argsort.flip[:1])
    for row, p in enumerate(probabilities(X)):
        np.testing.assert_array_equal(largest.values[row], whole.values[row, :, p.argmax()])


def test_torch_modules_estimators_and_frames_are_models() -> None:
    pandas = pytest.importorskip("pandas", reason="pandas is not installed")
    linear = pytest.importorskip("sklearn.linear_model", reason="scikit-learn is not installed")
    net = nn.Linear(5, 1)
    x, background = X[:, FEW], BACKGROUND[:, FEW]
    expected = (x - background.mean(0)) * net.weight.detach().numpy()
    hooked = nn.Sequential(net, nn.Threshold(-1e9, 0.0))  # unknown to the white box
    found = ours.PermutationExplainer(hooked, background)(x)
    np.testing.assert_allclose(found.values, expected, atol=1e-5)
    model = linear.LogisticRegression().fit(background, f(background) > 0)
    for package in (ours, theirs):
        f_of = model if package is ours else model.predict_proba
        assert package.ExactExplainer(f_of, background)(x).shape == (4, 5, 2)
    names = list("abcde")
    frame = pandas.DataFrame(background, columns=names)

    def by_name(rows: Any) -> np.ndarray:
        return f(rows[names].to_numpy())

    our, peer = (
        package.ExactExplainer(by_name, frame)(pandas.DataFrame(x, columns=names))
        for package in (ours, theirs)
    )
    np.testing.assert_allclose(our.values, peer.values, atol=1e-9)
    assert list(our.feature_names) == list(peer.feature_names) == names


def test_a_large_background_is_cut_to_the_rows_that_shap_takes() -> None:
    background = np.random.default_rng(2).normal(size=(150, 4))
    np.testing.assert_allclose(
        ours.ExactExplainer(f, background)(X[:, :4]).values,
        theirs.ExactExplainer(f, background)(X[:, :4], silent=True).values,
        atol=1e-9,
    )


def test_integer_rows_do_not_round_the_background() -> None:
    x = np.array([[1, 2, 0, 1]])
    np.testing.assert_allclose(
        ours.ExactExplainer(f, BACKGROUND[:, :4])(x).values,
        theirs.ExactExplainer(f, BACKGROUND[:, :4])(x.astype(float), silent=True).values,
        atol=1e-9,
    )


def test_interactions_of_pairs_are_shaps_and_sum_to_the_difference() -> None:
    x, background = X[:, FEW].copy(), BACKGROUND[:, FEW].copy()
    peer, our = (
        package.ExactExplainer(f, background)(x, interactions=2, silent=True)
        for package in (theirs, ours)
    )
    np.testing.assert_allclose(our.values, peer.values, atol=1e-9)
    background[:, 2] = x[0, 2] = 0.5  # one feature less plays in the first row
    found = ours.ExactExplainer(probabilities, background)(x, interactions=True)
    assert found.values.shape == (4, 5, 5, 2)
    assert bool((found.values[0, 2] == 0).all())
    np.testing.assert_allclose(
        found.values.sum((1, 2)) + found.base_values, probabilities(x), atol=1e-9
    )
    with pytest.raises(ArgumentError, match=r"interactions must be 1 or 2 .*got interactions=3"):
        ours.ExactExplainer(f, background)(x, interactions=3)
