"""The CUDA candidate select, on a GPU or emulated, against a sort in plain PyTorch."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from microtome.kernels import topk_select_cuda as cuda
from torch import Tensor

from microtome import _native
from microtome._seed import generator
from microtome.testing import assert_accurate
from microtome.testing.cuda import EMULATED, ORDERS, set_order

pytestmark = pytest.mark.skipif(
    not EMULATED and _native.why_no_cuda() is not None,
    reason="no CUDA kernels, compiled or emulated",
)
DEVICE = "cpu" if EMULATED else "cuda"
INF = float("inf")


@pytest.fixture(autouse=True)
def _emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    if EMULATED:
        monkeypatch.setenv("MICROTOME_EMULATE_CUDA", "1")


@dataclass
class Lists:
    theta: Tensor
    count: Tensor
    index: Tensor
    value: Tensor
    failed: Tensor
    failures: Tensor


def lists_of(rows: list[list[tuple[float, int]]], capacity: int, theta: float = -INF) -> Lists:
    """Lists of (value, index) pairs; a row may be longer than the capacity holds."""
    n = len(rows)
    index = torch.full((n, capacity), 2**31 - 1, dtype=torch.int32)
    value = torch.full((n, capacity), torch.nan)
    for i, row in enumerate(rows):
        for j, (v, g) in enumerate(row[:capacity]):
            value[i, j], index[i, j] = v, g
    count = torch.tensor([len(row) for row in rows], dtype=torch.int32)
    made = (torch.full((n,), theta), count, index, value,
            torch.full((n,), -7, dtype=torch.int32), torch.zeros(1, dtype=torch.int32))  # fmt: skip
    return Lists(*(t.to(DEVICE) for t in made))


def selected(
    lists: Lists, k: int, dtype: torch.dtype = torch.float32, listed: bool = False
) -> tuple[Tensor, Tensor, Tensor, list[int]]:
    """values, indices, candidates and the failed rows, sorted."""
    n = lists.count.shape[0]
    values = torch.full((n, k), torch.nan, dtype=dtype, device=DEVICE)
    indices = torch.full((n, k), -9, dtype=torch.int32, device=DEVICE)
    candidates = torch.full((n,), -9, dtype=torch.int32, device=DEVICE)
    cuda.select(lists, k, 10**6, values, indices, candidates, listed=listed)
    failed = lists.failed[: int(lists.failures)].sort().values.tolist()
    return values.cpu(), indices.cpu(), candidates.cpu(), failed


def random_row(m: int, seed: int, ties: bool = False) -> list[tuple[float, int]]:
    g = generator(seed, "select")
    v = torch.randint(-3, 3, (m,), generator=g).float() if ties else torch.randn(m, generator=g)
    at = torch.randperm(4 * m + 1, generator=g)[:m]
    return list(zip(v.tolist(), at.tolist(), strict=True))


def best(row: list[tuple[float, int]], k: int) -> list[tuple[float, int]]:
    return sorted(row, key=lambda pair: (-pair[0], pair[1]))[:k]


def test_the_order_is_the_one_worked_by_hand() -> None:
    row = [(1.0, 7), (2.0, 9), (1.0, 3), (0.0, 5), (-0.0, 4), (-INF, 0), (3.0, 2**31 - 2)]
    values, indices, candidates, failed = selected(lists_of([row], 16), 7)
    assert values.tolist() == [[3.0, 2.0, 1.0, 1.0, 0.0, 0.0, -INF]]
    assert values[0].signbit().tolist() == [False] * 4 + [True, False, True]
    assert indices.tolist() == [[2**31 - 2, 9, 3, 7, 4, 5, 0]]
    assert candidates.tolist() == [6]  # -inf stands for what was not computed
    assert failed == []


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    ("k", "capacity", "counts", "ties"),
    [
        (1, 1, (1, 1), False),
        (3, 8, (3, 4, 8), True),
        (5, 64, (5, 16, 17, 64), True),  # both sides of what is sorted whole
        (32, 300, (65, 300), False),
        (64, 700, (129, 700), True),
        (130, 600, (513, 600), False),
        (130, 5600, (514,), False),  # 47.75 KiB of keys: less than a block has, but for the rest
    ],
)
def test_every_row_gets_its_k_best_in_order(
    order: str, k: int, capacity: int, counts: tuple[int, ...], ties: bool
) -> None:
    rows = [random_row(m, i, ties) for i, m in enumerate(counts)]
    set_order(order)
    try:
        values, indices, candidates, failed = selected(lists_of(rows, capacity), k)
    finally:
        set_order("forward")
    for i, row in enumerate(rows):
        expected = best(row, k)
        assert values[i].tolist() == [v for v, _ in expected]
        assert indices[i].tolist() == [g for _, g in expected]
    assert candidates.tolist() == list(counts)
    assert failed == []


def test_lists_of_four_thousand_and_of_more_than_shared_memory_keeps() -> None:
    for capacity, k in ((4096, 512), (9000, 20)):
        row = random_row(capacity, capacity, ties=True)
        values, indices, _, _ = selected(lists_of([row], capacity), k)
        expected = best(row, k)
        assert values[0].tolist() == [v for v, _ in expected]
        assert indices[0].tolist() == [g for _, g in expected]


def test_rows_that_fell_short_are_listed_and_their_gaps_marked() -> None:
    full = [(float(v), v) for v in range(6)]
    rows = [full, [], full[:2], full[:4], [*full, (9.0, 9), (8.0, 8), (7.0, 7)]]
    values, indices, candidates, failed = selected(lists_of(rows, 8), 3)
    assert failed == [1, 2, 4]  # none, too few, more than the list holds
    assert candidates.tolist() == [6, 0, 2, 4, 0]  # a list that overflowed has no values
    assert values.tolist()[:4] == [[5, 4, 3], [-INF] * 3, [1, 0, -INF], [3, 2, 1]]
    assert indices.tolist()[:4] == [[5, 4, 3], [-1] * 3, [1, 0, -1], [3, 2, 1]]


def test_a_row_needs_k_candidates_at_the_threshold_or_above() -> None:
    rows = [[(3.0, 1), (2.0, 2), (1.0, 3)], [(3.0, 1), (1.5, 2), (1.0, 3)]]
    assert selected(lists_of(rows, 4, theta=2.0), 2)[3] == [1]
    assert selected(lists_of(rows, 4, theta=1.5), 2)[3] == []


def test_a_row_that_is_not_finite_is_answered_with_nan_and_not_repaired() -> None:
    sound = [(3.0, 1), (2.0, 2), (1.0, 3)]
    lists = lists_of([sound, [*sound, (torch.nan, 4)], [(INF, 0), *sound], sound], 4)
    lists.theta[3] = torch.nan
    values, indices, candidates, failed = selected(lists, 2)
    assert values[0].tolist() == [3, 2]
    assert values[1:].isnan().all()
    assert indices.tolist() == [[1, 2]] + [[0, 1]] * 3
    assert candidates.tolist() == [3] + [10**6] * 3
    assert failed == []


def test_only_listed_rows_are_answered_after_a_repair() -> None:
    lists = lists_of([[(1.0, 1), (2.0, 2)]] * 3, 4)
    lists.failed[:2] = torch.tensor([2, 0], dtype=torch.int32)
    lists.failures.fill_(2)
    values, indices, candidates, failed = selected(lists, 2, listed=True)
    assert indices.tolist() == [[2, 1], [-9, -9], [2, 1]]
    assert candidates.tolist() == [10**6, -9, 10**6]
    assert bool(values[1].isnan().all())
    assert failed == [0, 2]


def test_bf16_values_are_rounded_to_nearest_even() -> None:
    row = [(1.00390625, 0), (1.01171875, 1), (3.0, 2)]  # halfway, halfway, exact
    values, _, _, _ = selected(lists_of([row], 4), 3, torch.bfloat16)
    assert values.float().tolist() == [[3.0, 1.015625, 1.0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("d", [1, 7, 24, 200])
@pytest.mark.parametrize("biased", [True, False])
def test_values_are_the_pre_activations_of_the_listed_features(
    dtype: torch.dtype, d: int, biased: bool
) -> None:
    n, f, capacity, g = 3, 40, 6, generator(d, "values")
    x, W = torch.randn(n, d, generator=g).to(dtype), torch.randn(f, d, generator=g).to(dtype)
    b, c = ((torch.randn(s, generator=g).to(dtype) if biased else None) for s in (f, d))
    rows = [[(0.0, (7 * i + 11 * j) % f) for j in range(m)] for i, m in enumerate((0, 5, 9))]
    lists = lists_of(rows, capacity)
    cuda.fill_values(lists, *(None if t is None else t.to(DEVICE) for t in (x, W, b, c)))

    def formula(wide: torch.dtype) -> Tensor:
        z = (x.to(wide) - (c.to(wide) if c is not None else 0.0)) @ W.to(wide).T
        return z if b is None else z + b.to(wide)

    for i, row in enumerate(rows):
        at = torch.tensor([index for _, index in row[:capacity]], dtype=torch.long)
        plain, exact = (formula(wide)[i, at] for wide in (torch.float32, torch.float64))
        assert_accurate(lists.value[i, : len(at)].cpu(), plain, exact, factor=4.0)
        assert bool(lists.value[i, len(at) :].isnan().all())


def test_a_list_as_long_as_the_encoder_is_filled_with_every_feature() -> None:
    g = generator(3, "all")
    n, d, f, k = 2, 12, 150, 9
    x, W = (torch.randn(s, d, generator=g).to(DEVICE) for s in (n, f))
    lists = lists_of([[]] * n, f)
    values = torch.empty(n, k, device=DEVICE)
    indices = torch.empty(n, k, dtype=torch.int32, device=DEVICE)
    candidates = torch.empty(n, dtype=torch.int32, device=DEVICE)
    cuda.answer(lists, x, W, None, None, k, values, indices, candidates)
    expected = (x.double() @ W.double().T).topk(k)
    assert torch.equal(indices.long().cpu(), expected.indices.cpu())
    torch.testing.assert_close(values.double(), expected.values, rtol=1e-5, atol=1e-5)
    assert candidates.tolist() == [f, f]
    assert int(lists.failures) == 0


def test_what_the_kernels_do_not_take_is_said() -> None:
    x = torch.zeros(1, 2, device=DEVICE)
    assert cuda.why_not(x, x, 5) is None
    assert cuda.why_not(x.half(), x.half(), 5) == (
        "dtypes are torch.float16 and torch.float16 (has one of float32, bfloat16)"
    )
    assert cuda.why_not(x, x, 9000) == "d=2, k=9000 (needs d <= 49152, k <= 8192)"
    assert cuda.why_not(x.to("meta"), x, 5) == f"device is meta (needs {DEVICE})"
