"""coalition_gram: by hand, then every backend exactly, where the weights are integers."""

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
from microtome.ops import coalition_gram, use_backend
from microtome.ops.coalition_gram import _gram
from microtome.testing import backends_of, interpreted, level_parameters, skip_if_interpreted

on_every_backend = pytest.mark.parametrize("backend", backends_of(_gram))
needs_extension = pytest.mark.skipif(
    _native.why_absent() is not None, reason="the extension is absent"
)


@dataclass(frozen=True)
class Case:
    """K coalitions of p players; g weightings for e explicands of o outputs."""

    name: str
    K: int
    p: int
    g: int = 1
    e: int = 1
    o: int = 1
    strided: bool = False

    def inputs(self, *, whole: bool = True) -> tuple[Tensor, Tensor, Tensor, int]:
        """Whole numbers make every sum exact."""
        g, words = generator(0, self.name), (self.p + 63) // 64
        coalitions = torch.randint(-(2**63), 2**63 - 1, (self.K, words), generator=g)
        weights = torch.randn(self.g, self.K, generator=g).double()
        values = torch.randn(self.e, self.K, self.o, generator=g).double()
        if whole:
            weights, values = (100 * weights).round(), (1000 * values).round()
        if self.strided:
            coalitions, weights = (t.T.contiguous().T for t in (coalitions, weights))
            values = values.transpose(0, 2).contiguous().transpose(0, 2)
        return coalitions, weights, values, self.p


CASES = (
    Case("tiny", 1, 1),
    Case("no_coalitions", 0, 5, e=2, o=2),
    Case("no_explicands", 3, 5, e=0),
    Case("no_outputs", 3, 5, e=2, o=0),
    Case("one_byte", 40, 8, o=3),
    Case("usual", 300, 30),
    Case("shared", 70, 30, e=50),
    Case("own_weights", 70, 25, g=9, e=9, o=4),
    Case("one_group", 65, 32, o=9),
    Case("just_over_a_group", 65, 33, g=2, e=2),
    Case("just_under_a_word", 64, 63, o=2),
    Case("one_word", 64, 64, o=17),
    Case("just_over_a_word", 130, 65, o=33),
    Case("several_words", 77, 200, g=2, e=2, o=20),
    Case("two_segments", 8200, 9, g=2, e=2, o=1),
    Case("strided", 90, 70, g=3, e=3, o=2, strided=True),
)
# Too long for the interpreter, where every coalition of every tile of 32 players takes a
# millisecond. Those below have parts, words and tiles enough for Triton.
LONG = ("two_segments", "just_over_a_word", "several_words", "shared", "strided")
INTERPRETED = (
    Case("just_over_a_word_short", 13, 65, o=33),
    Case("several_words_short", 9, 200, g=2, e=2, o=20),
    Case("strided_short", 11, 70, g=3, e=3, o=2, strided=True),
    Case("shared_short", 7, 30, e=50),
)
every_case = pytest.mark.parametrize("case", [*CASES, *INTERPRETED], ids=lambda case: case.name)


def through_the_design_matrix(
    coalitions: Tensor, weights: Tensor, values: Tensor, p: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The formulas in `dtype`, int64 for sums without rounding; bits through Python's integers."""
    rows = [
        [1] + [coalition[j // 64] % 2**64 >> j % 64 & 1 for j in range(p)]
        for coalition in coalitions.tolist()
    ]
    z = torch.tensor(rows, dtype=dtype).reshape(len(rows), p + 1)
    gram = torch.stack([(z * w[:, None]).T @ z for w in weights.to(dtype)])
    w = weights.to(dtype).expand(values.shape[0], -1)
    return gram, z.T @ (w[:, :, None] * values.to(dtype))


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """torch.set_num_threads, undone afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@on_every_backend
def test_it_agrees_with_numbers_worked_by_hand(backend: str) -> None:
    coalitions = torch.tensor([[0b011], [0b100], [0b111]])
    weights = torch.tensor([[1.0, 2.0, 4.0]]).double()
    values = torch.tensor([[[1.0], [10.0], [100.0]], [[1.0], [0.0], [-1.0]]]).double()
    with use_backend(backend):
        gram, moments = coalition_gram(coalitions, weights, values, p=3)
    assert gram.tolist() == [
        [
            [7.0, 5.0, 5.0, 6.0],
            [5.0, 5.0, 5.0, 4.0],
            [5.0, 5.0, 5.0, 4.0],
            [6.0, 4.0, 4.0, 6.0],
        ]
    ]
    assert moments[..., 0].tolist() == [[421.0, 401.0, 401.0, 420.0], [-3.0, -3.0, -3.0, -4.0]]


@on_every_backend
def test_each_explicand_may_bring_its_own_weights(backend: str) -> None:
    coalitions = torch.tensor([[0b1], [0b0]])
    weights = torch.tensor([[1.0, 3.0], [5.0, 0.0]]).double()
    values = torch.tensor([[[2.0, 1.0], [4.0, 1.0]], [[3.0, 1.0], [9.0, 1.0]]]).double()
    with use_backend(backend):
        gram, moments = coalition_gram(coalitions, weights, values, p=1)
    assert gram.tolist() == [[[4.0, 1.0], [1.0, 1.0]], [[5.0, 5.0], [5.0, 5.0]]]
    assert moments.tolist() == [[[14.0, 4.0], [2.0, 1.0]], [[15.0, 5.0], [15.0, 5.0]]]


@every_case
@on_every_backend
def test_whole_numbers_are_summed_exactly(backend: str, case: Case) -> None:
    if case.name in LONG:
        skip_if_interpreted(backend, "takes minutes for it; a GPU takes it")
    inputs = case.inputs()
    with use_backend(backend):
        gram, moments = coalition_gram(*inputs)
    exact = through_the_design_matrix(*inputs, torch.int64)
    assert torch.equal(gram, exact[0].double())
    assert torch.equal(moments, exact[1].double())


@on_every_backend
def test_any_numbers_are_summed_to_float64_rounding(backend: str) -> None:
    for case in (*CASES, *INTERPRETED):
        if case.e == 0 or (interpreted(backend) and case.name in LONG):
            continue
        coalitions, weights, values, p = case.inputs(whole=False)
        with use_backend(backend):
            got = coalition_gram(coalitions, weights, values, p)
        assert torch.equal(got[0], got[0].mT)
        exact = through_the_design_matrix(coalitions, weights, values, p, torch.float64)
        size = through_the_design_matrix(
            coalitions, weights.abs(), values.abs(), p, torch.float64
        )  # of what is summed
        for mine, sums, large in zip(got, exact, size, strict=True):
            assert ((mine - sums).abs() <= 4e-15 * large).all(), case.name


@needs_extension
@pytest.mark.parametrize("level", level_parameters())
def test_every_level_gives_the_same_bits(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for case in CASES:
        inputs, answers = case.inputs(whole=False), []
        for name in (level, "generic"):
            monkeypatch.setenv("MICROTOME_CPU_ISA", name)
            assert _native.isa() == name
            with use_backend("cpu"):
                answers.append(coalition_gram(*inputs))
        assert torch.equal(answers[0][0], answers[1][0]), case.name
        assert torch.equal(answers[0][1], answers[1][1]), case.name


@needs_extension
@pytest.mark.parametrize(
    "case",
    [
        Case("coalitions_shared", 30000, 30, o=2),
        Case("explicands_shared", 2500, 40, g=30, e=30),
        Case("tiles_shared", 2000, 150, e=3, o=40),
        Case("in_batches", 60000, 34, g=30, e=30),
    ],
    ids=lambda case: case.name,
)
def test_one_two_and_three_threads_give_the_same_bits(
    case: Case, threads: Callable[[int], None]
) -> None:
    inputs, answers = case.inputs(whole=False), []
    for count in (1, 2, 3):
        threads(count)
        with use_backend("cpu"):
            answers.append(coalition_gram(*inputs))
    for other in answers[1:]:
        assert torch.equal(answers[0][0], other[0])
        assert torch.equal(answers[0][1], other[1])


@on_every_backend
def test_a_weighted_fit_recovers_the_game_that_is_a_sum_of_players(backend: str) -> None:
    coalitions, weights, _, p = Case("fit", 100, 40).inputs(whole=False)
    player, g = torch.arange(p), generator(0, "fit")
    z = (coalitions[:, player // 64] >> (player % 64) & 1).double()
    phi = torch.randn(p, 2, generator=g).double()
    with use_backend(backend):
        gram, moments = coalition_gram(coalitions, weights.abs(), (3 + z @ phi)[None], p)
    fit = torch.linalg.solve(gram[0], moments[0])
    torch.testing.assert_close(fit[0], torch.full((2,), 3.0).double())
    torch.testing.assert_close(fit[1:], phi)


@on_every_backend
def test_nan_reaches_the_players_of_its_coalition_and_its_own_output(backend: str) -> None:
    coalitions, weights, values, p = Case("nan", 50, 40, o=2).inputs()
    values[0, 7, 1] = torch.nan
    with use_backend(backend):
        gram, moments = coalition_gram(coalitions, weights, values, p)
    members = (coalitions[7] >> torch.arange(p)) & 1 == 1
    assert gram.isfinite().all()
    assert moments[0, 0, 1].isnan()
    assert moments[0, 1:, 1][members].isnan().all()
    assert moments[0, :, 0].isfinite().all()


@on_every_backend
def test_it_passes_opcheck_contiguous_or_not(backend: str) -> None:
    with use_backend(backend):
        for case in (Case("own", 5, 3, 2, 2, 2), Case("strided", 6, 9, 3, 3, 2, strided=True)):
            torch.library.opcheck(_gram.torch_op, case.inputs())


@on_every_backend
def test_a_compiled_graph_answers_as_an_eager_one_does(backend: str) -> None:
    inputs = CASES[4].inputs()
    compiled = torch.compile(coalition_gram, fullgraph=True, backend="aot_eager")
    with use_backend(backend):
        for got, expected in zip(compiled(*inputs), coalition_gram(*inputs), strict=True):
            assert torch.equal(got, expected)


GOOD = {
    "coalitions": torch.zeros(4, 2, dtype=torch.int64),
    "weights": torch.ones(3, 4).double(),
    "values": torch.ones(3, 4, 1).double(),
    "p": 65,
}


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (
            {"p": 0},
            errors.ArgumentError,
            "p must be between 1 and 1048576, got p=0.",
        ),
        (
            {"p": 64},
            errors.ShapeError,
            "coalitions must be [K, w] with w = ceil(p / 64) = 1 for p=64, got shape [4, 2].",
        ),
        (
            {"weights": torch.ones(3, 5).double()},
            errors.ShapeError,
            "weights must be [g, K] with K=4 as in coalitions, got shape [3, 5].",
        ),
        (
            {"weights": torch.ones(2, 4).double()},
            errors.ShapeError,
            "weights must be [1, K], or [e, K] with e=3 as in values, got shape [2, 4].",
        ),
        (
            {"values": torch.ones(3, 4).double()},
            errors.ShapeError,
            "values must be [e, K, o], got shape [3, 4].",
        ),
        (
            {"coalitions": torch.zeros(4, 2, dtype=torch.int32)},
            errors.DtypeError,
            "coalitions must be int64, got int32. Cast it with .to().",
        ),
        (
            {"values": torch.ones(3, 4, 1)},
            errors.DtypeError,
            "values must be float64, got float32. Cast it with .to().",
        ),
        (
            {"weights": torch.ones(3, 4, device="meta").double()},
            errors.DeviceError,
            "all tensors must lie on one device, got coalitions [4, 2] on cpu, weights "
            "[3, 4] on meta, values [3, 4, 1] on cpu. Load weights on cpu (meta tensors hold no "
            "data).",
        ),
    ],
)
def test_what_does_not_fit_is_named(
    change: dict[str, object], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=f"^coalition_gram: {re.escape(text)}$"):
        coalition_gram(**{**GOOD, **change})


def test_the_example_of_the_docstring_holds() -> None:
    assert doctest.testmod(importlib.import_module("microtome.ops.coalition_gram")).failed == 0
