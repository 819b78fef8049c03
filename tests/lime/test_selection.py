"""Selections and fits from the Gram matrix against fits on the samples themselves."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from microtome.errors import ArgumentError, PackageError
from microtome.lime.equations import Equations, from_coalitions, from_rows, stack
from microtome.lime.local import Settings
from microtome.lime.ridge import fit, ridge
from microtome.lime.selection import forward, select
from microtome.shapley.coalitions import pack

linear = pytest.importorskip("sklearn.linear_model", reason="scikit-learn is not installed")


def samples(binary: bool, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """z [200, 9], weights [200], values [200, 2]; column 7 repeats column 1, column 8 is constant
    where z is no coalition."""
    random = np.random.RandomState(seed)
    z = random.randn(200, 9) + 3
    if binary:
        z = (random.rand(200, 9) < 0.5).astype(float)
        z[0] = 1
    else:
        z[:, 8] = 2.5
    z[:, 7] = z[:, 1]
    weights = random.rand(200)
    values = np.stack(
        [
            z @ random.randn(9) + random.randn(200),
            1e6 + z[:, 0] * z[:, 2] + 0.1 * random.randn(200),
        ],
        1,
    )
    return tuple(map(torch.from_numpy, (z, weights, values)))


def equations(z: Tensor, weights: Tensor, values: Tensor, binary: bool) -> Equations:
    if binary:
        return from_coalitions(pack(z.bool()), weights, values, z.shape[1])
    return from_rows(z, weights, values)


@pytest.mark.parametrize("binary", [True, False], ids=["coalitions", "rows"])
@pytest.mark.parametrize("alpha", [1.0, 0.01])
def test_a_fit_is_scikit_learns_weighted_ridge(binary: bool, alpha: float) -> None:
    z, w, y = samples(binary)
    index = torch.tensor([[[0, 2, 7], [1, 0, 5]]])
    found = fit(equations(z, w, y, binary), index, None, alpha)
    for c in range(2):
        kept = index[0, c].numpy()
        theirs = linear.Ridge(alpha=alpha).fit(z[:, kept], y[:, c], sample_weight=w)
        np.testing.assert_allclose(found.coefficients[0, kept, c], theirs.coef_, rtol=1e-8)
        np.testing.assert_allclose(found.intercept[0, c], theirs.intercept_, rtol=1e-10)
        score = theirs.score(z[:, kept], y[:, c], sample_weight=w)
        np.testing.assert_allclose(found.fidelity[0, c], score, rtol=1e-7)
        local = theirs.predict(z[:1, kept])
        np.testing.assert_allclose(found.local_prediction[0, c], local[0], rtol=1e-10)
        assert found.chosen[0, :, c].nonzero().flatten().tolist() == sorted(kept.tolist())


@pytest.mark.parametrize("binary", [True, False], ids=["coalitions", "rows"])
@pytest.mark.parametrize("seed", range(3))
def test_forward_selection_is_what_refitting_every_candidate_finds(binary: bool, seed: int) -> None:
    z, w, y = samples(binary, seed)
    found = forward(equations(z, w, y, binary), 6)
    for c in range(2):
        used: list[int] = []
        for _ in range(6):
            scores = {}
            for j in set(range(9)) - set(used) - {7}:  # 7 ties with 1 to the last digit
                fitted = linear.LinearRegression().fit(z[:, [*used, j]], y[:, c], sample_weight=w)
                scores[j] = fitted.score(z[:, [*used, j]], y[:, c], sample_weight=w)
            used.append(max(scores, key=lambda j: scores[j]))
        assert found[0, c].tolist() == used


def test_collinear_and_constant_features_are_taken_last_and_in_order() -> None:
    z, w, y = samples(binary=False)
    found = forward(equations(z, w, y, binary=False), 9)[0, 0].tolist()
    assert sorted(found) == list(range(9))
    assert found[-2:] == [7, 8]


def test_highest_weights_order_ridge_coefficients_times_the_explicand() -> None:
    z, w, y = samples(binary=False)
    index, valid = select("op", equations(z, w, y, False), 4, "highest_weights")
    assert valid is None
    size = np.abs(linear.Ridge(alpha=0.01).fit(z, y[:, 0], sample_weight=w).coef_ * z[0].numpy())
    assert index[0, 0].tolist() == np.argsort(-size, kind="stable")[:4].tolist()


def test_auto_goes_forward_up_to_six_features() -> None:
    system = equations(*samples(binary=True), binary=True)
    for few in (6, 7):
        by = "forward" if few == 6 else "highest_weights"
        both = [select("op", system, few, how)[0].tolist() for how in ("auto", by)]
        assert both[0] == both[1]


def test_the_lasso_path_ends_at_its_last_small_enough_model() -> None:
    z, w, y = (a.numpy() for a in samples(binary=True))
    z = z[:, :7]
    system = from_coalitions(pack(torch.from_numpy(z).bool()), *map(torch.from_numpy, (w, y)), 7)
    index, valid = select("op", system, 3, "lasso_path")
    for c in range(2):
        root = np.sqrt(w)
        centred = (z - np.average(z, axis=0, weights=w)) * root[:, None]
        values = (y[:, c] - np.average(y[:, c], weights=w)) * root
        path = linear.lars_path(centred, values, method="lasso")[2]
        wanted = next(
            list(path[:, s].nonzero()[0])
            for s in range(path.shape[1] - 1, 0, -1)
            if np.count_nonzero(path[:, s]) <= 3
        )
        kept = index[0, c] if valid is None else index[0, c][valid[0, c]]
        assert kept.tolist() == wanted


def test_lasso_path_without_scikit_learn_says_what_to_install(monkeypatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "sklearn.linear_model", None)
    with pytest.raises(PackageError, match="pip install scikit-learn"):
        select("op", equations(*samples(True), True), 3, "lasso_path")


@pytest.mark.filterwarnings("ignore:Regressors in active set degenerate")
def test_none_keeps_all_and_a_batch_equals_one_by_one() -> None:
    systems = [equations(*samples(True, seed), True) for seed in range(3)]
    for how in ("forward", "highest_weights", "lasso_path", "none"):
        together = fit(stack(systems), *select("op", stack(systems), 4, how), 1.0)
        for i, one in enumerate(systems):
            alone = fit(one, *select("op", one, 4, how), 1.0)
            torch.testing.assert_close(together.coefficients[i], alone.coefficients[0])
            assert torch.equal(together.chosen[i], alone.chosen[0])
    assert bool(together.chosen.all())


def test_without_penalty_a_singular_system_takes_the_least_norm() -> None:
    gram = torch.tensor([[2.0, 2.0, 0.0], [2.0, 2.0, 0.0], [0.0, 0.0, 0.0]]).double()
    found = ridge(gram[None], torch.tensor([[4.0], [4.0], [0.0]]).double()[None], 0.0)
    np.testing.assert_allclose(found[0, :, 0], [1, 1, 0], atol=1e-12)


def test_a_constant_function_has_no_coefficients_and_a_perfect_fit() -> None:
    z, w, _ = samples(binary=True)
    found = fit(
        equations(z, w, torch.full((200, 1), 0.1, dtype=torch.float64), True),
        torch.arange(9)[None, None],
        None,
        1.0,
    )
    assert not found.coefficients.any()
    assert found.fidelity.item() == 1
    assert found.intercept.item() == 0.1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"selection": "best"}, "selection must be one of 'auto', 'forward', .* got 'best'"),
        ({"num_features": 0}, "num_features must be at least 1, got num_features=0"),
        ({"num_samples": 1}, "num_samples must be at least 2, got num_samples=1"),
        ({"repeats": 0}, "repeats must be at least 1, got repeats=0"),
        ({"alpha": -1.0}, "alpha must be at least 0, got alpha=-1.0"),
    ],
)
def test_settings_say_what_they_allow(options: dict, message: str) -> None:
    good = {"num_features": 3, "selection": "auto", "alpha": 1.0, "num_samples": 9, "repeats": 1}
    with pytest.raises(ArgumentError, match=message):
        Settings("op", **(good | options))
