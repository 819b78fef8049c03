"""solu: by hand, then every backend and its gradient against float64, and its edges."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from microtome import errors
from microtome._seed import generator
from microtome.ops import solu, use_backend
from microtome.ops.solu import _solu, solu_grad_x_reference, solu_reference
from microtome.testing import assert_accurate, backends_of

on_every_backend = pytest.mark.parametrize("backend", backends_of(_solu))
SHAPES = {"one": (1,), "row": (1, 19), "odd": (7, 33), "axes": (2, 3, 40), "none": (0, 8),
          "no_width": (3, 0), "wide": (3, 1025)}  # fmt: skip


def inputs(name: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    g = generator(0, "solu", name)
    x, grad = (3 * torch.randn(SHAPES[name], generator=g) for _ in range(2))
    return x.to(dtype), grad.to(dtype)


def test_a_row_by_hand() -> None:
    share = math.exp(2) / (math.exp(2) + 1)
    wanted = torch.tensor([[0.0, 2 * share]])
    torch.testing.assert_close(solu_reference(torch.tensor([[0.0, 2.0]])), wanted)


def test_the_gradient_is_that_of_plain_autograd() -> None:
    x = torch.randn(4, 9, dtype=torch.float64, requires_grad=True)
    g = torch.randn(4, 9, dtype=torch.float64)
    (wanted,) = torch.autograd.grad((x * x.softmax(-1) * g).sum(), x)
    torch.testing.assert_close(solu_grad_x_reference(g, x), wanted)
    assert torch.autograd.gradcheck(solu, (x,))


@on_every_backend
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_forward_and_gradient_are_accurate(backend: str, name: str, dtype: torch.dtype) -> None:
    x, grad = inputs(name, dtype)
    with use_backend(backend):
        leaf = x.clone().requires_grad_()
        out = solu(leaf)
        out.backward(grad)
    exact, exact_grad = solu_reference(x.double()), solu_grad_x_reference(grad.double(), x.double())
    assert leaf.grad is not None
    assert_accurate(out.detach(), x * x.softmax(-1), exact, factor=4.0)
    assert_accurate(leaf.grad, solu_grad_x_reference(grad, x), exact_grad, "gradient", factor=4.0)


@on_every_backend
def test_rows_apart_in_memory_and_large_entries_are_read_right(backend: str) -> None:
    x = torch.randn(17, 6, generator=generator(0, "solu")).t()
    x = torch.cat([x, x + 200, x - 200])
    with use_backend(backend):
        got = solu(x)
    torch.testing.assert_close(got.double(), solu_reference(x.double()), rtol=1e-5, atol=1e-6)


@on_every_backend
def test_nan_stays_in_its_row(backend: str) -> None:
    x = torch.randn(3, 40, generator=generator(0, "solu nan"))
    x[1, 5] = math.nan
    with use_backend(backend):
        out = solu(x)
    assert out[1].isnan().all()
    assert out[[0, 2]].isfinite().all()


@on_every_backend
def test_the_op_passes_opcheck(backend: str) -> None:
    x = torch.randn(3, 5, generator=generator(0, "opcheck"), requires_grad=True)
    with use_backend(backend):
        torch.library.opcheck(torch.ops.microtome.solu.default, (x,))


def test_messages_say_what_is_wrong() -> None:
    with pytest.raises(errors.ShapeError, match=r"solu: x must"):
        solu(torch.tensor(1.0))
    with pytest.raises(errors.DtypeError, match=r"solu: x"):
        solu(torch.tensor([1, 2]))
