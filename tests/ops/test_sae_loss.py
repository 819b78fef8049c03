"""sae_loss: by hand, then every backend against float64, and its edges."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from microtome import _native, errors
from microtome.ops import sae_loss, use_backend
from microtome.ops.sae_loss import _loss
from microtome.testing import (
    CASES,
    Case,
    assert_accurate,
    backends_of,
    factor_of,
    skip_if_interpreted,
)

on_every_backend = pytest.mark.parametrize("backend", backends_of(_loss))
# The reference is the measure of accuracy, so it is not measured.
on_native_backends = pytest.mark.parametrize("backend", backends_of(_loss)[:-1])
needs_extension = pytest.mark.skipif(
    _native.why_absent() is not None, reason="the extension is absent"
)
both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
NAMES = ("x", "values", "indices", "W_dec", "b_dec")
OUTPUTS = ("sse", "grad_out", "grad_values")


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """torch.set_num_threads, undone afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def arguments_of(inputs: dict[str, Tensor]) -> list[Tensor]:
    return [inputs[name] for name in NAMES]


def wide(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.double() if t.is_floating_point() else t for name, t in inputs.items()}


def plain(inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """What anyone would write, with autograd for the gradients, at the dtype that came."""
    x, values, indices, W_dec, b_dec = arguments_of(inputs)
    values = values.clone().requires_grad_()
    out = (values[..., None] * W_dec[indices.long()]).sum(1) + b_dec
    out.retain_grad()
    sse = (out - x).square().sum(-1)
    sse.sum().backward()
    assert out.grad is not None
    assert values.grad is not None
    grad_values = values.grad.masked_fill(values == 0, 0)
    wider = torch.float64 if x.dtype == torch.float64 else torch.float32
    return sse.detach().to(wider), out.grad, grad_values


def gradients(function: Callable[..., Tensor], inputs: dict[str, Tensor]) -> list[Tensor]:
    """Gradients of the weighted sum of squared errors in x, values, W_dec and b_dec."""
    x, values, indices, W_dec, b_dec = arguments_of(inputs)
    leaves = [t.clone().requires_grad_() for t in (x, values, W_dec, b_dec)]
    sse = function(leaves[0], leaves[1], indices, leaves[2], leaves[3])
    weights = torch.linspace(0.5, 1.5, len(x)).to(sse.dtype)
    return list(torch.autograd.grad((sse * weights).sum(), leaves))


def plain_sse(x: Tensor, values: Tensor, indices: Tensor, W_dec: Tensor, b_dec: Tensor) -> Tensor:
    # A latent whose value is zero gets no gradient: the ReLU cut it.
    live = torch.where(values == 0, 0, values)
    out = (live[..., None] * W_dec[indices.long()]).sum(1) + b_dec
    return (out - x).square().sum(-1)


@on_every_backend
def test_it_agrees_with_numbers_worked_by_hand(backend: str) -> None:
    x = torch.tensor([[1.0, 2.0], [0.0, 0.0]])
    values = torch.tensor([[2.0, 0.0], [1.0, 3.0]])
    indices = torch.tensor([[0, 1], [1, 1]])
    W_dec, b_dec = torch.tensor([[1.0, -1.0], [0.0, 2.0]]), torch.tensor([1.0, 0.0])
    with use_backend(backend):
        sse, grad_out, grad_values = sae_loss(x, values, indices, W_dec, b_dec)
    # Row 0: 2 (1,-1) + (1,0) - (1,2) = (2,-4). Row 1: 4 (0,2) + (1,0) - (0,0) = (1,8).
    assert sse.tolist() == [20.0, 65.0]
    assert grad_out.tolist() == [[4.0, -8.0], [2.0, 16.0]]
    # <(4,-8), (1,-1)> = 12; the second value is zero; <(2,16), (0,2)> = 32, twice.
    assert grad_values.tolist() == [[12.0, 0.0], [32.0, 32.0]]


@every_case
@both_dtypes
@on_native_backends
def test_every_backend_is_as_accurate_as_plain_pytorch(
    backend: str, case: Case, dtype: torch.dtype
) -> None:
    inputs = case.inputs(dtype)
    with use_backend(backend):
        got = sae_loss(*arguments_of(inputs))
    for name, g, u, e in zip(OUTPUTS, got, plain(inputs), plain(wide(inputs)), strict=True):
        assert_accurate(g, u, e, name, factor_of(backend, e))


@every_case
@both_dtypes
@on_native_backends
def test_every_gradient_is_as_accurate_as_plain_pytorch(
    backend: str, case: Case, dtype: torch.dtype
) -> None:
    if case.name == "massive" and dtype == torch.bfloat16:
        skip_if_interpreted(backend, "cuts bfloat16 off, and the sum over rows shows it")
    inputs = case.inputs(dtype)
    with use_backend(backend):
        got = gradients(lambda *a: sae_loss(*a)[0], inputs)
    usual, exact = gradients(plain_sse, inputs), gradients(plain_sse, wide(inputs))
    dead = inputs["values"] == 0
    usual[1], exact[1] = usual[1].masked_fill(dead, 0), exact[1].masked_fill(dead, 0)
    for name, g, u, e in zip(("x", "values", "W_dec", "b_dec"), got, usual, exact, strict=True):
        assert_accurate(g, u, e, f"gradient of {name}", factor_of(backend, e))


def test_the_reference_passes_gradcheck() -> None:
    inputs = wide(Case("check", 3, 4, 5, 2).inputs())
    x, values, indices, W_dec, b_dec = arguments_of(inputs)
    # Away from the ReLU's kink, where the function is smooth.
    leaves = [t.requires_grad_() for t in (x, values + 0.5, W_dec, b_dec)]
    function = lambda x, v, W, b: sae_loss(x, v, indices, W, b)[0]  # noqa: E731
    assert torch.autograd.gradcheck(function, leaves)


@on_every_backend
def test_the_op_passes_opcheck_contiguous_or_not(backend: str) -> None:
    strided = next(case for case in CASES if case.name == "strided").inputs()
    strided["indices"] = strided["indices"].t().contiguous().t()
    assert not any(strided[name].is_contiguous() for name in ("x", "indices", "W_dec"))
    for inputs in (CASES[2].inputs(), strided):
        inputs = {
            name: t.detach().requires_grad_() if t.is_floating_point() else t
            for name, t in inputs.items()
        }
        with use_backend(backend):
            torch.library.opcheck(_loss.torch_op, tuple(arguments_of(inputs)))
            torch.library.opcheck(_loss.torch_op, (*arguments_of(inputs)[:4], None))


@both_dtypes
@on_native_backends
def test_every_element_of_every_output_is_written(
    backend: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Tensor] = []
    real = torch.empty

    def poisoned(*args: object, **options: object) -> Tensor:
        made.append(real(*args, **options))  # type: ignore[call-overload]
        return made[-1].fill_(float("nan")) if made[-1].is_floating_point() else made[-1].fill_(-9)

    for case in CASES:
        arguments = arguments_of(case.inputs(dtype))
        no_code = [arguments[0], arguments[1][:, :0], arguments[2][:, :0], arguments[3], None]
        with monkeypatch.context() as patch, use_backend(backend):
            patch.setattr(torch, "empty", poisoned)
            made.clear()
            outputs = [*_loss(*arguments), *_loss(*no_code)]
        addresses = {t.data_ptr() for t in made}
        for output in outputs:
            assert output.numel() == 0 or output.data_ptr() in addresses, "the patch went unused"
            assert not output.isnan().any(), case.name


@needs_extension
@both_dtypes
def test_one_and_two_threads_give_the_same_bits(
    dtype: torch.dtype, threads: Callable[[int], None]
) -> None:
    for case in CASES:
        arguments = arguments_of(case.inputs(dtype))
        answers = []
        for count in (1, 2, 3):
            threads(count)
            with use_backend("cpu"):
                answers.append(sae_loss(*arguments))
        assert all(map(torch.equal, answers[0], answers[1])), case.name
        assert all(map(torch.equal, answers[0], answers[2])), case.name


@needs_extension
@both_dtypes
@pytest.mark.parametrize("level", ["generic", "avx2", "avx512", "amx"])
def test_instruction_sets_agree(
    level: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MICROTOME_CPU_ISA", level)
    if _native.isa() != level:
        pytest.skip(f"this processor has no {level}")
    for case in CASES:
        inputs = case.inputs(dtype)
        monkeypatch.setenv("MICROTOME_CPU_ISA", level)
        with use_backend("cpu"):
            got = sae_loss(*arguments_of(inputs))
            monkeypatch.setenv("MICROTOME_CPU_ISA", "avx2")
            avx2 = sae_loss(*arguments_of(inputs))
        if level == "generic":  # it has no fused multiply-add: other bits, twice the roundings
            for name, g, u, e in zip(OUTPUTS, got, plain(inputs), plain(wide(inputs)), strict=True):
                assert_accurate(g, u, e, name, factor=4.0)
        else:
            assert all(map(torch.equal, got, avx2)), case.name


@needs_extension
def test_rows_longer_than_one_batch_of_entries_are_summed_whole() -> None:
    # k = 600 takes three batches of 256; whole numbers, so both backends are exact.
    g = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randint(-2, 3, shape, generator=g).float()  # noqa: E731
    indices = torch.randint(0, 50, (3, 600), generator=g)
    arguments = (draw(3, 37), draw(3, 600), indices, draw(50, 37), draw(37))
    with use_backend("cpu"):
        got = sae_loss(*arguments)
    with use_backend("reference"):
        assert all(map(torch.equal, got, sae_loss(*arguments)))


@on_every_backend
def test_int32_and_int64_indices_give_the_same_bits(backend: str) -> None:
    x, values, indices, W_dec, b_dec = arguments_of(CASES[3].inputs())
    with use_backend(backend):
        narrow = sae_loss(x, values, indices.int(), W_dec, b_dec)
        assert all(map(torch.equal, narrow, sae_loss(x, values, indices.long(), W_dec, b_dec)))


@on_every_backend
def test_a_compiled_graph_runs_forward_and_backward(backend: str) -> None:
    x, values, indices, W_dec, b_dec = arguments_of(CASES[3].inputs())
    leaves = (values.requires_grad_(), W_dec.requires_grad_())
    step = torch.compile(sae_loss, fullgraph=True, backend="aot_eager")
    with use_backend(backend):
        compiled = step(x, values, indices, W_dec, b_dec)
        eager = sae_loss(x, values, indices, W_dec, b_dec)
        grads = [torch.autograd.grad(out[0].sum(), leaves) for out in (compiled, eager)]
    assert all(map(torch.equal, compiled, eager))
    assert all(map(torch.equal, *grads))


@on_every_backend
def test_autocast_keeps_float32(backend: str) -> None:
    arguments = arguments_of(CASES[3].inputs())
    with use_backend(backend):
        usual = sae_loss(*arguments)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            cast = sae_loss(*arguments)
    assert all(t.dtype == torch.float32 for t in cast)
    assert all(map(torch.equal, cast, usual))


@on_every_backend
def test_a_second_derivative_is_refused(backend: str) -> None:
    x, values, indices, W_dec, b_dec = arguments_of(CASES[2].inputs())
    values.requires_grad_()
    with use_backend(backend):
        sse = sae_loss(x, values, indices, W_dec, b_dec)[0].square().sum()
        (grad,) = torch.autograd.grad(sse, values, create_graph=True)
        with pytest.raises(RuntimeError, match="marked with @once_differentiable"):
            grad.sum().backward()


GOOD = {
    "x": torch.ones(2, 5),
    "values": torch.ones(2, 3),
    "indices": torch.tensor([[0, 1, 2]] * 2),
    "W_dec": torch.ones(4, 5),
}


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (
            {"x": torch.ones(3, 5)},
            errors.ShapeError,
            "sae_loss: values must be [n, k] with n=3 as in x, got shape [2, 3].",
        ),
        (
            {"W_dec": torch.ones(4, 6)},
            errors.ShapeError,
            "sae_loss: W_dec must be [f, d] with d=5 as in x, got shape [4, 6].",
        ),
        (
            {"x": torch.ones(2, 5).long()},
            errors.DtypeError,
            "sae_loss: x must be float32, bfloat16, float16, float64, got int64. "
            "Cast it with .to().",
        ),
        (
            {"values": torch.ones(2, 3).bfloat16()},
            errors.DtypeError,
            "sae_loss: all weights and inputs must share one dtype, got x float32, "
            "values bfloat16, W_dec float32. Cast them with .to().",
        ),
        (
            {"indices": torch.ones(2, 3).bool()},
            errors.DtypeError,
            "sae_loss: indices must be int32, int64, got bool. Cast it with .to().",
        ),
        (
            {"x": torch.ones(2, 5, device="meta")},
            errors.DeviceError,
            "sae_loss: all tensors must lie on one device, got x [2, 5] on meta, values "
            "[2, 3] on cpu, indices [2, 3] on cpu, W_dec [4, 5] on cpu. Load x on cpu (meta "
            "tensors hold no data).",
        ),
        (
            {"indices": torch.tensor([[0, 1, -3]] * 2)},
            errors.ArgumentError,
            "sae_loss: indices must lie in [0, f=4), got -3.",
        ),
    ],
)
def test_bad_input_is_named(change: dict[str, Tensor], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=f"^{re.escape(text)}$"):
        sae_loss(**{**GOOD, **change})


@needs_extension
def test_a_kernel_reads_nothing_outside_the_weights() -> None:
    # A compiled graph skips the check at the public edge, so the kernel makes it too.
    bad = {**GOOD, "indices": torch.tensor([[0, 1, 2], [3, 4, 2]])}
    with (
        use_backend("cpu"),
        pytest.raises(
            errors.ArgumentError, match=r"^sae_loss: indices must lie in \[0, f=4\), got 4"
        ),
    ):
        _loss(*bad.values(), None)


@needs_extension
def test_a_demanded_backend_that_cannot_run_lists_inputs_and_reasons() -> None:
    good = {name: t.double() if t.is_floating_point() else t for name, t in GOOD.items()}
    with use_backend("cpu"), pytest.raises(errors.BackendError) as raised:
        sae_loss(**good)
    lines = str(raised.value).splitlines()
    assert lines[0] == "sae_loss: backend 'cpu' was demanded but cannot run here."
    assert lines[1:7] == [
        "  x: [2, 5] float64 cpu",
        "  values: [2, 3] float64 cpu",
        "  indices: [2, 3] int64 cpu",
        "  W_dec: [4, 5] float64 cpu",
        "  b_dec: None",
        "because",
    ]
    assert "  cpu: dtype float64 (has float32, bfloat16)" in lines
