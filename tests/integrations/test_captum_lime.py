"""KernelSHAP and LIME under captum's names, against captum."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from microtome.errors import ArgumentError, ShapeError
from microtome.integrations import captum as ours

theirs = pytest.importorskip("captum.attr", reason="captum is not installed")
linear_model = pytest.importorskip("sklearn.linear_model", reason="scikit-learn is not installed")
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:You are providing multiple inputs"),
]
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(scope="module")
def net() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 3))


@pytest.fixture
def seeded() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def rows(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def all_samples(inputs: Any, **given: Any) -> Iterator[Tensor]:
    for sample in itertools.product((0, 1), repeat=given["num_interp_features"]):
        yield torch.tensor([sample])


def captum_model(name: str) -> Any:
    return getattr(pytest.importorskip("captum._utils.models.linear_model"), name)


def test_captums_kernel_shap_tends_to_our_exact_values(net: nn.Module, seeded: None) -> None:
    x = rows(2, 5)
    our = ours.KernelShap(net).attribute(x, target=1, n_samples=32)
    exact = theirs.ShapleyValues(net).attribute(x, target=1)
    torch.testing.assert_close(our, exact, rtol=1e-5, atol=1e-5)
    peer = theirs.KernelShap(net).attribute(x, target=1, n_samples=1500, perturbations_per_eval=100)
    assert float((peer - our).abs().max()) < 0.02 * float(our.abs().max())


def test_kernel_shap_is_nearer_than_captums_at_the_same_samples(seeded: None) -> None:
    weights, x = rows(14, 6, seed=7), rows(2, 14)

    def forward(x: Tensor) -> Tensor:
        return (x @ weights).tanh().sum(1)

    exact = ours.ShapleyValues(forward).attribute(x)
    our, peer = (
        package.KernelShap(forward).attribute(x, n_samples=300, perturbations_per_eval=300)
        for package in (ours, theirs)
    )
    ours_off, theirs_off = ((a - exact).square().mean().sqrt() for a in (our, peer))
    assert ours_off < 0.7 * theirs_off
    torch.testing.assert_close(our.sum(1), forward(x) - forward(0 * x), **CLOSE)


@pytest.mark.parametrize("name", ["KernelShap", "Lime"])
def test_coefficients_may_come_by_feature_number(name: str, net: nn.Module) -> None:
    mask = torch.tensor([[2, 2, 5, 3, 3]])
    for e in (1, 3):
        method = getattr(ours, name)(net)
        given = {"target": 0, "feature_mask": mask, "n_samples": 8}
        found = method.attribute(rows(e, 5), return_input_shape=False, **given)
        wide = method.attribute(rows(e, 5), **given)
        assert found.shape == (e, 4)
        assert torch.equal(found[:, [0, 0, 3, 1, 1]], wide)
        assert bool((found[:, 2] == 0).all())


@pytest.mark.parametrize("name", ["KernelShap", "Lime"])
def test_an_output_column_of_one_has_no_axis_in_the_attributions(
    name: str, net: nn.Module, seeded: None
) -> None:
    x, options = rows(3, 5), {"n_samples": 60}
    peer, our = (
        getattr(package, name)(lambda a: net(a)[:, :1]).attribute(x, **options)
        for package in (theirs, ours)
    )
    flat = getattr(ours, name)(lambda a: net(a)[:, 0]).attribute(x, **options)
    assert our.shape == peer.shape == x.shape
    torch.testing.assert_close(our, flat)


def test_kernel_shap_says_how_many_samples_it_needs() -> None:
    with pytest.raises(ArgumentError, match=r"n_samples=25 is too few for p=30 features: a fit "):
        ours.KernelShap(lambda x: x.sum(1)).attribute(rows(1, 30))


def test_kernel_shap_and_lime_explain_one_output(net: nn.Module) -> None:
    for method in (ours.KernelShap(net), ours.Lime(net)):
        with pytest.raises(ShapeError, match=r"one number for each example.*Choose one with targ"):
            method.attribute(rows(2, 5))


@pytest.mark.parametrize(
    ("name", "options"),
    [(None, {}), ("SkLearnLinearRegression", {}), ("SkLearnRidge", {"alpha": 1.0})],
)
@pytest.mark.parametrize(
    "baselines", [None, 0.3, rows(2, 5, seed=4)], ids=["zero", "number", "rows"]
)
def test_lime_of_all_samples_is_captums(
    name: str | None, options: dict[str, Any], baselines: Any, net: nn.Module
) -> None:
    def model() -> Any:
        return captum_model(name)(**options) if name else None

    given: dict[str, Any] = {"target": 1, "n_samples": 32, "baselines": baselines}
    peer = theirs.Lime(net, model(), perturb_func=all_samples).attribute(rows(2, 5), **given)
    for perturb in (None, all_samples):
        our = ours.Lime(net, model(), perturb_func=perturb).attribute(rows(2, 5), **given)
        torch.testing.assert_close(our, peer, **CLOSE)


def test_lime_takes_scikit_learns_models_and_refuses_what_is_none(net: nn.Module) -> None:
    x = rows(2, 5)
    peer = ours.Lime(net, captum_model("SkLearnRidge")(alpha=1.0)).attribute(
        x, target=1, n_samples=32
    )
    our = ours.Lime(net, linear_model.Ridge(alpha=1.0)).attribute(x, target=1, n_samples=32)
    torch.testing.assert_close(our, peer, **CLOSE)
    with pytest.raises(ArgumentError, match=r"interpretable_model must be one of captum's.*int"):
        ours.Lime(net, 3).attribute(x, target=1)


def test_our_lasso_is_scikit_learns() -> None:
    inside = torch.rand(40, 6, generator=torch.Generator().manual_seed(0)) < 0.5
    y, weights = rows(3, 40).double(), rows(3, 40, seed=2).double().abs()
    for alpha in (0.003, 0.05):
        found = ours.Lasso(alpha).fit_samples(inside, y, weights)
        for i in range(3):
            peer = linear_model.Lasso(alpha, tol=1e-10, max_iter=100_000)
            peer.fit(inside.double().numpy(), y[i].numpy(), sample_weight=weights[i].numpy())
            torch.testing.assert_close(found[i], torch.from_numpy(peer.coef_), rtol=0, atol=1e-6)


@pytest.mark.parametrize("mode", ["cosine", "euclidean"])
def test_similarities_are_captums(mode: str, net: nn.Module) -> None:
    kernels = pytest.importorskip("captum.attr._core.lime")
    peer = kernels.get_exp_kernel_similarity_function(mode, 0.7)
    our = ours.get_exp_kernel_similarity_function(mode, 0.7)
    a, b = (rows(1, 5), rows(1, 3)), (rows(1, 5, seed=3), rows(1, 3, seed=4))
    assert our(a, b) == pytest.approx(peer(a, b, None), rel=1e-5)
    given: dict[str, Any] = {"n_samples": 24, "baselines": (0.2, 0.1)}

    def forward(x: Tensor, y: Tensor) -> Tensor:
        return net(x)[:, 0] * y.sum(1)

    inputs = (rows(2, 5), rows(2, 3))
    batched, called = (
        ours.Lime(forward, similarity_func=f).attribute(inputs, **given) for f in (our, peer)
    )
    for x, y in zip(batched, called, strict=True):
        torch.testing.assert_close(x, y, **CLOSE)


def test_lime_of_a_batch_with_one_number_is_captums(net: nn.Module) -> None:
    def total(x: Tensor) -> Tensor:
        return net(x)[:, 0].tanh().sum()

    peer = theirs.Lime(total, perturb_func=all_samples).attribute(rows(2, 5), n_samples=32)
    our = ours.Lime(total).attribute(rows(2, 5), n_samples=32)
    assert our.shape == (1, 5)
    torch.testing.assert_close(our, peer, **CLOSE)


def test_lime_samples_in_opposite_pairs_and_evaluates_none_twice(net: nn.Module) -> None:
    seen: list[Tensor] = []

    def forward(x: Tensor) -> Tensor:
        seen.append(x)
        return net(x)[:, 0]

    ours.Lime(forward).attribute(rows(1, 5).abs() + 1, n_samples=20)
    drawn = torch.cat(seen)[2:] > 0
    assert len(drawn) == len({tuple(d) for d in drawn.tolist()})
    assert {tuple(d) for d in drawn.tolist()} == {tuple(d) for d in (~drawn).tolist()}


def test_lime_of_a_linear_function_returns_its_weights() -> None:
    weights = torch.tensor([1.0, -2.0, 3.0, 0.5])
    found = ours.Lime(lambda x: x @ weights, ours.Lasso(0.0)).attribute(torch.ones(2, 4))
    torch.testing.assert_close(found, weights.expand(2, 4), **CLOSE)
