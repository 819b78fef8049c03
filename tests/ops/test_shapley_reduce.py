"""shapley_reduce: by hand, then every backend against a loop over single players."""

from __future__ import annotations

import doctest
import importlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from microtome import _native, errors
from microtome._seed import generator
from microtome.ops import shapley_reduce, use_backend
from microtome.ops.shapley_reduce import _reduce
from microtome.testing import backends_of, level_parameters

on_every_backend = pytest.mark.parametrize("backend", backends_of(_reduce))
needs_extension = pytest.mark.skipif(
    _native.why_absent() is not None, reason="the extension is absent"
)


@dataclass(frozen=True)
class Case:
    """e explicands, S strata of U units of A orders of p players, o outputs."""

    name: str
    e: int
    S: int
    U: int
    A: int
    p: int
    o: int
    paired: bool = False
    strided: bool = False

    def inputs(self, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, bool]:
        g = generator(0, self.name)
        L = 2 * self.p + 1 if self.paired else self.p + 1
        values = torch.randn(self.e, self.S, self.U, self.A, L, self.o, generator=g).to(dtype)
        ranks = torch.rand(self.S, self.U, self.A, self.p, generator=g).argsort(-1).int()
        if self.strided:  # outputs apart, and orders in reverse of how they lie
            values = values.transpose(-1, 0).contiguous().transpose(-1, 0)
            ranks = ranks.transpose(0, 2).contiguous().transpose(0, 2)
        return values, ranks, self.paired


CASES = (
    Case("tiny", 1, 1, 1, 1, 1, 1),
    Case("tiny_paired", 1, 1, 1, 1, 1, 1, paired=True),
    Case("one_unit", 2, 3, 1, 1, 5, 1),
    Case("usual", 2, 4, 3, 1, 30, 1, paired=True),
    Case("orders", 1, 2, 3, 4, 13, 3, paired=True),
    Case("forward", 2, 1, 5, 2, 17, 3),
    Case("no_explicands", 0, 2, 2, 1, 4, 1),
    Case("no_outputs", 2, 2, 2, 1, 4, 0, paired=True),
    Case("no_players", 2, 2, 2, 1, 0, 2, paired=True),
    Case("one_word", 1, 2, 2, 1, 64, 2),
    Case("many_players", 1, 1, 2, 2, 203, 1, paired=True),
    Case("outputs_in_parts", 1, 1, 2, 2, 150, 120, paired=True),
    Case("too_many_units_to_keep", 1, 1, 30, 1, 30, 80),
    Case("strided", 2, 3, 4, 2, 9, 3, paired=True, strided=True),
)
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def player_by_player(values: Tensor, ranks: Tensor, paired: bool) -> tuple[Tensor, Tensor]:
    """The formulas, for one player at a time."""
    (e, S, U, A, _, o), p = values.shape, ranks.shape[-1]
    mean, m2 = torch.empty(2, e, S, p, o, dtype=torch.float64)
    for s in range(S):
        for j in range(p):
            units = torch.zeros(U, e, o, dtype=torch.float64)
            for u in range(U):
                for a in range(A):
                    r, v = int(ranks[s, u, a, j]), values[:, s, u, a].double()  # [e, L, o]
                    gain = v[:, r + 1] - v[:, r]
                    if paired:
                        gain = (gain + v[:, p + r] - v[:, p + r + 1]) / 2
                    units[u] += gain / A
            mean[:, s, j] = units.mean(0)
            m2[:, s, j] = (units - units.mean(0)).square().sum(0)
    return mean, m2


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """torch.set_num_threads, undone afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@on_every_backend
def test_forward_walks_agree_with_numbers_worked_by_hand(backend: str) -> None:
    # Two units of one order each: (1, 2, 0) visits 0, 1, 4, 9; (0, 1, 2) visits 0, 3, 3, 9.
    values = torch.tensor([[0.0, 1.0, 4.0, 9.0], [0.0, 3.0, 3.0, 9.0]]).reshape(1, 1, 2, 1, 4, 1)
    ranks = torch.tensor([[2, 0, 1], [0, 1, 2]], dtype=torch.int32).reshape(1, 2, 1, 3)
    with use_backend(backend):
        mean, m2 = shapley_reduce(values, ranks, paired=False)
    # Player 0 adds 5 and 3, player 1 adds 1 and 0, player 2 adds 3 and 6.
    assert mean.shape == m2.shape == (1, 1, 3, 1)
    assert mean.flatten().tolist() == [4.0, 0.5, 4.5]
    assert m2.flatten().tolist() == [2.0, 0.5, 4.5]


@on_every_backend
def test_paired_walks_agree_with_numbers_worked_by_hand(backend: str) -> None:
    # The order (1, 0). Forward: v() = 0, v(1) = 2, v(1, 0) = 10. Back: v(0) = 6, v() = 0.
    values = torch.tensor([[0.0, 2.0, 10.0, 6.0, 0.0]]).reshape(1, 1, 1, 1, 5, 1)
    ranks = torch.tensor([1, 0], dtype=torch.int32).reshape(1, 1, 1, 2)
    with use_backend(backend):
        mean, m2 = shapley_reduce(values, ranks, paired=True)
    # Player 0 adds 8 to player 1 and 6 to nobody; player 1 adds 2 to nobody and 4 to player 0.
    assert mean.flatten().tolist() == [7.0, 3.0]
    assert m2.flatten().tolist() == [0.0, 0.0]


@on_every_backend
def test_orders_of_a_unit_are_averaged_before_units_are_compared(backend: str) -> None:
    values = torch.tensor([0.0, 1.0, 0.0, 5.0, 0.0, 2.0, 0.0, 8.0]).reshape(1, 1, 2, 2, 2, 1)
    ranks = torch.zeros(1, 2, 2, 1, dtype=torch.int32)
    with use_backend(backend):
        mean, m2 = shapley_reduce(values, ranks, paired=False)
    assert mean.item() == 4.0  # units 3 and 5
    assert m2.item() == 2.0


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@on_every_backend
def test_every_backend_computes_the_formula(backend: str, dtype: torch.dtype, case: Case) -> None:
    values, ranks, paired = case.inputs(dtype)
    with use_backend(backend):
        got = shapley_reduce(values, ranks, paired)
        wide = shapley_reduce(values, ranks.long(), paired)
    for mine, also, exact in zip(got, wide, player_by_player(values, ranks, paired), strict=True):
        torch.testing.assert_close(mine, exact, rtol=1e-13, atol=1e-13)
        assert torch.equal(mine, also)


@needs_extension
@pytest.mark.parametrize("level", level_parameters())
def test_every_level_gives_the_bits_of_the_reference(
    level: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MICROTOME_CPU_ISA", level)
    assert _native.isa() == level
    for case in CASES:
        for dtype in (torch.float32, torch.float64):
            inputs = case.inputs(dtype)
            with use_backend("cpu"):
                got = shapley_reduce(*inputs)
            with use_backend("reference"):
                expected = shapley_reduce(*inputs)
            assert torch.equal(got[0], expected[0]), (case.name, dtype)
            assert torch.equal(got[1], expected[1]), (case.name, dtype)


@needs_extension
def test_one_two_and_three_threads_give_the_same_bits(threads: Callable[[int], None]) -> None:
    inputs, answers = Case("threads", 7, 11, 5, 2, 60, 5, paired=True).inputs(), []
    for count in (1, 2, 3):
        threads(count)
        with use_backend("cpu"):
            answers.append(torch.stack(shapley_reduce(*inputs)))
    assert torch.equal(answers[0], answers[1])
    assert torch.equal(answers[0], answers[2])


@on_every_backend
def test_contributions_sum_to_the_full_coalition_less_the_empty_one(backend: str) -> None:
    for case in CASES:
        values, ranks, paired = case.inputs()
        if paired:  # the way back ends where the way forward began
            values[..., 2 * case.p, :] = values[..., 0, :]
        with use_backend(backend):
            mean, _ = shapley_reduce(values, ranks, paired)
        whole = (values[..., case.p, :] - values[..., 0, :]).mean((2, 3))  # [e, S, o]
        torch.testing.assert_close(mean.sum(2), whole, rtol=0, atol=1e-12)


@on_every_backend
def test_nan_reaches_the_players_that_read_it_and_no_others(backend: str) -> None:
    for paired in (False, True):
        values, ranks, _ = Case("nan", 2, 2, 3, 2, 6, 2, paired).inputs()
        values[1, 0, 2, 1, 4, 1] = torch.nan  # read by the players of ranks 3 and 4
        if paired:
            values[0, 1, 0, 0, 6 + 1, 0] = torch.nan  # by those of ranks 0 and 1, going back
        expected = torch.zeros(2, 2, 6, 2, dtype=torch.bool)
        expected[1, 0, (ranks[0, 2, 1] == 3) | (ranks[0, 2, 1] == 4), 1] = True
        if paired:
            expected[0, 1, ranks[1, 0, 0] < 2, 0] = True
        with use_backend(backend):
            mean, m2 = shapley_reduce(values, ranks, paired)
        assert torch.equal(mean.isnan(), expected)
        assert torch.equal(m2.isnan(), expected)


@on_every_backend
def test_it_passes_opcheck_contiguous_or_not(backend: str) -> None:
    with use_backend(backend):
        for name in ("usual", "strided"):
            case = next(case for case in CASES if case.name == name)
            torch.library.opcheck(_reduce.torch_op, case.inputs(torch.float32))


@on_every_backend
def test_a_compiled_graph_answers_as_an_eager_one_does(backend: str) -> None:
    inputs = CASES[3].inputs()
    compiled = torch.compile(shapley_reduce, fullgraph=True, backend="aot_eager")
    with use_backend(backend):
        for got, expected in zip(compiled(*inputs), shapley_reduce(*inputs), strict=True):
            assert torch.equal(got, expected)


@on_every_backend
@pytest.mark.parametrize("rank", [-1, 3])
def test_a_rank_that_is_no_place_is_named(backend: str, rank: int) -> None:
    values, ranks = torch.ones(1, 1, 2, 1, 4, 1), torch.tensor([[0, 1, 2], [0, rank, 1]])
    with (
        use_backend(backend),
        pytest.raises(
            errors.ArgumentError,
            match=rf"^shapley_reduce: ranks must lie in \[0, p=3\), got {rank}\.$",
        ),
    ):
        shapley_reduce(values, ranks.reshape(1, 2, 1, 3), paired=False)


GOOD = {
    "values": torch.ones(2, 3, 4, 1, 6, 1),
    "ranks": torch.zeros(3, 4, 1, 5, dtype=torch.int32),
    "paired": False,
}


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (
            {"ranks": torch.zeros(3, 4, 5, dtype=torch.int32)},
            errors.ShapeError,
            "ranks must be [S, U, A, p], got shape [3, 4, 5].",
        ),
        (
            {"ranks": torch.zeros(3, 2, 1, 5, dtype=torch.int32)},
            errors.ShapeError,
            "ranks must be [S, U, A, p] with U=4 as in values, got shape [3, 2, 1, 5].",
        ),
        (
            {"paired": True},
            errors.ShapeError,
            "values must be [e, S, U, A, L, o] with L = 2 p + 1 = 11 for p=5 and paired=True, got "
            "L=6.",
        ),
        (
            {"values": torch.ones(2, 3, 4, 1, 11, 1)},
            errors.ShapeError,
            "values must be [e, S, U, A, L, o] with L = p + 1 = 6 for p=5 and paired=False, got "
            "L=11.",
        ),
        (
            {
                "values": torch.ones(2, 3, 4, 0, 6, 1),
                "ranks": torch.zeros(3, 4, 0, 5, dtype=torch.int32),
            },
            errors.ShapeError,
            "U and A must be at least 1, got U=4, A=0: there is nothing to average.",
        ),
        (
            {"values": torch.ones(2, 3, 4, 1, 6, 1).bfloat16()},
            errors.DtypeError,
            "values must be float32, float64, got bfloat16. Cast it with .to().",
        ),
        (
            {"ranks": torch.zeros(3, 4, 1, 5)},
            errors.DtypeError,
            "ranks must be int32, int64, got float32. Cast it with .to().",
        ),
        (
            {"ranks": torch.zeros(3, 4, 1, 5, dtype=torch.int32, device="meta")},
            errors.DeviceError,
            "all tensors must lie on one device, got values [2, 3, 4, 1, 6, 1] on cpu, ranks "
            "[3, 4, 1, 5] on meta. Load ranks on cpu (meta tensors hold no data).",
        ),
    ],
)
def test_what_does_not_fit_is_named(
    change: dict[str, object], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=f"^shapley_reduce: {re.escape(text)}$"):
        shapley_reduce(**{**GOOD, **change})


def test_the_example_of_the_docstring_holds() -> None:
    assert doctest.testmod(importlib.import_module("microtome.ops.shapley_reduce")).failed == 0
