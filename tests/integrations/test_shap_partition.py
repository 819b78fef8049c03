"""Owen values under shap's names, against shap and by hand."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch

from microtome.errors import ArgumentError, ShapeError
from microtome.integrations import shap as ours
from microtome.integrations.shap.tree import Tree

theirs = pytest.importorskip("shap", reason="shap is not installed")
pytestmark = pytest.mark.usefixtures("one_thread")
DRAW = np.random.default_rng(0)
WEIGHTS = DRAW.normal(size=(8, 5))
X, BACKGROUND = DRAW.normal(size=(3, 8)), DRAW.normal(size=(6, 8))


def f(x: Any) -> np.ndarray:
    return np.tanh(np.asarray(x) @ WEIGHTS).sum(1)


def both(x: Any) -> np.ndarray:
    x = np.asarray(x).reshape(len(x), -1)
    return 1 / (1 + np.exp(-np.stack([f(x[:, :8]), f(x[:, -8:]) / 2 - 1], 1)))


@pytest.fixture(scope="module")
def masker() -> Any:
    return theirs.maskers.Partition(BACKGROUND)


def test_a_tree_of_three_gives_owen_values_worked_by_hand() -> None:
    def masker(mask: np.ndarray, x: np.ndarray) -> np.ndarray:
        return np.where(mask, x, 0.0)[None]

    masker.clustering = np.array([[0, 1, 1.0, 2], [2, 3, 2.0, 3]])  # {0, 1}, 2
    found = ours.PartitionExplainer(lambda x: x[:, 0] * x[:, 1] * x[:, 2] + x[:, 0], masker)(
        np.ones((1, 3))
    )
    # The product halves between 2 and {0, 1}, whose half halves again; x0 is its own.
    np.testing.assert_allclose(found.values, [[1.25, 0.25, 0.5]])
    np.testing.assert_allclose(found.base_values, [0.0])


@pytest.mark.parametrize("fixed_context", [None, "auto", 0, 1])
@pytest.mark.parametrize("max_evals", [12, 40, 5000])
def test_values_are_shaps_however_far_the_evaluations_reach(
    max_evals: int, fixed_context: int | str | None, masker: Any
) -> None:
    options = {"max_evals": max_evals, "fixed_context": fixed_context, "silent": True}
    peer, our = (package.PartitionExplainer(f, masker)(X, **options) for package in (theirs, ours))
    np.testing.assert_allclose(our.values, peer.values, atol=1e-9)
    np.testing.assert_allclose(our.hierarchical_values, peer.hierarchical_values, atol=1e-9)
    np.testing.assert_allclose(our.base_values, peer.base_values, atol=1e-9)
    np.testing.assert_array_equal(our.clustering, peer.clustering)


def test_links_and_outputs_are_shaps(masker: Any) -> None:
    options: dict[str, Any] = {"link": theirs.links.logit, "linearize_link": False}
    peer, our = (
        package.PartitionExplainer(both, masker, **options)(X, max_evals=5000)
        for package in (theirs, ours)
    )
    np.testing.assert_allclose(our.values, peer.values, atol=1e-9)
    linear = ours.PartitionExplainer(both, masker, link=theirs.links.logit)(X, max_evals=5000)
    total = linear.values.sum(1) + linear.base_values
    np.testing.assert_allclose(total, theirs.links.logit(both(X)), atol=1e-9)


def test_exact_values_along_a_clustering_are_shaps(masker: Any) -> None:
    peer, our = (package.ExactExplainer(f, masker)(X, silent=True) for package in (theirs, ours))
    np.testing.assert_allclose(our.values, peer.values, atol=1e-9)
    with pytest.raises(ArgumentError, match=r"the clustering of 8 features takes \d+ evaluations"):
        ours.ExactExplainer(f, masker)(X, max_evals=20)


def test_permutations_keep_to_a_clustering(masker: Any) -> None:
    exact = ours.ExactExplainer(f, masker)(X).values
    few = ours.PermutationExplainer(f, masker)(X, max_evals=60, error_bounds=True)
    off = few.values - exact
    assert 0.5 < np.sqrt(np.square(off).mean() / np.square(few.error_std).mean()) < 1.7
    np.testing.assert_allclose(few.values.sum(1) + few.base_values, f(X), atol=1e-9)
    np.testing.assert_allclose(
        ours.PermutationExplainer(f, masker)(X, max_evals=5000).values, exact, atol=1e-12
    )


def test_orders_of_a_tree_are_all_alike_and_keep_its_nodes_together() -> None:
    tree = Tree("test", np.array([[0, 1], [2, 3], [4, 5]]), 4)
    ranks = tree.ranks((4000,), torch.Generator().manual_seed(0))
    seen, counts = np.unique(ranks.numpy(), axis=0, return_counts=True)
    expected = {
        tuple(np.argsort(sum(pair, ())))
        for halves in itertools.product([(0, 1), (1, 0)], [(2, 3), (3, 2)])
        for pair in (halves, halves[::-1])
    }
    assert {tuple(r) for r in seen} == expected
    assert counts.min() > 0.8 * 4000 / 8


def test_texts_and_images_are_shaps() -> None:
    texts = ["this is not good at all", "a good one, is it"]

    def score(texts: Any) -> np.ndarray:
        return np.array([len(t) + 3.0 * ("not good" in t) for t in texts])

    peer, our = (
        package.PartitionExplainer(score, theirs.maskers.Text(r"\W+"))(texts, silent=True)
        for package in (theirs, ours)
    )
    for a, b in zip(our.values, peer.values, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-9)
    images = DRAW.normal(size=(2, 4, 4, 1))
    largest = theirs.Explanation.argsort.flip[:1]
    peer, our = (
        package.PartitionExplainer(
            both, theirs.maskers.Image(np.zeros((4, 4, 1))), output_names=["x", "y"]
        )(images, max_evals=5000, outputs=largest, silent=True)
        for package in (theirs, ours)
    )
    np.testing.assert_allclose(our.values.ravel(), peer.values.ravel(), atol=1e-9)
    assert np.asarray(our.output_names).tolist() == np.asarray(peer.output_names).tolist()


def test_a_table_is_clustered_as_shap_does_it() -> None:
    our, peer = (package.PartitionExplainer(f, BACKGROUND)(X) for package in (ours, theirs))
    np.testing.assert_allclose(our.values, peer.values, atol=1e-9)
    np.testing.assert_allclose(our.clustering, peer.clustering, atol=1e-6)


@pytest.mark.parametrize("name", ["PartitionExplainer", "KernelExplainer", "ExactExplainer"])
def test_a_single_output_has_the_axis_that_shap_gives_it(name: str) -> None:
    table = theirs.maskers.Partition(BACKGROUND) if name == "PartitionExplainer" else BACKGROUND
    peer, our = (
        getattr(package, name)(lambda x: f(x)[:, None], table)(X, silent=True)
        for package in (theirs, ours)
    )
    assert our.values.shape == peer.values.shape
    np.testing.assert_allclose(our.values, peer.values, atol=1e-9)
    np.testing.assert_allclose(our.base_values, peer.base_values, atol=1e-9)


@pytest.mark.parametrize("outputs", [[1], theirs.Explanation.argsort.flip[:1]])
def test_a_search_that_ends_early_follows_the_outputs_that_are_kept(outputs: Any) -> None:
    def two(x: Any) -> np.ndarray:
        return np.stack([100 * f(x[:, ::-1]), f(x)], 1)

    peer, our = (
        package.PartitionExplainer(two, theirs.maskers.Partition(BACKGROUND))(
            X, max_evals=24, outputs=outputs, silent=True
        )
        for package in (theirs, ours)
    )
    np.testing.assert_allclose(our.values, peer.values, atol=1e-9)


def test_a_masker_without_a_clustering_is_refused() -> None:
    with pytest.raises(ArgumentError, match=r"the masker has no clustering. Take one with a hier"):
        ours.PartitionExplainer(f, theirs.maskers.Independent(BACKGROUND))


@pytest.mark.parametrize(
    ("clustering", "message"),
    [
        ([[0, 1, 1.0]], r"clustering must be \[features - 1, 2 or more\] = \[2, ...\] for 3 feat"),
        ([[0, 4], [1, 3]], r"node 3 of the masker's clustering joins 0 and 4; a node may join ear"),
        ([[0, 1], [1, 3]], r"the masker's clustering leaves features out, or joins some twice"),
    ],
)
def test_a_clustering_that_is_no_tree_is_named(clustering: Any, message: str) -> None:
    with pytest.raises((ArgumentError, ShapeError), match=message):
        Tree("test", clustering, 3)
