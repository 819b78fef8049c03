"""patch_rows: by hand, then every backend bit for bit against a loop over single numbers."""

from __future__ import annotations

import doctest
import importlib
import re
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from microtome import _native, errors
from microtome._seed import generator
from microtome.ops import ADD, REPLACE, SCALE, ZERO, patch_rows, use_backend
from microtome.ops.patch_rows import _patch
from microtome.testing import backends_of

on_every_backend = pytest.mark.parametrize("backend", backends_of(_patch))


@dataclass(frozen=True)
class Case:
    """b runs of t tokens of width w; n rows; m entries; sources of width w_s."""

    name: str
    b: int
    t: int
    w: int
    n: int
    m: int
    w_s: int
    strided: bool = False

    def inputs(self, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        g = generator(0, self.name)
        pick = lambda high, size: torch.randint(0, high, (size,), generator=g)  # noqa: E731
        b, t, w, n, m = self.b, self.t, self.w, self.n, self.m
        start = pick(t, n)
        stop = start + 1 + (torch.rand(n, generator=g) * (t - start)).long()
        rows = torch.stack([pick(b, n), start, stop], 1)
        of = pick(n, m)
        position = start[of] + (torch.rand(m, generator=g) * (stop - start)[of]).long()
        lo = pick(w, m)
        widest = w if self.w_s == w else self.w_s
        hi = torch.minimum(lo + pick(widest + 1, m), torch.tensor(w))
        table = torch.stack([of, position, lo, hi, pick(5, m), pick(4, m)], 1)
        table[table[:, 5] >= ZERO, 4] = -1
        base, sources = torch.randn(b, t, w, generator=g), torch.randn(5, self.w_s, generator=g)
        if self.strided:
            base = torch.cat([base, base], 2).transpose(0, 1).contiguous().transpose(0, 1)[..., :w]
            sources = torch.cat([sources, sources], 1)[:, : self.w_s]
        return {
            "base": base.to(dtype),
            "sources": sources.to(dtype),
            "rows": rows.int(),
            "table": table.int(),
            "factors": torch.randn(m, generator=g).to(dtype),
        }


CASES = (
    Case("tiny", 1, 1, 1, 1, 1, 1),
    Case("whole_width", 2, 9, 64, 12, 20, 64),
    Case("slices", 2, 9, 70, 12, 60, 13),
    Case("same_token", 1, 1, 40, 2, 50, 40),
    Case("strided", 3, 7, 33, 10, 30, 33, strided=True),
    Case("no_entries", 2, 5, 16, 4, 0, 16),
    Case("many_rows", 2, 30, 24, 100, 400, 7),
)
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def number_by_number(inputs: dict[str, Tensor]) -> Tensor:
    """Every number of the answer on its own, over tensors of no dimension."""
    base, sources = inputs["base"], inputs["sources"]
    rows, table = inputs["rows"].tolist(), inputs["table"].tolist()
    out, token = [base.new_empty(0, base.shape[2])], {}
    for r, (example, start, stop) in enumerate(rows):
        for position in range(start, stop):
            token[r, position] = len(out)
            out.append(base[example, position][None].clone())
    for (row, position, lo, hi, source, op), factor in zip(table, inputs["factors"], strict=True):
        for c in range(lo, hi):
            cell = out[token[row, position]][0]
            src = sources[source, c if sources.shape[1] == base.shape[2] else c - lo]
            new = (factor * src, cell[c] + factor * src, cell[c] * 0, cell[c] * factor)
            cell[c] = 0.0 if op == ZERO else new[op]
    return torch.cat(out)


@on_every_backend
def test_it_agrees_with_numbers_worked_by_hand(backend: str) -> None:
    base = torch.tensor([[[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], [[7.0, 8.0, 9.0], [-1.0, -2.0, -3.0]]])
    sources = torch.tensor([[10.0, 20.0, 30.0], [100.0, 200.0, 300.0]])
    rows = torch.tensor([[0, 0, 2], [1, 1, 2]], dtype=torch.int32)
    table = [
        [0, 1, 0, 2, 1, REPLACE],  # 4 5 6 -> 50 100 6
        [1, 1, 1, 3, 0, ADD],  # -1 -2 -3 -> -1 38 57
        [0, 0, 1, 2, -1, ZERO],  # 1 2 3 -> 1 0 3
        [0, 1, 1, 3, -1, SCALE],  # 50 100 6 -> 50 -100 -6
        [1, 1, 2, 2, 0, REPLACE],  # no columns
    ]
    factors = torch.tensor([0.5, 2.0, 9.0, -1.0, 1.0])
    expected = [[1.0, 0.0, 3.0], [50.0, -100.0, -6.0], [-1.0, 38.0, 57.0]]
    with use_backend(backend):
        got = patch_rows(base, sources, rows, torch.tensor(table, dtype=torch.int32), factors)
    assert got.tolist() == expected


@on_every_backend
def test_narrow_sources_are_counted_from_the_first_column_patched(backend: str) -> None:
    table = torch.tensor([[0, 0, 2, 4, 1, REPLACE]], dtype=torch.int32)
    with use_backend(backend):
        got = patch_rows(
            torch.zeros(1, 1, 5),
            torch.tensor([[1.0, 2.0], [3.0, 4.0]]),
            torch.tensor([[0, 0, 1]], dtype=torch.int32),
            table,
            torch.ones(1),
        )
    assert got.tolist() == [[0.0, 0.0, 3.0, 4.0, 0.0]]


@every_case
@on_every_backend
def test_every_backend_gives_the_bits_of_the_formula(backend: str, case: Case) -> None:
    inputs = case.inputs()
    with use_backend(backend):
        got = patch_rows(**inputs)
        wide = patch_rows(**{**inputs, "rows": inputs["rows"].long()}, total=len(got))
    assert torch.equal(got, number_by_number(inputs))
    assert torch.equal(wide, got)


@on_every_backend
def test_zero_times_a_value_that_is_not_finite_is_zero_only_for_zero(backend: str) -> None:
    base = torch.tensor([[[torch.inf, torch.inf]]])
    rows = torch.tensor([[0, 0, 1]], dtype=torch.int32)
    table = torch.tensor([[0, 0, 0, 1, -1, ZERO], [0, 0, 1, 2, -1, SCALE]], dtype=torch.int32)
    with use_backend(backend):
        got = patch_rows(base, torch.empty(0, 2), rows, table, torch.zeros(2))
    assert (
        got[
            0,
            0,
        ].item()
        == 0.0
    )
    assert got[0, 1].isnan()


@on_every_backend
def test_no_rows_and_empty_rows_give_no_tokens(backend: str) -> None:
    none = torch.empty(0, 6, dtype=torch.int32)
    with use_backend(backend):
        for rows in (torch.empty(0, 3), torch.tensor([[1, 2, 2], [0, 4, 4]])):
            got = patch_rows(
                torch.ones(2, 4, 3), torch.empty(0, 3), rows.int(), none, torch.empty(0)
            )
            assert got.shape == (0, 3)


@on_every_backend
@pytest.mark.parametrize("name", ["slices", "strided"])
def test_it_passes_opcheck_contiguous_or_not(backend: str, name: str) -> None:
    inputs = next(case for case in CASES if case.name == name).inputs()
    total = int((inputs["rows"][:, 2] - inputs["rows"][:, 1]).sum())
    with use_backend(backend):
        torch.library.opcheck(_patch.torch_op, (*inputs.values(), total))


@on_every_backend
def test_a_compiled_graph_answers_as_an_eager_one_does(backend: str) -> None:
    inputs = CASES[2].inputs()
    compiled = torch.compile(patch_rows, fullgraph=True, backend="aot_eager")
    with use_backend(backend):
        usual = patch_rows(**inputs)
        assert torch.equal(compiled(**inputs, total=len(usual)), usual)


@pytest.mark.skipif(_native.why_absent() is not None, reason="the extension is absent")
def test_one_two_and_three_threads_give_the_same_bits() -> None:
    g = generator(0, "threads")
    rows = torch.tensor([[0, 0, 40], [0, 13, 14], [0, 39, 40], [0, 0, 40]], dtype=torch.int32)
    table = torch.tensor([[3, p, 0, 2048, 0, p % 4] for p in range(40)], dtype=torch.int32)
    base, sources = torch.randn(1, 40, 2048, generator=g), torch.randn(1, 2048, generator=g)
    before, answers = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            with use_backend("cpu"):
                answers.append(patch_rows(base, sources, rows, table, torch.full((40,), 0.5)))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(answers[0], answers[1])
    assert torch.equal(answers[0], answers[2])
    assert torch.equal(answers[0][42:82:4], (0.5 * sources).expand(10, -1))


GOOD = {
    "base": torch.ones(2, 4, 6),
    "sources": torch.ones(3, 2),
    "rows": torch.tensor([[1, 1, 3]], dtype=torch.int32),
    "table": torch.tensor([[0, 2, 0, 2, 1, ADD]], dtype=torch.int32),
    "factors": torch.ones(1),
}
ROW = "row 0 of rows (example, start, stop) is"
ENTRY = "entry 0 of table (row, position, lo, hi, source, op) is"


@on_every_backend
@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("rows", [2, 1, 3], f"{ROW} [2, 1, 3]: example must lie in [0, b=2)."),
        ("rows", [1, 3, 2], f"{ROW} [1, 3, 2]: 0 <= start <= stop <= t=4 must hold."),
        ("rows", [1, 1, 5], f"{ROW} [1, 1, 5]: 0 <= start <= stop <= t=4 must hold."),
        ("table", [1, 2, 0, 2, 1, 1], f"{ENTRY} [1, 2, 0, 2, 1, 1]: row must lie in [0, n=1)."),
        (
            "table",
            [0, 3, 0, 2, 1, 1],
            f"{ENTRY} [0, 3, 0, 2, 1, 1]: position must lie in the row's [start=1, stop=3).",
        ),
        (
            "table",
            [0, 2, 5, 7, 1, 1],
            f"{ENTRY} [0, 2, 5, 7, 1, 1]: 0 <= lo <= hi <= w=6 must hold.",
        ),
        (
            "table",
            [0, 2, 0, 2, 1, 4],
            f"{ENTRY} [0, 2, 0, 2, 1, 4]: op must be REPLACE=0, ADD=1, ZERO=2 or SCALE=3.",
        ),
        (
            "table",
            [0, 2, 0, 2, 3, 0],
            f"{ENTRY} [0, 2, 0, 2, 3, 0]: source must lie in [0, S=3).",
        ),
        (
            "table",
            [0, 2, 0, 3, 1, 1],
            f"{ENTRY} [0, 2, 0, 3, 1, 1]: hi - lo must be at most the width w_s=2 of the sources.",
        ),
        ("total", 3, "total must be the sum of stop - start=2, got 3."),
    ],
)
def test_what_lies_outside_its_tensors_is_named(
    backend: str, name: str, value: object, text: str
) -> None:
    if name != "total":
        value = torch.tensor([value], dtype=torch.int32)
    with (
        use_backend(backend),
        pytest.raises(errors.ArgumentError, match=f"^patch_rows: {re.escape(text)}$"),
    ):
        patch_rows(**{**GOOD, name: value})


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (
            {"base": torch.ones(2, 4)},
            errors.ShapeError,
            "patch_rows: base must be [b, t, w], got shape [2, 4].",
        ),
        (
            {"factors": torch.ones(2)},
            errors.ShapeError,
            "patch_rows: factors must be [m] with m=1 as in table, got shape [2].",
        ),
        (
            {"table": torch.ones(1, 5, dtype=torch.int32)},
            errors.ShapeError,
            "patch_rows: table must be [m, 6] = (row, position, lo, hi, source, op), "
            "got shape [1, 5].",
        ),
        (
            {"sources": torch.ones(3, 2).double()},
            errors.DtypeError,
            "patch_rows: all weights and inputs must share one dtype, got base float32, sources "
            "float64, factors float32. Cast them with .to().",
        ),
        (
            {"rows": torch.ones(1, 3)},
            errors.DtypeError,
            "patch_rows: rows must be int32, int64, got float32. Cast it with .to().",
        ),
    ],
)
def test_what_does_not_fit_is_named(
    change: dict[str, Tensor], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=f"^{re.escape(text)}$"):
        patch_rows(**{**GOOD, **change})


def test_the_examples_of_the_docstrings_hold() -> None:
    assert doctest.testmod(importlib.import_module("microtome.ops.patch_rows")).failed == 0
