"""batch_topk_encode: the spec by hand, then every backend against the dense formula."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

from microtome import SparseCode
from microtome.errors import ArgumentError, NonFiniteError, ShapeError
from microtome.ops import (
    batch_topk_encode,
    screen_weights,
    sparse_decode,
    threshold_encode,
    use_backend,
)
from microtome.ops.batch_topk_encode import _encode
from microtome.testing import CASES, Case, assert_accurate, backends_of, factor_of

on_every_backend = pytest.mark.parametrize("backend", backends_of(_encode))
SMALL = [c for c in CASES if c.name not in ("massive", "medium", "dense")]
INTEGERS = Case("integers", 9, 16, 400, 12, "ties")  # every sum is exact in float32

Answer = tuple[Tensor, Tensor, Tensor, Tensor]


def inputs_of(case: Case, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    i = case.inputs(dtype)
    return {name: i[name] for name in ("x", "W_enc", "b_enc", "b_dec")}


def call(i: dict[str, Tensor], k: int, **options: object) -> Answer:
    return batch_topk_encode(i["x"], i["W_enc"], i["b_enc"], i["b_dec"], k=k, **options)  # type: ignore[arg-type]


def pre_activations(i: dict[str, Tensor], dtype: torch.dtype = torch.float64) -> Tensor:
    x, b_dec, W_enc, b_enc = (i[n].to(dtype) for n in ("x", "b_dec", "W_enc", "b_enc"))
    return linear(x - b_dec, W_enc, b_enc)


def expected(z: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """By sorting the whole batch: value descending, then place ascending."""
    (n, f), flat = z.shape, z.flatten()
    places = torch.sort(flat, descending=True, stable=True).indices[: n * k]
    rows, order = torch.sort(places // f, stable=True)
    places = places[order]
    counts = torch.bincount(rows, minlength=n)
    return flat[places], places % f, torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def check(got: Answer, i: dict[str, Tensor], k: int, backend: str) -> None:
    """As many as asked for, the largest wherever float32 can tell, order, values, certificate."""
    values, indices, offsets, candidates = got
    (n, _), f = i["x"].shape, i["W_enc"].shape[0]
    z, plain = pre_activations(i), pre_activations(i, torch.float32)
    slack = 4 * float((plain.double() - z).abs().max()) + 1e-12 if n else 0.0
    assert values.shape == indices.shape == (n * k,)
    assert (indices.dtype, offsets.dtype, candidates.dtype) == (
        torch.int32, torch.int64, torch.int32,
    )  # fmt: skip
    assert int(offsets[-1]) == n * k
    rows = torch.arange(n).repeat_interleave(offsets.diff())
    places = rows * f + indices
    assert places.unique().numel() == n * k
    chosen, usual = z.flatten()[places], plain.flatten()[places]
    rest = torch.ones(n * f, dtype=torch.bool).index_fill_(0, places, False)
    if rest.any():
        assert chosen.min() >= z.flatten()[rest].max() - slack
    assert_accurate(values, usual.to(values.dtype), chosen, factor=factor_of(backend, chosen))
    same = rows[1:] == rows[:-1]
    falls = (values[1:] < values[:-1]) | (
        (values[1:] == values[:-1]) & (indices[1:] > indices[:-1])
    )
    assert bool(falls[same].all())
    assert bool(((candidates <= f) & (candidates >= offsets.diff())).all())


@on_every_backend
def test_it_agrees_with_numbers_worked_by_hand(backend: str) -> None:
    x = torch.tensor([[1.0, 2.0], [-1.0, 0.5], [2.0, 2.0]])
    W_enc = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    b_enc, b_dec = torch.tensor([0.0, 0.5, -1.0]), torch.tensor([0.5, 0.5])
    # z = [.5, 2, 1], [-1.5, .5, -2.5], [1.5, 2, 2]
    with use_backend(backend):
        values, indices, offsets, candidates = batch_topk_encode(x, W_enc, b_enc, b_dec, k=1)
    assert values.tolist() == [2.0, 2.0, 2.0]
    assert indices.tolist() == [1, 1, 2]
    assert offsets.tolist() == [0, 1, 1, 3]
    assert candidates.tolist() == [3, 3, 3]


@on_every_backend
def test_ties_at_the_border_go_to_the_lower_row_then_the_lower_index(backend: str) -> None:
    # Every row is [1, 0, -0, 1, 0, ...]: the ones go first, then zeros of either sign from the top.
    W_enc = torch.tensor([[1.0], [0.0], [-0.0]]).repeat(100, 1)
    with use_backend(backend):
        for n, k in ((1, 103), (3, 150), (5, 100), (4, 30)):
            _, indices, offsets, _ = batch_topk_encode(torch.ones(n, 1), W_enc, k=k)
            z = torch.ones(n, 1) @ W_enc.T
            wanted = expected(z, k)
            assert torch.equal(offsets, wanted[2])
            assert torch.equal(indices.long(), wanted[1])


@pytest.mark.parametrize("case", SMALL, ids=lambda c: c.name)
@on_every_backend
def test_every_backend_returns_the_largest_of_the_batch(backend: str, case: Case) -> None:
    i = inputs_of(case)
    with use_backend(backend):
        check(call(i, case.k), i, case.k, backend)


@pytest.mark.parametrize("name", ["massive", "medium"])
def test_the_reference_takes_larger_cases(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = next(c for c in CASES if c.name == name)
    i = inputs_of(case)
    check(call(i, case.k), i, case.k, "reference")
    monkeypatch.setattr("microtome.ops._csr_encode.BLOCK", 9000)  # 30 or nine rows at a time
    check(call(i, case.k), i, case.k, "reference")


def test_the_references_never_form_all_pre_activations(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    def recorded(*args: Tensor) -> Tensor:
        z = linear(*args)
        sizes.append(z.numel())
        return z

    monkeypatch.setattr("microtome.ops._csr_encode.linear", recorded)
    monkeypatch.setattr("microtome.ops._csr_encode.BLOCK", 2000)
    i = inputs_of(INTEGERS)
    with use_backend("reference"):
        call(i, 12)
        threshold_encode(i["x"], i["W_enc"])
    assert sizes == [2000, 1600] * 2


def test_blocks_of_rows_change_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    i = inputs_of(INTEGERS)
    usual = call(i, 12)
    for block in (1, 1300, 2000):
        monkeypatch.setattr("microtome.ops._csr_encode.BLOCK", block)
        assert all(map(torch.equal, usual, call(i, 12)))


@on_every_backend
def test_exact_sums_give_the_answer_of_a_sort(backend: str) -> None:
    i = inputs_of(INTEGERS)
    wanted = expected(pre_activations(i, torch.float32), 12)
    with use_backend(backend):
        values, indices, offsets, _ = call(i, 12)
    assert torch.equal(values, wanted[0])
    assert torch.equal(indices.long(), wanted[1])
    assert torch.equal(offsets, wanted[2])


@on_every_backend
def test_one_row_may_take_everything_and_others_nothing(backend: str) -> None:
    i = inputs_of(Case("greedy", 6, 12, 300, 20))
    i["x"][3] *= 1000.0
    with use_backend(backend):
        got = call(i, 20)
    check(got, i, 20, backend)
    assert got[2].diff().tolist() == [0, 0, 0, 120, 0, 0]


@on_every_backend
def test_equal_rows_share_what_the_order_of_rows_says(backend: str) -> None:
    row = inputs_of(Case("equal", 1, 12, 300, 1))
    i = {**row, "x": row["x"].expand(5, 12)}
    with use_backend(backend):
        values, indices, offsets, _ = call(i, 7)
        alone = call(row, 7)
    assert offsets.tolist() == [0, 7, 14, 21, 28, 35]
    assert torch.equal(indices, alone[1].repeat(5))
    torch.testing.assert_close(values, alone[0].repeat(5))


@on_every_backend
def test_bfloat16_is_compared_in_float32(backend: str) -> None:
    i = inputs_of(Case("half", 5, 17, 70, 6), torch.bfloat16)
    with use_backend(backend):
        values, indices, offsets, _ = call(i, 6)
    wanted = expected(pre_activations(i, torch.float32), 6)
    assert values.dtype == torch.bfloat16
    assert torch.equal(offsets, wanted[2])
    assert torch.equal(indices.long(), wanted[1])


def test_float64_is_compared_in_float64() -> None:
    i = {n: t.double() for n, t in inputs_of(Case("wide", 5, 17, 70, 6)).items()}
    values, indices, _, _ = call(i, 6)
    wanted = expected(pre_activations(i), 6)
    assert torch.equal(values, wanted[0])
    assert torch.equal(indices.long(), wanted[1])


@on_every_backend
def test_strided_inputs_repeats_and_a_cached_screen_change_no_bit(backend: str) -> None:
    i = inputs_of(Case("strided", 6, 18, 700, 5))
    wide = {n: torch.stack([t, t], -1)[..., 0] for n, t in i.items()}
    screen = screen_weights(i["W_enc"], "bf16")
    with use_backend(backend):
        usual, again, views = call(i, 5), call(i, 5), call(wide, 5)
        screened = call(i, 5, screen=screen)
    for other in (again, views, screened):
        assert all(map(torch.equal, usual, other))


@pytest.mark.parametrize(
    "case",
    [c for c in CASES if c.name in ("small", "odd", "k_is_f", "empty")],
    ids=lambda c: c.name,
)
@on_every_backend
def test_gradients_are_those_of_the_dense_formula(backend: str, case: Case) -> None:
    grads = []
    for dtype, dense in ((torch.float64, True), (torch.float32, True), (torch.float32, False)):
        i = {n: t.to(dtype) for n, t in inputs_of(case).items()}
        leaves = [t.requires_grad_() for t in i.values()]
        with use_backend("auto" if dense else backend):
            values = call(i, case.k)[0]
            if dense:
                plain = {n: t.detach().float() for n, t in i.items()}
                _, indices, offsets, _ = call(plain, case.k)
                rows = torch.arange(case.n).repeat_interleave(offsets.diff())
                values = pre_activations(i, dtype)[rows, indices.long()]
            weight = torch.linspace(-1, 1, values.numel(), dtype=dtype)
            grads.append(torch.autograd.grad((values * weight).sum(), leaves))
    for name, exact, plain, got in zip(i, *grads, strict=True):
        assert_accurate(got, plain, exact, name, factor=factor_of(backend, exact))


def test_the_gradients_pass_gradcheck_twice() -> None:
    i = {n: t.double().requires_grad_() for n, t in inputs_of(Case("c", 3, 4, 6, 2)).items()}
    function = lambda *w: batch_topk_encode(*w, k=2)[0]  # noqa: E731
    assert torch.autograd.gradcheck(function, tuple(i.values()))
    assert torch.autograd.gradgradcheck(function, tuple(i.values()))


@on_every_backend
def test_a_batch_topk_sae_learns_as_the_dense_formula_says(backend: str) -> None:
    i = {n: t.requires_grad_() for n, t in inputs_of(Case("sae", 7, 16, 60, 4)).items()}
    W_dec = torch.randn(60, 16, generator=torch.Generator().manual_seed(0), requires_grad=True)
    leaves = [*i.values(), W_dec]
    with use_backend(backend):
        values, indices, offsets, _ = call(i, 4)
        out = sparse_decode(values.relu(), indices, W_dec, i["b_dec"], offsets)
        got = torch.autograd.grad(((out - i["x"].detach()) ** 2).sum(), leaves)
    z = pre_activations(i, torch.float32)
    least = z.detach().flatten().topk(28).values[-1]
    dense = (z * (z >= least)).relu() @ W_dec + i["b_dec"]
    usual = torch.autograd.grad(((dense - i["x"].detach()) ** 2).sum(), leaves)
    torch.testing.assert_close(out, dense)
    for a, b in zip(got, usual, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-2)


@on_every_backend
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("k", [6, 200])
def test_what_is_not_finite_is_named(backend: str, bad: float, k: int) -> None:
    for name, row in (("x", 4), ("W_enc", 211), ("b_enc", 211), ("b_dec", 0)):
        i = inputs_of(Case("nan", 9, 20, 300, 6))
        i[name][row if name != "b_dec" else 3] = bad
        text = f"batch_topk_encode: {name} holds NaN or infinity in row {row}."
        with use_backend(backend), pytest.raises(NonFiniteError, match=re.escape(text)):
            call(i, k)


@on_every_backend
def test_the_op_passes_opcheck(backend: str) -> None:
    i = inputs_of(Case("opcheck", 4, 10, 40, 3))
    args = (i["x"].requires_grad_(), i["W_enc"].requires_grad_(), i["b_enc"], i["b_dec"], 3)
    with use_backend(backend):
        torch.library.opcheck(
            torch.ops.microtome.batch_topk_encode, (*args, "exact", "auto", None, None)
        )


def test_a_compiled_graph_holds_the_op_whole() -> None:
    i = inputs_of(Case("compile", 6, 10, 70, 3))

    def encode(x: Tensor) -> Tensor:
        values, indices, offsets, _ = batch_topk_encode(x, i["W_enc"], i["b_enc"], k=3)
        return sparse_decode(values, indices, i["W_enc"], None, offsets)

    compiled = torch.compile(encode, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(i["x"]), encode(i["x"]))


def test_the_result_is_a_sparse_code() -> None:
    i = inputs_of(Case("code", 5, 10, 70, 3))
    values, indices, offsets, _ = call(i, 3)
    code = SparseCode(values, indices, 70, offsets)
    z = pre_activations(i, torch.float32)
    dense = z * (z >= z.flatten().topk(15).values[-1])
    torch.testing.assert_close(code.to_dense(), dense)
    torch.testing.assert_close(code.to_torch_csr().to_dense(), dense)
    torch.testing.assert_close(code[1:3].to_dense(), dense[1:3])
    assert len(code) == 5


def test_messages_say_what_came_and_what_is_allowed() -> None:
    x, W_enc = torch.randn(3, 4), torch.randn(8, 4)
    with pytest.raises(
        ArgumentError, match=r"batch_topk_encode: k must be between 1 and f=8, got k=9\."
    ):
        batch_topk_encode(x, W_enc, k=9)
    with pytest.raises(ArgumentError, match=r"got k=0\."):
        batch_topk_encode(x, W_enc, k=0)
    with pytest.raises(
        ShapeError, match=r"W_enc must be \[f, d\] with d=4 as in x, got shape \[8, 5\]"
    ):
        batch_topk_encode(x, torch.randn(8, 5), k=2)
    with pytest.raises(ArgumentError, match="precision must be one of 'exact', 'fast'"):
        batch_topk_encode(x, W_enc, k=2, precision="sloppy")
