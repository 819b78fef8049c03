"""Functions that take their time: what a limit in seconds and Ctrl-C leave, and when."""

import sys
import time

import pytest
import torch

from microtome.shapley import interactions, kernel, permutation
from microtome.shapley.mlp import MlpWalker

TABLE = torch.randn(16, 12, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
X, BACKGROUND = TABLE[:6], TABLE[6:]


class Slow:
    """A function of rows, a millisecond each on a clock of its own; `patience` rows to Ctrl-C."""

    def __init__(self, monkeypatch=None, patience=float("inf")):
        self.now, self.patience, self.rows = 0.0, patience, 0
        if monkeypatch is not None:
            start = time.monotonic()
            monkeypatch.setattr(time, "monotonic", lambda: start + self.now)

    def __call__(self, rows):
        self.rows += len(rows)
        if self.rows > self.patience:
            raise KeyboardInterrupt
        self.now += 1e-3 * len(rows)
        return torch.tanh(rows).prod(1) + rows[:, 0] * rows[:, 1]


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("estimate", [permutation, kernel])
def test_a_limit_in_seconds_holds_for_a_function_of_a_millisecond_a_row(
    estimate, shared, monkeypatch
):
    slow = Slow(monkeypatch)
    found = estimate(slow, X, BACKGROUND, seconds=12.0, shared=shared, progress=False)
    assert 6.0 < slow.now < 13.0
    assert found.interrupted
    assert not found.stderr.isnan().any()
    found.check_additivity()


@pytest.mark.parametrize("estimate", [permutation, kernel])
def test_a_limit_too_short_still_gives_every_row_its_first_samples(estimate, monkeypatch):
    slow = Slow(monkeypatch)
    found = estimate(slow, X, BACKGROUND, seconds=0.1, progress=False)
    assert slow.rows < 6 * 10 * 50
    assert not found.stderr.isnan().any()


@pytest.mark.parametrize("estimate", [permutation, kernel])
def test_an_interrupt_among_many_rows_keeps_those_that_were_begun(estimate):
    x = TABLE.repeat(40, 1)
    slow = Slow(patience=150_000)
    found = estimate(slow, x, BACKGROUND, progress=False)
    assert found.interrupted
    begun = ~found.values.isnan().any(1)
    assert 50 < int(begun.sum()) < len(x)
    assert found.note.endswith(f"ended early; rows from {int(begun.sum())} on were not begun")
    same = estimate(Slow(), x[:50], BACKGROUND, progress=False)
    assert torch.equal(found.values[:50], same.values)


def test_a_limit_in_seconds_holds_for_interactions(monkeypatch):
    slow = Slow(monkeypatch)
    found = interactions(slow, X, BACKGROUND, seconds=30.0, progress=False)
    assert 15.0 < slow.now < 31.0
    assert found.interrupted
    assert not found.exact
    assert not found.stderr.isnan().any()
    found.check_additivity()


def test_an_interrupt_keeps_what_was_sampled_of_interactions():
    options = {"n_coalitions": 2000, "progress": False}
    slow = Slow(patience=14_000)
    found = interactions(slow, X[:1], BACKGROUND, **options)
    assert found.interrupted
    assert found.note.endswith("ended early")
    truth = interactions(Slow(), X[:1], BACKGROUND)
    assert (found.values - truth.values).abs().max() < 5 * found.stderr.max()
    slow = Slow(patience=30_000)
    found = interactions(slow, X, BACKGROUND, **options)
    assert found.note.endswith("ended early; rows from 3 on were not done")
    whole = interactions(Slow(), X, BACKGROUND, **options)
    assert (found.values - whole.values)[:3].abs().max() < 5 * found.stderr[:3].max()
    assert found.values[3:].isnan().all()


def test_an_interrupt_of_a_long_walk_of_one_row_keeps_its_first_round():
    slow = Slow(patience=4_000)
    found = permutation(slow, X[:1], BACKGROUND[:1], n_permutations=4_000, progress=False)
    assert found.interrupted
    assert not found.stderr.isnan().any()


def test_a_network_is_walked_in_rounds_that_a_limit_can_end(monkeypatch):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(12, 4), torch.nn.ReLU(), torch.nn.Linear(4, 1))
    rounds = []
    monkeypatch.setattr(sys.modules[permutation.__module__], "_RANKS", 12 * 10 * 3)
    x, background = X.float(), BACKGROUND.float()
    found = permutation(model, x, background, n_permutations=40, progress=False)
    assert found.engine == "mlp"
    walked = MlpWalker.__call__

    def seen(self, ranks, paired, who):
        rounds.append(ranks.shape[1])
        if len(rounds) == 3:
            raise KeyboardInterrupt
        return walked(self, ranks, paired, who)

    monkeypatch.setattr(MlpWalker, "__call__", seen)
    some = permutation(model, x, background, n_permutations=40, progress=False)
    assert rounds == [3, 3, 3]
    assert some.interrupted
    assert (some.values - found.values).abs().max() < 10 * some.stderr.max()
