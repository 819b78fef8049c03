"""coalition_inputs in Triton: the reference's bits for every dtype, at awkward sizes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from microtome import errors
from microtome._seed import generator
from microtome.ops import coalition_inputs, use_backend
from microtome.ops.coalition_inputs import _DTYPES, coalition_inputs_reference
from microtome.testing.triton import DEVICE, MARKS, RUNS

pytestmark = MARKS
if RUNS:
    kernel = pytest.importorskip("microtome.kernels.coalition_inputs")
    triton = pytest.importorskip("triton")
    tl = triton.language

SIZES = [(1, 1, 1), (50, 7, 7), (3, 513, 9), (0, 5, 5), (4, 0, 0), (300, 30, 4)]


def tables(R: int, m: int, p: int, grouped: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """5 orders of p players, R rows of 3 explicands and 4 background rows, and players."""
    g = generator(0, f"{R} {m} {p}")
    ranks = torch.rand(5, p, generator=g).argsort(-1).int()
    lo, hi = torch.randint(0, p + 1, (2, R), generator=g).sort(0).values
    picks = [torch.randint(0, most, (R,), generator=g) for most in (3, 4, 5)]
    rows = torch.stack([*picks, lo, hi], 1).int()
    player = torch.randint(-1, max(p, 1), (m,), generator=g).int() if grouped else None
    if player is not None and p == 0:
        player = player.clamp(max=-1)
    return ranks, rows, player


def numbers(shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Random bits: NaNs of every payload among the floats."""
    g = generator(0, str(shape))
    if dtype == torch.bool:
        return torch.rand(shape, generator=g) < 0.5
    out = torch.empty(shape, dtype=dtype)
    if out.numel():
        out.view(torch.uint8).random_(generator=g)
    return out


def put(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.to(DEVICE) for t in tensors]


def same_bits(a: Tensor, b: Tensor) -> bool:
    bits = torch.uint8 if a.numel() else a.dtype
    return a.dtype == b.dtype and torch.equal(a.view(bits), b.view(bits))


@pytest.mark.parametrize("dtype", _DTYPES, ids=str)
def test_every_dtype_moves_bit_for_bit_nan_included(dtype: torch.dtype) -> None:
    x, background = put(numbers((3, 30), dtype), numbers((4, 30), dtype))
    for grouped in (False, True):
        ranks, rows, player = put(*tables(40, 30, 30, grouped))
        got = kernel.launch(x, background, ranks, rows, player)
        assert same_bits(got, coalition_inputs_reference(x, background, ranks, rows, player))


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_awkward_sizes_agree_with_the_reference(size: tuple[int, int, int]) -> None:
    R, m, p = size
    x, background = put(numbers((3, m), torch.float32), numbers((4, m), torch.float32))
    for grouped in (False, True) if p == m else (True,):
        ranks, rows, player = put(*tables(R, m, p, grouped))
        got = kernel.launch(x, background, ranks, rows, player)
        assert same_bits(got, coalition_inputs_reference(x, background, ranks, rows, player))


def test_tables_of_64_bits_and_strided_inputs_are_taken() -> None:
    x, background = put(numbers((30, 3), torch.float64).T, numbers((30, 4), torch.float64).T)
    ranks, rows, player = put(*tables(20, 30, 11, True))
    ranks, rows, player = ranks.long().T.contiguous().T, rows.long(), player.long()
    ranks[0, 0] = 2**32 + 1  # not cut to 32 bits: never in a span
    got = kernel.launch(x, background, ranks, rows, player)
    assert same_bits(got, coalition_inputs_reference(x, background, ranks, rows, player))


def test_a_row_that_reaches_outside_is_named_before_the_kernel_runs() -> None:
    ranks, rows, _ = put(*tables(3, 4, 4, False))
    x = torch.zeros(3, 4, device=DEVICE)
    rows[1, 2] = 5
    with (
        use_backend("triton"),
        pytest.raises(errors.ArgumentError, match=r"row 1 of rows .* order must lie in \[0, q=5\)"),
    ):
        coalition_inputs(x, x, ranks, rows)


def test_numbers_beyond_two_to_the_31_have_places_of_their_own() -> None:
    @triton.jit
    def _place_kernel(out, m, BR: tl.constexpr, BC: tl.constexpr):
        row, column = kernel.place_of(tl.program_id(0) + 100_000_000, m, BR, BC)
        at = tl.program_id(0) * BR * BC + tl.arange(0, BR)[:, None] * BC + tl.arange(0, BC)[None, :]
        tl.store(out + at, row[:, None] * m + column[None, :])

    m, BR, BC = 700, 4, 512
    out = torch.empty(2, BR, BC, dtype=torch.int64, device=DEVICE)
    _place_kernel[(2,)](out, m, BR=BR, BC=BC, enable_fp_fusion=True)
    for program in range(2):
        tile = 100_000_000 + program
        row, column = tile // 2 * BR, tile % 2 * BC  # two tiles a row
        assert out[program, 0, 0] == row * m + column
        assert out[program, -1, -1] == (row + BR - 1) * m + column + BC - 1
