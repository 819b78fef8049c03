"""cascade_attention: by hand, then every backend against dense masked softmax in float64."""

from __future__ import annotations

import doctest
import importlib
import math
import re

import pytest
import torch
from torch import Tensor

from microtome import errors
from microtome.ops import cascade_attention, use_backend
from microtome.ops.cascade_attention import _attend
from microtome.testing import ATTENTION_CASES, AttentionCase, assert_accurate, backends_of

on_every_backend = pytest.mark.parametrize("backend", backends_of(_attend))
every_case = pytest.mark.parametrize("case", ATTENTION_CASES, ids=lambda case: case.name)


def dense(case: AttentionCase, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Masked softmax over every position 0 .. end of each row: z and lse at the dtype that came."""
    q, k, v, k_base, v_base = (inputs[name] for name in ("q", "k", "v", "k_base", "v_base"))
    z, lse = q.new_full((len(q), case.h, case.dv), math.nan), q.new_full(q.shape[:2], math.nan)
    head = torch.arange(case.h) * case.hk // case.h
    for example, start, kv_at, kv_count, q_at, q_count in inputs["rows"].tolist():
        keys = k.new_zeros(start + kv_count, case.hk, case.dh)  # by position
        values = v.new_zeros(start + kv_count, case.hk, case.dv)
        for whole, own, base in ((keys, k, k_base), (values, v, v_base)):
            if case.b:
                whole[: min(start, case.t)] = base[example, :start]
            whole[start:] = own[kv_at : kv_at + kv_count]
        queries = slice(q_at, q_at + q_count)
        p, x = inputs["q_positions"][queries, None], torch.arange(start + kv_count)
        first = case.first[example] if case.first else 0
        seen = (x >= first) & (x <= p) & (x > p - (case.window or 10**9))  # [queries, keys]
        s = torch.einsum("qhd,xhd->qhx", q[queries], keys[:, head]) * case.options["scale"]
        if case.softcap:
            s = torch.tanh(s / case.softcap) * case.softcap
        s = s.where(seen[:, None], -math.inf)
        weights = torch.softmax(s, -1).nan_to_num(0.0)  # NaN where nothing is seen
        z[queries] = torch.einsum("qhx,xhd->qhd", weights, values[:, head])
        lse[queries] = torch.logsumexp(s, -1)
    return z, lse


def wide(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.double() if t.is_floating_point() else t for name, t in inputs.items()}


def log(*weights: float) -> Tensor:
    """Keys of width one whose scores with a query of one are these logarithms."""
    return torch.tensor(weights).log()[:, None, None]


# Base keys weigh 1, 2, 5 and own keys 3, 1: positions 0, 1 of the base, then 2, 3 of the row.
HAND = {
    "q": torch.ones(2, 1, 1),
    "k": log(3.0, 1.0),
    "v": torch.tensor([[[8.0]], [[1.0]]]),
    "k_base": log(1.0, 2.0, 5.0)[None],
    "v_base": torch.tensor([[[[4.0]], [[1.0]], [[99.0]]]]),
    "rows": torch.tensor([[0, 2, 0, 2, 0, 2]], dtype=torch.int32),
    "q_positions": torch.tensor([2, 3], dtype=torch.int32),
    "first": torch.tensor([0], dtype=torch.int32),
}


@on_every_backend
def test_it_agrees_with_numbers_worked_by_hand(backend: str) -> None:
    with use_backend(backend):
        z, lse = cascade_attention(**HAND, scale=1.0)
        windowed, _ = cascade_attention(**HAND, scale=1.0, window=2)
        padded, _ = cascade_attention(**{**HAND, "first": HAND["first"] + 1}, scale=1.0)
    # (1 * 4 + 2 * 1 + 3 * 8) / 6 = 5, then (1 * 4 + 2 * 1 + 3 * 8 + 1 * 1) / 7 = 31 / 7.
    torch.testing.assert_close(z.flatten(), torch.tensor([5.0, 31 / 7]))
    torch.testing.assert_close(lse.exp().flatten(), torch.tensor([6.0, 7.0]))
    # Two keys each: (2 * 1 + 3 * 8) / 5 and (3 * 8 + 1 * 1) / 4. From position 1 on: / 5 and / 6.
    torch.testing.assert_close(windowed.flatten(), torch.tensor([26 / 5, 25 / 4]))
    torch.testing.assert_close(padded.flatten(), torch.tensor([26 / 5, 27 / 6]))


@on_every_backend
def test_softcap_bounds_the_scores_by_hand(backend: str) -> None:
    one = {**HAND, "k_base": torch.full((1, 3, 1, 1), 1e6), "k": torch.full((2, 1, 1), -1e6)}
    with use_backend(backend):
        z, lse = cascade_attention(**one, scale=1.0, softcap=1.0)
    e = math.e
    expected = torch.tensor([2 * e + 1 / e, 2 * e + 2 / e])
    torch.testing.assert_close(lse.exp().flatten(), expected)
    torch.testing.assert_close(z.flatten(), torch.tensor([5 * e + 8 / e, 5 * e + 9 / e]) / expected)


@every_case
@on_every_backend
def test_every_backend_is_as_accurate_as_plain_pytorch(backend: str, case: AttentionCase) -> None:
    inputs = case.inputs()
    with use_backend(backend):
        got = cascade_attention(**inputs, **case.options)
    plain, exact = dense(case, inputs), dense(case, wide(inputs))
    seen = torch.isfinite(exact[1])
    assert torch.equal(got[1].isneginf(), ~seen)
    assert not got[0][~seen].any(), "a query without a key answers zero"
    assert_accurate(got[0], plain[0], exact[0], "z")
    assert_accurate(got[1][seen], plain[1][seen], exact[1][seen], "lse")


@every_case
def test_the_reference_is_dense_attention_in_float64(case: AttentionCase) -> None:
    inputs = wide(case.inputs())
    with use_backend("reference"):
        got = cascade_attention(**inputs, **case.options)
    for g, e in zip(got, dense(case, inputs), strict=True):
        torch.testing.assert_close(g, e, rtol=1e-12, atol=1e-12)


@on_every_backend
def test_int64_tables_give_the_same_bits(backend: str) -> None:
    case = ATTENTION_CASES[2]
    inputs = case.inputs()
    tables = {name: inputs[name].long() for name in ("rows", "q_positions", "first")}
    with use_backend(backend):
        usual = cascade_attention(**inputs, **case.options)
        wider = cascade_attention(**{**inputs, **tables}, **case.options)
    assert all(map(torch.equal, usual, wider))


@on_every_backend
@pytest.mark.parametrize("name", ["grouped", "packed"])
def test_it_passes_opcheck_contiguous_or_not(backend: str, name: str) -> None:
    case = next(case for case in ATTENTION_CASES if case.name == name)
    options = (case.options["scale"], case.softcap, case.window)
    with use_backend(backend):
        torch.library.opcheck(_attend.torch_op, (*case.inputs().values(), *options))


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (
            {"v": torch.ones(3, 1, 1)},
            errors.ShapeError,
            "cascade_attention: v must be [T, hk, dv] with T=2 as in k, got shape [3, 1, 1].",
        ),
        (
            {"rows": torch.ones(1, 3, dtype=torch.int32)},
            errors.ShapeError,
            "cascade_attention: rows must be [n, 6] = (example, start, kv_at, kv_count, q_at, "
            "q_count), got shape [1, 3].",
        ),
        (
            {
                "k": torch.ones(2, 2, 1),
                "v": torch.ones(2, 2, 1),
                "k_base": torch.ones(1, 3, 2, 1),
                "v_base": torch.ones(1, 3, 2, 1),
            },
            errors.ShapeError,
            "cascade_attention: h=1 query heads must be a multiple of hk=2 key heads. Head j of q "
            "uses key head j // (h / hk).",
        ),
        (
            {"q": torch.ones(2, 1, 1).bfloat16()},
            errors.DtypeError,
            "cascade_attention: q must be float32, float64, got bfloat16. Cast it with .to().",
        ),
        (
            {"k": torch.ones(2, 1, 1).double()},
            errors.DtypeError,
            "cascade_attention: all weights and inputs must share one dtype, got q float32, "
            "k float64, v float32, k_base float32, v_base float32. Cast them with .to().",
        ),
        (
            {"first": torch.ones(1)},
            errors.DtypeError,
            "cascade_attention: first must be int32, int64, got float32. Cast it with .to().",
        ),
        (
            {"scale": math.inf},
            errors.ArgumentError,
            "cascade_attention: scale must be finite, got scale=inf. Usual is 1 / sqrt(dh).",
        ),
        (
            {"softcap": -1.0},
            errors.ArgumentError,
            "cascade_attention: softcap must be positive, or 0 for none, got softcap=-1.0.",
        ),
        (
            {"window": -3},
            errors.ArgumentError,
            "cascade_attention: window must be a number of keys, or 0 for all, got window=-3.",
        ),
    ],
)
def test_what_does_not_fit_is_named(
    change: dict[str, object], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=f"^{re.escape(text)}$"):
        cascade_attention(**{**HAND, "scale": 1.0, **change})


ROW = "row 0 of rows (example, start, kv_at, kv_count, q_at, q_count) is"


@on_every_backend
@pytest.mark.parametrize(
    ("row", "positions", "text"),
    [
        ([1, 2, 0, 2, 0, 2], [2, 3], f"{ROW} [1, 2, 0, 2, 0, 2]: example must lie in [0, b=1)."),
        (
            [0, 4, 0, 2, 0, 2],
            [4, 5],
            f"{ROW} [0, 4, 0, 2, 0, 2]: start must lie in [0, t=3], or up to first[example].",
        ),
        (
            [0, 2, 1, 2, 0, 2],
            [2, 3],
            f"{ROW} [0, 2, 1, 2, 0, 2]: kv_at .. kv_at + kv_count must lie in [0, T=2].",
        ),
        (
            [0, 2, 0, 2, -1, 2],
            [2, 3],
            f"{ROW} [0, 2, 0, 2, -1, 2]: q_at .. q_at + q_count must lie in [0, Tq=2].",
        ),
        (
            [0, 2, 0, 2, 0, 1],
            [2, 3],
            "query 1 at position 3: each must belong to exactly one row of rows (q_at, q_count).",
        ),
        (
            [0, 2, 0, 2, 0, 2],
            [2, 4],
            "query 1 at position 4: its row must hold a key of its own there: "
            "start <= position < start + kv_count.",
        ),
    ],
)
def test_a_row_outside_its_tensors_is_named(
    backend: str, row: list[int], positions: list[int], text: str
) -> None:
    tables = {
        "rows": torch.tensor([row], dtype=torch.int32),
        "q_positions": torch.tensor(positions, dtype=torch.int32),
    }
    with (
        use_backend(backend),
        pytest.raises(errors.ArgumentError, match=f"^cascade_attention: {re.escape(text)}$"),
    ):
        cascade_attention(**{**HAND, **tables}, scale=1.0)


@on_every_backend
def test_a_row_without_a_base_starts_at_zero(backend: str) -> None:
    none = {
        "k_base": torch.ones(0, 3, 1, 1),
        "v_base": torch.ones(0, 3, 1, 1),
        "first": torch.empty(0, dtype=torch.int32),
    }
    text = (
        f"cascade_attention: {ROW} [0, 2, 0, 2, 0, 2]: start must be 0, for k_base holds no "
        "example."
    )
    with (
        use_backend(backend),
        pytest.raises(errors.ArgumentError, match=f"^{re.escape(text)}$"),
    ):
        cascade_attention(**{**HAND, **none}, scale=1.0)


def test_the_examples_of_the_docstrings_hold() -> None:
    assert doctest.testmod(importlib.import_module("microtome.ops.cascade_attention")).failed == 0
