"""topk_encode_fp8 without a GPU: its screen, the model of its errors, exact answers, messages."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from microtome._seed import generator
from microtome.errors import ArgumentError, NonFiniteError
from microtome.ops import (
    UpdateRule,
    moments_for,
    screen_weights,
    topk_encode,
    topk_encode_fp8,
    use_backend,
)
from microtome.ops._sae_update_inputs import check_state
from microtome.ops.screen_weights import Screen
from microtome.ops.topk_encode_fp8 import _encode

MODULE = sys.modules[topk_encode_fp8.__module__]


def draw(*shape: int, name: str = "fp8") -> Tensor:
    return torch.randn(*shape, generator=generator(7, name))


def decoded(screen: Screen) -> Tensor:
    """The turned rows that the codes stand for, float64 [f, stride]."""
    codes = screen.shadow.view(torch.float8_e4m3fn)
    return codes.double() * screen.stats[:, :1].double()


def kinds_of_rows() -> dict[str, tuple[Tensor, Tensor]]:
    """x [64, d] and W [4096, d] of awkward kinds."""
    n, d, f = 64, 384, 4096
    x, W = draw(n, d, name="x"), draw(f, d, name="W")
    W = W * torch.exp(0.3 * draw(f, 1, name="norms"))
    massive, reading = x.clone(), W.clone()
    massive[:, :3] *= 30
    reading[:, :3] *= 4
    tails = draw(n, d, name="t") / draw(n, d, name="u").abs().clamp_min(0.05)
    heavy = draw(f, d, name="v") / draw(f, d, name="w").abs().clamp_min(0.05)
    return {
        "gaussian": (x, W), "massive": (massive, W), "massive, and read": (massive, reading),
        "heavy tails": (tails, heavy), "short": (x[:, :40], W[:, :40]),
    }  # fmt: skip


def test_codes_are_those_worked_by_hand() -> None:
    # The first column has the sign +: a row [c, 0, ...] is turned into c / sqrt(128) everywhere.
    # All are its largest number, 448 steps. Nothing is lost but the rounding of the scale.
    with use_backend("reference"):
        shadow, stats = screen_weights(torch.tensor([[3.0], [-0.5], [0.0]]), "fp8")[1:]
    assert shadow.shape == (3, 128)
    assert shadow.dtype == torch.uint8
    assert shadow[:2].unique(dim=1).tolist() == [[0x7E], [0xFE]]
    assert shadow[2].sum() == 0
    assert stats[:, 0].tolist() == pytest.approx(
        [3 / 128**0.5 / 448, 0.5 / 128**0.5 / 448, 128**0.5]
    )
    assert stats[:, 1].tolist() == pytest.approx([3, 0.5, 0])
    assert stats[:, 2].max() < 1e-6
    assert stats[:, 3].tolist() == [0, 0, 0]


@pytest.mark.parametrize("d", [1, 40, 128, 129, 300])
def test_turned_rows_have_the_products_of_the_rows(d: int) -> None:
    w = draw(20, d)
    screen = screen_weights(w, "fp8")
    assert screen.kind == "fp8"
    assert screen.shadow.shape == (20, -(-d // 128) * 128)
    near, norm, wide = decoded(screen), w.double().norm(dim=1), w.double()
    allowed = screen.stats[:, 2].double() * norm.max()
    assert bool(((near @ near.T - wide @ wide.T).abs() <= 2.1 * allowed.max()).all())
    torch.testing.assert_close(screen.stats[:, 1].double(), norm, rtol=1e-5, atol=0)
    assert bool((screen.stats[:, 2] < 2**-4 * screen.stats[:, 1]).all())  # half a step of 3 bits
    assert near.abs().amax(1).tolist() == pytest.approx((448 * screen.stats[:, 0]).tolist())


@pytest.mark.parametrize("name", kinds_of_rows())
def test_errors_are_as_large_as_the_model_says_whatever_the_rows_are_like(name: str) -> None:
    x, W = kinds_of_rows()[name]
    rows, features = screen_weights(x, "fp8"), screen_weights(W, "fp8")
    error = decoded(rows) @ decoded(features).T - x.double() @ W.double().T  # [n, f]
    norm, lost = rows.stats[:, 1:3].double().T[:, :, None]
    w_norm, w_lost = features.stats[:, 1:3].double().T[:, None]
    sigma = ((lost * w_norm) ** 2 + ((norm + lost) * w_lost) ** 2).sqrt() / x.shape[1] ** 0.5
    off = error / sigma
    assert 0.9 < float(off.std()) < 1.1 or name == "short"  # whose 40 columns become more
    assert float(off.abs().max()) < 6  # of 262144
    # No row, and no feature that reads the massive columns, is far from the others either.
    assert float(off.std(1).max()) < 1.5
    assert float(off.std(0).max()) < 2.2


def test_without_products_of_8_bits_the_answer_is_the_exact_one() -> None:
    x, W, b_enc, b_dec = draw(9, 40), draw(300, 40, name="W"), draw(300), draw(40)
    screen = screen_weights(W, "fp8")
    with use_backend("reference"):
        expected = topk_encode(x, W, b_enc, b_dec, k=6)
        *got, observed = topk_encode_fp8(x, W, b_enc, b_dec, k=6, screen=screen)
        assert all(map(torch.equal, got, expected))
        assert observed.tolist() == [0.0] * 9
    expected = topk_encode(x, W, b_enc, b_dec, k=6)
    for given in (None, screen, screen_weights(W)):
        got = topk_encode(x, W, b_enc, b_dec, k=6, precision="fp8", screen=given)
        assert all(map(torch.equal, got, expected))


def test_the_op_passes_opcheck_and_has_the_gradients_of_topk_encode() -> None:
    x, W, b_enc, b_dec = (t.requires_grad_() for t in (draw(5, 9), draw(40, 9), draw(40), draw(9)))
    grads = [
        torch.autograd.grad(op(x, W, b_enc, b_dec, k=3)[0].square().sum(), (x, W, b_enc, b_dec))
        for op in (topk_encode, topk_encode_fp8)
    ]
    assert all(map(torch.equal, *grads))
    with use_backend("reference"):
        arguments = (x, W, b_enc, b_dec, 3, 6.0, 4.0, "auto", None, None)
        torch.library.opcheck(torch.ops.microtome.topk_encode_fp8, arguments)
        weights = (W.detach(), "fp8")
        torch.library.opcheck(torch.ops.microtome.screen_weights.default, weights)


def test_a_compiled_graph_holds_the_op_whole() -> None:
    W = draw(70, 10)
    call = lambda x: topk_encode(x, W, k=3, precision="fp8")[0]  # noqa: E731
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(draw(6, 10)), call(draw(6, 10)))


def test_a_gpu_without_products_of_8_bits_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MODULE, "why_not_common", lambda *_: None)
    triton = next(b for b in _encode.backends if b.name == "triton")
    with FakeTensorMode():  # needs no GPU
        x = torch.empty(2, 3, device="cuda")
    for capability, reason in {
        (8, 9): None,
        (9, 0): None,
        (8, 0): "compute capability 8.0 has no products of e4m3 (needs 8.9); "
        'precision="exact" screens in bf16 there',
    }.items():
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
        assert triton.why_not(x, x, None, None, 1, 6.0, 4.0, "auto", None, None) == reason


def test_a_backend_that_answers_exactly_is_asked_for_k_as_well(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    exact = sys.modules[topk_encode.__module__]
    for name in ("why_not_common", "unavailable"):
        monkeypatch.setattr(exact, name, lambda *_: None)
    cuda = next(b for b in _encode.backends if b.name == "cuda")
    x = draw(2, 3)
    assert cuda.why_not(x, x, None, None, 1, 6.0, 4.0, "auto", None, None) is None
    reason = cuda.why_not(x, x, None, None, 8193, 6.0, 4.0, "auto", None, None)
    assert reason == "k=8193 (a block sorts up to 8192)"


def test_wrong_arguments_are_named() -> None:
    x, W = draw(3, 4), draw(8, 4)
    with pytest.raises(
        ArgumentError, match=r"^topk_encode_fp8: k must be between 1 and f=8, got k=9\."
    ):
        topk_encode_fp8(x, W, k=9)
    for options in ({"sigmas": 4.0}, {"repair": 0.0}, {"sigmas": float("inf")}):
        with pytest.raises(
            ArgumentError,
            match=r"^topk_encode_fp8: sigmas must be greater than repair, and repair than 0, got "
            r"sigmas=.*, repair=.*\. 6 and 4 are the defaults\.$",
        ):
            topk_encode_fp8(x, W, k=1, **options)
    W[5, 1] = torch.nan
    with pytest.raises(
        NonFiniteError, match=r"screen_weights: W_enc holds NaN or infinity in row 5"
    ):
        screen_weights(W, "fp8")


def test_a_training_step_does_not_take_a_screen_that_it_would_not_refresh() -> None:
    params = (draw(8, 4), draw(8), draw(8, 4), draw(4))
    rule = UpdateRule()
    with pytest.raises(
        ArgumentError, match=r"^sae_update: screen\.kind must be one of 'bf16', 'q15', got 'fp8'\.$"
    ):
        check_state(params, moments_for(params, rule), rule, screen_weights(params[0], "fp8"), None)
