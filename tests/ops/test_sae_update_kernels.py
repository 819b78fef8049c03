"""sae_update's Triton kernels in every state of the moments, beside the reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from microtome._seed import generator, step_key
from microtome.ops import Code, UpdateRule, moments_for, sae_update, use_backend
from microtome.ops import _sae_update_states as states
from microtome.testing import triton as where

pytest.importorskip("triton", reason="triton is not installed")
pytestmark = where.MARKS

if where.RUNS:
    import triton as tr
    import triton.language as tl
    from microtome.kernels import sae_update as kernels
    from microtome.kernels.sae_update_states import read, words, write

    @tr.jit
    def _through_kernel(
        values, stored, back, f, d, row_bytes, key,
        SECOND: tl.constexpr, STATE: tl.constexpr, START: tl.constexpr, BL: tl.constexpr,
        BD: tl.constexpr,
    ):  # fmt: skip
        row = tl.arange(0, BL).to(tl.int64)
        live = row < f
        column = START + tl.arange(0, BD)
        mask = live[:, None] & (column < d)[None, :]
        at = row[:, None] * d + column[None, :]
        moment = tl.load(values + at, mask=mask, other=0.0)
        random = words(key, row, column)
        write(stored, moment, random, row, live, mask, d, row_bytes, SECOND, STATE, START, BD)
        tl.debug_barrier()
        again = read(stored, row, live, mask, d, row_bytes, SECOND, STATE, START, BD)
        tl.store(back + at, again, mask=mask)


@pytest.mark.parametrize("second", [False, True])
@pytest.mark.parametrize("state", ["bfloat16", "int8"])
@pytest.mark.parametrize(("d", "tiles"), [(40, (64, 0)), (300, (256, 128))])
def test_moments_are_stored_and_read_to_the_bit_as_the_reference_does(
    d: int, tiles: tuple[int, int], state: str, second: bool
) -> None:
    g, key = generator(0, "bits"), step_key(9, 2)
    values = torch.randn(6, d, generator=g) * torch.exp(6 * torch.randn(6, d, generator=g))
    values[0], values[1], values[2] = 0.0, values[1] * 1e-35, values[2] * 1e30
    values = values.abs().clamp_max(1e38) if second else values
    wanted = states.zeros(values, state)
    bits = states.words(key, torch.arange(6), d)
    states.write(wanted, slice(None), values, bits, second=second)
    read_back = states.read(wanted, values, second=second)
    got, back = torch.zeros_like(wanted), torch.zeros_like(values)
    for start, BD in ((0, tiles[0]), (tiles[0], tiles[1])):
        if BD:
            raw = got.view(torch.int16) if state == "bfloat16" else got
            on = [t.to(where.DEVICE) for t in (values, raw, back)]
            _through_kernel[(1,)](
                *on, 6, d, wanted.shape[1], kernels._signed(key), SECOND=second, STATE=state,
                START=start, BL=8, BD=BD, enable_fp_fusion=True,
            )  # fmt: skip
            raw.copy_(on[1])
            back.copy_(on[2])
    assert torch.equal(got, wanted)
    assert torch.equal(back, read_back)


def stepped(backend: str, state: str, rule: UpdateRule, d: int) -> list[Tensor]:
    """Parameters, then moments as read, after two steps from zero at f = 5."""
    g, device = generator(3, "stepped"), where.DEVICE if backend == "triton" else "cpu"
    n, f, k = 6, 5, 2
    draw = lambda *shape: torch.randn(*shape, generator=g).to(device)  # noqa: E731
    params = (draw(f, d), draw(f), draw(f, d), draw(d))
    moments = moments_for(params, rule, state)
    with use_backend(backend):
        for step in (1, 2):
            indices = torch.randint(0, f - 1, (n, k), generator=g).to(device)
            code = Code(indices, draw(n, k).abs(), draw(n, k), draw(n, d), 0.5)
            sae_update(code, draw(n, d), params, moments, rule, step)
    read_back = [
        states.read(m, p, second=second) if p.dim() == 2 else m
        for p, m, second in zip(
            [p for p in params for _ in "mv"], moments, [False, True] * 4, strict=True
        )
        if m is not None
    ]
    return [t.cpu() for t in (*params, *read_back)]


@pytest.mark.parametrize(
    ("rule", "d"),
    [
        (UpdateRule("adam", lr=0.01, weight_decay=0.1), 600),  # tiles of 512 and 128
        (UpdateRule("adamw", lr=0.01, weight_decay=0.1, rowsparse=True), 20),
        (UpdateRule("sgd", lr=0.01), 150),
        (UpdateRule("signsgd", lr=0.01, rowsparse=True), 130),
    ],
    ids=lambda v: f"{v.optimizer}" if isinstance(v, UpdateRule) else str(v),
)
@pytest.mark.parametrize("state", states.STATES)
def test_two_steps_are_the_references(rule: UpdateRule, d: int, state: str) -> None:
    compare(rule, d, state)


def test_rows_too_wide_for_sums_in_registers_are_the_references_too() -> None:
    compare(UpdateRule("adam", lr=0.01), 8300, "float32")


def compare(rule: UpdateRule, d: int, state: str) -> None:
    got, wanted = (stepped(backend, state, rule, d) for backend in ("triton", "reference"))
    for i, (ours, right) in enumerate(zip(got, wanted, strict=True)):
        if state == "float32" or i < 4 or ours.dim() == 1:
            # The last bit of a moment decides now and then where it is rounded to.
            off = (ours - right).abs() > 1e-5 * right.abs() + 1e-6
            assert off.double().mean() < (1e-9 if state == "float32" else 2e-3), i
        else:
            assert (ours != right).double().mean() < 2e-3, i


def test_tiles_cover_a_row_with_little_to_spare() -> None:
    for d in (
        1,
        16,
        100,
        512,
        576,
        640,
        768,
        896,
        1024,
        1600,
        2304,
        3072,
        4096,
        5120,
        12288,
        16384,
    ):
        g = kernels.geometry(65536, d, False)
        assert d <= g.BD + g.BT < max(2 * d, 17)
        assert g.BT % 128 == 0
        assert g.BT == 0 or 4 / 3 * d >= g.BD + g.BT
        assert g.programs * g.turns * g.BL >= 65536
        assert g.programs <= kernels.PROGRAMS
