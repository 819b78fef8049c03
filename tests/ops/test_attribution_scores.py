"""attribution_scores: by hand, then every backend against float64, and its edges."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from microtome import _native, errors
from microtome._seed import generator
from microtome.ops import attribution_scores, use_backend
from microtome.ops.attribution_scores import _scores
from microtome.testing import assert_accurate, backends_of

on_every_backend = pytest.mark.parametrize("backend", backends_of(_scores))
on_native_backends = pytest.mark.parametrize("backend", backends_of(_scores)[:-1])
needs_extension = pytest.mark.skipif(
    _native.why_absent() is not None, reason="the extension is absent"
)
both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


@dataclass(frozen=True)
class Case:
    """n rows of units * width columns; a third of the rows and of the columns do not differ."""

    name: str
    n: int
    units: int
    width: int
    strided: bool = False

    def inputs(self, dtype: torch.dtype = torch.float32) -> list[Tensor]:
        g = generator(0, self.name)
        shape = (self.n, self.units * self.width)
        source, base, grad = (torch.randn(shape, generator=g).to(dtype) for _ in range(3))
        source[::3], source[:, ::3] = base[::3], base[:, ::3]
        if self.strided:  # the middle third of wider rows, and rows whose columns lie apart
            source, base = (
                torch.cat([x, x, x], 1)[:, shape[1] : 2 * shape[1]] for x in (source, base)
            )
            grad = grad.t().contiguous().t()
        return [source, base, grad]


CASES = (
    Case("tiny", 1, 1, 1),
    Case("one_row", 1, 1, 19),
    Case("heads", 7, 4, 16),
    Case("odd", 13, 3, 33),
    Case("columns", 6, 37, 1),
    Case("empty", 0, 2, 8),
    Case("no_columns", 3, 1, 0),
    Case("strided", 9, 2, 21, strided=True),
    Case("strided_columns", 4, 18, 1, strided=True),
    Case("several_threads", 300, 5, 64),
)
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """torch.set_num_threads, undone afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def plain(inputs: list[Tensor], units: int) -> tuple[Tensor, Tensor]:
    source, base, grad = (x if x.dtype == torch.float64 else x.float() for x in inputs)
    parts = [((source - base) * grad).chunk(units, 1), (source != base).chunk(units, 1)]
    return (
        torch.stack([part.sum(1) for part in parts[0]], 1),
        torch.stack([part.any(1) for part in parts[1]], 1),
    )


@on_every_backend
def test_it_agrees_with_numbers_worked_by_hand(backend: str) -> None:
    source = torch.tensor([[1.0, 2.0, 5.0, 4.0], [0.0, -0.0, 7.0, 1.0]])
    base = torch.tensor([[0.0, 4.0, 2.0, 4.0], [0.0, 0.0, 6.0, 2.0]])
    grad = torch.tensor([[10.0, 1.0, 2.0, 99.0], [5.0, 5.0, 3.0, 3.0]])
    with use_backend(backend):
        pairs, one, columns = (attribution_scores(source, base, grad, u) for u in (2, 1, 4))
    # Row 0: 10 - 2 and 6 + 0. Row 1: 0 (zero and minus zero are equal) and 3 - 3, which differ.
    assert pairs[0].tolist() == [[8.0, 6.0], [0.0, 0.0]]
    assert pairs[1].tolist() == [[True, True], [False, True]]
    assert one[0].tolist() == [[14.0], [0.0]]
    assert one[1].tolist() == [[True], [True]]
    assert columns[0].tolist() == [[10.0, -2.0, 6.0, 0.0], [0.0, 0.0, 3.0, -3.0]]
    assert columns[1].tolist() == [[True, True, True, False], [False, False, True, True]]


@every_case
@both_dtypes
@on_native_backends
def test_every_backend_is_as_accurate_as_plain_pytorch(
    backend: str, case: Case, dtype: torch.dtype
) -> None:
    inputs = case.inputs(dtype)
    with use_backend(backend):
        scores, changed = attribution_scores(*inputs, case.units)
    usual, exact = plain(inputs, case.units), plain([x.double() for x in inputs], case.units)
    assert_accurate(scores, usual[0], exact[0])
    assert torch.equal(changed, exact[1])


@every_case
def test_the_reference_is_the_formula(case: Case) -> None:
    inputs = [x.double() for x in case.inputs()]
    scores, changed = attribution_scores(*inputs, case.units)
    torch.testing.assert_close(scores, plain(inputs, case.units)[0])
    assert torch.equal(changed, plain(inputs, case.units)[1])


@on_every_backend
def test_nan_and_infinity_pass_through_and_count_as_different(backend: str) -> None:
    nan, inf = float("nan"), float("inf")
    source, base = torch.tensor([[nan, inf, inf, 1.0]] * 2).T, torch.tensor([[1.0] * 4] * 2).T
    base[2] = inf
    with use_backend(backend):
        for units in (1, 2):
            scores, changed = attribution_scores(source, base, torch.ones(4, 2), units)
            assert scores[0].isnan().all()
            assert (scores[1] == inf).all()
            assert scores[2].isnan().all()  # infinity less infinity
            assert (scores[3] == 0).all()
            assert changed[:, 0].tolist() == [True, True, False, False]


@on_every_backend
def test_it_passes_opcheck_contiguous_or_not(backend: str) -> None:
    with use_backend(backend):
        for name in ("heads", "strided", "columns"):
            case = next(case for case in CASES if case.name == name)
            torch.library.opcheck(_scores.torch_op, (*case.inputs(), case.units))


@needs_extension
@both_dtypes
def test_one_and_two_threads_give_the_same_bits(
    dtype: torch.dtype, threads: Callable[[int], None]
) -> None:
    case = CASES[-1]
    answers = []
    for count in (1, 2, 3):
        threads(count)
        with use_backend("cpu"):
            answers.append(attribution_scores(*case.inputs(dtype), case.units)[0])
    assert torch.equal(answers[0], answers[1])
    assert torch.equal(answers[0], answers[2])


@needs_extension
@both_dtypes
@pytest.mark.parametrize("level", ["generic", "avx2", "avx512", "amx"])
def test_instruction_sets_agree(
    level: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MICROTOME_CPU_ISA", level)
    if _native.isa() != level:
        pytest.skip(f"this processor has no {level}")
    for case in CASES:
        inputs = case.inputs(dtype)
        monkeypatch.setenv("MICROTOME_CPU_ISA", level)
        with use_backend("cpu"):
            got = attribution_scores(*inputs, case.units)
            monkeypatch.setenv("MICROTOME_CPU_ISA", "avx2")
            avx2 = attribution_scores(*inputs, case.units)
        assert torch.equal(got[1], avx2[1])
        if level == "generic":  # it has no fused multiply-add: other bits
            exact = plain([x.double() for x in inputs], case.units)[0]
            assert_accurate(got[0], plain(inputs, case.units)[0], exact, factor=4.0)
        else:
            assert torch.equal(got[0], avx2[0]), case.name


GOOD = {name: torch.ones(2, 6) for name in ("source", "base", "grad")}


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (
            {"grad": torch.ones(2, 5)},
            errors.ShapeError,
            "grad must be [n, w] with w=6 as in source, got shape [2, 5].",
        ),
        ({"units": 4}, errors.ShapeError, "units must divide the width w=6, got units=4."),
        (
            {"units": 0},
            errors.ArgumentError,
            f"units must be between 1 and {1 << 62}, got units=0.",
        ),
        (
            {"base": torch.ones(2, 6).double()},
            errors.DtypeError,
            "all weights and inputs must share one dtype, got source float32, base float64, grad "
            "float32. Cast them with .to().",
        ),
        (
            {name: torch.ones(2, 6).long() for name in GOOD},
            errors.DtypeError,
            "source must be float32, bfloat16, float16, float64, got int64. Cast it with .to().",
        ),
        (
            {"base": torch.ones(2, 6, device="meta")},
            errors.DeviceError,
            "all tensors must lie on one device, got source [2, 6] on cpu, base [2, 6] on "
            "meta, grad [2, 6] on cpu. Load base on cpu (meta tensors hold no data).",
        ),
    ],
)
def test_bad_input_is_named(change: dict[str, object], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=f"^attribution_scores: {re.escape(text)}$"):
        attribution_scores(**{**GOOD, **change})
