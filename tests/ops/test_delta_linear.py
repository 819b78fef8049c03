"""delta_linear: by hand, every backend and level against float64, edges and messages."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

from microtome import _native, errors
from microtome.ops import delta_linear, pack_weights, use_backend
from microtome.ops.delta_linear import _delta
from microtome.testing import assert_accurate, backends_of, level_parameters

on_every_backend = pytest.mark.parametrize("backend", backends_of(_delta))
# The reference is the measure of accuracy, so it is not measured.
on_native_backends = pytest.mark.parametrize("backend", backends_of(_delta)[:-1])
needs_extension = pytest.mark.skipif(
    _native.why_absent() is not None, reason="the extension is absent"
)

# (T, r, i, o): one row, odd everything, o a multiple of 32 or not, several row slivers.
SHAPES = [(1, 1, 1, 1), (1, 2, 70, 33), (5, 3, 33, 31), (16, 1, 64, 64), (33, 7, 31, 96)]
SHAPES += [(40, 50, 129, 100)]
EMPTY = [(0, 2, 5, 40), (3, 2, 0, 40), (3, 2, 5, 0), (0, 0, 5, 40)]


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """torch.set_num_threads, undone afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def draw(T: int, r: int, i: int, o: int) -> dict[str, Tensor]:
    """A base of size 30 and rows that differ from it by about 1."""
    g = torch.Generator().manual_seed(T * 10000 + r * 1000 + i * 100 + o)
    x_base, W = 30 * torch.randn(r, i, generator=g), torch.randn(o, i, generator=g)
    index = torch.randint(0, max(r, 1), (T,), generator=g, dtype=torch.int32)
    x = x_base[index.long()] + torch.randn(T, i, generator=g)
    y_base = linear(x_base, W, torch.randn(o, generator=g))
    add = torch.randn(T, o, generator=g)
    return {"x": x, "x_base": x_base, "y_base": y_base, "index": index, "W": W, "add": add}


def call(inputs: dict[str, Tensor], add: bool = True) -> Tensor:
    rows = [inputs[name] for name in ("x", "x_base", "y_base", "index")]
    with use_backend("auto"):  # not every backend packs
        packed = pack_weights(inputs["W"], "bf16")
    return delta_linear(*rows, packed, len(inputs["W"]), inputs["add"] if add else None)


def plain(
    inputs: dict[str, Tensor], dtype: torch.dtype = torch.float64, add: bool = True
) -> Tensor:
    """The formula on the rounded operands, products and sums at `dtype`."""
    rows = inputs["index"].long()
    delta = (inputs["x"] - inputs["x_base"][rows]).bfloat16().to(dtype)
    y = inputs["y_base"][rows].to(dtype) + linear(delta, inputs["W"].bfloat16().to(dtype))
    return y + inputs["add"].to(dtype) if add else y


@on_every_backend
def test_it_agrees_with_numbers_worked_by_hand(backend: str) -> None:
    inputs = {
        "x": torch.tensor([[3.0, 10.0], [1.0, 1.0], [3.0, 11.0]]),
        "x_base": torch.tensor([[1.0, 1.0], [3.0, 10.0]]),
        "y_base": torch.tensor([[0.1, 0.2, 0.3], [100.0, 200.0, 300.0]]),
        "index": torch.tensor([1, 0, 1]),
        "W": torch.tensor([[1.0, 2.0], [0.0, -1.0], [3.0, 0.5]]),
        "add": torch.tensor([[1000.0] * 3, [2000.0] * 3, [3000.0] * 3]),
    }
    with use_backend(backend):
        alone, whole = call(inputs, add=False), call(inputs)
    # Rows 0 and 1 are base rows, so they get the base's answer; row 2 differs by (0, 1).
    assert torch.equal(alone[:2], inputs["y_base"][[1, 0]])
    assert alone[2].tolist() == [102.0, 199.0, 300.5]
    assert torch.equal(whole, alone + inputs["add"])


@on_every_backend
def test_the_difference_is_rounded_to_bfloat16_and_the_base_is_not(backend: str) -> None:
    # 1 + 2^-8 is a tie and goes to 1; the base keeps its 24 bits.
    inputs = {
        "x": torch.tensor([[8 + 1 + 2**-8, 8.0]]),
        "x_base": torch.tensor([[8.0, 8.0]]),
        "y_base": torch.tensor([[16 + 2**-19]]),
        "index": torch.tensor([0]),
        "W": torch.tensor([[1 + 2**-8, 1.0]]),
    }
    with use_backend(backend):
        assert call(inputs, add=False).tolist() == [[17 + 2**-19]]


@on_native_backends
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_backend_is_as_accurate_as_plain_pytorch(
    backend: str, shape: tuple[int, int, int, int]
) -> None:
    inputs = draw(*shape)
    for add in (False, True):
        with use_backend(backend):
            got = call(inputs, add)
        assert_accurate(got, plain(inputs, torch.float32, add), plain(inputs, add=add))


@pytest.mark.parametrize("level", level_parameters())
def test_instruction_sets_agree(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Sixteen rows and fewer take one tile of AMX, 17 to 32 two; 80 are three slivers of tiles.
    for shape in [*SHAPES, (17, 3, 70, 65), (80, 9, 40, 40)]:
        inputs = draw(*shape)
        monkeypatch.setenv("MICROTOME_CPU_ISA", level)
        got = call(inputs)
        # Without fma, or in an order of its own: other bits than plain PyTorch, no larger error.
        assert_accurate(got, plain(inputs, torch.float32), plain(inputs), factor=4.0)
        if level == "avx512":
            monkeypatch.setenv("MICROTOME_CPU_ISA", "avx2")
            assert torch.equal(got, call(inputs)), shape


@pytest.mark.parametrize("level", level_parameters())
def test_rows_that_equal_their_base_get_its_answer_bit_for_bit(
    level: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MICROTOME_CPU_ISA", level)
    inputs = draw(40, 7, 129, 100)
    rows = inputs["index"].long()
    same = torch.arange(40) % 3 > 0
    inputs["x"][same] = inputs["x_base"][rows[same]]
    got = call(inputs, add=False)
    assert torch.equal(got[same], inputs["y_base"][rows[same]])
    assert not torch.equal(got[~same], inputs["y_base"][rows[~same]])


@needs_extension
@pytest.mark.parametrize("level", level_parameters())
@pytest.mark.parametrize(
    "shape",
    [(3, 2, 700, 300), (70, 9, 90, 200), (500, 9, 90, 60), (900, 9, 800, 40)],
    ids=["panels are split", "both", "rows are split", "several blocks of rows"],
)
def test_thread_counts_change_no_bit(
    shape: tuple[int, int, int, int],
    level: str,
    threads: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MICROTOME_CPU_ISA", level)
    inputs = draw(*shape)
    threads(1)
    one = call(inputs)
    assert_accurate(one, plain(inputs, torch.float32), plain(inputs), factor=4.0)
    for count in (2, 3, 5):
        threads(count)
        assert torch.equal(call(inputs), one)


@on_native_backends
def test_rows_that_lie_apart_give_the_same_bits(backend: str) -> None:
    inputs = draw(9, 4, 21, 40)
    with use_backend(backend):
        wanted = call(inputs)
        apart, columns = {}, {}
        for name in ("x", "x_base", "y_base", "add"):
            t = inputs[name]
            wide = torch.full((t.shape[0], t.shape[1] + 9), float("nan"))
            apart[name] = wide[:, 2 : t.shape[1] + 2].copy_(t)
            columns[name] = t.t().contiguous().t()
        assert torch.equal(call({**inputs, **apart}), wanted)
        assert torch.equal(call({**inputs, **columns, "index": inputs["index"].long()}), wanted)
        one = {"x": inputs["x"][:1].expand(9, 21), "index": inputs["index"][:1].expand(9)}
        assert torch.equal(call({**inputs, **one}, add=False)[8], call(inputs, add=False)[0])


@pytest.mark.parametrize("level", level_parameters())
def test_nan_and_infinity_pass_through_as_in_torch(
    level: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MICROTOME_CPU_ISA", level)
    inputs = draw(6, 3, 20, 40)
    inputs["x"][1, 3] = float("nan")
    inputs["x"][2, 4] = float("inf")
    inputs["x"][4, 5] = 3.4e38  # rounds to infinity
    inputs["W"][7, 5] = float("-inf")
    inputs["y_base"][0, 9] = float("nan")
    inputs["add"][3, 11] = float("inf")
    got = call(inputs)
    torch.testing.assert_close(got, plain(inputs, torch.float32), equal_nan=True)
    assert got.isnan().any()
    assert got.isinf().any()


@needs_extension
@pytest.mark.parametrize("level", level_parameters())
def test_every_element_of_the_output_is_written(
    level: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Tensor] = []
    real = torch.empty

    def poisoned(*args: object, **options: object) -> Tensor:
        made.append(real(*args, **options).fill_(float("nan")))  # type: ignore[call-overload]
        return made[-1]

    monkeypatch.setenv("MICROTOME_CPU_ISA", level)
    for shape in SHAPES + EMPTY:
        inputs = draw(*shape)
        rows = [inputs[name] for name in ("x", "x_base", "y_base", "index")]
        packed = pack_weights(inputs["W"], "bf16")
        with monkeypatch.context() as patch, use_backend("cpu"):
            patch.setattr(torch, "empty", poisoned)
            y = delta_linear(*rows, packed, shape[3])
        assert y.data_ptr() == made[-1].data_ptr(), "the patch went unused"
        assert not y.isnan().any(), shape


@pytest.mark.parametrize("backend", [p for p in backends_of(_delta) if p.id == "cpu"])
@pytest.mark.parametrize("bad", [-1, 3, 2**40])
def test_the_cpu_kernel_itself_refuses_an_index_out_of_range(backend: str, bad: int) -> None:
    rows = [GOOD[name] for name in ("x", "x_base", "y_base")]
    index = torch.tensor([0, 2, bad, 1])
    text = f"delta_linear: indices must lie in [0, r=3), got {bad}."
    with use_backend(backend), pytest.raises(errors.ArgumentError, match=f"^{re.escape(text)}$"):
        _delta(*rows, index, pack_weights(GOOD["W"], "bf16"), 40, None)


@on_every_backend
@pytest.mark.parametrize("shape", EMPTY, ids=str)
def test_an_empty_side_leaves_base_and_added_rows(
    backend: str, shape: tuple[int, int, int, int]
) -> None:
    inputs = draw(*shape)
    with use_backend(backend):
        got = call(inputs)
    assert torch.equal(got, inputs["y_base"][inputs["index"].long()] + inputs["add"])


def test_the_reference_takes_float64() -> None:
    inputs = {k: t.double() if t.is_floating_point() else t for k, t in draw(5, 3, 33, 40).items()}
    rows = inputs["index"].long()
    delta = (inputs["x"] - inputs["x_base"][rows]).bfloat16().double()
    exact = inputs["y_base"][rows] + linear(delta, inputs["W"].bfloat16().double())
    torch.testing.assert_close(call(inputs), exact + inputs["add"], rtol=1e-14, atol=1e-13)


def test_the_error_scales_with_the_patch_and_not_with_the_activation() -> None:
    inputs = draw(40, 5, 129, 100)
    rows = inputs["index"].long()
    exact = linear(inputs["x"].double(), inputs["W"].double())
    base = linear(inputs["x_base"].double(), inputs["W"].double())
    got = call({**inputs, "y_base": base.float()}, add=False)
    rounded = linear(inputs["x"].bfloat16().double(), inputs["W"].bfloat16().double())
    bound = (inputs["x"] - inputs["x_base"][rows]).abs() @ inputs["W"].abs().T  # [T, o]
    assert ((got.double() - exact).abs() <= 2**-7.9 * bound + 1e-3).all()
    assert (got.double() - exact).abs().max() < 0.1 * (rounded - exact).abs().max()


@on_every_backend
def test_the_op_passes_opcheck(backend: str) -> None:
    inputs = draw(5, 3, 33, 40)
    packed = pack_weights(inputs["W"], "bf16")
    rows = [inputs[name] for name in ("x", "x_base", "y_base", "index")]
    strided = [t.t().contiguous().t() for t in rows[:3]]
    with use_backend(backend):
        torch.library.opcheck(_delta.torch_op, (*rows, packed, 40, None))
        torch.library.opcheck(
            _delta.torch_op, (*strided, inputs["index"].long(), packed, 40, inputs["add"])
        )


GOOD = draw(4, 3, 6, 40)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (
            {"x_base": torch.ones(3, 7)},
            errors.ShapeError,
            "delta_linear: x_base must be [r, i] with i=6 as in x, got shape [3, 7].",
        ),
        (
            {"y_base": torch.ones(2, 40)},
            errors.ShapeError,
            "delta_linear: y_base must be [r, o] with r=3 as in x_base, got shape [2, 40].",
        ),
        (
            {"index": torch.zeros(5, dtype=torch.int32)},
            errors.ShapeError,
            "delta_linear: index must be [T] with T=4 as in x, got shape [5].",
        ),
        (
            {"o": 41},
            errors.ShapeError,
            "delta_linear: o must be 40, as the other tensors have it, got o=41.",
        ),
        (
            {"packed": torch.ones(2, 6, 32)},
            errors.DtypeError,
            "delta_linear: packed must be bfloat16, got float32. Make it with "
            "pack_weights(W, 'bf16').",
        ),
        (
            {"packed": torch.ones(2, 32, 32, 2).bfloat16()},
            errors.ShapeError,
            "delta_linear: packed must be [2, 16, 32, 2] for o=40 outputs and i=6 inputs, got "
            "shape [2, 32, 32, 2]. Make it with pack_weights(W, 'bf16') of a W [o, i].",
        ),
        (
            {"x_base": torch.ones(3, 6).double()},
            errors.DtypeError,
            "delta_linear: all weights and inputs must share one dtype, got x float32, x_base "
            "float64, y_base float32, add float32. Cast them with .to().",
        ),
        (
            {"index": torch.zeros(4)},
            errors.DtypeError,
            "delta_linear: index must be int32, int64, got float32. Cast it with .to().",
        ),
        (
            {"index": torch.tensor([0, 2, 3, 1])},
            errors.ArgumentError,
            "delta_linear: indices must lie in [0, r=3), got 3.",
        ),
        (
            {"index": torch.tensor([0, -1, 2, 1])},
            errors.ArgumentError,
            "delta_linear: indices must lie in [0, r=3), got -1.",
        ),
    ],
)
def test_what_is_wrong_is_said(
    change: dict[str, object], error: type[Exception], text: str
) -> None:
    arguments = {
        **{name: GOOD[name] for name in ("x", "x_base", "y_base", "index", "add")},
        "packed": pack_weights(GOOD["W"], "bf16"),
        "o": 40,
        **change,
    }
    with pytest.raises(error, match=f"^{re.escape(text)}$"):
        delta_linear(**arguments)  # type: ignore[arg-type]
