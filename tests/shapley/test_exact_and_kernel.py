"""Enumeration and least squares: what is theirs alone."""

import math

import pytest
import torch

from microtome.errors import ArgumentError
from microtome.shapley import SetGame, exact, kernel
from microtome.shapley.coalitions import members, of_members
from microtome.shapley.subsets import Drawn, plan_of, population


def test_enumeration_gives_the_same_bits_for_any_memory(smooth):
    f, x, background = smooth
    first = exact(f, x, background, memory=1 << 15)
    assert torch.equal(first.values, exact(f, x, background, memory=1 << 25).values)
    assert first.exact
    assert first.stderr.eq(0).all()
    assert first.evaluations == 3 * (4094 * 5 + 2) + 5


def test_enumeration_matches_the_definition(table_game):
    values = torch.randn(32, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    hand = torch.zeros(5, 2, dtype=torch.float64)
    for j in range(5):
        for S in range(32):
            if not S >> j & 1:
                s = S.bit_count()
                weight = math.factorial(s) * math.factorial(4 - s) / math.factorial(5)
                hand[j] += weight * (values[S | 1 << j] - values[S])
    assert torch.allclose(exact(table_game(values)).values[0], hand)


def test_too_many_coalitions_are_told_with_what_fits(smooth):
    f, x, background = smooth
    with pytest.raises(ArgumentError, match=r"2\^12 x 5 = 20,480 evaluations.*enough for 9 play"):
        exact(f, x, background, max_evaluations=3000)
    with pytest.raises(ArgumentError, match=r"p=100 players .* take 2\^100 x 1 evaluations"):
        exact(SetGame(lambda z: z.sum(1), 100))


def test_an_interrupted_enumeration_keeps_the_rows_that_are_done(smooth):
    f, x, background = smooth
    done = 0

    def interrupted(rows):
        nonlocal done
        done += len(rows)
        if done > 50_000:
            raise KeyboardInterrupt
        return f(rows)

    found = exact(interrupted, x, background, memory=1 << 16)
    assert found.interrupted
    assert found.note == "ended early; rows from 2 on were not done"
    assert torch.equal(found.values[:2], exact(f, x, background, memory=1 << 16).values[:2])
    assert found.values[2].isnan().all()


def test_members_of_a_set_come_first_in_its_order():
    inside = torch.rand(50, 9, generator=torch.Generator().manual_seed(0)) < 0.5
    ranks, spans = of_members(inside)
    assert torch.equal(members(ranks, spans), inside)
    assert torch.equal(ranks.sort(1).values, torch.arange(9, dtype=torch.int32).expand(50, -1))


@pytest.mark.parametrize("paired", [True, False])
@pytest.mark.parametrize("sampling", ["kernel", "leverage"])
@pytest.mark.parametrize("p", [5, 8, 13])
def test_coalitions_are_drawn_without_repeats_and_as_many_as_planned(paired, sampling, p):
    most = sum(population(p, s, paired) for s in range(1, (p // 2 if paired else p - 1) + 1))
    for units in (p, 2 * p, most // 2, most):
        small, large = (plan_of(p, paired, sampling, u) for u in (p, max(p, units)))
        drawn = Drawn(0, 3, large, seed=0)
        drawn.extend(small)
        drawn.extend(large)
        assert abs(large.units - min(units, most)) <= p // 2
        for row in drawn.words[..., 0].tolist():
            every = [*row, *[~z & ((1 << p) - 1) for z in row]] if paired else row
            assert len(set(every)) == len(every)
            assert all(z.bit_count() == s for z, s in zip(row, drawn.sizes.tolist(), strict=True))
    assert plan_of(p, paired, sampling, most).complete


def test_all_coalitions_make_a_fit_exact(smooth):
    truth = exact(*smooth)
    for options in ({"shared": True}, {"paired": False}, {"sampling": "kernel"}):
        found = kernel(*smooth, n_coalitions=4094, **options)
        assert found.exact
        assert found.stderr.eq(0).all()
        assert torch.allclose(found.values, truth.values, atol=1e-12)


@pytest.mark.parametrize("shared", [True, False])
def test_a_linear_function_is_fitted_exactly_by_few_coalitions(shared, smooth):
    _, x, background = smooth
    weight = torch.arange(12.0, dtype=torch.float64)
    found = kernel(lambda rows: rows @ weight, x, background, n_coalitions=36, shared=shared)
    assert torch.allclose(found.values, weight * (x - background.mean(0)))
    assert found.stderr.max() < 1e-9


def test_own_coalitions_of_background_rows_beat_shared_ones(smooth):
    truth = exact(*smooth).values

    def error(shared):
        runs = [kernel(*smooth, n_coalitions=100, shared=shared, seed=s) for s in range(4)]
        return torch.stack([(run.values - truth).square().mean() for run in runs]).mean().sqrt()

    assert error(False) < error(True)


def test_a_coalition_that_the_fit_meets_exactly_still_has_an_error(smooth):
    f, x, background = smooth
    truth = exact(f, x, background[:1]).values
    found = [kernel(f, x, background[:1], n_coalitions=30, seed=seed) for seed in range(40)]
    variance = torch.stack([one.stderr for one in found]).square()
    squared = torch.stack([one.values - truth for one in found]).square()
    assert float(variance.min()) > 1e-6 * float(variance.mean())
    assert 0.6 < float(variance.mean() / squared.mean()) < 1.5


def test_too_few_coalitions_are_told_how_many_it_takes(smooth):
    with pytest.raises(ArgumentError, match="n_coalitions must be at least 24 for p=12 players in"):
        kernel(*smooth, n_coalitions=23)
    with pytest.raises(ArgumentError, match="at least 13 for p=12 players, got n_coalitions=12: f"):
        kernel(*smooth, n_coalitions=12, paired=False)
    with pytest.raises(ArgumentError, match="sampling must be one of 'leverage', 'kernel', got"):
        kernel(*smooth, sampling="uniform")


def test_more_than_64_players_take_more_than_a_word(smooth):
    weight = torch.linspace(-1, 1, 150, dtype=torch.float64)
    game = SetGame(lambda z: (z * weight).sum(1) + z[:, 0] * z[:, 149], 150)
    found = kernel(game, n_coalitions=1200)
    hand = weight.clone()
    hand[[0, 149]] += 0.5
    assert (found.values[0] - hand).abs().max() < 0.05
    found.check_additivity()


def test_more_players_than_a_float_has_coalitions_are_fitted():
    x, background = torch.ones(1, 1040), torch.zeros(1, 1040)
    found = kernel(lambda rows: rows[:, 0] + rows.mean(1), x, background, n_coalitions=2080)
    assert abs(found.values[0, 0].item() - 1) < 0.01
    found.check_additivity()


def test_an_interrupted_enumeration_keeps_the_rows_before():
    seen = 0

    def f(rows):
        nonlocal seen
        seen += len(rows)
        if seen > 1.5 * 2**16:
            raise KeyboardInterrupt
        return rows.sum(1)

    found = exact(f, torch.ones(8, 14), torch.zeros(1, 14))
    assert found.interrupted
    torch.testing.assert_close(found.values[:4], torch.ones(4, 14).double())
    assert found.values[4:].isnan().all()
