"""bfloat16 and 8-bit moments: the codes by hand, rounding without bias, steps beside float32."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from microtome._seed import generator, mix32, step_key
from microtome.errors import BackendError
from microtome.ops import Code, UpdateRule, moments_for, sae_update, use_backend
from microtome.ops import _sae_update_states as states
from microtome.ops.sae_update import OPTIMIZERS

BOTH = pytest.mark.parametrize("state", ["bfloat16", "int8"])
MOMENTS = pytest.mark.parametrize("second", [False, True], ids=["first", "second"])


def rounded(values: Tensor, state: str, second: bool, low: int, high: int = 0) -> Tensor:
    """What is stored of float32 values [r, d], each word being `low` and `high`."""
    stored = states.zeros(values, state)
    words = torch.full(values.shape, high << 16 | low)
    states.write(stored, slice(None), values, words, second=second)
    return stored


def read(stored: Tensor, values: Tensor, second: bool) -> Tensor:
    return states.read(stored, values, second=second)


def spread_out(rows: int, d: int, second: bool) -> Tensor:
    """Rows of many magnitudes with zeros and tiny and huge rows among them."""
    g = generator(0, "moments")
    size = torch.exp(2 * torch.randn(rows, d, generator=g)).clamp(2.0**-6, 2.0**6)
    values = size * torch.randn(rows, d, generator=g).sign()
    values[0] = 0.0
    values[1] *= 2.0**-50
    values[2] *= 2.0**50
    values[:, -1] = 0.0
    return values.square() if second else values


def test_the_hash_is_the_published_one_of_step_matrix_row_and_column() -> None:
    assert mix32(1) == 0x514E28B7  # MurmurHash3's fmix32
    assert mix32(0xDEADBEEF) == 0x0DE5C6A9
    key = step_key(5, 2)
    assert key == mix32(mix32(5 + 2 * 0x9E3779B9 - 2**32))
    words = states.words(key, torch.tensor([7, 3]), 4)
    assert words[1, 2] == mix32(mix32(3 ^ key) ^ 2)
    assert step_key(5 + 2**40, 2) != key
    assert int(words.min()) >= 0
    assert int(words.max()) < 2**32


def test_random_words_are_even_and_unlike_their_neighbours() -> None:
    words = torch.cat([states.words(step_key(s, 0), torch.arange(64), 256) for s in (1, 2)])
    bits = (words[..., None] >> torch.arange(32)) & 1  # [128, 256, 32]
    assert (bits.double().mean((0, 1)) - 0.5).abs().max() < 5 * 0.5 / 2**7.5
    signs = 2.0 * bits.double() - 1
    for shift, axis in ((1, 0), (1, 1), (1, 2), (16, 2), (64, 0)):  # 64 rows on is the next step
        together = (signs * signs.roll(shift, axis)).mean()
        assert together.abs() < 5 / 2**10, (shift, axis)


def test_bfloat16_rounds_up_with_the_probability_of_what_is_cut() -> None:
    # 1 + 2^-9 lies a quarter of the way from 1 to the next bfloat16, 1 + 2^-7.
    value = torch.tensor([[1 + 2.0**-9, -1 - 2.0**-9]])
    below, above = ([[1.0, -1.0]], [[1 + 2.0**-7, -1 - 2.0**-7]])
    assert rounded(value, "bfloat16", False, 0xBFFF).tolist() == below
    assert rounded(value, "bfloat16", False, 0xC000).tolist() == above
    assert rounded(value, "bfloat16", True, 0, 0xBFFF).tolist() == below
    assert rounded(value, "bfloat16", True, 0, 0xC000).tolist() == above


def test_a_first_moments_codes_are_those_worked_by_hand() -> None:
    # Largest 1 = 2^(127-127), exponent field 15, so field 1 is 2^(113-127). 0.3 = 1.2 * 2^-2 has
    # field 13 and 0.2 * 8 = 1.6 of mantissa. 2^-16 is two steps of 2^-17 below the normal codes.
    values = torch.tensor([[1.0, -0.5, 0.3, 2.0**-16, 2.0**-18, 0.0]])
    codes = [15 * 8, 14 * 8 - 128, 13 * 8 + 1, 2, 0, 0]
    assert rounded(values, "int8", False, 0).tolist() == [[*codes, 113, *[0] * 9]]
    codes[2], codes[4] = 13 * 8 + 2, 1
    got = rounded(values, "int8", False, 0xFFFF)
    assert got.tolist() == [[*codes, 113, *[0] * 9]]
    assert read(got, values, False).tolist() == [[1.0, -0.5, 1.25 * 2**-2, 2.0**-16, 2.0**-17, 0.0]]


def test_a_second_moments_codes_are_those_worked_by_hand() -> None:
    # Largest 4 = 2^(129-127), field 31, so field 1 is 2^(99-127) and the least code 2^-31.
    values = torch.tensor([[4.0, 1.0, 1e-30, 0.0]])
    for high in (0, 0xFFFF):
        got = rounded(values, "int8", True, 0, high)
        assert got.tolist() == [[31 * 8 - 256, 29 * 8 - 256, 1, 0, 99, *[0] * 11]]
    assert read(got, values, True).tolist() == [[4.0, 1.0, 2.0**-31, 0.0]]


@BOTH
@MOMENTS
def test_the_mean_of_what_is_stored_is_the_number(state: str, second: bool) -> None:
    values, times = spread_out(6, 300, second), 1024
    stored, total = states.zeros(values, state), torch.zeros(6, 300, dtype=torch.float64)
    for step in range(times):
        words = states.words(step_key(step, 0), torch.arange(6), 300)
        states.write(stored, slice(None), values, words, second=second)
        total += read(stored, values, second)
    spacing = 2.0**-7 if state == "bfloat16" else 2.0**-3
    off = (total / times - values) / values.abs().clamp_min(1e-30)
    assert off.abs().max() < 5 * 0.5 * spacing / times**0.5  # five standard errors
    assert off.mean().abs() < 5 * 0.5 * spacing / (times * values.numel()) ** 0.5
    assert ((read(stored, values, second) - values).abs() <= spacing * values.abs()).all()


@MOMENTS
def test_what_was_stored_is_stored_again_exactly_and_doubling_moves_the_scale_alone(
    second: bool,
) -> None:
    values = spread_out(6, 300, second)
    words = states.words(step_key(1, 0), torch.arange(6), 300)
    stored = states.zeros(values, "int8")
    states.write(stored, slice(None), values, words, second=second)
    again = stored.clone()
    states.write(again, slice(None), read(stored, values, second), words, second=second)
    assert torch.equal(read(again, values, second), read(stored, values, second))
    twice = states.zeros(values, "int8")
    states.write(twice, slice(None), 2 * values, words, second=second)
    at = slice(300, 303)  # blocks of 128, 128 and 44
    grown = (twice[3:, at].int() - stored[3:, at].int()) & 0xFF
    assert (grown == 1).all()
    assert torch.equal(twice[3:, :300], stored[3:, :300])


def test_a_second_moment_never_vanishes_before_the_first() -> None:
    g = generator(0, "vanish")
    v = torch.exp2(-torch.rand(4, 256, generator=g) * 120)
    assert (read(rounded(v, "int8", True, 0, 0), v, True) > 0).all()
    tiny = torch.full((1, 8), 2.0**-126)
    assert (read(rounded(tiny, "int8", True, 0, 0), tiny, True) == 2.0**-126).all()


def test_infinity_and_nan_stay_what_they_are() -> None:
    values = torch.tensor([[1.0, torch.inf, 2.0], [torch.nan, 1.0, 1.0]])
    for second in (False, True):
        got = read(rounded(values, "int8", second, 0xFFFF, 0xFFFF), values, second)
        assert got[0, 1] == torch.inf
        assert got[1, 0].isnan()


def one_step(state: str, rule: UpdateRule, start: float) -> tuple[list[Tensor], list[Tensor]]:
    """Parameters and read moments after a step at d = 200, f = 30 from moments around `start`."""
    g = generator(1, "one step")
    n, d, f, k = 16, 200, 30, 2
    draw = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
    params = (draw(f, d), draw(f), draw(f, d), draw(d))
    indices = torch.randint(0, f // 2, (n, k), generator=g)
    code = Code(indices, draw(n, k).abs(), draw(n, k), draw(n, d), 0.1)
    x, moments = draw(n, d), moments_for(params, rule, state)
    for p, m, v in zip(params, moments[::2], moments[1::2], strict=True):
        # Powers of two, which every state holds exactly.
        size = start * torch.exp2(torch.randint(-3, 1, p.shape, generator=g))
        for t, value, second in ((m, size, False), (v, size.square(), True)):
            if t is None:
                continue
            if t.dtype == torch.float32:
                t.copy_(value)
            else:
                words = torch.zeros(p.shape, dtype=torch.int64)
                states.write(t, slice(None), value, words, second=second)
    with use_backend("reference"):
        sae_update(code, x, params, moments, rule, 7)
    full = []
    for i, m in enumerate(moments):
        if m is not None:
            full.append(m if m.dim() == 1 else states.read(m, params[i // 2], second=i % 2 == 1))
    return list(params), full


@BOTH
@pytest.mark.parametrize("rowsparse", [False, True])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_step_is_float32s_and_only_the_stored_moments_are_rounded(
    optimizer: str, rowsparse: bool, state: str
) -> None:
    rule = UpdateRule(optimizer, lr=0.01, weight_decay=0.1, rowsparse=rowsparse)
    params, moments = one_step(state, rule, 2.0**-5)
    wanted, exact = one_step("float32", rule, 2.0**-5)
    for got, right in zip(params, wanted, strict=True):
        assert torch.equal(got, right)
    spacing = 2.0**-7 if state == "bfloat16" else 2.0**-3
    for got, right in zip(moments, exact, strict=True):
        assert got.dtype == torch.float32
        assert ((got - right).abs() <= spacing * right.abs() + 2.0**-16 * right.abs().max()).all()
        assert torch.equal(got, right) == (got.dim() == 1)


@BOTH
def test_momentless_rules_and_float64_take_every_state(state: str) -> None:
    rule = UpdateRule("sgd", beta1=0.0)
    params = (torch.ones(2, 3), torch.ones(2), torch.ones(2, 3), torch.ones(3))
    assert moments_for(params, rule, state) == [None] * 8
    double = tuple(p.double() for p in params)
    moments = moments_for(double, UpdateRule(), state)
    code = Code(torch.tensor([[0]]), *(torch.ones(1, w).double() for w in (1, 1, 3)))
    sae_update(code, torch.ones(1, 3).double(), double, moments, UpdateRule(), 1)
    assert moments[0] is not None
    assert moments[2] is not None
    assert bool((moments[0] != 0).any())
    assert moments[2].dtype == torch.float64


@BOTH
def test_opcheck(state: str) -> None:
    rule = UpdateRule()
    params = (torch.ones(4, 20), torch.ones(4), torch.ones(4, 20), torch.ones(20))
    entries = (torch.tensor([[0], [3]]), *(torch.ones(2, w) for w in (1, 1, 20)), 0.5)
    arguments = (
        *entries, None, None, None, None, 0.0, torch.ones(2, 20), *params,
        *moments_for(params, rule, state), "", *(None,) * 8,
        "adam", 0.1, 0.9, 0.999, 1e-8, 0.0, 1, False, True, True, True,
    )  # fmt: skip
    torch.library.opcheck(torch.ops.microtome.sae_update.default, arguments)


def test_a_backend_without_a_state_says_so_and_the_reference_takes_it() -> None:
    params = (torch.ones(4, 20), torch.ones(4), torch.ones(4, 20), torch.ones(20))
    code = Code(torch.tensor([[0]]), *(torch.ones(1, w) for w in (1, 1, 20)))
    moments = moments_for(params, UpdateRule(), "int8")
    with use_backend("cpu"), pytest.raises(BackendError, match=r"cpu: moments in int8 \(has float"):
        sae_update(code, torch.ones(1, 20), params, moments, UpdateRule(), 1)
    sae_update(code, torch.ones(1, 20), params, moments, UpdateRule(), 1)


def test_states_take_the_bytes_they_promise() -> None:
    params = (torch.empty(4, 2304), torch.empty(4), torch.empty(4, 2304), torch.empty(2304))
    for state, size in (("float32", 4.0), ("bfloat16", 2.0), ("int8", 2336 / 2304)):
        m = moments_for(params, UpdateRule(), state)[0]
        assert m is not None
        assert m.nbytes == size * params[0].numel()
