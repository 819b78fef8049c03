"""The Hopper screen, run by the emulator: what it keeps, and that the answer stays exact."""

import importlib
from types import SimpleNamespace

import pytest
import torch
from microtome.kernels import topk_encode_cuda as hopper
from microtome.kernels.topk_select_cuda import MOST_ACTIVE

from microtome.ops import topk_encode, use_backend
from microtome.ops.topk_encode import _why_not_cuda, top_k
from microtome.testing import cuda

pytestmark = pytest.mark.skipif(not cuda.EMULATED, reason="the emulated CUDA kernels are not there")

# Rows, features, width: one of each; a tile short, full and over; no multiple of anything.
SHAPES = [(1, 1, 1), (127, 255, 63), (128, 256, 64), (129, 257, 72), (200, 600, 200), (8, 2300, 9)]


@pytest.fixture(autouse=True)
def _emulated(monkeypatch):
    monkeypatch.setenv("MICROTOME_EMULATE_CUDA", "1")
    yield
    cuda.set_order("forward")


def shadow_rows(rows):
    """bf16 rows 16 bytes aligned, NaN beyond their end, and the statistics of the rounding."""
    m, d = rows.shape
    shadow = torch.full((m, -(-d // 8) * 8 + 8), float("nan"), dtype=torch.bfloat16)[:, :d]
    shadow.copy_(rows)
    norms = [rows.double().norm(dim=1), (rows.double() - shadow.double()).norm(dim=1)]
    stats = [torch.ones(m), *((norm * 1.0001).float() for norm in norms), torch.zeros(m)]
    return shadow, torch.stack(stats, 1).contiguous()


def problem(n, f, d, seed=0):
    g = torch.Generator().manual_seed(seed)
    x, W_enc, b_enc = (torch.randn(*shape, generator=g) for shape in ((n, d), (f, d), (f,)))
    return x, W_enc * (0.5 + torch.rand(f, 1, generator=g)), b_enc


def lists_of(theta, capacity):
    n = theta.shape[0]
    index = torch.full((n, capacity), -7, dtype=torch.int32)
    return SimpleNamespace(theta=theta, count=torch.zeros(n, dtype=torch.int32), index=index)


def kept(lists):
    """The sets of features on the lists, after checking that none stands there twice."""
    sets = []
    for count, row in zip(lists.count.tolist(), lists.index.tolist(), strict=True):
        stored = row[: min(count, len(row))]
        assert row[len(stored) :] == [-7] * (len(row) - len(stored))
        assert len(set(stored)) == len(stored)
        sets.append(set(stored))
    return sets


def threshold(maxima, rank, theta):
    theta.copy_(maxima.topk(rank, dim=1).values[:, -1])


def test_the_emulated_instructions_do_what_the_manual_says():
    assert importlib.import_module("microtome._emulated_ext").failing_hopper_tests() == []


@pytest.mark.parametrize("order", cuda.ORDERS)
@pytest.mark.parametrize(("n", "f", "d"), SHAPES)
def test_every_score_is_that_of_the_bf16_rows(n, f, d, order):
    cuda.set_order(order, 3)
    x, W_enc, b_enc = problem(n, f, d)
    (x, _), (w, _) = shadow_rows(x), shadow_rows(W_enc)
    maxima = torch.full((n, -(-f // 256) * 256), float("nan"))
    hopper.sample(x, w, b_enc, 1, 1, maxima)
    exact = x.double() @ w.double().T + b_enc.double()
    slack = 2.0**-23 * d * float(x.double().norm(dim=1).max() * w.double().norm(dim=1).max())
    torch.testing.assert_close(maxima[:, :f].double(), exact, atol=slack + 1e-6, rtol=0)
    assert (maxima[:, f:] == float("-inf")).all()


def test_rows_beyond_a_band_of_tiles_are_reached():
    n, f, d = 2100, 300, 8  # a band is 16 tiles of 128 rows
    (x, _), (w, _) = (shadow_rows(rows) for rows in problem(n, f, d)[:2])
    maxima = torch.full((n, 512), float("nan"))
    hopper.sample(x, w, None, 1, 1, maxima)
    torch.testing.assert_close(maxima[:, :f], x.float() @ w.float().T, atol=1e-5, rtol=0)


@pytest.mark.parametrize("group", [16, 4])
def test_each_sampled_feature_stands_behind_one_maximum(group):
    n, f, d, stride = 130, 5000, 8, 16  # 313 sampled features: two tiles
    x, W_enc, b_enc = problem(n, f, d)
    (x, _), (w, _) = shadow_rows(x), shadow_rows(W_enc)
    dense, maxima = torch.empty(n, 512), torch.full((n, 512 // group), float("nan"))
    hopper.sample(x, w[::stride].contiguous(), b_enc[::stride].contiguous(), 1, 1, dense)
    hopper.sample(x, w, b_enc, stride, group, maxima)
    # Every 8 neighbours lie with four threads; a group is one thread's of group / 2 such blocks.
    groups = dense.view(n, 2, 512 // group // 8, group // 2, 4, 2)
    assert torch.equal(maxima.view(n, 2, -1, 4), groups.amax((3, 5)))


def test_no_bias_is_a_bias_of_zero():
    x, W_enc, _ = problem(3, 70, 16)
    (x, x_stats), (w, w_stats) = shadow_rows(x), shadow_rows(W_enc)
    without, zero = torch.empty(3, 256), torch.empty(3, 256)
    hopper.sample(x, w, None, 1, 1, without)
    hopper.sample(x, w, torch.zeros(70), 1, 1, zero)
    assert torch.equal(without, zero)
    lists = lists_of(zero[:, :70].median(1).values, 70)
    hopper.keep(x, x_stats, w, w_stats, None, lists)
    assert (lists.count >= 36).all()


@pytest.mark.parametrize("order", cuda.ORDERS)
@pytest.mark.parametrize(("n", "f", "d"), SHAPES)
def test_what_may_reach_the_threshold_is_kept_and_nothing_else(n, f, d, order):
    cuda.set_order(order, 5)
    x, W_enc, b_enc = problem(n, f, d)
    (xb, x_stats), (wb, w_stats) = shadow_rows(x), shadow_rows(W_enc)
    score = xb.double() @ wb.double().T + b_enc.double()
    theta = score.quantile(0.9, dim=1).float()
    lists = lists_of(theta, f + 3)
    hopper.keep(xb, x_stats, wb, w_stats, b_enc, lists)
    c, lost_x = x_stats[:, 1:3].double().T
    w, lost_w = w_stats[:, 1:3].double().T
    unit, norm = d * 2.0**-24, c + lost_x
    bound = torch.outer(lost_x + 6 * unit * norm, w) + torch.outer(norm * (1 + 4 * unit), lost_w)
    rounding = 4 * unit * torch.outer(c, w) + 1e-5 * (score.abs() + theta.abs()[:, None].double())
    above = score + bound - theta[:, None].double()
    must, may = above > rounding, above + 3e-4 * bound > -rounding
    for row, features in enumerate(kept(lists)):
        assert lists.count[row] == len(features)
        assert set(must[row].nonzero().flatten().tolist()) <= features
        assert features <= set(may[row].nonzero().flatten().tolist())
    assert may.double().sum() < 1.1 * must.double().sum() + 10  # so the two say something
    value = x.double() @ W_enc.double().T + b_enc.double()
    assert (must | (value < theta[:, None].double())).all()  # and the bound holds


def test_what_does_not_fit_is_counted_but_not_stored():
    x, W_enc, b_enc = problem(140, 700, 16)
    (x, x_stats), (w, w_stats) = shadow_rows(x), shadow_rows(W_enc)
    theta = torch.zeros(140)
    whole, short = lists_of(theta, 700), lists_of(theta, 33)
    for lists in (whole, short):
        hopper.keep(x, x_stats, w, w_stats, b_enc, lists)
    assert torch.equal(whole.count, short.count)
    assert (whole.count > 33).all()
    for all_of_them, some in zip(kept(whole), kept(short), strict=True):
        assert len(some) == 33
        assert some <= all_of_them


def test_a_threshold_of_minus_infinity_keeps_every_feature_and_no_other():
    x, W_enc, b_enc = problem(9, 300, 24)
    (x, x_stats), (w, w_stats) = shadow_rows(x), shadow_rows(W_enc)
    lists = lists_of(torch.full((9,), float("-inf")), 300)
    hopper.keep(x, x_stats, w, w_stats, b_enc, lists)
    assert kept(lists) == [set(range(300))] * 9


def test_a_bound_that_is_not_a_number_keeps_its_feature():
    x, W_enc, b_enc = problem(70, 300, 24)
    W_enc[37] = 3e38  # its norm overflows, and so do products with it
    (x, x_stats), (w, w_stats) = shadow_rows(x), shadow_rows(W_enc)
    w_stats[37, 1:3] = float("inf")
    w_stats[299, 2] = float("nan")
    lists = lists_of(torch.full((70,), 1e4), 300)
    hopper.keep(x, x_stats, w, w_stats, b_enc, lists)
    assert kept(lists) == [{37, 299}] * 70


def test_a_score_that_overflows_on_the_way_to_its_value_is_kept():
    x, w = torch.zeros(2, 24), torch.zeros(3, 24)
    x[0, :4], w[1, :4] = torch.tensor([-1.0, -1.0, 1.0, 0.75]) * 2.0**63, 1.5 * 2.0**64
    x[1, 0], w[2] = 1.0, 1.0
    (x, x_stats), (w, w_stats) = shadow_rows(x), shadow_rows(w)
    lists = lists_of(torch.tensor([-1e38, 0.5]), 3)  # x[0] w[1] is -0.375 2^127 = -6.4e37
    hopper.keep(x, x_stats, w, w_stats, None, lists)
    row, other = kept(lists)
    assert 1 in row
    assert 2 in other


@pytest.mark.parametrize("order", cuda.ORDERS)
def test_the_answer_from_the_lists_is_the_reference(order):
    cuda.set_order(order, 7)
    n, f, d, k, capacity = 150, 3000, 40, 4, 320
    x, W_enc, b_enc = problem(n, f, d)
    W_enc[700:740] = W_enc[100:140]  # ties
    b_enc[700:740] = b_enc[100:140]
    (xb, x_stats), (wb, w_stats) = shadow_rows(x), shadow_rows(W_enc)
    lists = lists_of(torch.empty(n), capacity)
    hopper.screen(xb, x_stats, wb, w_stats, b_enc, 16, 3, lists, threshold)
    with use_backend("reference"):
        values, indices, _ = topk_encode(x, W_enc, b_enc, k=k)
    z = x @ W_enc.T + b_enc
    listed = torch.full_like(z, float("-inf"))
    for row, features in enumerate(kept(lists)):
        at = torch.tensor(sorted(features))
        listed[row, at] = z[row, at]
    got = top_k(listed, k)
    proved = (lists.count <= capacity) & (got[0][:, -1] >= lists.theta)
    assert proved.double().mean() > 0.9
    assert torch.equal(got[1][proved].int(), indices[proved])
    torch.testing.assert_close(got[0][proved], values[proved])


@pytest.mark.parametrize(
    ("call", "sizes"),
    [
        ("sample", (0, 8, 0, 8, 0, 0, 2**33, 8, 8, 1, 1, 0)),
        ("filter", (0, 8, 0, 0, 8, 0, 0, 0, 0, 0, 8, 2**33, 8, 8, 0)),
    ],
)
def test_more_than_32_bits_count_is_refused(call, sizes):
    launch = getattr(hopper._native.cuda(), f"topk_encode_{call}")
    with pytest.raises(RuntimeError, match=f"topk_encode_{call}: too many rows or features"):
        launch(*sizes)


def test_an_empty_batch_launches_nothing():
    x, W_enc, b_enc = problem(0, 5, 8)
    (x, x_stats), (w, w_stats) = shadow_rows(x), shadow_rows(W_enc)
    hopper.screen(x, x_stats, w, w_stats, b_enc, 16, 1, lists_of(torch.empty(0), 5), threshold)


def test_a_group_holds_as_many_as_leave_four_maxima_for_each_of_the_rank():
    assert hopper.groups_of(65536, 16, 17) == (16, 256)
    assert hopper.groups_of(24576, 16, 25) == (4, 384)
    assert hopper.groups_of(3000, 16, 65) == (1, 256)


def test_rows_that_the_copy_engine_cannot_read_are_copied():
    aligned, unaligned = (torch.ones(4, d, dtype=torch.bfloat16) for d in (8, 9))
    assert hopper._aligned(aligned) is aligned
    copy = hopper._aligned(unaligned)
    assert copy.stride() == (16, 1)
    assert torch.equal(copy[:, :9], unaligned)
    one = torch.ones(8, dtype=torch.bfloat16).expand(3, 8)[:1]
    assert one.is_contiguous()
    assert one.stride() == (0, 1)
    assert hopper._aligned(one).stride() == (8, 1)


def test_more_active_than_a_block_sorts_is_a_reason_not_to_run(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    x, W_enc = torch.zeros(1, 8), torch.zeros(9000, 8)
    arguments = (x, W_enc, None, None)
    assert _why_not_cuda(*arguments, MOST_ACTIVE, "exact", "auto", None, None) is None
    reason = _why_not_cuda(*arguments, MOST_ACTIVE + 1, "exact", "auto", None, None)
    assert reason == "k=8193 (a block sorts up to 8192)"
