"""Owen values over a hierarchy: by hand, by all orders, against shap, exact and sampled."""

import itertools

import numpy as np
import pytest
import torch

from microtome.errors import ArgumentError
from microtome.shapley import SetGame, exact, partition


def by_all_orders(values, hierarchy):
    """The mean effect over every order that keeps the groups of a nested list together."""

    def orders(part):
        if isinstance(part, int):
            return [[part]]
        return [
            list(itertools.chain(*pieces))
            for children in itertools.permutations(part)
            for pieces in itertools.product(*map(orders, children))
        ]

    found = torch.zeros(len(values).bit_length() - 1, dtype=torch.float64)
    every = orders(hierarchy)
    for order in every:
        before = 0
        for j in order:
            found[j] += (values[before | 1 << j] - values[before]) / len(every)
            before |= 1 << j
    return found


def test_a_union_bargains_as_one_by_hand():
    # Majority of three; players 0 and 1 form a union: it wins alone, so the third gets nothing.
    game = SetGame(lambda z: (z.sum(1) >= 2).double(), 3)
    assert torch.allclose(partition(game, hierarchy=[[0, 1], 2]).values,
                          torch.tensor([[0.5, 0.5, 0.0]]).double())  # fmt: skip


@pytest.mark.parametrize(
    "hierarchy",
    [[[0, 1], [2, 3], [4]], [[0, [1, 2]], [3, 4]], [[[3, 1], 4, 0], 2], [4, 3, 2, 1, 0]],
)
def test_exact_values_are_the_mean_over_all_orders_that_keep_groups_together(hierarchy, table_game):
    values = torch.randn(32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = partition(table_game(values), hierarchy=hierarchy)
    assert found.exact
    assert torch.allclose(found.values[0], by_all_orders(values, hierarchy))
    sampled = partition(table_game(values), hierarchy=hierarchy, n_permutations=400)
    assert not sampled.exact
    apart = (sampled.values - found.values).abs()
    assert bool((apart <= 4 * sampled.stderr + 1e-12).all())
    sampled.check_additivity()


def test_singletons_make_shapley_values(smooth):
    f, x, background = smooth
    truth = exact(f, x, background).values
    for hierarchy in ([[j] for j in range(12)], {f"g{j}": [f"x{j}"] for j in range(12)}):
        assert torch.allclose(partition(f, x, background, hierarchy).values, truth)


@pytest.mark.filterwarnings("ignore")
def test_a_linkage_gives_the_values_of_shaps_partition_explainer(smooth):
    shap = pytest.importorskip("shap", reason="shap is not installed")
    f, x, background = smooth
    x, background = x[:, :7], background[:, :7]

    def g(rows):
        rows = torch.as_tensor(rows)
        return f(torch.cat([rows, rows.new_zeros(len(rows), 5)], 1))[:, 0]

    linkage = shap.utils.hclust(background.numpy(), metric="correlation")
    masker = shap.maskers.Partition(background.numpy(), clustering=linkage)
    peer = shap.PartitionExplainer(lambda rows: g(rows).numpy(), masker)(x.numpy(), max_evals=5000)
    found = partition(g, x, background, linkage)
    assert torch.allclose(found.values, torch.tensor(peer.values), atol=1e-6)


def test_a_group_is_worth_what_it_is_as_one_player(smooth):
    f, x, background = smooth
    groups = {"a": [0, 1, 2], "b": [3, 4, 5, 6], "c": [7, 8, 9, 10, 11]}
    found = partition(f, x, background, groups)
    whole = exact(f, x, background, groups=groups)
    for at, held in enumerate(groups.values()):
        assert torch.allclose(found.values[:, held].sum(1), whole.values[:, at])
    nested = partition(
        f, x, background, {"left": {"a": [0, 1, 2], "b": [3, 4, 5, 6]}, "c": groups["c"]}
    )
    nested.check_additivity()
    assert not torch.allclose(nested.values, found.values)


def test_columns_are_grouped_by_their_correlation(smooth):
    pytest.importorskip("scipy", reason="scipy is not installed")
    f, x, background = smooth
    found = partition(f, x, background, max_evaluations=1 << 22)
    assert found.method == "owen"
    found.check_additivity()
    sampled = partition(f, x, background, n_permutations=64)
    apart = ((sampled.values - found.values) / sampled.stderr).square().mean().sqrt()
    assert 0.6 < apart < 1.5


def test_memory_changes_no_bit(smooth):
    f, x, background = smooth
    groups = [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    for options in ({}, {"n_permutations": 6}):
        found = partition(f, x, background, groups, **options)
        small = partition(f, x, background, groups, memory=2000, **options)
        assert torch.equal(found.values, small.values)


def test_a_hierarchy_holds_every_player_once(smooth):
    game = SetGame(lambda z: z.sum(1), 4)
    for wrong, text in [
        ([[0, 1], [1, 2, 3]], r"the hierarchy holds \[1\] twice. Every one of the p=4 players"),
        ([[0, 1], 2], r"the hierarchy lacks the players \[3\]"),
        ([[0, 1], [2, 9]], r"names the player 9; there are 0 ... 3 \(player 0, player 1,"),
        ([[0, 1], [2, 3], []], "the hierarchy has an empty group"),
        (np.zeros((2, 4)), r"a linkage of p=4 players must be \[3, 4\] as scipy gives it, got"),
        (
            "correlation",
            "or 'correlation' for a table of numbers without groups, got 'correlation'",
        ),
    ]:
        with pytest.raises(ArgumentError, match=text):
            partition(game, hierarchy=wrong)
    with pytest.raises(
        ArgumentError, match="link='logit' applies to the mean over background rows"
    ):
        partition(*smooth, list(range(12)), n_permutations=2, link="logit")


def test_one_player_is_a_hierarchy_by_itself():
    found = partition(lambda rows: rows[:, 0], torch.full((1, 1), 3.0), torch.zeros(2, 1))
    assert found.values.tolist() == [[3.0]]


def test_a_hierarchy_may_be_deeper_than_python_calls():
    p = 1200  # each player joins all before it
    chain = np.array([[0 if j == 1 else p + j - 2, j, 1.0, j + 1] for j in range(1, p)])
    x, background = torch.ones(1, p), torch.zeros(1, p)
    found = partition(lambda rows: rows.sum(1), x, background, chain, n_permutations=2)
    assert torch.equal(found.values, torch.ones(1, p).double())
