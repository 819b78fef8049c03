"""sparse_decode and its gradients: by hand, then every backend against float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from microtome import _native
from microtome._seed import generator
from microtome.ops import sparse_decode, use_backend
from microtome.ops.sparse_decode import _decode, _grad_values, _grad_W_dec
from microtome.testing import CASES, Case, assert_accurate, backends_of

on_every_backend = pytest.mark.parametrize("backend", backends_of(_decode))
# The reference is the measure of accuracy, so it is not measured.
on_native_backends = pytest.mark.parametrize("backend", backends_of(_decode)[:-1])
needs_extension = pytest.mark.skipif(
    _native.why_absent() is not None, reason="the extension is absent"
)
both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)

HAND = {
    "values": torch.tensor([[2.0, -1.0], [0.5, 0.0]]),
    "indices": torch.tensor([[0, 2], [2, 2]]),
    "W_dec": torch.tensor([[1.0, 0.0, 3.0], [9.0, 9.0, 9.0], [0.0, 4.0, -2.0]]),
    "b_dec": torch.tensor([10.0, 20.0, 30.0]),
}
HAND_OUT = torch.tensor([[12.0, 16.0, 38.0], [10.0, 22.0, 29.0]])


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """torch.set_num_threads, undone afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def code_of(inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return inputs["values"], inputs["indices"], inputs["W_dec"], inputs["b_dec"]


def plain(values: Tensor, indices: Tensor, W_dec: Tensor, b_dec: Tensor) -> Tensor:
    """What anyone would write, at the dtype that came."""
    return (values[..., None] * W_dec[indices.long()]).sum(1) + b_dec


def gradients(function: Callable[..., Tensor], inputs: dict[str, Tensor]) -> list[Tensor]:
    """Gradients of <function(...), x> with respect to values, W_dec and b_dec."""
    values, indices, W_dec, b_dec = code_of(inputs)
    leaves = [t.clone().requires_grad_() for t in (values, W_dec, b_dec)]
    out = function(leaves[0], indices, leaves[1], leaves[2])
    return list(torch.autograd.grad(out, leaves, inputs["x"]))


def wide(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.double() if t.is_floating_point() else t for name, t in inputs.items()}


@on_every_backend
def test_it_agrees_with_numbers_worked_by_hand(backend: str) -> None:
    with use_backend(backend):
        torch.testing.assert_close(sparse_decode(**HAND), HAND_OUT, rtol=0, atol=0)
        without_bias = sparse_decode(*code_of(HAND)[:3])
    torch.testing.assert_close(without_bias, HAND_OUT - HAND["b_dec"], rtol=0, atol=0)


@on_every_backend
def test_gradients_agree_with_numbers_worked_by_hand(backend: str) -> None:
    grad_out = torch.tensor([[1.0, 0.0, 2.0], [0.0, 3.0, 1.0]])
    with use_backend(backend):
        grad_values, grad_W, grad_b = gradients(sparse_decode, {**HAND, "x": grad_out})
    # Row 0: <(1,0,2), (1,0,3)> = 7 and <(1,0,2), (0,4,-2)> = -4. Row 1: <(0,3,1), (0,4,-2)> = 10.
    assert grad_values.tolist() == [[7.0, -4.0], [10.0, 10.0]]
    # Feature 2 is used by row 0 with -1 and by row 1 with 0.5 and 0.
    assert grad_W.tolist() == [[2.0, 0.0, 4.0], [0.0, 0.0, 0.0], [-1.0, 1.5, -1.5]]
    assert grad_b.tolist() == [1.0, 3.0, 3.0]


@every_case
@both_dtypes
@on_native_backends
def test_every_backend_is_as_accurate_as_plain_pytorch(
    backend: str, case: Case, dtype: torch.dtype
) -> None:
    inputs = case.inputs(dtype)
    with use_backend(backend):
        got = sparse_decode(*code_of(inputs))
    assert_accurate(got, plain(*code_of(inputs)), plain(*code_of(wide(inputs))))


@every_case
@both_dtypes
@on_native_backends
def test_every_gradient_is_as_accurate_as_plain_pytorch(
    backend: str, case: Case, dtype: torch.dtype
) -> None:
    inputs = case.inputs(dtype)
    with use_backend(backend):
        got = gradients(sparse_decode, inputs)
    usual, exact = gradients(plain, inputs), gradients(plain, wide(inputs))
    for name, g, u, e in zip(("values", "W_dec", "b_dec"), got, usual, exact, strict=True):
        assert_accurate(g, u, e, f"gradient of {name}")


def test_the_reference_passes_gradcheck() -> None:
    values, indices, W_dec, b_dec = code_of(wide(Case("check", 3, 4, 5, 2).inputs()))
    leaves = [t.requires_grad_() for t in (values, W_dec, b_dec)]
    function = lambda v, W, b: sparse_decode(v, indices, W, b)  # noqa: E731
    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


@on_every_backend
def test_the_ops_pass_opcheck_contiguous_or_not(backend: str) -> None:
    strided = next(case for case in CASES if case.name == "strided").inputs()
    strided["values"] = torch.stack([strided["values"]] * 2, dim=-1)[..., 0]
    strided["indices"] = strided["indices"].t().contiguous().t()
    assert not any(strided[name].is_contiguous() for name in ("values", "indices", "W_dec", "x"))
    for inputs in (CASES[2].inputs(), strided):
        values, indices, W_dec, b_dec = code_of(inputs)
        leaves = [t.detach().requires_grad_() for t in (values, W_dec, b_dec)]
        with use_backend(backend):
            code = (leaves[0], indices, leaves[1], leaves[2])
            torch.library.opcheck(_decode.torch_op, code)
            torch.library.opcheck(_decode.torch_op, (*code[:3], None))
            torch.library.opcheck(_grad_values.torch_op, (inputs["x"], indices, W_dec))
            torch.library.opcheck(_grad_W_dec.torch_op, (values, indices, inputs["x"], len(W_dec)))


@both_dtypes
@pytest.mark.parametrize("backend", backends_of(_decode)[:-1])
def test_every_element_of_every_output_is_written(
    backend: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Tensor] = []
    real = torch.empty

    def poisoned(*args: object, **options: object) -> Tensor:
        made.append(real(*args, **options))  # type: ignore[call-overload]
        return made[-1].fill_(float("nan")) if made[-1].is_floating_point() else made[-1].fill_(-9)

    for case in CASES:
        inputs = case.inputs(dtype)
        values, indices, W_dec, b_dec = code_of(inputs)
        with monkeypatch.context() as patch, use_backend(backend):
            patch.setattr(torch, "empty", poisoned)
            made.clear()
            outputs = [
                _decode(values, indices, W_dec, b_dec),
                _decode(values[:, :0], indices[:, :0], W_dec, None),
                _grad_values(inputs["x"], indices, W_dec),
                _grad_W_dec(values, indices, inputs["x"], case.f),
            ]
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
        inputs = case.inputs(dtype)
        values, indices, W_dec, b_dec = code_of(inputs)
        answers = []
        for count in (1, 2, 3):
            threads(count)
            with use_backend("cpu"):
                answers.append(
                    (
                        _decode(values, indices, W_dec, b_dec),
                        _grad_values(inputs["x"], indices, W_dec),
                        _grad_W_dec(values, indices, inputs["x"], case.f),
                    )
                )
        for other in answers[1:]:
            assert all(map(torch.equal, answers[0], other)), case.name


@needs_extension
def test_a_code_long_enough_to_be_sorted_by_several_threads_gives_the_same_bits(
    threads: Callable[[int], None],
) -> None:
    g = generator(0, "long")
    n, k, f = 9000, 100, 13
    indices = torch.randint(0, f, (n, k), generator=g)
    values, ones = torch.randn(n, k, generator=g), torch.ones(n, 1)
    answers = []
    for count in (1, 2, 3):
        threads(count)
        with use_backend("cpu"):
            answers.append(_grad_W_dec(values, indices, ones, f))
    assert torch.equal(answers[0], answers[1])
    assert torch.equal(answers[0], answers[2])
    exact = torch.zeros(f, dtype=torch.float64)
    exact.index_add_(0, indices.flatten(), values.flatten().double())
    assert_accurate(
        answers[0],
        torch.zeros(f, 1).index_add_(0, indices.flatten(), values.flatten()[:, None]),
        exact[:, None],
    )


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
        values, indices, W_dec, b_dec = code_of(inputs)
        x, exact = inputs["x"], wide(inputs)

        def run() -> list[Tensor]:
            with use_backend("cpu"):
                return [
                    _decode(values, indices, W_dec, b_dec),  # noqa: B023
                    _grad_values(x, indices, W_dec),  # noqa: B023
                    _grad_W_dec(values, indices, x, case.f),  # noqa: B023
                ]

        monkeypatch.setenv("MICROTOME_CPU_ISA", level)
        got = run()
        if level == "generic":  # it has no fused multiply-add: other bits, twice the roundings
            grads = gradients(plain, inputs), gradients(plain, exact)
            assert_accurate(got[0], plain(*code_of(inputs)), plain(*code_of(exact)), factor=4.0)
            assert_accurate(got[1], grads[0][0], grads[1][0], "gradient of values", factor=4.0)
            assert_accurate(got[2], grads[0][1], grads[1][1], "gradient of W_dec", factor=4.0)
        else:
            monkeypatch.setenv("MICROTOME_CPU_ISA", "avx2")
            assert all(map(torch.equal, got, run())), case.name


@on_every_backend
def test_int32_and_int64_indices_give_the_same_bits(backend: str) -> None:
    inputs = CASES[3].inputs()
    values, indices, W_dec, b_dec = code_of(inputs)
    with use_backend(backend):
        assert torch.equal(
            sparse_decode(values, indices.int(), W_dec, b_dec),
            sparse_decode(values, indices.long(), W_dec, b_dec),
        )


@on_every_backend
def test_repeated_indices_add_up(backend: str) -> None:
    values, indices = torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[1, 1, 1]])
    W_dec = torch.tensor([[5.0], [3.0]]).requires_grad_()
    with use_backend(backend):
        out = sparse_decode(values, indices, W_dec)
        (grad,) = torch.autograd.grad(out, W_dec, torch.tensor([[2.0]]))
    assert out.tolist() == [[21.0]]
    assert grad.tolist() == [[0.0], [14.0]]


@on_every_backend
def test_a_latent_on_every_row_sums_over_all_rows(backend: str) -> None:
    # 1000 entries: four chunks of the segment reduce. Whole numbers, so every order is exact.
    n, d = 1000, 21
    g = generator(0, "every row")
    values = torch.randint(1, 4, (n, 2), generator=g).float()
    grad_out = torch.randint(-3, 4, (n, d), generator=g).float()
    indices = torch.stack([torch.full((n,), 6), torch.arange(n) % 5], dim=1)
    with use_backend(backend):
        grad = _grad_W_dec(values, indices, grad_out, 8)
    assert torch.equal(grad[6], values[:, 0] @ grad_out)
    for feature in range(5):
        rows = indices[:, 1] == feature
        assert torch.equal(grad[feature], values[rows, 1] @ grad_out[rows])
    assert not grad[[5, 7]].any()


@needs_extension
def test_rows_longer_than_one_batch_of_entries_are_summed_whole() -> None:
    # k = 600 takes three batches of 256; whole numbers, so the answer is exact.
    g = generator(0, "long rows")
    values = torch.randint(-2, 3, (3, 600), generator=g).float()
    indices = torch.randint(0, 50, (3, 600), generator=g)
    W_dec = torch.randint(-3, 4, (50, 37), generator=g).float()
    with use_backend("cpu"):
        assert torch.equal(_decode(values, indices, W_dec, None), plain(values, indices, W_dec, 0))
        dots = _grad_values(W_dec[:3], indices, W_dec)
    assert torch.equal(dots, (W_dec[:3, None] * W_dec[indices]).sum(-1))
