"""LIME for rows of a table: what its coefficients are, and what it says of bad input."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from microtome.errors import ArgumentError, NonFiniteError, PackageError, ShapeError
from microtome.lime import explain_tabular, explain_text, exponential
from microtome.lime.bins import Bins, bins_of, codes, edges_of, padded
from microtome.lime.levels import of_bins, of_categories
from microtome.lime.plot import draw_bars


def table(n: int = 300, m: int = 4) -> Tensor:
    random = torch.Generator().manual_seed(0)
    return torch.randn(n, m, generator=random, dtype=torch.float64) * torch.tensor([1, 2, 3, 4.0])


WEIGHTS = torch.tensor([3.0, -1.0, 0.5, 0.0], dtype=torch.float64)


def linear(rows: Tensor) -> Tensor:
    return rows @ WEIGHTS + 7


@pytest.mark.parametrize("around", [False, True])
@pytest.mark.parametrize("sampling", ["gaussian", "lhs"])
def test_lime_of_a_linear_model_returns_its_weights(around: bool, sampling: str) -> None:
    rows = table()
    found = explain_tabular(
        linear, rows[:3], rows, discretize=False, around=around, sampling=sampling, alpha=0.0,
        num_samples=200,
    )  # fmt: skip
    per_unit = found.coefficients / rows.std(0, correction=0)
    torch.testing.assert_close(per_unit, WEIGHTS.expand(3, -1))
    torch.testing.assert_close(found.local_prediction, linear(rows[:3]))
    torch.testing.assert_close(found.prediction, linear(rows[:3]))
    torch.testing.assert_close(found.fidelity, torch.ones(3, dtype=torch.float64))


def test_bins_are_explained_by_what_they_change_on_average() -> None:
    rows = table(1000)
    top = torch.quantile(rows[:, 0], 0.75)
    found = explain_tabular(
        lambda a: (a[:, 0] > top).double(), rows[:12], rows, num_features=2, num_samples=1000
    )
    above = rows[:12, 0] > top
    high = found.coefficients[above, 0]
    # The function is 1 in the top quarter and 0 elsewhere.
    assert bool((high > 0.9).all())
    assert bool((found.coefficients[~above, 0] < 0).all())
    assert found.names[int(above.nonzero()[0])][0] == f"x0 > {float(top):.4g}"


def test_all_explicands_share_one_set_of_samples() -> None:
    rows = table()
    called = []

    def f(a: Tensor) -> Tensor:
        called.append(len(a))
        return linear(a)

    found = explain_tabular(f, rows[:20], rows, num_samples=100)
    assert called == [20, 20, 99]
    assert found.evaluations == 139


@pytest.mark.parametrize(
    "options",
    [{}, {"discretize": False}, {"discretize": False, "around": True}, {"categorical": ["x1"]}],
    ids=["bins", "continuous", "around", "mixed"],
)
def test_many_explicands_equal_one_by_one(options: dict[str, Any]) -> None:
    rows = table().round()
    f = lambda a: torch.stack([a[:, 0] * a[:, 1], a[:, 2].abs()], 1)  # noqa: E731
    every = explain_tabular(f, rows[:5], rows, num_samples=300, num_features=2, **options)
    for i in range(5):
        one = explain_tabular(f, rows[i], rows, num_samples=300, num_features=2, **options)
        torch.testing.assert_close(every.coefficients[i], one.coefficients[0])
        torch.testing.assert_close(every.fidelity[i], one.fidelity[0])
        assert every.names[i] == one.names[0]
    again = explain_tabular(f, rows[:5], rows, num_samples=300, num_features=2, **options)
    assert torch.equal(every.coefficients, again.coefficients)


def test_one_call_or_many_give_the_same_bits() -> None:
    rows = table()
    whole, parts = (
        explain_tabular(linear, rows[:2], rows, num_samples=100, memory=memory)
        for memory in (1 << 20, 1000)
    )
    torch.testing.assert_close(whole.coefficients, parts.coefficients)


def test_categories_are_compared_and_named() -> None:
    pandas = pytest.importorskip("pandas", reason="pandas is not installed")
    random = np.random.RandomState(0)
    frame = pandas.DataFrame(
        {
            "age": random.rand(400) * 50,
            "city": random.choice(["oslo", "rome", "bonn"], 400),
            "rooms": random.randint(1, 4, 400),
        }
    )

    def price(rows: Any) -> Any:
        assert list(rows.columns) == ["age", "city", "rooms"]
        return (10.0 * (rows.city == "rome") + rows.rooms).tolist()

    found = explain_tabular(
        price, frame[:9], frame, categorical=["city", "rooms"], alpha=0.0, kernel=np.ones_like
    )
    assert found.names[0][1] == f"city = {frame.city[0]}"
    for i in range(9):
        city = found.coefficients[i, 1].item()
        assert city > 9 if frame.city[i] == "rome" else -7 < city < -3
        assert abs(found.coefficients[i, 0]) < 0.5


def test_columns_without_spread_get_no_coefficient_and_keep_their_value() -> None:
    rows = torch.cat([table(), torch.full((300, 1), 0.3, dtype=torch.float64)], 1)
    seen = []

    def f(a: Tensor) -> Tensor:
        seen.append(a[:, 4])
        return a[:, 0] * a[:, 4]

    for discretize in (True, False):
        for selection in ("forward", "highest_weights", "none"):
            found = explain_tabular(
                f, rows[:2], rows, discretize=discretize, selection=selection, num_samples=60
            )
            assert not found.coefficients[:, 4].any()
    torch.testing.assert_close(torch.cat(seen), torch.full_like(torch.cat(seen), 0.3))


def test_fewer_samples_than_features_and_more_features_than_there_are_work() -> None:
    rows = table()
    for discretize in (True, False):
        found = explain_tabular(
            linear, rows[:2], rows, num_samples=3, num_features=99, discretize=discretize
        )
        assert bool(found.coefficients.isfinite().all())
        assert bool(found.chosen.all())


def test_global_random_states_stay_as_they_are() -> None:
    torch.manual_seed(5)
    own = np.random.mtrand._rand  # numpy's global state
    before = torch.get_rng_state(), own.get_state()[1].copy()
    explain_tabular(linear, table()[:1], table(), num_samples=50, sampling="lhs", repeats=2)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (own.get_state()[1] == before[1]).all()


def test_stability_compares_runs_with_other_seeds() -> None:
    rows = table()
    runs = [
        explain_tabular(linear, rows[:3], rows, num_samples=80, num_features=2, seed=seed)
        for seed in (4, 5, 6)
    ]
    found = explain_tabular(
        linear, rows[:3], rows, num_samples=80, num_features=2, seed=4, repeats=3
    )
    assert torch.equal(found.coefficients, runs[0].coefficients)
    assert found.stability is not None
    for i in range(3):
        sets = [set(run.chosen[i].nonzero().flatten().tolist()) for run in runs]
        pairs = [(0, 1), (0, 2), (1, 2)]
        overlap = np.mean([len(sets[a] & sets[b]) / len(sets[a] | sets[b]) for a, b in pairs])
        assert found.stability.jaccard[i].item() == pytest.approx(overlap)
    spread = torch.stack([run.coefficients for run in runs]).std(0)
    torch.testing.assert_close(found.stability.spread, spread)


def test_kernels_and_distances_of_the_users_own_are_used() -> None:
    rows = table()
    for discretize in (True, False):
        options: dict[str, Any] = {"discretize": discretize, "num_samples": 200}
        plain = explain_tabular(linear, rows[:1], rows, kernel=exponential(2.0), **options)
        same = explain_tabular(
            linear, rows[:1], rows, kernel=lambda d: np.exp(-(d**2) / 8),
            distance=lambda z, origin: np.linalg.norm(z - origin, axis=1), **options,
        )  # fmt: skip
        torch.testing.assert_close(plain.coefficients, same.coefficients)
        width = explain_tabular(linear, rows[:1], rows, kernel_width=2.0, **options)
        torch.testing.assert_close(plain.coefficients, width.coefficients)
        for distance in ("cosine", "cityblock"):
            other = explain_tabular(linear, rows[:1], rows, distance=distance, **options)
            assert bool(other.coefficients.isfinite().all())


def test_models_get_the_kind_of_rows_they_take() -> None:
    rows = table().float()
    net = nn.Linear(4, 2)
    for x in (rows, rows.numpy(), rows.double().numpy()):
        found = explain_tabular(net, x[:1], x, num_samples=50, outputs=[1])
        assert found.coefficients.shape == (1, 4, 1)
    explain_tabular(lambda a: a.sum(1), rows[0].tolist(), rows.tolist(), num_samples=50)


def test_results_print_as_json_and_draw(tmp_path: Any) -> None:
    rows = table()
    found = explain_tabular(linear, rows[:2], rows, num_samples=50, num_features=2, repeats=2)
    held = json.loads(json.dumps(found.to_dict()))
    assert held["coefficients"] == found.coefficients.tolist()
    assert held["stability"]["seeds"] == 2
    assert found.top(1)[0]["feature"].startswith(("x0", "x1", "x2", "x3"))
    assert len(found.top(9)) == 2
    assert "2 rows x 4 features, table" in repr(found)
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    assert found.plot(tmp_path / "bars.png", row=1).stat().st_size > 1000


def test_names_of_any_letters_and_length_leave_room_for_the_bars(tmp_path: Any) -> None:
    figure = pytest.importorskip("matplotlib.figure", reason="matplotlib is not installed").Figure
    axes = figure(layout="constrained").subplots()
    draw_bars(axes, ["$x_1$ > 2", "w" * 150], [1.0, -1.0], "f = 1")
    said = [label.get_text() for label in axes.get_yticklabels()]
    assert said[0] == "$x_1$ > 2"
    assert len(said[1]) <= 34
    found = explain_text(lambda texts: [len(t) for t in texts], "\u826f\u3044 film")
    found.plot(tmp_path / "bars.png")  # letters that no font has give no warning


def test_bins_hold_what_lies_between_their_edges() -> None:
    column = np.array([[1.0, 2.0, 2.0, 3.0, 10.0]])
    bins = bins_of(column, np.array([[2.0, 5.0]]))
    assert codes(bins.edges, column).tolist() == [[0, 0, 0, 1, 2]]
    assert bins.count.tolist() == [[3, 1, 1]]
    np.testing.assert_allclose(bins.mean, [[5 / 3, 3, 10]])
    np.testing.assert_allclose(bins.spread, [[np.std([1, 2, 2]), 0, 0]], atol=1e-10)
    assert bins.least.tolist() == [[1, 2, 5]]
    assert bins.most.tolist() == [[2, 5, 10]]
    names = [bins.name(0, level, "age") for level in range(3)]
    assert names == ["age <= 2", "2 < age <= 5", "age > 5"]


def test_values_drawn_in_bins_stay_in_them() -> None:
    random = np.random.RandomState(0)
    rows = np.stack([random.randn(5000), random.exponential(size=5000)])
    wide = np.linspace(-2, 2, 40)  # more edges than are compared one by one
    for edges in (np.percentile(rows, [25, 50, 75], axis=1).T, padded([wide, wide[20:]])):
        bins: Bins = bins_of(rows, edges)
        levels = of_bins(bins)
        uniform = random.rand(2, 20000)
        level = levels.pick(uniform, 20000)
        share = np.bincount(level[0], minlength=bins.count.shape[1]) / 20000
        np.testing.assert_allclose(share, bins.count[0] / 5000, atol=0.015)
        for values in (
            levels.values(level, random.rand(2, 20000)),
            levels.picked().values(level, uniform),
        ):
            assert (codes(edges, values) == level).mean() > 0.9999
            assert abs(values[0].mean() - rows[0].mean()) < 0.05


def test_categories_are_drawn_as_often_as_they_occur() -> None:
    levels = of_categories([np.array([5.0, 5.0, 7.0, 5.0]), np.array([1.0, 2.0, 3.0, 4.0])])
    level = levels.pick(np.array([[0.0, 0.74, 0.75, 0.999], [0.0, 0.26, 0.5, 0.999]]), 4)
    assert levels.values(level, None).tolist() == [[5, 5, 7, 7], [1, 2, 3, 4]]
    assert levels.level_of(np.array([7.0, 9.0])).tolist() == [1, -1]


def test_entropy_bins_split_where_the_labels_change() -> None:
    pytest.importorskip("sklearn.tree", reason="scikit-learn is not installed")
    column = np.linspace(0, 1, 101)[:, None]
    (edges,) = edges_of("op", column, [0], "entropy", column[:, 0] > 0.305)
    np.testing.assert_allclose(edges, [0.305], atol=0.005)
    rows = table()
    found = explain_tabular(
        linear, rows[:1], rows, discretize="entropy", labels=rows[:, 0] > 0, num_samples=50
    )
    assert "x0" in found.names[0][0]
    for how in ("decile", {f"x{j}": [0.0] for j in range(4)}):
        explain_tabular(linear, rows[:1], rows, discretize=how, num_samples=50)


def spoiled(f: Any) -> Any:
    return lambda: explain_tabular(f, table()[:2], table(), num_samples=20)


@pytest.mark.parametrize(
    ("f", "error", "message"),
    [
        (
            lambda a: a[:, 0] * torch.nan,
            NonFiniteError,
            r"f returned NaN or infinity for 2 of 2.* Samples differ",
        ),
        (lambda a: a[:1, 0], ShapeError, r"was called with 2 rows and returned shape \[1\]"),
        (lambda a: a[:, :, None], ShapeError, r"must return \[rows\] or \[rows, outputs\]"),
        (lambda a: "no", ShapeError, "must return numbers"),
        (lambda a: torch.rand(len(a)), ArgumentError, "gives different answers to the same rows"),
        (3, ArgumentError, "f must be a function of rows"),
    ],
    ids=["nan", "rows", "axes", "text", "random", "number"],
)
def test_models_that_cannot_be_explained_are_told_apart(
    f: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        spoiled(f)()


def missing(rows: Tensor) -> Tensor:
    rows = rows.clone()
    rows[3, 2] = torch.nan
    return rows


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"background": missing(table())}, ArgumentError, "background has missing .* column x2"),
        ({"x": missing(table())}, ArgumentError, "x has missing or infinite values in column x2"),
        ({"background": table()[:, :3]}, ShapeError, r"background must be \[n, 4\] like x"),
        ({"background": table()[:0]}, ArgumentError, "background has no rows"),
        ({"x": table()[:0]}, ArgumentError, "x has no rows to explain"),
        ({"x": table()[None]}, ShapeError, r"x must be \[rows, columns\]"),
        ({"discretize": "thirds"}, ArgumentError, "discretize must be True, False, 'quartile'"),
        ({"discretize": {0: [1.0]}}, ArgumentError, "discretize has no edges for column 1"),
        ({"discretize": "entropy"}, ArgumentError, "needs the labels of the 300 background rows"),
        ({"categorical": ["x9"]}, ArgumentError, "categorical names column 'x9'; the columns are"),
        ({"categorical": "all"}, ArgumentError, "categorical must be 'auto' or a list"),
        ({"sampling": "sobol"}, ArgumentError, "sampling must be one of 'gaussian', 'lhs'"),
        ({"kernel": 3}, ArgumentError, "kernel must be a function of distances"),
        ({"kernel": np.zeros_like}, ArgumentError, "gives every sample the weight 0"),
        ({"kernel": lambda d: -d}, ArgumentError, "weights that are negative or NaN"),
        ({"kernel": lambda d: d[:1]}, ShapeError, "kernel must return one weight for each"),
        ({"kernel_width": 0}, ArgumentError, "width must be positive"),
        ({"distance": "far"}, ArgumentError, "distance must be 'euclidean', 'cosine'"),
        ({"distance": lambda z, o: z}, ShapeError, "distance must return one number for each"),
        ({"outputs": [3]}, ArgumentError, r"outputs must be numbers in \[0, 1\)"),
    ],
)
def test_options_say_what_they_allow(
    change: dict[str, Any], error: type[Exception], message: str
) -> None:
    options = {"f": linear, "x": table()[:2], "background": table(), "num_samples": 20} | change
    with pytest.raises(error, match=message):
        explain_tabular(**options)


def test_metrics_without_scikit_learn_say_what_to_install(monkeypatch: Any) -> None:
    monkeypatch.setitem(__import__("sys").modules, "sklearn.metrics", None)
    with pytest.raises(PackageError, match="pip install scikit-learn"):
        explain_tabular(linear, table()[:1], table(), num_samples=20, distance="cityblock")


@pytest.mark.parametrize("around", [False, True])
def test_a_model_that_works_in_place_is_explained_like_one_that_does_not(around: bool) -> None:
    rows = table(50).numpy()
    rows[:, 3] = rows[:, 3] > 0

    def doubled(a: np.ndarray) -> np.ndarray:
        a *= 2
        return a[:, 0] + a[:, 3]

    given = rows[:3].copy()
    options: Any = {"around": around, "discretize": False, "categorical": [3], "num_samples": 50}
    found = explain_tabular(doubled, given, rows, **options)
    same = explain_tabular(lambda a: 2 * a[:, 0] + 2 * a[:, 3], given, rows, **options)
    assert torch.equal(found.coefficients, same.coefficients)
    assert np.array_equal(given, rows[:3])


@pytest.mark.parametrize("around", [False, True])
def test_an_interrupt_keeps_the_samples_that_were_answered(around: bool) -> None:
    rows, seen = table(50), 0

    def impatient(a: Tensor) -> Tensor:
        nonlocal seen
        seen += len(a)
        if seen > 6 + 250:
            raise KeyboardInterrupt
        return linear(a)

    options: Any = {"discretize": False, "around": around, "alpha": 0.0, "num_samples": 300}
    found = explain_tabular(impatient, rows[:3], rows, memory=8 * 4 * 50, **options)
    assert found.interrupted
    assert found.note == f"ended early; {1 if around else 3} of 3 rows were begun"
    whole = explain_tabular(linear, rows[:3], rows, **options)
    assert torch.allclose(found.coefficients[0], whole.coefficients[0])
    assert found.coefficients[2].isnan().all() == around
    with pytest.raises(KeyboardInterrupt):
        explain_tabular(impatient, rows[:3], rows, **options)
