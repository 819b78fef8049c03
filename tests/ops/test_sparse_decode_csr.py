"""sparse_decode of codes by rows: the spec by hand, then every backend against float64."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

from microtome import errors
from microtome._csr import offsets_of, rows_of
from microtome._seed import generator
from microtome.ops import sparse_decode, use_backend
from microtome.ops.sparse_decode_csr import csr_decode, csr_grad_values, csr_grad_W_dec
from microtome.testing import assert_accurate, backends_of, factor_of

on_every_backend = pytest.mark.parametrize("backend", backends_of(csr_decode))
both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)

# Row 0: {0: 2, 2: -1}, row 1: nothing, row 2: {2: 0.5}.
VALUES, INDICES = torch.tensor([2.0, -1.0, 0.5]), torch.tensor([0, 2, 2])
OFFSETS = torch.tensor([0, 2, 2, 3])
W_DEC = torch.tensor([[1.0, 0.0, 3.0], [9.0, 9.0, 9.0], [0.0, 4.0, -2.0]])
B_DEC = torch.tensor([10.0, 20.0, 30.0])
OUT = [[12.0, 16.0, 38.0], [10.0, 20.0, 30.0], [10.0, 22.0, 29.0]]

LENGTHS = {
    "no_rows": [],
    "one_row": [5],
    "no_entries": [0, 0, 0],
    "uneven": [3, 0, 17, 1, 0, 0, 9],
    "long_row": [2, 300, 0, 128, 129, 1],
}


def code_of(name: str, dtype: torch.dtype, f: int = 23, d: int = 19) -> dict[str, Tensor]:
    """A random code with rows of the lengths above; feature 0 is in every row that has any."""
    g = generator(0, name)
    lengths = torch.tensor(LENGTHS[name], dtype=torch.int64)
    offsets = offsets_of(lengths)
    m = int(offsets[-1])
    indices = torch.randint(0, f, (m,), generator=g, dtype=torch.int32)
    indices[offsets[:-1][lengths > 0]] = 0
    floats = {
        "values": torch.randn(m, generator=g),
        "W_dec": torch.randn(f, d, generator=g),
        "b_dec": torch.randn(d, generator=g),
        "grad_out": torch.randn(len(lengths), d, generator=g),
    }
    return {**{n: t.to(dtype) for n, t in floats.items()}, "indices": indices, "offsets": offsets}


def plain(values: Tensor, indices: Tensor, offsets: Tensor, W_dec: Tensor, b_dec: Tensor) -> Tensor:
    """By way of the dense code, one row at a time."""
    out = [b_dec.expand(1, -1)[:0]]
    for first, last in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        rows = values[first:last, None] * W_dec[indices[first:last].long()]
        out.append((rows.sum(0) + b_dec)[None])
    return torch.cat(out)


def answers(function: object, c: dict[str, Tensor]) -> list[Tensor]:
    """The output and the gradients of <output, grad_out>."""
    leaves = [c[n].clone().requires_grad_() for n in ("values", "W_dec", "b_dec")]
    out = function(leaves[0], c["indices"], c["offsets"], leaves[1], leaves[2])  # type: ignore[operator]
    return [out.detach(), *torch.autograd.grad(out, leaves, c["grad_out"], materialize_grads=True)]


def ours(values: Tensor, indices: Tensor, offsets: Tensor, W_dec: Tensor, b_dec: Tensor) -> Tensor:
    return sparse_decode(values, indices, W_dec, b_dec, offsets)


@on_every_backend
def test_it_agrees_with_numbers_worked_by_hand(backend: str) -> None:
    c = {"values": VALUES, "indices": INDICES, "offsets": OFFSETS, "W_dec": W_DEC, "b_dec": B_DEC}
    c["grad_out"] = torch.tensor([[1.0, 0.0, 2.0], [5.0, 5.0, 5.0], [0.0, 3.0, 1.0]])
    with use_backend(backend):
        out, grad_values, grad_W, grad_b = answers(ours, c)
        assert sparse_decode(VALUES, INDICES.int(), W_DEC, offsets=OFFSETS.int()).tolist() == [
            [2.0, -4.0, 8.0], [0.0, 0.0, 0.0], [0.0, 2.0, -1.0],
        ]  # fmt: skip
    assert out.tolist() == OUT
    # <(1,0,2), (1,0,3)> = 7, <(1,0,2), (0,4,-2)> = -4, <(0,3,1), (0,4,-2)> = 10.
    assert grad_values.tolist() == [7.0, -4.0, 10.0]
    assert grad_W.tolist() == [[2.0, 0.0, 4.0], [0.0, 0.0, 0.0], [-1.0, 1.5, -1.5]]
    assert grad_b.tolist() == [6.0, 8.0, 8.0]


@pytest.mark.parametrize("name", LENGTHS)
@both_dtypes
@on_every_backend
def test_every_backend_and_gradient_is_as_accurate_as_plain_pytorch(
    backend: str, dtype: torch.dtype, name: str
) -> None:
    c = code_of(name, dtype)
    wide = {n: t.double() if t.is_floating_point() else t for n, t in c.items()}
    with use_backend(backend):
        got = answers(ours, c)
    what = ("out", "values", "W_dec", "b_dec")
    for n, g, p, e in zip(what, got, answers(plain, c), answers(plain, wide), strict=True):
        assert_accurate(g, p, e, n, factor=factor_of(backend, e))


@on_every_backend
def test_rows_of_thousands_of_entries_are_as_accurate_as_a_product(backend: str) -> None:
    g, n, f, d = generator(0, "massive"), 8, 3000, 32
    values, W_dec = torch.rand(n, f, generator=g), torch.randn(f, d, generator=g)
    exact = values.double() @ W_dec.double()
    allowed = 2 * float((values @ W_dec - exact).abs().max())
    indices, offsets = torch.arange(f).repeat(n).int(), torch.arange(n + 1) * f
    by_row = torch.arange(n).repeat(f).int()  # as the gradient of n rows of a decoder
    with use_backend(backend):
        out = csr_decode(values.flatten(), indices, offsets, W_dec, None)
        grad = csr_grad_W_dec(values.T.flatten(), by_row, torch.arange(f + 1) * n, W_dec, n)
    assert float((out - exact).abs().max()) <= allowed
    assert float((grad - exact).abs().max()) <= allowed


@on_every_backend
def test_repeats_give_the_same_bits(backend: str) -> None:
    c = code_of("long_row", torch.float32)
    with use_backend(backend):
        assert all(map(torch.equal, answers(ours, c), answers(ours, c)))


@on_every_backend
def test_unused_entries_change_nothing_and_get_no_gradient(backend: str) -> None:
    c = code_of("uneven", torch.float32)
    m = c["values"].numel()
    more = {**c, "values": torch.cat([c["values"], torch.full((200,), 7.0)])}
    more["indices"] = torch.cat([c["indices"], torch.full((200,), 22, dtype=torch.int32)])
    with use_backend(backend):
        usual, got = answers(ours, c), answers(ours, more)
    assert torch.equal(got[1][:m], usual[1])
    assert not got[1][m:].any()
    for i in (0, 2, 3):
        assert torch.equal(got[i], usual[i])


@pytest.mark.parametrize("backend", backends_of(csr_decode)[:-1])
def test_a_kernel_reads_no_entry_that_is_not_there(backend: str) -> None:
    # A compiled graph, or a call on a GPU, skips the check at the public edge.
    offsets = torch.tensor([-5, 2, 1, 10**6])
    with use_backend(backend):
        out = csr_decode(VALUES, INDICES, offsets, W_DEC, None)
    assert out.tolist() == [[2.0, -4.0, 8.0], [0.0, 0.0, 0.0], [0.0, -2.0, 1.0]]


@on_every_backend
def test_strided_inputs_give_the_same_bits(backend: str) -> None:
    c = code_of("uneven", torch.float32)
    strided = {n: torch.stack([t, t], -1)[..., 0] for n, t in c.items()}
    strided["W_dec"] = c["W_dec"].t().contiguous().t()
    strided["grad_out"] = c["grad_out"][:1].expand_as(c["grad_out"])
    c["grad_out"] = strided["grad_out"].contiguous()
    with use_backend(backend):
        assert all(map(torch.equal, answers(ours, c), answers(ours, strided)))


def test_the_reference_passes_gradcheck_twice() -> None:
    c = code_of("uneven", torch.float64, 4, 3)
    leaves = [c[n].requires_grad_() for n in ("values", "W_dec", "b_dec")]
    function = lambda v, W, b: sparse_decode(v, c["indices"], W, b, c["offsets"])  # noqa: E731
    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


@on_every_backend
def test_the_ops_pass_opcheck(backend: str) -> None:
    c = code_of("uneven", torch.float32)
    values, W_dec = c["values"].requires_grad_(), c["W_dec"].requires_grad_()
    code = (c["indices"], c["offsets"])
    with use_backend(backend):
        torch.library.opcheck(csr_decode.torch_op, (values, *code, W_dec, c["b_dec"]))
        torch.library.opcheck(csr_grad_values.torch_op, (c["grad_out"], *code, W_dec))
        torch.library.opcheck(csr_grad_W_dec.torch_op, (values, *code, c["grad_out"], 23))


@on_every_backend
@pytest.mark.parametrize(("f", "d"), [(3, 0), (1, 1)])
def test_narrow_weights_work(backend: str, f: int, d: int) -> None:
    c = code_of("uneven", torch.float32, f, d)
    with use_backend(backend):
        out, grad_values, grad_W, _ = answers(ours, c)
    assert (out.shape, grad_W.shape) == ((7, d), (f, d))
    assert grad_values.shape == c["values"].shape


def test_the_row_of_an_entry_is_found_past_empty_rows() -> None:
    assert rows_of(torch.tensor([0, 0, 2, 2, 3, 3]), 5).tolist() == [1, 1, 3, 4, 4]
    assert rows_of(torch.tensor([0]), 2).tolist() == [0, 0]


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (
            {"values": VALUES[None]},
            errors.ShapeError,
            "sparse_decode: values must be [m], got shape [1, 3].",
        ),
        (
            {"offsets": OFFSETS[None]},
            errors.ShapeError,
            "sparse_decode: offsets must be [n + 1], n rows and one end, got shape [1, 4].",
        ),
        (
            {"offsets": OFFSETS[:0]},
            errors.ShapeError,
            "sparse_decode: offsets must be [n + 1], n rows and one end, got shape [0].",
        ),
        (
            {"offsets": OFFSETS.float()},
            errors.DtypeError,
            "sparse_decode: offsets must be int32, int64, got float32. Cast it with .to().",
        ),
        (
            {"offsets": torch.tensor([0, 2, 1, 3])},
            errors.ArgumentError,
            "sparse_decode: offsets must not fall, got 2 then 1 at row 1.",
        ),
        (
            {"offsets": torch.tensor([0, 2, 4])},
            errors.ArgumentError,
            "sparse_decode: offsets must go from 0 to at most m=3, got 0 to 4.",
        ),
        (
            {"indices": torch.tensor([0, 2, 3])},
            errors.ArgumentError,
            "sparse_decode: indices must lie in [0, f=3), got 3.",
        ),
    ],
)
def test_bad_input_is_named(change: dict[str, Tensor], error: type[Exception], text: str) -> None:
    code = {"values": VALUES, "indices": INDICES, "W_dec": W_DEC, "offsets": OFFSETS, **change}
    with pytest.raises(error, match=f"^{re.escape(text)}$"):
        sparse_decode(**code)
