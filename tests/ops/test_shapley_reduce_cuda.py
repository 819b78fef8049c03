"""What is special to shapley_reduce's CUDA kernels, on a GPU or emulated: parts, tiles, order.

test_shapley_reduce.py runs them through every case beside the other backends.
"""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import Tensor

from microtome import _native
from microtome._seed import generator
from microtome.ops import shapley_reduce, use_backend
from microtome.testing.cuda import EMULATED, ORDERS, set_order

pytestmark = pytest.mark.skipif(
    not EMULATED and _native.why_no_cuda() is not None,
    reason="no CUDA kernels, compiled or emulated",
)
DEVICE = "cpu" if EMULATED else "cuda"


@pytest.fixture(autouse=True)
def _emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    if EMULATED:
        monkeypatch.setenv("MICROTOME_EMULATE_CUDA", "1")


def inputs(
    e: int, S: int, U: int, A: int, p: int, o: int, paired: bool, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, bool]:
    g = generator(U + p, "walks")
    values = torch.randn(e, S, U, A, 2 * p + 1 if paired else p + 1, o, generator=g).to(dtype)
    ranks = torch.rand(S, U, A, p, generator=g).argsort(-1).int()
    return values.to(DEVICE), ranks.to(DEVICE), paired


def answer(backend: str, arguments: tuple[Tensor, Tensor, bool]) -> tuple[Tensor, Tensor]:
    with use_backend(backend):
        mean, m2 = shapley_reduce(*arguments)
    return mean, m2


SIZES = {
    "three parts of the units": (2, 2, 300, 1, 5, 2, True),
    "orders, and a last part of one unit": (1, 1, 129, 3, 4, 1, False),
    "four players a thread": (1, 1, 3, 2, 300, 1, True),
    "eight players a thread": (1, 1, 2, 1, 2100, 1, True),
    "players in two tiles": (1, 1, 2, 1, 4100, 1, False),
    "outputs in three tiles": (1, 2, 3, 1, 70, 130, True),
    "walks that leave no room for the scales": (1, 1, 2, 1, 1515, 1, True),
    "walks that shared memory does not hold": (1, 1, 1, 1, 14200, 1, True),
}


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_every_tile_computes_the_formula(
    dtype: torch.dtype, size: tuple[int, int, int, int, int, int, bool]
) -> None:
    arguments = inputs(*size, dtype)
    got, expected = answer("cuda", arguments), answer("reference", arguments)
    for mine, exact in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, exact, rtol=1e-12, atol=1e-13)
    if size[2] <= 128:  # one part: the sums of the reference, in its order
        assert torch.equal(got[0], expected[0])


@pytest.mark.parametrize("size", [SIZES["three parts of the units"], (1, 2, 9, 2, 40, 3, True)])
def test_the_order_of_threads_and_blocks_changes_no_bit(
    size: tuple[int, int, int, int, int, int, bool],
) -> None:
    answers = []
    for order in ORDERS:
        set_order(order, 11)
        try:
            answers.append(torch.stack(answer("cuda", inputs(*size))))
        finally:
            set_order("forward")
    assert all(torch.equal(answers[0], other) for other in answers[1:])


def test_an_explicand_is_answered_alike_alone_and_among_others() -> None:
    values, ranks, paired = inputs(3, 1, 140, 1, 6, 1, True)
    whole = answer("cuda", (values, ranks, paired))
    for i in range(3):
        alone = answer("cuda", (values[i : i + 1], ranks, paired))
        assert torch.equal(alone[0][0], whole[0][i])
        assert torch.equal(alone[1][0], whole[1][i])


def test_an_offset_far_from_zero_costs_the_spread_no_digits() -> None:
    values, ranks, _ = inputs(1, 1, 200, 1, 3, 1, False, torch.float64)
    steps = 1e6 * torch.arange(4.0, dtype=torch.float64).reshape(4, 1)
    shifted = (values + steps.to(DEVICE), ranks, False)
    got, exact = answer("cuda", shifted), answer("reference", shifted)
    torch.testing.assert_close(got[1], exact[1], rtol=1e-9, atol=0)


@pytest.mark.skipif(not EMULATED, reason="a device has the shared memory it has")
@pytest.mark.parametrize("size", [(1, 1, 2, 1, 7000, 1, True), (1, 1, 2, 1, 1, 2500, True)])
def test_a_device_with_less_shared_memory_gives_the_same(
    size: tuple[int, int, int, int, int, int, bool],
) -> None:
    emulator = importlib.import_module("microtome._emulated_ext")
    arguments = inputs(*size, torch.float64)
    expected = answer("cuda", arguments)
    try:
        for compute_capability, most in {"8.0": 163, "8.9": 99}.items():
            emulator.set_most_shared(most << 10)
            got = answer("cuda", arguments)
            assert all(map(torch.equal, got, expected)), compute_capability
    finally:
        emulator.set_most_shared(227 << 10)
