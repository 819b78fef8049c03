"""Interaction indices: by hand, against shapiq, and sampled against enumerated."""

import json

import numpy as np
import pytest
import torch

from microtome.errors import ArgumentError
from microtome.shapley import SetGame, exact, interactions, kernel

INDICES = ("SII", "k-SII", "STII", "FSII")


@pytest.mark.parametrize("index", INDICES)
def test_a_product_is_the_interaction_of_its_factors(index):
    game = SetGame(lambda z: 6.0 * (z[:, 0] & z[:, 1]) + 2.0 * z[:, 2] + 1.0, 3)
    found = interactions(game, index=index)
    assert found[0, 1].item() == pytest.approx(6)
    assert found[0, 2].item() == pytest.approx(0, abs=1e-12)
    # SII gives single players their Shapley values, which hold half of the product each.
    assert found[0,].item() == pytest.approx(3 if index == "SII" else 0, abs=1e-12)
    assert found[2,].item() == pytest.approx(2)
    assert found.base_values.item() == 1


def test_three_players_who_need_each_other_by_hand():
    # v = 1 with all three, else 0. D_ij v(S) is 1 with the third player, else 0: mean 1/2 for SII.
    # STII of order 2: 2 / 3 of (0 / C(2, 0) + 1 / C(2, 1)) = 1 / 3.
    game = SetGame(lambda z: z.all(1).double(), 3)
    assert interactions(game, index="SII")[0, 2].item() == pytest.approx(1 / 2)
    assert interactions(game, index="STII")[0, 2].item() == pytest.approx(1 / 3)
    # k-SII: 1 / 3 less half of two pairs of 1 / 2 each.
    assert interactions(game, index="k-SII")[0,].item() == pytest.approx(1 / 3 - 1 / 2)
    assert interactions(game, index="k-SII", order=3)[0, 1, 2].item() == pytest.approx(1)


@pytest.mark.parametrize("index", INDICES)
@pytest.mark.parametrize(("p", "order"), [(4, 4), (5, 3), (6, 1), (7, 2)])
def test_values_are_those_of_shapiq(index, p, order, table_game):
    shapiq = pytest.importorskip("shapiq", reason="shapiq is not installed")
    stream = torch.Generator().manual_seed(p)
    values = torch.randn(1 << p, generator=stream, dtype=torch.float64)
    bit = 2 ** np.arange(p)
    peer = shapiq.ExactComputer(
        n_players=p, game=lambda inside: values.numpy()[(np.asarray(inside) * bit).sum(1)]
    )(index=index, order=order)
    for options in ({}, {"n_coalitions": 1 << p}):
        found = interactions(table_game(values), index=index, order=order, **options)
        assert found.exact
        assert max(abs(found[T].item() - peer[T]) for T in found.sets) < 1e-7


@pytest.mark.parametrize("index", INDICES)
def test_sampled_interactions_lie_about_the_enumerated_ones(index, smooth):
    truth = interactions(*smooth, index=index)
    found = interactions(*smooth, index=index, n_coalitions=700)
    known = found.stderr > 1e-12
    apart = ((found.values - truth.values)[known] / found.stderr[known]).square().mean().sqrt()
    assert 0.6 < apart < 1.5
    assert (found.values - truth.values).abs().max() < 0.1
    assert not found.exact
    assert torch.equal(found.values, interactions(
        *smooth, index=index, n_coalitions=700, memory=1 << 16
    ).values)  # fmt: skip
    if index != "SII":
        assert torch.allclose(found.values.sum(1), found.full_values - found.base_values)


def test_few_coalitions_fit_a_polynomial_of_lower_degree(smooth):
    truth = interactions(*smooth, index="SII", order=2)
    found = interactions(*smooth, index="SII", order=2, n_coalitions=80)
    assert found.note == "a polynomial of degree 1 and 80 coalitions"
    assert (found.values - truth.values).abs().max() < 1.5


def test_interactions_of_one_are_shapley_values(smooth):
    truth = exact(*smooth).values
    for index in INDICES:
        assert torch.allclose(interactions(*smooth, index=index, order=1).values, truth)
    assert torch.allclose(interactions(*smooth, index="SII").values[:, :12], truth)
    one = interactions(*smooth, index="FSII", order=1, n_coalitions=300, seed=4).values
    same = kernel(*smooth, n_coalitions=300, shared=True, seed=4).values
    assert torch.allclose(one, same, atol=0.05)


def test_results_can_be_looked_up_laid_out_and_written(smooth):
    f, x, background = smooth
    groups = {"a": [0, 1, 2, 3], "b": [4, 5, 6], "c": [7, 8, 9, 10, 11]}
    found = interactions(lambda a: f(a)[:, 0], x, background, groups=groups)
    matrix = found.matrix()
    assert matrix.shape == (3, 3, 3)
    assert torch.equal(matrix, matrix.mT)
    assert torch.equal(matrix[:, 0, 2], found["a", "c"])
    assert torch.equal(matrix[:, 1, 1], found["b",])
    assert found.top(1)[0]["value"] == pytest.approx(
        found.values[0][found.values[0].abs().argmax()].item()
    )
    assert json.loads(json.dumps(found.to_dict()))["sets"][3] == [0, 1]
    assert interactions(f, x, background, groups=groups).matrix().shape == (3, 3, 3, 2)
    with pytest.raises(ArgumentError, match=r"no interaction of \('a', 'z'\); there are th"):
        found["a", "z"]


@pytest.mark.parametrize("index", ["SII", "STII", "FSII"])
def test_interactions_are_sampled_until_the_error_asked_for(index, smooth):
    f, x, background = smooth
    options = {"index": index, "target_error": 0.05, "max_evaluations": 15_000}
    found = interactions(f, x, background, **options)
    truth = interactions(f, x, background, index=index)
    size, error, apart = (
        a.square().mean(1).sqrt() for a in (truth.values, found.stderr, found.values - truth.values)
    )
    assert (error / size < 0.06).all()
    assert (apart / size < 0.12).all()
    assert found.evaluations < 3 * 13_000
    alone = interactions(f, x[1:], background, **options, memory=1 << 12)
    assert torch.equal(alone.values, found.values[1:])
    assert torch.equal(alone.stderr, found.stderr[1:])


def test_interactions_of_one_player_are_its_value():
    for options in ({"n_coalitions": 10}, {"seconds": 5.0}, {"target_error": 0.1}):
        found = interactions(SetGame(lambda z: 3.0 * z.sum(1), 1), **options)
        assert found.values.item() == 3
        assert found.exact


@pytest.mark.parametrize("index", ["k-SII", "STII", "FSII"])
def test_interactions_are_checked_for_their_sum(index, smooth):
    found = interactions(*smooth, index=index)
    assert found.check_additivity().abs().max() < 1e-9
    found.values[1, 0] += 1
    with pytest.raises(ArgumentError, match="check_additivity: the values of row 1 miss full - ba"):
        found.check_additivity()


def test_an_index_that_has_no_sum_says_so(smooth):
    with pytest.raises(ArgumentError, match="index='SII' do not sum to full - base"):
        interactions(*smooth, index="SII").check_additivity()


def test_fewer_players_than_the_order_have_smaller_sets():
    for p in (1, 2):
        found = interactions(SetGame(lambda z: z.sum(1), p), order=3)
        assert max(map(len, found.sets)) == p


def test_budgets_and_options_that_do_not_fit_are_told(smooth):
    with pytest.raises(ArgumentError, match="index must be one of 'k-SII', 'SII', 'STII', 'FSII'"):
        interactions(*smooth, index="BII")
    with pytest.raises(ArgumentError, match="order must be between 1 and 5, got order=6"):
        interactions(*smooth, order=6)
    with pytest.raises(ArgumentError, match="FSII of order 2 takes at least 80 coalitions for p"):
        interactions(*smooth, index="FSII", n_coalitions=60)
    with pytest.raises(ArgumentError, match=r"take a matrix of .* GB. Lower the order, group"):
        interactions(SetGame(lambda z: z.sum(1), 200), order=2)


def test_more_sets_than_can_be_held_are_told_before_they_are_made():
    with pytest.raises(ArgumentError, match="p=3000 players have 4,501,500 sets of up to 2, more"):
        interactions(lambda rows: rows.sum(1), torch.ones(1, 3000), torch.zeros(1, 3000))


def test_pairs_are_drawn_as_a_heat_map(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    found = interactions(lambda a: a[:, 0] * a[:, 1], np.ones((1, 3)), np.zeros((1, 3)))
    assert found.plot(tmp_path / "heat.png").stat().st_size > 1000
    with pytest.raises(ArgumentError, match=r"kind must be one of"):
        found.plot(tmp_path / "heat.png", "bar")
    single = exact(lambda a: a[:, 0] * a[:, 1], np.ones((1, 3)), np.zeros((1, 3)))
    with pytest.raises(ArgumentError, match=r"values of single players, not interactions\. U"):
        single.plot(tmp_path / "heat.png", "heat")
