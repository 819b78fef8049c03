"""Finding the top players among many: right, cheaper than sampling all alike, unbiased when cut."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from microtome.errors import ArgumentError
from microtome.shapley import InputGame, MeanGame, SetGame, adaptive, permutation
from microtome.shapley.adaptive import student
from microtome.shapley.partial_walks import Cut, Sampler


class Synthetic:
    """500 players: ten large weights, small ones, and 100 pairs that interact."""

    def __init__(self, p: int = 500) -> None:
        stream = torch.Generator().manual_seed(0)
        self.weights = 0.05 * torch.randn(p, generator=stream, dtype=torch.float64)
        self.top = torch.randperm(p, generator=stream)[:10]
        self.weights[self.top] = torch.linspace(1.1, 2.6, 10).double() * torch.tensor([1, -1] * 5)
        self.pairs = torch.randperm(p, generator=stream)[: p // 5 * 2].reshape(2, -1)
        self.joint = 0.4 * torch.randn(p // 5, generator=stream, dtype=torch.float64)
        self.game = SetGame(self.value, p)

    def value(self, inside: Tensor) -> Tensor:
        inside = inside.double()
        both = inside[:, self.pairs[0]] * inside[:, self.pairs[1]]
        return inside @ self.weights + both @ self.joint

    @property
    def exact(self) -> Tensor:
        out = self.weights.clone()
        for player in self.pairs:
            out.index_add_(0, player, self.joint / 2)
        return out


def largest(values: Tensor, k: int) -> set[int]:
    return set(values.abs().argsort(descending=True)[:k].tolist())


def saturating(p: int) -> SetGame:
    """min(sum, 3): worth nothing more once three are in."""
    return SetGame(lambda inside: inside.sum(1).clamp(max=3).double(), p)


def test_the_top_k_of_500_players_is_settled_and_right() -> None:
    made = Synthetic()
    found = adaptive(made.game, k=10, seed=1)
    assert largest(found.values[0], 10) == largest(made.exact, 10) == set(made.top.tolist())
    assert found.note == "top 10 settled at confidence 0.95"
    assert {top["player"] for top in found.top(10)} == {f"player {j}" for j in made.top.tolist()}


def test_evaluations_go_where_the_kth_place_is_open() -> None:
    made = Synthetic()
    found = adaptive(made.game, k=10, seed=1)
    assert "not settled" not in found.note
    # Walks of all players alike, until intervals of the same confidence are apart as well.
    order = made.exact.abs().argsort(descending=True)
    for walks in range(8, 80, 4):
        plain = permutation(Synthetic().game, n_permutations=walks, design="plain", seed=1)
        half = plain.stderr[0] * student(0.05 / 1000, torch.tensor(walks - 1))
        low, high = plain.values[0].abs() - half, plain.values[0].abs() + half
        if low[order[:10]].min() > high[order[10:]].max():
            break
    assert found.evaluations < 0.4 * plain.evaluations


def test_errors_are_standard_errors() -> None:
    made = Synthetic()
    squares = []
    for seed in range(4):  # players share their walks, and so their luck
        found = adaptive(made.game, k=None, max_evaluations=20000, seed=seed)
        moved = found.stderr[0] > 1e-9
        z = (found.values[0] - made.exact)[moved] / found.stderr[0][moved]
        squares.append(float(z.square().mean()))
    assert 0.85 < (sum(squares) / 4) ** 0.5 < 1.2


@pytest.mark.parametrize("side", ["full", "empty"])
def test_walks_that_are_cut_stay_unbiased(side: str) -> None:
    game = saturating(24) if side == "full" else SetGame(
        lambda inside: (inside.sum(1) - 21).clamp(min=0).double(), 24
    )  # fmt: skip
    game.ends()
    sampler = Sampler(game, 0, Cut(0.01, side, 0.25), seed=0)
    sampler.sample(torch.arange(24), 4000)
    assert sampler.cuts == 4000
    assert sampler.spent < 0.55 * 4000 * 23  # a quarter of them are walked to the end
    assert torch.allclose(sampler.mean.sum(), torch.tensor(3.0).double(), atol=0.02)
    z = (sampler.mean - 3 / 24) / sampler.stderr
    assert float(z.abs().max()) < 4


def test_walks_cut_for_good_save_the_rest_and_share_it() -> None:
    game = saturating(24)
    found = adaptive(game, k=None, truncation=0.01, finish_rate=0.0, max_evaluations=240)
    assert "biased by what was not seen" in found.note
    assert torch.allclose(found.values.sum(), torch.tensor(3.0).double())
    assert found.evaluations < 240 + 24


def test_a_seed_gives_the_same_bits_and_another_does_not() -> None:
    one, two, other = (adaptive(Synthetic(60).game, k=3, seed=s).values for s in (0, 0, 1))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


def test_every_row_is_ranked_by_itself_and_draws_background_rows() -> None:
    weights = torch.tensor([3.0, 0.0, 1.0, 0.2, 0.0, 0.0])
    x, background = torch.ones(2, 6), torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    x[1, 0] = -4.0
    found = adaptive(InputGame(lambda a: a @ weights, x, background), k=1, max_evaluations=3000)
    exact = weights * (x - background.mean(0))
    assert ((found.values - exact).abs() <= 5 * found.stderr + 1e-6).all()
    assert found.values.shape == (2, 6)


def test_a_row_is_the_same_beside_others_and_alone() -> None:
    stream = torch.Generator().manual_seed(2)
    x, background = torch.randn(7, 12, generator=stream).split([3, 4])

    def f(rows: Tensor) -> Tensor:
        return torch.sin(rows.cumsum(1)).sum(1)

    found = adaptive(f, x, background, k=3, max_evaluations=300)
    alone = adaptive(f, x[2:], background, k=3, max_evaluations=300)
    assert torch.equal(found.values[2:], alone.values)
    assert torch.equal(found.stderr[2:], alone.stderr)


def test_time_that_is_up_leaves_no_row_without_values() -> None:
    x, background = torch.randn(3, 12), torch.randn(4, 12)
    found = adaptive(lambda rows: torch.sin(rows).prod(1), x, background, k=3, seconds=1e-9)
    assert found.interrupted
    assert not found.stderr.isnan().any()


def test_the_value_itself_can_rank_players() -> None:
    weights = torch.tensor([-5.0, 1.0, 2.0, 0.0])
    made = SetGame(lambda inside: inside.float() @ weights, 4)
    assert "settled" in adaptive(made, k=1, by="value").note
    assert adaptive(made, k=4).evaluations > 0


def test_one_player_that_ties_with_another_is_reported_as_contested() -> None:
    def tied(inside: Tensor) -> Tensor:
        a = inside.double()
        return a[:, 0] * a[:, 1] + a[:, 2] * a[:, 3]  # all four are worth a half

    found = adaptive(SetGame(tied, 4), k=2, max_evaluations=400)
    assert found.note == "top 2 not settled: 4 players are contested"


def test_an_interrupt_keeps_what_is_there() -> None:
    made, calls = Synthetic(50), itertools.count()

    def value(inside: Tensor) -> Tensor:
        if next(calls) > 3:
            raise KeyboardInterrupt
        return made.value(inside)

    found = adaptive(SetGame(value, 50), k=None, max_evaluations=10**6)
    assert found.interrupted
    assert found.note.endswith("ended early")
    assert bool(found.values.isfinite().all())


def test_the_mean_game_has_the_means_of_the_values() -> None:
    x = torch.tensor([[1.0, 2.0], [3.0, 0.0]])
    game = InputGame(lambda a: a[:, 0] * a[:, 1] + a[:, 0], x, torch.zeros(1, 2))
    single = permutation(game).values.mean(0, keepdim=True)
    assert torch.allclose(permutation(MeanGame(game)).values, single)


def test_students_quantile_is_near_the_table() -> None:
    got = student(0.025, torch.tensor([7, 30, 1000]))
    assert torch.allclose(got, torch.tensor([2.3646, 2.0423, 1.9623]).double(), atol=2e-3)


def test_of_fewer_players_than_k_all_are_wanted() -> None:
    game = SetGame(lambda inside: inside.float() @ torch.arange(4.0), 4)
    assert torch.equal(adaptive(game).values, adaptive(game, k=4).values)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "adaptive: k must be between 1 and"),
        ({"by": "size"}, "adaptive: by must be one of"),
        ({"confidence": 1.0}, "adaptive: confidence must lie between 0 and 1, got confidence=1.0."),
        ({"truncation": 1.5}, r"adaptive: truncation must lie in \[0, 1\), got truncation=1.5."),
        ({"max_evaluations": 5}, "too few for p=4 players: two walks take 8. Raise it, or group"),
    ],
)
def test_options_out_of_range_say_what_is_allowed(options: dict[str, object], message: str) -> None:
    game = SetGame(lambda inside: inside.sum(1), 4)
    with pytest.raises(ArgumentError, match=message):
        adaptive(game, **{"k": 2, **options})  # type: ignore[arg-type]


def test_several_outputs_are_refused() -> None:
    game = SetGame(lambda inside: inside.float()[:, :2], 4)
    with pytest.raises(ArgumentError, match="f returns 2 outputs, and the largest values are"):
        adaptive(game, k=2)
