"""Linear models and trees are answered, not sampled; `explain` says what it chose."""

import importlib.util

import numpy as np
import pytest
import torch

from microtome.errors import ArgumentError
from microtome.shapley import SetGame, closed, exact, explain, permutation

sklearn = pytest.importorskip("sklearn", reason="scikit-learn is not installed")
from sklearn.ensemble import (  # noqa: E402
    GradientBoostingClassifier,
    HistGradientBoostingRegressor,
    RandomForestClassifier,
    RandomForestRegressor,
)
from sklearn.linear_model import LogisticRegression, PoissonRegressor, Ridge  # noqa: E402
from sklearn.pipeline import make_pipeline  # noqa: E402
from sklearn.preprocessing import (  # noqa: E402
    MinMaxScaler,
    PolynomialFeatures,
    QuantileTransformer,
    StandardScaler,
)

needs_shap = pytest.mark.skipif(
    importlib.util.find_spec("shap") is None, reason="shap is not installed"
)
quiet = pytest.mark.filterwarnings("ignore")  # shap's own, on import

STREAM = np.random.default_rng(0)
X = STREAM.normal(size=(120, 5))
Y = X[:, 0] * X[:, 1] + X[:, 2]
ROWS, BACKGROUND = X[:3], X[20:40]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_linear_module_is_answered_by_its_weights(dtype):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.Linear(4, 2)).to(dtype)
    x, background = (torch.tensor(a, dtype=dtype) for a in (ROWS, BACKGROUND))
    found = explain(model, x, background)
    assert found.method == "linear (closed form)"
    assert found.exact
    weight = (model[1].weight @ model[0].weight).T
    hand = weight * (x - background.mean(0))[:, :, None]
    assert torch.allclose(found.values, hand.double(), atol=1e-5)
    assert found.evaluations == 2 * 3 + 20
    found.check_additivity()


@pytest.mark.parametrize("groups", [None, [0, 1, 1, 0, 2], {"a": [0, 4], "b": [1]}])
def test_linear_models_of_scikit_learn_are_answered_by_their_weights(groups):
    classes = np.digitize(Y, [-1, 1])
    logistic = LogisticRegression().fit(X, classes)
    for f in (Ridge().fit(X, Y), Ridge().fit(X, Y).predict, logistic.decision_function):
        found = closed(f, ROWS, BACKGROUND, groups=groups)
        truth = exact(f, ROWS, BACKGROUND, groups=groups)
        assert found.method == "linear (closed form)"
        assert torch.allclose(found.values, truth.values, atol=1e-10)
        assert torch.allclose(found.base_values, truth.base_values)


def test_coefficients_alone_do_not_make_a_model_linear():
    model = PoissonRegressor().fit(X, np.abs(Y))
    assert explain(model, ROWS, BACKGROUND).method == "exact"
    with pytest.raises(ArgumentError, match="no closed form: f is not linear in its columns"):
        closed(model, ROWS, BACKGROUND)
    hooked = torch.nn.Linear(5, 1).double()
    hooked.register_forward_hook(lambda module, args, out: out.square())
    assert explain(hooked, torch.tensor(ROWS), torch.tensor(BACKGROUND)).method == "exact"


@quiet
@needs_shap
@pytest.mark.parametrize(
    "model",
    [
        RandomForestRegressor(5, random_state=0),
        HistGradientBoostingRegressor(max_iter=8),
        RandomForestClassifier(5, random_state=0),
        GradientBoostingClassifier(n_estimators=5),
    ],
)
def test_trees_are_answered_by_treeshap_as_enumeration_does(model):
    target = np.digitize(Y, [0]) if hasattr(model, "predict_proba") else Y
    model.fit(X, target)
    f = model.decision_function if hasattr(model, "decision_function") else model
    found, truth = explain(f, ROWS, BACKGROUND), exact(f, ROWS, BACKGROUND)
    assert found.method == "TreeSHAP (shap)"
    assert found.exact
    assert found.values.shape == truth.values.shape
    assert torch.allclose(found.values, truth.values, atol=1e-6)
    sampled = permutation(f, ROWS, BACKGROUND, n_permutations=32)
    apart = (sampled.values - found.values).square().mean().sqrt()
    assert apart < 2 * sampled.stderr.square().mean().sqrt()


@quiet
@needs_shap
def test_trees_are_answered_over_more_background_rows_than_shap_takes_by_itself():
    model = RandomForestRegressor(5, random_state=0).fit(X, Y)
    background = np.concatenate([X, X[:90] + 0.5])
    found, truth = explain(model, ROWS, background), exact(model, ROWS, background)
    assert found.method == "TreeSHAP (shap)"
    assert torch.allclose(found.values, truth.values, atol=1e-6)


@quiet
@needs_shap
def test_a_pipeline_that_keeps_columns_apart_is_answered_by_its_last_step():
    scaled = make_pipeline(StandardScaler(), MinMaxScaler(), Ridge()).fit(X, Y)
    found, truth = explain(scaled, ROWS, BACKGROUND), exact(scaled, ROWS, BACKGROUND)
    assert found.method == "linear (closed form)"
    assert torch.allclose(found.values, truth.values, atol=1e-10)
    bent = make_pipeline(
        QuantileTransformer(n_quantiles=20), RandomForestRegressor(5, random_state=0)
    )
    bent.fit(X, Y)
    found, truth = explain(bent.predict, ROWS, BACKGROUND), exact(bent.predict, ROWS, BACKGROUND)
    assert found.method == "TreeSHAP (shap)"
    assert torch.allclose(found.values, truth.values, atol=1e-6)
    mixed = make_pipeline(StandardScaler(), PolynomialFeatures(), Ridge()).fit(X, Y)
    with pytest.raises(ArgumentError, match="PolynomialFeatures in the pipeline may mix columns"):
        closed(mixed, ROWS, BACKGROUND)


def test_a_layer_that_is_there_twice_counts_twice():
    layer = torch.nn.Linear(5, 5).double()
    model = torch.nn.Sequential(layer, layer)
    found = closed(model, torch.tensor(ROWS), torch.tensor(BACKGROUND))
    truth = exact(model, torch.tensor(ROWS), torch.tensor(BACKGROUND))
    assert torch.allclose(found.values, truth.values)


@quiet
@needs_shap
def test_probabilities_of_boosted_trees_are_not_left_to_treeshap():
    model = GradientBoostingClassifier(n_estimators=5).fit(X, np.digitize(Y, [0]))
    assert explain(model, ROWS, BACKGROUND).method == "exact"
    with pytest.raises(ArgumentError, match="does not explain the predict_proba of GradientBoos"):
        closed(model, ROWS, BACKGROUND)
    with pytest.raises(ArgumentError, match="TreeExplainer takes no groups of columns"):
        closed(model.decision_function, ROWS, BACKGROUND, groups=[0, 0, 1, 1, 1])


def test_explain_enumerates_small_games_and_samples_large_ones(smooth):
    f, x, background = smooth
    found = explain(f, x, background)
    assert found.method == "exact"
    assert found.note == "exact: all 2^12 x 5 evaluations fit"
    found = explain(f, x, background, max_evaluations=3000)
    assert found.method == "permutation"
    assert found.note.startswith("permutation: 2^12 x 5 evaluations are many, and function is neit")
    assert explain(f, x, background, seconds=0.05).method == "permutation"
    linked = explain(lambda a: torch.sigmoid(f(a)), x, background, link="logit")
    assert linked.method == "exact"


def test_explain_takes_the_way_it_is_told(smooth):
    for method in ("exact", "permutation", "kernel"):
        assert explain(*smooth, method=method).method == method
    assert "sobol" in explain(*smooth, method="permutation", design="sobol").note
    with pytest.raises(ArgumentError, match="design belong to one estimator"):
        explain(*smooth, design="sobol")
    with pytest.raises(ArgumentError, match="no closed form: function is neither a linear model"):
        explain(*smooth, method="closed")
    with pytest.raises(ArgumentError, match="no closed form: the game is not one of a model's"):
        closed(SetGame(lambda z: z.sum(1), 3))
    with pytest.raises(ArgumentError, match="method must be one of 'auto', 'closed', 'exact'"):
        explain(*smooth, method="shap")
