"""Inside torch.autocast: every op has a decision, and does what the table says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from microtome import _autocast, errors
from microtome._autocast import AS_GIVEN, DECISIONS, FLOAT32, WIDEST
from microtome.ops import sparse_decode, use_backend
from microtome.ops._registry import OPS
from microtome.testing.calls import Call, calls

CALLS = calls()
on_every_op = pytest.mark.parametrize("op", CALLS)
PAGE = Path(__file__).parents[2] / "docs" / "inside_torch.md"


def bf16() -> torch.autocast:
    return torch.autocast("cpu", dtype=torch.bfloat16)


def narrow(call: Call, *names: str) -> dict[str, Any]:
    """The call's inputs, each named one in bfloat16."""
    return {name: t.bfloat16() if name in names else t for name, t in call.inputs.items()}


def floats(call: Call) -> list[str]:
    """Inputs that autocast may have narrowed: float32, not kept, not updated in place."""
    held = (*DECISIONS[call.op].keep, *call.mutates)
    return [
        name
        for name, t in call.inputs.items()
        if isinstance(t, Tensor) and t.dtype == torch.float32 and name not in held
    ]


def widened(inputs: dict[str, Any]) -> dict[str, Any]:
    """Every bfloat16 input as the float32 of the same value, save packed weights."""
    return {
        name: t.float()
        if isinstance(t, Tensor) and t.dtype == torch.bfloat16 and name != "packed"
        else t
        for name, t in inputs.items()
    }


def fresh(call: Call, inputs: dict[str, Any]) -> dict[str, Any]:
    """Copies of what the op writes into."""
    return {name: t.clone() if name in call.mutates else t for name, t in inputs.items()}


def same(got: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> bool:
    return len(got) == len(expected) and all(
        a.dtype == b.dtype and torch.equal(a.nan_to_num(), b.nan_to_num())
        for a, b in zip(got, expected, strict=True)
    )


def test_every_op_has_a_decision_with_a_reason() -> None:
    undecided = sorted(set(OPS) - set(DECISIONS))
    assert not undecided, f"decide in microtome/_autocast.py what autocast means for {undecided}"
    for op, decision in DECISIONS.items():
        assert decision.cast in (WIDEST, FLOAT32, AS_GIVEN), op
        assert decision.why, op


def test_every_op_with_a_public_function_is_called_here() -> None:
    missing = sorted(op for op in OPS if "_grad_" not in op and op not in CALLS)
    assert not missing, f"add a call of {missing} to microtome/testing/calls.py"


def test_the_page_has_the_same_table() -> None:
    section = PAGE.read_text().split("## Autocast")[1].split("\n## ")[0]
    rows = [line.split("|") for line in section.splitlines() if line.startswith("| `")]
    told = {
        name.strip(" `"): row[2].strip()
        for row in rows
        for name in row[1].split(",")
        if len(row) > 3
    }
    assert told == {op: decision.cast for op, decision in DECISIONS.items()}


def cast_as_told(op: str, inputs: dict[str, Any]) -> dict[str, Any]:
    """What the table says that autocast makes of a mixture."""
    return inputs if DECISIONS[op].cast == AS_GIVEN else widened(inputs)


@on_every_op
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_an_input_that_autocast_narrowed_is_widened_exactly(op: str, backend: str) -> None:
    call = CALLS[op]
    names = floats(call)[:1]
    inputs = narrow(call, *names)
    with use_backend(backend):
        expected = call(fresh(call, cast_as_told(op, inputs)))
        mine = fresh(call, inputs)
        with bf16():
            got = call(mine)
    assert same(got, expected)
    for name in call.mutates:
        assert mine[name].dtype == call.inputs[name].dtype
        assert not torch.equal(mine[name], call.inputs[name]) or name.startswith("moment")


@on_every_op
def test_inputs_of_one_narrow_dtype_are_cast_only_where_the_table_says_float32(op: str) -> None:
    call = CALLS[op]
    inputs = narrow(call, *floats(call))
    if DECISIONS[op].cast == FLOAT32:
        expected = call(fresh(call, widened(inputs)))
    else:
        expected = call(fresh(call, inputs))
    with bf16():
        got = call(fresh(call, inputs))
    assert same(got, expected)


@on_every_op
def test_outside_autocast_a_mixture_is_an_error_as_ever(op: str) -> None:
    call = CALLS[op]
    names = floats(call)[:1]
    if not names:
        return  # float64 throughout
    if len(floats(call)) == 1 and DECISIONS[op].cast != FLOAT32:
        return
    with pytest.raises(errors.DtypeError):
        call(fresh(call, narrow(call, *names)))


@pytest.mark.parametrize("op", [op for op, call in CALLS.items() if call.grads])
def test_gradients_come_back_in_the_dtype_of_each_input(op: str) -> None:
    call = CALLS[op]
    inputs = narrow(call, call.grads[0])

    def gradients(given: dict[str, Any], autocast: bool) -> dict[str, Tensor]:
        leaves = {name: given[name].clone().requires_grad_() for name in call.grads}
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            out = call({**given, **leaves})[0]
        assert out.dtype == given["x" if op == "solu" else call.grads[-1]].dtype
        (out * torch.arange(out.numel()).reshape(out.shape)).sum().backward()
        return {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}

    expected = gradients(cast_as_told(op, inputs), autocast=False)
    got = gradients(inputs, autocast=True)
    assert got.keys() == expected.keys() == set(call.grads)
    for name, grad in got.items():
        assert grad.dtype == inputs[name].dtype
        assert torch.equal(grad, expected[name].to(grad.dtype)), name


@pytest.mark.parametrize("gradient", ["sparse_decode_grad_values", "sparse_decode_grad_W_dec"])
def test_gradient_ops_promote_as_the_op_does(gradient: str) -> None:
    inputs = CALLS["sparse_decode"].inputs
    grad = CALLS["sae_loss"].inputs["x"]
    op = getattr(torch.ops.microtome, gradient)
    args = {
        "sparse_decode_grad_values": (grad, inputs["indices"], inputs["W_dec"]),
        "sparse_decode_grad_W_dec": (inputs["values"], inputs["indices"], grad, 12),
    }[gradient]
    first, *rest = args
    with bf16():
        got = op(first.bfloat16(), *rest)
    assert torch.equal(got, op(first.bfloat16().float(), *rest))


def test_what_autocast_cannot_have_made_stays_an_error() -> None:
    values, indices = torch.ones(2, 1, dtype=torch.float64), torch.zeros(2, 1, dtype=torch.int64)
    text = "must share one dtype, got values float64, W_dec float32"
    with bf16(), pytest.raises(errors.DtypeError, match=text):
        sparse_decode(values, indices, torch.ones(3, 4))


def test_both_narrow_dtypes_together_become_float32() -> None:
    values, indices = torch.ones(2, 1).half(), torch.zeros(2, 1, dtype=torch.int64)
    with bf16():
        assert sparse_decode(values, indices, torch.ones(3, 4).bfloat16()).dtype == torch.float32


def test_tensors_in_lists_are_cast_and_held_ones_are_not() -> None:
    half, full = torch.ones(1).bfloat16(), torch.ones(1)
    args = [half, [half, full], half, 3]
    got: Any = _autocast.cast("mlp_shapley", ["x", "weights", "", "k"], args)
    assert [got[0].dtype, *(t.dtype for t in got[1])] == [torch.float32] * 3
    assert got[2] is half
    assert got[3] == 3
