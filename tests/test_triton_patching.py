"""The tiles and paths of the patching kernels that a GPU takes, where the interpreter by itself
would take others."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from microtome._seed import generator
from microtome.ops import (
    ADD,
    REPLACE,
    cascade_attention,
    pack_weights,
    swap_key_attention,
    use_backend,
)
from microtome.ops.delta_linear import delta_linear_reference
from microtome.ops.patch_rows import patch_rows_reference
from microtome.testing import ATTENTION_CASES, SWAP_CASES, assert_accurate
from microtome.testing.triton import DEVICE, MARKS, RUNS, SILENT

pytestmark = [*MARKS, SILENT]
if RUNS:
    attention = pytest.importorskip("microtome.kernels.cascade_attention")
    from microtome.kernels import delta_linear, patch_rows


def put(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.to(DEVICE) for name, tensor in inputs.items()}


def wide(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.double() if t.is_floating_point() else t for name, t in inputs.items()}


def delta_inputs(T: int, i: int, o: int) -> dict[str, Tensor]:
    g = generator(0, f"{T} {i} {o}")
    x_base, index = 30 * torch.randn(3, i, generator=g), torch.randint(0, 3, (T,), generator=g)
    return put(
        {
            "x": x_base[index] + torch.randn(T, i, generator=g),
            "x_base": x_base,
            "y_base": torch.randn(3, o, generator=g),
            "index": index,
            "packed": pack_weights(torch.randn(o, i, generator=g), "bf16"),
            "add": torch.randn(T, o, generator=g),
        }
    )


def delta(inputs: dict[str, Tensor], prepared: bool) -> Tensor:
    tensors = dict(inputs)
    add = tensors.pop("add")
    return delta_linear.launch(*tensors.values(), add.shape[1], add, prepared)


@pytest.mark.parametrize("prepared", [False, True], ids=["fused", "prepared"])
@pytest.mark.parametrize("shape", [(1, 1, 1), (33, 70, 100), (150, 130, 131)], ids=str)
def test_delta_linear_is_accurate_whichever_way_it_goes(
    prepared: bool, shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delta_linear, "WORKSPACE", 1)  # a block of rows at a time
    inputs = delta_inputs(*shape)
    tensors, exact = dict(inputs), wide(inputs)
    rest = (shape[2], tensors.pop("add"))
    plain = delta_linear_reference(*tensors.values(), *rest)
    # The reference rounds the differences of what it is given: those of float32.
    at = inputs["index"].long()
    rounded = (inputs["x"] - inputs["x_base"][at]).bfloat16().double()
    exact["x"], exact["x_base"] = rounded, torch.zeros_like(exact["x_base"])
    add = exact.pop("add")
    exact["packed"] = inputs["packed"]
    assert_accurate(
        delta(inputs, prepared), plain, delta_linear_reference(*exact.values(), rest[0], add)
    )


@pytest.mark.parametrize("prepared", [False, True], ids=["fused", "prepared"])
def test_delta_linear_lets_nan_and_infinity_pass(prepared: bool) -> None:
    inputs = delta_inputs(4, 6, 5)
    for row, value in enumerate((torch.nan, torch.inf, -torch.inf)):
        inputs["x"][row, row] = value
    got = delta(inputs, prepared)
    assert got[0].isnan().all()
    assert got[1:3].isinf().all()
    assert got[3].isfinite().all()


def test_delta_linear_prepares_where_the_rows_would_be_read_often() -> None:
    sizes = [(64, 768, 3072), (16384, 768, 128), (1024, 768, 3072), (16384, 3072, 768), (9, 0, 9)]
    assert [delta_linear.prepares(*size) for size in sizes] == [False, False, True, True, False]


@pytest.mark.parametrize("name", ["grouped", "odd", "wide", "causal_padded"])
def test_cascade_attention_is_accurate_in_the_tiles_of_a_gpu(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Heads by chunks of 32 columns, keys by blocks of 16 or 32.
    chosen = attention.geometry
    monkeypatch.setattr(
        attention, "geometry", lambda pairs, dh, dv, _: chosen(pairs, dh, dv, False)
    )
    case = next(case for case in ATTENTION_CASES if case.name == name)
    inputs = put(case.inputs())
    with use_backend("triton"):
        got = cascade_attention(**inputs, **case.options)
        again = cascade_attention(**inputs, **case.options)
    with use_backend("reference"):
        plain = cascade_attention(**inputs, **case.options)
        exact = cascade_attention(**wide(inputs), **case.options)
    assert all(map(torch.equal, got, again))
    assert_accurate(got[0], plain[0], exact[0], "z")
    seen = exact[1].isfinite()
    assert torch.equal(got[1].isfinite(), seen)
    assert_accurate(got[1][seen], plain[1][seen], exact[1][seen], "lse")


@pytest.mark.parametrize("name", ["grouped", "padded"])
def test_swap_key_attention_is_accurate_in_the_tiles_of_a_gpu(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = attention.swap_geometry
    monkeypatch.setattr(attention, "swap_geometry", lambda dh, dv, _: chosen(dh, dv, False))
    case = next(case for case in SWAP_CASES if case.name == name)
    inputs = put(case.inputs())

    def answer(inputs: dict[str, Tensor], backend: str) -> Tensor:
        with use_backend(backend):
            z, lse = cascade_attention(**put(case.causal(inputs)), **case.options)
            base = {"z": z.view(*inputs["q"].shape[:3], -1), "lse": lse.view(inputs["q"].shape[:3])}
            return swap_key_attention(**base, **inputs, **case.options)

    got = answer(inputs, "triton")
    assert_accurate(got, answer(inputs, "reference"), answer(wide(inputs), "reference"), factor=8.0)


def test_attention_hands_nan_on_to_the_queries_that_see_it() -> None:
    case = next(case for case in ATTENTION_CASES if case.name == "causal")
    inputs = put(case.inputs())
    inputs["k"][7, 0] = torch.nan  # of the first row's forty keys, in the first head
    with use_backend("triton"):
        z, lse = cascade_attention(**inputs, **case.options)
    sees = torch.arange(len(z), device=DEVICE)
    sees = (sees >= 7) & (sees < 40)
    assert torch.equal(z[:, 0].isnan().all(1), sees)
    assert torch.equal(lse[:, 0].isnan(), sees)
    assert z[:, 1].isfinite().all()


def test_patch_rows_gives_the_bits_of_the_formula_across_tiles_of_columns() -> None:
    w = 2 * patch_rows.WIDEST + 88
    g = generator(0)
    table = [[0, 1, 200, 300, 1, REPLACE], [1, 2, 250, w, 0, ADD], [0, 1, 250, 270, 0, ADD]]
    arguments = put(
        {
            "base": torch.randn(2, 3, w, generator=g),
            "sources": torch.randn(2, w, generator=g),
            "rows": torch.tensor([[0, 0, 3], [1, 2, 3]], dtype=torch.int32),
            "table": torch.tensor(table, dtype=torch.int32),
            "factors": torch.randn(3, generator=g),
        }
    )
    got = patch_rows.launch(*arguments.values(), 4)
    assert torch.equal(got, patch_rows_reference(*arguments.values(), 4))
