"""pack_weights: entries by hand, every backend against the reference, layouts that come strided."""

from __future__ import annotations

import doctest
import importlib
import re

import pytest
import torch

from microtome import errors
from microtome.ops import pack_weights, use_backend
from microtome.ops.pack_weights import KINDS, _pack, packed_shape, unpack_weights
from microtome.testing import backends_of

on_every_backend = pytest.mark.parametrize("backend", backends_of(_pack))
for_both_kinds = pytest.mark.parametrize("kind", KINDS)


@on_every_backend
def test_entries_lie_where_the_formula_says(backend: str) -> None:
    W = torch.arange(34 * 3, dtype=torch.float32).reshape(34, 3)  # W[r, c] = 3 r + c
    with use_backend(backend):
        fp32, bf16 = pack_weights(W), pack_weights(W, "bf16")
    assert fp32.shape == (2, 3, 32)
    assert fp32[0, 1, 5] == 16  # W[5, 1]
    assert fp32[1, 2, 1] == 101  # W[33, 2]
    assert not fp32[1, :, 2:].any()  # there is no row 34
    assert bf16.shape == (2, 16, 32, 2)
    assert bf16[0, 0, 5].tolist() == [15, 16]  # W[5, 0], W[5, 1]
    assert bf16[1, 1, 1].tolist() == [101, 0]  # W[33, 2], and there is no column 3
    assert not bf16[:, 2:].any()


@on_every_backend
def test_bfloat16_is_rounded_to_nearest_even(backend: str) -> None:
    # bf16 keeps 7 bits behind the point: 1 + 2^-8 and 1 + 3 2^-8 are ties, to 1 and to 1 + 2^-6.
    W = torch.tensor([[1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, float("inf"), 3.4e38]])
    with use_backend(backend):
        packed = pack_weights(W, "bf16")
        nan = pack_weights(torch.tensor([[float("nan")]]), "bf16")
    wanted = [1, 1 + 2**-6, 1 + 2**-7, float("inf"), float("inf")]
    assert packed[0, :3, 0].flatten()[:5].tolist() == wanted
    assert nan[0, 0, 0, 0].isnan()


@for_both_kinds
@on_every_backend
@pytest.mark.parametrize("o", [0, 1, 31, 32, 33, 100])
@pytest.mark.parametrize("i", [0, 1, 31, 33, 70])
def test_every_shape_and_layout_is_packed_alike(backend: str, kind: str, o: int, i: int) -> None:
    W = torch.randn(o, i, generator=torch.Generator().manual_seed(o * 100 + i))
    with use_backend("reference"):
        wanted = pack_weights(W, kind)
    apart = torch.full((o, 2 * i + 1), float("nan"))[:, : 2 * i : 2]
    apart.copy_(W)
    assert wanted.shape == packed_shape(o, i, kind)
    rounded = W if kind == "fp32" else W.to(torch.bfloat16)
    assert torch.equal(unpack_weights(wanted, o, i), rounded)
    with use_backend(backend):
        for layout in (W, W.t().contiguous().t(), apart):
            got = pack_weights(layout, kind)
            assert got.dtype == wanted.dtype
            assert torch.equal(got, wanted)


@for_both_kinds
@on_every_backend
def test_the_op_passes_opcheck(backend: str, kind: str) -> None:
    with use_backend(backend):
        torch.library.opcheck(_pack.torch_op, (torch.randn(33, 5), kind))
        torch.library.opcheck(_pack.torch_op, (torch.randn(5, 33).t(), kind))


def test_float64_weights_keep_their_dtype() -> None:
    W = torch.randn(3, 4, dtype=torch.float64)
    assert torch.equal(unpack_weights(pack_weights(W), 3, 4), W)
    assert torch.equal(unpack_weights(pack_weights(W, "bf16"), 3, 4), W.to(torch.bfloat16))


@pytest.mark.parametrize(
    ("W", "kind", "error", "text"),
    [
        (
            torch.ones(3),
            "fp32",
            errors.ShapeError,
            "pack_weights: W must be [o, i], got shape [3].",
        ),
        (
            torch.ones(3, 4).bfloat16(),
            "bf16",
            errors.DtypeError,
            "pack_weights: W must be float32, float64, got bfloat16. Cast it with .to().",
        ),
        (
            torch.ones(3, 4),
            "int8",
            errors.ArgumentError,
            "pack_weights: kind must be one of 'fp32', 'bf16', got 'int8'.",
        ),
    ],
)
def test_what_is_wrong_is_said(
    W: torch.Tensor, kind: str, error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=f"^{re.escape(text)}$"):
        pack_weights(W, kind)


@pytest.mark.parametrize("name", ["pack_weights", "packed_linear", "delta_linear"])
def test_the_examples_in_the_docstrings_hold(name: str) -> None:
    results = doctest.testmod(importlib.import_module(f"microtome.ops.{name}"))
    assert results.attempted > 0
    assert results.failed == 0
