"""topk_encode: the spec by hand, every backend against float64, the traps of a screen."""

import subprocess
import sys

import pytest
import torch
from torch.nn.functional import linear

from microtome.errors import ArgumentError, BackendError, DtypeError, NonFiniteError, ShapeError
from microtome.ops import screen_weights, topk_encode, use_backend
from microtome.ops.topk_encode import _encode, top_k
from microtome.testing import CASES, Case, assert_accurate, backends_of, has_level, level_parameters

BACKENDS = backends_of(_encode)
# Gradients are those of sparse_decode, which a demand for "cuda" finds without a kernel.
WITH_GRADIENTS = [backend for backend in BACKENDS if backend.id != "cuda"]


def assert_top_k(values, indices, z, k, slack):
    """`indices` are a top k of z (float64) up to `slack`, in descending order, no feature twice."""
    n, f = z.shape
    assert indices.dtype == torch.int32
    assert indices.shape == values.shape == (n, k)
    for row in range(n):
        chosen = indices[row].long()
        assert len(set(chosen.tolist())) == k
        rest = torch.ones(f, dtype=torch.bool)
        rest[chosen] = False
        if rest.any():
            assert z[row][chosen].min() >= z[row][rest].max() - slack
    assert (values[:, :-1] >= values[:, 1:]).all()
    torch.testing.assert_close(values.double(), z.gather(1, indices.long()), atol=slack, rtol=0)


def pre_activations(i, dtype=torch.float64):
    return linear(
        i["x"].to(dtype) - i["b_dec"].to(dtype), i["W_enc"].to(dtype), i["b_enc"].to(dtype)
    )


def call(i, k, **options):
    return topk_encode(i["x"], i["W_enc"], i["b_enc"], i["b_dec"], k=k, **options)


def test_the_reference_gives_the_two_largest_worked_by_hand():
    x = torch.tensor([[1.0, 2.0], [-1.0, 0.5]])
    W_enc = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    b_enc = torch.tensor([0.0, 0.5, -1.0])
    b_dec = torch.tensor([0.5, 0.5])
    # x - b_dec = [.5, 1.5], [-1.5, 0];  z = [.5, 2, 1], [-1.5, .5, -2.5]
    with use_backend("reference"):
        values, indices, candidates = topk_encode(x, W_enc, b_enc, b_dec, k=2)
    assert values.tolist() == [[2.0, 1.0], [0.5, -1.5]]
    assert indices.tolist() == [[1, 2], [1, 0]]
    assert candidates.tolist() == [3, 3]


def test_ties_go_to_the_lower_index_in_the_reference():
    values, indices = top_k(
        torch.tensor([[1.0, 3.0, 3.0, 2.0, 3.0, 2.0], [0.0, -0.0, 0.0, -1.0, 0.0, 0.0]]), 4
    )
    assert indices.tolist() == [[1, 2, 4, 3], [0, 1, 2, 4]]
    assert values.tolist() == [[3.0, 3.0, 3.0, 2.0], [0.0, 0.0, 0.0, 0.0]]


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_returns_the_top_k(backend, case):
    i = case.inputs()
    exact, plain = pre_activations(i), pre_activations(i, torch.float32)
    with use_backend(backend):
        values, indices, candidates = call(i, case.k)
    slack = 2 * float((plain.double() - exact).abs().max()) + 1e-12 if case.n else 0.0
    assert_top_k(values, indices, exact, case.k, slack)
    assert_accurate(values, plain.gather(1, indices.long()), exact.gather(1, indices.long()))
    assert candidates.shape == (case.n,)
    assert ((candidates >= case.k) & (candidates <= case.f)).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_ties_go_to_the_lower_index(backend):
    i = Case("integers", 40, 16, 512, 24, "ties").inputs()  # every dot product is exact in float32
    with use_backend(backend):
        values, indices, _ = call(i, 24)
    expected = top_k(pre_activations(i), 24)
    assert torch.equal(indices, expected[1].int())
    assert torch.equal(values.double(), expected[0])


@pytest.mark.parametrize("level", level_parameters())
@pytest.mark.parametrize("f", [31, 63, 64, 65, 127, 777])
def test_every_instruction_set_returns_the_top_k_at_awkward_feature_counts(level, f, monkeypatch):
    monkeypatch.setenv("MICROTOME_CPU_ISA", level)
    i = Case(f"awkward{f}", 50, 45, f, 5).inputs()
    with use_backend("cpu"):
        values, indices, _ = call(i, 5)
    assert_top_k(values, indices, pre_activations(i), 5, 1e-4)


@pytest.mark.parametrize(
    "level", [p for p in level_parameters() if p.values[0] not in ("generic", "avx2")]
)
def test_instruction_sets_with_fma_give_the_same_bits(level, monkeypatch):
    i = Case("bits", 70, 100, 3000, 16).inputs()
    monkeypatch.setenv("MICROTOME_CPU_ISA", "avx2")
    expected = call(i, 16)
    monkeypatch.setenv("MICROTOME_CPU_ISA", level)
    values, indices, _ = call(i, 16)
    assert torch.equal(values, expected[0])
    assert torch.equal(indices, expected[1])


@pytest.mark.parametrize("level", level_parameters())
def test_features_closer_than_the_low_precision_are_told_apart(level, monkeypatch):
    monkeypatch.setenv("MICROTOME_CPU_ISA", level)
    g = torch.Generator().manual_seed(0)
    base = torch.randn(64, generator=g)
    # 300 features within 1e-5 of one another: the screen cannot order them, float32 can.
    W_enc = torch.cat(
        [torch.randn(1500, 64, generator=g) * 0.1, base + 1e-5 * torch.randn(300, 64, generator=g)]
    )
    x = torch.cat(
        [
            base.repeat(20, 1) + 0.1 * torch.randn(20, 64, generator=g),
            torch.randn(13, 64, generator=g),
        ]
    )
    values, indices, candidates = topk_encode(x, W_enc, k=20)
    assert_top_k(values, indices, linear(x.double(), W_enc.double()), 20, 5e-5)
    assert candidates.max() > 100


@pytest.mark.parametrize("level", level_parameters())
def test_rows_whose_list_overflows_are_computed_whole(level, monkeypatch):
    monkeypatch.setenv("MICROTOME_CPU_ISA", level)
    g = torch.Generator().manual_seed(1)
    W_enc = torch.randn(1, 32, generator=g).repeat(4000, 1)  # one feature, 4000 times
    x = torch.randn(9, 32, generator=g)
    x[3] = 0.0
    values, indices, candidates = topk_encode(x, W_enc, k=8)
    assert indices.tolist() == [list(range(8))] * 9
    assert candidates.tolist() == [4000] * 9
    torch.testing.assert_close(values, (x @ W_enc[0])[:, None].repeat(1, 8))


@pytest.mark.parametrize("level", level_parameters())
def test_a_cached_screen_changes_no_bit(level, monkeypatch):
    monkeypatch.setenv("MICROTOME_CPU_ISA", level)
    i = Case("cached", 40, 50, 2000, 9).inputs()
    cold = call(i, 9)
    for kind in ("q15", "bf16"):  # a screen of the other kind is not used
        warm = call(i, 9, screen=screen_weights(i["W_enc"], kind))
        assert torch.equal(cold[0], warm[0])
        assert torch.equal(cold[1], warm[1])


def test_the_screen_keeps_few_candidates_on_gaussian_rows():
    if not has_level("avx2"):
        pytest.skip("the generic level does not screen")
    i = Case("certificate", 64, 256, 8192, 32).inputs()
    _, _, candidates = call(i, 32)
    assert candidates.float().mean() < 3 * 32


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("n", [1, 2, 40, 700])
def test_thread_counts_change_no_bit(threads, n):
    i = Case("threads", n, 24, 5000, 12).inputs()
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = call(i, 12)
        torch.set_num_threads(threads)
        got = call(i, 12)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[1], expected[1])


def test_more_rows_than_one_pass_holds_are_all_answered():
    i = Case("passes", 9000, 4, 80, 2).inputs()
    values, indices, _ = call(i, 2)
    z = pre_activations(i)
    torch.testing.assert_close(values.double(), z.topk(2).values, atol=1e-5, rtol=0)
    torch.testing.assert_close(z.gather(1, indices.long()), z.topk(2).values, atol=1e-5, rtol=0)


def test_fast_precision_gives_float32_values_for_nearly_the_same_features():
    i = Case("fast", 64, 128, 4096, 16).inputs()
    values, indices, _ = call(i, 16, precision="fast")
    z = pre_activations(i)
    torch.testing.assert_close(values.double(), z.gather(1, indices.long()), atol=1e-4, rtol=0)
    wanted = z.topk(16).indices
    overlap = (indices[:, :, None] == wanted[:, None, :]).any(-1).float().mean()
    assert overlap > 0.95


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_and_broadcast_inputs_work(backend):
    i = Case("views", 12, 20, 90, 6).inputs()
    row = i["x"][:1]
    wide = torch.randn(90, 40)
    wide[:, ::2] = i["W_enc"]
    with use_backend(backend):
        once = topk_encode(row, i["W_enc"], k=6)
        many = topk_encode(row.expand(12, 20), wide[:, ::2], k=6)
    assert torch.equal(many[1], once[1].expand(12, 6))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_row_that_is_not_finite_is_named(backend, bad):
    i = Case("nan", 40, 20, 300, 6).inputs()
    i["x"][17, 3] = bad
    i["x"][5, 0] = bad
    with (
        use_backend(backend),
        pytest.raises(NonFiniteError, match=r"x holds NaN or infinity in row 5, 17\."),
    ):
        call(i, 6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["W_enc", "b_enc", "b_dec"])
@pytest.mark.parametrize("k", [6, 100])
def test_a_weight_that_is_not_finite_is_named(backend, name, k):
    i = Case("nan_weight", 40, 20, 300, 6).inputs()
    i[name][0 if name == "b_dec" else 211] = float("nan")
    what = f"{name} holds NaN or infinity in row {0 if name == 'b_dec' else 211}"
    with use_backend(backend), pytest.raises(NonFiniteError, match=what):
        call(i, k)


def test_a_screen_without_a_bound_leads_to_the_exact_path():
    i = Case("stale", 4, 20, 300, 6).inputs()
    expected = call(i, 6)
    screen = screen_weights(i["W_enc"])
    screen.stats[:, 1] = float("inf")
    got = call(i, 6, screen=screen)
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[1], expected[1])


def test_pre_activations_that_overflow_are_an_error_and_not_an_answer():
    x = torch.full((2, 8), 3e38)
    with pytest.raises(NonFiniteError, match="x W_enc"):
        topk_encode(x, torch.full((100, 8), 3e38), k=3)


@pytest.mark.parametrize("scale_x", [1e-12, 1e-6, 1e6, 1e18])
@pytest.mark.parametrize("scale_w", [1e-18, 1e6, 1e15])
def test_extreme_scales_keep_their_order(scale_x, scale_w):
    g = torch.Generator().manual_seed(2)
    x, W_enc = (
        torch.randn(9, 40, generator=g) * scale_x,
        torch.randn(500, 40, generator=g) * scale_w,
    )
    W_enc *= 10.0 ** torch.randint(-3, 3, (500, 1), generator=g)
    _, indices, _ = topk_encode(x, W_enc, k=7)
    z = linear(x.double(), W_enc.double())
    chosen = z.gather(1, indices.long())
    torch.testing.assert_close(
        chosen, z.topk(7).values, atol=1e-4 * float(z.abs().max()), rtol=1e-4
    )


@pytest.mark.parametrize("level", level_parameters())
@pytest.mark.parametrize(("x", "one", "many"), [(-63, -60, -64), (-61, -60.5, -64.1)])
def test_sums_of_products_that_vanish_are_not_passed_over(level, x, one, many, monkeypatch):
    # First the products of the 28 best features are below 2^-126, then the product of their scales.
    monkeypatch.setenv("MICROTOME_CPU_ISA", level)
    W_enc = torch.zeros(128, 64)
    W_enc[:100, 0], W_enc[100:] = 2.0**one, 2.0**many
    _, indices, _ = topk_encode(torch.full((1, 64), 2.0**x), W_enc, k=3)
    assert indices.tolist() == [[100, 101, 102]]


@pytest.mark.parametrize("backend", WITH_GRADIENTS)
@pytest.mark.parametrize(
    "case",
    [c for c in CASES if c.name in ("small", "odd", "k_is_f", "dense")],
    ids=lambda c: c.name,
)
def test_gradients_are_those_of_the_dense_formula(backend, case):
    grads = []
    for dtype, dense in ((torch.float64, True), (torch.float32, True), (torch.float32, False)):
        i = {
            n: t.to(dtype).requires_grad_()
            for n, t in case.inputs().items()
            if n in ("x", "W_enc", "b_enc", "b_dec")
        }
        with use_backend("auto" if dense else backend):
            _, indices, _ = topk_encode(*(t.detach().float() for t in i.values()), k=case.k)
            values = (
                pre_activations(i, dtype).gather(1, indices.long()) if dense else call(i, case.k)[0]
            )
            weight = torch.linspace(-1, 1, values.numel(), dtype=dtype).view_as(values)
            grads.append(torch.autograd.grad((values * weight).sum(), list(i.values())))
    for name, exact, plain, got in zip(("x", "W_enc", "b_enc", "b_dec"), *grads, strict=True):
        assert_accurate(got, plain, exact, name)


@pytest.mark.parametrize("backend", WITH_GRADIENTS)
def test_the_op_passes_opcheck(backend):
    i = Case("opcheck", 6, 10, 70, 3).inputs()
    screen = screen_weights(i["W_enc"])
    with use_backend(backend):
        for x in (i["x"], i["x"].t().contiguous().t()):
            args = (
                x.requires_grad_(),
                i["W_enc"].requires_grad_(),
                i["b_enc"],
                i["b_dec"],
                3,
                "exact",
            )
            torch.library.opcheck(torch.ops.microtome.topk_encode, (*args, *screen))
            torch.library.opcheck(
                torch.ops.microtome.topk_encode,
                (*args[:2], None, None, 3, "fast", "auto", None, None),
            )


def test_a_compiled_graph_holds_the_op_whole():
    i = Case("compile", 6, 10, 70, 3).inputs()
    compiled = torch.compile(
        lambda x: topk_encode(x, i["W_enc"], i["b_enc"], k=3)[0],
        fullgraph=True,
        backend="aot_eager",
    )
    assert torch.equal(compiled(i["x"]), topk_encode(i["x"], i["W_enc"], i["b_enc"], k=3)[0])


def test_autocast_leaves_float32_alone():
    i = Case("autocast", 6, 10, 70, 3).inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16), use_backend("reference"):
        values, _, _ = call(i, 3)
    torch.testing.assert_close(
        values.double(), pre_activations(i).topk(3).values, atol=1e-5, rtol=0
    )


def test_working_memory_does_not_grow_with_the_number_of_features():
    """f = 1,048,576: the [n, f] pre-activations alone would take a gibibyte."""
    if not has_level("generic"):
        pytest.skip("the compiled extension is absent")
    script = """
import resource, torch
from microtome.ops import topk_encode
def peak():
    lines = open("/proc/self/status").read().splitlines()
    return int(next(l for l in lines if l.startswith("VmHWM")).split()[1]) / 1024
x, W = torch.randn(256, 16), torch.randn(1 << 20, 16)
topk_encode(x, W[:4096], k=32)
before = peak()
topk_encode(x, W, k=32)
print(peak() - before)
"""
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert float(out.stdout) < 64


def test_messages_say_what_came_and_what_is_allowed():
    x, W_enc = torch.randn(3, 4), torch.randn(8, 4)
    with pytest.raises(ArgumentError, match=r"topk_encode: k must be between 1 and f=8, got k=9\."):
        topk_encode(x, W_enc, k=9)
    with pytest.raises(ArgumentError, match=r"got k=0\."):
        topk_encode(x, W_enc, k=0)
    with pytest.raises(
        ShapeError, match=r"W_enc must be \[f, d\] with d=4 as in x, got shape \[8, 5\]"
    ):
        topk_encode(x, torch.randn(8, 5), k=2)
    with pytest.raises(ShapeError, match=r"x must be \[n, d\], got shape \[4\]"):
        topk_encode(x[0], W_enc, k=2)
    with pytest.raises(DtypeError, match="share one dtype, got x float32, W_enc float64"):
        topk_encode(x, W_enc.double(), k=2)
    with pytest.raises(
        DtypeError, match="x must be float32, bfloat16, float16, float64, got int64"
    ):
        topk_encode(x.long(), W_enc, k=2)
    with pytest.raises(
        ArgumentError, match="precision must be one of 'exact', 'fast', 'fp8', got 'sloppy'"
    ):
        topk_encode(x, W_enc, k=2, precision="sloppy")


def test_a_demanded_backend_that_cannot_run_lists_inputs_and_reasons():
    x, W_enc = torch.randn(3, 4, dtype=torch.float64), torch.randn(8, 4, dtype=torch.float64)
    with use_backend("cpu"), pytest.raises(BackendError) as caught:
        topk_encode(x, W_enc, k=2)
    message = str(caught.value)
    assert "topk_encode: backend 'cpu' was demanded but cannot run here." in message
    assert "x: [3, 4] float64 cpu" in message
    assert "cpu: dtype float64 (has float32)" in message
    assert 'use_backend("reference")' in message
