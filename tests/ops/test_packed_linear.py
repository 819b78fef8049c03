"""packed_linear: by hand, every backend and level against float64, edges and messages."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

from microtome import _native, errors
from microtome.ops import pack_weights, packed_linear, use_backend
from microtome.ops.packed_linear import _linear
from microtome.testing import assert_accurate, backends_of, level_parameters

on_every_backend = pytest.mark.parametrize("backend", backends_of(_linear))
# The reference is the measure of accuracy, so it is not measured.
on_native_backends = pytest.mark.parametrize("backend", backends_of(_linear)[:-1])
needs_extension = pytest.mark.skipif(
    _native.why_absent() is not None, reason="the extension is absent"
)

# (T, i, o): one row, odd everything, o a multiple of 32 or not, several row slivers, an empty side.
SHAPES = [(1, 1, 1), (1, 70, 33), (5, 33, 31), (14, 64, 64), (15, 7, 96), (40, 129, 100)]
EMPTY = [(0, 5, 40), (3, 0, 40), (3, 5, 0)]


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """torch.set_num_threads, undone afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


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


@on_native_backends
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_backend_is_as_accurate_as_plain_pytorch(
    backend: str, shape: tuple[int, int, int]
) -> None:
    inputs = draw(*shape)
    for bias, add in ((False, False), (True, False), (False, True), (True, True)):
        with use_backend(backend):
            got = call(inputs, bias, add)
        assert_accurate(got, plain(inputs, bias, add), plain(wide(inputs), bias, add))


@needs_extension
def test_a_long_sum_is_as_accurate_as_plain_pytorch() -> None:
    inputs = draw(60, 3072, 64)
    assert_accurate(call(inputs), plain(inputs), plain(wide(inputs)))


@pytest.mark.parametrize("level", level_parameters())
def test_instruction_sets_agree(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for shape in SHAPES:
        inputs = draw(*shape)
        monkeypatch.setenv("MICROTOME_CPU_ISA", level)
        got = call(inputs)
        if level == "generic":  # it has no fused multiply-add: other bits, twice the roundings
            assert_accurate(got, plain(inputs), plain(wide(inputs)), factor=4.0)
        else:
            monkeypatch.setenv("MICROTOME_CPU_ISA", "avx2")
            assert torch.equal(got, call(inputs)), shape


@needs_extension
@pytest.mark.parametrize(
    "shape",
    [(3, 700, 300), (70, 90, 200), (500, 90, 60), (900, 600, 40)],
    ids=["panels are split", "both", "rows are split", "several blocks of rows"],
)
def test_thread_counts_change_no_bit(
    shape: tuple[int, int, int], threads: Callable[[int], None]
) -> None:
    inputs = draw(*shape)
    threads(1)
    one = call(inputs)
    assert_accurate(one, plain(inputs), plain(wide(inputs)))
    for count in (2, 3, 5):
        threads(count)
        assert torch.equal(call(inputs), one)


@on_native_backends
def test_rows_that_lie_apart_give_the_same_bits(backend: str) -> None:
    inputs = draw(9, 21, 40)
    with use_backend(backend):
        wanted = call(inputs)
        x, add = (torch.full((9, 80), float("nan")) for _ in range(2))
        x[:, 3:24], add[:, 5:45] = inputs["x"], inputs["add"]
        assert torch.equal(call({**inputs, "x": x[:, 3:24], "add": add[:, 5:45]}), wanted)
        columns = {name: inputs[name].t().contiguous().t() for name in ("x", "add", "W")}
        assert torch.equal(call({**inputs, **columns}), wanted)
        one = {"x": inputs["x"][:1].expand(9, 21), "add": inputs["add"][:1].expand(9, 40)}
        assert torch.equal(call({**inputs, **one})[8], wanted[0])


@on_every_backend
def test_nan_and_infinity_pass_through_as_in_torch(backend: str) -> None:
    inputs = draw(6, 20, 40)
    inputs["x"][1, 3] = float("nan")
    inputs["x"][2, 4] = float("inf")
    inputs["W"][7, 5] = float("-inf")
    inputs["bias"][9] = float("nan")
    inputs["add"][3, 11] = float("inf")
    with use_backend(backend):
        got = call(inputs)
    torch.testing.assert_close(got, plain(inputs), equal_nan=True)
    assert got.isnan().any()
    assert got.isinf().any()


@needs_extension
def test_every_element_of_the_output_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Tensor] = []
    real = torch.empty

    def poisoned(*args: object, **options: object) -> Tensor:
        made.append(real(*args, **options).fill_(float("nan")))  # type: ignore[call-overload]
        return made[-1]

    for shape in SHAPES + EMPTY:
        inputs = draw(*shape)
        packed = pack_weights(inputs["W"])
        with monkeypatch.context() as patch, use_backend("cpu"):
            patch.setattr(torch, "empty", poisoned)
            y = packed_linear(inputs["x"], packed, shape[2])
        assert y.data_ptr() == made[-1].data_ptr(), "the patch went unused"
        assert not y.isnan().any(), shape


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
            "packed_linear: all tensors must lie on one device, got x [4, 6] on cpu, packed "
            "[2, 6, 32] on cpu, bias [40] on cpu, add [4, 40] on meta. Load add on cpu (meta "
            "tensors hold no data).",
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
