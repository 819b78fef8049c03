"""packed_linear: by hand, every backend and level against float64, edges and messages."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

from microtome import errors
from microtome.ops import pack_weights, packed_linear, use_backend
from microtome.ops.packed_linear import _linear
from microtome.testing import backends_of

on_every_backend = pytest.mark.parametrize("backend", backends_of(_linear))
on_native_backends = pytest.mark.parametrize("backend", backends_of(_linear)[:-1])

# (T, i, o): one row, odd everything, o a multiple of 32 or not, several row slivers, an empty side.
SHAPES = [(1, 1, 1), (1, 70, 33), (5, 33, 31), (14, 64, 64), (15, 7, 96), (40, 129, 100)]
EMPTY = [(0, 5, 40), (3, 0, 40), (3, 5, 0)]


def draw(T: int, i: int, o: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(T * 10000 + i * 100 + o)
    sizes = {"x": (T, i), "W": (o, i), "bias": (o,), "add": (T, o)}
    return {name: torch.randn(size, generator=g) for name, size in sizes.items()}


def call(inputs: dict[str, Tensor], bias: bool = True, add: bool = True) -> Tensor:
    return packed_linear(
        inputs["x"],
        pack_weights(inputs["W"]),
        len(inputs["W"]),
        inputs["bias"] if bias else None,
        inputs["add"] if add else None,
    )


def plain(inputs: dict[str, Tensor], bias: bool = True, add: bool = True) -> Tensor:
    y = linear(inputs["x"], inputs["W"], inputs["bias"] if bias else None)
    return y + inputs["add"] if add else y


def wide(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.double() for name, t in inputs.items()}


@on_every_backend
def test_it_agrees_with_numbers_worked_by_hand(backend: str) -> None:
    inputs = {
        "x": torch.tensor([[1.0, 10.0], [0.5, -1.0]]),
        "W": torch.tensor([[1.0, 2.0], [0.0, -1.0], [3.0, 0.0]]),
        "bias": torch.tensor([100.0, 200.0, 300.0]),
        "add": torch.tensor([[1000.0, 0.0, 0.0], [0.0, 0.0, 2000.0]]),
    }
    with use_backend(backend):
        alone, whole = call(inputs, bias=False, add=False), call(inputs)
    assert alone.tolist() == [[21.0, -10.0, 3.0], [-1.5, 1.0, 1.5]]
    assert whole.tolist() == [[1121.0, 190.0, 303.0], [98.5, 201.0, 2301.5]]


@on_every_backend
@pytest.mark.parametrize("shape", EMPTY, ids=str)
def test_an_empty_side_leaves_bias_and_added_rows(
    backend: str, shape: tuple[int, int, int]
) -> None:
    inputs = draw(*shape)
    with use_backend(backend):
        assert torch.equal(call(inputs), inputs["bias"] + inputs["add"])


def test_the_reference_takes_float64() -> None:
    inputs = wide(draw(5, 33, 40))
    torch.testing.assert_close(call(inputs), plain(inputs), rtol=1e-14, atol=1e-14)


@on_every_backend
def test_the_op_passes_opcheck(backend: str) -> None:
    inputs = draw(5, 33, 40)
    packed = pack_weights(inputs["W"])
    with use_backend(backend):
        torch.library.opcheck(_linear.torch_op, (inputs["x"], packed, 40, None, None))
        terms = (inputs["bias"], inputs["add"].t().contiguous().t())
        torch.library.opcheck(
            _linear.torch_op, (inputs["x"].t().contiguous().t(), packed, 40, *terms)
        )


GOOD = draw(4, 6, 40)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (
            {"x": torch.ones(4)},
            errors.ShapeError,
            "packed_linear: x must be [T, i], got shape [4].",
        ),
        (
            {"add": torch.ones(3, 40)},
            errors.ShapeError,
            "packed_linear: add must be [T, o] with T=4 as in x, got shape [3, 40].",
        ),
        (
            {"o": 39},
            errors.ShapeError,
            "packed_linear: o must be 40, as the other tensors have it, got o=39.",
        ),
        (
            {"o": -1},
            errors.ArgumentError,
            "packed_linear: o must be the number of outputs, got o=-1.",
        ),
        (
            {"packed": torch.ones(2, 7, 32)},
            errors.ShapeError,
            "packed_linear: packed must be [2, 6, 32] for o=40 outputs and i=6 inputs, got shape "
            "[2, 7, 32]. Make it with pack_weights(W, 'fp32') of a W [o, i].",
        ),
        (
            {"packed": torch.ones(2, 6, 32).bfloat16()},
            errors.DtypeError,
            "packed_linear: packed must be float32, got bfloat16. Make it with "
            "pack_weights(W, 'fp32').",
        ),
        (
            {"x": torch.ones(4, 6).half()},
            errors.DtypeError,
            "packed_linear: x must be float32, float64, got float16. Cast it with .to().",
        ),
        (
            {"bias": torch.ones(40).double()},
            errors.DtypeError,
            "packed_linear: all weights and inputs must share one dtype, got x float32, bias "
            "float64, add float32. Cast them with .to().",
        ),
        (
            {"add": torch.ones(4, 40, device="meta")},
            errors.DeviceError,
            "packed_linear: all tensors must lie on one device, got x on cpu, packed on cpu, bias "
            "on cpu, add on meta. Move them with .to(device).",
        ),
    ],
)
def test_what_is_wrong_is_said(
    change: dict[str, object], error: type[Exception], text: str
) -> None:
    arguments = {
        "x": GOOD["x"],
        "packed": pack_weights(GOOD["W"]),
        "o": 40,
        "bias": GOOD["bias"],
        "add": GOOD["add"],
        **change,
    }
    with pytest.raises(error, match=f"^{re.escape(text)}$"):
        packed_linear(**arguments)  # type: ignore[arg-type]
