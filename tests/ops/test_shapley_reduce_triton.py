"""shapley_reduce in Triton: the reference's bits, at awkward sizes and with NaN."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from microtome import errors
from microtome._seed import generator
from microtome.ops import shapley_reduce, use_backend
from microtome.ops.shapley_reduce import shapley_reduce_reference
from microtome.testing.triton import DEVICE, MARKS, RUNS, SILENT

pytestmark = [*MARKS, SILENT]
if RUNS:
    kernel = pytest.importorskip("microtome.kernels.shapley_reduce")

# e, S, U, A, p, o
SIZES = [
    (1, 1, 1, 1, 1, 1),
    (2, 3, 5, 2, 7, 3),
    (1, 2, 3, 1, 300, 1),
    (3, 1, 2, 3, 5, 70),
    (0, 2, 2, 1, 3, 1),
    (2, 2, 2, 1, 3, 0),
]


def inputs(
    e: int, S: int, U: int, A: int, p: int, o: int, paired: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    g = generator(0, f"{e} {S} {U} {A} {p} {o}")
    values = torch.randn(e, S, U, A, (2 * p if paired else p) + 1, o, generator=g, dtype=dtype)
    ranks = torch.rand(S, U, A, p, generator=g).argsort(-1).int()
    return values.to(DEVICE), ranks.to(DEVICE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("paired", [False, True], ids=["forward", "paired"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_it_gives_the_bits_of_the_reference(
    size: tuple[int, int, int, int, int, int], paired: bool, dtype: torch.dtype
) -> None:
    values, ranks = inputs(*size, paired, dtype)
    got = kernel.launch(values, ranks, paired)
    expected = shapley_reduce_reference(values, ranks, paired)
    assert all(map(torch.equal, got, expected))


@pytest.mark.parametrize("paired", [False, True], ids=["forward", "paired"])
def test_nan_and_infinity_reach_the_players_that_read_them(paired: bool) -> None:
    values, ranks = inputs(2, 2, 3, 1, 9, 2, paired, torch.float32)
    values[0, 1, 2, 0, 4, 1] = torch.nan
    values[1, 0, 0, 0, 0] = torch.inf
    got = kernel.launch(values, ranks.long(), paired)
    for mine, expected in zip(got, shapley_reduce_reference(values, ranks, paired), strict=True):
        assert torch.equal(mine.isfinite(), expected.isfinite())
        assert not mine.isfinite().all()
        assert torch.equal(mine.nan_to_num(), expected.nan_to_num())


def test_an_explicand_has_the_same_bits_in_any_batch() -> None:
    values, ranks = inputs(5, 3, 4, 2, 6, 2, True, torch.float32)
    mean, m2 = kernel.launch(values, ranks, True)
    for i in (0, 4):
        alone = kernel.launch(values[i : i + 1], ranks, True)
        assert torch.equal(mean[i : i + 1], alone[0])
        assert torch.equal(m2[i : i + 1], alone[1])


def test_walks_that_share_an_order_may_follow_each_other() -> None:
    values, ranks = inputs(2, 1, 3, 6, 5, 1, True, torch.float32)
    shared = ranks[:, :, ::3]  # 2 orders a unit, 3 walks each
    got = kernel.launch(values, shared, True, repeat=3)
    expected = shapley_reduce_reference(values, shared.repeat_interleave(3, 2), True)
    assert all(map(torch.equal, got, expected))


def test_a_rank_that_is_no_place_is_refused_before_the_kernel_runs() -> None:
    values, ranks = inputs(1, 1, 1, 1, 4, 1, False, torch.float32)
    ranks[..., 0] = 4
    with use_backend("triton"), pytest.raises(errors.ArgumentError, match="ranks"):
        shapley_reduce(values, ranks, paired=False)
