"""sparse_decode at its edges: messages, demanded backends, compiled graphs, autocast, NaN."""

from __future__ import annotations

import re

import pytest
import torch

from microtome import _native, errors
from microtome.ops import sparse_decode, use_backend
from microtome.ops.sparse_decode import _decode, _grad_values, _grad_W_dec
from microtome.testing import CASES, backends_of, skip_if_interpreted

on_every_backend = pytest.mark.parametrize("backend", backends_of(_decode))
needs_extension = pytest.mark.skipif(
    _native.why_absent() is not None, reason="the extension is absent"
)
VALUES, INDICES, W_DEC = torch.ones(2, 3), torch.tensor([[0, 1, 2]] * 2), torch.ones(4, 5)


def message(text: str) -> str:
    return f"^{re.escape(text)}$"


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (
            {"values": torch.ones(3)},
            errors.ShapeError,
            "sparse_decode: values must be [n, k], got shape [3].",
        ),
        (
            {"values": torch.ones(2, 4)},
            errors.ShapeError,
            "sparse_decode: indices must be [n, k] with k=4 as in values, got shape [2, 3].",
        ),
        (
            {"b_dec": torch.ones(6)},
            errors.ShapeError,
            "sparse_decode: b_dec must be [d] with d=5 as in W_dec, got shape [6].",
        ),
        (
            {"values": torch.ones(2, 3).int()},
            errors.DtypeError,
            "sparse_decode: values must be float32, bfloat16, float16, float64, got int32. "
            "Cast it with .to().",
        ),
        (
            {"W_dec": torch.ones(4, 5).bfloat16()},
            errors.DtypeError,
            "sparse_decode: all weights and inputs must share one dtype, got values float32, "
            "W_dec bfloat16. Cast them with .to().",
        ),
        (
            {"indices": torch.ones(2, 3)},
            errors.DtypeError,
            "sparse_decode: indices must be int32, int64, got float32. Cast it with .to().",
        ),
        (
            {"W_dec": torch.ones(4, 5, device="meta")},
            errors.DeviceError,
            "sparse_decode: all tensors must lie on one device, got values [2, 3] on cpu, indices "
            "[2, 3] on cpu, W_dec [4, 5] on meta. Load W_dec on cpu (meta tensors hold no data).",
        ),
        (
            {"indices": torch.tensor([[0, 1, 4]] * 2)},
            errors.ArgumentError,
            "sparse_decode: indices must lie in [0, f=4), got 4.",
        ),
        (
            {"indices": torch.tensor([[0, -1, 2]] * 2)},
            errors.ArgumentError,
            "sparse_decode: indices must lie in [0, f=4), got -1.",
        ),
    ],
)
def test_bad_input_is_named(
    change: dict[str, torch.Tensor], error: type[Exception], text: str
) -> None:
    arguments = {"values": VALUES, "indices": INDICES, "W_dec": W_DEC, **change}
    with pytest.raises(error, match=message(text)):
        sparse_decode(**arguments)


@needs_extension
@pytest.mark.parametrize("bad", [4, -1, 2**32 + 1, -(2**40)])
def test_a_kernel_reads_nothing_outside_the_weights(bad: int) -> None:
    # A compiled graph skips the check at the public edge, so the kernels make it too.
    indices = torch.tensor([[0, 1, 2], [3, bad, 2]])
    grad_out = torch.ones(2, 5)
    calls = {
        "sparse_decode": lambda: _decode(VALUES, indices, W_DEC, None),
        "sparse_decode_grad_values": lambda: _grad_values(grad_out, indices, W_DEC),
        "sparse_decode_grad_W_dec": lambda: _grad_W_dec(VALUES, indices, grad_out, 4),
    }
    with use_backend("cpu"):
        for name, call in calls.items():
            text = f"{name}: indices must lie in [0, f=4), got {bad}."
            with pytest.raises(errors.ArgumentError, match=message(text)):
                call()


@needs_extension
def test_a_demanded_backend_that_cannot_run_lists_inputs_and_reasons() -> None:
    text = """sparse_decode: backend 'cpu' was demanded but cannot run here.
  values: [2, 3] float64 cpu
  indices: [2, 3] int64 cpu
  W_dec: [4, 5] float64 cpu
  b_dec: None
because
"""
    with (
        use_backend("cpu"),
        pytest.raises(errors.BackendError, match=f"^{re.escape(text)}") as raised,
    ):
        sparse_decode(VALUES.double(), INDICES, W_DEC.double())
    lines = str(raised.value).splitlines()
    assert "  cpu: dtype float64 (has float32, bfloat16)" in lines
    assert "  reference: can run it" in lines
    assert lines[-1].startswith('Demand another with use_backend("reference")')


def test_other_dtypes_fall_to_the_reference() -> None:
    for dtype in (torch.float16, torch.float64):
        arguments = (VALUES.to(dtype), INDICES, W_DEC.to(dtype), None)
        assert _decode.choose(*arguments).name == "reference"
        assert _decode(*arguments).tolist() == [[3.0] * 5] * 2


@needs_extension
def test_mixed_dtypes_never_reach_a_kernel() -> None:
    reason = _decode.backends[-2].why_not(VALUES.bfloat16(), INDICES, W_DEC, None)
    assert reason == "dtypes differ: bfloat16, float32"
    f = _grad_W_dec.backends[-2].why_not(VALUES, INDICES, torch.ones(2, 5), 2**31)
    assert f == "f=2147483648 (has f below 2**31)"


@on_every_backend
@pytest.mark.parametrize(("n", "k", "f", "d"), [(0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 4, 0)])
def test_empty_sizes_work_forward_and_backward(
    backend: str, n: int, k: int, f: int, d: int
) -> None:
    values = torch.ones(n, k, requires_grad=True)
    W_dec, b_dec = torch.ones(f, d, requires_grad=True), torch.full((d,), 7.0)
    with use_backend(backend):
        out = sparse_decode(values, torch.zeros(n, k, dtype=torch.int64), W_dec, b_dec)
        grads = torch.autograd.grad(out.sum(), (values, W_dec))
    assert torch.equal(out, torch.full((n, d), 7.0 + k))
    assert torch.equal(grads[0], torch.full((n, k), float(d)))
    expected = torch.zeros(f, d)
    expected[0] = n * k
    assert torch.equal(grads[1], expected)


@on_every_backend
def test_nan_and_infinity_pass_through_to_their_row_alone(backend: str) -> None:
    values = torch.tensor([[float("nan"), 1.0], [1.0, 2.0], [float("inf"), 1.0]])
    with use_backend(backend):
        for dtype in (torch.float32, torch.bfloat16):
            out = sparse_decode(values.to(dtype), INDICES[:1, :2].expand(3, 2), W_DEC.to(dtype))
            assert out[0].isnan().all()
            assert out[1].tolist() == [3.0] * 5
            assert out[2].isposinf().all()


@on_every_backend
def test_bfloat16_rounds_to_nearest_even(backend: str) -> None:
    skip_if_interpreted(backend, "cuts bfloat16 off where a GPU rounds")
    # 1 + 2^-8 and 1 + 3 * 2^-8 lie halfway between bfloat16's neighbours; the even one wins.
    one = torch.tensor([[1.0, 1.0]], dtype=torch.bfloat16)
    W_dec = torch.tensor([[1.0, 1.0, 1.0], [2**-8, 3 * 2**-8, 2**-8 + 2**-14]])
    with use_backend(backend):
        out = sparse_decode(one, torch.tensor([[0, 1]]), W_dec.bfloat16())
    assert out.float().tolist() == [[1.0, 1.0 + 2**-6, 1.0 + 2**-7]]


@on_every_backend
def test_a_compiled_graph_runs_forward_and_backward(backend: str) -> None:
    inputs = CASES[3].inputs()
    values, W_dec = inputs["values"].requires_grad_(), inputs["W_dec"].requires_grad_()
    step = torch.compile(sparse_decode, fullgraph=True, backend="aot_eager")
    arguments = (values, inputs["indices"], W_dec, inputs["b_dec"])
    with use_backend(backend):
        compiled, eager = step(*arguments), sparse_decode(*arguments)
        grads = [
            torch.autograd.grad(out, (values, W_dec), inputs["x"]) for out in (compiled, eager)
        ]
    assert torch.equal(compiled, eager)
    assert all(map(torch.equal, *grads))


@on_every_backend
def test_autocast_keeps_float32(backend: str) -> None:
    inputs = CASES[3].inputs()
    arguments = (inputs["values"], inputs["indices"], inputs["W_dec"], inputs["b_dec"])
    with use_backend(backend):
        usual = sparse_decode(*arguments)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            cast = sparse_decode(*arguments)
    assert cast.dtype == torch.float32
    assert torch.equal(cast, usual)
