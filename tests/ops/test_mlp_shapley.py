"""mlp_shapley: by hand, every backend and level against loops in float64, axioms, edges."""

from __future__ import annotations

import doctest
import functools
import importlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from microtome import _native
from microtome.ops import IDENTITY, RELU, mlp_shapley, use_backend
from microtome.ops._mlp_shapley_inputs import ACTIVATIONS
from microtome.ops.mlp_shapley import _shapley
from microtome.testing import (
    MLP_CASES,
    MlpCase,
    backends_of,
    interpreted,
    level_parameters,
    max_error,
    model_of,
    values_by_loops,
)

EPS = torch.finfo(torch.float32).eps
PRECISIONS = ("fp32", "bf16")
on_every_backend = pytest.mark.parametrize("backend", backends_of(_shapley))
# The reference is the measure of accuracy, so it is not measured.
on_native_backends = pytest.mark.parametrize("backend", backends_of(_shapley)[:-1])


def take(backend: str, case: MlpCase) -> dict[str, Any]:
    """The inputs of a case; skips the test where the backend says that it has no such layers."""
    inputs = case.inputs()
    if backend == "triton" and (len(case.widths) > 3 or max(case.widths) > 256):
        pytest.skip("triton: has 1 to 3 layers of width up to 256")
    return inputs


on_every_level = pytest.mark.parametrize("level", level_parameters())
on_every_case = pytest.mark.parametrize("case", MLP_CASES, ids=lambda case: case.name)
needs_extension = pytest.mark.skipif(
    _native.why_absent() is not None, reason="the extension is absent"
)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """torch.set_num_threads, undone afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@functools.cache
def answers(case: MlpCase, half: bool = False) -> tuple[Any, ...]:
    """mean, m2 and largest value by loops in float64; mean by plain PyTorch in float32."""
    inputs = case.inputs()
    mean, m2, largest = values_by_loops(inputs, model_of(inputs))
    with use_backend("reference"):
        plain = mlp_shapley(**inputs, precision="bf16" if half else "fp32")[0]
    return mean, m2, largest, plain


def check(case: MlpCase, mean: Tensor, m2: Tensor, half: bool = False) -> None:
    """At most twice plain PyTorch's error, and one ulp of the largest value, in every gain.

    With bfloat16 the error is the rounding's, which plain PyTorch does likewise.
    """
    exact, squares, largest, plain = answers(case, half)
    assert mean.dtype == m2.dtype == torch.float64
    assert mean.shape == m2.shape == exact.shape
    allowed = 2 * max_error(plain, exact) + EPS * largest
    assert max_error(mean, exact) <= allowed, (max_error(mean, exact), allowed)
    # A deviation d off by 2 allowed takes its square off by 4 |d| allowed, and U of them make m2.
    spread = float(squares.max().sqrt()) if squares.numel() else 0.0
    assert max_error(m2, squares) <= 4 * case.U * allowed * (spread + allowed)


@on_every_backend
def test_it_agrees_with_numbers_worked_by_hand(backend: str) -> None:
    # f(a) = relu(a0 + a1 - 3) + 2 relu(a0 - a1), x = (3, 1), background row (0, 2):
    # f() = 0, f({0}) = f(3, 2) = 2 + 2 = 4, f({1}) = f(0, 1) = 0, f(all) = f(3, 1) = 1 + 4 = 5.
    # Order (0, 1): gains 4 and 1; its reverse: player 1 first, 0 and 5. Pair: (4.5, 0.5).
    weights = [torch.tensor([[1.0, 1.0], [1.0, -1.0]]), torch.tensor([[1.0, 2.0]])]
    biases, codes = [torch.tensor([-3.0, 0.0]), None], [RELU, IDENTITY]
    x, background = torch.tensor([[3.0, 1.0]]), torch.tensor([[0.0, 2.0]])
    one, other = [0, 1], [1, 0]
    with use_backend(backend):
        mean, m2 = mlp_shapley(
            x, background, torch.tensor([[[one], [other]]]), weights, biases, codes, paired=False
        )
        pair, none = mlp_shapley(x, background, torch.tensor([[[one]]]), weights, biases, codes)
    assert mean.flatten().tolist() == [4.5, 0.5]
    assert m2.flatten().tolist() == [0.5, 0.5]  # (4 - 4.5)^2 + (5 - 4.5)^2
    assert pair.flatten().tolist() == [4.5, 0.5]
    assert none.flatten().tolist() == [0.0, 0.0]


@on_every_case
def test_the_reference_agrees_with_loops_over_sets(case: MlpCase) -> None:
    inputs = case.inputs()
    wide = {
        name: [t.double() for t in value] if name in ("weights", "biases") else value
        for name, value in inputs.items()
    }
    wide |= {name: inputs[name].double() for name in ("x", "background")}
    for half, precision in ((False, "fp32"), (True, "bf16")):
        mean, m2 = mlp_shapley(**wide, precision=precision)
        exact, squares, _ = values_by_loops(inputs, model_of(inputs, half))
        torch.testing.assert_close(mean, exact, rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(m2, squares, rtol=1e-10, atol=1e-13)


@on_native_backends
@on_every_case
def test_every_backend_is_as_accurate_as_plain_pytorch(backend: str, case: MlpCase) -> None:
    with use_backend(backend):
        check(case, *mlp_shapley(**take(backend, case)))


@on_every_level
@on_every_case
@pytest.mark.parametrize("precision", PRECISIONS)
def test_instruction_sets_agree(
    case: MlpCase, precision: str, level: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MICROTOME_CPU_ISA", level)
    mean, m2 = mlp_shapley(**case.inputs(), precision=precision)
    check(case, mean, m2, half=precision == "bf16")
    if level == "avx512":
        monkeypatch.setenv("MICROTOME_CPU_ISA", "avx2")
        again = mlp_shapley(**case.inputs(), precision=precision)
        assert torch.equal(mean, again[0])
        assert torch.equal(m2, again[1])


@on_every_level
@pytest.mark.parametrize("code", range(len(ACTIVATIONS)))
def test_every_activation_is_right_in_every_layer(
    code: int, level: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MICROTOME_CPU_ISA", level)
    for widths in ((5,), (40, 3), (33, 70, 2)):
        case = MlpCase(f"act{code}", 2, 2, 6, widths, 2, 1, 1, 6, (code,) * len(widths))
        check(case, *mlp_shapley(**case.inputs()))


@on_native_backends
def test_activations_hold_over_their_whole_range(backend: str) -> None:
    # One column and an identity first layer: the gain is act(x) - act(0).
    points = 17 if interpreted(backend) else 4001
    x = torch.cat([torch.linspace(-120, 120, points), torch.tensor([1e-6, -1e-6, 1e4, -1e4])])[
        :, None
    ]
    one, ranks = torch.ones(1, 1), torch.zeros(1, 1, 1, 1, dtype=torch.int32)
    for code, activation in enumerate(ACTIVATIONS):
        with use_backend(backend):
            got = mlp_shapley(x, torch.zeros(1, 1), ranks, [one], [None], [code])[0].flatten()
        exact = (activation(x.double()) - activation(torch.zeros(1).double())).flatten()
        error = (got - exact).abs() / exact.abs().clamp(min=1)
        assert float(error.max()) < 2.5e-7, code


@needs_extension
@on_every_level
@pytest.mark.parametrize("precision", PRECISIONS)
def test_thread_counts_change_no_bit(
    precision: str,
    level: str,
    threads: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MICROTOME_CPU_ISA", level)
    for name in ("crossed", "nested", "one_background", "groups_crossed"):
        inputs = next(case for case in MLP_CASES if case.name == name).inputs()
        threads(1)
        one = mlp_shapley(**inputs, precision=precision)
        for count in (2, 3, 5):
            threads(count)
            assert all(map(torch.equal, mlp_shapley(**inputs, precision=precision), one))


# In Triton's interpreter numpy's products depend on a row's place: test_mlp_shapley_triton.py.
@pytest.mark.parametrize("backend", ["cpu"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_an_answer_does_not_depend_on_what_else_is_asked(backend: str, precision: str) -> None:
    inputs = next(case for case in MLP_CASES if case.name == "nested").inputs()
    with use_backend(backend):
        whole = mlp_shapley(**inputs, precision=precision)
        for e in range(len(inputs["x"])):
            part = mlp_shapley(**{**inputs, "x": inputs["x"][e : e + 1]}, precision=precision)
            assert all(torch.equal(p, w[e : e + 1]) for p, w in zip(part, whole, strict=True))
        rows = slice(1, 3)
        some = {"background": inputs["background"][rows], "ranks": inputs["ranks"][rows]}
        part = mlp_shapley(**{**inputs, **some}, precision=precision)
        assert all(torch.equal(p, w[:, rows]) for p, w in zip(part, whole, strict=True))


@on_every_backend
@on_every_case
def test_gains_add_up_to_the_value_of_all_less_that_of_none(backend: str, case: MlpCase) -> None:
    inputs = take(backend, case)
    with use_backend(backend):
        mean = mlp_shapley(**inputs)[0].sum(2)  # [e, S, o]
    x, background = inputs["x"].double(), inputs["background"].double()
    none = background[None].repeat(case.e, 1, 1)  # [e, n, m]
    if inputs["player"] is not None:
        none = torch.where(inputs["player"] < 0, x[:, None], none)
    model = model_of(inputs)
    gain = model(x)[:, None] - model(none)
    exact = gain.mean(1, keepdim=True) if case.S == 1 else gain
    assert max_error(mean, exact) <= 8 * EPS * answers(case)[2] + 1e-12


@on_every_level
def test_bfloat16_keeps_its_bound(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # With one layer between, rounding a and W to 2^-9 each takes a value off by at most
    # 2^-7.99 sum |W3| |W2| |a|, where a ReLU follows.
    monkeypatch.setenv("MICROTOME_CPU_ISA", level)
    case = next(case for case in MLP_CASES if case.name == "nested")
    inputs = case.inputs()
    W1, W2, W3 = inputs["weights"]
    largest = inputs["x"].abs().max(0).values.maximum(inputs["background"].abs().max(0).values)
    a = W1.abs() @ largest + inputs["biases"][0].abs()
    bound = 2 * 2**-7.99 * float((W3.abs() @ (W2.abs() @ a)).max())
    exact = answers(case)[0]
    got = mlp_shapley(**inputs, precision="bf16")[0]
    assert 1e-5 < max_error(got, exact) <= bound
    # In practice it is a small part of that: roundings differ in sign.
    assert max_error(got, exact) <= 0.02 * float(exact.abs().max())


@on_every_level
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=["nan", "inf"])
def test_what_is_not_finite_spoils_its_own_row_and_no_other(
    bad: float, precision: str, level: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MICROTOME_CPU_ISA", level)
    case = MlpCase("bad", 3, 4, 6, (40, 33, 2), 4, 2, 1, 6)
    inputs = case.inputs()
    good = mlp_shapley(**inputs, precision=precision)
    inputs["x"][1, 2] = bad
    inputs["background"][2, 3] = bad
    got = mlp_shapley(**inputs, precision=precision)
    for now, before in zip(got, good, strict=True):
        spoiled = torch.zeros_like(now, dtype=torch.bool)
        spoiled[1] = spoiled[:, 2] = True
        assert torch.equal(now[~spoiled], before[~spoiled])
        assert not now[1, :, 2].isfinite().any()
        assert not now[:, 2, 3].isfinite().any()


@on_every_level
@pytest.mark.parametrize("precision", PRECISIONS)
def test_weights_that_are_not_finite_are_multiplied_with_zeros_too(
    precision: str, level: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MICROTOME_CPU_ISA", level)
    inputs = MlpCase("bad", 1, 2, 5, (33, 40, 3), 2, 1, 1, 5).inputs()
    inputs["biases"][0][7] = -1e3  # dead in every row
    inputs["weights"][1][4, 7] = float("inf")  # 0 * inf is NaN
    inputs["weights"][2][0, 4] = 0.0
    assert mlp_shapley(**inputs, precision=precision)[0].isnan().all()


@on_native_backends
def test_strides_and_integer_types_change_no_bit(backend: str) -> None:
    inputs = next(case for case in MLP_CASES if case.name == "groups").inputs()
    with use_backend(backend):
        wanted = mlp_shapley(**inputs)
        other = {
            "x": inputs["x"].t().contiguous().t(),
            "background": torch.cat([inputs["background"]] * 2, 1)[:, : inputs["x"].shape[1]],
            "ranks": inputs["ranks"].long().transpose(0, 3).contiguous().transpose(0, 3),
            "weights": [W.t().contiguous().t() for W in inputs["weights"]],
            "biases": [torch.stack([b, b], 1)[:, 0] for b in inputs["biases"]],
            "player": inputs["player"].long(),
        }
        assert all(map(torch.equal, mlp_shapley(**{**inputs, **other}), wanted))


@needs_extension
def test_values_that_do_not_fit_at_once_are_folded_in_turns() -> None:
    # 96 cells of 201 coalitions and 250 outputs are 39 MB of values, more than wait at a time.
    g = torch.Generator().manual_seed(0)
    x, background = torch.randn(1, 201, generator=g), torch.randn(1, 201, generator=g)
    W = torch.randn(250, 201, generator=g)
    ranks = torch.rand(1, 96, 1, 201, generator=g).argsort(-1).to(torch.int32)
    mean, m2 = mlp_shapley(x, background, ranks, [W], [None], [IDENTITY], paired=False)
    exact = ((x - background).double() * W.double()).T  # [p, o], whatever the order
    assert max_error(mean[0, 0], exact) < 1e-5
    assert float(m2.abs().max()) < 1e-8


@needs_extension
@pytest.mark.parametrize("case", [MLP_CASES[0], MLP_CASES[6], MLP_CASES[-1]], ids=lambda c: c.name)
def test_every_element_of_the_outputs_is_written(
    case: MlpCase, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Tensor] = []
    real, like = torch.empty, torch.empty_like

    def poisoned(tensor: Tensor) -> Tensor:
        made.append(tensor.fill_(float("nan")))
        return tensor

    inputs = case.inputs()
    with monkeypatch.context() as patch, use_backend("cpu"):
        patch.setattr(torch, "empty", lambda *a, **k: poisoned(real(*a, **k)))
        patch.setattr(torch, "empty_like", lambda *a, **k: poisoned(like(*a, **k)))
        mean, m2 = mlp_shapley(**inputs)
    assert [mean.data_ptr(), m2.data_ptr()] == [t.data_ptr() for t in made[-2:]]
    assert not mean.isnan().any()
    assert not m2.isnan().any()


@on_every_backend
def test_the_op_passes_opcheck(backend: str) -> None:
    case = MlpCase("opcheck", 1, 2, 4, (5, 3, 2), 2, 1, 1, 3)
    for inputs in (case.inputs(), replace(case, p=4, paired=False, S=1).inputs()):
        with use_backend(backend):
            for precision in PRECISIONS:
                torch.library.opcheck(_shapley.torch_op, (*inputs.values(), precision))


def test_the_example_runs() -> None:
    assert doctest.testmod(importlib.import_module("microtome.ops.mlp_shapley")).failed == 0
