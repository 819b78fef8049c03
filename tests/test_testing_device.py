"""What moves the ops of a test to a GPU, with the CPU in the place of the GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from microtome.ops import sparse_decode
from microtome.ops._registry import OPS, Backend
from microtome.ops.sae_loss import sae_loss_reference
from microtome.testing import CASES, Case, ops_on


def test_an_op_gets_copies_with_the_same_strides(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []

    def impl(*tensors: Tensor) -> tuple[Tensor, ...]:
        seen.extend(tensors)
        return sae_loss_reference(*tensors)

    stand_in = Backend("cpu", "", lambda *_: None)
    stand_in.__dict__["run"] = impl
    op = OPS["sae_loss"]
    monkeypatch.setattr(op, "backends", (stand_in,))
    t = Case("strided", 6, 18, 30, 3, "strided").inputs()
    arguments = [t[name] for name in ("x", "values", "indices", "W_dec", "b_dec")]
    expected = sae_loss_reference(*arguments)
    with ops_on("cpu"):
        got = op(*arguments)
    assert all(map(torch.equal, got, expected))
    assert [a.stride() for a in seen] == [a.stride() for a in arguments]
    assert all(a.data_ptr() != b.data_ptr() for a, b in zip(seen, arguments, strict=True))


def test_what_an_op_writes_comes_back() -> None:
    t = CASES[2].inputs()
    op = OPS["sae_update"]
    n, k, d = 7, 4, 16
    code = (t["indices"].int(), t["values"], torch.ones(n, k), torch.ones(n, d), 0.5)
    rule = ("sgd", 0.1, 0.0, 0.0, 1e-8, 0.0, 1, False, False, False, False)

    def step() -> list[Tensor]:
        params = [t[name].clone() for name in ("W_enc", "b_enc", "W_dec", "b_dec")]
        op(*code, *[None] * 4, 0.0, t["x"], *params, *[None] * 8, "", *[None] * 8, *rule, None)
        return params

    expected = step()
    with ops_on("cpu"):
        got = step()
    assert all(map(torch.equal, got, expected))
    assert not torch.equal(got[0], t["W_enc"])


def test_gradients_come_back_to_the_tensors_of_the_test() -> None:
    values, W_dec = torch.randn(3, 2, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    indices = torch.tensor([[0, 1], [4, 4], [2, 0]])
    sparse_decode(values, indices, W_dec).square().sum().backward()
    expected = [t.grad.clone() for t in (values, W_dec)]
    values.grad = W_dec.grad = None
    with ops_on("cpu"):
        sparse_decode(values, indices, W_dec).square().sum().backward()
    assert all(map(torch.equal, (values.grad, W_dec.grad), expected))
