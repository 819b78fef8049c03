"""coalition_inputs: by hand, then every backend bit for bit against a loop over single numbers."""

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
from microtome.ops import coalition_inputs, use_backend
from microtome.ops.coalition_inputs import _DTYPES, _inputs
from microtome.testing import backends_of, level_parameters

on_every_backend = pytest.mark.parametrize("backend", backends_of(_inputs))
needs_extension = pytest.mark.skipif(
    _native.why_absent() is not None, reason="the extension is absent"
)


@dataclass(frozen=True)
class Case:
    """R rows of m columns of p players (0: a column is a player), over q orders."""

    name: str
    R: int
    m: int
    p: int = 0
    e: int = 3
    n: int = 4
    q: int = 5
    always: bool = False  # some columns belong to nobody
    strided: bool = False

    def inputs(self, dtype: torch.dtype = torch.float32) -> dict[str, Tensor | None]:
        g = generator(0, self.name)
        pick = lambda high, *size: torch.randint(0, high, size, generator=g)  # noqa: E731
        p, R = self.p or self.m, self.R
        x, background = (pick(256, rows, self.m) for rows in (self.e, self.n))
        ranks = torch.stack([torch.randperm(p, generator=g) for _ in range(self.q)]).int()
        span = pick(p + 1, R, 2).sort(1).values
        order = pick(self.q, R).sort().values  # neighbours share one, in runs of several lengths
        rows = torch.stack([pick(self.e, R), pick(self.n, R), order, *span.unbind(1)], 1).int()
        player = None
        if self.p:
            player = (pick(p + 1, self.m) - 1 if self.always else pick(p, self.m)).int()
        x, background = (t.double().sub(128).to(dtype) for t in (x, background))
        if self.strided:  # rows apart, columns apart, and a table in column order
            x = torch.cat([x, x], 1)[:, : self.m]
            background, ranks, rows = (t.T.contiguous().T for t in (background, ranks, rows))
        return {"x": x, "background": background, "ranks": ranks, "rows": rows, "player": player}


CASES = (
    Case("tiny", 1, 1, e=1, n=1, q=1),
    Case("no_rows", 0, 7),
    Case("no_columns", 3, 0),
    Case("few_columns", 40, 5),
    Case("usual", 60, 30),
    Case("one_word", 33, 64),
    Case("just_over", 33, 65),
    Case("just_under", 20, 63),
    Case("wide", 9, 203),
    Case("groups", 50, 40, p=7),
    Case("few_players", 30, 150, p=200),
    Case("never_absent", 50, 29, p=6, always=True),
    Case("never_absent_wide", 12, 130, p=30, always=True),
    Case("several_tiles", 6, 4500, p=9, always=True),
    Case("strided", 25, 33, strided=True),
    Case("strided_groups", 25, 47, p=12, strided=True),
)
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def number_by_number(inputs: dict[str, Tensor | None]) -> list[list[float]]:
    """Every number of the answer on its own."""
    x, background, ranks, rows = (
        inputs[name].tolist() for name in ("x", "background", "ranks", "rows")
    )
    m = inputs["x"].shape[1]
    player = list(range(m)) if inputs["player"] is None else inputs["player"].tolist()
    return [
        [
            x[explicand][c]
            if player[c] < 0 or lo <= ranks[order][player[c]] < hi
            else background[behind][c]
            for c in range(m)
        ]
        for explicand, behind, order, lo, hi in rows
    ]


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """torch.set_num_threads, undone afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def int32(*rows: list[int]) -> Tensor:
    return torch.tensor(rows, dtype=torch.int32)


@on_every_backend
def test_it_agrees_with_numbers_worked_by_hand(backend: str) -> None:
    x = torch.tensor([[1.0, 2.0, 3.0], [10.0, 20.0, 30.0]])
    background = torch.tensor([[-1.0, -2.0, -3.0], [-4.0, -5.0, -6.0]])
    ranks = int32([2, 0, 1], [0, 1, 2])  # orders (1, 2, 0) and (0, 1, 2)
    rows = int32(
        [0, 0, 0, 0, 1], [1, 1, 0, 1, 3], [1, 0, 1, 2, 3], [0, 1, 1, 0, 3], [0, 1, 1, 2, 2]
    )
    with use_backend(backend):
        got = coalition_inputs(x, background, ranks, rows)
    assert got.tolist() == [
        [-1.0, 2.0, -3.0],  # player 1
        [10.0, -5.0, 30.0],  # players 2 and 0
        [-1.0, -2.0, 30.0],  # player 2
        [1.0, 2.0, 3.0],  # all
        [-4.0, -5.0, -6.0],  # none
    ]


@on_every_backend
def test_groups_of_columns_move_together_and_minus_one_is_never_absent(backend: str) -> None:
    x, background = torch.tensor([[1, 2, 3, 4, 5]]), torch.zeros(1, 5, dtype=torch.int64)
    player = torch.tensor([1, 0, -1, 1, 0], dtype=torch.int32)
    rows = int32([0, 0, 0, 0, 1], [0, 0, 0, 1, 2], [0, 0, 0, 1, 1], [0, 0, 0, 0, 2])
    with use_backend(backend):
        got = coalition_inputs(x, background, int32([1, 0]), rows, player)
    assert got.tolist() == [[1, 0, 3, 4, 0], [0, 2, 3, 0, 5], [0, 0, 3, 0, 0], [1, 2, 3, 4, 5]]


@every_case
@on_every_backend
def test_every_backend_gives_the_numbers_of_the_formula(backend: str, case: Case) -> None:
    inputs = case.inputs()
    with use_backend(backend):
        got = coalition_inputs(**inputs)
        wide = {**inputs, "rows": inputs["rows"].long(), "ranks": inputs["ranks"].long()}
        assert torch.equal(coalition_inputs(**wide), got)
    assert got.shape == (case.R, case.m)
    assert got.tolist() == number_by_number(inputs)


@pytest.mark.parametrize("dtype", _DTYPES, ids=str)
@on_every_backend
def test_every_dtype_keeps_its_values(backend: str, dtype: torch.dtype) -> None:
    for case in CASES:
        if case.name in ("few_columns", "usual", "just_over", "never_absent_wide", "strided"):
            inputs = case.inputs(dtype)
            with use_backend(backend):
                got = coalition_inputs(**inputs)
            assert got.dtype == dtype
            assert got.tolist() == number_by_number(inputs), case.name


@needs_extension
@pytest.mark.parametrize("level", level_parameters())
def test_every_level_gives_the_bits_of_the_reference(
    level: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MICROTOME_CPU_ISA", level)
    assert _native.isa() == level
    for case in CASES:
        for dtype in (torch.float32, torch.float64, torch.float16, torch.uint8):
            inputs = case.inputs(dtype)
            with use_backend("cpu"):
                got = coalition_inputs(**inputs)
            with use_backend("reference"):
                assert torch.equal(got, coalition_inputs(**inputs)), (case.name, dtype)


@on_every_backend
def test_bits_that_are_no_number_are_moved_as_they_are(backend: str) -> None:
    bits = torch.arange(0x7FC00000, 0x7FC00000 + 20, dtype=torch.int32)[None]  # NaN, each its own
    x, background = bits.view(torch.float32), (-bits).view(torch.float32)
    rows, ranks = int32([0, 0, 0, 3, 9], [0, 0, 0, 0, 20]), torch.arange(20, dtype=torch.int32)
    with use_backend(backend):
        got = coalition_inputs(x, background, ranks[None], rows)
    of_x = torch.zeros(2, 20, dtype=torch.bool)
    of_x[0, 3:9] = of_x[1] = True
    assert torch.equal(got.view(torch.int32), torch.where(of_x, bits, -bits))


@on_every_backend
def test_no_players_leave_the_columns_that_belong_to_nobody(backend: str) -> None:
    player = torch.full((3,), -1, dtype=torch.int32)
    x, ranks = torch.tensor([[1.0, 2.0, 3.0]]), torch.empty(1, 0, dtype=torch.int32)
    with use_backend(backend):
        got = coalition_inputs(x, torch.zeros(1, 3), ranks, int32([0, 0, 0, 0, 0]), player)
    assert torch.equal(got, x)


@needs_extension
def test_one_two_and_three_threads_give_the_same_bits(threads: Callable[[int], None]) -> None:
    case = Case("threads", 9000, 61, p=20, always=True)
    inputs, answers = case.inputs(), []
    bad = inputs["rows"].clone()
    bad[8000, 0] = bad[2000, 1] = bad[5000, 2] = 99
    for count in (1, 2, 3):
        threads(count)
        with use_backend("cpu"):
            answers.append(coalition_inputs(**inputs))
            with pytest.raises(errors.ArgumentError, match="row 2000 of rows"):
                coalition_inputs(**{**inputs, "rows": bad})
    assert torch.equal(answers[0], answers[1])
    assert torch.equal(answers[0], answers[2])


@on_every_backend
def test_it_passes_opcheck_contiguous_or_not(backend: str) -> None:
    with use_backend(backend):
        for name in ("usual", "never_absent", "strided_groups"):
            inputs = next(case for case in CASES if case.name == name).inputs()
            torch.library.opcheck(_inputs.torch_op, tuple(inputs.values()))


@on_every_backend
def test_a_compiled_graph_answers_as_an_eager_one_does(backend: str) -> None:
    inputs = next(case for case in CASES if case.name == "groups").inputs()
    compiled = torch.compile(coalition_inputs, fullgraph=True, backend="aot_eager")
    with use_backend(backend):
        assert torch.equal(compiled(**inputs), coalition_inputs(**inputs))


GOOD = {
    "x": torch.ones(2, 4),
    "background": torch.zeros(3, 4),
    "ranks": int32([0, 1, 2]),
    "rows": int32([0, 0, 0, 0, 1], [1, 2, 0, 1, 3]),
    "player": torch.tensor([0, 1, 2, -1], dtype=torch.int32),
}
ROW = "row 1 of rows (explicand, background, order, lo, hi) is"


@on_every_backend
@pytest.mark.parametrize(
    ("row", "text"),
    [
        ([2, 9, 0, 0, 1], "explicand must lie in [0, e=2)."),
        ([-1, 0, 0, 0, 1], "explicand must lie in [0, e=2)."),
        ([1, 3, 9, 0, 1], "background must lie in [0, n=3)."),
        ([1, 2, -1, 0, 1], "order must lie in [0, q=1)."),
        ([1, 2, 0, 2, 1], "0 <= lo <= hi <= p=3 must hold."),
        ([1, 2, 0, -1, 1], "0 <= lo <= hi <= p=3 must hold."),
        ([1, 2, 0, 0, 4], "0 <= lo <= hi <= p=3 must hold."),
    ],
)
def test_a_row_that_reaches_outside_is_named(backend: str, row: list[int], text: str) -> None:
    rows = int32([0, 0, 0, 0, 1], row, [9, 9, 9, 9, 9])
    with (
        use_backend(backend),
        pytest.raises(
            errors.ArgumentError, match=f"^coalition_inputs: {re.escape(f'{ROW} {row}: {text}')}$"
        ),
    ):
        coalition_inputs(**{**GOOD, "rows": rows})


@on_every_backend
@pytest.mark.parametrize("number", [-2, 3])
def test_a_player_that_is_not_there_is_named(backend: str, number: int) -> None:
    player = torch.tensor([0, 2, number, 99], dtype=torch.int32)
    text = f"coalition_inputs: player must lie in [-1, p=3), got {number} for column 2."
    with (
        use_backend(backend),
        pytest.raises(errors.ArgumentError, match=f"^{re.escape(text)}$"),
    ):
        coalition_inputs(**{**GOOD, "player": player})


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (
            {"background": torch.zeros(3, 5)},
            errors.ShapeError,
            "background must be [n, m] with m=4 as in x, got shape [3, 5].",
        ),
        (
            {"rows": int32([0, 0, 0, 1])},
            errors.ShapeError,
            "rows must be [R, 5] = (explicand, background, order, lo, hi), got shape [1, 4].",
        ),
        (
            {"player": None},
            errors.ShapeError,
            "ranks must be [q, p] with p=m=4 where player is None, got shape [1, 3]. Name the "
            "player of each column with player=.",
        ),
        (
            {"x": torch.ones(2, 4, dtype=torch.int16)},
            errors.DtypeError,
            "x must be float32, float64, bfloat16, float16, int64, int32, uint8, bool, got int16. "
            "Cast it with .to().",
        ),
        (
            {"x": torch.ones(2, 4).double()},
            errors.DtypeError,
            "all weights and inputs must share one dtype, got x float64, background float32. Cast "
            "them with .to().",
        ),
        (
            {"ranks": torch.zeros(1, 3)},
            errors.DtypeError,
            "ranks must be int32, int64, got float32. Cast it with .to().",
        ),
        (
            {"background": torch.zeros(3, 4, device="meta")},
            errors.DeviceError,
            "all tensors must lie on one device, got x [2, 4] on cpu, background [3, 4] "
            "on meta, ranks [1, 3] on cpu, rows [2, 5] on cpu, player [4] on cpu. Load background "
            "on cpu (meta tensors hold no data).",
        ),
    ],
)
def test_what_does_not_fit_is_named(
    change: dict[str, object], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=f"^coalition_inputs: {re.escape(text)}$"):
        coalition_inputs(**{**GOOD, **change})


def test_the_example_of_the_docstring_holds() -> None:
    assert doctest.testmod(importlib.import_module("microtome.ops.coalition_inputs")).failed == 0
