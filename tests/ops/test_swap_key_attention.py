"""swap_key_attention: by hand, then every backend against a dense recompute in float64."""

from __future__ import annotations

import math
import re

import pytest
import torch
from torch import Tensor

from microtome import errors
from microtome.ops import cascade_attention, swap_key_attention, use_backend
from microtome.ops.cascade_attention import _attend, _swap
from microtome.testing import SWAP_CASES, SwapCase, assert_accurate, backends_of

on_every_backend = pytest.mark.parametrize("backend", backends_of(_swap))
every_case = pytest.mark.parametrize("case", SWAP_CASES, ids=lambda case: case.name)


def with_base_run(case: SwapCase, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inputs and z, lse of the base run, by the backend in force."""
    z, lse = cascade_attention(**case.causal(inputs), **case.options)
    return {
        "z": z.view(*inputs["q"].shape[:3], -1),
        "lse": lse.view(inputs["q"].shape[:3]),
        **inputs,
    }


def dense(case: SwapCase, inputs: dict[str, Tensor]) -> Tensor:
    """Masked softmax of every token of every row in full, at the dtype that came."""
    head = torch.arange(case.h) * case.hk // case.h
    out = [inputs["q"].new_empty(0, case.h, case.dv)]
    for r, (example, position, stop) in enumerate(case.rows):
        q, k, v = (inputs[name][example].clone() for name in ("q", "k_base", "v_base"))
        for whole, new in ((q, "q_new"), (k, "k_new"), (v, "v_new")):
            whole[position] = inputs[new][r]
        s = torch.einsum("ihd,xhd->ihx", q, k[:, head]) * case.options["scale"]  # [t, h, t]
        if case.softcap:
            s = torch.tanh(s / case.softcap) * case.softcap
        i, x = torch.arange(case.t)[:, None], torch.arange(case.t)
        first = case.first[example] if case.first else 0
        seen = (x >= first) & (x <= i) & (x > i - (case.window or 10**9))
        weights = torch.softmax(s.where(seen[:, None], -math.inf), -1).nan_to_num(0.0)
        out.append(torch.einsum("ihx,xhd->ihd", weights, v[:, head])[position:stop])
    return torch.cat(out)


def wide(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.double() if t.is_floating_point() else t for name, t in inputs.items()}


# One head of width one: base keys weigh 1, 2, 4 with every query of one; values 3, 6, 9.
HAND = {
    "q": torch.ones(1, 3, 1, 1),
    "k_base": torch.tensor([1.0, 2.0, 4.0]).log().view(1, 3, 1, 1),
    "v_base": torch.tensor([3.0, 6.0, 9.0]).view(1, 3, 1, 1),
    "z": torch.tensor([3.0, 15 / 3, 51 / 7]).view(1, 3, 1, 1),
    "lse": torch.tensor([1.0, 3.0, 7.0]).log().view(1, 3, 1),
    "q_new": torch.tensor([[[2.0]]]),
    "k_new": torch.tensor([[[3.0]]]).log(),
    "v_new": torch.tensor([[[0.0]]]),
    "rows": torch.tensor([[0, 1, 3]], dtype=torch.int32),
    "first": torch.tensor([0], dtype=torch.int32),
}


@on_every_backend
def test_it_agrees_with_numbers_worked_by_hand(backend: str) -> None:
    with use_backend(backend):
        got = swap_key_attention(**HAND, scale=1.0)
    # Token 1: the query doubles its logarithms, weights 1 and 9: (1 * 3 + 9 * 0) / 10.
    # Token 2: weights 1, 3, 4: (1 * 3 + 3 * 0 + 4 * 9) / 8.
    torch.testing.assert_close(got.flatten(), torch.tensor([0.3, 39 / 8]))


@every_case
@on_every_backend
def test_every_backend_is_nearly_as_accurate_as_plain_pytorch(backend: str, case: SwapCase) -> None:
    inputs = case.inputs()
    with use_backend(backend):
        got = swap_key_attention(**with_base_run(case, inputs), **case.options)
    plain, exact = dense(case, inputs), dense(case, wide(inputs))
    assert_accurate(got, plain, exact, factor=4.0)


@every_case
def test_the_reference_is_a_dense_recompute_in_float64(case: SwapCase) -> None:
    inputs = wide(case.inputs())
    with use_backend("reference"):
        got = swap_key_attention(**with_base_run(case, inputs), **case.options)
    torch.testing.assert_close(got, dense(case, inputs), rtol=1e-12, atol=1e-12)


@on_every_backend
def test_tokens_that_do_not_see_the_position_keep_the_base_run_bit_for_bit(backend: str) -> None:
    for name in ("window", "padded"):
        case = next(case for case in SWAP_CASES if case.name == name)
        inputs = case.inputs()
        with use_backend(backend):
            base = with_base_run(case, inputs)
            got = swap_key_attention(**base, **case.options)
        at = 0
        for example, position, stop in case.rows:
            padding = position < (case.first[example] if case.first else 0)
            reach = position + (1 if padding else case.window or stop)
            for i in range(reach, stop):
                assert torch.equal(got[at + i - position], base["z"][example, i]), name
            at += stop - position


@on_every_backend
def test_swapping_in_the_same_key_gives_the_base_run(backend: str) -> None:
    case = SWAP_CASES[1]
    inputs = case.inputs()
    for name, of in (("q_new", "q"), ("k_new", "k_base"), ("v_new", "v_base")):
        inputs[name] = inputs[of][0].clone()
    with use_backend(backend):
        base = with_base_run(case, inputs)
        got = swap_key_attention(**base, **case.options)
    expected = torch.cat([base["z"][0, p:] for p in range(case.t)])
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


@on_every_backend
def test_a_key_that_held_nearly_all_the_weight_can_go(backend: str) -> None:
    # Key 1 holds all but 1e-9 of the weight: what remains of z and of the sum is rounding alone.
    far = {**HAND, "k_base": HAND["k_base"].clone()}
    far["k_base"][0, 1] = 21.0
    with use_backend(backend):
        scores = far["k_base"][0, :, 0, 0]
        far["lse"] = torch.logcumsumexp(scores, 0).view(1, 3, 1)
        far["z"] = torch.tensor([3.0, 6.0, 6.0]).view(1, 3, 1, 1)
        got = swap_key_attention(**far, scale=1.0)
    torch.testing.assert_close(got.flatten(), torch.tensor([0.3, 39 / 8]))


@on_every_backend
def test_a_new_key_of_any_size_stays_finite(backend: str) -> None:
    for size in (-1e30, -200.0, 200.0, 1e30):
        with use_backend(backend):
            got = swap_key_attention(**{**HAND, "k_new": torch.full((1, 1, 1), size)}, scale=1.0)
        expected = [3.0, 39 / 5] if size < 0 else [0.0, 0.0]
        torch.testing.assert_close(got.flatten(), torch.tensor(expected))


@on_every_backend
def test_it_passes_opcheck(backend: str) -> None:
    case = next(case for case in SWAP_CASES if case.name == "packed")
    inputs = case.inputs()
    options = (case.options["scale"], case.softcap, case.window, 53)
    with use_backend(backend):
        base = with_base_run(case, inputs)
        names = ("z", "lse", "q", "k_base", "v_base", "q_new", "k_new", "v_new", "rows", "first")
        torch.library.opcheck(_swap.torch_op, (*(base[name] for name in names), *options))


ROW = "row 0 of rows (example, position, stop) is"


@on_every_backend
@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"rows": [[-1, 1, 3]]}, f"{ROW} [-1, 1, 3]: example must lie in [0, b=1)."),
        ({"rows": [[0, 1, 4]]}, f"{ROW} [0, 1, 4]: 0 <= position <= stop <= t=3 must hold."),
        ({"rows": [[0, 3, 2]]}, f"{ROW} [0, 3, 2]: 0 <= position <= stop <= t=3 must hold."),
        ({"total": 3}, "total must be the sum of stop - position=2, got 3."),
    ],
)
def test_a_row_outside_the_base_run_is_named(
    backend: str, change: dict[str, object], text: str
) -> None:
    if "rows" in change:
        change = {"rows": torch.tensor(change["rows"], dtype=torch.int32)}
    with (
        use_backend(backend),
        pytest.raises(errors.ArgumentError, match=f"^swap_key_attention: {re.escape(text)}$"),
    ):
        swap_key_attention(**{**HAND, **change}, scale=1.0)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (
            {"lse": torch.ones(1, 3, 2)},
            errors.ShapeError,
            "swap_key_attention: lse must be [b, t, h] with h=1 as in z, got shape [1, 3, 2].",
        ),
        (
            {"rows": torch.ones(3, dtype=torch.int32)},
            errors.ShapeError,
            "swap_key_attention: rows must be [n, 3], got shape [3].",
        ),
        (
            {"rows": torch.zeros(1, 4, dtype=torch.int32)},
            errors.ShapeError,
            "swap_key_attention: rows must be [n, 3] = (example, position, stop), "
            "got shape [1, 4].",
        ),
        (
            {"rows": torch.zeros(2, 3, dtype=torch.int32)},
            errors.ShapeError,
            "swap_key_attention: rows must be [n, 3] with n=1 as in q_new, got shape [2, 3].",
        ),
        (
            {"softcap": math.nan},
            errors.ArgumentError,
            "swap_key_attention: softcap must be positive, or 0 for none, got softcap=nan.",
        ),
    ],
)
def test_what_does_not_fit_is_named(
    change: dict[str, object], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=f"^{re.escape(text)}$"):
        swap_key_attention(**{**HAND, "scale": 1.0, **change})


def test_the_base_run_and_the_swap_run_on_the_same_backends() -> None:
    assert [b.name for b in _attend.backends] == [b.name for b in _swap.backends]
