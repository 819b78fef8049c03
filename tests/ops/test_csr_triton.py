"""Triton's encoders of rows of any length off the usual path: overflow, bad guesses, capture."""

from __future__ import annotations

import dataclasses
import functools
import re
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from microtome._look import Look
from microtome._seed import generator
from microtome.errors import ArgumentError
from microtome.ops.batch_topk_encode import batch_topk_encode_reference
from microtome.ops.threshold_encode import threshold_encode_reference
from microtome.testing import Case
from microtome.testing.triton import DEVICE, MARKS, RUNS, SILENT

pytestmark = MARKS
if RUNS:
    csr = pytest.importorskip("microtome.kernels.csr_rows")
    from microtome.kernels import batch_topk_encode, csr_filter, radix, threshold_encode

CASE = Case("paths", 6, 24, 500, 12)


def inputs_of(case: Case) -> tuple[Tensor, ...]:
    i = case.inputs()
    return tuple(i[n].to(DEVICE) for n in ("x", "W_enc", "b_enc", "b_dec"))


@functools.cache
def usual_batch() -> tuple[Tensor, ...]:
    """The answer on the usual path, certificate last, after a look at the reference's."""
    args = (*inputs_of(CASE), CASE.k)
    plan = batch_topk_encode.plan(CASE.n, CASE.f, CASE.k)
    assert plan.capacity < CASE.f
    usual = batch_topk_encode.run(plan, *args)
    wanted = batch_topk_encode_reference(*args, "exact", "auto", None, None)
    assert torch.equal(usual[1], wanted[1])
    assert torch.equal(usual[2], wanted[2])
    assert int(usual[3].max()) < CASE.f // 2
    return usual


@functools.cache
def usual_threshold() -> tuple[Tensor, ...]:
    """The same of threshold_encode, for a window about a threshold of 8."""
    theta = torch.full((CASE.f,), 8.0, device=DEVICE)
    args = (*inputs_of(CASE), theta, 2.0, None)
    usual = threshold_encode.run(448, *args)
    wanted = threshold_encode_reference(*args, "exact", "auto", None, None)
    assert all(torch.equal(usual[i], wanted[i]) for i in (1, 2, 4, 5))
    assert bool((usual[6] < CASE.f // 2).all())
    assert bool((usual[6] > 16).all())
    return usual


@pytest.mark.parametrize(
    "change",
    [
        {"capacity": 0},
        {"capacity": 16},
        {"capacity": 16, "slots": 2},
        {"rank": 1, "group": 1},
        {"rank": 10**6},
        {"capacity": 500},
    ],
    ids=[
        "some rows overflow",
        "all rows overflow",
        "more than the workspace holds",
        "threshold too high",
        "threshold too low",
        "nothing is screened",
    ],
)
def test_batch_topk_has_the_same_bits_however_rows_are_computed(change: dict[str, int]) -> None:
    plan = batch_topk_encode.plan(CASE.n, CASE.f, CASE.k)
    *usual, candidates = usual_batch()
    some = change.get("capacity") == 0
    if some:  # room for the shorter half of the lists
        change = {"capacity": int(candidates.median())}
    if change.get("group"):
        change = {**change, "groups": plan.groups * plan.group}
    *got, counts = batch_topk_encode.run(
        dataclasses.replace(plan, **change), *inputs_of(CASE), CASE.k
    )
    assert all(map(torch.equal, usual, got))
    whole = int((counts == CASE.f).sum())
    assert 0 < whole < CASE.n if some else whole == CASE.n


@pytest.mark.parametrize(("kept", "whole"), [(64, None), (16, 6), (500, 6)])
def test_threshold_encode_has_the_same_bits_however_rows_are_computed(
    kept: int, whole: int | None
) -> None:
    theta = torch.full((CASE.f,), 8.0, device=DEVICE)
    args = (*inputs_of(CASE), theta, 2.0, None)
    *usual, _ = usual_threshold()
    *got, counts = threshold_encode.run(kept, *args)
    assert all(map(torch.equal, usual, got))
    if whole:
        assert int((counts == CASE.f).sum()) == whole


def test_where_every_row_overflows_tiles_of_rows_have_the_bits_of_the_lists() -> None:
    # Two tiles of rows, the second not full, and three chunks of features for two programs.
    case = Case("start", 20, 24, 1100, 8)
    args = (*inputs_of(case), None, 0.25, None)  # a ReLU: half of all features fire
    *usual, _ = threshold_encode.run(case.f, *args)
    *got, counts = threshold_encode.run(64, *args)
    assert all(map(torch.equal, usual, got))
    assert bool((counts == case.f).all())
    assert int(got[2][-1]) > case.n * case.f // 3


def test_tiles_read_by_the_copy_engine_give_the_same_bits() -> None:
    plan = batch_topk_encode.plan(CASE.n, CASE.f, CASE.k)
    got = batch_topk_encode.run(plan, *inputs_of(CASE), CASE.k, tma=True)
    assert all(map(torch.equal, usual_batch(), got))
    theta = torch.full((CASE.f,), 8.0, device=DEVICE)
    got = threshold_encode.run(448, *inputs_of(CASE), theta, 2.0, None, tma=True)
    assert all(map(torch.equal, usual_threshold(), got))


def test_the_shift_is_never_below_what_its_proof_asks_for() -> None:
    g = generator(0, "shift")
    b, theta = (
        torch.randn(400, generator=g) * 2.0 ** torch.randint(-140, 40, (400,), generator=g)
        for _ in range(2)
    )
    theta[:100] = b[:100] * (1 + torch.randn(100, generator=g) * 2.0**-22)  # cancels
    for half in (0.0, 1e-42, 0.0123, 3e5):
        h, u = Fraction(float(torch.tensor(half))), Fraction(1, 1 << 24)
        for bias in (None, b):
            shift = csr_filter.shift_of(bias, theta, half).tolist()
            for s, c, t in zip(shift, (b * 0 if bias is None else b).tolist(), theta.tolist(),
                               strict=True):  # fmt: skip
                least = Fraction(c) - Fraction(t) + h + u * (abs(Fraction(t)) + h)
                size = abs(Fraction(c)) + abs(Fraction(t)) + h
                assert least <= Fraction(s) <= least + 8 * u * size + Fraction(1, 1 << 144)


def test_features_just_above_and_just_within_the_window_are_all_found() -> None:
    # The scores are exact, so only the folding of threshold, bias and window could lose any.
    g = generator(0, "edges")
    W_enc = torch.ones(600, 1, device=DEVICE)
    z = torch.ones(2, 1, device=DEVICE)
    b = torch.randn(600, generator=g).to(DEVICE) * 100
    steps = torch.arange(600, device=DEVICE) % 81 - 40
    theta = ((1 + b).view(torch.int32) + steps.int()).view(torch.float32)  # ulps about the value
    for width in (0.0, 1e-5):
        args = (z, W_enc, b, None, theta, width, None)
        got = threshold_encode.run(512, *args)
        wanted = threshold_encode_reference(*args, "exact", "auto", None, None)
        assert all(map(torch.equal, got[:6], wanted[:6]))
        assert 0 < int(got[2][-1]) < 1200
        assert not bool((got[6] == 600).any())


def test_a_long_row_among_the_weights_costs_its_neighbours_nothing() -> None:
    x, W_enc, b_enc, b_dec = inputs_of(CASE)
    plan = batch_topk_encode.plan(CASE.n, CASE.f, CASE.k)
    long = W_enc.clone()
    long[7] *= 20  # bounds what its whole tile of features could lose
    *got, counts = batch_topk_encode.run(plan, x, long, b_enc, b_dec, CASE.k)
    wanted = batch_topk_encode_reference(x, long, b_enc, b_dec, CASE.k, "exact", "auto", None, None)
    assert torch.equal(got[1], wanted[1])
    assert torch.equal(got[2], wanted[2])
    assert int(counts.max()) <= int(usual_batch()[3].max()) + 16


@SILENT
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
def test_rows_whose_scores_could_overflow_are_computed_whole() -> None:
    x, W_enc, b_enc, b_dec = inputs_of(CASE)
    x[3] *= 2.0**100  # its squares overflow float32
    plan = batch_topk_encode.plan(CASE.n, CASE.f, CASE.k)
    args = (x, W_enc, b_enc, b_dec)
    *got, counts = batch_topk_encode.run(plan, *args, CASE.k)
    wanted = batch_topk_encode_reference(*args, CASE.k, "exact", "auto", None, None)
    assert torch.equal(got[2], wanted[2])
    assert int(counts[3]) == CASE.f
    *got, counts = threshold_encode.run(448, *args, None, 0.0, None)
    wanted = threshold_encode_reference(*args, None, 0.0, None, "exact", "auto", None, None)
    assert torch.equal(got[1], wanted[1])
    assert (counts == CASE.f).nonzero().flatten().tolist() == [3]


def test_lists_grow_with_what_the_caller_makes_room_for() -> None:
    x, W_enc = torch.randn(4, 24, generator=generator(0, "dense")), CASE.inputs()["W_enc"]
    args = (x.to(DEVICE), W_enc.to(DEVICE))
    few, many, roomy = (
        threshold_encode.launch(*args, None, None, None, 0.0, c, "exact", "auto", None, None, p)
        for c, p in ((None, 64), (None, 380), (1200, None))
    )
    assert few[6].tolist() == [CASE.f] * 4  # half of all are entries
    assert bool((many[6] < CASE.f * 3 // 4).all())
    assert all(map(torch.equal, few[:6], many[:6]))
    assert torch.equal(roomy[0][: few[0].numel()], few[0])
    room = threshold_encode.capacity_of
    assert [room(65536), room(65536, 100, 100 * 900), room(65536, 100, 65536 * 100)] == [
        1024, 1856, 8192,
    ]  # fmt: skip
    assert [room(65536, per_row=p) for p in (1, 65, 10**6)] == [64, 128, 65536]


def test_ties_at_the_border_are_split_within_a_whole_row() -> None:
    # Rows of 300 ones and 300 zeros. 1050 are wanted: all 900 ones and half the zeros of row 0.
    W_enc = torch.tensor([[1.0], [0.0]]).repeat(300, 1).to(DEVICE)
    x = torch.ones(3, 1, device=DEVICE)
    plan = dataclasses.replace(batch_topk_encode.plan(3, 600, 350), capacity=64, slots=2)
    values, indices, offsets, _ = batch_topk_encode.run(plan, x, W_enc, None, None, 350)
    wanted = batch_topk_encode_reference(x, W_enc, None, None, 350, "exact", "auto", None, None)
    assert offsets.tolist() == [0, 450, 750, 1050]
    assert torch.equal(values, wanted[0])
    assert torch.equal(indices, wanted[1])


def test_while_a_graph_is_captured_a_capacity_is_demanded_and_overflow_is_marked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(csr, "capturing", lambda _: True)
    x = torch.eye(3, 4, device=DEVICE)
    W_enc = torch.ones(8, 4, device=DEVICE)
    args = (x, W_enc, None, None, None, 0.0)
    text = (
        "threshold_encode: while a CUDA graph is captured the number of entries cannot be read. "
        "Pass capacity=."
    )
    with pytest.raises(ArgumentError, match=f"^{re.escape(text)}$"):
        threshold_encode.run(8, *args, None)
    values, indices, offsets, *_, candidates = threshold_encode.run(8, *args, 20)
    assert values.tolist() == [1.0] * 20
    assert indices.tolist() == [*range(8), *range(8), 0, 1, 2, 3]
    assert offsets.tolist() == [0, 8, 16, 20]
    assert candidates.tolist() == [8, 8, -1]
    assert threshold_encode.run(8, *args, 24)[6].tolist() == [8, 8, 8]


@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")
def test_while_a_graph_is_captured_rows_that_are_not_finite_are_marked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(csr, "capturing", lambda _: True)
    monkeypatch.setattr(csr, "look_at", lambda *_: Look("first", torch.device("cpu")))
    x, W_enc, b_enc, b_dec = inputs_of(CASE)
    x[2, 5], x[4, 0] = float("nan"), float("inf")
    plan = batch_topk_encode.plan(CASE.n, CASE.f, CASE.k)
    *_, counts = batch_topk_encode.run(plan, x, W_enc, b_enc, b_dec, CASE.k)
    assert (counts < 0).nonzero().flatten().tolist() == [2, 4]
    *_, counts = threshold_encode.run(256, x, W_enc, b_enc, b_dec, None, 0.0, 4200)
    assert (counts < 0).nonzero().flatten().tolist() == [2, 4]


def test_the_radix_select_finds_every_rank_of_values_of_every_kind() -> None:
    g = generator(0, "radix")
    values = torch.randn(5, 64, generator=g) * 10.0 ** torch.randint(-30, 30, (5, 64), generator=g)
    values[:, :9] = torch.tensor([0.0, -0.0, 1.0, -1.0, 1.0, 2.0**-140, -(2.0**-140), 3e38, -3e38])
    counts = torch.tensor([64, 0, 17, 64, 1], dtype=torch.int32)
    flat = torch.cat([row[:c] for row, c in zip(values, counts.tolist(), strict=True)])
    ordered = flat.sort(descending=True).values
    rows = csr.Rows(torch.zeros(5, 1, device=DEVICE), torch.zeros(64, 1, device=DEVICE), None, None,
                    64, 1)  # fmt: skip
    for rank in (1, 2, 40, 73, len(flat)):
        state = radix.Radix(rank, torch.device(DEVICE))
        radix.digits(state, rows, counts.to(DEVICE), values.to(DEVICE), whole=False)
        found = float(state.value)
        assert found == float(ordered[rank - 1])
        assert int(state.rest) == rank - int((flat > found).sum())


@pytest.mark.parametrize(
    ("n", "f", "k"),
    [(1, 1, 1), (8192, 24576, 32), (8192, 65536, 64), (16384, 131072, 64), (4096, 1 << 20, 32),
     (2048, 16384, 2048), (1, 4096, 8)],
)  # fmt: skip
def test_the_plans_keep_their_workspace_and_counts_in_range(n: int, f: int, k: int) -> None:
    p = batch_topk_encode.plan(n, f, k)
    assert k <= p.capacity <= f
    assert 8 * f * p.slots <= max(csr.WORKSPACE, 8 * f)
    if p.capacity < f:
        assert p.rank <= n * p.groups
        assert p.groups * p.group >= -(-f // p.stride)
        assert 1.25 * n * k <= p.rank * p.stride
    assert -(-n // 16) * -(-f // 128) < 2**31  # programs of a launch
    assert min(f, 256) <= threshold_encode.capacity_of(f) <= f
    assert 8 * threshold_encode.capacity_of(f) <= max(f // 7, 8 * min(f, 256))
