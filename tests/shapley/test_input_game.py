"""The game of a model's inputs: what rows are formed, and what models they go to."""

import numpy as np
import pytest
import torch
from torch import nn

from microtome.errors import ArgumentError, NonFiniteError, ShapeError
from microtome.shapley import InputGame, exact, explain, permutation
from microtome.shapley.coalitions import of_members


def test_a_call_as_long_as_the_list_of_coalitions_mixes_up_no_background_rows():
    x, background = torch.ones(1, 3), torch.tensor([[0.0] * 3, [0.5] * 3])
    inside = torch.tensor([[1, 0, 0], [0, 1, 0], [1, 1, 0], [0, 1, 1]]).bool()
    game = InputGame(lambda rows: rows @ torch.tensor([1.0, 2.0, 4.0]), x, background, memory=48)
    assert game.per_call == len(inside)
    # 7 / 4 from the background's mean, 3 / 4 of a player's weight more when it is in.
    found = game.values(*of_members(inside), torch.arange(1))
    assert found.flatten().tolist() == [2.5, 3.25, 4.0, 6.25]


def test_a_sequential_with_a_forward_of_its_own_is_not_walked_inside_the_kernel():
    class Net(nn.Sequential):
        def forward(self, rows):
            return torch.sigmoid(super().forward(rows))

    torch.manual_seed(0)
    model = Net(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
    found = permutation(model, torch.ones(1, 4), torch.zeros(2, 4))
    assert found.engine == "calls"
    found.check_additivity()
    with pytest.raises(ArgumentError, match="f computes its forward in its own way"):
        permutation(model, torch.ones(1, 4), torch.zeros(2, 4), precision="bf16")


def test_a_layer_that_does_something_else_is_not_walked_inside_the_kernel():
    torch.manual_seed(0)
    first, act, last = nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1)
    model = nn.Sequential(first, act, last)
    x, background = torch.ones(1, 4), torch.zeros(2, 4)
    assert permutation(model, x, background).engine == "mlp"
    with torch.autocast("cpu", torch.bfloat16):
        found = permutation(model, x, background)
        assert found.engine == "calls"
        found.check_additivity()
    hook = nn.modules.module.register_module_forward_hook(
        lambda module, _, out: 2 * out if module is act else None
    )
    assert permutation(model, x, background).engine == "calls"
    hook.remove()
    act.forward = torch.sin
    found = permutation(model, x, background)
    assert found.engine == "calls"
    assert torch.allclose(found.values.sum(1), (model(x) - model(background[:1])).double())


@pytest.mark.parametrize(
    "dtype", ["int8", "int16", "uint16", "uint32", ">f4", "datetime64[D]", "U3"]
)
def test_a_function_of_arrays_gets_them_in_their_own_dtype(dtype):
    x, background = (np.arange(3 * k).reshape(k, 3).astype("int64").astype(dtype) for k in (1, 2))
    seen = set()

    def f(rows):
        seen.add(rows.dtype)
        return np.array([float(len(np.unique(row))) for row in rows])

    exact(f, x, background).check_additivity()
    assert seen == {np.dtype(dtype).newbyteorder("=")}


def test_arrays_that_run_backwards_are_explained():
    x, background = np.arange(6.0).reshape(2, 3), np.zeros((1, 3))
    found = exact(lambda rows: rows[:, 0] * rows[:, 1], x[::-1, ::-1], background[:, ::-1])
    assert found.values[0].round(decimals=9).tolist() == [10, 10, 0]


def test_what_no_rows_can_be_made_of_is_told():
    sparse = pytest.importorskip("scipy.sparse", reason="scipy is not installed")
    rows = sparse.csr_matrix(np.eye(3))
    with pytest.raises(ArgumentError, match=r"got a sparse matrix. Pass x.toarray\(\)"):
        exact(lambda a: a[:, 0], rows, np.eye(3))
    with pytest.raises(ArgumentError, match=r"got a sparse matrix. Pass background.toarray\(\)"):
        exact(lambda a: a[:, 0], np.eye(3), rows)
    with pytest.raises(ShapeError, match=r"x must be \[e, m\], or \[m\] for one row, got a single"):
        exact(lambda a: a[:, 0], 1.0, np.eye(3))


def table(pandas):
    """Numbers, whole numbers, categories and truth values."""
    return pandas.DataFrame(
        {
            "age": [30.5, 41.0, 25.0, 60.25],
            "visits": [1, 4, 0, 2],
            "town": pandas.Categorical(["u", "v", "u", "w"], ["w", "v", "u"]),
            "member": [True, False, True, True],
        }
    )


def test_a_model_of_a_frame_gets_the_types_of_its_columns():
    pandas = pytest.importorskip("pandas")
    frame = table(pandas)

    def f(rows):
        assert list(rows.dtypes) == list(frame.dtypes)
        return rows.age * rows.member + rows.town.cat.codes * rows.visits

    found = exact(f, frame.iloc[:2], frame)
    found.check_additivity()
    assert found.full_values.tolist() == [32.5, 4.0]
    row = exact(f, frame.iloc[0], frame)  # a Series
    assert torch.equal(row.values, found.values[:1])
    array = exact(f, frame.iloc[:2], frame.to_numpy())
    assert torch.equal(array.values, found.values)
    assert exact(f, frame.iloc[:0], frame).values.shape == (0, 4)


def test_a_category_that_the_rows_to_explain_do_not_know_is_kept():
    pandas = pytest.importorskip("pandas")
    x = pandas.DataFrame({"town": pandas.Categorical(["u"]), "n": [1]})
    background = pandas.DataFrame({"town": pandas.Categorical(["v", "v"]), "n": [0.5, 0.5]})
    found = exact(lambda rows: (rows.town == "v") * 1.0 + rows.n, x, background)
    assert found.values.tolist() == [[-1.0, 0.5]]


def test_missing_values_of_a_mixed_frame_are_told_with_their_column():
    pandas = pytest.importorskip("pandas")
    frame = table(pandas)
    frame.loc[1, "age"] = np.nan
    with pytest.raises(NonFiniteError, match="missing values in column age: impute them"):
        exact(lambda rows: rows.age + rows.member, frame.iloc[:2], frame)


def test_a_torch_module_takes_the_numbers_of_a_frame():
    pandas = pytest.importorskip("pandas")
    frame = table(pandas)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1))
    numbers = frame.drop(columns="town")
    found = permutation(model, numbers.iloc[:2], numbers)
    assert found.names == ("age", "visits", "member")
    rows = torch.tensor(numbers.to_numpy(np.float32))
    assert torch.equal(found.values, permutation(model, rows[:2], rows).values)
    with pytest.raises(ArgumentError, match=r"hold other things: 'town' \(category\)\. Encode"):
        permutation(model, frame.iloc[:2], frame)


def test_whole_numbers_are_real_to_a_layer_and_whole_to_an_embedding():
    torch.manual_seed(0)
    x, background = np.array([[3, 1, 2]]), np.zeros((2, 3), int)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3, 1))
    assert explain(model, x, background).exact
    ids = nn.Sequential(nn.Embedding(5, 2), nn.Flatten(), nn.Linear(6, 1))
    explain(ids, x, background).check_additivity()


@pytest.mark.parametrize("noise", ["of a call", "of the rows in it"])
def test_answers_that_depend_on_the_call_are_noticed(noise):
    stream = torch.Generator().manual_seed(0)

    def f(rows):
        if noise == "of a call":
            return rows.sum(1) + torch.rand(1, generator=stream)
        return rows.sum(1) - rows.mean()

    with pytest.raises(ArgumentError, match="or let it answer each row by itself"):
        permutation(f, torch.ones(1, 3), torch.zeros(1, 3))


def test_batch_normalisation_in_training_mode_is_noticed():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    with pytest.raises(ArgumentError, match=r"evaluation mode \(model.eval"):
        permutation(model, torch.randn(2, 3), torch.randn(4, 3))
    permutation(model.eval(), torch.randn(2, 3), torch.randn(4, 3)).check_additivity()


@pytest.mark.parametrize("kind", [np.asarray, torch.as_tensor])
def test_a_function_that_works_in_place_changes_neither_the_rows_nor_the_values(kind):
    x, background = np.array([[1.0, 2.0, 4.0], [3.0, 5.0, 7.0]]), np.zeros((2, 3))

    def doubled(rows):
        rows *= 2
        return rows[:, 0] + rows[:, 2]

    given, behind = kind(x.copy()), kind(background.copy())
    for estimate in (exact, permutation):
        found = estimate(doubled, given, behind)
        assert found.values.round(decimals=9).tolist() == [[2.0, 0.0, 8.0], [6.0, 0.0, 14.0]]
    assert np.array_equal(np.asarray(given), x)
    assert np.array_equal(np.asarray(behind), background)
