"""The Triton encoder: its filter, its bounds and what it does with rows that have no answer."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from microtome._seed import generator
from microtome.ops.topk_encode import topk_encode_reference
from microtome.testing.triton import DEVICE, MARKS, RUNS

pytestmark = MARKS
if RUNS:
    triton = pytest.importorskip("triton")
    tl = triton.language
    from microtome.kernels import bf16
    from microtome.kernels import topk_encode as encode
    from microtome.kernels import topk_narrow as narrow
    from microtome.kernels import topk_select as select

    @triton.jit
    def _append_kernel(
        score, lowest, count, index, value, f, capacity, BM: tl.constexpr, BN: tl.constexpr
    ):  # fmt: skip
        encode.append_scores(
            tl.load(score + tl.arange(0, BM)[:, None] * BN + tl.arange(0, BN)[None, :]),
            tl.load(lowest + tl.arange(0, BM)), tl.arange(0, BM), 0, f, count, index, value,
            capacity, BM, BN, 0,
        )  # fmt: skip


def inputs(n: int, d: int, f: int, *, bias: bool = True) -> list[Tensor | None]:
    """x with one large column, as residual streams have, W_enc with norms that differ, biases."""
    g = generator(5, f"encode {n} {d} {f}")
    x = torch.randn(n, d, generator=g)
    x[:, 0] *= 30
    W = torch.randn(f, d, generator=g) * torch.exp(0.3 * torch.randn(f, 1, generator=g))
    W[:, 0] *= 0.1
    b_enc = torch.randn(f, generator=g) if bias else None
    b_dec = torch.randn(d, generator=g) if bias else None
    return [None if t is None else t.to(DEVICE) for t in (x, W, b_enc, b_dec)]


def reference(x: Tensor, W: Tensor, b_enc: Tensor | None, b_dec: Tensor | None, k: int) -> Tensor:
    double = [None if t is None else t.double() for t in (x, W, b_enc, b_dec)]
    return topk_encode_reference(*double, k, "exact", "auto", None, None)[1]


@pytest.mark.parametrize(
    ("n", "d", "f", "k", "change"),
    [
        (5, 24, 700, 9, {}),
        (33, 40, 1300, 4, {"BM": 16, "BN": 64, "rows": 32}),  # two blocks; tiles not sampled
        (3, 16, 2100, 33, {"BN": 64, "BD": 16}),
    ],
)
@pytest.mark.parametrize("tma", [False, True])
def test_tiles_read_through_descriptors_hold_the_same_scores(
    n: int, d: int, f: int, k: int, change: dict[str, int], tma: bool
) -> None:
    x, W, b_enc, b_dec = inputs(n, d, f, bias=tma)
    p = encode.plan(n, f, k, change.get("BN", 128))
    assert p.capacity < f
    _, indices, candidates = encode.run(
        dataclasses.replace(p, **change), x, W, b_enc, b_dec, k, tma=tma
    )
    assert torch.equal(indices.long(), reference(x, W, b_enc, b_dec, k).long())
    assert int(candidates.max()) < f // 2  # nothing was repaired


def test_narrowing_computes_fewer_values_than_the_filter_lets_through() -> None:
    k = 8
    x, W, b_enc, b_dec = inputs(6, 64, 2000)
    p = encode.plan(6, 2000, k)
    shadow, w_stats = bf16.shadow_rows(W, None)
    lists = select.Lists(6, p.capacity, x.device)
    tops = narrow.tops(w_stats, p.BN)
    x_stats = encode._screen(p, x, b_dec, shadow, w_stats, tops, b_enc, lists, None)
    passed = lists.count.clone()
    assert bool((passed >= k).all())
    assert bool((passed <= p.capacity).all())
    narrow.values(lists, x, x_stats, W, w_stats, b_enc, b_dec, k)
    exact = (x.double() - b_dec.double()) @ W.double().T + b_enc.double()
    for row in range(6):
        length = int(lists.count[row])
        value, feature = lists.value[row, :length], lists.index[row, :length].long()
        computed = value > float("-inf")
        assert k <= int(computed.sum()) < int(passed[row])
        torch.testing.assert_close(
            value[computed].double(), exact[row, feature[computed]], rtol=1e-5, atol=1e-5
        )
        best = exact[row].topk(k).indices
        assert set(best.tolist()) <= set(feature[computed].tolist())


@pytest.mark.parametrize("centred", [False, True])
def test_bf16_rows_are_answered_by_their_scores_unless_b_dec_is_subtracted(
    centred: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    called = []
    monkeypatch.setattr(select, "value", lambda *a: called.append(a))
    x, W, b_enc, b_dec = (t.bfloat16() for t in inputs(6, 64, 2000))
    args = (x, W, b_enc, b_dec if centred else None, 8)
    values, indices, _ = encode.run(encode.plan(6, 2000, 8), *args)
    assert len(called) == int(centred)
    if not centred:
        assert torch.equal(indices.long(), reference(*args).long())
        exact = (x.double() @ W.double().T + b_enc.double()).gather(1, indices.long())
        # The interpreter cuts where a GPU rounds to bf16.
        torch.testing.assert_close(values.double(), exact, rtol=2.0**-7, atol=0.0)


def test_a_filter_keeps_equal_scores_and_counts_what_does_not_fit() -> None:
    score = torch.full((4, 32), -1.0)
    score[0, 3] = score[0, 17] = 2.0
    score[1] = 5.0
    score[2, 31] = float("inf")  # feature 31 does not exist
    score[3] = 5.0
    lowest = torch.tensor([2.0, 5.0, 0.0, float("inf")])
    count = torch.zeros(4, dtype=torch.int32)
    index, value = torch.full((4, 6), -1, dtype=torch.int32), torch.zeros(4, 6)
    score, lowest, count, index, value = (
        t.to(DEVICE) for t in (score, lowest, count, index, value)
    )
    _append_kernel[(1,)](
        score, lowest, count, index, value, 31, 6, BM=4, BN=32, enable_fp_fusion=True
    )
    assert count.tolist() == [2, 31, 0, 0]
    assert sorted(index[0].tolist()) == [-1] * 4 + [3, 17]
    assert len({*index[1].tolist()} - {-1}) == 6
    assert sorted(value[0].tolist()) == [0.0] * 4 + [2.0] * 2
    assert index[2:].eq(-1).all()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of what a GPU does in silence
@pytest.mark.parametrize("f", [40, 900])  # computed whole, and screened
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_row_without_an_answer_is_marked_on_the_device(
    f: int, bad: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encode, "_look", lambda *_: None)
    k, d = 3, 16
    x, W, b_enc, b_dec = inputs(4, d, f)
    x[2, 5] = bad
    args = (encode.plan(4, f, k), x, W, b_enc, b_dec, k)
    values, indices, candidates = encode.run(*args)
    assert values[2].isnan().all()
    assert indices[2].tolist() == [0, 1, 2]
    assert int(candidates[2]) == f
    fine = [0, 1, 3]
    assert torch.equal(indices[fine].long(), reference(x[fine], W, b_enc, b_dec, k).long())
    W[f // 2, 1] = bad
    values, indices, candidates = encode.run(*args)
    assert values.isnan().all()
    assert indices.tolist() == [[0, 1, 2]] * 4
    assert candidates.tolist() == [f] * 4


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of what a GPU does in silence
def test_scores_that_overflow_are_never_compared() -> None:
    x, W, b_enc, b_dec = inputs(3, 16, 900)
    x[1] *= 1e25
    W *= 1e11
    p = encode.plan(3, 900, 5)
    _, indices, candidates = encode.run(p, x, W, b_enc, b_dec, 5)
    assert torch.equal(indices.long(), reference(x, W, b_enc, b_dec, 5).long())
    assert candidates[1] == 900
    assert bool((candidates[[0, 2]] < 900).all())


SHAPES = {
    "S": (8192, 24576, 32), "M": (8192, 65536, 64), "L": (16384, 131072, 64),
    "XL": (4096, 1 << 20, 32), "one row": (1, 1 << 20, 64), "all": (4096, 4096, 4096),
    "one": (1, 1, 1), "many": (1 << 20, 1 << 24, 4096),
}  # fmt: skip


@pytest.mark.parametrize(("BN", "sigmas"), [(128, 0.0), (256, 0.0), (128, 6.0)])
@pytest.mark.parametrize("name", SHAPES)
def test_a_plan_stays_within_its_workspace_and_within_32_bits(
    name: str, BN: int, sigmas: float
) -> None:
    n, f, k = SHAPES[name]
    p = encode.plan(n, f, k, BN, sigmas, 4.0)
    entry = 12 if sigmas else 8  # bytes of a listed feature
    tiles = -(-f // BN)
    width = -(-tiles // p.stride) * BN
    assert k <= p.capacity <= f
    assert p.rows % p.BM == 0
    assert (p.rows - p.BM) * -(-n // p.rows) < max(n, 1)  # no block is empty
    if p.capacity == f:
        return
    tile_of_rows = p.BM * (entry * p.capacity + 4 * width)
    assert p.rows * (entry * p.capacity + 4 * width) <= max(encode.WORKSPACE, tile_of_rows)
    assert width <= max(encode.MAXIMA + BN, 2 * f // encode.SAMPLE + BN)
    assert p.rank <= p.groups <= width
    assert p.rank * f <= p.capacity * width  # room for what the threshold lets through
    assert -(-p.rows // p.BM) * tiles < 2**31  # programs of a launch
    assert p.rows * 4 < 2**32  # a row's place in count
    assert p.capacity * 4 < 2**32  # bytes of a list
    assert tiles * BN < 2**31  # features, the last tile's included


def test_a_launch_has_no_more_programs_beside_each_other_than_a_gpu_takes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    grids = []

    class Kernel:
        def __getitem__(self, grid: tuple[int, int]) -> object:
            grids.append(grid)
            return lambda *_, **__: None

    monkeypatch.setattr(select, "_value_kernel", Kernel())
    x, W = torch.zeros(1, 1), torch.zeros(3_000_000, 1)
    lists = select.Lists(1, len(W), x.device)
    select.value(lists, x, W, None, None, lists.count, everything=True)
    select.value(lists, x, W, None, None, lists.count)
    assert grids == [(1, 65535), (1, select.SPREAD)]
