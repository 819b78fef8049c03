"""screen_weights: codes by hand, and in float64 that every bound is a bound."""

import sys

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from microtome import _native
from microtome.errors import ArgumentError, DtypeError, NonFiniteError, ShapeError
from microtome.ops import (
    batch_topk_encode,
    screen_weights,
    threshold_encode,
    topk_encode,
    use_backend,
)
from microtome.ops.screen_weights import KINDS, REFRESHED, Screen, _screen, best_kind, stride
from microtome.testing import backends_of

on_every_backend = pytest.mark.parametrize(
    "backend",
    [b for b in backends_of(_screen) if b.id != "triton"],  # which makes fp8 alone
)
MODULE = sys.modules[screen_weights.__module__]
for_both_kinds = pytest.mark.parametrize("kind", REFRESHED)


def rows(d: int) -> Tensor:
    """Rows of every awkward kind: plain, massive, zero, denormal, tiny, huge, mixed, flat."""
    g = torch.Generator().manual_seed(d)
    w = torch.randn(12, d, generator=g)
    w[1, 0] *= 1e4
    w[2] = 0
    w[3] *= 1e-40
    w[4] *= 1e-30
    w[5] *= 1e37
    w[6, ::2] *= 1e-25
    w[7] = 1.0
    w[8] = -(2.0**-149)
    w[9] = 3e38 * torch.sign(w[9]) / d**0.5
    w[10] = w[10].bfloat16().float()
    w[10, -1] += 1e-20
    w[11] *= 1e-20
    return w


def decoded(screen: Screen, d: int) -> Tensor:
    """The shadow as float64 [f, d]."""
    codes = screen.shadow[:, :d].contiguous()
    values = codes.view(torch.bfloat16) if screen.kind == "bf16" else codes
    return values.double() * screen.stats[:, :1].double()


@on_every_backend
def test_codes_are_those_worked_by_hand(backend: str) -> None:
    # bf16 keeps 7 bits behind the point: 1 + 2^-8 lies between 1 and 1 + 2^-7 and goes to the even
    # one, 1; 1 + 3 * 2^-8 goes up to 1 + 2^-6. Each is off by 2^-8: the residual is sqrt(2) / 256.
    ties = torch.tensor([[1 + 2**-8, 1 + 3 * 2**-8]])
    # The step is 2 / 32767 (1 + 2^-20): 1 is 16383.4844 steps and -2 is -32766.9688, which leaves
    # 0.4844 and 0.0312 steps, together 0.4854.
    plain = torch.tensor([[1.0, -2.0]])
    # Nine ones: their norm 3 decides the step, 3 / (46340 - 3); each code is 46337 / 3 = 15445.67.
    ones = torch.ones(1, 9)
    with use_backend(backend):
        bf16, q15, flat = (
            screen_weights(ties, "bf16"),
            screen_weights(plain, "q15"),
            screen_weights(ones, "q15"),
        )
    assert bf16.shadow[0, :2].view(torch.bfloat16).tolist() == [1.0, 1 + 2**-6]
    assert bf16.stats[0].tolist() == pytest.approx(
        [1.0, (257**2 + 259**2) ** 0.5 / 256, 2**0.5 / 256, 0.0], rel=1e-4
    )
    assert q15.shadow[0, :2].tolist() == [16383, -32767]
    assert q15.stats[0].tolist() == pytest.approx(
        [2 / 32767, 5**0.5, 0.4854 * 2 / 32767, 0], rel=5e-3
    )
    assert flat.stats[0, 0].item() == pytest.approx(3 / 46337, rel=1e-4)
    assert flat.shadow[0, :10].tolist() == [15446] * 9 + [0]


@on_every_backend
@for_both_kinds
@pytest.mark.parametrize("d", [1, 2, 15, 16, 17, 64, 96, 333])
def test_norms_bound_from_above_and_tightly(backend: str, kind: str, d: int) -> None:
    w = rows(d)
    with use_backend(backend):
        screen = screen_weights(w, kind)
    norm = w.double().norm(dim=1)
    error = (w.double() - decoded(screen, d)).norm(dim=1)
    scale, norm_up, error_up, rest = screen.stats.double().unbind(1)
    assert bool((norm_up >= norm).all())
    assert bool((error_up >= error).all())
    assert bool((norm_up <= norm * 1.0001 + 2**-109).all())
    assert bool((error_up <= error * 1.0001 + norm * 2**-36 + 2**-109).all())
    assert rest.abs().max() == 0
    if kind == "q15":
        codes = screen.shadow.double()
        assert codes.abs().max() <= 32767
        assert codes.norm(dim=1).max() <= 46340
        assert bool((error <= 0.5001 * scale * d**0.5).all())
    else:
        assert bool((error <= norm * 2**-8 + 2**-126).all())


@on_every_backend
@for_both_kinds
@pytest.mark.parametrize("d", [1, 31, 32, 33, 96, 128])
def test_rows_are_padded_with_zeros_to_an_odd_number_of_lines(
    backend: str, kind: str, d: int
) -> None:
    with use_backend(backend):
        screen = screen_weights(torch.randn(5, d), kind)
    assert screen.shadow.shape == (5, stride(d))
    assert stride(d) >= d
    assert stride(d) * 2 % 128 == 64
    assert screen.shadow[:, d:].abs().sum() == 0


@on_every_backend
def test_a_row_of_zeros_has_scale_one_and_codes_zero(backend: str) -> None:
    with use_backend(backend):
        screen = screen_weights(torch.zeros(2, 7), "q15")
    assert screen.shadow.abs().sum() == 0
    assert screen.stats[:, 0].tolist() == [1.0, 1.0]
    assert screen.stats[:, 1:].max() <= 2**-109


@on_every_backend
def test_bf16_bits_are_those_of_torch(backend: str) -> None:
    w = torch.randn(64, 129) * torch.logspace(-44, 37, 64)[:, None]
    with use_backend(backend):
        shadow = screen_weights(w, "bf16").shadow[:, :129]
    assert torch.equal(shadow, w.bfloat16().view(torch.int16))


@on_every_backend
def test_bf16_never_rounds_to_infinity(backend: str) -> None:
    w = torch.full((1, 3), torch.finfo(torch.float32).max)
    w[0, 1] *= -1
    with use_backend(backend):
        screen = screen_weights(w, "bf16")
    largest = torch.finfo(torch.bfloat16).max
    assert screen.shadow[0, :3].view(torch.bfloat16).tolist() == [largest, -largest, largest]
    assert bool(torch.isfinite(screen.stats[0, 2]))


@on_every_backend
@for_both_kinds
def test_a_row_of_the_largest_floats_does_not_overflow_its_codes(backend: str, kind: str) -> None:
    w = torch.full((1, 40), torch.finfo(torch.float32).max)
    with use_backend(backend):
        screen = screen_weights(w, kind)
    error = (w.double() - decoded(screen, 40)).norm()
    assert error <= screen.stats[0, 2].double()
    assert error <= w.double().norm() * 2**-8
    assert screen.stats[0, 1] == torch.inf  # the norm itself is beyond float32


@on_every_backend
@for_both_kinds
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_row_with_nan_or_infinity_is_named(backend: str, kind: str, bad: float) -> None:
    w = torch.randn(200, 21)
    w[3, 20] = bad
    w[130, 0] = bad
    message = (
        r"^screen_weights: W_enc holds NaN or infinity in row 3, 130\. Drop or repair these rows "
        r"\(torch\.isfinite\(W_enc\)\.all\(-1\) finds them\)\.$"
    )
    with use_backend(backend), pytest.raises(NonFiniteError, match=message):
        screen_weights(w, kind)


@on_every_backend
@for_both_kinds
def test_strided_and_empty_inputs_work(backend: str, kind: str) -> None:
    w = torch.randn(30, 44)
    with use_backend(backend):
        strided, plain = screen_weights(w.t(), kind), screen_weights(w.t().contiguous(), kind)
        none = screen_weights(torch.empty(0, 5), kind)
    assert torch.equal(strided.shadow, plain.shadow)
    assert torch.equal(strided.stats, plain.stats)
    assert none.shadow.shape == (0, stride(5))
    assert none.stats.shape == (0, 4)


@pytest.mark.skipif(_native.why_absent() is not None, reason="the extension is absent")
@for_both_kinds
def test_threads_and_vector_widths_do_not_change_the_codes(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    w = torch.randn(300, 77)
    answers = []
    for level in ("generic", "avx2", "avx512", "amx"):
        for threads in (1, 2):
            monkeypatch.setenv("MICROTOME_CPU_ISA", level)
            before = torch.get_num_threads()
            torch.set_num_threads(threads)
            try:
                with use_backend("cpu"):
                    answers.append((level, screen_weights(w, kind)))
            finally:
                torch.set_num_threads(before)
    for level, screen in answers:
        # Without fma the norm, hence the step, may differ in its last bit.
        same = [s for name, s in answers if (name == "generic") == (level == "generic")]
        assert all(torch.equal(screen.shadow, other.shadow) for other in same)
        assert all(torch.equal(screen.stats, other.stats) for other in same)


def test_auto_is_the_kind_this_processor_multiplies_fastest() -> None:
    assert screen_weights(torch.randn(2, 3)).kind == best_kind()


def test_auto_is_bf16_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MODULE, "best_kind", lambda: "q15")
    with FakeTensorMode():  # needs no GPU
        screen = screen_weights(torch.empty(2, 3, device="cuda"))
    assert screen.kind == "bf16"
    assert screen.shadow.device.type == "cuda"


def test_wrong_inputs_are_named() -> None:
    with pytest.raises(
        ShapeError, match=r"^screen_weights: W_enc must be \[f, d\], got shape \[3\]\.$"
    ):
        screen_weights(torch.zeros(3))
    with pytest.raises(
        DtypeError, match=r"^screen_weights: W_enc must be float32, got float64\. Cast"
    ):
        screen_weights(torch.zeros(3, 3, dtype=torch.float64))
    with pytest.raises(
        ArgumentError,
        match=r"^screen_weights: kind must be one of 'auto', 'bf16', 'q15', 'fp8', got 'int8'\.$",
    ):
        screen_weights(torch.zeros(3, 3), "int8")


@on_every_backend
@for_both_kinds
def test_opcheck(backend: str, kind: str) -> None:
    with use_backend(backend):
        torch.library.opcheck(torch.ops.microtome.screen_weights.default, (torch.randn(5, 9), kind))


@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_gives_the_same_bits_block_by_block(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    W_enc = torch.randn(23, 7, generator=torch.Generator().manual_seed(0))
    with use_backend("reference"):
        whole = screen_weights(W_enc, kind)
        monkeypatch.setattr(MODULE, "_BLOCK", 7 * 5)
        blocks = screen_weights(W_enc, kind)
    assert torch.equal(whole.shadow, blocks.shadow)
    assert torch.equal(whole.stats, blocks.stats)


def test_a_gpu_has_a_screen_where_triton_reaches_it(monkeypatch: pytest.MonkeyPatch) -> None:
    has = MODULE.has_screen
    gpu = torch.device("cuda", 0)
    for reason in (None, "triton is not installed"):
        monkeypatch.setattr(MODULE, "unavailable", lambda name, why=reason: why)
        assert has(gpu, torch.float32) == (reason is None)
        assert has(torch.device("cpu"), torch.float32)
        assert not has(gpu, torch.bfloat16)
        assert not has(torch.device("meta"), torch.float32)


def test_a_screen_of_another_shape_is_refused_before_a_kernel_reads_by_it() -> None:
    x, W_enc = torch.randn(2, 8), torch.randn(20, 8)
    good = screen_weights(W_enc)
    bad = {
        "fewer rows": screen_weights(W_enc[:9]),
        "more columns": screen_weights(torch.randn(20, 80)),
        "strided": good._replace(shadow=good.shadow.repeat(1, 2)[:, ::2]),
        "another dtype": good._replace(stats=good.stats.double()),
    }
    message = r"screen does not belong to W_enc \[20, 8\]: .* Make it with screen_weights\(W_enc\)"
    for screen in bad.values():
        with pytest.raises(ArgumentError, match=message):
            topk_encode(x, W_enc, k=2, screen=screen)
        with pytest.raises(ArgumentError, match=message):
            batch_topk_encode(x, W_enc, k=2, screen=screen)
        with pytest.raises(ArgumentError, match=message):
            threshold_encode(x, W_enc, threshold=torch.zeros(20), screen=screen)
    with pytest.raises(ArgumentError, match="screen must be a Screen, got tuple"):
        topk_encode(x, W_enc, k=2, screen=tuple(good))
    with pytest.raises(ArgumentError, match=r"screen\.kind must be one of 'bf16', 'q15', 'fp8'"):
        topk_encode(x, W_enc, k=2, screen=good._replace(kind="q7"))
