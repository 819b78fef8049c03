"""Budgets, stopping, seeds and interruption, alike for the estimators that sample."""

import pytest
import torch

from microtome.errors import ArgumentError, NonFiniteError, ShapeError
from microtome.shapley import InputGame, SetGame, exact, kernel, permutation

SAMPLERS = {"permutation": permutation, "kernel": kernel}
SMALL = {"permutation": {"n_permutations": 4}, "kernel": {"n_coalitions": 60}}

both = pytest.mark.parametrize("name", SAMPLERS)


def same(a, b):
    return torch.equal(a.values, b.values) and torch.equal(a.stderr, b.stderr)


@both
@pytest.mark.parametrize("shared", [False, True])
def test_memory_and_threads_change_no_bit(name, shared, smooth):
    run = SAMPLERS[name]
    found = run(*smooth, **SMALL[name], shared=shared)
    assert same(found, run(*smooth, **SMALL[name], shared=shared, memory=1000))
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if threads > 1 else 2)
    try:
        assert same(found, run(*smooth, **SMALL[name], shared=shared))
    finally:
        torch.set_num_threads(threads)


@both
def test_a_row_does_not_depend_on_the_rows_beside_it(name, smooth):
    f, x, background = smooth
    found = SAMPLERS[name](f, x, background, **SMALL[name])
    alone = SAMPLERS[name](f, x[1:2], background, **SMALL[name])
    assert torch.equal(found.values[1:2], alone.values)
    assert torch.equal(found.stderr[1:2], alone.stderr)


@both
def test_a_seed_fixes_the_draws_and_leaves_the_global_state_alone(name, smooth):
    state = torch.get_rng_state()
    found = SAMPLERS[name](*smooth, **SMALL[name], seed=1)
    assert torch.equal(state, torch.get_rng_state())
    assert same(found, SAMPLERS[name](*smooth, **SMALL[name], seed=1))
    assert not same(found, SAMPLERS[name](*smooth, **SMALL[name], seed=2))


@pytest.mark.parametrize(("name", "target"), [("permutation", 0.02), ("kernel", 0.004)])
def test_sampling_ends_when_the_target_is_met(name, target, smooth):
    found = SAMPLERS[name](*smooth, target_error=target)
    size, error = (a.square().mean(1).sqrt() for a in (found.values, found.stderr))
    assert bool((error <= target * size).all())
    assert bool((error > target / 10 * size).all())
    truth = exact(*smooth).values
    assert bool(((found.values - truth).square().mean(1).sqrt() < 2 * target * size).all())


@both
def test_a_budget_is_kept(name, smooth):
    least = 5 * 24 + 6 if name == "kernel" else 5 * 22 + 6
    for budget in (least, 400, 3001):
        found = SAMPLERS[name](*smooth, max_evaluations=budget, check=False)
        assert 0.6 * budget < found.evaluations / 3 <= budget + 1


@both
def test_too_small_a_budget_is_told_with_what_it_takes(name, smooth):
    with pytest.raises(ArgumentError, match="max_evaluations=60 is too few for p=12 players and n"):
        SAMPLERS[name](*smooth, max_evaluations=60)
    option = "n_permutations" if name == "permutation" else "n_coalitions"
    with pytest.raises(ArgumentError, match=f"give {option} or max_evaluations, not both"):
        SAMPLERS[name](*smooth, max_evaluations=6000, **SMALL[name])


@both
def test_time_that_is_up_ends_the_sampling_with_errors_for_every_row(name, smooth):
    found = SAMPLERS[name](*smooth, seconds=1e-9)
    assert found.interrupted
    assert "ended early" in found.note
    assert not found.stderr.isnan().any()
    found.check_additivity()


@both
@pytest.mark.parametrize("option", ["target_error", "seconds"])
def test_a_target_is_positive(name, option, smooth):
    with pytest.raises(ArgumentError, match=f"{option} must be positive, got {option}=0"):
        SAMPLERS[name](*smooth, **{option: 0})


@both
def test_a_seed_is_a_number(name, smooth):
    with pytest.raises(ArgumentError, match=r"seed must be a whole number, got None\. Nothing is"):
        SAMPLERS[name](*smooth, seed=None)


@both
def test_an_interrupt_keeps_what_there_is(name, smooth):
    f, x, background = smooth
    calls = 0

    def interrupted(rows):
        nonlocal calls
        calls += 1
        if calls > 60:
            raise KeyboardInterrupt
        return f(rows)

    found = SAMPLERS[name](interrupted, x[:1], background, target_error=1e-4, memory=96 * 200)
    assert found.interrupted
    assert not found.stderr.isnan().any()
    truth = exact(f, x[:1], background).values
    assert (found.values - truth).abs().max() < 5 * found.stderr.max()
    found.check_additivity()


@both
def test_an_interrupt_before_anything_is_known_is_passed_on(name, smooth):
    f, x, background = smooth
    calls = 0

    def interrupted(rows):
        nonlocal calls
        calls += 1
        if calls > 1:  # the first call is that of the ends
            raise KeyboardInterrupt
        return f(rows)

    with pytest.raises(KeyboardInterrupt):
        SAMPLERS[name](interrupted, x, background)


@pytest.mark.parametrize("estimate", [permutation, kernel, exact])
def test_a_link_is_applied_to_the_mean(estimate, smooth):
    f, x, background = smooth
    options = {"shared": True} if estimate is not exact else {}
    if estimate is kernel:
        options["n_coalitions"] = (1 << 12) - 2

    def prob(rows):
        return torch.sigmoid(f(rows))

    found = estimate(prob, x, background, link="logit", **options)
    assert torch.allclose(found.full_values, f(x))
    assert torch.allclose(found.base_values[0], torch.logit(prob(background).mean(0)))
    found.check_additivity()
    if estimate is not exact:
        with pytest.raises(ArgumentError, match="link='logit' applies to the mean over background"):
            estimate(prob, x, background, link="logit")
    with pytest.raises(ArgumentError, match="link must be 'identity', 'logit' or a function"):
        estimate(prob, x, background, link="probit")


@pytest.mark.parametrize("estimate", [permutation, kernel, exact])
def test_a_link_that_is_infinite_at_a_value_is_told_with_the_value(estimate):
    with pytest.raises(NonFiniteError, match="link='logit' is infinite or not a number at a coal"):
        estimate(lambda rows: rows[:, 0], torch.ones(1, 3), torch.zeros(1, 3), link="logit")
    with pytest.raises(NonFiniteError, match=r"value, 0\. Keep f where the link is finite"):
        estimate(lambda rows: rows[:, 0], torch.ones(1, 3), torch.zeros(1, 3), link=torch.log)


@pytest.mark.parametrize("estimate", [permutation, kernel, exact])
class TestWhatAFunctionMayNotDo:
    def test_return_nan(self, estimate, smooth):
        f, x, background = smooth

        def broken(rows):
            return torch.where(rows[:, :1] == x[0, 0], torch.nan, f(rows))

        with pytest.raises(NonFiniteError, match=r"f returned NaN or infinity for 1 of 8 rows"):
            estimate(broken, x, background)

    def test_fail_on_missing_values_without_naming_their_column(self, estimate, smooth):
        f, x, background = smooth
        holes = x.clone()
        holes[1, 4] = torch.nan
        with pytest.raises(NonFiniteError, match="missing values in column x4: impute them"):
            estimate(f, holes, background)

    def test_return_another_number_of_rows(self, estimate, smooth):
        f, x, background = smooth
        with pytest.raises(ShapeError, match=r"was called with 8 rows and returned shape \[7, 2\]"):
            estimate(lambda rows: f(rows)[:-1], x, background)

    def test_return_one_number_for_all(self, estimate, smooth):
        f, x, background = smooth
        with pytest.raises(ShapeError, match="with 8 rows and returned a single number"):
            estimate(lambda rows: f(rows).mean(), x, background)

    def test_return_more_than_two_dimensions(self, estimate, smooth):
        f, x, background = smooth
        with pytest.raises(ShapeError, match=r"must return \[rows\] or \[rows, outputs\], got"):
            estimate(lambda rows: f(rows)[:, None], x, background)

    def test_return_complex_numbers(self, estimate, smooth):
        f, x, background = smooth
        for broken in (lambda rows: f(rows) * 1j, lambda rows: f(rows).numpy() * 1j):
            with pytest.raises(
                ShapeError, match=r"must return real numbers, got (torch\.)?complex"
            ):
                estimate(broken, x, background)

    def test_change_its_number_of_outputs(self, estimate, smooth):
        f, x, background = smooth
        with pytest.raises(ShapeError, match="returned 2 outputs at first and 1 now"):
            estimate(lambda rows: f(rows)[:, : 2 if len(rows) < 12 else 1], x, background)

    def test_change_its_answers(self, estimate, smooth):
        f, x, background = smooth
        stream = torch.Generator().manual_seed(0)

        def noisy(rows):
            return f(rows) + torch.randn(len(rows), 2, generator=stream).double()

        with pytest.raises(ArgumentError, match="f gives different answers to the same rows"):
            estimate(noisy, x, background)
        assert not estimate(noisy, x, background, check=False).values.isnan().any()

    def test_be_no_function(self, estimate, smooth):
        _, x, background = smooth
        with pytest.raises(ArgumentError, match="f must be a function of rows, a torch module or"):
            estimate("model", x, background)


@pytest.mark.parametrize("estimate", [permutation, kernel, exact])
def test_rows_and_background_must_agree(estimate, smooth):
    f, x, background = smooth
    with pytest.raises(ShapeError, match=r"background must be \[n, 12\] like x, got"):
        estimate(f, x, background[:, 1:])
    with pytest.raises(ArgumentError, match="background has no rows"):
        estimate(f, x, background[:0])
    with pytest.raises(ArgumentError, match="pass the rows x to explain and background rows"):
        estimate(f)
    with pytest.raises(ArgumentError, match="a game brings its own rows and players"):
        estimate(InputGame(f, x, background), x, background)


@pytest.mark.parametrize("estimate", [permutation, kernel, exact])
def test_a_constant_feature_is_worth_nothing(estimate, smooth):
    f, x, background = smooth
    x, background = x.clone(), background.clone()
    x[:, 3] = background[:, 3] = 1.5
    options = {"n_coalitions": (1 << 12) - 2} if estimate is kernel else {}
    assert estimate(f, x, background, **options).values[:, 3].abs().max() < 1e-12


@pytest.mark.parametrize("estimate", [permutation, kernel, exact])
def test_groups_of_columns_play_as_one(estimate, smooth):
    f, x, background = smooth
    groups = {"a": [0, 1, 2, 3], "b": ["x4", "x5"], "c": [6, 7, 8, 9, 10, 11]}
    found = estimate(f, x, background, groups=groups)
    assert found.names == ("a", "b", "c")
    assert found.values.shape == (3, 3, 2)
    numbered = estimate(f, x, background, groups=[0] * 4 + [1] * 2 + [2] * 6)
    assert torch.equal(found.values, numbered.values)
    named = estimate(f, x, background, groups=["a"] * 4 + ["b"] * 2 + ["c"] * 6)
    assert named.names == found.names
    assert torch.equal(found.values, named.values)
    found.check_additivity()


def test_groups_that_name_no_column_are_told(smooth):
    with pytest.raises(ArgumentError, match=r"group 'a' names column 1.5; the columns are x0"):
        permutation(*smooth, groups={"a": [1.5]})
    with pytest.raises(ArgumentError, match=r"must name the group of each of the m=12 columns"):
        permutation(*smooth, groups=["a", "b"])


@pytest.mark.parametrize("estimate", [permutation, kernel, exact])
@pytest.mark.parametrize("p", [1, 2, 3])
def test_a_few_players_are_enough(estimate, p):
    game = SetGame(lambda z: z.sum(1).double() ** 2, p)
    assert torch.allclose(estimate(game).values, torch.full((1, p), float(p)).double())


@pytest.mark.parametrize("estimate", [permutation, kernel, exact])
def test_no_rows_give_no_values(estimate, smooth):
    f, x, background = smooth
    assert estimate(f, x[:0], background, check=False).values.shape == (0, 12, 2)


@pytest.mark.parametrize("design", ["plain", "antithetic", "orthogonal", "sobol"])
def test_every_design_of_permutations_is_unbiased(design, smooth):
    truth = exact(*smooth).values
    runs = [permutation(*smooth, n_permutations=16, design=design, seed=s) for s in range(6)]
    mean = torch.stack([run.values for run in runs]).mean(0)
    error = runs[0].stderr.square().mean().sqrt() / 6**0.5
    assert 0.5 < (mean - truth).square().mean().sqrt() / error < 1.6


def test_an_unknown_design_is_told_the_known_ones(smooth):
    with pytest.raises(ArgumentError, match="design must be one of 'plain', 'antithetic', "):
        permutation(*smooth, design="latin")
    with pytest.raises(ArgumentError, match="n_permutations must be at least 1, got"):
        permutation(*smooth, n_permutations=0)


def test_one_permutation_of_one_background_row_has_no_error_to_tell(smooth):
    f, x, background = smooth
    found = permutation(f, x, background[:1], n_permutations=2)
    assert found.stderr.isnan().all()
    assert not found.values.isnan().any()


@pytest.mark.parametrize("design", ["plain", "antithetic", "orthogonal", "sobol"])
def test_one_player_takes_no_more_than_the_ends(design):
    x, background = torch.full((1, 1), 3.0), torch.zeros(3, 1)
    found = permutation(lambda rows: rows[:, 0], x, background, design=design, max_evaluations=4)
    assert found.values.tolist() == [[3.0]]
    assert permutation(lambda rows: rows[:, 0], x, background, design=design).values.item() == 3


def test_additivity_is_checked_of_the_rows_that_are_there(smooth):
    f, x, background = smooth
    found = permutation(f, x, background, n_permutations=2)
    found.values[1] = torch.nan  # not begun
    assert found.check_additivity()[1].isnan().all()
    found.values[2] += 1
    with pytest.raises(ArgumentError, match="the values of row 2 miss full - base by 12"):
        found.check_additivity()
    assert permutation(f, x[:0], background).check_additivity().shape == (0, 2)
