"""What makes a value a Shapley value, for every estimator; and games worked by hand."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from microtome.shapley import SetGame, exact, kernel, permutation

EXACT = {
    "exact": exact,
    "kernel, all coalitions": lambda game: kernel(game, n_coalitions=1 << 12),
}
SAMPLED = {
    "permutation": lambda game: permutation(game, n_permutations=4, seed=3),
    "plain": lambda game: permutation(game, n_permutations=3, design="plain"),
    "orthogonal": lambda game: permutation(game, n_permutations=16, design="orthogonal"),
    "sobol": lambda game: permutation(game, n_permutations=16, design="sobol"),
    "kernel": lambda game: kernel(game, n_coalitions=min(2 * 5, (1 << len(game.players)) - 2)),
    "kernel, unpaired": lambda game: kernel(game, n_coalitions=9, paired=False),
}
WALKS = [name for name in SAMPLED if not name.startswith("kernel")]

few = settings(deadline=None, max_examples=12)
numbers = st.floats(-4, 4, width=32)


def tables(p: int) -> st.SearchStrategy[torch.Tensor]:
    values = st.lists(numbers, min_size=1 << p, max_size=1 << p)
    return values.map(lambda v: torch.tensor(v, dtype=torch.float64))


def of(table: torch.Tensor) -> SetGame:
    p = len(table).bit_length() - 1
    bit = 2 ** torch.arange(p)
    return SetGame(lambda inside: table[(inside * bit).sum(1)], p)


def without(table: torch.Tensor, player: int) -> torch.Tensor:
    """The game in which a player changes nothing."""
    count = torch.arange(len(table))
    return table[count & ~(1 << player)]


def swapped(table: torch.Tensor) -> torch.Tensor:
    """The game with players 0 and 1 in each other's place."""
    count = torch.arange(len(table))
    apart = (count ^ (count >> 1)) & 1
    return table[count ^ (apart | apart << 1)]


@pytest.mark.parametrize("name", [*EXACT, *SAMPLED])
@given(table=tables(4))
@few
def test_values_sum_to_the_difference_of_the_full_and_the_empty_coalition(name, table):
    found = (EXACT | SAMPLED)[name](of(table))
    assert torch.allclose(found.values.sum(1), table[-1:] - table[:1], atol=1e-9)
    assert found.base_values.item() == table[0]
    assert found.full_values.item() == table[-1]


@pytest.mark.parametrize("name", [*EXACT, *WALKS])
@given(table=tables(4), player=st.integers(0, 3))
@few
def test_a_player_who_changes_nothing_is_worth_nothing(name, table, player):
    found = (EXACT | SAMPLED)[name](of(without(table, player)))
    assert abs(found.values[0, player].item()) < 1e-9


@pytest.mark.parametrize("name", [*EXACT, *SAMPLED])
@given(a=tables(4), b=tables(4), scale=numbers)
@few
def test_values_are_linear_in_the_game(name, a, b, scale):
    estimate = (EXACT | SAMPLED)[name]
    both = estimate(of(a + scale * b)).values
    apart = estimate(of(a)).values + scale * estimate(of(b)).values
    assert torch.allclose(both, apart, atol=1e-8)


@pytest.mark.parametrize("name", EXACT)
@given(table=tables(4))
@few
def test_players_who_are_alike_are_worth_the_same(name, table):
    found = EXACT[name](of(table + swapped(table)))
    assert torch.isclose(found.values[0, 0], found.values[0, 1], atol=1e-9)


@pytest.mark.parametrize("name", EXACT)
@given(table=tables(4))
@few
def test_renaming_players_renames_their_values(name, table):
    found, other = (EXACT[name](of(t)).values[0] for t in (table, swapped(table)))
    assert torch.allclose(found, other[[1, 0, 2, 3]], atol=1e-9)


@pytest.mark.parametrize("name", EXACT)
def test_gloves_make_pairs(name):
    # Two players hold a left glove, one a right glove; a pair is worth 1. The one who holds the
    # right glove is needed unless first (1/3) or before both, so 2/3, and the others share 1/3.
    game = SetGame(lambda z: ((z[:, 0] | z[:, 1]) & z[:, 2]).double(), 3)
    assert torch.allclose(EXACT[name](game).values, torch.tensor([[1 / 6, 1 / 6, 4 / 6]]).double())


@pytest.mark.parametrize("name", EXACT)
def test_airlines_share_each_stretch_of_a_runway(name):
    # A runway is as long as its largest plane needs: 1, 2, 3 and 6. Of the first stretch, of 1, all
    # four pay 1/4; of the next, of 1, three pay 1/3; then 1 by two, and 3 by the last.
    need = torch.tensor([1.0, 2.0, 3.0, 6.0])
    game = SetGame(lambda z: (z * need).max(1).values, 4)
    hand = torch.tensor([[1 / 4, 1 / 4 + 1 / 3, 1 / 4 + 1 / 3 + 1 / 2, 1 / 4 + 1 / 3 + 1 / 2 + 3]])
    assert torch.allclose(EXACT[name](game).values, hand.double())


@pytest.mark.parametrize("name", EXACT)
def test_in_a_majority_of_equals_each_is_worth_the_same(name):
    game = SetGame(lambda z: (z.sum(1) >= 3).double(), 5)
    assert torch.allclose(EXACT[name](game).values, torch.full((1, 5), 0.2).double())


@pytest.mark.parametrize("name", EXACT)
def test_a_player_with_a_veto_and_a_heavy_vote_counts_by_hand(name):
    # Weights 3, 1, 1, quota 4: the first turns any order in which someone is before them (2/3),
    # each of the others the order in which exactly the first is before them (1/6).
    weight = torch.tensor([3, 1, 1])
    game = SetGame(lambda z: ((z * weight).sum(1) >= 4).double(), 3)
    assert torch.allclose(EXACT[name](game).values, torch.tensor([[4, 1, 1]]).double() / 6)


@pytest.mark.parametrize(
    "estimate",
    [
        lambda *game: permutation(*game, n_permutations=128),
        lambda *game: permutation(*game, n_permutations=128, shared=True),
        lambda *game: permutation(*game, n_permutations=128, design="plain"),
        lambda *game: permutation(*game, n_permutations=128, design="orthogonal"),
        lambda *game: permutation(*game, n_permutations=128, design="sobol"),
        lambda *game: kernel(*game, n_coalitions=600),
        lambda *game: kernel(*game, n_coalitions=600, sampling="kernel"),
        lambda *game: kernel(*game, n_coalitions=600, shared=True),
        lambda *game: kernel(*game, n_coalitions=600, paired=False),
    ],
)
def test_estimates_lie_as_far_from_enumeration_as_their_standard_errors_say(smooth, estimate):
    found, truth = estimate(*smooth), exact(*smooth)
    apart = ((found.values - truth.values) / found.stderr).square().mean().sqrt().item()
    assert 0.6 < apart < 1.5
    assert (found.values - truth.values).abs().max() < 0.1
    found.check_additivity()
