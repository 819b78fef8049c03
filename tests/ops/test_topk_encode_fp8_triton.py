"""The Triton encoder screened in e4m3: bits, answers, what the certificate sees, repair."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from microtome._seed import generator
from microtome.errors import NonFiniteError
from microtome.ops import screen_weights, topk_encode, topk_encode_fp8, use_backend
from microtome.testing.triton import DEVICE, INTERPRETED, MARKS, RUNS, SILENT

pytestmark = MARKS
if RUNS:
    triton = pytest.importorskip("triton")
    tl = triton.language
    from microtome.kernels import fp8
    from microtome.kernels import topk_encode as encode
    from microtome.kernels import topk_encode_fp8 as encode_fp8
    from microtome.kernels import topk_narrow as narrow

    @triton.jit
    def _round_kernel(value, code, near, N: tl.constexpr):
        i = tl.arange(0, N)
        bits, rounded = fp8.round_to_e4m3(tl.load(value + i))
        tl.store(code + i, bits)
        tl.store(near + i, rounded)


def inputs(n: int, d: int, f: int, *, bias: bool = True) -> list[Tensor | None]:
    """x with a massive column, W_enc with norms that differ, biases."""
    g = generator(5, f"fp8 {n} {d} {f}")
    x, W = torch.randn(n, d, generator=g), torch.randn(f, d, generator=g)
    x[:, 0] *= 30
    W *= torch.exp(0.3 * torch.randn(f, 1, generator=g))
    b_enc = torch.randn(f, generator=g) if bias else None
    b_dec = torch.randn(d, generator=g) if bias else None
    return [None if t is None else t.to(DEVICE) for t in (x, W, b_enc, b_dec)]


def exact(*args: Tensor | None, k: int) -> Tensor:
    double = [None if t is None else t.double() for t in args]
    with use_backend("reference"):
        return topk_encode(*double, k=k)[1]


def test_numbers_are_rounded_to_the_nearest_e4m3_ties_to_even() -> None:
    codes = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    ties = (codes[1:] + codes[:-1]) / 2
    beside = [torch.nextafter(ties, torch.tensor(s * 1e9)) for s in (-1, 1)]
    value = torch.cat([codes, ties, *beside, torch.tensor([460.0, 1e-30, 0.0])])
    value = torch.cat([value, -value])
    value = torch.nn.functional.pad(value, (0, 1024 - len(value)))
    expected = value.to(torch.float8_e4m3fn)
    value = value.to(DEVICE)
    code, near = torch.empty(1024, dtype=torch.uint8, device=DEVICE), torch.empty_like(value)
    _round_kernel[(1,)](value, code, near, N=1024, enable_fp_fusion=True)
    assert torch.equal(code.cpu(), expected.view(torch.uint8))
    assert torch.equal(near.cpu(), expected.float())


@pytest.mark.parametrize("d", [3, 128, 200])
def test_a_screen_has_the_bits_of_the_reference(d: int) -> None:
    w = torch.randn(150, d, generator=generator(3, "bits"))
    w *= torch.logspace(-35, 35, 150)[:, None]
    w[3], w[4, 1:], w[5] = 0.0, 0.0, 1.0
    w = w.to(DEVICE)
    with use_backend("reference"):
        expected = screen_weights(w, "fp8")
    with use_backend("triton"):
        got = screen_weights(w, "fp8")
    assert got.kind == "fp8"
    assert torch.equal(got.shadow, expected.shadow)
    assert torch.equal(got.stats, expected.stats)


def test_a_screen_names_the_row_that_is_not_finite() -> None:
    w = torch.ones(5, 3, device=DEVICE)
    w[2, 1] = torch.inf
    if not INTERPRETED:
        pytest.skip("a GPU raises at a later call")
    with (
        use_backend("triton"),
        pytest.raises(NonFiniteError, match=r"W_enc holds NaN or inf.* row 2"),
    ):
        screen_weights(w, "fp8")


@pytest.mark.parametrize(
    ("n", "d", "f", "k", "change"),
    [
        (5, 24, 900, 9, {}),
        (33, 140, 1500, 4, {"BM": 16, "BN": 64, "rows": 32}),  # two blocks; tiles not sampled
    ],
)
@pytest.mark.parametrize("tma", [False, True])
def test_the_answer_is_the_exact_one(
    n: int, d: int, f: int, k: int, change: dict[str, int], tma: bool
) -> None:
    args = inputs(n, d, f, bias=tma)
    p = encode.plan(n, f, k, change.get("BN", 128), 6.0, 5.5)
    assert p.capacity < f
    observed = torch.full((n,), -1.0, device=DEVICE)
    _, indices, candidates = encode.run(
        dataclasses.replace(p, **change), *args, k, tma=tma, observed=observed
    )
    assert torch.equal(indices.long(), exact(*args, k=k).long())
    assert int(candidates.max()) < f // 2  # nothing was repaired
    assert bool(((observed > 0.1) & (observed < 5.5)).all())


def test_the_certificate_is_the_largest_error_among_the_computed_features() -> None:
    n, d, f, k = 6, 64, 2000, 8
    x, W, _, _ = args = inputs(n, d, f, bias=False)
    screen = screen_weights(W, "fp8")
    with use_backend("triton"):
        values, indices, candidates, observed = topk_encode_fp8(*args, k=k, screen=screen)
        again = topk_encode_fp8(*args, k=k)
        short = topk_encode(*args, k=k, precision="fp8", screen=screen)
    assert all(map(torch.equal, again, (values, indices, candidates, observed)))
    assert all(map(torch.equal, short, (values, indices, candidates)))
    rows = screen_weights(x, "fp8")
    near = [s.shadow.view(torch.float8_e4m3fn).double() * s.stats[:, :1].double()
            for s in (rows, screen)]  # fmt: skip
    error = (near[0] @ near[1].T - x.double() @ W.double().T).abs()
    norm, lost = rows.stats[:, 1:3].double().T[:, :, None]
    w_norm, w_lost = screen.stats[:, 1:3].double().T[:, None]
    of_w = (lost**2 + (0.01 * (norm + lost)) ** 2) * w_norm**2
    off = error / ((of_w + ((norm + lost) * w_lost) ** 2) / d).sqrt()
    chosen = off.gather(1, indices.long()).amax(1)
    assert bool((observed >= chosen * 0.99 - 0.01).all())
    assert bool((observed <= off.amax(1) * 1.01).all())


def test_a_row_whose_errors_are_too_large_is_computed_whole() -> None:
    n, f, k = 5, 900, 6
    args = inputs(n, 24, f)
    with use_backend("triton"):
        *got, observed = topk_encode_fp8(*args, k=k, repair=1e-3)
        expected = topk_encode(*args, k=k)
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[1], expected[1])
    assert got[2].tolist() == [f] * n
    assert bool((observed > 1e-3).all())


def test_rows_screened_with_other_weights_are_seen_and_repaired() -> None:
    n, f, k = 5, 900, 6
    args = inputs(n, 24, f)
    W = args[1]
    other = torch.randn(W.shape, generator=generator(6)).to(DEVICE)
    screen = screen_weights(W + 0.5 * W.norm() / other.norm() * other, "fp8")
    with use_backend("triton"):
        _, indices, candidates, observed = topk_encode_fp8(*args, k=k, screen=screen)
    assert torch.equal(indices.long(), exact(*args, k=k).long())
    assert candidates.tolist() == [f] * n
    assert bool((observed > 4).all())


def test_bf16_rows_get_values_of_their_own() -> None:
    x, W, _, _ = inputs(6, 64, 2000, bias=False)
    x, W = x.bfloat16(), W.bfloat16()
    with use_backend("triton"):
        values, indices, _, observed = topk_encode_fp8(x, W, k=8)
    assert torch.equal(indices.long(), exact(x, W, None, None, k=8).long())
    z = (x.double() @ W.double().T).gather(1, indices.long())
    torch.testing.assert_close(values.double(), z, rtol=2.0**-7, atol=0.0)
    assert bool((observed > 0).all())


def test_lists_too_long_to_be_narrowed_are_screened_in_bf16(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(narrow, "WIDEST", 128)
    n, f, k = 3, 900, 6
    args = inputs(n, 24, f)
    with use_backend("triton"):
        _, indices, candidates, observed = topk_encode_fp8(*args, k=k)
    assert torch.equal(indices.long(), exact(*args, k=k).long())
    assert int(candidates.max()) < f
    assert observed.tolist() == [0.0] * n


@SILENT
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_row_without_an_answer_is_marked_on_the_device(
    bad: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encode, "_look", lambda *_: None)
    f, k = 900, 3
    x, W, b_enc, b_dec = inputs(4, 16, f)
    x[2, 5] = bad
    args = (x, W, b_enc, b_dec, k, 6.0, 5.5, "auto", None, None)
    values, indices, candidates, _ = encode_fp8.launch(*args)
    assert values[2].isnan().all()
    assert indices[2].tolist() == [0, 1, 2]
    assert int(candidates[2]) == f
    fine = [0, 1, 3]
    assert torch.equal(indices[fine].long(), exact(x[fine], W, b_enc, b_dec, k=k).long())


@SILENT
def test_rows_of_any_scale_are_answered() -> None:
    x, W, b_enc, _ = inputs(4, 16, 900)
    x *= torch.tensor([1e25, 1e-30, 0.0, 1.0], device=DEVICE)[:, None]
    W *= 1e11
    with use_backend("triton"):
        _, indices, candidates, _ = topk_encode_fp8(x, W, b_enc, None, k=5)
    assert torch.equal(indices.long(), exact(x, W, b_enc, None, k=5).long())
    assert int(candidates[3]) < 900
