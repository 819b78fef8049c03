"""What is special to sae_update's CUDA kernels, on a GPU or emulated: tiles, turns, refusals.

test_sae_update.py runs them through every case beside the other backends.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from microtome import _native
from microtome._seed import generator
from microtome.errors import BackendError
from microtome.ops import Code, Screen, UpdateRule, moments_for, sae_update, use_backend
from microtome.ops.screen_weights import stride as stride_of
from microtome.testing import assert_accurate
from microtome.testing.cuda import EMULATED, ORDERS, set_order

pytestmark = pytest.mark.skipif(
    not EMULATED and _native.why_no_cuda() is not None,
    reason="no CUDA kernels, compiled or emulated",
)
DEVICE = "cpu" if EMULATED else "cuda"
NAMES = ("W_enc", "b_enc", "W_dec", "b_dec")


@pytest.fixture(autouse=True)
def _emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    if EMULATED:
        monkeypatch.setenv("MICROTOME_EMULATE_CUDA", "1")


def step(
    backend: str, n: int, d: int, f: int, k: int, dtype: torch.dtype = torch.float32,
    rule: UpdateRule | None = None, screen: bool = False, rows: torch.dtype | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """What one step makes of random parameters; latent 0 fires on every row.

    rows: their dtype, where they hold bfloat16 numbers, and copies of the weights are kept.
    """
    g = generator(n + d + f + k, "cuda")
    rule = rule or UpdateRule("adam", lr=0.01)
    draw = lambda *shape: torch.randn(*shape, generator=g).to(dtype)  # noqa: E731
    indices = torch.randint(0, f, (n, k), generator=g).int()
    indices[:, 0] = 0
    params = [draw(f, d), draw(f), torch.nn.functional.normalize(draw(f, d), dim=1), draw(d)]
    given = [draw(n, k).abs(), draw(n, k), draw(n, d), draw(n, d)]
    if rows is not None:
        given = [t.bfloat16().to(rows) for t in given]
    *given, x = (t.to(DEVICE) for t in given)
    code, params = Code(indices.to(DEVICE), *given, 0.1), [p.to(DEVICE) for p in params]
    copies = None if rows is None else (params[0].bfloat16(), params[2].bfloat16())
    state = moments_for(tuple(params), rule)  # type: ignore[arg-type]
    stride = stride_of(d)
    shadow = torch.zeros(f, stride, dtype=torch.int16, device=DEVICE)
    stats = torch.zeros(f, 4, device=DEVICE)
    with use_backend(backend):
        fired = sae_update(
            code, x, tuple(params), state, rule, 3,  # type: ignore[arg-type]
            screen=Screen("bf16", shadow, stats) if screen else None, copies=copies,
        )  # fmt: skip
    out = {**dict(zip(NAMES, params, strict=True)), "fired": fired}
    out |= {f"moment {i}": m for i, m in enumerate(state) if m is not None}
    if screen:
        out |= {"shadow": shadow, "stats": stats}
    if copies is not None:
        out |= dict(zip(("copy of W_enc", "copy of W_dec"), copies, strict=True))
    return {name: t.cpu() for name, t in out.items()}


# Two, four and eight vectors a thread; two and four where rows are not 16-byte aligned.
@pytest.mark.parametrize("d", [1028, 2052, 4100, 1030, 2054])
def test_every_tile_of_the_width_is_accurate(d: int) -> None:
    got = step("cuda", 3, d, 4, 2)
    plain, exact = (step("reference", 3, d, 4, 2, t) for t in (torch.float32, torch.float64))
    assert torch.equal(got.pop("fired"), exact["fired"])
    for name, tensor in got.items():
        assert_accurate(tensor, plain[name], exact[name], name, 4.0)


@pytest.mark.parametrize("d", [1028, 4100, 1030])
def test_bfloat16_rows_and_copies_are_those_of_float32_in_every_tile(d: int) -> None:
    rule = UpdateRule("signsgd", lr=0.01)
    got, wide = (
        step("cuda", 3, d, 4, 2, rule=rule, rows=dtype) for dtype in (torch.bfloat16, torch.float32)
    )
    assert all(torch.equal(got[name], t) for name, t in wide.items())
    for name in ("W_enc", "W_dec"):
        assert torch.equal(got[f"copy of {name}"], got[name].bfloat16())


def test_blocks_take_turns_where_there_are_many_latents() -> None:
    size = (5, 4, 4100, 3)  # two latents a block, and a block with one
    got = step("cuda", *size)
    plain, exact = (step("reference", *size, t) for t in (torch.float32, torch.float64))
    for name in NAMES:
        assert_accurate(got[name], plain[name], exact[name], name)
    assert torch.equal(got["fired"], exact["fired"])


@pytest.mark.parametrize("optimizer", ["adam", "signsgd"])
@pytest.mark.parametrize("d", [6, 40])
def test_the_order_of_threads_and_blocks_changes_no_bit(d: int, optimizer: str) -> None:
    # 300 entries of latent 0: two full chunks and what is left.
    answers = []
    for order in ORDERS:
        set_order(order, 5)
        try:
            rule = UpdateRule(optimizer, lr=0.01, weight_decay=0.1)
            answers.append(step("cuda", 300, d, 9, 2, rule=rule, screen=True))
        finally:
            set_order("forward")
    for other in answers[1:]:
        assert all(torch.equal(other[name], t) for name, t in answers[0].items())
    lengths = answers[0]["W_dec"].double().norm(dim=1)
    torch.testing.assert_close(lengths, torch.ones(9).double(), rtol=0, atol=1e-6)


def test_the_screens_norms_are_bounds_from_above_and_close() -> None:
    got = step("cuda", 8, 70, 12, 3, screen=True)
    W = got["W_enc"].double()
    shadow = got["shadow"][:, :70].view(torch.bfloat16).double()
    assert torch.equal(shadow, W.float().bfloat16().double())
    assert not bool(got["shadow"][:, 70:].any())
    for column, exact in ((1, W.norm(dim=1)), (2, (W - shadow).norm(dim=1))):
        bound = got["stats"][:, column].double()
        assert bool((bound >= exact).all())
        assert bool((bound <= exact * 1.001 + 1e-15).all())


def test_what_the_kernels_do_not_take_is_said() -> None:
    for d, reason in (
        (16388, r"d=16388 \(a block holds a row of up to 16384\)"),
        (8194, r"d=8194 \(a block holds a row of up to 8192; 16384 where rows start at multiples"),
    ):
        with pytest.raises(BackendError, match=f"cuda: {reason}"):
            step("cuda", 1, d, 1, 1)
    with pytest.raises(BackendError, match=r"cuda: dtype float64 \(has float32\)"):
        step("cuda", 1, 4, 1, 1, torch.float64)


def test_rows_whose_sums_fill_what_a_block_has_unasked_are_updated() -> None:
    # 384 threads with 128 bytes each of b_dec's gradient, beside 3 KiB of entries and sums
    got, expected = (step(backend, 2, 12288, 1, 1) for backend in ("cuda", "reference"))
    for name, mine in got.items():
        torch.testing.assert_close(mine, expected[name], atol=1e-5, rtol=1e-5, msg=name)
